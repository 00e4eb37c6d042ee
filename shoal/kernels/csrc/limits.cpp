// What the machine can do at most with the instructions that the kernels are made of: the measure of all of them.
// Knows instructions and memory; must not know any kernel, nor time: the caller has the clock.
#include "ops.h"
#include "threads.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

// As many independent sums as registers hold beside the two operands, so that no instruction waits for another.
#ifdef __AVX512F__
constexpr int SUMS = 16;
#else
constexpr int SUMS = 4;
#endif

// Keeps operands from being known, and with them whatever could be computed before the loop.
template <class T>
INLINE void unknown(T &x) {
#ifdef __AVX512F__
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

// The three instructions of products. Each returns the operations of one call: a product and a sum count as two.
struct Floats {
  using Sum = vf;
  static constexpr double OPERATIONS = 2 * LANES;
  INLINE vf step(vf total, vu a, vu b) { return fma((vf)a, (vf)b, total); }
};
struct Pairs {
  using Sum = vf;
  static constexpr double OPERATIONS = 4 * LANES;
  INLINE vf step(vf total, vu a, vu b) { return dot_pairs(total, a, b); }
};
struct Bytes {
  using Sum = vi;
  static constexpr double OPERATIONS = 8 * LANES;
  INLINE vi step(vi total, vu a, vu b) { return dot_bytes(total, a, b); }
};

// Rounds are cut into pieces, many for each thread, so that one that is held up for a while leaves them to others.
constexpr int64_t PIECES = 32;

template <class Product>
double repeat(int64_t iterations) {
  const int64_t rounds = iterations / PIECES + 1, pieces = PIECES * team_size();
  for_each(pieces, true, [&](int64_t) {
    typename Product::Sum total[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
      total[i] = (typename Product::Sum){};
      unknown(total[i]);  // or the compiler would see that all sums are one
    }
    vu a = splat_bits(0x3f803f80u), b = splat_bits(0x3f803f80u);
    for (int64_t n = 0; n < rounds; n++) {
      unknown(a), unknown(b);
#pragma GCC unroll 16
      for (int i = 0; i < SUMS; i++) total[i] = Product::step(total[i], a, b);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) unknown(total[i]);
  });
  return (double)(rounds * pieces) * SUMS * Product::OPERATIONS;
}

}  // namespace

double peak(Kind kind, int64_t iterations) {
  if (kind == Kind::fp32) return repeat<Floats>(iterations);
  return kind == Kind::int8 || kind == Kind::int4 ? repeat<Bytes>(iterations) : repeat<Pairs>(iterations);
}

double read(const void *memory, int64_t bytes) {
  constexpr int64_t STEP = 4 * sizeof(vu), PIECE = 1 << 16;
  const int64_t pieces = bytes / PIECE;
  for_each(pieces, true, [&](int64_t piece) {
    const char *p = (const char *)memory + piece * PIECE;
    vu seen[4] = {};
    for (int64_t n = 0; n < PIECE / STEP; n++, p += STEP) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) seen[i] |= load_bits(p + i * sizeof(vu));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) unknown(seen[i]);
  });
  return (double)(pieces * PIECE);
}

}  // namespace SHOAL_SET
}  // namespace shoal
