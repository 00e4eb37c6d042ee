// What choosing a token needs of rows of logits: draws by weight, the edges of top-k and top-p, log-probabilities.
// Knows rows and the wishes of a draw as numbers; must not know requests, nor make random numbers.
//
// A number's weight is e to the power of (x - largest) / heat in units of 2^-40, rounded down. Sums are of integers, and
// the exponential is made of single additions, multiplications and divisions: not fused, not approximated, so that all
// instruction sets and torch (kernels/ref_sampling.py) agree on every bit.
// All of it works on single registers (`part`), as a row is to be read at memory speed by every instruction set.
#include "ops.h"
#include "threads.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

typedef uint32_t part_words __attribute__((vector_size(64 / PARTS)));

constexpr int64_t STEP = LANES / PARTS;  // numbers in a register
constexpr int64_t BLOCK = 2048;          // numbers whose weights are summed in 32-bit lanes
constexpr int BITS = 20;                 // a weight is two numbers of 20 bits, the upper of which may be 2^20
constexpr float REACH = 28;              // numbers that lie further below the largest have no weight
constexpr float NEAR = 8;                // most edges lie above this
constexpr float FINE = 64;               // buckets in one unit of the exponent
constexpr int64_t BUCKETS = (int64_t)(REACH * FINE) + 1;

struct Row {
  const float *x;
  int64_t columns;
  part best, heat;
};

struct Split {
  part_words high, low;
};

// Tokens by their distance from the best. Those of one bucket are more likely than those of all later ones.
struct Buckets {
  int64_t weight[BUCKETS];
  int64_t count[BUCKETS];
};

// Memory for the tokens of one bucket, of which there may be as many as columns.
struct Crowd {
  int64_t *weight;
  uint32_t *key;  // the bits of the distance: smaller is better
};

INLINE part all(float x) { return x - (part){}; }

// Bit i is set where lane i is.
INLINE uint32_t lanes(part_bits mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#elif defined(__ARM_NEON)
  return vaddvq_u32(vandq_u32((uint32x4_t)mask, (uint32x4_t){1, 2, 4, 8}));
#else
  uint32_t out = 0;
  for (int i = 0; i < STEP; i++) out |= (uint32_t)(mask[i] & 1) << i;
  return out;
#endif
}

// Numbers i to i + STEP; beyond the last column they are the lowest there are.
INLINE part logits(const float *x, int64_t columns, int64_t i) {
  part v = all(-__builtin_inff());
  if (i + STEP <= columns)
    __builtin_memcpy(&v, x + i, sizeof v);
  else
    __builtin_memcpy(&v, x + i, (columns - i) * sizeof(float));
  return v;
}

// The exponents of numbers i to i + STEP, at most 0.
INLINE part exponents(const Row &row, int64_t i) { return (logits(row.x, row.columns, i) - row.best) / row.heat; }

// e to the power of z <= 0, to 1e-7 of it; below -80 and for a NaN something too small to have a weight. Exactly 1 at 0.
// ln 2 comes in two parts, so that what is left of z loses no digits; the polynomial is a minimax fit for that rest.
INLINE part exponential_of(part z) {
  z = z > -80.f ? z : all(-80.f);
  const part whole = (z * 1.44269504f + 12582912.f) - 12582912.f;  // to the nearest whole number
  const part f = (z - whole * 0.693359375f) - whole * -2.12194440e-4f;
  part q = f * 0.0013814539f + 0.008368745f;
  q = q * f + 0.04166839f;
  q = q * f + 0.16666521f;
  q = q * f + 0.49999994f;
  const part p = (q * (f * f) + f) + 1.f;
  return (part)((part_bits)p + (__builtin_convertvector(whole, part_bits) << 23));
}

INLINE Split weights(part e) {
  const part upper = e * (float)(1 << BITS);
  const part_bits high = __builtin_convertvector(upper, part_bits);
  const part rest = (upper - __builtin_convertvector(high, part)) * (float)(1 << BITS);
  return {(part_words)high, (part_words)__builtin_convertvector(rest, part_bits)};
}

