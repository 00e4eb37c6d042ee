// Puts a weight into panels of 32 outputs: words of neighbouring inputs, 32 outputs of a word side by side, so that a
// register tile reads them as they come. Knows the layouts; must not know how they are multiplied.
//   fp32 [k][32] float          bf16 [k / 2][32][2]          int8 [k / 4][32][4]
//   int4 [k / 8][32][4] bytes: inputs 0 to 3 of the eight in the low nibbles, 4 to 7 in the high ones
//   int4_a16 [k / 8][32][2] uint16: of inputs 2j and 2j + 1 of the eight, nibble j
// k is rounded up, and what is not there is zero.
#include "ops.h"
#include "threads.h"
#include "rows.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

struct Shape {
  int64_t per_word;    // inputs in a word of the panel
  int64_t input_size;  // bytes of an input as it is given
};

Shape shape_of(Kind kind) {
  switch (kind) {
    case Kind::fp32: return {1, 4};
    case Kind::bf16: return {2, 2};
    case Kind::int8:
    case Kind::int8_a16: return {4, 1};
    default: return {8, 1};
  }
}

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Sixteen words of nibbles from word `first` on of a row of k values 0 to 15.
vu nibbles_at(Kind kind, const uint8_t *row, int64_t first, int64_t k) {
  vu v = {};
  for (int64_t i = 0; i < LANES; i++) {
    uint32_t word = 0;
    for (int64_t j = 0; j < 8; j++) {
      const int64_t at = (first + i) * 8 + j;
      const int64_t shift = kind == Kind::int4 ? (j % 4) * 8 + (j / 4) * 4 : (j % 2) * 16 + (j / 2) * 4;
      if (at < k) word |= (uint32_t)(row[at] & 15) << shift;
    }
    v[i] = word;
  }
  return v;
}

}  // namespace

int64_t packed_bytes(Kind kind, int64_t n, int64_t k) {
  return up(n, PANEL) * up(k, shape_of(kind).per_word) * PANEL * WORD;
}

void pack(Kind kind, const void *weight, void *panels, int64_t n, int64_t k) {
  const Shape shape = shape_of(kind);
  const int64_t words = up(k, shape.per_word), row_bytes = k * shape.input_size;
  for_each(up(n, PANEL) * 2, true, [&](int64_t half) {
    uint32_t *out = (uint32_t *)panels + (half / 2 * words * 2 + half % 2) * LANES;
    const char *rows = (const char *)weight + half * LANES * row_bytes;
    for (int64_t first = 0; first < words; first += LANES) {
      vu v[LANES];
      for (int64_t r = 0; r < LANES; r++) {
        const char *row = rows + r * row_bytes;
        if (half * LANES + r >= n) v[r] = (vu){};
        else if (shape.per_word == 8) v[r] = nibbles_at(kind, (const uint8_t *)row, first, k);
        else v[r] = words_at(row, first, row_bytes);
      }
      transpose(v);
      for (int64_t i = 0; i < LANES && first + i < words; i++) store_bits(out + (first + i) * PANEL, v[i]);
    }
  });
}

}  // namespace SHOAL_SET
}  // namespace shoal
