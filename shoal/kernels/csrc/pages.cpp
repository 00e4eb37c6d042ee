// Puts new keys and values into the pages and moves them between pages. Knows how pages are laid out and what is done
// to a head before it is stored; must not know sequences or who reads the pages.
//
// Per (page, head) there is a block of page_size * E numbers for keys and one for values, E being the width rounded up
// to 32; all blocks of a head, in the order of the pages, come before those of the next. A block is made of units of 16
// positions, each laid out as the multiplications of attention.cpp want it:
//
//   keys    bf16 [E / 2][16 positions][2]         fp32 [E][16 positions]
//   values  bf16 [E / 32][8 pairs of positions][32][2]   fp32 [E / 32][16 positions][32]
//
// In int8, numbers lie as in bf16, and before those of a unit are its positions' scales, float [16]. A head is rounded
// to 127ths of its largest number, keys after they are mixed (units.h). Where a key or a value is not finite the key's scale is NaN, so that whoever sees the
// position gets a NaN; such a value is all zeros, as those who do not see the position multiply it by 0.
//
// Keys beyond the width are zeros. Values beyond it are whatever they are, and end in numbers that nobody reads.
#include "ops.h"
#include "threads.h"
#include "units.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers

template <class T>
constexpr int64_t PAIRED = sizeof(T) == 4 ? 1 : 2;  // numbers that are multiplied together

// The order is that of `sum`, which goes through memory.
INLINE float sum_of(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

// 1 / sqrt(mean(x^2) + eps): squares are added by lane, then the lanes, then what is left, all in order.
template <class T>
float inverse_root(const T *x, int64_t count, float eps) {
  vf squares = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const vf v = load(x + i);
    squares = fma(v, v, squares);
  }
  float total = sum_of(squares);
  for (; i < count; i++) total += load_one(x + i) * load_one(x + i);
  return 1.f / __builtin_sqrtf(total / (float)count + eps);
}

template <class T>
void scale(T *x, int64_t count, float factor, const float *weight) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) * factor * load(weight + i));
  for (; i < count; i++) store_one(x + i, load_one(x + i) * factor * weight[i]);
}

template <class T>
void rotate(T *x, int64_t rotated, const float *cosine, const float *sine) {
  T *y = x + rotated;
  int64_t i = 0;
  for (; i + LANES <= rotated; i += LANES) {
    const vf a = load(x + i), b = load(y + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, a * c - b * s);
    store(y + i, b * c + a * s);
  }
  for (; i < rotated; i++) {
    const float a = load_one(x + i), b = load_one(y + i), c = cosine[i], s = sine[i];
    store_one(x + i, a * c - b * s);
    store_one(y + i, b * c + a * s);
  }
}

template <class T>
void prepare(T *x, int64_t heads, int64_t width, const Kernels::Heads &how, const float *norm, int64_t position) {
  if (norm && how.whole) scale(x, heads * width, inverse_root(x, heads * width, how.eps), norm);
  for (int64_t h = 0; h < heads; h++, x += width) {
    if (norm && !how.whole) scale(x, width, inverse_root(x, width, how.eps), norm);
    if (how.cosine) rotate(x, how.rotated, how.cosine + position * how.rotated, how.sine + position * how.rotated);
  }
}

// One head's key at lane `lane` of a unit.
template <class T>
void store_key(const T *x, T *unit, int64_t lane, int64_t width, int64_t padded) {
  constexpr int64_t N = PAIRED<T>;
  unit += lane * N;
  int64_t i = 0;
  for (; i + N <= width; i += N, unit += UNIT * N) __builtin_memcpy(unit, x + i, N * sizeof(T));
  for (; i < padded; i += N, unit += UNIT * N)
    for (int64_t j = 0; j < N; j++) unit[j] = i + j < width ? x[i + j] : (T)0;
}

template <class T>
void store_value(const T *x, T *unit, int64_t lane, int64_t width) {
  constexpr int64_t N = PAIRED<T>;
  unit += lane / N * PANEL * N + lane % N;
  for (int64_t from = 0; from < width; from += PANEL, unit += UNIT * PANEL) {
    const int64_t count = width - from < PANEL ? width - from : PANEL;
    for (int64_t i = 0; i < count; i++) unit[i * N] = x[from + i];
  }
}

// One head's key and value at lane `lane` of units.
template <class T>
void store_head(const T *key, const T *value, char *keys, char *values, int64_t lane, const Pages &pages) {
  store_key(key, (T *)keys, lane, pages.width, padded_width(pages));
  store_value(value, (T *)values, lane, pages.width);
}

