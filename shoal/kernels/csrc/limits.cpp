// What the machine can do at most with the instructions that the kernels are made of: the measure of all of them.
// Knows instructions and memory; must not know any kernel, nor time: the caller has the clock.
#include "ops.h"
#include "threads.h"
#include "vec.h"

namespace shoal {
namespace SHOAL_SET {
namespace {

// As many independent sums as registers hold beside the two operands, so that no instruction waits for another.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int SUMS = 16;
#else
constexpr int SUMS = 4;
#endif

#ifdef __ARM_NEON  // single registers: the compiler would keep what is wider in memory
constexpr int64_t WIDTH = 4;
typedef uint32x4_t Words;
typedef float32x4_t FloatSum;
typedef int32x4_t WholeSum;
#else
constexpr int64_t WIDTH = LANES;
typedef vu Words;
typedef vf FloatSum;
typedef vi WholeSum;
#endif

// Keeps operands from being known, and with them whatever could be computed before the loop.
template <class T>
INLINE void unknown(T &x) {
#ifdef __AVX512F__
  asm volatile("" : "+v"(x));
#elif defined(__ARM_NEON)
  if constexpr (sizeof(T) == 16) asm volatile("" : "+w"(x));
  else asm volatile("" : "+m"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

// The three instructions of products. Each returns the operations of one call: a product and a sum count as two.
struct Floats {
  using Sum = FloatSum;
  static constexpr double OPERATIONS = 2 * WIDTH;
  INLINE Sum step(Sum total, Words a, Words b) {
#ifdef __ARM_NEON
    return vfmaq_f32(total, (Sum)a, (Sum)b);
#else
    return fma((vf)a, (vf)b, total);
#endif
  }
};
struct Pairs {
  using Sum = FloatSum;
  static constexpr double OPERATIONS = 4 * WIDTH;
  INLINE Sum step(Sum total, Words a, Words b) {
#ifdef __ARM_NEON
    return arm_pairs(total, a, b);
#else
    return dot_pairs(total, a, b);
#endif
  }
};
struct Bytes {
  using Sum = WholeSum;
  static constexpr double OPERATIONS = 8 * WIDTH;
  INLINE Sum step(Sum total, Words a, Words b) {
#ifdef __ARM_NEON
    return arm_fours<false>(total, a, b);
#else
    return dot_bytes(total, a, b);
#endif
  }
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
    Words a = 0x3f803f80u - (Words){}, b = a;
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
