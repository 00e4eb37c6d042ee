// The table of one instruction set, compiled once for each with SHOAL_SET as its name. Knows no arithmetic.
#include <cstdlib>

#include "ops.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace shoal {
namespace SHOAL_SET {

void *scratch(int64_t bytes) {
  static thread_local void *memory = nullptr;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    free(memory);
    size = (bytes + 4095) & ~(int64_t)4095;
    memory = aligned_alloc(4096, size);
    if (!memory) abort();  // no step can go on, and its rows are run again by another engine
  }
  return memory;
}

}  // namespace SHOAL_SET

extern const Kernels JOIN(kernels_, SHOAL_SET);
const Kernels JOIN(kernels_, SHOAL_SET) = {
    TEXT(SHOAL_SET),         SHOAL_SET::packed_bytes, SHOAL_SET::pack,      SHOAL_SET::linear,
    SHOAL_SET::add_deltas,   SHOAL_SET::gated_with,   SHOAL_SET::gated_rows, SHOAL_SET::rms_norm,
    SHOAL_SET::layer_norm,   SHOAL_SET::gelu,         SHOAL_SET::gather,
    SHOAL_SET::add,          SHOAL_SET::place,        SHOAL_SET::attention, SHOAL_SET::move,   SHOAL_SET::largest,
    SHOAL_SET::forbid,       SHOAL_SET::draw,         SHOAL_SET::score,
    SHOAL_SET::peak,         SHOAL_SET::read,
};

}  // namespace shoal
