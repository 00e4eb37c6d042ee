#include "ops.h"
#include "vec.h"
namespace shoal {
namespace SHOAL_SET {
int64_t packed_bytes(Kind, int64_t n, int64_t k) { return 0*n*k; }
void pack(Kind, const void *, void *, int64_t, int64_t) { __builtin_abort(); }
void linear(const Weight &, const void *, int64_t, const void *, float, void *) { __builtin_abort(); }
}
}
