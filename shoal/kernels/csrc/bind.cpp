// The door between Python and the kernels: picks a table by instruction set and passes addresses through.
// It must not compute anything, nor know torch: pointers come as integers, and the interpreter lock is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// What this machine can run, best first.
std::vector<const shoal::Kernels *> available() {
  std::vector<const shoal::Kernels *> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    tables.push_back(&shoal::kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    tables.push_back(&shoal::kernels_avx2);
#endif
  tables.push_back(&shoal::kernels_scalar);
  return tables;
}

std::vector<std::string> names() {
  std::vector<std::string> out;
  for (auto *table : available()) out.emplace_back(table->name);
  return out;
}

class Table {
 public:
  explicit Table(const std::string &name) {
    for (auto *table : available())
      if (name == table->name) kernels = table;
    if (!kernels) throw nb::value_error(("this machine has no instruction set named '" + name + "'").c_str());
  }
  const shoal::Kernels *kernels = nullptr;
};

template <class T>
T *at(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled kernels. Addresses and sizes are trusted: call them through shoal.kernels.cpu.";
  m.def("names", &names, "Instruction sets this machine can run, best first.");
  nb::class_<Table>(m, "Table")
      .def(nb::init<const std::string &>(), "name"_a)
      .def_prop_ro("name", [](const Table &t) { return std::string(t.kernels->name); })
      .def(
          "rms_norm_fp32",
          [](const Table &t, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t columns, float eps) {
            t.kernels->rms_norm_fp32(at<const float>(x), at<const float>(weight), at<float>(y), rows, columns, eps);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "rms_norm_bf16",
          [](const Table &t, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t columns, float eps) {
            t.kernels->rms_norm_bf16(at<const shoal::bf16>(x), at<const shoal::bf16>(weight), at<shoal::bf16>(y), rows,
                                     columns, eps);
          },
          nb::call_guard<nb::gil_scoped_release>());
}
