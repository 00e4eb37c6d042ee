// Asks the processor, or the system where only that may ask. Each question is for all that CMakeLists.txt
// lets a set use.
#include "sets.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace shoal {

#if defined(__aarch64__)
namespace {

// Whether pairs of bf16 and fours of bytes can be multiplied. Linux's bits by number: older headers lack their names.
bool multiplies_pairs() {
#if defined(__linux__)
  constexpr unsigned long I8MM = 1 << 13, BF16 = 1 << 14;
  return (getauxval(AT_HWCAP2) & (I8MM | BF16)) == (I8MM | BF16);
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<const Kernels *> available() {
  std::vector<const Kernels *> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    tables.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    tables.push_back(&kernels_avx2);
#elif defined(__aarch64__)
  if (multiplies_pairs()) tables.push_back(&kernels_neon_bf16);
  tables.push_back(&kernels_neon);
#endif
  tables.push_back(&kernels_scalar);
  return tables;
}

}  // namespace shoal
