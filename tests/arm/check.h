#pragma once
// Numbers to check kernels with, and the counting of what is wrong. Knows numbers and names of checks; must not know
// any kernel.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace check {

// The same numbers on every machine.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(bits() % (uint64_t)n); }
  double uniform() { return (double)(bits() >> 11) * 0x1p-53; }
  float noise() {  // about normal
    double sum = 0;
    for (int i = 0; i < 6; i++) sum += uniform();
    return (float)((sum - 3) * 1.4);
  }
};

inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// To the nearest of the bf16 below and above, ties to the even one; by comparison, unlike the kernels.
inline uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t toward = (uint16_t)(bits >> 16), away = (uint16_t)(toward + 1);
  const double low = std::fabs((double)x - widen(toward)), high = std::fabs((double)widen(away) - x);
  return low < high || (low == high && toward % 2 == 0) ? toward : away;
}

// Numbers as a kernel takes them: floats, or bf16.
struct Numbers {
  bool wide;
  std::vector<char> bytes;
  Numbers(bool wide, int64_t count, int fill = 0x5a) : wide(wide), bytes((size_t)(count * size()), (char)fill) {}
  int64_t size() const { return wide ? 4 : 2; }
  void *at(int64_t i) { return bytes.data() + i * size(); }
  void set(int64_t i, float x) {
    const uint16_t rounded = narrow(x);
    memcpy(at(i), wide ? (const void *)&x : (const void *)&rounded, (size_t)size());
  }
  double operator[](int64_t i) const {
    float x;
    uint16_t rounded;
    const char *from = bytes.data() + i * size();
    if (wide) memcpy(&x, from, 4);
    else memcpy(&rounded, from, 2), x = widen(rounded);
    return x;
  }
};

inline Numbers noise(Random &random, bool wide, int64_t count, float scale = 1.f) {
  Numbers out(wide, count);
  for (int64_t i = 0; i < count; i++) out.set(i, random.noise() * scale);
  return out;
}

struct Report {
  int64_t held = 0, failed = 0;
  double worst = 0;  // of the present check, as a share of what is allowed
  std::string where;

  void begin(const std::string &name) { where = name, worst = 0; }
  void expect(bool good, const char *what, int64_t at) {
    good ? held++ : failed++;
    if (!good && failed <= 20) printf("FAILED %s: %s at %lld\n", where.c_str(), what, (long long)at);
  }
  void near(double found, double wanted, double allowed, int64_t at) {
    const double share = std::fabs(found - wanted) / allowed;
    if (share > worst) worst = share;
    const bool good = share <= 1;
    if (!good && failed <= 20) printf("%.9g instead of %.9g, allowed %.3g\n", found, wanted, allowed);
    expect(good, "far from the plain loop", at);
  }
  void end() { printf("%-44s %.3f of what is allowed\n", where.c_str(), worst); }
};

void linear_layers(const shoal::Kernels &, Report &);
void rows_and_heads(const shoal::Kernels &, Report &);
void attention(const shoal::Kernels &, Report &);
void sampling(const shoal::Kernels &, Report &);

}  // namespace check
