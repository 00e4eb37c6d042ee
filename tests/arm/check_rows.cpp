// Norms, sums, heads that are normed and rotated, and largest numbers against plain loops. Knows what each must give;
// must not know how rows are read.
#include "check.h"

namespace check {
namespace {

double inverse_root(const Numbers &x, int64_t first, int64_t count, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < count; i++) squares += x[first + i] * x[first + i];
  return 1 / std::sqrt(squares / (double)count + eps);
}

double allowed_for(double wanted, bool wide) { return std::fabs(wanted) * (wide ? 2e-6 : 0x1.02p-8) + 1e-7; }

void norm(const shoal::Kernels &kernels, bool wide, int64_t rows, int64_t columns, Report &report) {
  Random random((uint64_t)columns);
  Numbers x = noise(random, wide, rows * columns, 3.f), y(wide, rows * columns), alone(wide, columns);
  Numbers weight = noise(random, true, columns);
  const float *w = (const float *)weight.at(0);
  kernels.rms_norm(x.at(0), w, y.at(0), rows, columns, 1e-6f, wide);
  for (int64_t r = 0; r < rows; r++) {
    const double by = inverse_root(x, r * columns, columns, 1e-6);
    for (int64_t i = 0; i < columns; i++) {
      const double wanted = x[r * columns + i] * by * weight[i];
      report.near(y[r * columns + i], wanted, allowed_for(wanted, wide), r * columns + i);
    }
    kernels.rms_norm(x.at(r * columns), w, alone.at(0), 1, columns, 1e-6f, wide);
    report.expect(!memcmp(alone.at(0), y.at(r * columns), alone.bytes.size()), "bits depend on the company", r);
  }
}

void sums(const shoal::Kernels &kernels, bool wide, int64_t count, Report &report) {
  Random random((uint64_t)count + 1);
  Numbers x = noise(random, wide, count, 3.f), branch = noise(random, wide, count), y(wide, count);
  kernels.add(x.at(0), branch.at(0), 0.37f, y.at(0), count, wide);
  for (int64_t i = 0; i < count; i++) {
    const double wanted = x[i] + branch[i] * 0.37f;
    report.near(y[i], wanted, allowed_for(std::fabs(x[i]) + std::fabs(branch[i]), wide), i);
  }
}

// Queries and keys of rows [4 query heads | 2 key heads | 2 value heads], which `place` changes where they are.
void heads(const shoal::Kernels &kernels, bool wide, bool whole, int64_t width, int64_t rotated, Report &report) {
  const int64_t tokens = 21, row = 8 * width, positions = 50;
  Random random((uint64_t)width);
  Numbers before = noise(random, wide, tokens * row, 2.f), qkv = before;
  Numbers query_norm = noise(random, true, 4 * width), key_norm = noise(random, true, 2 * width);
  Numbers cosine = noise(random, true, positions * rotated), sine = noise(random, true, positions * rotated);
  const shoal::Kernels::Heads how = {4, rotated, (float *)cosine.at(0), (float *)sine.at(0), (float *)query_norm.at(0),
                                     (float *)key_norm.at(0), 1e-5f, whole};
  std::vector<char> keys((size_t)(8 * 64 * 512)), values(keys.size());
  const shoal::Pages pages = {keys.data(), values.data(), 1, 32, 2, width,
                              wide ? shoal::Kind::fp32 : shoal::Kind::bf16};
  std::vector<int64_t> position, slot;
  for (int64_t t = 0; t < tokens; t++) position.push_back((t * 7) % positions), slot.push_back(t + 3);
  kernels.place(qkv.at(0), how, pages, position.data(), slot.data(), tokens);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < 8; h++) {
      const int64_t at = t * row + h * width, first = h < 4 ? t * row : t * row + 4 * width;
      const Numbers &weight = h < 4 ? query_norm : key_norm;
      const int64_t kind = h < 4 ? h : h - 4;
      const double by = whole ? inverse_root(before, first, (h < 4 ? 4 : 2) * width, 1e-5)
                              : inverse_root(before, at, width, 1e-5);
      const auto normed = [&](int64_t i) {
        const double x = before[at + i] * by * weight[whole ? kind * width + i : i];
        return wide ? x : (double)widen(narrow((float)x));
      };
      for (int64_t i = 0; i < width; i++) {
        double wanted = h < 6 ? normed(i) : before[at + i], size = std::fabs(wanted);
        if (h < 6 && i < 2 * rotated) {
          const int64_t pair = i < rotated ? i + rotated : i - rotated;
          const int64_t of = position[(size_t)t] * rotated + i % rotated;
          const double other = normed(pair) * sine[of], own = wanted * cosine[of];
          wanted = i < rotated ? own - other : own + other, size = std::fabs(own) + std::fabs(other);
        }
        report.near(qkv[at + i], wanted, 2 * allowed_for(size, wide), at + i);
      }
    }
}

void largest(const shoal::Kernels &kernels, Report &report) {
  Random random(3);
  const int64_t columns[] = {1, 15, 64, 2049, 5000};
  for (const int64_t n : columns) {
    std::vector<float> x;
    for (int64_t i = 0; i < 3 * n; i++) x.push_back((float)random.below(50) - 60);
    if (n > 20) x[(size_t)(2 * n + 17)] = NAN;
    int64_t index[3];
    float value[3];
    kernels.largest(x.data(), index, value, 3, n);
    for (int64_t r = 0; r < 3; r++) {
      int64_t wanted = 0;
      for (int64_t i = 1; i < n; i++)
        if (const float best = x[(size_t)(r * n + wanted)]; x[(size_t)(r * n + i)] > best) wanted = i;
      if (r == 2 && n > 20) wanted = 17;
      report.expect(index[r] == wanted, "not the largest", n);
      report.expect(!memcmp(value + r, &x[(size_t)(r * n + wanted)], 4), "not its value", n);
    }
  }
}

}  // namespace

void rows_and_heads(const shoal::Kernels &kernels, Report &report) {
  for (const bool wide : {true, false}) {
    report.begin(std::string(kernels.name) + (wide ? " rows of fp32" : " rows of bf16"));
    for (const int64_t columns : {1, 15, 16, 64, 100, 896}) norm(kernels, wide, 5, columns, report);
    for (const int64_t count : {1, 16, 1003}) sums(kernels, wide, count, report);
    heads(kernels, wide, false, 64, 32, report);
    heads(kernels, wide, true, 40, 12, report);
    report.end();
  }
  report.begin(std::string(kernels.name) + " largest");
  largest(kernels, report);
}

}  // namespace check
