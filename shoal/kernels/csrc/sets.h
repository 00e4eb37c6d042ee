#pragma once
// Which tables this machine can run. Knows instruction sets by what the system says of the processor; must not know
// what is computed with them, nor who asks.
#include <vector>

#include "kernels.h"

namespace shoal {

// Best first; the last is the scalar one, which runs everywhere.
std::vector<const Kernels *> available();

}  // namespace shoal
