// What adapters add to the outputs of linear layers: two narrow products for the rows of each adapter, and their sum with
// what the layer gave. Knows which rows are whose; must not know how a product is computed (linear.cpp does).
//
// A row's bits depend on that row and its adapter alone: rows are cut into pieces by their number, but the products give
// each row the same bits in any company, and everything else is done number by number.
#include <cstdlib>

#include "ops.h"
#include "threads.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t PIECE = 24;  // rows that go through both products together: what they add stays in the second cache

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Memory of this thread beside `scratch`, which the products use.
char *own_memory(int64_t bytes) {
  static thread_local char *memory = nullptr;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    free(memory);
    size = up(bytes, 4096) * 4096;
    memory = (char *)aligned_alloc(4096, size);
    if (!memory) abort();  // as in `scratch`
  }
  return memory;
}

struct Work {
  const Adapted &rows;
  const void *x;
  void *y;
  int64_t columns;  // of y
  bool wide;        // y is float
  float factor;
};

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

// Adds rows of `outputs` floats to the columns of y where they belong.
template <class Y>
void add_rows(const Work &work, const int64_t *rows, int64_t count, const Delta::Up &up, const float *added) {
  const int64_t outputs = up.weight.outputs;
  for (int64_t r = 0; r < count; r++, added += outputs) {
    Y *to = (Y *)work.y + rows[r] * work.columns + up.first;
    for (int64_t i = 0; i < outputs; i += LANES)
      add_some(to + i / PANEL * up.stride + i % PANEL, added + i, outputs - i);
  }
}

// Both products of some rows of one adapter, and the sum.
void add_piece(const Work &work, const Delta &delta, const int64_t *rows, int64_t count) {
  const int64_t k = delta.down.k, hidden = delta.down.outputs, size = delta.down.kind == Kind::fp32 ? 4 : 2;
  int64_t widest = 0;
  for (int64_t i = 0; i < delta.num_ups; i++)
    widest = delta.ups[i].weight.outputs > widest ? delta.ups[i].weight.outputs : widest;
  const int64_t in_bytes = up(count * k * size, 64) * 64, hidden_bytes = up(count * hidden * size, 64) * 64;
  char *in = own_memory(in_bytes + 2 * hidden_bytes + count * widest * 4);
  char *narrow = in + in_bytes, *part = narrow + hidden_bytes;
  float *added = (float *)(part + hidden_bytes);
  for (int64_t r = 0; r < count; r++)
    __builtin_memcpy(in + r * k * size, (const char *)work.x + rows[r] * k * size, k * size);
  linear(delta.down, in, count, nullptr, 1.f, narrow);
  for (int64_t i = 0; i < delta.num_ups; i++) {
    const Delta::Up &up = delta.ups[i];
    const char *from = narrow;
    if (up.weight.k < hidden) {
      for (int64_t r = 0; r < count; r++)
        __builtin_memcpy(part + r * up.weight.k * size, narrow + (r * hidden + up.begin) * size, up.weight.k * size);
      from = part;
    }
    linear(up.weight, from, count, nullptr, up.scale * work.factor, added);
    if (work.wide) add_rows<float>(work, rows, count, up, added);
    else add_rows<uint16_t>(work, rows, count, up, added);
  }
}

}  // namespace

void add_deltas(const Delta *deltas, const Adapted &rows, const void *x, void *y, int64_t columns, bool wide,
                float factor) {
  const Work work = {rows, x, y, columns, wide, factor};
  const int64_t threads = team_size(), total = rows.start[rows.groups];
  const int64_t fair = up(total, threads), piece = fair < PIECE ? (fair < 1 ? 1 : fair) : PIECE;
  int64_t items = 0;
  for (int64_t g = 0; g < rows.groups; g++) items += up(rows.start[g + 1] - rows.start[g], piece);
  // With fewer pieces than threads each product has all of them.
  for_each(items, items >= threads, [&](int64_t item) {
    int64_t g = 0;
    for (int64_t here; item >= (here = up(rows.start[g + 1] - rows.start[g], piece)); g++) item -= here;
    const Delta &delta = deltas[rows.adapter[g]];
    const int64_t first = rows.start[g] + item * piece;
    const int64_t count = rows.start[g + 1] - first < piece ? rows.start[g + 1] - first : piece;
    if (delta.num_ups) add_piece(work, delta, rows.row + first, count);
  });
}

}  // namespace SHOAL_SET
}  // namespace shoal
