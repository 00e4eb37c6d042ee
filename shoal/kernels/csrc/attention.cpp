// Attention over pages, one kernel for decoding, shared runs and chunks of prompts. Knows segments, heads and the layout
// of pages (pages.cpp); must not know requests, or why tokens read pages together.
//
// A task is one segment's tokens with the query heads of one key/value head: up to 48 rows (token, head). It goes through
// the segment's tiles of 256 positions. For each: scores, in register tiles of 12 rows by 32 positions; their maximum,
// exponentials and sum; weighted values, in register tiles of 12 rows by 32 numbers; and the fold into the rows' state.
// While the scores are computed the tile's values are fetched, while those are weighted the next tile's keys are.
//
// What makes a row's bits its own: each of its numbers is one chain of operations in the order of the positions,
// whatever the other rows of the register tile are. Positions it does not see have a weight of exactly 0, which leaves
// a sum as it is, so it is free to visit or skip them. A tile in which it sees nothing leaves its state alone.
// Exponents are in base 2: the scale of the scores takes in log2(e), and 2 to the power of 0 is exactly 1.
#include <stdlib.h>

#include "ops.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t BLOCK = 48;            // rows of a task
constexpr int64_t UNITS = TILE / UNIT;   // of a position tile
constexpr int64_t SCORES = TILE + UNIT;  // floats from row to row: not a power of two, rows would compete for the cache
constexpr int64_t AHEAD_BYTES = 16384;   // how long before they are read keys and values are fetched
constexpr float LOG2E = 1.44269504088896f;
#ifdef __AVX512F__
constexpr int64_t ROWS = 12;  // of a register tile: 24 registers of sums
#define EACH_COUNT(f, ...) \
  {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>,  f<__VA_ARGS__, 5>,  f<__VA_ARGS__, 6>, \
   f<__VA_ARGS__, 7>, f<__VA_ARGS__, 8>, f<__VA_ARGS__, 9>, f<__VA_ARGS__, 10>, f<__VA_ARGS__, 11>, f<__VA_ARGS__, 12>}
constexpr int64_t FEW = 7;  // rows of which a register tile can be twice as wide
#define EACH_FEW(f, ...)                                                                                          \
  {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>, f<__VA_ARGS__, 5>, f<__VA_ARGS__, 6>, \
   f<__VA_ARGS__, 7>}
#else
constexpr int64_t ROWS = 4, FEW = 2;
#define EACH_FEW(f, ...) {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>}
#define EACH_COUNT(f, ...) {f<__VA_ARGS__, 1>, f<__VA_ARGS__, 2>, f<__VA_ARGS__, 3>, f<__VA_ARGS__, 4>}
#endif

// A word is a float, or two neighbouring bf16. Words of queries and weights from row to row are multiplied by words of
// keys and values from lane to lane.
typedef uint32_t word;

template <bool WIDE>
struct Number {
  typedef float type;
};
template <>
struct Number<false> {
  typedef bf16 type;
};

template <bool WIDE>
constexpr int64_t PER_WORD = WIDE ? 1 : 2;

template <bool WIDE>
constexpr int64_t WEIGHTS = SCORES / PER_WORD<WIDE>;  // words from row to row

// A register of floats, and how many of them are 16 lanes. Register tiles are written in these: the compiler keeps
// wider vectors in memory.
#if defined(__AVX512F__)
constexpr int SPLIT = 1;
#elif defined(__AVX2__)
constexpr int SPLIT = 2;
#else
constexpr int SPLIT = 4;
#endif
constexpr int REGISTER = LANES / SPLIT;
typedef float reg __attribute__((vector_size(64 / SPLIT)));
typedef uint32_t reg_bits __attribute__((vector_size(64 / SPLIT)));
typedef uint32_t reg_bits_any __attribute__((vector_size(64 / SPLIT), aligned(4), may_alias));

