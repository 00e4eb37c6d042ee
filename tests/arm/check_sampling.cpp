// Draws, scores and masks against plain loops that sort: the same tokens and weights to the bit. Knows what a weight is
// (sampling.cpp says it); must not know buckets or blocks.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

double exponential(float z) {
  z = z > -80.f ? z : -80.f;
  const float whole = std::nearbyint(z * 1.44269504f);
  const float f = (z - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float q = f * 0.0013814539f + 0.008368745f;
  q = q * f + 0.04166839f;
  q = q * f + 0.16666521f;
  q = q * f + 0.49999994f;
  const float p = (q * (f * f) + f) + 1.f;
  return std::ldexp((double)p, (int)whole);
}

int64_t weight_of(float z) { return (int64_t)(exponential(z) * 0x1p40); }

// The smallest exponent that top-k and, of what that leaves, top-p keep.
float edge_of(std::vector<float> z, int64_t top_k, double top_p) {
  std::sort(z.begin(), z.end(), std::greater<float>());
  float edge = top_k > 0 && top_k < (int64_t)z.size() ? z[(size_t)top_k - 1] : -INFINITY;
  if (top_p >= 1) return edge;
  int64_t total = 0, sum = 0;
  for (const float x : z) total += x >= edge ? weight_of(x) : 0;
  const double need = std::ceil(top_p * (double)total);
  for (const float x : z) {
    edge = x, sum += weight_of(x);
    if ((double)sum >= need) break;
  }
  return edge;
}

void draws(const shoal::Kernels &kernels, const std::vector<float> &x, int64_t rows, int64_t columns, Random &random,
           Report &report) {
  std::vector<int64_t> row, top_k, token;
  std::vector<uint64_t> number;
  std::vector<float> best, heat, min_p;
  std::vector<double> top_p;
  for (int64_t i = 0; i < 4 * rows; i++) {
    row.push_back(i % rows), number.push_back(random.bits()), heat.push_back((float)(0.2 + 2 * random.uniform()));
    best.push_back(*std::max_element(x.begin() + row.back() * columns, x.begin() + (row.back() + 1) * columns));
    top_k.push_back(i / rows % 2 ? 1 + random.below(40) : 0);
    top_p.push_back(i / rows > 1 ? 0.05 + 0.9 * random.uniform() : 1);
    min_p.push_back(i % 3 ? 0.f : 0.02f);
  }
  token.assign(row.size(), -1);
  const shoal::Draws draws = {(int64_t)row.size(), row.data(),   number.data(), best.data(),
                              heat.data(),         top_k.data(), top_p.data(),  min_p.data()};
  kernels.draw(x.data(), columns, draws, token.data());
  for (size_t i = 0; i < row.size(); i++) {
    std::vector<float> z;
    for (int64_t v = 0; v < columns; v++) z.push_back((x[(size_t)(row[i] * columns + v)] - best[i]) / heat[i]);
    const float edge = edge_of(z, top_k[i], top_p[i]);
    const auto weight = [&](float each) { return each >= edge && exponential(each) >= min_p[i] ? weight_of(each) : 0; };
    uint64_t total = 0;
    for (const float each : z) total += (uint64_t)weight(each);
    int64_t place = (int64_t)((unsigned __int128)number[i] * total >> 64), wanted = 0;
    while (wanted < columns && (place -= weight(z[(size_t)wanted])) >= 0) wanted++;
    report.expect(token[i] == wanted, "another token was drawn", (int64_t)i);
  }
}

void scores(const shoal::Kernels &kernels, const std::vector<float> &x, int64_t rows, int64_t columns, Random &random,
            Report &report) {
  const int64_t top = std::min<int64_t>(columns, 5);
  std::vector<int64_t> row, token, weight((size_t)rows), rank((size_t)rows), ids((size_t)(rows * top));
  std::vector<float> best((size_t)rows), value((size_t)rows), values((size_t)(rows * top));
  for (int64_t r = 0; r < rows; r++) row.push_back(r), token.push_back(random.below(columns));
  kernels.score(x.data(), columns, {rows, top, row.data(), token.data(), best.data(), value.data(), weight.data(),
                                    rank.data(), ids.data(), values.data()});
  for (int64_t r = 0; r < rows; r++) {
    const float *at = x.data() + r * columns;
    std::vector<int64_t> order;
    for (int64_t v = 0; v < columns; v++) order.push_back(v);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return at[a] > at[b]; });
    int64_t sum = 0;
    for (int64_t v = 0; v < columns; v++) sum += weight_of(at[v] - at[order[0]]);
    const size_t i = (size_t)r;
    report.expect(best[i] == at[order[0]] && value[i] == at[token[i]] && weight[i] == sum, "another weight", r);
    report.expect(order[(size_t)rank[i] - 1] == token[i], "another rank", r);
    for (int64_t k = 0; k < top; k++)
      report.expect(ids[(size_t)(r * top + k)] == order[(size_t)k], "not among the best", k);
  }
}

void masks(const shoal::Kernels &kernels, std::vector<float> x, int64_t columns, Random &random, Report &report) {
  const std::vector<float> before = x;
  const int64_t row = 1, words = (columns + 31) / 32;
  std::vector<uint32_t> bits;
  for (int64_t i = 0; i < words; i++) bits.push_back((uint32_t)random.bits());
  kernels.forbid(x.data(), columns, &row, bits.data(), 1);
  for (int64_t i = 0; i < (int64_t)x.size(); i++) {
    const int64_t v = i - columns;
    const bool hidden = v >= 0 && v < columns && !(bits[(size_t)(v / 32)] >> v % 32 & 1);
    report.expect(x[(size_t)i] == (hidden ? -INFINITY : before[(size_t)i]), "a mask went wrong", i);
  }
}

}  // namespace

void sampling(const shoal::Kernels &kernels, Report &report) {
  report.begin(std::string(kernels.name) + " sampling");
  Random random(17);
  for (const int64_t columns : {5, 16, 37, 2049, 5003}) {
    const int64_t rows = 4;
    std::vector<float> x;
    for (int64_t i = 0; i < rows * columns; i++) x.push_back(random.noise() * 3 + (float)random.below(2));
    for (int64_t i = 0; i < columns; i += 3) x[(size_t)i] = x[0];  // equals
    draws(kernels, x, rows, columns, random, report);
    scores(kernels, x, rows, columns, random, report);
    masks(kernels, x, columns, random, report);
  }
}

}  // namespace check
