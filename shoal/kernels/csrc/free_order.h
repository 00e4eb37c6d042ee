#pragma once
// Whether sums may be made in whatever order is faster: only in the build that measures what the same bits in any
// company cost (SHOAL_FREE_ORDER in CMakeLists.txt). Knows the option, and no kernel.

namespace shoal {

#ifdef SHOAL_FREE_ORDER
constexpr bool FREE_ORDER = true;
#else
constexpr bool FREE_ORDER = false;
#endif

}  // namespace shoal
