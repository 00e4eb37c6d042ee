// Attention over pages against plain loops in double, the same tokens in steps of several kinds. Knows sequences, keys
// and values; must not know how pages are laid out.
#include <algorithm>

#include "check.h"
#include "plan.h"

namespace check {
namespace {

using shoal::Kind;

struct Rules {
  Kind kind;
  int64_t group, kv_heads, width, window;
  float softcap;
};

// Sequences of one step. The pages that hold the first `shared` positions of all of them are the same.
struct Step {
  std::vector<int64_t> length, fresh;  // positions, and how many of them are new tokens
  int64_t shared;
};

constexpr int64_t PAGE = 32;

class Case {
 public:
  Case(const shoal::Kernels &kernels, const Rules &rules, const Step &step, Random &random)
      : kernels(kernels), rules(rules), step(step), wide(rules.kind == Kind::fp32), heads(rules.group * rules.kv_heads),
        row((heads + 2 * rules.kv_heads) * rules.width), qkv(wide, 0), out(wide, 0) {
    for (const int64_t length : step.length) row_length = std::max(row_length, (length + PAGE - 1) / PAGE);
    deal(random);
    fill(random);
  }

  void compare(Report &report) {
    std::vector<int64_t> all;
    for (size_t n = 0; n < step.length.size(); n++) all.push_back((int64_t)n);
    out = attend(all, true);
    for (size_t n = 0; n < step.length.size(); n++) compare_sequence(n, report);
    const Numbers apart = attend(all, false);
    report.expect(apart.bytes == out.bytes, "bits depend on sharing", 0);
    for (const int64_t n : all) {
      const Numbers alone = attend({n}, true);
      report.expect(!memcmp(alone.bytes.data(), out.at(first[(size_t)n] * heads * rules.width), alone.bytes.size()),
                    "bits depend on the company", n);
    }
  }

 private:
  // Page numbers, in no order.
  void deal(Random &random) {
    std::vector<int32_t> deck;
    pages = (int64_t)step.length.size() * row_length + 2;
    for (int64_t i = 0; i < pages; i++) deck.push_back((int32_t)i);
    for (size_t i = deck.size(); i > 1; i--) std::swap(deck[i - 1], deck[(size_t)random.below((int64_t)i)]);
    for (size_t n = 0; n < step.length.size(); n++)
      for (int64_t b = 0; b < row_length; b++) {
        const bool common = n && (b + 1) * PAGE <= step.shared;
        table.push_back(common ? table[(size_t)b] : deck.back());
        if (!common) deck.pop_back();
      }
  }

  // All positions of all sequences into the pages, which hold NaN before.
  void fill(Random &random) {
    const int64_t padded = (rules.width + 31) / 32 * 32;
    const size_t bytes = (size_t)(pages * rules.kv_heads * PAGE * (padded + 4) * 4);
    keys.assign(bytes, (char)255), values.assign(bytes, (char)255);
    cache = {keys.data(), values.data(), pages, PAGE, rules.kv_heads, rules.width, rules.kind};
    const shoal::Kernels::Heads how = {heads, 0, nullptr, nullptr, nullptr, nullptr, 0.f, false};
    for (size_t n = 0; n < step.length.size(); n++) {
      Numbers rows = noise(random, wide, step.length[n] * row, 1.5f);
      const int64_t same = n ? std::min(step.shared / PAGE * PAGE, step.length[n]) : 0;
      if (same) memcpy(rows.at(0), all[0].at(0), (size_t)(same * row * rows.size()));
      std::vector<int64_t> position, slot;
      for (int64_t p = 0; p < step.length[n]; p++) {
        position.push_back(p);
        slot.push_back(table[n * (size_t)row_length + (size_t)(p / PAGE)] * PAGE + p % PAGE);
      }
      Numbers given = rows;
      kernels.place(given.at(0), how, cache, position.data(), slot.data(), step.length[n]);
      first.push_back(tokens), tokens += step.fresh[n];
      const char *from = (const char *)rows.at((step.length[n] - step.fresh[n]) * row);
      qkv.bytes.insert(qkv.bytes.end(), from, from + step.fresh[n] * row * rows.size());
      all.push_back(rows);
    }
  }

