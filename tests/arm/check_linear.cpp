// Linear layers against plain loops in double, each row in companies of 1 to 40. Knows what a layer must give; must not
// know panels or tiles.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

using shoal::Gate;
using shoal::Kind;

const char *const KINDS[] = {"fp32", "bf16", "int8", "int4", "int4-a16"};
constexpr int64_t GUARD = 64;

struct Case {
  Kind kind;
  Gate gate;
  int64_t n, k, group;
  bool bias, residual, wide;
};

struct Packed {
  std::vector<double> dense;  // [n][k]
  std::vector<char> panels;
  std::vector<float> scale, zero, bias;
  std::vector<uint16_t> group_scale;
  std::vector<uint8_t> group_zero;
  shoal::Weight weight;
};

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

Packed make_weight(const shoal::Kernels &kernels, const Case &c, Random &random) {
  Packed p;
  const int64_t panels = up(c.n, shoal::PANEL), padded = panels * shoal::PANEL, groups = up(c.k, c.group);
  p.dense.resize((size_t)(c.n * c.k));
  p.panels.resize((size_t)kernels.packed_bytes(c.kind, c.n, c.k));
  p.scale.resize((size_t)padded), p.zero.resize((size_t)padded), p.bias.resize((size_t)padded);
  p.group_scale.resize((size_t)(padded * groups)), p.group_zero.resize((size_t)(padded * groups));
  const auto at = [&](int64_t o, int64_t g) { return (size_t)((o / 32 * groups + g) * 32 + o % 32); };
  const bool wide = c.kind == Kind::fp32, plain = wide || c.kind == Kind::bf16;
  Numbers numbers = noise(random, wide, c.n * c.k);
  std::vector<uint8_t> whole((size_t)(c.n * c.k));
  for (int64_t o = 0; o < padded; o++) {
    p.scale[(size_t)o] = o < c.n ? (float)(random.uniform() / 100 + 0.001) : 0.f;
    p.bias[(size_t)o] = random.noise();
    for (int64_t g = 0; g < groups; g++) {
      p.group_scale[at(o, g)] = narrow((float)(random.uniform() / 8 + 0.01));
      p.group_zero[at(o, g)] = (uint8_t)random.below(16);
    }
  }
  for (int64_t i = 0; i < c.n * c.k; i++) {
    const int64_t o = i / c.k, g = i % c.k / c.group;
    double &w = p.dense[(size_t)i];
    if (plain) {
      w = numbers[i];
    } else if (c.kind == Kind::int8) {
      const int64_t q = random.below(255) - 127;
      whole[(size_t)i] = (uint8_t)q, p.zero[(size_t)o] += (float)q;
      w = (double)q * p.scale[(size_t)o];
    } else {
      whole[(size_t)i] = (uint8_t)random.below(16);
      w = ((double)whole[(size_t)i] - p.group_zero[at(o, g)]) * widen(p.group_scale[at(o, g)]);
    }
  }
  kernels.pack(c.kind, plain ? numbers.at(0) : (void *)whole.data(), p.panels.data(), c.n, c.k);
  const bool int8 = c.kind == Kind::int8;
  p.weight = {c.kind, c.gate, c.n, c.k, c.gate == Gate::none ? c.n : c.n / 2, c.group, p.panels.data(),
              int8 ? (const void *)p.scale.data() : p.group_scale.data(),
              int8 ? (const void *)p.zero.data() : p.group_zero.data(), c.bias ? p.bias.data() : nullptr, c.wide};
  return p;
}

// A row as it is multiplied: rounded to 127ths of its largest number, or of each group's.
std::vector<double> seen_row(const Case &c, const Numbers &x, int64_t row) {
  std::vector<double> out;
  const int64_t group = c.kind == Kind::int8 ? c.k : c.group;
  for (int64_t i = 0; i < c.k; i++) out.push_back(x[row * c.k + i]);
  if (c.kind != Kind::int8 && c.kind != Kind::int4) return out;
  for (int64_t g = 0; g < c.k; g += group) {
    float top = 0;
    const int64_t end = g + group < c.k ? g + group : c.k;
    for (int64_t i = g; i < end; i++) top = std::fmax(top, (float)std::fabs(out[(size_t)i]));
    const float by = 127.f / top;
    for (int64_t i = g; i < end; i++)
      out[(size_t)i] = (double)std::nearbyint((float)out[(size_t)i] * by) * (double)(top / 127.f);
  }
  return out;
}

double activate(Gate gate, double v) {
  if (gate == Gate::silu) return v / (1 + std::exp(-v));
  return v / 2 * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
}

// Sums of a row with their magnitudes, by output of the weight.
void sum_row(const Case &c, const Packed &p, const std::vector<double> &x, std::vector<double> &sum,
             std::vector<double> &size) {
  for (int64_t o = 0; o < c.n; o++) {
    double s = c.bias ? p.bias[(size_t)o] : 0, m = std::fabs(s);
    for (int64_t i = 0; i < c.k; i++) {
      const double product = x[(size_t)i] * p.dense[(size_t)(o * c.k + i)];
      // (sum of q) - zero * (sum of x) is what is computed: each of them may be larger than the difference
      s += product, m += std::fabs(product) + (c.group < c.k ? 0.1 * std::fabs(x[(size_t)i]) : 0);
    }
    sum[(size_t)o] = s, size[(size_t)o] = m;
  }
}

