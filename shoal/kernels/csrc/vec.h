#pragma once
// The compiler's own vectors, as wide as a register of the instruction set: a wider type would live in memory.
// Included by kernels.cpp alone, inside its anonymous namespace: a function with external linkage would be
// compiled three times under one name, and the linker would keep one copy for all instruction sets.

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

constexpr int64_t BLOCK = 16;  // numbers added side by side, whatever the width: so all sets add in one order

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef float vf_any __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t vh_any __attribute__((vector_size(2 * WIDTH), aligned(2)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - (vf){}; }

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE vf load(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16); }

INLINE float load_one(const float *p) { return *p; }
INLINE float load_one(const bf16 *p) {
  uint32_t bits = (uint32_t)*p << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// To the nearest bf16, ties to even; a NaN stays a NaN (plain rounding could carry it into infinity or zero).
INLINE bf16 round_one(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store(float *p, vf v) { *(vf_any *)p = v; }
INLINE void store(bf16 *p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  vu out = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
  *(vh_any *)p = __builtin_convertvector(out, vh);
}

INLINE void store_one(float *p, float x) { *p = x; }
INLINE void store_one(bf16 *p, float x) { *p = round_one(x); }

// Adds a block's numbers as a tree of halves.
INLINE float sum(const vf *block) {
  float lane[BLOCK];
  __builtin_memcpy(lane, block, sizeof lane);
  for (int64_t width = BLOCK / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}