  // The outputs of these sequences' new tokens in one step.
  Numbers attend(const std::vector<int64_t> &which, bool share) {
    std::vector<int64_t> start = {0}, length;
    std::vector<int32_t> rows;
    Numbers q(wide, 0);
    for (const int64_t n : which) {
      const size_t s = (size_t)n;
      start.push_back(start.back() + step.fresh[s]), length.push_back(step.length[s]);
      const int32_t *from = table.data() + s * (size_t)row_length;
      rows.insert(rows.end(), from, from + row_length);
      const char *at = (const char *)qkv.at(first[s] * row);
      q.bytes.insert(q.bytes.end(), at, at + step.fresh[s] * row * q.size());
    }
    const shoal::Plan plan(start.data(), length.data(), rows.data(), (int64_t)which.size(), row_length, PAGE, pages,
                           share);
    const int64_t padded = (rules.width + 31) / 32 * 32;
    std::vector<float> states((size_t)(start.back() * heads * (padded + 2)), NAN);
    Numbers y(wide, start.back() * heads * rules.width, 255);
    kernels.attention(plan.work(), cache, q.at(0), row, heads, scale(), rules.window, rules.softcap, states.data(),
                      y.at(0));
    return y;
  }

  float scale() const { return 1.f / std::sqrt((float)rules.width); }

  void compare_sequence(size_t n, Report &report) {
    const Numbers &rows = all[n];
    const int64_t width = rules.width;
    for (int64_t i = 0; i < step.fresh[n]; i++)
      for (int64_t h = 0; h < heads; h++) {
        const int64_t last = step.length[n] - step.fresh[n] + i, kv = h / rules.group;
        const int64_t begin = rules.window ? std::max<int64_t>(0, last - rules.window + 1) : 0;
        std::vector<double> weight, mean((size_t)width);
        double total = 0, size = 0;
        for (int64_t p = begin; p <= last; p++) {
          double product = 0;
          for (int64_t d = 0; d < width; d++)
            product += rows[last * row + h * width + d] * rows[p * row + (heads + kv) * width + d];
          product *= scale();
          if (rules.softcap != 0.f) product = rules.softcap * std::tanh(product / rules.softcap);
          weight.push_back(std::exp(product)), total += weight.back();
        }
        for (int64_t p = begin; p <= last; p++)
          for (int64_t d = 0; d < width; d++) {
            const double v = rows[p * row + (heads + rules.kv_heads + kv) * width + d];
            mean[(size_t)d] += weight[(size_t)(p - begin)] / total * v;
            size = std::max(size, std::fabs(v));
          }
        const double precision = rules.kind == Kind::fp32 ? 2e-6 : rules.kind == Kind::bf16 ? 0x1p-8 : 0.02;
        for (int64_t d = 0; d < width; d++) {
          const int64_t at = ((first[n] + i) * heads + h) * width + d;
          report.near(out[at], mean[(size_t)d], precision * size, at);
        }
      }
  }

  const shoal::Kernels &kernels;
  const Rules &rules;
  const Step &step;
  bool wide;
  int64_t heads, row, row_length = 0, pages = 0, tokens = 0;
  std::vector<int32_t> table;
  std::vector<int64_t> first;
  std::vector<char> keys, values;
  shoal::Pages cache;
  std::vector<Numbers> all;  // rows of every position, by sequence
  Numbers qkv, out;          // of the new tokens
};

}  // namespace

void attention(const shoal::Kernels &kernels, Report &report) {
  const Step decodes = {{300, 290, 17, 33, 1, 260, 289}, {1, 1, 1, 1, 1, 1, 1}, 0};
  const Step shared = {{300, 290, 271, 600}, {1, 3, 11, 2}, 256};
  const Step prompt = {{45, 40}, {45, 5}, 0};
  const Kind kinds[] = {Kind::fp32, Kind::bf16, Kind::int8};
  const char *const names[] = {" attention fp32", " attention bf16", " attention int8"};
  for (int i = 0; i < 3; i++) {
    report.begin(std::string(kernels.name) + names[i]);
    Random random((uint64_t)i + 11);
    Case(kernels, {kinds[i], 7, 1, 64, 0, 0.f}, decodes, random).compare(report);
    Case(kernels, {kinds[i], 2, 2, 32, 0, 0.f}, shared, random).compare(report);
    Case(kernels, {kinds[i], 3, 1, 40, 100, 0.f}, shared, random).compare(report);
    Case(kernels, {kinds[i], 1, 2, 24, 0, 5.f}, prompt, random).compare(report);
    Case(kernels, {kinds[i], 1, 1, 96, 20, 3.f}, prompt, random).compare(report);
    report.end();
  }
}

}  // namespace check