void compare_row(const Case &c, const Packed &p, const Numbers &x, const Numbers &residual, const Numbers &y,
                 float factor, int64_t row, Report &report) {
  std::vector<double> sum((size_t)c.n), size((size_t)c.n);
  sum_row(c, p, seen_row(c, x, row), sum, size);
  const int64_t columns = p.weight.outputs;
  const double precision = 3e-6, output = y.wide ? 0 : 0x1p-8;
  for (int64_t o = 0; o < columns; o++) {
    const int64_t at = row * columns + o;
    double wanted, allowed;
    if (c.gate == Gate::none) {
      wanted = sum[(size_t)o] * factor, allowed = size[(size_t)o] * precision;
      if (c.residual) wanted += residual[at], allowed += std::fabs(residual[at]) * precision;
    } else {
      const int64_t gate = o / 32 * 64 + o % 32, other = gate + 32;
      const double g = activate(c.gate, sum[(size_t)gate]), u = sum[(size_t)other];
      wanted = g * u;
      allowed = 2 * size[(size_t)gate] * std::fabs(u) + size[(size_t)other] * std::fabs(g) + std::fabs(wanted);
      allowed *= precision;
    }
    report.near(y[GUARD + at], wanted, allowed + std::fabs(wanted) * output + 1e-30, at);
  }
}

void run_case(const shoal::Kernels &kernels, const Case &c, int64_t most, Report &report) {
  Random random((uint64_t)(c.n * 1009 + c.k * 7 + (int)c.kind));
  const Packed p = make_weight(kernels, c, random);
  const int64_t columns = p.weight.outputs;
  const bool wide = c.kind == Kind::fp32, wide_out = wide || c.wide;
  Numbers x = noise(random, wide, most * c.k, 2.f), residual = noise(random, wide_out, most * columns, 5.f);
  const float factor = c.residual ? 0.5f : 1.f;
  Numbers all(wide_out, most * columns + 2 * GUARD);
  const auto run = [&](int64_t row, int64_t rows, Numbers &y) {
    kernels.linear(p.weight, x.at(row * c.k), rows, c.residual ? residual.at(row * columns) : nullptr, factor,
                   y.at(GUARD));
  };
  run(0, most, all);
  for (int64_t row = 0; row < most; row++) compare_row(c, p, x, residual, all, factor, row, report);
  const Numbers guard(wide_out, GUARD);
  for (int64_t rows = 1; rows <= most; rows++) {
    const int64_t first = rows == 1 ? most / 2 : most - rows;
    Numbers some(wide_out, rows * columns + 2 * GUARD);
    run(first, rows, some);
    report.expect(!memcmp(some.at(GUARD), all.at(GUARD + first * columns), (size_t)(rows * columns * some.size())),
                  "bits depend on the company", rows);
    report.expect(!memcmp(some.at(0), guard.bytes.data(), (size_t)(GUARD * some.size())) &&
                      !memcmp(some.at(GUARD + rows * columns), guard.bytes.data(), (size_t)(GUARD * some.size())),
                  "wrote beyond its outputs", rows);
  }
}

// Sums that are exact, and lie between two bf16 or beyond them all.
void round_sums(const shoal::Kernels &kernels, Report &report) {
  report.begin(std::string(kernels.name) + " sums to bf16");
  const Case c = {Kind::bf16, Gate::none, 256, 2, 2, true, false, false};
  Random random(5);
  Packed p = make_weight(kernels, c, random);
  Numbers numbers(false, c.n * 2);
  for (int64_t o = 0; o < c.n; o++) {
    const float number = (float)(128 + o % 128), part = (float)(o / 128 * 2 - 1);
    numbers.set(2 * o, o % 2 ? -number : number), numbers.set(2 * o + 1, part);
  }
  kernels.pack(c.kind, numbers.at(0), p.panels.data(), c.n, c.k);
  std::fill(p.bias.begin(), p.bias.end(), 0.f);
  memset(&p.bias[10], 0xff, 4), p.bias[9] = -p.bias[10];  // a carry would make them zeros
  const float parts[] = {0.5f, 0.25f, 0.75f, 0.f, INFINITY, NAN};
  for (const float part : parts) {
    Numbers x(false, 2), y(false, c.n);
    x.set(0, 1.f), x.set(1, part == part ? part : 0.f);
    if (part == INFINITY) x.set(1, 0.f), x.bytes[3] = 0x7f, x.bytes[2] = (char)0x80;
    if (part != part) x.bytes[3] = 0x7f, x.bytes[2] = (char)0xc0;
    kernels.linear(p.weight, x.at(0), 1, nullptr, 1.f, y.at(0));
    for (int64_t o = 0; o < c.n; o++) {
      const double exact = numbers[2 * o] * x[0] + numbers[2 * o + 1] * x[1] + p.bias[(size_t)o];
      uint16_t found;
      memcpy(&found, y.at(o), 2);
      if (exact != exact) report.expect(y[o] != y[o], "a NaN became a number", o);
      else if (std::isinf(exact)) report.expect(y[o] == exact, "an infinity became something else", o);
      else report.expect(found == narrow((float)exact), "not the nearest bf16", o);
    }
  }
}

}  // namespace

void linear_layers(const shoal::Kernels &kernels, Report &report) {
  for (int kind = 0; kind < 5; kind++) {
    const Kind k = (Kind)kind;
    report.begin(std::string(kernels.name) + " linear " + KINDS[kind]);
    run_case(kernels, {k, Gate::none, 70, 100, 64, true, true, false}, 40, report);
    run_case(kernels, {k, Gate::none, 33, 7, 64, false, false, true}, 5, report);
    run_case(kernels, {k, Gate::none, 1, 1, 64, true, false, false}, 13, report);
    run_case(kernels, {k, Gate::none, 96, 515, 128, false, true, true}, 14, report);
    run_case(kernels, {k, Gate::silu, 128, 72, 64, true, false, false}, 25, report);
    run_case(kernels, {k, Gate::gelu, 64, 130, 64, false, false, false}, 3, report);
    report.end();
  }
  round_sums(kernels, report);
}

}  // namespace check
