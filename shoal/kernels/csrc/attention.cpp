// Attention over pages, one kernel for decoding, shared runs and chunks of prompts. Knows segments, heads and pages
// (pages.cpp has their layout); must not know requests, or why tokens read pages together.
//
// A task is one segment's tokens with the query heads of one key/value head: up to 48 rows (token, head). It goes
// through the segment's tiles of 256 positions, one register tile of rows after the other: scores; their maximum,
// exponentials and sum; weighted values; and the fold into the rows' state. All the while, what will be read some time
// later is fetched, of this task or of the next.
//
// What makes a row's bits its own: each of its numbers is one chain of operations in the order of the positions,
// whatever the other rows of the register tile are. Positions it does not see have a weight of exactly 0, which leaves
// a sum as it is, so it is free to visit or skip them. A tile in which it sees nothing leaves its state alone.
// Exponents are in base 2: the scale of the scores, which is positive, takes in log2(e), and 2 to the power of 0 is
// exactly 1.
#include <stdlib.h>

#include "attention_tiles.h"
#include "free_order.h"
#include "threads.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

constexpr int64_t BLOCK = 48;           // rows of a task
constexpr int64_t AHEAD_BYTES = 32768;  // how long before they are read keys and values are fetched

// Where keys and values are whole numbers of 8 bits, queries and weights are whole numbers of 16, as multiples of a
// scale of their row: a sum of 512 products of a query's numbers and a key's, or of 256 of weights and values, is exact
// in 32 bits. Keys are mixed before they are rounded, and queries with them.
constexpr float QUERY_LEVELS = 32767.f, WEIGHT_LEVELS = 32767.f;

// Where the parts of a divided segment meet, by token and head (FREE_ORDER): how many have ended, -1 while one of them
// adds its own; and how many there are.
struct Meeting {
  int32_t ended, expected;
};

// What all tasks of a call have in common.
struct Call {
  Work work;
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
  Meeting *meetings;     // null where no segment is divided
  int32_t divided;       // parts of segments
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
  bf16 *whole;      // [LANES][padded], queries of a register tile as whole numbers
  float *peaks;     // [LANES][LANES], largest products of a weight and its value's scale, by row and lane
  float query_scale[BLOCK], weight_scale[LANES];  // of whole numbers
  float weight[BLOCK + LANES], largest[BLOCK + LANES];
  float old[LANES], fresh[LANES];                         // of a register tile
  int64_t position[BLOCK];
};

// Units in the order in which they will be read: of this task, then of the next. They are fetched at the pace of
// reading, whatever is being read.
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

