#pragma once
// Which tokens read which position tiles together, found once per step from the page tables. Knows rows, positions and
// page numbers; must not know keys, values or heads.
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace shoal {

struct Plan {
  // Sequence n has tokens start[n] to start[n + 1], the last one at position length[n] - 1, and the pages of row n of
  // the table. `share` off gives every sequence a segment of its own: the control.
  Plan(const int64_t *start, const int64_t *length, const int32_t *table, int64_t rows, int64_t row_length,
       int64_t page_size, int64_t num_pages, bool share);

  Work work() const;

  std::vector<Segment> segments;
  std::vector<int32_t> level_ends, order, position, table;
  int64_t row_length;
};

}  // namespace shoal
