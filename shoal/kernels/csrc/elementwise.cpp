// What is computed number by number or row by row: norms, residual sums, masks and each row's largest number.
// Knows rows of float or bf16; must not know what they mean. Every sum over a row is folded in an order that depends on
// the number of columns alone, and the last numbers of a row go through the same instructions as the others, padded.
#include "ops.h"
#include "threads.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t WORTH = 65536;  // numbers below which waking another thread costs more than it saves
constexpr int64_t CHAINS = 4;     // independent vectors of a reduction, so that it need not wait for itself

// The first `count` < LANES numbers of p, then `rest`. Memory beyond them is not touched.
template <class T>
INLINE vf load_some(const T *p, int64_t count, float rest) {
  float lane[LANES];
  for (int64_t i = 0; i < LANES; i++) lane[i] = i < count ? load_one(p + i) : rest;
  return load(lane);
}

template <class T>
INLINE void store_some(T *p, vf v, int64_t count) {
  T lane[LANES];
  store(lane, v);
  for (int64_t i = 0; i < count; i++) p[i] = lane[i];
}

// The sum of what `add` makes of every number: number i goes to lane i of CHAINS * LANES, lanes are folded by halves.
// `rest` stands where a row ends inside a vector: `add` adds nothing for it.
template <class T, class Add>
INLINE float sum_of(const T *x, int64_t columns, float rest, Add add) {
  vf chain[CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * LANES <= columns; i += CHAINS * LANES)
#pragma GCC unroll 4
    for (int64_t c = 0; c < CHAINS; c++) chain[c] = add(chain[c], load(x + i + c * LANES));
#pragma GCC unroll 4
  for (int64_t c = 0; c < CHAINS; c++, i += LANES)
    if (i < columns) chain[c] = add(chain[c], i + LANES <= columns ? load(x + i) : load_some(x + i, columns - i, rest));
  return sum((chain[0] + chain[2]) + (chain[1] + chain[3]));
}

template <class T>
INLINE float sum_of_squares(const T *x, int64_t columns) {
  return sum_of(x, columns, 0, [](vf total, vf v) __attribute__((always_inline)) { return fma(v, v, total); });
}

template <class T>
void norm_rows(const T *x, const float *weight, T *y, int64_t rows, int64_t columns, float eps) {
  const int64_t whole = columns - columns % LANES;
  for_each(rows, rows * columns > WORTH, [&](int64_t row) {
    const T *from = x + row * columns;
    T *to = y + row * columns;
    const vf scale = splat(1.0f / __builtin_sqrtf(sum_of_squares(from, columns) / (float)columns + eps));
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
    if (const int64_t rest = columns - whole)
      store_some(to + whole, load_some(from + whole, rest, 0) * scale * load_some(weight + whole, rest, 0), rest);
  });
}

template <class T>
void layer_norm_rows(const T *x, const float *weight, const float *bias, T *y, int64_t rows, int64_t columns, float eps) {
  const int64_t whole = columns - columns % LANES, rest = columns - whole;
  for_each(rows, rows * columns > WORTH, [&](int64_t row) {
    const T *from = x + row * columns;
    T *to = y + row * columns;
    const float mean =
        sum_of(from, columns, 0, [](vf total, vf v) __attribute__((always_inline)) { return total + v; }) /
        (float)columns;
    const vf middle = splat(mean);
    const float squares = sum_of(from, columns, mean, [&](vf total, vf v) __attribute__((always_inline)) {
      return fma(v - middle, v - middle, total);
    });
    const vf scale = splat(1.0f / __builtin_sqrtf(squares / (float)columns + eps));
    for (int64_t i = 0; i < whole; i += LANES)
      store(to + i, fma((load(from + i) - middle) * scale, load(weight + i), load(bias + i)));
    if (rest) {
      const vf v = (load_some(from + whole, rest, 0) - middle) * scale;
      store_some(to + whole, fma(v, load_some(weight + whole, rest, 0), load_some(bias + whole, rest, 0)), rest);
    }
  });
}

// v times the normal distribution's share below v: the larger of v and 0, less |v| / 2 * erfc(|v| / sqrt(2)), where
// nothing cancels. erfc is Abramowitz and Stegun's 7.1.26: to 1.5e-7 of 1.
INLINE vf gelu_of(vf v) {
  const vf x = absolute(v);
  const vf t = 1.0f / fma(x, splat(0.3275911f * 0.70710678f), splat(1.f));
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  return larger(v, splat(0.f)) - (0.5f * x * t) * (p * exponential(x * x * -0.5f));
}

template <class T>
void gelu_all(const T *x, T *y, int64_t count) {
  const int64_t vectors = count / LANES, rest = count % LANES;
  for_each(vectors, count > WORTH, [&](int64_t v) { store(y + v * LANES, gelu_of(load(x + v * LANES))); });
  if (const int64_t i = vectors * LANES; rest) store_some(y + i, gelu_of(load_some(x + i, rest, 0)), rest);
}

