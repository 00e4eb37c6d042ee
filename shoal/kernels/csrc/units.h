#pragma once
// How large the parts of a unit of 16 positions are (pages.cpp has what is in them), where blocks begin, and how a row of bf16 becomes
// whole numbers with a scale. Knows numbers and sizes; must not know whose pages are whose or what is multiplied.
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

// Where the block of a page and a head begins. A head's blocks lie side by side, so that pages taken one after the other
// are one stretch of memory to who reads a head of them.
INLINE int64_t block_at(const Pages &pages, int64_t page, int64_t head) {
  return (head * pages.num_pages + page) * (pages.page_size / UNIT) * unit_bytes(pages);
}

template <class T>
struct Whole {
  typedef T vector __attribute__((vector_size(LANES * sizeof(T)), aligned(1), may_alias));
};

constexpr int64_t WIDEST = 512;  // numbers of a head that is rounded

INLINE void widen(const bf16 *x, int64_t count, float *out) {
  for (int64_t i = 0; i < count; i += LANES) {
    bf16 last[LANES] = {};
    const bf16 *from = x + i;
    if (count - i < LANES) __builtin_memcpy(last, from, (count - i) * sizeof(bf16)), from = last;
    store(out + i, load(from));
  }
}

// As many neighbours as are mixed together: the width's largest power of two.
INLINE int64_t run_of(int64_t width) { return width & -width; }

// The Walsh-Hadamard transform of each run of numbers, which leaves products of two heads as they are, but for a factor
// of run_of(width). A few large numbers, as keys have them, become many of moderate size, and rounding costs less.
// Reads and writes up to the next multiple of 16 numbers.
INLINE void mix_runs(float *x, int64_t width) {
  const int64_t run = run_of(width);
  int64_t half = 1;
#ifdef __AVX512F__  // neighbours within a register: the same sums and differences
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = 0; i < width; i += LANES) {
    vf v = load(x + i);
    for (half = 1; half < run && half < LANES; half *= 2) {
      const vf other = (vf)_mm512_permutexvar_ps((__m512i)(lane ^ (int32_t)half), (__m512)v);
      const vu second = (vu)lane * (0x80000000u / (uint32_t)half) & 0x80000000u;  // the sign's bit where `half` is set
      v = other + (vf)((vu)v ^ second);
    }
    store(x + i, v);
  }
#endif
  for (; half < run; half *= 2)
    for (int64_t i = 0; i < width; i += 2 * half)
      for (int64_t j = i; j < i + half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
}

// Rounds numbers to whole multiples of what is returned, at most `levels` of it, ties to even. If they are not all
// finite what is returned is NaN, and the multiples are zeros. Reads and writes up to the next multiple of 16 numbers.
template <class T>
INLINE float quantise(const float *x, int64_t count, float levels, T *out) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
  }
  float peak;
  __builtin_memcpy(&peak, &most, 4);
  const bool finite = most < 0x7f800000;
  const float by = finite && peak >= 1e-30f ? levels / peak : 0.f;
  for (int64_t i = 0; i < count; i += LANES) {
    // The sum's last bits are the nearest whole number.
    const vi bits = finite ? (vi)(load(x + i) * by + 12582912.f) : (vi){};
    *(typename Whole<T>::vector *)(out + i) = __builtin_convertvector(bits, typename Whole<T>::vector);
  }
  return finite ? peak / levels : __builtin_nanf("");
}

}  // namespace
}  // namespace shoal
