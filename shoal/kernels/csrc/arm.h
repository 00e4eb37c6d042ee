#pragma once
// What ARM's 128-bit registers do in one instruction or in few: products, and conversions of bf16. Knows instructions;
// must not know what is computed with them.
// Two sets share it: that of every 64-bit ARM machine, and that of machines which multiply pairs of bf16 and fours of
// bytes. Included where __ARM_NEON is defined, which the scalar set is built without.
#include <arm_neon.h>

#include <cstdint>

namespace shoal {
namespace {

// total[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over bf16 pairs in 32-bit lanes.
static inline __attribute__((always_inline)) float32x4_t arm_pairs(float32x4_t total, uint32x4_t a, uint32x4_t b) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vbfdotq_f32(total, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
#else
  const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
  total = vfmaq_f32(total, vreinterpretq_f32_u32(vshlq_n_u32(a, 16)), vreinterpretq_f32_u32(vshlq_n_u32(b, 16)));
  return vfmaq_f32(total, vreinterpretq_f32_u32(vandq_u32(a, upper)), vreinterpretq_f32_u32(vandq_u32(b, upper)));
#endif
}

// total[i] + sum over j of unsigned u[4i+j] * signed s[4i+j], exact. A product fits in 16 bits; with `small` (u < 16)
// two of them do together.
template <bool small>
static inline __attribute__((always_inline)) int32x4_t arm_fours(int32x4_t total, uint32x4_t u, uint32x4_t s) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return vusdotq_s32(total, vreinterpretq_u8_u32(u), vreinterpretq_s8_u32(s));
#else
  const uint16x8_t bytes = vreinterpretq_u16_u32(u);
  const int16x8_t numbers = vreinterpretq_s16_u32(s);
  const int16x8_t even = vreinterpretq_s16_u16(vandq_u16(bytes, vdupq_n_u16(255)));
  const int16x8_t odd = vreinterpretq_s16_u16(vshrq_n_u16(bytes, 8));
  const int16x8_t first = vmulq_s16(even, vshrq_n_s16(vshlq_n_s16(numbers, 8), 8)), rest = vshrq_n_s16(numbers, 8);
  if (small) return vpadalq_s16(total, vmlaq_s16(first, odd, rest));
  return vpadalq_s16(vpadalq_s16(total, first), vmulq_s16(odd, rest));
#endif
}

// total[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over pairs of signed 16-bit numbers, exact.
static inline __attribute__((always_inline)) int32x4_t arm_whole_pairs(int32x4_t total, uint32x4_t a, uint32x4_t b) {
  const int16x8_t x = vreinterpretq_s16_u32(a), y = vreinterpretq_s16_u32(b);
  return vaddq_s32(total, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}

// In each lane, the nibbles that begin at the bits 4 j and 4 j + 16, less 8, as a pair of bf16.
static inline __attribute__((always_inline)) uint32x4_t arm_nibbles(uint32x4_t packed, int j) {
  alignas(16) static const uint8_t values[32] = {
      0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80, 0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,   // lower bytes
      0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf, 0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40};  // upper bytes
  const uint8x16x2_t table = {{vld1q_u8(values), vld1q_u8(values + 16)}};
  const uint16x8_t bits = vreinterpretq_u16_u32(packed);
  const uint16x8_t low = vandq_u16(bits >> (uint16_t)(4 * j), vdupq_n_u16(15));
  const uint16x8_t both = vorrq_u16(vsliq_n_u16(low, low, 8), vdupq_n_u16(0x1000));
  return vreinterpretq_u32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u16(both)));
}

// Eight bf16 as floats, and back: to the nearest, ties to even, a NaN stays a NaN.
static inline __attribute__((always_inline)) void arm_widen(const uint16_t *p, float32x4_t *to) {
  const uint16x8_t bits = vld1q_u16(p);
  to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16));
  to[1] = vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16));
}
static inline __attribute__((always_inline)) void arm_narrow(uint16_t *p, const float32x4_t *from) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  vst1q_u16(p, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(from[0]), from[1])));
#else
  uint32x4_t out[2];
  for (int i = 0; i < 2; i++) {
    const uint32x4_t bits = vreinterpretq_u32_f32(from[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    out[i] = vbslq_u32(vceqq_f32(from[i], from[i]), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  }
  vst1q_u16(p, vshrn_high_n_u32(vshrn_n_u32(out[0], 16), out[1], 16));
#endif
}

}  // namespace
}  // namespace shoal
