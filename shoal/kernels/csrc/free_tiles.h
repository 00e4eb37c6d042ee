#pragma once
// Sums in whatever order is faster: only in the build that measures what the same bits in any company cost
// (SHOAL_FREE_ORDER in CMakeLists.txt). Knows register tiles; must not be used where the option is off.
#include "free_order.h"
#include "kernels.h"
#include "tiles.h"

namespace shoal {
namespace {

// A tile of few rows waits for its sums: here each of them is made in several chains, every one from its own words.
template <class Dot, int rows, int chains>
__attribute__((noinline)) void tile_in_chains(const Stretch &t) {
  const char *next = t.next;
  for (int64_t at = 0; at < PANEL; at += 2 * REGISTER) {
    ru a[chains][rows], b[chains][rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
      for (int c = 0; c < chains; c++) {
        a[c][r] = t.fresh || c ? (ru){} : get(t.sums + r * PANEL + at);
        b[c][r] = t.fresh || c ? (ru){} : get(t.sums + r * PANEL + at + REGISTER);
      }
    const uint32_t *x = t.x;
    const char *w = t.panel + at * WORD;
    int64_t s = 0;
    for (; s + chains <= t.steps; s += chains) {
#pragma GCC unroll 16
      for (int c = 0; c < chains; c++, x += rows, w += PANEL * WORD, next += t.pace) {
        fetch(next, t.pace);
        const ru w0 = get(w), w1 = get(w + REGISTER * WORD);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
          const ru value = spread(x[r]);
          a[c][r] = Dot::dot(a[c][r], value, w0);
          b[c][r] = Dot::dot(b[c][r], value, w1);
        }
      }
    }
    for (; s < t.steps; s++, x += rows, w += PANEL * WORD, next += t.pace) {
      fetch(next, t.pace);
      const ru w0 = get(w), w1 = get(w + REGISTER * WORD);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        const ru value = spread(x[r]);
        a[0][r] = Dot::dot(a[0][r], value, w0);
        b[0][r] = Dot::dot(b[0][r], value, w1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
      for (int c = 1; c < chains; c++) {
        a[0][r] = (ru)((rf)a[0][r] + (rf)a[c][r]);
        b[0][r] = (ru)((rf)b[0][r] + (rf)b[c][r]);
      }
      put(t.sums + r * PANEL + at, a[0][r]);
      put(t.sums + r * PANEL + at + REGISTER, b[0][r]);
    }
  }
}

// Chains gain a tenth for tiles of four and five rows (bf16, fp32 alike), and lose up to 4 % for all others.
inline TileFunction free_tile(const TileFunction *tiles, int64_t rows) {
#ifdef __AVX512F__
  const bool pairs = tiles == TILES[(int)Kind::bf16];
  if (pairs || tiles == TILES[(int)Kind::fp32]) {
    if (rows == 4) return pairs ? tile_in_chains<Pairs, 4, 3> : tile_in_chains<Floats, 4, 3>;
    if (rows == 5) return pairs ? tile_in_chains<Pairs, 5, 2> : tile_in_chains<Floats, 5, 2>;
  }
#endif
  return tiles[rows - 1];
}

// to += from, floats or whole numbers.
inline void add_sums(float *to, const float *from, int64_t count, bool whole) {
  for (int64_t i = 0; i < count; i += LANES) {
    if (whole) store_bits(to + i, load_bits(to + i) + load_bits(from + i));
    else store(to + i, load(to + i) + load(from + i));
  }
}

}  // namespace
}  // namespace shoal
