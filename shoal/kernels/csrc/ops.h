#pragma once
// The functions of one instruction set's table, in a namespace of that set's name: files of the same source do not meet
// in the linker. Must not be included outside the files that are compiled once per set.
#include "kernels.h"

namespace shoal {
namespace SHOAL_SET {

int64_t packed_bytes(Kind, int64_t n, int64_t k);
void pack(Kind, const void *weight, void *panels, int64_t n, int64_t k);
void linear(const Weight &, const void *x, int64_t rows, const void *residual, float factor, void *y);
void add_deltas(const Delta *, const Adapted &, const void *x, int64_t count, void *y, int64_t columns, bool wide,
                float factor);
void gated_with(const Weight &gated, const Weight &sums, const Delta *, const Adapted &, const void *x, int64_t count,
                float *memory, void *y);
int64_t gated_rows(int64_t n);
void apply_gate(const Weight &, const float *sums, int64_t rows, void *y);
void rms_norm(const void *x, const float *weight, void *y, int64_t rows, int64_t columns, float eps, bool wide);
void layer_norm(const void *x, const float *weight, const float *bias, void *y, int64_t rows, int64_t columns, float eps,
                bool wide);
void gelu(const void *x, void *y, int64_t count, bool wide);
void gather(const void *x, int64_t count, int64_t bytes, const int64_t *index, int64_t rows, void *y);
void add(const void *x, const void *branch, float factor, void *y, int64_t count, bool wide);
void place(void *qkv, const Kernels::Heads &, const Pages &, const int64_t *position, const int64_t *slot,
           int64_t tokens);
void attention(const Work &, const Pages &, const void *q, int64_t stride, int64_t query_heads, float scale,
               int64_t window, float softcap, float *states, void *out);
void move(const Pages &, const int64_t *moves, int64_t count);
void largest(const float *x, int64_t *index, float *value, int64_t rows, int64_t columns);
void forbid(float *x, int64_t columns, const int64_t *row, const uint32_t *bits, int64_t count);
void draw(const float *x, int64_t columns, const Draws &, int64_t *token);
void score(const float *x, int64_t columns, const Scores &);
double peak(Kind, int64_t iterations);
double read(const void *memory, int64_t bytes);

// Memory of this thread for one call: grown, never given back, not initialised; 64-byte aligned.
void *scratch(int64_t bytes);

}  // namespace SHOAL_SET
}  // namespace shoal
