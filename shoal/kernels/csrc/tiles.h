#pragma once
// Register tiles of a matrix product: up to MOST rows times a panel of 32 outputs, over a stretch of inputs. Knows
// registers and panels; must not know threads, nor what becomes of the sums.
// A row's sums go through the same operations in the same order whatever the number of rows in its tile, and a sum that
// is put down and taken up again is the same sum: so a row's bits do not depend on the rows beside it.
#include "rows.h"

namespace shoal {
namespace {

#if defined(__AVX512F__)
constexpr int REGISTER = 16, MOST = 12;  // 12 rows by 2 registers: 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int REGISTER = 8, MOST = 4;
#elif defined(__ARM_NEON)
constexpr int REGISTER = 4, MOST = 12;  // as many registers as with AVX-512, a quarter as wide
#else
constexpr int REGISTER = 4, MOST = 4;
#endif

typedef float rf __attribute__((vector_size(4 * REGISTER)));
typedef int32_t ri __attribute__((vector_size(4 * REGISTER)));
typedef uint32_t ru __attribute__((vector_size(4 * REGISTER)));
typedef uint32_t ru_any __attribute__((vector_size(4 * REGISTER), aligned(1)));
typedef uint16_t rh __attribute__((vector_size(2 * REGISTER)));
typedef uint16_t rh_any __attribute__((vector_size(2 * REGISTER), aligned(1)));
typedef uint8_t rb_any __attribute__((vector_size(REGISTER), aligned(1)));

// Keeps a sum in its register here: without it the compiler stores it in every round of the loop before.
INLINE void hold([[maybe_unused]] ru &v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__ARM_NEON)
  asm volatile("" : "+w"(v));
#endif
}

INLINE ru get(const void *p) { return *(const ru_any *)p; }
INLINE void put(void *p, ru v) { *(ru_any *)p = v; }
INLINE ru spread(uint32_t x) { return x - (ru){}; }
INLINE rf spread(float x) { return x - (rf){}; }

INLINE rf multiply_add(rf a, rf b, rf c) {
#if defined(__AVX512F__)
  return (rf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (rf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (rf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// One word of a row times one word of 2 * REGISTER outputs, added to the sums (raw bits, float or int32).
struct Floats {
  INLINE ru dot(ru sum, ru x, ru w) { return (ru)multiply_add((rf)x, (rf)w, (rf)sum); }
};
struct Pairs {
  INLINE ru dot(ru sum, ru x, ru w) {
#ifdef __AVX512BF16__
    return (ru)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#elif defined(__ARM_NEON)
    return (ru)arm_pairs((float32x4_t)sum, (uint32x4_t)w, (uint32x4_t)x);
#else
    const rf low = multiply_add((rf)(x << 16), (rf)(w << 16), (rf)sum);
    return (ru)multiply_add((rf)(x & 0xffff0000u), (rf)(w & 0xffff0000u), low);
#endif
  }
};

// sum[i] + sum over j of unsigned u[4i+j] * signed s[4i+j], exact.
INLINE ru dot_four(ru sum, ru u, ru s) {
#if defined(__AVX512VNNI__)
  return (ru)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif defined(__AVX2__)  // by 16 bits, even bytes and odd ones: products of bytes added up in 16 bits would not fit
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16((__m256i)s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)u, 8), _mm256_srai_epi16((__m256i)s, 8));
  return (ru)_mm256_add_epi32((__m256i)sum, _mm256_add_epi32(even, odd));
#elif defined(__SSE2__)
  const __m128i even = _mm_madd_epi16(_mm_and_si128((__m128i)u, _mm_set1_epi16(255)),
                                      _mm_srai_epi16(_mm_slli_epi16((__m128i)s, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srli_epi16((__m128i)u, 8), _mm_srai_epi16((__m128i)s, 8));
  return (ru)_mm_add_epi32((__m128i)sum, _mm_add_epi32(even, odd));
#elif defined(__ARM_NEON)
  return (ru)arm_fours<false>((int32x4_t)sum, (uint32x4_t)u, (uint32x4_t)s);
#else
  for (int j = 0; j < 4; j++) sum += ((u >> (8 * j)) & 255) * (ru)((ri)(s << (24 - 8 * j)) >> 24);
  return sum;
#endif
}
struct Bytes {
  INLINE ru dot(ru sum, ru x, ru w) { return dot_four(sum, x, w); }
};

// What a tile works on. All but the activations and the sums is the same for all tiles of a panel.
struct Stretch {
  const uint32_t *x;    // activations, [steps][rows] words
  const uint32_t *then;  // activations that will be read after all tiles have passed
  const char *panel;    // weights, [steps][32] words; int4: [steps / 8 inputs][32] words
  int64_t steps;        // words of a row; int4: groups
  float *sums;          // [rows][32], float or int32
  bool fresh;           // the sums begin with nothing
  const char *next;     // what will be read after this panel
  int64_t pace;         // bytes of it to fetch per 32 words read here, at most 128

  // int4 only
  const uint16_t *scale;  // bf16 [groups][32]
  const uint8_t *zero;    // [groups][32]
  const float *amounts;   // [groups][2][rows]: scale (1 for int4_a16) and sum of the activations
  int64_t after;          // groups * 32: where the next panel's scales are
  int64_t group, last;    // eights of inputs in a group, and in the last of the stretch
};

INLINE void fetch(const char *next, int64_t pace) {
  __builtin_prefetch(next, 0, 2);
  if (pace == 128) __builtin_prefetch(next + 64, 0, 2);
}

template <class Dot, int rows>
__attribute__((noinline)) void tile(const Stretch &t) {
  const char *next = t.next;
  for (int64_t at = 0; at < PANEL; at += 2 * REGISTER) {
    ru a[rows], b[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      a[r] = t.fresh ? (ru){} : get(t.sums + r * PANEL + at);
      b[r] = t.fresh ? (ru){} : get(t.sums + r * PANEL + at + REGISTER);
    }
    const uint32_t *x = t.x, *then = t.then;
    const char *w = t.panel + at * WORD;
    for (int64_t s = 0; s < t.steps; s++, x += rows, then += rows, w += PANEL * WORD, next += t.pace) {
      fetch(next, t.pace);
      if (rows > 6) __builtin_prefetch(then, 0, 2);
      const ru w0 = get(w), w1 = get(w + REGISTER * WORD);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        const ru value = spread(x[r]);
        a[r] = Dot::dot(a[r], value, w0);
        b[r] = Dot::dot(b[r], value, w1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      put(t.sums + r * PANEL + at, a[r]);
      put(t.sums + r * PANEL + at + REGISTER, b[r]);
    }
  }
}

// Bytes of activations times nibbles: the word of the eight inputs' low nibbles, then that of their high ones.
struct Nibbles {
  static constexpr int words = 2;
  static constexpr float offset = 0.f;
  INLINE ru weight(ru packed, int j) { return (j ? packed >> 4 : packed) & 0x0f0f0f0fu; }
  INLINE ru dot(ru sum, ru x, ru w) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)  // two products of 15 and 127 do fit in 16 bits
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return (ru)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_NEON)
    return (ru)arm_fours<true>((int32x4_t)sum, (uint32x4_t)w, (uint32x4_t)x);
#else
    return dot_four(sum, w, x);
#endif
  }
  INLINE rf value(ru sum) { return __builtin_convertvector((ri)sum, rf); }
};

// bf16 activations times nibbles, which become bf16 numbers -8 to 7.
struct NibblePairs {
  static constexpr int words = 4;
  static constexpr float offset = 8.f;
  INLINE ru weight(ru packed, int j) {
#ifdef __AVX512BW__
    alignas(64) static const uint16_t values[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 to -1
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 to -1
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i index = j ? _mm512_srli_epi16((__m512i)packed, 4 * j) : (__m512i)packed;
    return (ru)_mm512_permutexvar_epi16(index, *(const __m512i *)values);  // looks at five bits, the table repeats
#elif defined(__ARM_NEON)
    return (ru)arm_nibbles((uint32x4_t)packed, j);
#else
    const ru low = (packed >> (4 * j)) & 15, high = (packed >> (4 * j + 16)) & 15;
    const rf first = __builtin_convertvector((ri)low, rf) - 8.f, second = __builtin_convertvector((ri)high, rf) - 8.f;
    return ((ru)first >> 16) | (ru)second;  // small whole numbers are exact in bf16
#endif
  }
  INLINE ru dot(ru sum, ru x, ru w) { return Pairs::dot(sum, x, w); }
  INLINE rf value(ru sum) { return (rf)sum; }
};

INLINE rf group_scale(const uint16_t *p) {
#if defined(__AVX512F__)
  return (rf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  return (rf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif defined(__ARM_NEON)
  return (rf)vshll_n_u16(vld1_u16(p), 16);
#else
  return (rf)(__builtin_convertvector(*(const rh_any *)p, ru) << 16);
#endif
}
INLINE rf group_zero(const uint8_t *p) {
#if defined(__AVX512F__)
  return (rf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (rf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#elif defined(__ARM_NEON)
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return (rf)vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const rb_any *)p, ri), rf);
#endif
}

// Each group is summed on its own, from nothing; then sums += (sum - zero * sum of activations) * scales.
// Unpacking the nibbles once for many tiles, into memory, was no faster than doing it again in each.
template <class Dot, int rows>
__attribute__((noinline)) void tile_groups(const Stretch &t) {
  const char *next = t.next;
  if (t.fresh)
    for (int64_t i = 0; i < rows * PANEL; i += REGISTER) put(t.sums + i, (ru){});
  for (int64_t at = 0; at < PANEL; at += 2 * REGISTER) {
    const uint32_t *x = t.x;
    const char *w = t.panel + at * WORD;
    for (int64_t g = 0; g < t.steps; g++) {
      ru a[rows], b[rows];
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) a[r] = b[r] = (ru){};
      const int64_t eights = g + 1 < t.steps ? t.group : t.last;
      for (int64_t s = 0; s < eights; s++, x += Dot::words * rows, w += PANEL * WORD, next += t.pace) {
        fetch(next, t.pace);
        const ru p0 = get(w), p1 = get(w + REGISTER * WORD);
#pragma GCC unroll 4
        for (int j = 0; j < Dot::words; j++) {
          const ru w0 = Dot::weight(p0, j), w1 = Dot::weight(p1, j);
#pragma GCC unroll 16
          for (int r = 0; r < rows; r++) {
            const ru value = spread(x[j * rows + r]);
            a[r] = Dot::dot(a[r], value, w0);
            b[r] = Dot::dot(b[r], value, w1);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) hold(a[r]), hold(b[r]);
      const uint16_t *scale = t.scale + g * PANEL + at;
      const uint8_t *zero = t.zero + g * PANEL + at;
      const float *amounts = t.amounts + g * 2 * rows;
      __builtin_prefetch(scale + t.after, 0, 3);
      __builtin_prefetch(zero + t.after, 0, 3);
      const rf s0 = group_scale(scale), s1 = group_scale(scale + REGISTER);
      const rf z0 = Dot::offset - group_zero(zero), z1 = Dot::offset - group_zero(zero + REGISTER);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        const rf by = spread(amounts[r]), sum = spread(amounts[rows + r]);
        float *out = t.sums + r * PANEL + at;
        const rf first = multiply_add(z0, sum, Dot::value(a[r])), second = multiply_add(z1, sum, Dot::value(b[r]));
        put(out, (ru)multiply_add(first, s0 * by, (rf)get(out)));
        put(out + REGISTER, (ru)multiply_add(second, s1 * by, (rf)get(out + REGISTER)));
      }
    }
  }
}

using TileFunction = void (*)(const Stretch &);

#if defined(__AVX512F__) || defined(__ARM_NEON)
#define SHOAL_TILES(f, dot) \
  {f<dot, 1>, f<dot, 2>, f<dot, 3>, f<dot, 4>,  f<dot, 5>,  f<dot, 6>, \
   f<dot, 7>, f<dot, 8>, f<dot, 9>, f<dot, 10>, f<dot, 11>, f<dot, 12>}
#else
#define SHOAL_TILES(f, dot) {f<dot, 1>, f<dot, 2>, f<dot, 3>, f<dot, 4>}
#endif

// By kind, then by rows - 1.
const TileFunction TILES[6][MOST] = {SHOAL_TILES(tile, Floats), SHOAL_TILES(tile, Pairs), SHOAL_TILES(tile, Bytes),
                                     SHOAL_TILES(tile_groups, Nibbles), SHOAL_TILES(tile_groups, NibblePairs),
                                     SHOAL_TILES(tile, Bytes)};

}  // namespace
}  // namespace shoal