INLINE reg fma_of(reg a, reg b, reg c) {
#if defined(__AVX512F__)
  return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Words as they are multiplied: whole where the machine multiplies pairs or they are floats, else both numbers apart.
#ifdef __AVX512BF16__
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
template <bool WIDE>
struct Operand {
  reg_bits first, second;
  explicit Operand(reg_bits x) : first(x), second(x) {
    if (!WIDE && !PAIRS) first = x << 16, second = x & 0xffff0000u;
  }
};

template <bool WIDE>
INLINE reg step(reg total, const Operand<WIDE> &b, const Operand<WIDE> &a) {
#ifdef __AVX512BF16__
  if (!WIDE) return (reg)_mm512_dpbf16_ps((__m512)total, (__m512bh)b.first, (__m512bh)a.first);
#endif
  total = fma_of((reg)b.first, (reg)a.first, total);
  return WIDE ? total : fma_of((reg)b.second, (reg)a.second, total);
}

// 2 to the power of x, for x <= 0 and little more. The polynomials are least relative errors of 2**f on [0, 1) (3e-6
// where weights are rounded to bf16, else 2e-9 before rounding) among those that are exactly 1 at 0.
template <bool WIDE>
INLINE vf power_of_two(vf x) {
#ifdef __AVX512F__
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x), and 0 for -infinity
  vf p;
  if (WIDE) {
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
  const vf t = larger(x, splat(-126.f));
  const vf whole = (t + 12582912.f) - 12582912.f;  // to the nearest whole number
  const vf f = t - whole;
  vf p = splat(1.535336188e-4f);  // the coefficients of `exponential`
  p = fma(p, f, splat(1.339887440e-3f));
  p = fma(p, f, splat(9.618437357e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472028e-1f));
  p = fma(p, f, splat(1.f));
  const vi power = __builtin_convertvector(whole, vi);
  const vi below = (vi)(x + 126.f) >> 31;  // all bits of the lanes below -126; a comparison is slow without masks
  return (vf)(((vi)p + (power << 23)) & ~below);
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

// ------------------------------------------------------------------------------------------------ register tiles

// m rows of queries, packed by step, by the positions of C key units. `tops`, unless null, takes in the largest scores
// by lane. `ahead`: as many units, to be fetched line after line.
template <bool WIDE, bool AHEAD, int C, int m>
__attribute__((noinline)) void score(const word *q, const word *const *keys, int64_t steps, float *scores, float *tops,
                                     const word *const *ahead) {
  constexpr int W = SPLIT == 1 ? C : SPLIT, ONCE = W / SPLIT;  // registers, units at once
  const int64_t turn = (steps + C - 1) / C;
  for (int from = 0; from < C; from += ONCE) {
    const word *unit[ONCE], *next = nullptr, *a = q;
#pragma GCC unroll 16
    for (int c = 0; c < ONCE; c++) unit[c] = keys[from + c];
    reg total[m][W];
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) total[r][c] = (reg){};
    for (int64_t k = 0, until = 0; k < steps; k++, a += m) {
      if (AHEAD && from == 0) {
        if (k == until) next = *ahead++, until += turn;
#pragma GCC unroll 4
        for (int c = 0; c < C; c++, next += LANES) __builtin_prefetch(next, 0, 3);
      }
      reg_bits x[W];
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) x[c] = *(const reg_bits_any *)(unit[c / SPLIT] + k * LANES + c % SPLIT * REGISTER);
#pragma GCC unroll 16
      for (int r = 0; r < m; r++) {
        const Operand<WIDE> w(a[r] - (reg_bits){});
#pragma GCC unroll 4
        for (int c = 0; c < W; c++) total[r][c] = step<WIDE>(total[r][c], Operand<WIDE>(x[c]), w);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++)
        __builtin_memcpy(scores + r * SCORES + from * UNIT + c * REGISTER, &total[r][c], sizeof(reg));
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

// out = out * old + (m rows of weights by 16 C numbers of the values of each unit, `offset` words into it) * fresh.
// `ahead`: for each unit an address from which as much as is read of it is to be fetched.
template <bool WIDE, bool AHEAD, int C, int m>
__attribute__((noinline)) void mix(const word *weights, const word *const *values, int64_t units, int64_t offset,
                                   const float *old, const float *fresh, float *out, int64_t padded,
                                   const word *const *ahead) {
  constexpr int W = SPLIT == 1 ? C : SPLIT, ONCE = W / SPLIT;  // registers, vectors of 16 numbers at once
  constexpr int64_t STEPS = UNIT / PER_WORD<WIDE>;
  for (int from = 0; from < C; from += ONCE) {
    const word *a = weights;
    reg total[m][W];
#pragma GCC unroll 16
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) total[r][c] = (reg){};
    for (int64_t u = 0; u < units; u++) {
      const word *v = values[u] + offset + from / 2 * (STEPS * PANEL) + from % 2 * LANES;
      const word *next = AHEAD ? ahead[u] : nullptr;
      for (int64_t k = 0; k < STEPS; k++, a++, v += PANEL) {
        if (AHEAD && from == 0) {
#pragma GCC unroll 4
          for (int c = 0; c < C; c++, next += LANES) __builtin_prefetch(next, 0, 3);
        }
        reg_bits x[W];
#pragma GCC unroll 4
        for (int c = 0; c < W; c++)
          x[c] = *(const reg_bits_any *)(v + c / SPLIT / 2 * (STEPS * PANEL) + c / SPLIT % 2 * LANES + c % SPLIT * REGISTER);
#pragma GCC unroll 16
        for (int r = 0; r < m; r++) {
          const Operand<WIDE> w(a[r * WEIGHTS<WIDE>] - (reg_bits){});
#pragma GCC unroll 4
          for (int c = 0; c < W; c++) total[r][c] = step<WIDE>(total[r][c], Operand<WIDE>(x[c]), w);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; r++) {
      if (fresh[r] == 0.f) continue;
#pragma GCC unroll 4
      for (int c = 0; c < W; c++) {
        float *o = out + r * padded + from * LANES + c * REGISTER;
        reg state;
        __builtin_memcpy(&state, o, sizeof state);
        state = fma_of(total[r][c], fresh[r] - (reg){}, state * old[r]);
        __builtin_memcpy(o, &state, sizeof state);
      }
    }
  }
}

typedef void (*Score)(const word *, const word *const *, int64_t, float *, float *, const word *const *);
typedef void (*Mix)(const word *, const word *const *, int64_t, int64_t, const float *, const float *, float *, int64_t,
                    const word *const *);

template <bool WIDE>
constexpr Score SCORE[2][ROWS] = {EACH_COUNT(score, WIDE, false, 2), EACH_COUNT(score, WIDE, true, 2)};
template <bool WIDE>
constexpr Mix MIX[2][ROWS] = {EACH_COUNT(mix, WIDE, false, 2), EACH_COUNT(mix, WIDE, true, 2)};
template <bool WIDE>
constexpr Score SCORE_FEW[2][FEW] = {EACH_FEW(score, WIDE, false, 4), EACH_FEW(score, WIDE, true, 4)};
template <bool WIDE>
constexpr Mix MIX_FEW[2][FEW] = {EACH_FEW(mix, WIDE, false, 4), EACH_FEW(mix, WIDE, true, 4)};

// ------------------------------------------------------------------------------------------------ tasks

// What all tasks of a call have in common.
struct Call {
  const Work &work;
  const Pages &pages;
  const void *q;
  int64_t stride, heads, group;  // group: query heads of a key/value head
  int64_t width, padded;         // padded to whole panels
  int64_t steps, unit_words;     // words of a query; of a unit of keys or values
  int64_t window;
  float factor;            // from stored scores to exponents of 2
  float inward, outward;   // softcap: stored scores are outward * tanh(inward * product); outward 0: the products
  float *states;
  void *out;
  const int64_t *first;  // task of each segment
};

struct Task {
  const Segment *segment;
  int64_t head, row, rows;  // rows of the segment's (token, head of the group) pairs
  int64_t low, high;        // first and last position of its tokens
  int64_t begin, end;       // tiles
};

// Memory of a thread.
struct Room {
  word *q;          // by register tile: [steps][rows]
  float *scores;    // [ROWS][SCORES]
  word *weights;    // [ROWS][WEIGHTS], the same memory as the scores if they are floats
  float *tops;      // [LANES][LANES], largest scores, then sums of weights, by row and lane
  float *out;       // [BLOCK][padded]
  word *last_unit;  // values of the last unit, with zeros where nobody has written yet
  float weight[BLOCK + LANES], largest[BLOCK + LANES];
  float old[LANES], fresh[LANES];                         // of a register tile
  int64_t position[BLOCK];
};

// Units in the order in which they will be read: of this task, then of the next. Fetching goes on at the pace of reading,
// whatever is being read, so that memory is never idle.
struct Feed {
  const Task *task, *next;
  int64_t tile;
  int64_t given, count;  // of units[]
  const word *units[4 * UNITS];
};

// A tile's units `from` <= u < `to` are visited; those before `open` and from `shut` on are not seen by all rows.
struct Extent {
  int64_t start, from, to, open, shut;
};

template <bool WIDE>
void give(const Call &call, Room &room) {
  const int64_t q = (BLOCK * call.steps + LANES) * 4, scores = ROWS * SCORES * 4, weights = WIDE ? 0 : ROWS * WEIGHTS<WIDE> * 4;
  const int64_t tops = LANES * LANES * 4, out = BLOCK * call.padded * 4, unit = call.unit_words * 4;
  char *memory = (char *)scratch(q + scores + weights + tops + out + unit);
  room.scores = (float *)memory, memory += scores;
  room.weights = (word *)(WIDE ? (char *)room.scores : memory), memory += weights;
  room.tops = (float *)memory, memory += tops;
  room.out = (float *)memory, memory += out;
  room.last_unit = (word *)memory, memory += unit;
  room.q = (word *)memory;
}

// The token and the query head of a row.
INLINE void locate(const Call &call, const Task &task, int64_t row, int64_t &token, int64_t &head) {
  const uint32_t at = (uint32_t)(task.row + row), group = (uint32_t)call.group;
  token = call.work.order[task.segment->first + at / group];
  head = task.head * call.group + at % group;
}

Task find_task(const Call &call, int64_t index, int64_t from, int64_t to) {
  while (to - from > 1) {
    const int64_t middle = (from + to) / 2;
    (call.first[middle] <= index ? from : to) = middle;
  }
  const Segment *segment = call.work.segments + from;
  index -= call.first[from];
  Task task = {segment, index % call.pages.kv_heads, index / call.pages.kv_heads * BLOCK, 0, 0, 0, 0, 0};
  const int64_t left = segment->count * call.group - task.row;
  task.rows = left < BLOCK ? left : BLOCK;
  task.low = INT64_MAX;
  const int32_t *order = call.work.order + segment->first;
  for (int64_t t = task.row / call.group; t <= (task.row + task.rows - 1) / call.group; t++) {
    const int64_t position = call.work.position[order[t]];
    task.low = position < task.low ? position : task.low;
    task.high = position > task.high ? position : task.high;
  }
  const int64_t seen = task.high / TILE + 1, lost = call.window ? task.low - call.window + 1 : 0;
  task.begin = lost > segment->begin * TILE ? lost / TILE : segment->begin;
  task.end = seen < segment->end ? seen : segment->end;
  return task;
}

Extent find_extent(const Call &call, const Task &task, int64_t tile) {
  const int64_t start = tile * TILE, left = task.high + 1 - start, seen = left < TILE ? left : TILE;
  Extent extent = {start, 0, (seen + UNIT - 1) / UNIT, 0, UNITS};
  const int64_t shut = task.low + 1 - start;
  if (shut < TILE) extent.shut = shut < 0 ? 0 : shut / UNIT & ~3;
  if (call.window) {
    const int64_t from = task.low - call.window + 1 - start, open = task.high - call.window + 1 - start;
    if (from > 0) extent.from = from / UNIT & ~3;
    if (open > 0) extent.open = (open + 4 * UNIT - 1) / UNIT & ~3;
  }
  return extent;
}

// Addresses of the units from <= u < to, and once more the last one if their number is odd.
void find_units(const Call &call, const Task &task, const Extent &extent, const word **keys, const word **values) {
  const int32_t *row = call.work.table + task.segment->row * call.work.row_length;
  const int64_t size = call.pages.page_size;
  for (int64_t u = extent.from; u < extent.to; u++) {
    const int64_t position = extent.start + u * UNIT, page = position / size, unit = position % size / UNIT;
    const int64_t offset =
        ((row[page] * call.pages.kv_heads + task.head) * (size / UNIT) + unit) * call.unit_words;
    keys[u] = (const word *)call.pages.keys + offset;
    values[u] = (const word *)call.pages.values + offset;
  }
  if (extent.to % 2) keys[extent.to] = keys[extent.to - 1], values[extent.to] = values[extent.to - 1];
}

int64_t ahead_units(const Call &call) {
  const int64_t units = AHEAD_BYTES / (call.unit_words * 4);
  return units < 2 ? 2 : units < UNITS ? units : UNITS;
}

// Addresses of the next `wanted` units to be fetched, or null when there are none.
const word *const *take(const Call &call, Feed &feed, int64_t wanted) {
  while (feed.count - feed.given < wanted && feed.task) {
    if (feed.tile >= feed.task->end) {
      feed.task = feed.next, feed.next = nullptr;
      if (feed.task) feed.tile = feed.task->begin;
      continue;
    }
    if (feed.given) {
      for (int64_t i = feed.given; i < feed.count; i++) feed.units[i - feed.given] = feed.units[i];
      feed.count -= feed.given, feed.given = 0;
    }
    const Extent extent = find_extent(call, *feed.task, feed.tile++);
    const word *keys[UNITS], *values[UNITS];
    find_units(call, *feed.task, extent, keys, values);
    for (int64_t u = extent.from; u < extent.to; u++) feed.units[feed.count++] = keys[u];
    for (int64_t u = extent.from; u < extent.to; u++) feed.units[feed.count++] = values[u];
    const int64_t fresh = 2 * (extent.to - extent.from);
    for (const word *const *unit = feed.units + feed.count - fresh; unit < feed.units + feed.count; unit++) {
      __builtin_prefetch(*unit, 0, 3), __builtin_prefetch(*unit + call.unit_words - 1, 0, 3);
    }
  }
  if (feed.given == feed.count) return nullptr;
  for (; feed.count - feed.given < wanted; feed.count++) feed.units[feed.count] = feed.units[feed.count - 1];
  feed.given += wanted;
  return feed.units + feed.given - wanted;
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

// Queries of a register tile's rows, by step.
template <bool WIDE>
void gather(const Call &call, const char *const *rows, int64_t count, word *to) {
  const char *at[LANES];
  for (int64_t r = 0; r < LANES; r++) at[r] = rows[r < count ? r : count - 1];
  const int64_t whole = call.width / PER_WORD<WIDE>;
  int64_t k = 0;
  for (; k + LANES <= whole; k += LANES) {
    transpose(at, count, to + k * count);
    for (int64_t r = 0; r < LANES; r++) at[r] += LANES * 4;
  }
  for (int64_t r = 0; r < count; r++) {
    for (int64_t i = k; i < whole; i++) __builtin_memcpy(to + i * count + r, at[r] + (i - k) * 4, 4);
    if (!WIDE && call.width % 2) to[whole * count + r] = *(const bf16 *)(at[r] + (whole - k) * 4);
  }
}

template <bool WIDE>
void begin_task(const Call &call, const Task &task, Room &room) {
  const int64_t tiles = (task.rows + ROWS - 1) / ROWS;
  int64_t token = 0, head = 0;
  for (int64_t i = 0, r = 0; i < tiles; i++) {
    const int64_t first = r, end = task.rows * (i + 1) / tiles;
    const char *rows[LANES];
    for (; r < end; r++) {
      locate(call, task, r, token, head);
      rows[r - first] = (const char *)call.q + (token * call.stride + head * call.width) * (WIDE ? 4 : 2);
      room.position[r] = call.work.position[token];
      float *out = room.out + r * call.padded;
      if (task.segment->resume) {
        const float *state = call.states + (token * call.heads + head) * (call.padded + 2);
        __builtin_memcpy(out, state, call.padded * 4);
        room.weight[r] = state[call.padded], room.largest[r] = state[call.padded + 1];
      } else {
        __builtin_memset(out, 0, call.padded * 4);
        room.weight[r] = 0, room.largest[r] = -__builtin_inff();
      }
    }
    gather<WIDE>(call, rows, end - first, room.q + first * call.steps);
  }
}

template <bool WIDE>
void end_task(const Call &call, const Task &task, Room &room) {
  for (int64_t r = 0; r < task.rows; r++) {
    int64_t token, head;
    locate(call, task, r, token, head);
    float *out = room.out + r * call.padded;
    if (task.segment->keep) {
      float *state = call.states + (token * call.heads + head) * (call.padded + 2);
      __builtin_memcpy(state, out, call.padded * 4);
      state[call.padded] = room.weight[r], state[call.padded + 1] = room.largest[r];
      continue;
    }
    typedef typename Number<WIDE>::type T;
    T *to = (T *)call.out + (token * call.heads + head) * call.width;
    for (int64_t i = 0; i < call.width; i += LANES, to += LANES) {
      const vf mean = load(out + i) / room.weight[r];
      if (call.width - i >= LANES) {
        store(to, mean);
        continue;
      }
      T last[LANES];
      store(last, mean);
      __builtin_memcpy(to, last, (call.width - i) * sizeof(T));
    }
  }
}

// ------------------------------------------------------------------------------------------------ one tile

// Caps and hides scores where need be, and takes what `score` could not into the largest ones.
INLINE void finish_scores(const Call &call, const Extent &extent, bool capped, float *scores, int64_t position,
                          float *tops) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t last = position - extent.start, first = call.window ? last - call.window + 1 : 0;
  const vi high = lane * 0 + (int32_t)(last < TILE ? last : TILE), low = lane * 0 + (int32_t)(first > 0 ? first : 0);
  vf top = load(tops);
  for (int64_t u = extent.from; u < extent.to + extent.to % 2; u++) {
    const bool partly = u < extent.open || u >= extent.shut;
    if (!partly && !capped) continue;
    vf s = load(scores + u * UNIT);
    if (capped) s = hyperbolic_tangent(s * call.inward) * call.outward;
    const vi at = lane + (int32_t)(u * UNIT), hidden = ((high - at) | (at - low)) >> 31;
    if (partly) s = (vf)(((vi)s & ~hidden) | ((vi)splat(-__builtin_inff()) & hidden));
    store(scores + u * UNIT, s);
    top = larger(top, s);
  }
  store(tops, top);
}

// Scores to weights, 2 to the power of score * factor + shift, and their sum by lane: even and odd units, then both.
template <bool WIDE>
INLINE vf weigh(const float *scores, word *weights, const Extent &extent, vf factor, vf shift) {
  vf even = {}, odd = {};
  typename Number<WIDE>::type *to = (typename Number<WIDE>::type *)weights;
  for (int64_t u = extent.from; u < extent.to; u += 2) {
    const vf a = power_of_two<WIDE>(fma(load(scores + u * UNIT), factor, shift));
    const vf b = power_of_two<WIDE>(fma(load(scores + u * UNIT + UNIT), factor, shift));
    even += a, odd += b;
    store(to + u * UNIT, a), store(to + u * UNIT + UNIT, b);
  }
  return even + odd;
}

// The last unit of values with zeros from position `count` on: 0 times what lies there might be NaN.
template <bool WIDE>
const word *without_rest(const Call &call, Room &room, const word *values, int64_t count) {
  constexpr int64_t STEPS = UNIT / PER_WORD<WIDE>;
  for (int64_t i = 0; i < call.unit_words; i += PANEL) {
    const int64_t position = i / PANEL % STEPS * PER_WORD<WIDE>;
    const word seen = position >= count ? 0u : !WIDE && position + 1 >= count ? 0xffffu : ~0u;
    for (int64_t j = 0; j < PANEL; j++) room.last_unit[i + j] = values[i + j] & seen;
  }
  return room.last_unit;
}

// Scores of `rows` rows from r on to weights, and to new states but for `out`, with what `mix` needs to renew that.
template <bool WIDE>
void weigh_and_fold(const Call &call, const Extent &extent, int64_t r, int64_t rows, Room &room) {
  const bool capped = call.outward != 0.f;
  if (capped || extent.open > extent.from || extent.shut < extent.to)
    for (int64_t i = 0; i < rows; i++)
      finish_scores(call, extent, capped, room.scores + i * SCORES, room.position[r + i], room.tops + i * LANES);
  const vf none = splat(-__builtin_inff()), factor = splat(call.factor);
  const vf top = reduce_rows<larger>(room.tops) * factor;
  float shift[LANES];
  store(shift, top == none ? (vf){} : -top);
  for (int64_t i = 0; i < rows; i++) {
    const vf sums = weigh<WIDE>(room.scores + i * SCORES, room.weights + i * WEIGHTS<WIDE>, extent, factor, splat(shift[i]));
    store(room.tops + i * LANES, sums);
  }
  const vf mass = reduce_rows<add>(room.tops);
  const vf before = load(room.largest + r), after = larger(before, top), base = after == none ? (vf){} : after;
  const vf old = power_of_two<true>(before - base), fresh = power_of_two<true>(top - base);
  store(room.old, old), store(room.fresh, fresh);
  float state[2][LANES];
  store(state[0], after), store(state[1], fma(mass, fresh, load(room.weight + r) * old));
  for (int64_t i = 0; i < rows; i++) room.largest[r + i] = state[0][i], room.weight[r + i] = state[1][i];
}

// Rows `r` to `r + rows` of a task, one register tile, through the units of a position tile. `feed` is null if another
// register tile has fetched what lies ahead.
template <bool WIDE>
void run_tile(const Call &call, const Extent &extent, const word *const *keys, const word *const *values, int64_t r,
              int64_t rows, Feed *feed, Room &room) {
  for (int64_t i = 0; i < rows; i++) store(room.tops + i * LANES, splat(-__builtin_inff()));
  for (int64_t u = extent.from, count; u < extent.to; u += count) {
    count = rows <= FEW && u + 4 <= extent.to ? 4 : 2;
    const bool whole = u >= extent.open && u < extent.shut && call.outward == 0.f;
    const word *const *ahead = feed ? take(call, *feed, count) : nullptr;
    (count == 4 ? SCORE_FEW<WIDE>[ahead != nullptr] : SCORE<WIDE>[ahead != nullptr])[rows - 1](
        room.q + r * call.steps, keys + u, call.steps, room.scores + u * UNIT, whole ? room.tops : nullptr, ahead);
  }
  weigh_and_fold<WIDE>(call, extent, r, rows, room);
  const int64_t from = extent.from, units = extent.to - from;
  const word *const *ahead = feed ? take(call, *feed, units) : nullptr;
  const int64_t panels = call.padded / PANEL, panel_words = PANEL * UNIT / PER_WORD<WIDE>;
  for (int64_t d = 0, count; d < panels; d += count) {
    count = rows <= FEW && d + 2 <= panels ? 2 : 1;
    const word *chunks[UNITS];  // as much of the units ahead as is read of these, in the order of addresses
    for (int64_t u = 0; u < units && ahead; u++) {
      const int64_t at = d * units + u * count;
      chunks[u] = ahead[at / panels] + at % panels * panel_words;
    }
    (count == 2 ? MIX_FEW<WIDE>[ahead != nullptr] : MIX<WIDE>[ahead != nullptr])[rows - 1](
        room.weights + from * UNIT / PER_WORD<WIDE>, values + from, units, d * panel_words, room.old, room.fresh,
        room.out + r * call.padded + d * PANEL, call.padded, chunks);
  }
}

template <bool WIDE>
void run_task(const Call &call, const Task &task, Feed &feed, Room &room) {
  const word *keys[UNITS], *values[UNITS];
  begin_task<WIDE>(call, task, room);
  for (int64_t tile = task.begin; tile < task.end; tile++) {
    const Extent extent = find_extent(call, task, tile);
    find_units(call, task, extent, keys, values);
    const int64_t seen = task.high + 1 - extent.start, tiles = (task.rows + ROWS - 1) / ROWS;
    if (seen < extent.to * UNIT)
      values[extent.to - 1] = without_rest<WIDE>(call, room, values[extent.to - 1], seen % UNIT);
    for (int64_t i = 0, r = 0; i < tiles; i++) {
      const int64_t end = task.rows * (i + 1) / tiles;
      run_tile<WIDE>(call, extent, keys, values, r, end - r, i ? nullptr : &feed, room);
      r = end;
    }
  }
  end_task<WIDE>(call, task, room);
}

template <bool WIDE>
void run(Call &call) {
  const Work &work = call.work;
  const int64_t segments = work.level_ends[work.num_levels - 1];
  int64_t *first = (int64_t *)malloc((segments + 1 + work.num_levels) * sizeof(int64_t));
  if (!first) abort();
  int64_t *counter = first + segments + 1;  // next task of each level
  first[0] = 0;
  for (int64_t i = 0; i < segments; i++)
    first[i + 1] = first[i] + (work.segments[i].count * call.group + BLOCK - 1) / BLOCK * call.pages.kv_heads;
  for (int64_t i = 0; i < work.num_levels; i++) counter[i] = first[i ? work.level_ends[i - 1] : 0];
  call.first = first;
#pragma omp parallel if (first[segments] > 1)
  {
    Room room;
    give<WIDE>(call, room);
    for (int64_t level = 0; level < work.num_levels; level++) {
      const int64_t from = level ? work.level_ends[level - 1] : 0, to = work.level_ends[level];
      Task tasks[2];
      Feed feed = {};
      bool some = false;
      for (int now = 0;; now ^= 1) {
        // The next task is taken before this one is done: its first units are fetched meanwhile.
        Task &task = tasks[now], &next = tasks[now ^ 1];
        const int64_t index = __atomic_fetch_add(counter + level, 1, __ATOMIC_RELAXED);
        const bool more = index < first[to];
        if (more) next = find_task(call, index, from, to);
        if (some) {
          if (!feed.task) feed.task = more ? &next : nullptr, feed.tile = next.begin;
          else feed.next = more ? &next : nullptr;
          run_task<WIDE>(call, task, feed, room);
        } else if (more) {
          feed.task = &next, feed.tile = next.begin;
          take(call, feed, ahead_units(call));
        }
        some = more;
        if (!some) break;
      }
      if (level + 1 < work.num_levels) {
#pragma omp barrier
      }
    }
  }
  free(first);
}

}  // namespace

void attention(const Work &work, const Pages &pages, const void *q, int64_t stride, int64_t query_heads, float scale,
               int64_t window, float softcap, float *states, void *out) {
  if (!work.num_tokens) return;
  const int64_t per_word = pages.wide ? 1 : 2, padded = (pages.width + PANEL - 1) / PANEL * PANEL;
  Call call = {work, pages, q, stride, query_heads, query_heads / pages.kv_heads, pages.width, padded,
               (pages.width + per_word - 1) / per_word, padded * UNIT / per_word, window, scale * LOG2E, 0.f, 0.f,
               states, out, nullptr};
  if (softcap != 0.f) call.factor = 1.f, call.inward = scale / softcap, call.outward = softcap * LOG2E;
  pages.wide ? run<true>(call) : run<false>(call);
}

}  // namespace SHOAL_SET
}  // namespace shoal
