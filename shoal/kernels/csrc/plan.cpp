// Finds the shared runs of a step. Knows rows, positions and page numbers; must not know keys, values or heads.
//
// Sequences are sorted by their page tables, so that those which share pages are neighbours. The whole tiles that all
// of a group of neighbours have in common, and that all its tokens see, are one segment; what is left of the group is
// cut where neighbours part, and so on downwards. A sequence's own rest ends each branch:
//
//   tiles   0 1 2 3 4 5
//   row a   [ run 1 ][ a's own        level 0: run 1
//   row b   [ run 1 ][run 2][ b's     level 1: a's own, run 2
//   row c   [ run 1 ][run 2][ c's     level 2: b's own, c's own
//
// A tile's partial and the order of folding do not depend on who shares it, so neither do the bits of the result.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace shoal {
namespace {

struct Row {
  int64_t first, count;  // its tokens in `order`
  int64_t sequence;
  int64_t seen;   // whole tiles that its first token sees
  int64_t tiles;  // that its last token sees, the last one in part
  int64_t common; // whole tiles in common with the row before, which both rows' tokens see
};

class Builder {
 public:
  Builder(Plan &plan, const std::vector<Row> &rows) : plan(plan), rows(rows) {}

  // Rows a <= i < b have their first `begin` tiles in common, and segments of lower levels have dealt with those.
  void cut(size_t a, size_t b, int64_t begin, size_t level) {
    if (b - a == 1) return emit(level, a, b, begin, rows[a].tiles, false);
    int64_t end = rows[a + 1].common;
    for (size_t i = a + 1; i < b; i++) end = std::min(end, rows[i].common);
    if (end > begin) emit(level++, a, b, begin, end, true);
    for (size_t from = a, i = a + 1; i <= b; i++)
      if (i == b || rows[i].common == end) cut(from, i, std::max(begin, end), level), from = i;
  }

  void finish() {
    for (auto &level : levels) {
      plan.segments.insert(plan.segments.end(), level.begin(), level.end());
      plan.level_ends.push_back((int32_t)plan.segments.size());
    }
  }

 private:
  void emit(size_t level, size_t a, size_t b, int64_t begin, int64_t end, bool keep) {
    if (levels.size() <= level) levels.resize(level + 1);
    const Row &last = rows[b - 1];
    levels[level].push_back({(int32_t)rows[a].first, (int32_t)(last.first + last.count - rows[a].first),
                             (int32_t)rows[a].sequence, (int32_t)begin, (int32_t)end, begin > 0, keep});
  }

  Plan &plan;
  const std::vector<Row> &rows;
  std::vector<std::vector<Segment>> levels;
};

}  // namespace

Plan::Plan(const int64_t *start, const int64_t *length, const int32_t *pages, int64_t num_rows, int64_t row_length,
           int64_t page_size, int64_t num_pages, bool share)
    : table(pages, pages + num_rows * row_length), row_length(row_length) {
  const int64_t per_tile = TILE / page_size;
  std::vector<int64_t> sorted(num_rows);
  std::iota(sorted.begin(), sorted.end(), 0);
  auto used = [&](int64_t n) { return (length[n] + page_size - 1) / page_size; };
  for (int64_t n = 0; n < num_rows; n++) {
    if (used(n) > row_length || length[n] < start[n + 1] - start[n] || start[n + 1] <= start[n])
      throw std::invalid_argument("a sequence is empty or longer than its pages");
    for (int64_t b = 0; b < used(n); b++)
      if (pages[n * row_length + b] < 0 || pages[n * row_length + b] >= num_pages)
        throw std::invalid_argument("a page table names a page that does not exist");
  }
  auto before = [&](int64_t a, int64_t b) {
    const int32_t *x = pages + a * row_length, *y = pages + b * row_length;
    return std::lexicographical_compare(x, x + used(a), y, y + used(b));
  };
  if (share && !std::is_sorted(sorted.begin(), sorted.end(), before))
    std::stable_sort(sorted.begin(), sorted.end(), before);
  position.resize(start[num_rows]);
  order.reserve(start[num_rows]);
  std::vector<Row> rows;
  for (int64_t n : sorted) {
    const int64_t count = start[n + 1] - start[n], zero = length[n] - count;
    Row row = {(int64_t)order.size(), count, n, (zero + 1) / TILE, (length[n] + TILE - 1) / TILE, 0};
    for (int64_t i = 0; i < count; i++) {
      order.push_back((int32_t)(start[n] + i));
      position[start[n] + i] = (int32_t)(zero + i);
    }
    if (share && !rows.empty()) {
      const Row &other = rows.back();
      const int32_t *x = pages + n * row_length, *y = pages + other.sequence * row_length;
      const int64_t limit = std::min(row.seen, other.seen) * per_tile;
      row.common = (std::mismatch(x, x + limit, y).first - x) / per_tile;
    }
    rows.push_back(row);
  }
  Builder builder(*this, rows);
  if (share && num_rows) builder.cut(0, rows.size(), 0, 0);
  for (size_t i = 0; !share && i < rows.size(); i++) builder.cut(i, i + 1, 0, 0);
  builder.finish();
}

Work Plan::work() const {
  return {segments.data(), level_ends.data(), (int64_t)level_ends.size(), (int64_t)order.size(),
          order.data(),    position.data(),   table.data(),                row_length};
}

}  // namespace shoal
