#pragma once
// The arithmetic of attention on 16 lanes and on register tiles: exponentials, sums and maxima of rows, queries by
// keys, weights by values. Knows the layout of units (pages.cpp); must not know pages, segments or heads.
// Included by attention.cpp alone, which is compiled once per instruction set.
#include "ops.h"
#include "units.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t UNITS = TILE / UNIT;   // of a position tile
constexpr int64_t SCORES = TILE + UNIT;  // floats from row to row: not a power of two, rows would compete for the cache
constexpr float LOG2E = 1.44269504088896f;
#ifdef __AVX512F__
constexpr int64_t ROWS = 12;  // of a register tile: 24 registers of sums
#define EACH_COUNT(f, ...) \
  {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>,  f<__VA_ARGS__, 5>,  f<__VA_ARGS__, 6>, \
   f<__VA_ARGS__, 7>, f<__VA_ARGS__, 8>, f<__VA_ARGS__, 9>, f<__VA_ARGS__, 10>, f<__VA_ARGS__, 11>, f<__VA_ARGS__, 12>}
constexpr int64_t FEW = 7;  // rows of which a register tile of values can be twice as wide
#define EACH_FEW(f, ...)                                                                                          \
  {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>, f<__VA_ARGS__, 5>, f<__VA_ARGS__, 6>, \
   f<__VA_ARGS__, 7>}
#else
constexpr int64_t ROWS = 4, FEW = 2;
#define EACH_FEW(f, ...) {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>}
#define EACH_COUNT(f, ...) {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>}
#endif

// A word is a float, two neighbouring bf16, or two whole numbers of 16 bits. Words of queries and weights from row to
// row are multiplied by words of keys and values from lane to lane; those of 8 bits become words as they are read.
typedef uint32_t word;

// Of activations, which is also that of the results, and of weights in the words that are multiplied.
template <Kind KIND>
struct Number {
  typedef bf16 type;
};
template <>
struct Number<Kind::fp32> {
  typedef float type;
};

template <Kind KIND>
constexpr int64_t PER_WORD = KIND == Kind::fp32 ? 1 : 2;
template <Kind KIND>
constexpr int64_t LANE_BYTES = PER_WORD<KIND> * number_bytes(KIND);  // in memory, of what becomes a word
template <Kind KIND>
constexpr int64_t HEAD = head_bytes(KIND) / 4;  // words of a unit before its numbers

template <Kind KIND>
constexpr int64_t WEIGHTS = SCORES / PER_WORD<KIND>;  // words from row to row

constexpr int REGISTER = LANES / PARTS;
typedef uint32_t part_words __attribute__((vector_size(64 / PARTS)));
typedef uint32_t part_words_any __attribute__((vector_size(64 / PARTS), aligned(4), may_alias));

