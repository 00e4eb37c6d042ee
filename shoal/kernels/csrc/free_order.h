#pragma once
// Whether sums may be made in whatever order is faster: only in the build that measures what the same bits in any
// company cost (SHOAL_FREE_ORDER in CMakeLists.txt). Knows the option, and no kernel.

#ifndef FREE_LEVELS
#define FREE_LEVELS 1
#endif
#ifndef FREE_MAX
#define FREE_MAX 1
#endif
namespace shoal {

#ifdef SHOAL_FREE_ORDER
constexpr bool FREE_ORDER = true;
#else
constexpr bool FREE_ORDER = false;
#endif

}  // namespace shoal
