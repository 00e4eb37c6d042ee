#pragma once
// What the extension can compute, as a table of functions over raw pointers. One table per instruction set.
// Nothing here knows Python, torch, or which table will be used. Sizes and addresses are trusted: the caller checks.
#include <cstdint>

namespace shoal {

using bf16 = uint16_t;  // the upper half of a float

constexpr int64_t PANEL = 32;  // outputs of a weight that lie together
constexpr int64_t UNIT = 16;   // positions of a page that lie together
constexpr int64_t TILE = 256;  // positions of one partial of attention, counted from position 0

// The arithmetic of a linear layer. Activations are float for fp32 and bf16 for all others.
enum class Kind : int { fp32, bf16, int8, int4, int4_a16, int8_a16 };
enum class Gate : int { none, silu, gelu };

// A weight of n outputs and k inputs in panels of 32 outputs (pack.cpp has the layouts). With a gate, panels alternate
// between gate and up, and n counts both with the zeros that fill their last panels: a multiple of 64.
// int8: output = (sum of x * w) * scale, with x rounded to 127ths of its row's largest number.
// int8_a16: the same with x rounded to 32512ths, each two bytes that are multiplied as two rows.
// int4 kinds: w = (q - zero) * scale; int4 rounds x to 127ths of the largest number of its row and group.
struct Weight {
  Kind kind;
  Gate gate;
  int64_t n, k;
  int64_t outputs;      // columns of y: n without a gate, at most n / 2 with one
  int64_t group;        // inputs that share a scale, a multiple of 8 (int4 kinds only)
  const void *panels;
  const void *scale;  // int8 kinds: float [panels * 32]; int4 kinds: bf16 [panels][k / group, rounded up][32]
  const void *zero;   // int8 kinds: float [panels * 32], sum of each output's weights; int4 kinds: uint8_t, as scale
  const float *bias;  // [panels * 32], or null
  bool wide;          // y is float whatever x is
};

// What one adapter adds to a linear layer: numbers begin to begin + k of x · downᵀ times each `up`, times its scale.
// Panel i of an up's outputs begins at column first + i * stride of what it is added to. No ups: it adds nothing.
struct Delta {
  struct Up {
    Weight weight;  // plain, wide
    float scale;
    int64_t begin, first, stride;
  };
  Weight down;
  const Up *ups;
  int64_t num_ups;
};

// Rows row[start[g]] to row[start[g + 1] - 1], ascending, have adapter adapter[g]; no row is there twice.
struct Adapted {
  const int64_t *row, *start, *adapter;
  int64_t groups;
};

// Where keys and values of one layer lie: [kv_heads][num_pages] blocks (pages.cpp has their layout).
struct Pages {
  void *keys, *values;
  int64_t num_pages, page_size, kv_heads, width;  // page_size is a multiple of UNIT, width counts numbers of a head
  Kind kind;  // fp32, bf16, or int8 for activations of bf16: a scale for each position's key and value, width <= 512
};

// Tokens order[first : first + count] attend to position tiles begin <= t < end of the pages in row `row` of the table.
struct Segment {
  int32_t first, count, row, begin, end;
  int32_t resume, keep;  // begin from / end with the tokens' states instead of nothing / the output
};

// One step's attention, the same for all layers. Segments of a level need those of the levels before it.
struct Work {
  const Segment *segments;
  const int32_t *level_ends;  // segments[0 : level_ends[0]] are the first level, and so on
  int64_t num_levels, num_tokens;
  const int32_t *order;     // tokens by segment
  const int32_t *position;  // of each token
  const int32_t *table;     // [rows][row_length], page numbers
  int64_t row_length;
};

// Tokens to be drawn, each from the row of that number, at number * 2^-64 of the weight of what is kept of it.
struct Draws {
  int64_t count;
  const int64_t *row;
  const uint64_t *number;
  const float *best, *heat;  // the row's largest number; above 0
  const int64_t *top_k;      // 0 keeps all
  const double *top_p;       // in (0, 1]
  const float *min_p;        // in [0, 1]
};

// Tokens whose place in their rows is wanted, and what is found: largest number of the row, the token's own, its rank
// (1 is best; of equals the lowest id first), the weight of the whole row, and the `top` <= columns best.
struct Scores {
  int64_t count, top;
  const int64_t *row, *token;
  float *best, *value;
  int64_t *weight, *rank, *ids;
  float *values;
};

struct Kernels {
  const char *name;

