#pragma once
// Sixteen lanes of float, int32 or raw bits, whatever the instruction set: one ZMM register with AVX-512, parts of one
// elsewhere. Knows registers; must not know what is computed with them.
// Included by the files that are compiled once per instruction set. All of it is static: a function with external
// linkage would be compiled three times under one name, and the linker would keep one copy for all of them. For the
// same reason no header of the C++ library may be used there.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include "arm.h"
#endif

namespace shoal {
namespace {

constexpr int64_t LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(1)));
typedef uint16_t vh __attribute__((vector_size(32)));

// What one register holds. The compiler takes a comparison of vectors wider than that apart into single numbers, and
// keeps register tiles of them in memory.
#if defined(__AVX512F__)
constexpr int PARTS = 1;
#elif defined(__AVX2__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif
typedef float part __attribute__((vector_size(64 / PARTS)));
typedef int32_t part_bits __attribute__((vector_size(64 / PARTS)));

typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vu splat_bits(uint32_t x) { return x - (vu){}; }
INLINE vu load_bits(const void *p) { return *(const vu_any *)p; }
INLINE void store_bits(void *p, vu v) { *(vu_any *)p = v; }

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE vf load(const uint16_t *p) {
#ifdef __AVX512F__  // the compiler takes four instructions for what is one
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__ARM_NEON)
  float32x4_t wide[PARTS];
  arm_widen(p, wide), arm_widen(p + 8, wide + 2);
  vf v;
  __builtin_memcpy(&v, wide, 64);
  return v;
#else
  return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16);
#endif
}

INLINE float load_one(const float *p) { return *p; }
INLINE float load_one(const uint16_t *p) {
  uint32_t bits = (uint32_t)*p << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// To the nearest bf16, ties to even; a NaN stays a NaN (plain rounding could carry it into infinity or zero).
INLINE uint16_t round_one(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store(float *p, vf v) { *(vf_any *)p = v; }
INLINE void store(uint16_t *p, vf v) {
#ifdef __AVX512BF16__
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, 32);
#elif defined(__ARM_NEON)
  float32x4_t wide[PARTS];
  __builtin_memcpy(wide, &v, 64);
  arm_narrow(p, wide), arm_narrow(p + 8, wide + 2);
#else
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu nan = (vu)((0x7f800000 - (vi)(bits & 0x7fffffffu)) >> 31);
  vu out = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
  *(vh_any *)p = __builtin_convertvector(out, vh);
#endif
}

INLINE void store_one(float *p, float x) { *p = x; }
INLINE void store_one(uint16_t *p, float x) { *p = round_one(x); }

// a * b + c, rounded once where the machine can. Contraction is off, so this is the only place where it happens.
INLINE vf fma(vf a, vf b, vf c) {
#ifdef __AVX512F__
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 64), __builtin_memcpy(y, &b, 64), __builtin_memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  __builtin_memcpy(&c, z, 64);
  return c;
#elif defined(__ARM_NEON)
  float32x4_t x[PARTS], y[PARTS], z[PARTS];
  __builtin_memcpy(x, &a, 64), __builtin_memcpy(y, &b, 64), __builtin_memcpy(z, &c, 64);
  for (int i = 0; i < PARTS; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  __builtin_memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}

// total[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over bf16 pairs in 32-bit lanes.
INLINE vf dot_pairs(vf total, vu a, vu b) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
  total = fma((vf)(a << 16), (vf)(b << 16), total);
  return fma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), total);
#endif
}

// total[i] + sum over j of unsigned a[4i+j] * signed b[4i+j], bytes in 32-bit lanes, exact.
INLINE vi dot_bytes(vi total, vu a, vu b) {
#ifdef __AVX512VNNI__
  return (vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#else
  for (int j = 0; j < 4; j++) total += (vi)((a >> (8 * j)) & 255) * (((vi)(b << (24 - 8 * j))) >> 24);
  return total;
#endif
}

// All bits set where a < b, none elsewhere.
INLINE vi less(vf a, vf b) {
  part x[PARTS], y[PARTS];
  part_bits z[PARTS];
  __builtin_memcpy(x, &a, 64), __builtin_memcpy(y, &b, 64);
  for (int i = 0; i < PARTS; i++) z[i] = x[i] < y[i];
  vi mask;
  __builtin_memcpy(&mask, z, 64);
  return mask;
}

// The larger of two; of a NaN and a number, either.
INLINE vf larger(vf a, vf b) {
  part x[PARTS], y[PARTS];
  __builtin_memcpy(x, &a, 64), __builtin_memcpy(y, &b, 64);
  for (int i = 0; i < PARTS; i++) y[i] = x[i] > y[i] ? x[i] : y[i];
  __builtin_memcpy(&b, y, 64);
  return b;
}

INLINE vf absolute(vf v) { return (vf)((vu)v & 0x7fffffffu); }

// The sum of the lanes as a tree of halves: the same order for every instruction set.
INLINE float sum(vf v) {
  float lane[LANES];
  __builtin_memcpy(lane, &v, sizeof lane);
  for (int64_t width = LANES / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

INLINE float largest(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lane[LANES], best;
  __builtin_memcpy(lane, &v, sizeof lane);
  best = lane[0];
  for (int64_t i = 1; i < LANES; i++) best = lane[i] > best ? lane[i] : best;
  return best;
#endif
}

// e to the power of x for x <= 0, to about 1e-7 of it; exactly 1 at 0, and exactly 0 at -infinity and below -87.
// The coefficients are those of 2**f on [-1/2, 1/2] in the Cephes library.
INLINE vf exponential(vf x) {
  const vf t = larger(x, splat(-126.f)) * 1.44269504f;
  const vf whole = (t + 12582912.f) - 12582912.f;  // to the nearest whole number
  const vf f = t - whole;
  vf p = splat(1.535336188e-4f);
  p = fma(p, f, splat(1.339887440e-3f));
  p = fma(p, f, splat(9.618437357e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472028e-1f));
  p = fma(p, f, splat(1.f));
  const vi power = __builtin_convertvector(larger(whole, splat(-126.f)), vi);
  const vf y = (vf)((vi)p + (power << 23));
  return (vf)((vi)y & ~less(x, splat(-87.f)));
}

}  // namespace
}  // namespace shoal
