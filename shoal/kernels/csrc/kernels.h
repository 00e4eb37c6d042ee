#pragma once
// What the extension can compute, as a table of functions over raw pointers. One table per instruction set.
// Nothing here knows Python, torch, or which table will be used.
#include <cstdint>

namespace shoal {

using bf16 = uint16_t;  // the upper half of a float

struct Kernels {
  const char *name;
  // y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, row by row; all in float, rounded once at the end.
  // Each row is a function of that row alone. x and y may be the same memory.
  void (*rms_norm_fp32)(const float *x, const float *weight, float *y, int64_t rows, int64_t columns, float eps);
  void (*rms_norm_bf16)(const bf16 *x, const bf16 *weight, bf16 *y, int64_t rows, int64_t columns, float eps);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace shoal
