// What adapters add to the outputs of linear layers: two narrow products for the rows of each adapter, and their sum
// with what the layer gave. Knows which rows are whose; must not know how a product is computed (linear.cpp does).
//
// A row's bits depend on that row and its adapter alone: rows and outputs are cut into pieces by their number, but the
// products give each row the same bits in any company, and everything else is done number by number.
#include <cstdlib>

#include "ops.h"
#include "rows.h"
#include "threads.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t PIECE = 48;      // rows that go through a product together
constexpr int64_t STRIP = 256;     // outputs of a second product that are added at a time: they stay in a cache
constexpr int64_t SLAB = 8 << 20;  // bytes of a gated layer's sums at a time: they stay in the third cache

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of this thread beside `scratch`, which the products use: 0 for what all threads of a call read, 1 for its own.
char *own_memory(int which, int64_t bytes) {
  static thread_local char *memory[2] = {};
  static thread_local int64_t size[2] = {};
  if (bytes > size[which]) {
    free(memory[which]);
    size[which] = up(bytes, 4096) * 4096;
    memory[which] = (char *)aligned_alloc(4096, size[which]);
    if (!memory[which]) abort();  // as in `scratch`
  }
  return memory[which];
}

// One call, or the part of it that belongs to rows begin <= r < end of x and y.
struct Work {
  const Delta *deltas;
  const Adapted &rows;
  const void *x;
  void *y;
  int64_t columns;  // of y
  bool wide;        // y is float
  float factor;
  int64_t begin, end;
  int64_t piece;
};

// Rows from[0 : count] of one adapter.
struct Piece {
  const Delta *delta;
  const int64_t *from;
  int64_t count, place;  // place: rows of earlier pieces
};

// The first of row[from : to] that is not below `bound`; rows of an adapter ascend.
int64_t first_from(const int64_t *row, int64_t from, int64_t to, int64_t bound) {
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    row[middle] < bound ? from = middle + 1 : to = middle;
  }
  return from;
}

// Calls body(piece) for each piece of rows whose adapter adds anything; `body` says whether to go on.
template <class Body>
void for_pieces(const Work &work, const Body &body) {
  int64_t place = 0;
  for (int64_t g = 0; g < work.rows.groups; g++) {
    const Delta &delta = work.deltas[work.rows.adapter[g]];
    if (!delta.num_ups) continue;
    const int64_t stop = first_from(work.rows.row, work.rows.start[g], work.rows.start[g + 1], work.end);
    int64_t at = first_from(work.rows.row, work.rows.start[g], stop, work.begin);
    for (int64_t count; at < stop; at += count, place += count) {
      count = least(work.piece, stop - at);
      if (!body(Piece{&delta, work.rows.row + at, count, place})) return;
    }
  }
}

int64_t size_of(const Delta &delta) { return delta.down.kind == Kind::fp32 ? 4 : 2; }

// The first product of a piece, one block for each `up`: [rows][numbers that it reads].
void narrow_down(const Work &work, const Piece &piece, char *out) {
  const Delta &delta = *piece.delta;
  const int64_t size = size_of(delta), row_bytes = delta.down.k * size, hidden = delta.down.outputs;
  const int64_t in_bytes = up(piece.count * row_bytes, 64) * 64;
  const bool whole = delta.num_ups == 1 && delta.ups[0].weight.k == hidden;
  char *in = own_memory(1, in_bytes + piece.count * hidden * size), *all = whole ? out : in + in_bytes;
  for (int64_t r = 0; r < piece.count; r++)
    __builtin_memcpy(in + r * row_bytes, (const char *)work.x + piece.from[r] * row_bytes, row_bytes);
  linear(delta.down, in, piece.count, nullptr, 1.f, all);
  for (int64_t i = 0; i < delta.num_ups && !whole; i++) {
    const Delta::Up &part = delta.ups[i];
    for (int64_t r = 0; r < piece.count; r++, out += part.weight.k * size)
      __builtin_memcpy(out, all + (r * hidden + part.begin) * size, part.weight.k * size);
  }
}

template <class Y>
INLINE void add_some(Y *to, const float *from, int64_t count) {
  if (count >= LANES) {
    store(to, load(to) + load(from));
    return;
  }
  Y part[LANES] = {};
  float also[LANES] = {};
  __builtin_memcpy(part, to, count * sizeof(Y));
  __builtin_memcpy(also, from, count * 4);
  store(part, load(part) + load(also));
  __builtin_memcpy(to, part, count * sizeof(Y));
}