INLINE int64_t total(Split s) {
  int64_t high = 0, low = 0;
  for (int i = 0; i < STEP; i++) high += s.high[i], low += s.low[i];
  return (high << BITS) + low;
}

// Which of the numbers a draw may take.
INLINE part_bits kept(part z, part e, float edge, float least) { return (z >= edge) & (e >= least); }

// The weight of what is kept of the block that begins at `first`.
int64_t block_weight(const Row &row, int64_t first, float edge, float least) {
  const int64_t last = first + BLOCK < row.columns ? first + BLOCK : row.columns;
  Split sum = {};
  for (int64_t i = first; i < last; i += STEP) {
    const part z = exponents(row, i);
    if (!lanes(z >= edge)) continue;
    const part e = exponential_of(z);
    const Split w = weights(e);
    const part_words mask = (part_words)kept(z, e, edge, least);
    sum.high += w.high & mask;
    sum.low += w.low & mask;
  }
  return total(sum);
}

// The number at which the weight of what is kept, counted from `first`, exceeds `place`.
int64_t walk(const Row &row, int64_t first, float edge, float least, int64_t place) {
  for (int64_t i = first; i < row.columns; i += STEP) {
    const part z = exponents(row, i), e = exponential_of(z);
    const Split w = weights(e);
    const part_bits mask = kept(z, e, edge, least);
    for (int64_t j = 0; j < STEP; j++)
      if (mask[j] && (place -= ((int64_t)w.high[j] << BITS) + w.low[j]) < 0) return i + j;
  }
  return 0;  // of a row that is no distribution
}

// -- edges ------------------------------------------------------------------------------------------

// Sort numbers down to -reach into buckets. Gives the weight of the whole row where weights are wanted.
int64_t fill(const Row &row, float reach, bool weigh, Buckets &buckets) {
  const int64_t used = (int64_t)(reach * FINE) + 1;
  __builtin_memset(buckets.count, 0, used * sizeof buckets.count[0]);
  __builtin_memset(buckets.weight, 0, used * sizeof buckets.weight[0]);
  int64_t whole = 0;
  for (int64_t first = 0; first < row.columns; first += BLOCK) {
    const int64_t last = first + BLOCK < row.columns ? first + BLOCK : row.columns;
    Split sum = {};
    for (int64_t i = first; i < last; i += STEP) {
      const part z = exponents(row, i);
      uint32_t near = lanes(z >= -reach);
      Split w = {};
      if (weigh) {
        w = weights(exponential_of(z));
        sum.high += w.high, sum.low += w.low;
      }
      if (!near) continue;
      int32_t bucket[STEP];
      uint32_t high[STEP], low[STEP];
      const part_bits place = __builtin_convertvector(z * -FINE, part_bits);
      __builtin_memcpy(bucket, &place, sizeof bucket);
      __builtin_memcpy(high, &w.high, sizeof high), __builtin_memcpy(low, &w.low, sizeof low);
      for (; near; near &= near - 1) {
        const int j = __builtin_ctz(near);
        buckets.count[bucket[j]]++;
        buckets.weight[bucket[j]] += ((int64_t)high[j] << BITS) + low[j];
      }
    }
    whole += total(sum);
  }
  return whole;
}

// The numbers of one bucket.
int64_t gather(const Row &row, int64_t bucket, const Crowd &crowd) {
  const float upper = (float)bucket / -FINE, lower = (float)(bucket + 1) / -FINE;
  int64_t count = 0;
  for (int64_t i = 0; i < row.columns; i += STEP) {
    const part z = exponents(row, i);
    uint32_t here = lanes((z <= upper) & (z > lower));
    if (!here) continue;
    const Split w = weights(exponential_of(z));
    for (; here; here &= here - 1, count++) {
      const int j = __builtin_ctz(here);
      const float distance = z[j];
      __builtin_memcpy(crowd.key + count, &distance, 4);
      crowd.key[count] &= 0x7fffffff;
      crowd.weight[count] = ((int64_t)w.high[j] << BITS) + w.low[j];
    }
  }
  return count;
}

