// Linear layers over packed weights: how rows and panels are cut into tiles, who computes them, and what is made of the
// sums. Knows caches and threads; must not know registers (tiles.h) or how panels are laid out (pack.cpp).
//
// A row's bits depend on that row alone. Rows are cut into tiles and blocks by their number, but every tile does the
// same for each of its rows, and the inputs are never divided among threads (but for FREE_ORDER, which nobody gets).
#include "free_tiles.h"
#include "ops.h"
#include "threads.h"
#include "tiles.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t SLAB = 4 << 20;            // bytes of rows that are multiplied at a time: bounds the memory of a call
constexpr int64_t L2_ROWS = 512 << 10;      // bytes of activations that stay in the second cache while panels pass
constexpr int64_t STRETCH = 32 << 10;       // bytes of a panel that stay in the first cache while tiles of rows pass
constexpr int64_t SERIAL = 48 << 10;        // activations that one thread prepares sooner than two agree to
constexpr int64_t SERIAL_BYTES = 16 << 10;  // the same where they are quantised
constexpr int64_t TINY = 128 << 10;         // products with one row of each tile that are not worth a second thread
constexpr int64_t DIVIDE = 4;               // parts of the last panels' inputs (FREE_ORDER)

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t aligned(int64_t bytes) { return up(bytes, 64) * 64; }

// Where part i begins when n things are cut into parts of nearly the same size.
int64_t cut(int64_t n, int64_t parts, int64_t i) { return i * (n / parts) + (i < n % parts ? i : n % parts); }

// Panels not yet taken. A thread takes a part of what is left, so that one that is held up leaves the rest to others.
struct Queue {
  int64_t next, end;
};

struct Span {
  int64_t begin, end;
};