// Adds `count` floats for each row of a piece to the columns of y where outputs from `first` on belong.
template <class Y>
void add_rows(const Work &work, const Piece &piece, const Delta::Up &part, int64_t first, int64_t count,
              const float *added) {
  for (int64_t r = 0; r < piece.count; r++, added += count) {
    Y *to = (Y *)work.y + (piece.from[r] - work.begin) * work.columns + part.first + first / PANEL * part.stride;
    for (int64_t i = 0; i < count; i += LANES) add_some(to + i / PANEL * part.stride + i % PANEL, added + i, count - i);
  }
}

// The second product of a piece for outputs first to first + STRIP of one `up`, and the sum.
void widen(const Work &work, const Piece &piece, const Delta::Up &part, const char *narrow, int64_t first) {
  Weight strip = part.weight;
  const int64_t words = part.weight.kind == Kind::fp32 ? part.weight.k : up(part.weight.k, 2);
  strip.panels = (const char *)part.weight.panels + first * words * WORD;
  strip.n = strip.outputs = least(STRIP, part.weight.outputs - first);
  float *added = (float *)own_memory(1, piece.count * STRIP * 4);
  linear(strip, narrow, piece.count, nullptr, part.scale * work.factor, added);
  if (work.wide) add_rows<float>(work, piece, part, first, strip.n, added);
  else add_rows<uint16_t>(work, piece, part, first, strip.n, added);
}

// Brings the weights of second products near while other threads compute the first ones.
void fetch(const Delta &delta) {
  for (int64_t i = 0; i < delta.num_ups; i++) {
    const Weight &weight = delta.ups[i].weight;
    const int64_t words = weight.kind == Kind::fp32 ? weight.k : up(weight.k, 2);
    const char *from = (const char *)weight.panels, *to = from + up(weight.outputs, PANEL) * PANEL * words * WORD;
    for (; from < to; from += 64) __builtin_prefetch(from, 0, 2);
  }
}

void add_all(const Work &work) {
  int64_t pieces = 0, strips = 0, bytes = 0, hidden = 0;
  for_pieces(work, [&](const Piece &piece) {
    int64_t reads = 0;
    for (int64_t i = 0; i < piece.delta->num_ups; i++) {
      strips += up(piece.delta->ups[i].weight.outputs, STRIP);
      reads += piece.delta->ups[i].weight.k * size_of(*piece.delta);
    }
    hidden = reads > hidden ? reads : hidden;
    pieces++, bytes = piece.place + piece.count;
    return true;
  });
  if (!pieces) return;
  char *narrow = own_memory(0, bytes * hidden);
  const int64_t idle = pieces < team_size() ? pieces : 0;  // as many helpers fetch what comes next
  for_each(pieces + idle, true, [&](int64_t item) {
    const bool fetches = item >= pieces;
    if (fetches) item -= pieces;
    for_pieces(work, [&](const Piece &piece) {
      if (item--) return true;
      if (fetches) fetch(*piece.delta);
      else narrow_down(work, piece, narrow + piece.place * hidden);
      return false;
    });
  });
  for_each(strips, true, [&](int64_t item) {
    for_pieces(work, [&](const Piece &piece) {
      const char *from = narrow + piece.place * hidden;
      for (int64_t i = 0; i < piece.delta->num_ups; i++) {
        const Delta::Up &part = piece.delta->ups[i];
        const int64_t count = up(part.weight.outputs, STRIP);
        if (item < count) return widen(work, piece, part, from, item * STRIP), false;
        item -= count;
        from += piece.count * part.weight.k * size_of(*piece.delta);
      }
      return true;
    });
  });
}

}  // namespace

void add_deltas(const Delta *deltas, const Adapted &rows, const void *x, int64_t count, void *y, int64_t columns,
                bool wide, float factor) {
  const int64_t fair = up(rows.start[rows.groups], team_size());
  add_all({deltas, rows, x, y, columns, wide, factor, 0, count, fair < 1 ? 1 : least(fair, PIECE)});
}

void gated_with(const Weight &gated, const Weight &sums, const Delta *deltas, const Adapted &rows, const void *x,
                int64_t count, float *memory, void *y) {
  const int64_t size = gated.kind == Kind::fp32 ? 4 : 2, slab = gated_rows(sums.n);
  for (int64_t at = 0; at < count; at += slab) {
    const int64_t here = least(slab, count - at), fair = up(here, team_size());
    linear(sums, (const char *)x + at * gated.k * size, here, nullptr, 1.f, memory);
    add_all({deltas, rows, x, memory, sums.n, true, 1.f, at, at + here, least(fair, PIECE)});
    apply_gate(gated, memory, here, (char *)y + at * gated.outputs * size);
  }
}

int64_t gated_rows(int64_t n) { return SLAB / (n * 4) < 2 * PIECE ? 2 * PIECE : SLAB / (n * 4); }

}  // namespace SHOAL_SET
}  // namespace shoal