// The smallest key up to which the crowd holds `need`, of weight or of numbers; digit by digit, from the first.
uint32_t smallest(const Crowd &crowd, int64_t count, int64_t need, bool weigh) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t held[256] = {};
    for (int64_t i = 0; i < count; i++) held[crowd.key[i] >> shift & 255] += weigh ? crowd.weight[i] : 1;
    uint32_t digit = 0;
    for (; digit < 255 && held[digit] < need; digit++) need -= held[digit];
    int64_t stay = 0;
    for (int64_t i = 0; i < count; i++)
      if ((crowd.key[i] >> shift & 255) == digit) {
        crowd.key[stay] = crowd.key[i];
        crowd.weight[stay++] = crowd.weight[i];
      }
    count = stay;
  }
  return crowd.key[0];
}

// Lowers `edge` to the largest exponent such that those from it on hold `need`, of weight or of numbers; `mass` becomes
// their weight. False where what lies within `reach` does not hold as much.
bool find(const Row &row, const Buckets &buckets, float reach, int64_t need, bool weigh, const Crowd &crowd,
          float *edge, int64_t *mass) {
  const int64_t used = (int64_t)(reach * FINE) + 1;
  int64_t before = 0, bucket = 0;
  for (; bucket < used; bucket++) {
    const int64_t held = weigh ? buckets.weight[bucket] : buckets.count[bucket];
    if (need <= held) break;
    need -= held, before += buckets.weight[bucket];
  }
  if (bucket == used) return false;
  // the last bucket begins at -reach, and is the only one that may lack numbers of its own
  if (bucket == used - 1 && reach < REACH) return false;
  int64_t count = gather(row, bucket, crowd);
  if (!count) return false;  // nothing was needed, as nothing in the row has a weight
  const uint32_t key = smallest(crowd, count, need, weigh);
  __builtin_memcpy(edge, &key, 4);
  *edge = -*edge;
  if (mass) {
    count = gather(row, bucket, crowd);
    for (int64_t i = 0; i < count; i++)
      if (crowd.key[i] <= key) before += crowd.weight[i];
    *mass = before;
  }
  return true;
}

// The smallest exponent within top-k and, of what that leaves, top-p. Looks near the best number first.
float find_edge(const Row &row, int64_t top_k, double top_p, const Crowd &crowd) {
  Buckets buckets;
  const bool weigh = top_p < 1;
  for (float reach = NEAR;; reach = REACH) {
    int64_t mass = fill(row, reach, weigh, buckets);
    float edge = -__builtin_inff();
    if (top_k > 0 && top_k < row.columns &&
        !find(row, buckets, reach, top_k, false, crowd, &edge, weigh ? &mass : nullptr) && reach < REACH)
      continue;
    if (weigh) {
      const double share = __builtin_ceil(top_p * (double)mass);
      const int64_t need = share < (double)mass ? (int64_t)share : mass;
      float least = edge;
      if (!find(row, buckets, reach, need, true, crowd, &least, nullptr) && reach < REACH) continue;
      edge = least > edge ? least : edge;
    }
    return edge;
  }
}

int64_t draw_one(const float *x, int64_t columns, const Draws &draws, int64_t i) {
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  int64_t *sums = (int64_t *)scratch((blocks + columns) * sizeof(int64_t) + columns * sizeof(uint32_t));
  const Crowd crowd = {sums + blocks, (uint32_t *)(sums + blocks + columns)};
  const Row row = {x + draws.row[i] * columns, columns, all(draws.best[i]), all(draws.heat[i])};
  float edge = -__builtin_inff();
  if ((draws.top_k[i] > 0 && draws.top_k[i] < columns) || draws.top_p[i] < 1)
    edge = find_edge(row, draws.top_k[i], draws.top_p[i], crowd);
  int64_t whole = 0;
  for (int64_t b = 0; b < blocks; b++) whole += sums[b] = block_weight(row, b * BLOCK, edge, draws.min_p[i]);
  int64_t place = (int64_t)((unsigned __int128)draws.number[i] * (uint64_t)whole >> 64), b = 0;
  for (; b < blocks - 1 && sums[b] <= place; b++) place -= sums[b];
  return walk(row, b * BLOCK, edge, draws.min_p[i], place);
}

