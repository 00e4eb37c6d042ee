#pragma once
// Turns rows of 32-bit words into columns of words: the form in which register tiles read activations and weights.
// Knows words and their order; must not know what is multiplied with them.
// A word is one float, a pair of bf16 or four bytes that are neighbours in a row.
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t WORD = 4;  // bytes

// Sixteen words of a row of `bytes` bytes, from word `first` on. What lies beyond the row reads as zero.
INLINE vu words_at(const void *row, int64_t first, int64_t bytes) {
  const char *from = (const char *)row + first * WORD;
  const int64_t left = bytes - first * WORD;
  if (left >= LANES * WORD) return load_bits(from);
  vu v = {};
  if (left > 0) __builtin_memcpy(&v, from, left);
  return v;
}

// The transpose of 16 rows of 16 words: word i of row r becomes word r of row i.
INLINE void transpose(vu *v) {
#ifdef __AVX512F__
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {  // pairs of rows, words alternating
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)v[2 * i], (__m512i)v[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)v[2 * i], (__m512i)v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // four rows: b[4 * i + j] has word j of each quarter
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {  // quarters 0 and 2, then 1 and 3, of rows 0 to 7 and 8 to 15
    const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = (vu)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    v[4 + j] = (vu)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    v[8 + j] = (vu)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    v[12 + j] = (vu)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#else
  uint32_t in[LANES][LANES], out[LANES][LANES];
  __builtin_memcpy(in, v, sizeof in);
  for (int64_t r = 0; r < LANES; r++)
    for (int64_t i = 0; i < LANES; i++) out[i][r] = in[r][i];
  __builtin_memcpy(v, out, sizeof out);
#endif
}

// Writes `rows` (at most 16) rows of `steps` words as [steps][rows]. row_bytes apart, of which `bytes` are real and the
// rest reads as zero. May write up to 15 words beyond the end.
INLINE void interleave(const char *x, int64_t row_bytes, int64_t bytes, int64_t rows, int64_t steps, uint32_t *out) {
  for (int64_t s = 0; s < steps; s += LANES) {
    vu v[LANES];
    const int64_t count = steps - s < LANES ? steps - s : LANES;
#ifdef __AVX512F__
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES; r++) v[r] = r < rows ? words_at(x + r * row_bytes, s, bytes) : (vu){};
    transpose(v);
    if (count == LANES) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; i++) store_bits(out + (s + i) * rows, v[i]);  // the next one overwrites the excess
    } else {
      for (int64_t i = 0; i < count; i++) store_bits(out + (s + i) * rows, v[i]);
    }
#else
    for (int64_t r = 0; r < rows; r++) {
      v[r] = words_at(x + r * row_bytes, s, bytes);
      for (int64_t i = 0; i < count; i++) out[(s + i) * rows + r] = v[r][i];
    }
#endif
  }
}

}  // namespace
}  // namespace shoal
