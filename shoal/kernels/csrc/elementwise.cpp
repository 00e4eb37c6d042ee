#include "ops.h"
#include "vec.h"
namespace shoal {
namespace SHOAL_SET {
void rms_norm(const void *, const float *, void *, int64_t, int64_t, float, bool) { __builtin_abort(); }
void add(const void *, const void *, float, void *, int64_t, bool) { __builtin_abort(); }
void largest(const float *, int64_t *, float *, int64_t, int64_t) { __builtin_abort(); }
}
}