template <class T>
void add_all(const T *x, const T *branch, float factor, T *y, int64_t count) {
  const vf times = splat(factor);
  const int64_t vectors = count / LANES, rest = count % LANES;
  for_each(vectors, count > WORTH, [&](int64_t v) {
    const int64_t i = v * LANES;
    store(y + i, fma(load(branch + i), times, load(x + i)));
  });
  if (const int64_t i = vectors * LANES; rest)
    store_some(y + i, fma(load_some(branch + i, rest, 0), times, load_some(x + i, rest, 0)), rest);
}

INLINE part load_register(const float *p) {
  part v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The largest number of `count`, or a NaN if there is one. Works on single registers: this is read at memory speed.
INLINE float block_largest(const float *x, int64_t count) {
  constexpr int64_t STEP = LANES / PARTS;
  part best[CHAINS];
  part_bits odd[CHAINS] = {};  // lanes that have seen a NaN
#pragma GCC unroll 4
  for (int64_t c = 0; c < CHAINS; c++) best[c] = -__builtin_inff() - (part){};
  int64_t i = 0;
  for (; i + CHAINS * STEP <= count; i += CHAINS * STEP)
#pragma GCC unroll 4
    for (int64_t c = 0; c < CHAINS; c++) {
      const part v = load_register(x + i + c * STEP);
      best[c] = v > best[c] ? v : best[c];
      odd[c] |= v != v;
    }
  float lane[CHAINS * STEP], top = -__builtin_inff();
  int32_t odd_lane[CHAINS * STEP], nan = 0;
  __builtin_memcpy(lane, best, sizeof lane), __builtin_memcpy(odd_lane, odd, sizeof odd_lane);
  for (int64_t j = 0; j < CHAINS * STEP; j++) nan |= odd_lane[j], top = lane[j] > top ? lane[j] : top;
  for (; i < count; i++) nan |= x[i] != x[i], top = x[i] > top ? x[i] : top;
  return nan ? __builtin_nanf("") : top;
}

// Walks blocks that stay in the first cache, so that only the block of the largest number is read twice.
INLINE int64_t row_largest(const float *x, int64_t columns) {
  constexpr int64_t BLOCK = 2048;
  int64_t where = 0;
  float best = -__builtin_inff();
  for (int64_t i = 0; i < columns; i += BLOCK) {
    const float found = block_largest(x + i, columns - i < BLOCK ? columns - i : BLOCK);
    if (found > best || found != found) where = i, best = found;
    if (found != found) break;
  }
  int64_t i = where;
  if (best != best)
    while (x[i] == x[i]) i++;
  else
    while (x[i] != best) i++;
  return i;
}

}  // namespace

void rms_norm(const void *x, const float *weight, void *y, int64_t rows, int64_t columns, float eps, bool wide) {
  if (wide)
    norm_rows((const float *)x, weight, (float *)y, rows, columns, eps);
  else
    norm_rows((const bf16 *)x, weight, (bf16 *)y, rows, columns, eps);
}

void layer_norm(const void *x, const float *weight, const float *bias, void *y, int64_t rows, int64_t columns, float eps,
                bool wide) {
  if (wide)
    layer_norm_rows((const float *)x, weight, bias, (float *)y, rows, columns, eps);
  else
    layer_norm_rows((const bf16 *)x, weight, bias, (bf16 *)y, rows, columns, eps);
}

void gelu(const void *x, void *y, int64_t count, bool wide) {
  if (wide)
    gelu_all((const float *)x, (float *)y, count);
  else
    gelu_all((const bf16 *)x, (bf16 *)y, count);
}

void gather(const void *x, int64_t count, int64_t bytes, const int64_t *index, int64_t rows, void *y) {
  for_each(rows, rows * bytes > 1 << 18, [&](int64_t r) {
    const int64_t row = index[r] < 0 ? 0 : index[r] < count ? index[r] : count - 1;
    __builtin_memcpy((char *)y + r * bytes, (const char *)x + row * bytes, bytes);
  });
}

void add(const void *x, const void *branch, float factor, void *y, int64_t count, bool wide) {
  if (wide)
    add_all((const float *)x, (const float *)branch, factor, (float *)y, count);
  else
    add_all((const bf16 *)x, (const bf16 *)branch, factor, (bf16 *)y, count);
}

void forbid(float *x, int64_t columns, const int64_t *row, const uint32_t *bits, int64_t count) {
  const int64_t words = (columns + 31) / 32;
  for_each(count, count * columns > 1 << 16, [&](int64_t k) {
    for (int64_t w = 0; w < words; w++) {
      const uint32_t allowed = bits[k * words + w];
      float *const y = x + row[k] * columns + w * 32;
      const int64_t here = columns - w * 32 < 32 ? columns - w * 32 : 32;
      if (allowed == ~0u) continue;
      if (here == 32)
        for (int i = 0; i < 32; i++) y[i] = allowed >> i & 1 ? y[i] : -__builtin_inff();
      else
        for (int i = 0; i < here; i++) y[i] = allowed >> i & 1 ? y[i] : -__builtin_inff();
    }
  });
}

void largest(const float *x, int64_t *index, float *value, int64_t rows, int64_t columns) {
  for_each(rows, rows * columns > WORTH, [&](int64_t row) {
    index[row] = row_largest(x + row * columns, columns);
    value[row] = x[row * columns + index[row]];
  });
}

}  // namespace SHOAL_SET
}  // namespace shoal