void store_rounded(const bf16 *key, const bf16 *value, char *keys, char *values, int64_t lane, const Pages &pages) {
  float wide[WIDEST];
  int8_t numbers[WIDEST], more[WIDEST];
  widen(key, pages.width, wide), mix_runs(wide, pages.width);
  float key_scale = quantise(wide, pages.width, 127.f, numbers);
  widen(value, pages.width, wide);
  float value_scale = quantise(wide, pages.width, 127.f, more);
  if (value_scale != value_scale) key_scale = value_scale, value_scale = 0.f;
  __builtin_memcpy(keys + lane * 4, &key_scale, 4), __builtin_memcpy(values + lane * 4, &value_scale, 4);
  const int64_t head = head_bytes(Kind::int8);
  store_head(numbers, more, keys + head, values + head, lane, pages);
}

template <class T>
void place_all(T *qkv, const Kernels::Heads &how, const Pages &pages, const int64_t *position, const int64_t *slot,
               int64_t tokens) {
  const int64_t width = pages.width, heads = pages.kv_heads, row = (how.query_heads + 2 * heads) * width;
  const int64_t unit = unit_bytes(pages);
  for_each(tokens, tokens * row > WORTH_THREADS, [&](int64_t t) {
    T *query = qkv + t * row, *key = query + how.query_heads * width, *value = key + heads * width;
    prepare(query, how.query_heads, width, how, how.query_norm, position[t]);
    prepare(key, heads, width, how, how.key_norm, position[t]);
    const int64_t page = slot[t] / pages.page_size, offset = slot[t] % pages.page_size, lane = offset % UNIT;
    for (int64_t h = 0; h < heads; h++, key += width, value += width) {
      const int64_t at = block_at(pages, page, h) + offset / UNIT * unit;
      char *const keys = (char *)pages.keys + at, *const values = (char *)pages.values + at;
      if constexpr (sizeof(T) == sizeof(bf16)) {
        if (pages.kind == Kind::int8) {
          store_rounded(key, value, keys, values, lane, pages);
          continue;
        }
      }
      store_head(key, value, keys, values, lane, pages);
    }
  });
}

// The first `count` positions of a unit of keys.
template <class T>
void copy_keys(const T *from, T *to, int64_t count, int64_t padded) {
  constexpr int64_t N = PAIRED<T>;
  for (int64_t i = 0; i < padded / N; i++, from += UNIT * N, to += UNIT * N)
    __builtin_memcpy(to, from, count * N * sizeof(T));
}

template <class T>
void copy_values(const T *from, T *to, int64_t count, int64_t padded) {
  constexpr int64_t N = PAIRED<T>;
  for (int64_t panel = 0; panel < padded; panel += PANEL, from += UNIT * PANEL, to += UNIT * PANEL) {
    const int64_t whole = count / N * PANEL * N;
    __builtin_memcpy(to, from, whole * sizeof(T));
    if (count % N)
      for (int64_t i = 0; i < PANEL; i++) to[whole + i * N] = from[whole + i * N];
  }
}

template <class T>
void move_all(const Pages &pages, const int64_t *moves, int64_t count) {
  const int64_t padded = padded_width(pages), unit = unit_bytes(pages), head = head_bytes(pages.kind);
  char *const keys = (char *)pages.keys, *const values = (char *)pages.values;
  for_each(pages.kv_heads, count * pages.page_size * padded * pages.kv_heads > WORTH_THREADS, [&](int64_t h) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t from = block_at(pages, moves[3 * i], h), tokens = moves[3 * i + 2];
      const int64_t to = block_at(pages, moves[3 * i + 1], h);
      if (from == to) continue;
      const int64_t whole = tokens / UNIT * unit, rest = tokens % UNIT;
      __builtin_memcpy(keys + to, keys + from, whole);
      __builtin_memcpy(values + to, values + from, whole);
      if (!rest) continue;
      const int64_t last = from + whole, end = to + whole, scales = head ? rest * 4 : 0;
      __builtin_memcpy(keys + end, keys + last, scales);
      __builtin_memcpy(values + end, values + last, scales);
      copy_keys((const T *)(keys + last + head), (T *)(keys + end + head), rest, padded);
      copy_values((const T *)(values + last + head), (T *)(values + end + head), rest, padded);
    }
  });
}

}  // namespace

void place(void *qkv, const Kernels::Heads &how, const Pages &pages, const int64_t *position, const int64_t *slot,
           int64_t tokens) {
  if (pages.kind == Kind::fp32) return place_all((float *)qkv, how, pages, position, slot, tokens);
  place_all((bf16 *)qkv, how, pages, position, slot, tokens);
}

void move(const Pages &pages, const int64_t *moves, int64_t count) {
  if (pages.kind == Kind::fp32) return move_all<float>(pages, moves, count);
  pages.kind == Kind::int8 ? move_all<int8_t>(pages, moves, count) : move_all<bf16>(pages, moves, count);
}

}  // namespace SHOAL_SET
}  // namespace shoal