  // Bytes of a packed weight, and the packing itself. fp32 reads float, bf16 reads bf16, int8 kinds read int8_t
  // [n][k], the int4 kinds read uint8_t [n][k] of values 0 to 15. Outputs beyond n are filled with zeros.
  int64_t (*packed_bytes)(Kind kind, int64_t n, int64_t k);
  void (*pack)(Kind kind, const void *weight, void *panels, int64_t n, int64_t k);

  // y = (x · weightᵀ + bias) * factor + residual, or act(gate) * up. residual may be null, and may be y.
  void (*linear)(const Weight &weight, const void *x, int64_t rows, const void *residual, float factor, void *y);

  // y[r] += what r's adapter makes of x[r], times the factor; other rows of the `count` are not touched. Rows of x have
  // down.k numbers, those of y `columns`; y is float if `wide`. Deltas are by adapter.
  void (*add_deltas)(const Delta *deltas, const Adapted &rows, const void *x, int64_t count, void *y, int64_t columns,
                     bool wide, float factor);
  // `linear` of a gated weight, with deltas added before the activation. `sums` is the same weight without its gate,
  // wide: rows of n floats, panels of gate and up in turn. The memory has room for least(count, gated_rows(n)) rows.
  void (*gated_with)(const Weight &gated, const Weight &sums, const Delta *deltas, const Adapted &rows, const void *x,
                     int64_t count, float *memory, void *y);
  int64_t (*gated_rows)(int64_t n);

  // y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, in float, rounded once. x and y may be the same memory.
  void (*rms_norm)(const void *x, const float *weight, void *y, int64_t rows, int64_t columns, float eps, bool wide);
  // y[r] = (x[r] - mean) / sqrt(mean((x[r] - mean)^2) + eps) * weight + bias, in float, rounded once.
  void (*layer_norm)(const void *x, const float *weight, const float *bias, void *y, int64_t rows, int64_t columns,
                     float eps, bool wide);
  // y = x times the normal distribution's share below x, in float, rounded once. x and y may be the same memory.
  void (*gelu)(const void *x, void *y, int64_t count, bool wide);
  // y[r] = row index[r] of x, which has `count` rows of `bytes` bytes; an index beyond them takes the nearest row.
  void (*gather)(const void *x, int64_t count, int64_t bytes, const int64_t *index, int64_t rows, void *y);
  // y = x + branch * factor
  void (*add)(const void *x, const void *branch, float factor, void *y, int64_t count, bool wide);

  // Of each token's row [query heads | key heads | value heads]: norm the heads where weights are given (per head, or
  // over all heads of a kind with `whole`), rotate queries and keys (in place) by the tables' row of its position
  // where tables are given, and store keys and values in the token's slot (page * page_size + offset).
  struct Heads {
    int64_t query_heads, rotated;           // rotated: pairs (i, i + rotated)
    const float *cosine, *sine;             // [positions][rotated], or null
    const float *query_norm, *key_norm;     // or null
    float eps;
    bool whole;
  };
  void (*place)(void *qkv, const Heads &heads, const Pages &pages, const int64_t *position, const int64_t *slot,
                int64_t tokens);

  // Attention of one layer: query rows of `stride` numbers in, [tokens][query heads][width] out. window 0: none;
  // softcap 0: none. `states` holds tokens * query_heads * (width rounded up to 32 + 2) floats, used between segments.
  void (*attention)(const Work &work, const Pages &pages, const void *q, int64_t stride, int64_t query_heads,
                    float scale, int64_t window, float softcap, float *states, void *out);

  // Copies the first `tokens` positions of page src to page dst for each (src, dst, tokens), in order, in one layer.
  void (*move)(const Pages &pages, const int64_t *moves, int64_t count);

  // Index and value of each row's largest number; of equals the first, and a NaN is larger than any number.
  void (*largest)(const float *x, int64_t *index, float *value, int64_t rows, int64_t columns);
  // Sets number v of row[k] to -infinity where bit v of bits[k][columns / 32, rounded up] is 0. Rows are distinct.
  void (*forbid)(float *x, int64_t columns, const int64_t *row, const uint32_t *bits, int64_t count);
  // Rows of finite float32 logits (sampling.cpp says what a weight is). The same bits in every table.
  void (*draw)(const float *x, int64_t columns, const Draws &draws, int64_t *token);
  void (*score)(const float *x, int64_t columns, const Scores &scores);

  // The machine's limits, for whoever has a clock. On every thread, `iterations` rounds of the products that a kind's
  // linear layers are made of, in registers alone; returns the operations of all threads. Then a buffer read once by
  // all threads together; returns the bytes.
  double (*peak)(Kind kind, int64_t iterations);
  double (*read)(const void *memory, int64_t bytes);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_neon_bf16;
#endif

}  // namespace shoal