INLINE part fma_of(part a, part b, part c) {
#if defined(__AVX512F__)
  return (part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (part)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Words as they are multiplied: whole where the machine multiplies pairs or they are floats, else both numbers apart.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
template <Kind KIND>
struct Operand {
  part_words first, second;
  explicit Operand(part_words x) : first(x), second(x) {
    if (KIND == Kind::bf16 && !PAIRS) first = x << 16, second = x & 0xffff0000u;
  }
};

// A register of words from memory, where one of 8 bits takes half the room.
template <Kind KIND>
INLINE part_words words_at(const char *p) {
  if constexpr (KIND == Kind::int8) {
#if defined(__AVX512BW__)  // the compiler would widen the halves apart
    return (part_words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (part_words)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#elif defined(__ARM_NEON)
    return (part_words)vmovl_s8(vld1_s8((const int8_t *)p));
#else
    typedef int8_t narrow __attribute__((vector_size(32 / PARTS), aligned(1), may_alias));
    typedef int16_t wide __attribute__((vector_size(64 / PARTS)));
    return (part_words)__builtin_convertvector(*(const narrow *)p, wide);
#endif
  }
  return *(const part_words_any *)p;
}

// total[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over pairs of 16-bit numbers, exact.
INLINE part_words dot_pairs_of_whole(part_words total, part_words a, part_words b) {
#if defined(__AVX512VNNI__)
  return (part_words)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return total + (part_words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return total + (part_words)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (part_words)arm_whole_pairs((int32x4_t)total, (uint32x4_t)a, (uint32x4_t)b);
#else
  const part_bits low = ((part_bits)(a << 16) >> 16) * ((part_bits)(b << 16) >> 16);
  return total + (part_words)(low + ((part_bits)a >> 16) * ((part_bits)b >> 16));
#endif
}

template <Kind KIND>
INLINE part step(part total, const Operand<KIND> &b, const Operand<KIND> &a) {
  if constexpr (KIND == Kind::int8) return (part)dot_pairs_of_whole((part_words)total, b.first, a.first);
#ifdef __AVX512BF16__
  if (KIND == Kind::bf16) return (part)_mm512_dpbf16_ps((__m512)total, (__m512bh)b.first, (__m512bh)a.first);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if (KIND == Kind::bf16) return (part)arm_pairs((float32x4_t)total, (uint32x4_t)b.first, (uint32x4_t)a.first);
#endif
  total = fma_of((part)b.first, (part)a.first, total);
  return KIND == Kind::fp32 ? total : fma_of((part)b.second, (part)a.second, total);
}

// A sum of products of whole numbers, which is exact until here, as what it stands for. Without the first line the
// compiler would keep sums in memory throughout the loop before.
INLINE part scaled(part total, part scale) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(total));
#elif defined(__ARM_NEON)
  asm volatile("" : "+w"(total));
#endif
  return __builtin_convertvector((part_bits)total, part) * scale;
}

// 2 to the power of x, for x <= 0 and little more. The polynomials are least relative errors of 2**f on [0, 1) (3e-6
// where weights are rounded to 16 bits, else 2e-9 before rounding) among those that are exactly 1 at 0.
template <bool EXACT>
INLINE vf power_of_two(vf x) {
#ifdef __AVX512F__
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x), and 0 for -infinity
  vf p;
  if (EXACT) {
    p = fma(splat(2.16129149e-4f), f, splat(1.24679470e-3f));
    p = fma(p, f, splat(9.67545155e-3f));
    p = fma(p, f, splat(5.54852821e-2f));
    p = fma(p, f, splat(2.40229309e-1f));
    p = fma(p, f, splat(6.93147063e-1f));
  } else {
    p = fma(splat(1.34266838e-2f), f, splat(5.22424728e-2f));
    p = fma(p, f, splat(2.41280198e-1f));
    p = fma(p, f, splat(6.93044841e-1f));
  }
  p = fma(p, f, splat(1.f));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2**floor(x)
#else
  part piece[PARTS];
  __builtin_memcpy(piece, &x, sizeof piece);
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) {
    const part_bits below = (part_bits)(piece[i] + 126.f) >> 31;  // all bits of the lanes below -126
    const part t = (part)((part_bits)piece[i] & ~below);          // 0 in those
    const part whole = (t + 12582912.f) - 12582912.f, f = t - whole, zero = {};  // to the nearest whole number
    part p = zero + 1.535336188e-4f;  // the coefficients of `exponential`
    p = fma_of(p, f, zero + 1.339887440e-3f);
    p = fma_of(p, f, zero + 9.618437357e-3f);
    p = fma_of(p, f, zero + 5.550332471e-2f);
    p = fma_of(p, f, zero + 2.402264791e-1f);
    p = fma_of(p, f, zero + 6.931472028e-1f);
    p = fma_of(p, f, zero + 1.f);
    const part_bits power = __builtin_convertvector(whole, part_bits) << 23;
    piece[i] = (part)(((part_bits)p + power) & ~below);
  }
  __builtin_memcpy(&x, piece, sizeof piece);
  return x;
#endif
}

INLINE vf add(vf a, vf b) { return a + b; }

// Reduces the lanes of 16 vectors: lane r is that of rows[r]. As in `sum`, each step joins lanes i and i + half.
template <vf (*join)(vf, vf)>
INLINE vf reduce_rows(const float *rows) {
#ifdef __AVX512F__
  __m512 v[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) v[r] = _mm512_load_ps(rows + (r % 4 * 4 + r / 4) * LANES);  // undoes the steps' order
#define JOIN(shuffle, from, low, high) \
  _Pragma("GCC unroll 16") for (int r = 0; r < from / 2; r++) v[r] = \
      (__m512)join((vf)shuffle(v[2 * r], v[2 * r + 1], low), (vf)shuffle(v[2 * r], v[2 * r + 1], high));
  JOIN(_mm512_shuffle_f32x4, 16, 0x44, 0xee)
  JOIN(_mm512_shuffle_f32x4, 8, 0x88, 0xdd)
  JOIN(_mm512_shuffle_ps, 4, 0x44, 0xee)
  JOIN(_mm512_shuffle_ps, 2, 0x88, 0xdd)
#undef JOIN
  return (vf)v[0];
#else
  vf out;
  for (int r = 0; r < LANES; r++) {
    float lane[2 * LANES] = {};
    __builtin_memcpy(lane, rows + r * LANES, LANES * sizeof(float));
    for (int64_t half = LANES / 2; half > 0; half /= 2) store(lane, join(load(lane), load(lane + half)));
    out[r] = lane[0];
  }
  return out;
#endif
}

// tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|)
INLINE vf hyperbolic_tangent(vf x) {
  const vf e = power_of_two<true>(absolute(x) * (-2.f * LOG2E));
  const vf y = (1.f - e) / (1.f + e);
  return (vf)((vu)y | ((vu)x & 0x80000000u));
}

// Transposes 16 words of each of `count` <= 16 rows to [16][count]. Writes up to 16 words beyond the end.
INLINE void transpose(const char *const *rows, int64_t count, word *to) {
#ifdef __AVX512F__
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(rows[r]);
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    b[2 * r] = _mm512_unpacklo_epi32(a[2 * r], a[2 * r + 1]);
    b[2 * r + 1] = _mm512_unpackhi_epi32(a[2 * r], a[2 * r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {  // a[4 r + j]: word j of every four, of rows 4 r to 4 r + 3
      a[4 * r + 2 * h] = _mm512_unpacklo_epi64(b[4 * r + h], b[4 * r + h + 2]);
      a[4 * r + 2 * h + 1] = _mm512_unpackhi_epi64(b[4 * r + h], b[4 * r + h + 2]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    const __m512i more = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
    const __m512i most = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    b[j] = _mm512_shuffle_i32x4(low, more, 0x88), b[j + 8] = _mm512_shuffle_i32x4(low, more, 0xdd);
    b[j + 4] = _mm512_shuffle_i32x4(high, most, 0x88), b[j + 12] = _mm512_shuffle_i32x4(high, most, 0xdd);
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; k++) _mm512_storeu_si512(to + k * count, b[k]);
#else
  for (int64_t r = 0; r < count; r++)
    for (int64_t k = 0; k < LANES; k++) __builtin_memcpy(to + k * count + r, rows[r] + k * 4, 4);
#endif
}

// m rows of queries, packed by step, by the positions of C key units. `tops`, unless null, takes in the largest scores
// by lane. `ahead`: as many units, to be fetched line after line, the first of which are fetched already where they are
// scales. `scales`: of the queries, where they are whole numbers.
template <Kind KIND, bool AHEAD, int C, int m>
__attribute__((noinline)) void score(const word *q, const word *const *keys, int64_t steps, const float *scales,
                                     float *scores, float *tops, const word *const *ahead) {
  constexpr int W = PARTS == 1 ? C : PARTS, ONCE = W / PARTS;  // registers, units at once
  constexpr int64_t LINE = 4 / LANE_BYTES<KIND>;                // steps that are a line of a unit
  const int64_t turn = (steps + C * LINE - 1) / (C * LINE) * LINE;
  for (int from = 0; from < C; from += ONCE) {
    const word *unit[ONCE], *next = nullptr, *a = q;
#pragma GCC unroll 16
    for (int c = 0; c < ONCE; c++) unit[c] = keys[from + c];
    part total[m][W];
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) total[r][c] = (part){};
    for (int64_t k = 0, until = 0; k < steps; k++, a += m) {
      if (AHEAD && from == 0 && k % LINE == 0) {
        if (k == until) next = *ahead++ + HEAD<KIND>, until += turn;
#pragma GCC unroll 4
        for (int c = 0; c < C; c++, next += LANES) __builtin_prefetch(next, 0, 3);
      }
      part_words x[W];
#pragma GCC unroll 4
      for (int c = 0; c < W; c++)
        x[c] = words_at<KIND>((const char *)(unit[c / PARTS] + HEAD<KIND>) +
                              (k * LANES + c % PARTS * REGISTER) * LANE_BYTES<KIND>);
#pragma GCC unroll 16
      for (int r = 0; r < m; r++) {
        const Operand<KIND> w(a[r] - (part_words){});
#pragma GCC unroll 4
        for (int c = 0; c < W; c++) total[r][c] = step<KIND>(total[r][c], Operand<KIND>(x[c]), w);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) {
        if constexpr (KIND == Kind::int8) {
          const part scale = (part) * (const part_words_any *)(unit[c / PARTS] + c % PARTS * REGISTER);
          total[r][c] = scaled(total[r][c], scale * scales[r]);
        }
        __builtin_memcpy(scores + r * SCORES + from * UNIT + c * REGISTER, &total[r][c], sizeof(part));
      }
  }
  if (!tops) return;
#pragma GCC unroll 16
  for (int r = 0; r < m; r++) {
    vf top = load(tops + r * LANES);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) top = larger(top, load(scores + r * SCORES + c * UNIT));
    store(tops + r * LANES, top);
  }
}

// out = out * old + (m rows of weights by 16 C numbers of the values of each unit, `offset` words into them) * fresh.
// `ahead`: for each unit an address from which as much as is read of it is to be fetched. `scales`: of the weights, where
// they are whole numbers.
template <Kind KIND, bool AHEAD, int C, int m>
__attribute__((noinline)) void mix(const word *weights, const word *const *values, int64_t units, int64_t offset,
                                   const float *scales, const float *old, const float *fresh, float *out,
                                   int64_t padded, const word *const *ahead) {
  constexpr int W = PARTS == 1 ? C : PARTS, ONCE = W / PARTS;  // registers, vectors of 16 numbers at once
  constexpr int64_t STEPS = UNIT / PER_WORD<KIND>, BYTES = LANE_BYTES<KIND>;
  for (int from = 0; from < C; from += ONCE) {
    const word *a = weights;
    part total[m][W];
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) total[r][c] = (part){};
    for (int64_t u = 0; u < units; u++) {
      const char *v = (const char *)(values[u] + HEAD<KIND> + offset);
      v += (from / 2 * STEPS * PANEL + from % 2 * LANES) * BYTES;
      const word *next = AHEAD ? ahead[u] : nullptr;
      for (int64_t k = 0; k < STEPS; k++, a++, v += PANEL * BYTES) {
        if (AHEAD && from == 0) {
#pragma GCC unroll 4
          for (int c = 0; c < C * BYTES / 4; c++, next += LANES) __builtin_prefetch(next, 0, 3);
        }
        part_words x[W];
#pragma GCC unroll 4
        for (int c = 0; c < W; c++) {
          const int64_t panel = c / PARTS / 2, half = c / PARTS % 2;
          x[c] = words_at<KIND>(v + (panel * STEPS * PANEL + half * LANES + c % PARTS * REGISTER) * BYTES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < m; r++) {
          const Operand<KIND> w(a[r * WEIGHTS<KIND>] - (part_words){});
#pragma GCC unroll 4
          for (int c = 0; c < W; c++) total[r][c] = step<KIND>(total[r][c], Operand<KIND>(x[c]), w);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; r++) {
      if (fresh[r] == 0.f) continue;
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) {
        float *o = out + r * padded + from * LANES + c * REGISTER;
        part state;
        __builtin_memcpy(&state, o, sizeof state);
        if constexpr (KIND == Kind::int8) total[r][c] = scaled(total[r][c], scales[r] - (part){});
        state = fma_of(total[r][c], fresh[r] - (part){}, state * old[r]);
        __builtin_memcpy(o, &state, sizeof state);
      }
    }
  }
}

typedef void (*Score)(const word *, const word *const *, int64_t, const float *, float *, float *, const word *const *);
typedef void (*Mix)(const word *, const word *const *, int64_t, int64_t, const float *, const float *, const float *,
                    float *, int64_t, const word *const *);

template <Kind KIND>
constexpr Score SCORE[2][ROWS] = {EACH_COUNT(score, KIND, false, 2), EACH_COUNT(score, KIND, true, 2)};
template <Kind KIND>
constexpr Mix MIX[2][ROWS] = {EACH_COUNT(mix, KIND, false, 2), EACH_COUNT(mix, KIND, true, 2)};
template <Kind KIND>
constexpr Mix MIX_FEW[2][FEW] = {EACH_FEW(mix, KIND, false, 4), EACH_FEW(mix, KIND, true, 4)};

}  // namespace
}  // namespace SHOAL_SET
}  // namespace shoal