Span take(Queue &queue, int64_t threads) {
  int64_t begin = __atomic_load_n(&queue.next, __ATOMIC_RELAXED), end;
  do {
    const int64_t left = queue.end - begin;
    if (left <= 0) return {queue.end, queue.end};
    end = begin + (threads == 1 ? left : up(left, 4 * threads));
  } while (!__atomic_compare_exchange_n(&queue.next, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return {begin, end};
}

// A panel (or pair) of a block of rows, or some stretches of it where the inputs are divided (FREE_ORDER).
struct Piece {
  int64_t item;
  Span stretches;
  int64_t place;  // of its sums among those of divided panels; -1: the panel is whole
};

struct Layer {
  Layer(const Weight &weight, const void *x, int64_t rows, const void *residual, float factor, void *y);
  void all();

 private:
  void prepare(int64_t tile, char *spare) const;
  void run(Queue &queue, int64_t threads, char *own) const;
  void panel(int64_t first, int64_t last, int64_t index, Span part, const char *after, int64_t ahead,
             float *sums) const;
  Piece piece(int64_t number) const;
  float *join(const Piece &done, int64_t count) const;
  template <class T>
  void finish(int64_t first, int64_t last, int64_t panel, const float *sums) const;

  int64_t shared_bytes() const { return words_bytes + amounts_bytes + divided_bytes; }
  int64_t own_bytes() const { return sums_bytes + aligned(MOST * steps * WORD); }
  int64_t start(int64_t tile) const { return halves * cut(rows / halves, tiles, tile); }
  uint32_t *words_of(int64_t tile) const { return words + start(tile) * steps + tile * LANES; }
  bool whole() const { return weight.kind == Kind::int8 || weight.kind == Kind::int8_a16; }
  bool quantised() const { return whole() || weight.kind == Kind::int4; }

  const Weight &weight;
  const void *x, *residual;
  void *y;
  float factor;
  bool grouped;                     // an int4 kind
  int64_t halves;                   // rows that one row of x becomes: two with activations of 16 bits
  int64_t rows, tiles, blocks;      // tiles of rows, and blocks of tiles
  int64_t steps;                    // words of a row
  int64_t groups;                   // of the int4 kinds
  int64_t sides, panels, columns;   // panels counts pairs with a gate (sides = 2); columns of y
  int64_t units, stretches;         // what a panel is cut into along the inputs: words, or groups
  int64_t unit_bytes, panel_bytes;
  int64_t words_bytes, amounts_bytes, sums_bytes;
  uint32_t *words;                  // rows in tiles: [steps][rows of the tile], and LANES words to spare after each
  float *amounts;                   // int8 kinds: scale of each row; int4 kinds: by tile [groups][2][rows]
  const TileFunction *tile;
  int64_t divided, parts, divided_bytes;  // the last panels of the last block, each in so many parts (FREE_ORDER)
  float *divided_sums;                    // [divided][parts] sums of a block, and after them:
  int64_t *done_parts;                    // [divided]
};

Layer::Layer(const Weight &weight, const void *x, int64_t rows, const void *residual, float factor, void *y)
    : weight(weight), x(x), residual(residual), y(y), factor(factor), rows(rows) {
  const int64_t k = weight.k;
  halves = weight.kind == Kind::int8_a16 ? 2 : 1;
  this->rows = rows *= halves;
  grouped = weight.kind == Kind::int4 || weight.kind == Kind::int4_a16;
  switch (weight.kind) {
    case Kind::fp32: steps = k; break;
    case Kind::bf16: steps = up(k, 2); break;
    case Kind::int8:
    case Kind::int8_a16: steps = up(k, 4); break;
    case Kind::int4: steps = up(k, 8) * 2; break;
    default: steps = up(k, 8) * 4;
  }
  groups = grouped ? up(k, weight.group) : 0;
  sides = weight.gate == Gate::none ? 1 : 2;
  panels = up(weight.n, PANEL * sides);
  columns = weight.outputs;
  units = grouped ? groups : steps;
  unit_bytes = (grouped ? weight.group / 8 : 1) * PANEL * WORD;
  panel_bytes = (grouped ? up(k, 8) : steps) * PANEL * WORD;
  tiles = up(rows, MOST);
  stretches = up(panel_bytes, STRETCH);
  if (stretches > units) stretches = units;
  const int64_t kept = L2_ROWS / (MOST * steps * WORD);
  blocks = up(tiles, kept < 2 ? 2 : kept);
  words_bytes = aligned((rows * steps + tiles * LANES) * WORD);
  amounts_bytes = aligned(rows * (grouped ? 2 * groups : 1) * 4);
  sums_bytes = aligned(up(tiles, blocks) * MOST * PANEL * 4 * sides);
  tile = TILES[(int)weight.kind];
  parts = stretches < DIVIDE ? stretches : DIVIDE;
  divided = !FREE_ORDER || parts < 2 ? 0 : panels < team_size() ? panels : team_size();
  divided_bytes = divided * parts * sums_bytes + aligned(divided * 8);
}

Piece Layer::piece(int64_t number) const {
  const int64_t whole = blocks * panels - divided, place = number - whole;
  if (place < 0) return {number, {0, stretches}, -1};
  const int64_t part = place % parts;
  return {whole + place / parts, {cut(stretches, parts, part), cut(stretches, parts, part + 1)}, place};
}

// The sums of all parts of a divided panel together, for whoever comes with the last one; for others null.
float *Layer::join(const Piece &done, int64_t count) const {
  const int64_t panel = done.place / parts, floats = sums_bytes / 4;
  if (__atomic_add_fetch(&done_parts[panel], 1, __ATOMIC_ACQ_REL) < parts) return nullptr;
  float *sums = divided_sums + panel * parts * floats;
  for (int64_t i = 1; i < parts; i++) add_sums(sums, sums + i * floats, count, whole());
  return sums;
}

typedef int32_t vi_half __attribute__((vector_size(32)));
typedef int32_t vi_quarter __attribute__((vector_size(16)));
INLINE vi_half lower(vi v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE vi_half upper(vi v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
INLINE vi_quarter lower(vi_half v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
INLINE vi_quarter upper(vi_half v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }

INLINE int32_t largest_of(vi v) {
  const vi_half eight = lower(v) > upper(v) ? lower(v) : upper(v);
  const vi_quarter four = lower(eight) > upper(eight) ? lower(eight) : upper(eight);
  const int32_t a = four[0] > four[1] ? four[0] : four[1], b = four[2] > four[3] ? four[2] : four[3];
  return a > b ? a : b;
}

INLINE int32_t sum_of(vi v) {
  const vi_half eight = lower(v) + upper(v);
  const vi_quarter four = lower(eight) + upper(eight);
  return four[0] + four[1] + four[2] + four[3];
}

// Numbers as whole multiples of a scale, of which the largest is `levels`.
struct Rounded {
  Rounded(const uint16_t *x, int64_t count, float levels) : x(x), whole(count / LANES * LANES) {
    if (whole < count) __builtin_memcpy(rest, x + whole, (count - whole) * 2);
    vi top = {};
    for (int64_t i = 0; i < count; i += LANES) {
      const vi bits = (vi)absolute(load(i < whole ? x + i : rest));  // as integers, NaN is the largest
      top = bits > top ? bits : top;
    }
    const int32_t most = largest_of(top);
    float largest;
    __builtin_memcpy(&largest, &most, 4);
    finite = most < 0x7f800000;
    const bool zero = largest < 1e-30f;
    by = finite && !zero ? levels / largest : 0.f;
    scale = zero ? 0.f : largest / levels;
  }
  inline vi at(int64_t i) const {
    const vf v = load(i < whole ? x + i : rest) * by + 12582912.f;  // whose last bits are the nearest whole number
    return finite ? (vi)v - 0x4b400000 : (vi){};
  }
  const uint16_t *x;
  int64_t whole;
  uint16_t rest[LANES] = {};
  bool finite;
  float by, scale;  // the scale is not finite where a number is not
};

INLINE void store_bytes(uint8_t *out, vi v) {
  typedef int8_t bytes __attribute__((vector_size(16)));
  const bytes b = __builtin_convertvector(v, bytes);
  __builtin_memcpy(out, &b, 16);
}

// Rounds `count` numbers to 127ths of their largest and flips bits of each. Returns the scale, and adds up the
// multiples. Writes whole sixteens.
float quantise(const uint16_t *x, int64_t count, uint32_t flip, uint8_t *out, float *total) {
  const Rounded numbers(x, count, 127.f);
  vi sums = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const vi q = numbers.at(i);
    sums += q;
    store_bytes(out + i, q ^ (int32_t)flip);
  }
  *total = (float)sum_of(sums);
  return numbers.scale;
}

// Rounds numbers to 32512ths (127 * 256): 256 times a byte of one row and a byte of the next, both stored 128 too high.
float quantise_halves(const uint16_t *x, int64_t count, uint8_t *out, int64_t row_bytes) {
  const Rounded numbers(x, count, 32512.f);
  for (int64_t i = 0; i < count; i += LANES) store_bytes(out + i, ((numbers.at(i) + 128) >> 8) ^ 128);
  for (int64_t i = 0; i < count; i += LANES) {  // afterwards: the first row's last sixteen may reach into this one
    const vi q = numbers.at(i);
    store_bytes(out + row_bytes + i, (q - ((q + 128) >> 8) * 256) ^ 128);
  }
  return numbers.scale;
}

float sum_of(const uint16_t *x, int64_t count) {
  vf total = {};
  for (int64_t i = 0; i < count; i += LANES) {
    uint16_t rest[LANES] = {};
    const bool whole = i + LANES <= count;
    if (!whole) __builtin_memcpy(rest, x + i, (count - i) * 2);
    total += load(whole ? x + i : rest);
  }
  return sum(total);
}

// Puts the rows of a tile into words, by step.
void Layer::prepare(int64_t tile, char *spare) const {
  const int64_t first = start(tile), count = start(tile + 1) - first, k = weight.k;
  const int64_t size = weight.kind == Kind::fp32 ? 4 : 2, row_bytes = steps * WORD;
  const char *from = (const char *)x + first / halves * k * size;
  float *amount = amounts + first * 2 * groups;
  if (!quantised()) interleave(from, k * size, k * size, count, steps, words_of(tile));
  for (int64_t r = 0; r < count; r += halves) {
    const uint16_t *row = (const uint16_t *)(from + r / halves * k * size);
    uint8_t *out = (uint8_t *)spare + r * row_bytes;
    if (weight.kind == Kind::int8) {
      float total;
      amounts[first + r] = quantise(row, k, 128, out, &total);
    }
    if (weight.kind == Kind::int8_a16) amounts[first + r] = quantise_halves(row, k, out, row_bytes);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = g * weight.group, length = k - at < weight.group ? k - at : weight.group;
      float *scale = amount + g * 2 * count + r, *total = scale + count;
      if (weight.kind == Kind::int4) {
        *scale = quantise(row + at, length, 0, out + at, total);
      } else {
        *scale = 1.f;
        *total = sum_of(row + at, length);
      }
    }
  }
  if (quantised()) interleave(spare, row_bytes, k, count, steps, words_of(tile));
}

INLINE vf sigmoid(vf v) {
  const vf e = exponential((vf)((vu)v | 0x80000000u));
  return (v < 0 ? e : splat(1.f)) / (e + 1.f);
}

INLINE vf activate(Gate gate, vf v) {
  if (gate == Gate::silu) return v * sigmoid(v);
  // gelu: v / 2 * (1 + tanh(u)) is v * sigmoid(2u)
  return v * sigmoid(v * fma(v * v, splat(2 * 0.044715f * 0.7978845608f), splat(2 * 0.7978845608f)));
}

// What the outputs of a panel have in common: 0 and 1 are the halves of the panel, 2 and 3 those of its pair.
struct Outputs {
  Outputs(const Weight &weight, int64_t n, int64_t count, bool whole, bool halved)
      : whole(whole), halved(halved), biased(weight.bias) {
    for (int64_t i = 0; i < count; i++, n += LANES) {
      if (whole) {  // activations were stored 128 too high
        excess[i] = __builtin_convertvector(load((const float *)weight.zero + n), vi) << 7;
        scale[i] = load((const float *)weight.scale + n);
      }
      bias[i] = biased ? load(weight.bias + n) : (vf){};
    }
  }
  inline vf value(const float *sums, float row_scale, int64_t i) const {
    vf v = load(sums);
    if (whole) {
      v = __builtin_convertvector((vi)v - excess[i], vf);
      if (halved) v = v * 256.f + __builtin_convertvector((vi)load(sums + PANEL) - excess[i], vf);
      v = v * (scale[i] * row_scale);
    }
    return biased ? v + bias[i] : v;
  }
  vi excess[4];
  vf scale[4], bias[4];
  bool whole, halved, biased;
};

// Writes a panel's columns of y for the tiles first to last.
template <class T>
void Layer::finish(int64_t first, int64_t last, int64_t panel, const float *sums) const {
  const int64_t begin = start(first), end = start(last), column = panel * PANEL;
  const float *others = sums + (end - begin) * PANEL;
  const Outputs outputs(weight, column * sides, 2 * sides, whole(), halves == 2);
  for (int64_t r = begin; r < end; r += halves, sums += halves * PANEL, others += halves * PANEL) {
    const float row_scale = outputs.whole ? amounts[r] : 1.f;
    for (int64_t half = 0; half < 2; half++) {
      const int64_t at = half * LANES, count = columns - column - at;
      vf v = outputs.value(sums + at, row_scale, half);
      v = sides == 2 ? activate(weight.gate, v) * outputs.value(others + at, row_scale, 2 + half) : v * factor;
      const int64_t place = r / halves * columns + column + at;
      T *to = (T *)y + place;
      const T *also = residual ? (const T *)residual + place : nullptr;
      if (count >= LANES) {
        store(to, also ? v + load(also) : v);
      } else if (count > 0) {
        T part[LANES] = {};
        if (also) __builtin_memcpy(part, also, count * sizeof(T));
        store(part, also ? v + load(part) : v);
        __builtin_memcpy(to, part, count * sizeof(T));
      }
    }
  }
}

// The sums of one panel (not a pair) for the tiles first to last. Meanwhile, what comes after it is fetched: weights
// from `after` on, and the rows `ahead` tiles further.
void Layer::panel(int64_t first, int64_t last, int64_t index, Span part, const char *after, int64_t ahead,
                  float *sums) const {
  const char *base = (const char *)weight.panels + index * panel_bytes;
  const int64_t begin = start(first);
  for (int64_t s = part.begin; s < part.end; s++) {
    const int64_t from = cut(units, stretches, s), to = cut(units, stretches, s + 1);
    Stretch t;
    t.panel = base + from * unit_bytes;
    t.steps = to - from;
    t.fresh = s == part.begin;
    t.next = s + 1 < part.end ? base + to * unit_bytes : after;
    t.pace = up(128, last - first);
    if (grouped) {
      t.scale = (const uint16_t *)weight.scale + (index * groups + from) * PANEL;
      t.zero = (const uint8_t *)weight.zero + (index * groups + from) * PANEL;
      t.after = groups * PANEL;
      t.group = weight.group / 8;
      t.last = to == groups ? up(weight.k, 8) - (groups - 1) * t.group : t.group;
    }
    for (int64_t i = first; i < last; i++) {
      const int64_t row = start(i), count = start(i + 1) - row;
      t.x = words_of(i) + from * (grouped ? weight.group * steps / (up(weight.k, 8) * 8) : 1) * count;
      t.then = s + 1 < part.end ? t.x + t.steps * count : words_of(i + ahead);
      t.sums = sums + (row - begin) * PANEL;
      if (grouped) t.amounts = amounts + row * 2 * groups + from * 2 * count;
      (FREE_ORDER ? free_tile(tile, count) : tile[count - 1])(t);
      t.next += t.steps * (grouped ? t.group : 1) * t.pace;
    }
  }
}

// Items are panels (or pairs) of a block of rows; those of one block follow each other.
void Layer::run(Queue &queue, int64_t threads, char *own) const {
  float *sums = (float *)own;
  const char *base = (const char *)weight.panels;
  Span span = take(queue, threads);
  while (span.begin < span.end) {
    Span then = span;
    for (int64_t number = span.begin; number < span.end; number++) {
      if (number + 1 == span.end) then = take(queue, threads);
      const Piece now = piece(number);
      const Piece coming = piece(number + 1 < span.end ? number + 1 : then.begin < then.end ? then.begin : number);
      const int64_t following = coming.item, item = now.item, block = item / panels, at = item % panels;
      const int64_t first = cut(tiles, blocks, block), last = cut(tiles, blocks, block + 1);
      const int64_t count = start(last) - start(first);
      const int64_t ahead = following / panels != block && last < tiles ? last - first : 0;
      float *out = now.place < 0 ? sums : divided_sums + now.place * (sums_bytes / 4);
      for (int64_t side = 0; side < sides; side++) {
        const int64_t index = at * sides + side, start = side + 1 < sides ? now.stretches.begin : coming.stretches.begin;
        const int64_t next = side + 1 < sides ? index + 1 : following % panels * sides;
        const char *after = base + next * panel_bytes + cut(units, stretches, start) * unit_bytes;
        panel(first, last, index, now.stretches, after, ahead, out + side * count * PANEL);
      }
      if (now.place >= 0 && !(out = join(now, count * sides * PANEL))) continue;
      if (weight.kind == Kind::fp32 || weight.wide) finish<float>(first, last, at, out);
      else finish<uint16_t>(first, last, at, out);
    }
    span = then;
  }
}

void Layer::all() {
  char *memory = (char *)scratch(shared_bytes() + own_bytes());
  words = (uint32_t *)memory;
  amounts = (float *)(memory + words_bytes);
  divided_sums = (float *)(memory + words_bytes + amounts_bytes);
  done_parts = (int64_t *)(divided_sums + divided * parts * (sums_bytes / 4));
  for (int64_t i = 0; i < divided; i++) done_parts[i] = 0;
  const bool serial = tiles == 1 || rows * weight.k <= (quantised() ? SERIAL_BYTES : SERIAL);
  const bool tiny = tiles * weight.n * weight.k <= TINY;
  if (serial)
    for (int64_t t = 0; t < tiles; t++) prepare(t, memory + shared_bytes() + sums_bytes);
  Queue queue = {0, blocks * panels - divided + divided * parts};
  // The others have a memory of their own, and this thread's has the shared part before it.
  const auto own = [&](bool here) { return here ? memory + shared_bytes() : (char *)scratch(own_bytes()); };
  if (!serial) {
    int64_t next = 0;
    together(true, [&](bool here) {
      char *spare = own(here) + sums_bytes;
      for (int64_t t; (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tiles;) prepare(t, spare);
    });
  }
  together(!tiny, [&](bool here) { run(queue, tiny ? 1 : team_size(), own(here)); });
}

}  // namespace

void apply_gate(const Weight &weight, const float *sums, int64_t rows, void *y) {
  const int64_t columns = weight.outputs, panels = weight.n / (2 * PANEL);
  for_each(rows * panels, rows * weight.n > 65536, [&](int64_t item) {
    const int64_t row = item / panels, panel = item % panels;
    const float *from = sums + row * weight.n + panel * 2 * PANEL;
    for (int64_t at = 0; at < PANEL; at += LANES) {
      const vf v = activate(weight.gate, load(from + at)) * load(from + PANEL + at);
      const int64_t column = panel * PANEL + at, count = columns - column < LANES ? columns - column : LANES;
      if (count <= 0) break;
      float wide[LANES];
      uint16_t narrow[LANES];
      store(wide, v), store(narrow, v);
      if (weight.kind == Kind::fp32) __builtin_memcpy((float *)y + row * columns + column, wide, count * 4);
      else __builtin_memcpy((uint16_t *)y + row * columns + column, narrow, count * 2);
    }
  });
}

void linear(const Weight &weight, const void *x, int64_t rows, const void *residual, float factor, void *y) {
  const int64_t in = weight.k * (weight.kind == Kind::fp32 ? 4 : 2);
  const int64_t out = weight.outputs * (weight.kind == Kind::fp32 || weight.wide ? 4 : 2);
  const int64_t slabs = up(rows * in, SLAB);
  for (int64_t i = 0; i < slabs; i++) {
    const int64_t from = cut(rows, slabs, i), count = cut(rows, slabs, i + 1) - from;
    const void *also = residual ? (const char *)residual + from * out : nullptr;
    if (count > 0) Layer(weight, (const char *)x + from * in, count, also, factor, (char *)y + from * out).all();
  }
}

}  // namespace SHOAL_SET
}  // namespace shoal
