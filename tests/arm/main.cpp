// Checks every set of kernels that this machine can run against plain loops. Prints the sets, best first, then the
// worst error of each check; exits with 1 where anything failed. Knows which checks there are, and no arithmetic.
#include "check.h"
#include "sets.h"
#include "threads.h"

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  check::Report report;
  printf("sets:");
  for (const shoal::Kernels *kernels : shoal::available()) printf(" %s", kernels->name);
  printf("\n");
  shoal::set_team_size(2);
  for (const shoal::Kernels *kernels : shoal::available()) {
    check::linear_layers(*kernels, report);
    check::rows_and_heads(*kernels, report);
    check::attention(*kernels, report);
    check::sampling(*kernels, report);
    report.begin(kernels->name);
    for (int kind = 0; kind < 5; kind++) report.expect(kernels->peak((shoal::Kind)kind, 64) > 0, "no limit", kind);
    std::vector<char> memory(1 << 18, 1);
    report.expect(kernels->read(memory.data(), 1 << 18) == 1 << 18, "not read", 0);
  }
  printf("held: %lld failed: %lld\n", (long long)report.held, (long long)report.failed);
  return report.failed || !report.held;
}