template <Kind KIND>
void give(const Call &call, Room &room) {
  const int64_t q = (BLOCK * call.steps + LANES) * 4, scores = ROWS * SCORES * 4;
  const int64_t weights = KIND == Kind::fp32 ? 0 : ROWS * WEIGHTS<KIND> * 4;
  const int64_t tops = LANES * LANES * 4, out = BLOCK * call.padded * 4, unit = call.unit_words * 4;
  const int64_t whole = KIND == Kind::int8 ? LANES * call.padded * 2 : 0, peaks = KIND == Kind::int8 ? tops : 0;
  char *memory = (char *)scratch(q + scores + weights + tops + out + unit + whole + peaks);
  room.scores = (float *)memory, memory += scores;
  room.weights = (word *)(KIND == Kind::fp32 ? (char *)room.scores : memory), memory += weights;
  room.tops = (float *)memory, memory += tops;
  room.peaks = (float *)memory, memory += peaks;
  room.out = (float *)memory, memory += out;
  room.last_unit = (word *)memory, memory += unit;
  room.whole = (bf16 *)memory, memory += whole;
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
  const int64_t size = call.pages.page_size, per_page = size / UNIT;  // of what divides a tile: powers of two
  const int64_t first = extent.start / size, shift = __builtin_ctzll(per_page);
  for (int64_t u = extent.from; u < extent.to; u++) {
    const int64_t offset = block_at(call.pages, row[first + (u >> shift)], task.head) / 4 +
                           (u & (per_page - 1)) * call.unit_words;
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
    // The addresses of many pages are looked up at once, else each lookup holds up what is being computed.
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

// Queries of a register tile's rows, by step.
template <Kind KIND>
void gather(const Call &call, const char *const *rows, int64_t count, word *to) {
  const char *at[LANES];
  for (int64_t r = 0; r < LANES; r++) at[r] = rows[r < count ? r : count - 1];
  const int64_t whole = call.width / PER_WORD<KIND>;
  int64_t k = 0;
  for (; k + LANES <= whole; k += LANES) {
    transpose(at, count, to + k * count);
    for (int64_t r = 0; r < LANES; r++) at[r] += LANES * 4;
  }
  for (int64_t r = 0; r < count; r++) {
    for (int64_t i = k; i < whole; i++) __builtin_memcpy(to + i * count + r, at[r] + (i - k) * 4, 4);
    if (KIND != Kind::fp32 && call.width % 2) to[whole * count + r] = *(const bf16 *)(at[r] + (whole - k) * 4);
  }
}

template <Kind KIND>
void begin_task(const Call &call, const Task &task, Room &room) {
  const int64_t tiles = (task.rows + ROWS - 1) / ROWS;
  int64_t token = 0, head = 0;
  for (int64_t i = 0, r = 0; i < tiles; i++) {
    const int64_t first = r, end = task.rows * (i + 1) / tiles;
    const char *rows[LANES];
    for (; r < end; r++) {
      locate(call, task, r, token, head);
      typedef typename Number<KIND>::type T;
      const T *row = (const T *)call.q + token * call.stride + head * call.width;
      if constexpr (KIND == Kind::int8) {
        bf16 *to = room.whole + (r - first) * call.padded;
        float wide[WIDEST];
        widen(row, call.width, wide), mix_runs(wide, call.width), row = to;
        room.query_scale[r] = quantise(wide, call.width, QUERY_LEVELS, (int16_t *)to) / (float)run_of(call.width);
      }
      rows[r - first] = (const char *)row;
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
    gather<KIND>(call, rows, end - first, room.q + first * call.steps);
  }
}

// Adds what other parts of the segment have left of this token and head to the row's state, or leaves that for the
// others; whether all of it is here.
bool meet(const Call &call, int64_t place, float *out, float &weight, float &largest) {
  Meeting &meeting = call.meetings[place];
  float *state = call.states + place * (call.padded + 2), *theirs = state + call.padded;
  int32_t ended;
  while ((ended = __atomic_exchange_n(&meeting.ended, -1, __ATOMIC_ACQUIRE)) < 0) {
  }
  const bool last = ended + 1 == meeting.expected;
  if (ended) {
    const float top = theirs[1] > largest ? theirs[1] : largest, base = top == -__builtin_inff() ? 0.f : top;
    const vf other = power_of_two<true>(splat(theirs[1] - base)), own = power_of_two<true>(splat(largest - base));
    for (int64_t i = 0; i < call.padded; i += LANES) store(out + i, load(out + i) * own + load(state + i) * other);
    weight = weight * own[0] + theirs[0] * other[0], largest = top;
  }
  if (!last) __builtin_memcpy(state, out, call.padded * 4), theirs[0] = weight, theirs[1] = largest;
  __atomic_store_n(&meeting.ended, ended + 1, __ATOMIC_RELEASE);
  return last;
}

template <Kind KIND>
void end_task(const Call &call, const Task &task, Room &room) {
  for (int64_t r = 0; r < task.rows; r++) {
    int64_t token, head;
    locate(call, task, r, token, head);
    float *out = room.out + r * call.padded;
    if (call.meetings) {
      if (!meet(call, token * call.heads + head, out, room.weight[r], room.largest[r])) continue;
    } else if (task.segment->keep) {
      float *state = call.states + (token * call.heads + head) * (call.padded + 2);
      __builtin_memcpy(state, out, call.padded * 4);
      state[call.padded] = room.weight[r], state[call.padded + 1] = room.largest[r];
      continue;
    }
    typedef typename Number<KIND>::type T;
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
template <Kind KIND>
INLINE vf weigh(const float *scores, word *weights, const Extent &extent, vf factor, vf shift) {
  vf even = {}, odd = {};
  typename Number<KIND>::type *to = (typename Number<KIND>::type *)weights;
  for (int64_t u = extent.from; u < extent.to; u += 2) {
    const vf a = power_of_two<KIND == Kind::fp32>(fma(load(scores + u * UNIT), factor, shift));
    const vf b = power_of_two<KIND == Kind::fp32>(fma(load(scores + u * UNIT + UNIT), factor, shift));
    even += a, odd += b;
    store(to + u * UNIT, a), store(to + u * UNIT + UNIT, b);
  }
  return even + odd;
}

// The same where values are whole numbers: their scales go into the weights, which stay where the scores were until
// their largest one is known. It is taken into `peaks` by lane.
INLINE vf weigh_values(float *scores, const word *const *values, const Extent &extent, vf factor, vf shift,
                       float *peaks) {
  vf even = {}, odd = {}, peak = {};
  for (int64_t u = extent.from; u < extent.to; u += 2) {
    float *at = scores + u * UNIT;
    const vf a = power_of_two<false>(fma(load(at), factor, shift));
    const vf b = power_of_two<false>(fma(load(at + UNIT), factor, shift));
    const vf c = a * load((const float *)values[u]), d = b * load((const float *)values[u + 1]);
    even += a, odd += b;
    peak = larger(larger(peak, c), d);
    store(at, c), store(at + UNIT, d);
  }
  store(peaks, peak);
  return even + odd;
}

// Weights with scales to whole numbers of 16 bits.
INLINE void round_weights(const float *scores, word *weights, const Extent &extent, vf inverse) {
  typedef int16_t wholes __attribute__((vector_size(32), may_alias));
  for (int64_t u = extent.from; u < extent.to + extent.to % 2; u++) {
    const vi bits = (vi)fma(load(scores + u * UNIT), inverse, splat(12582912.f));  // ends in the nearest whole number
    *(wholes *)((int16_t *)weights + u * UNIT) = __builtin_convertvector(bits, wholes);
  }
}

// The last unit of values with zeros from position `count` on: 0 times what lies there might be NaN. Of whole numbers
// that is so of the scales alone.
template <Kind KIND>
const word *without_rest(const Call &call, Room &room, const word *values, int64_t count) {
  constexpr int64_t STEPS = UNIT / PER_WORD<KIND>;
  if (KIND == Kind::int8) {
    __builtin_memcpy(room.last_unit, values, call.unit_words * 4);
    __builtin_memset(room.last_unit + count, 0, (UNIT - count) * 4);
    return room.last_unit;
  }
  for (int64_t i = 0; i < call.unit_words; i += PANEL) {
    const int64_t position = i / PANEL % STEPS * PER_WORD<KIND>;
    const word seen = position >= count ? 0u : KIND == Kind::bf16 && position + 1 >= count ? 0xffffu : ~0u;
    for (int64_t j = 0; j < PANEL; j++) room.last_unit[i + j] = values[i + j] & seen;
  }
  return room.last_unit;
}

// Weights of `rows` rows from scores, the sums of their lanes in `tops`, and of whole numbers their scales.
template <Kind KIND>
INLINE void weigh_rows(const Extent &extent, const word *const *values, vf factor, const float *shift, int64_t rows,
                       Room &room) {
  if constexpr (KIND != Kind::int8) {
    for (int64_t i = 0; i < rows; i++)
      store(room.tops + i * LANES, weigh<KIND>(room.scores + i * SCORES, room.weights + i * WEIGHTS<KIND>, extent,
                                               factor, splat(shift[i])));
    return;
  }
  for (int64_t i = 0; i < rows; i++)
    store(room.tops + i * LANES, weigh_values(room.scores + i * SCORES, values, extent, factor, splat(shift[i]),
                                              room.peaks + i * LANES));
  const vf peak = reduce_rows<larger>(room.peaks);
  float inverse[LANES];
  store(room.weight_scale, peak / splat(WEIGHT_LEVELS));
  store(inverse, splat(WEIGHT_LEVELS) / larger(peak, splat(1e-30f)));
  for (int64_t i = 0; i < rows; i++)
    round_weights(room.scores + i * SCORES, room.weights + i * WEIGHTS<KIND>, extent, splat(inverse[i]));
}

// Scores of `rows` rows from r on to weights, and to new states but for `out`, with what `mix` needs to renew that.
template <Kind KIND>
void weigh_and_fold(const Call &call, const Extent &extent, const word *const *values, int64_t r, int64_t rows,
                    Room &room) {
  const bool capped = call.outward != 0.f;
  if (capped || extent.open > extent.from || extent.shut < extent.to)
    for (int64_t i = 0; i < rows; i++)
      finish_scores(call, extent, capped, room.scores + i * SCORES, room.position[r + i], room.tops + i * LANES);
  const vf none = splat(-__builtin_inff()), factor = splat(call.factor);
  const vf top = reduce_rows<larger>(room.tops) * factor;
  float shift[LANES];
  store(shift, top == none ? (vf){} : -top);
  weigh_rows<KIND>(extent, values, factor, shift, rows, room);
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
template <Kind KIND>
void run_tile(const Call &call, const Extent &extent, const word *const *keys, const word *const *values, int64_t r,
              int64_t rows, Feed *feed, Room &room) {
  for (int64_t i = 0; i < rows; i++) store(room.tops + i * LANES, splat(-__builtin_inff()));
  for (int64_t u = extent.from; u < extent.to; u += 2) {
    const bool whole = u >= extent.open && u < extent.shut && call.outward == 0.f;
    const word *const *ahead = feed ? take(call, *feed, 2) : nullptr;
    SCORE<KIND>[ahead != nullptr][rows - 1](room.q + r * call.steps, keys + u, call.steps, room.query_scale + r,
                                            room.scores + u * UNIT, whole ? room.tops : nullptr, ahead);
  }
  weigh_and_fold<KIND>(call, extent, values, r, rows, room);
  const int64_t from = extent.from, units = extent.to - from;
  const word *const *ahead = feed ? take(call, *feed, units) : nullptr;
  const int64_t panels = call.padded / PANEL, panel_words = PANEL * UNIT * number_bytes(KIND) / 4;
  for (int64_t d = 0, count; d < panels; d += count) {
    count = rows <= FEW && d + 2 <= panels ? 2 : 1;
    const word *chunks[UNITS];  // as much of the units ahead as is read of these, in the order of addresses
    for (int64_t u = 0; u < units && ahead; u++) {
      const int64_t at = d * units + u * count;
      chunks[u] = ahead[at / panels] + HEAD<KIND> + at % panels * panel_words;
    }
    (count == 2 ? MIX_FEW<KIND>[ahead != nullptr] : MIX<KIND>[ahead != nullptr])[rows - 1](
        room.weights + from * UNIT / PER_WORD<KIND>, values + from, units, d * panel_words, room.weight_scale, room.old,
        room.fresh, room.out + r * call.padded + d * PANEL, call.padded, chunks);
  }
}

template <Kind KIND>
void run_task(const Call &call, const Task &task, Feed &feed, Room &room) {
  const word *keys[UNITS], *values[UNITS];
  begin_task<KIND>(call, task, room);
  for (int64_t tile = task.begin; tile < task.end; tile++) {
    const Extent extent = find_extent(call, task, tile);
    find_units(call, task, extent, keys, values);
    const int64_t seen = task.high + 1 - extent.start, tiles = (task.rows + ROWS - 1) / ROWS;
    if (seen < extent.to * UNIT) {
      values[extent.to - 1] = without_rest<KIND>(call, room, values[extent.to - 1], seen % UNIT);
      if (extent.to % 2) values[extent.to] = values[extent.to - 1];
    }
    for (int64_t i = 0, r = 0; i < tiles; i++) {
      const int64_t end = task.rows * (i + 1) / tiles;
      run_tile<KIND>(call, extent, keys, values, r, end - r, i ? nullptr : &feed, room);
      r = end;
    }
  }
  end_task<KIND>(call, task, room);
}

// Tasks of the segments from <= s < to, taken from a common counter. The next one is taken before the present one is
// done: its first units are fetched meanwhile.
template <Kind KIND>
void run_tasks(const Call &call, int64_t &counter, int64_t from, int64_t to) {
  Room room;
  give<KIND>(call, room);
  Task tasks[2];
  Feed feed = {};
  bool some = false;
  for (int now = 0;; now ^= 1) {
    Task &task = tasks[now], &next = tasks[now ^ 1];
    const int64_t index = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
    const bool more = index < call.first[to];
    if (more) next = find_task(call, index, from, to);
    if (some) {
      if (!feed.task) feed.task = more ? &next : nullptr, feed.tile = next.begin;
      else feed.next = more ? &next : nullptr;
      run_task<KIND>(call, task, feed, room);
    } else if (more) {
      feed.task = &next, feed.tile = next.begin;
      take(call, feed, ahead_units(call));
    }
    some = more;
    if (!some) return;
  }
}

// Where tasks are fewer than threads, cuts long segments into parts that any thread computes, and that meet as they end
// (FREE_ORDER: 1.5 times as fast for one row and one key head on two threads, but slower wherever each thread has a
// task). Returns memory to be freed.
char *divide(Call &call) {
  Work &work = call.work;
  const int64_t segments = work.level_ends[0], wanted = 4 * team_size();
  int64_t tasks = 0, tiles = 0;
  for (int64_t i = 0; i < segments; i++) {
    const Segment &s = work.segments[i];
    const int64_t each = (s.count * call.group + BLOCK - 1) / BLOCK * call.pages.kv_heads;
    tasks += each, tiles += each * (s.end - s.begin);
  }
  if (work.num_levels > 1 || tasks >= team_size() || tiles < 2 * tasks) return nullptr;
  const int64_t places = work.num_tokens * call.heads, states = places * (call.padded + 2) * 4;
  char *memory = (char *)malloc(states + places * sizeof(Meeting) + tiles * sizeof(Segment));
  if (!memory) abort();
  call.states = (float *)memory;
  call.meetings = (Meeting *)(memory + states);
  Segment *parts = (Segment *)(call.meetings + places);
  int32_t count = 0;
  for (int64_t i = 0; i < segments; i++) {
    const Segment &s = work.segments[i];
    const int64_t length = s.end - s.begin, most = length * wanted / tiles, cuts = most < 1 ? 1 : most;
    for (int64_t c = 0; c < cuts; c++) {
      parts[count] = s;
      parts[count].begin = s.begin + length * c / cuts, parts[count++].end = s.begin + length * (c + 1) / cuts;
    }
    for (int64_t t = s.first; t < s.first + s.count; t++)
      for (int64_t h = 0; h < call.heads; h++) call.meetings[work.order[t] * call.heads + h] = {0, (int32_t)cuts};
  }
  call.divided = count;
  work.segments = parts, work.level_ends = &call.divided;
  return memory;
}

template <Kind KIND>
void run(Call &call) {
  char *memory = FREE_ORDER ? divide(call) : nullptr;
  const Work &work = call.work;
  const int64_t segments = work.level_ends[work.num_levels - 1];
  int64_t *first = (int64_t *)malloc((segments + 1) * sizeof(int64_t));
  if (!first) abort();
  first[0] = 0;
  for (int64_t i = 0; i < segments; i++)
    first[i + 1] = first[i] + (work.segments[i].count * call.group + BLOCK - 1) / BLOCK * call.pages.kv_heads;
  call.first = first;
  for (int64_t level = 0, from = 0; level < work.num_levels; level++) {
    const int64_t to = work.level_ends[level];
    int64_t counter = first[from];
    together(first[to] - counter > 1, [&](bool) { run_tasks<KIND>(call, counter, from, to); });
    from = to;
  }
  free(first);
  free(memory);
}

}  // namespace

void attention(const Work &work, const Pages &pages, const void *q, int64_t stride, int64_t query_heads, float scale,
               int64_t window, float softcap, float *states, void *out) {
  if (!work.num_tokens) return;
  const int64_t per_word = pages.kind == Kind::fp32 ? 1 : 2;
  Call call = {work, pages, q, stride, query_heads, query_heads / pages.kv_heads, pages.width, padded_width(pages),
               (pages.width + per_word - 1) / per_word, unit_bytes(pages) / 4, window, scale * LOG2E, 0.f, 0.f,
               states, out, nullptr, nullptr, 0};
  if (softcap != 0.f) call.factor = 1.f, call.inward = scale / softcap, call.outward = softcap * LOG2E;
  if (pages.kind == Kind::fp32) return run<Kind::fp32>(call);
  pages.kind == Kind::int8 ? run<Kind::int8>(call) : run<Kind::bf16>(call);
}

}  // namespace SHOAL_SET
}  // namespace shoal