// -- scores -----------------------------------------------------------------------------------------

// The numbers of a row that were best so far, the worst of them at the root of a heap.
struct Best {
  int64_t *id;
  float *value;
};

INLINE bool worse(const Best &best, int64_t a, int64_t b) {
  return best.value[a] < best.value[b] || (best.value[a] == best.value[b] && best.id[a] > best.id[b]);
}

void sink(const Best &best, int64_t from, int64_t count) {
  for (int64_t child; (child = 2 * from + 1) < count; from = child) {
    if (child + 1 < count && worse(best, child + 1, child)) child++;
    if (!worse(best, child, from)) return;
    const int64_t id = best.id[from];
    const float value = best.value[from];
    best.id[from] = best.id[child], best.value[from] = best.value[child];
    best.id[child] = id, best.value[child] = value;
  }
}

// The `top` largest numbers, best first; of equals the first.
void find_best(const float *x, int64_t columns, const Best &best, int64_t top) {
  for (int64_t i = 0; i < top; i++) best.id[i] = i, best.value[i] = x[i];
  for (int64_t i = top / 2; i-- > 0;) sink(best, i, top);
  for (int64_t i = top; i < columns; i += STEP) {
    uint32_t above = lanes(logits(x, columns, i) > best.value[0]);
    for (; above; above &= above - 1) {
      const int64_t id = i + __builtin_ctz(above);
      if (!(x[id] > best.value[0])) continue;
      best.id[0] = id, best.value[0] = x[id];
      sink(best, 0, top);
    }
  }
  for (int64_t count = top; count-- > 1;) {
    const int64_t id = best.id[0];
    const float value = best.value[0];
    best.id[0] = best.id[count], best.value[0] = best.value[count];
    best.id[count] = id, best.value[count] = value;
    sink(best, 0, count);
  }
}

void score_one(const float *x, int64_t columns, const Scores &scores, int64_t s) {
  x += scores.row[s] * columns;
  const int64_t token = scores.token[s];
  const float value = x[token];
  int64_t index, rank = 1, weight = 0;
  largest(x, &index, &scores.best[s], 1, columns);
  const Row row = {x, columns, all(scores.best[s]), all(1)};
  part_bits ids;
  for (int i = 0; i < STEP; i++) ids[i] = i;
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
    Split sum = {};
    part_bits before = {};  // how many come before the token, negative
    for (int64_t i = first; i < last; i += STEP, ids += (int32_t)STEP) {
      const part v = logits(x, columns, i);
      const Split w = weights(exponential_of(v - row.best));
      sum.high += w.high, sum.low += w.low;
      before += (v > value) | ((v == value) & (ids < (int32_t)token));
    }
    weight += total(sum);
    for (int i = 0; i < STEP; i++) rank -= before[i];
  }
  scores.value[s] = value, scores.weight[s] = weight, scores.rank[s] = rank;
  if (scores.top) find_best(x, columns, {scores.ids + s * scores.top, scores.values + s * scores.top}, scores.top);
}

}  // namespace

void draw(const float *x, int64_t columns, const Draws &draws, int64_t *token) {
  for_each(draws.count, draws.count * columns > BLOCK, [&](int64_t i) {
    token[i] = draw_one(x, columns, draws, i);
  });
}

void score(const float *x, int64_t columns, const Scores &scores) {
  for_each(scores.count, scores.count * columns > BLOCK, [&](int64_t i) {
    score_one(x, columns, scores, i);
  });
}

}  // namespace SHOAL_SET
}  // namespace shoal
