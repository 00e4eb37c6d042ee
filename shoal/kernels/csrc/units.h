#pragma once
// How large the parts of a unit of 16 positions are (pages.cpp has what is in them), and how a row of bf16 becomes
// whole numbers with a scale. Knows numbers and sizes; must not know pages or what is multiplied.
#include "kernels.h"
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t number_bytes(Kind kind) { return kind == Kind::fp32 ? 4 : kind == Kind::bf16 ? 2 : 1; }

// Before a unit's numbers of 8 bits there are the scales of its positions.
constexpr int64_t head_bytes(Kind kind) { return kind == Kind::int8 ? UNIT * 4 : 0; }

INLINE int64_t padded_width(const Pages &pages) { return (pages.width + PANEL - 1) / PANEL * PANEL; }
INLINE int64_t unit_bytes(const Pages &pages) {
  return head_bytes(pages.kind) + UNIT * padded_width(pages) * number_bytes(pages.kind);
}

template <class T>
struct Whole {
  typedef T vector __attribute__((vector_size(LANES * sizeof(T)), aligned(1), may_alias));
};

// Rounds numbers to whole multiples of what is returned, at most `levels` of it, ties to even. Numbers that are not
// all finite become zeros, and what is returned is NaN. Writes up to the next multiple of 16 numbers.
template <class T>
INLINE float quantise(const bf16 *x, int64_t count, float levels, T *out) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; i++) most = (x[i] & 0x7fff) > most ? x[i] & 0x7fff : most;
  const bool finite = most < 0x7f80;
  const float peak = load_one(&most), by = finite && peak >= 1e-30f ? levels / peak : 0.f;
  for (int64_t i = 0; i < count; i += LANES) {
    bf16 last[LANES] = {};
    const bf16 *from = x + i;
    if (count - i < LANES) __builtin_memcpy(last, from, (count - i) * sizeof(bf16)), from = last;
    // The sum's last bits are the whole number that is nearest, and zeros for a NaN.
    const vu bits = (vu)(load(from) * by + 12582912.f);
    *(typename Whole<T>::vector *)(out + i) = __builtin_convertvector((vi)bits, typename Whole<T>::vector);
  }
  return finite ? peak / levels : __builtin_nanf("");
}

}  // namespace
}  // namespace shoal
