// The door between Python and the kernels: picks a table by its name and passes addresses through.
// It must not compute anything, nor know torch: pointers come as integers, and the interpreter lock is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "kernels.h"
#include "layer.h"
#include "plan.h"
#include "sets.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace shoal;

namespace {

std::vector<std::string> names() {
  std::vector<std::string> out;
  for (auto *table : available()) out.emplace_back(table->name);
  return out;
}

struct Table {
  explicit Table(const std::string &name) {
    for (auto *table : available())
      if (name == table->name) kernels = table;
    if (!kernels) throw nb::value_error(("this machine has no instruction set named '" + name + "'").c_str());
  }
  const Kernels *kernels = nullptr;
};

template <class T = void>
T *at(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

struct Linear {
  const Kernels *kernels;
  Weight weight;
};

// What every adapter adds to one layer, by adapter.
struct Deltas {
  const Kernels *kernels;
  std::vector<std::vector<Delta::Up>> ups;  // not moved after `all` points into them
  std::vector<Delta> all;
};

using release = nb::call_guard<nb::gil_scoped_release>;

void bind_linear(nb::module_ &m) {
  nb::enum_<Kind>(m, "Kind")
      .value("FP32", Kind::fp32)
      .value("BF16", Kind::bf16)
      .value("INT8", Kind::int8)
      .value("INT4", Kind::int4)
      .value("INT4_A16", Kind::int4_a16)
      .value("INT8_A16", Kind::int8_a16);
  nb::enum_<Gate>(m, "Gate").value("NONE", Gate::none).value("SILU", Gate::silu).value("GELU", Gate::gelu);
  nb::class_<Linear>(m, "Linear")
      .def(
          "__init__",
          [](Linear *self, const Table &t, Kind kind, Gate gate, int64_t n, int64_t k, int64_t group, uintptr_t panels,
             uintptr_t scale, uintptr_t zero, uintptr_t bias, bool wide, int64_t outputs) {
            if (outputs < 0) outputs = gate == Gate::none ? n : n / 2;
            new (self) Linear{t.kernels,
                              {kind, gate, n, k, outputs, group, at(panels), at(scale), at(zero),
                               at<const float>(bias), wide}};
          },
          "table"_a, "kind"_a, "gate"_a, "n"_a, "k"_a, "group"_a, "panels"_a, "scale"_a = 0, "zero"_a = 0,
          "bias"_a = 0, "wide"_a = false, "outputs"_a = -1)
      .def(
          "__call__",
          [](const Linear &self, uintptr_t x, int64_t rows, uintptr_t residual, float factor, uintptr_t y) {
            self.kernels->linear(self.weight, at(x), rows, at(residual), factor, at(y));
          },
          release());
}

void bind_deltas(nb::module_ &m) {
  nb::class_<Delta::Up>(m, "Up").def(
      "__init__",
      [](Delta::Up *self, const Linear &weight, float scale, int64_t begin, int64_t first, int64_t stride) {
        new (self) Delta::Up{weight.weight, scale, begin, first, stride};
      },
      "weight"_a, "scale"_a, "begin"_a, "first"_a, "stride"_a);
  nb::class_<Adapted>(m, "Adapted")
      .def(
          "__init__",
          [](Adapted *self, uintptr_t row, uintptr_t start, uintptr_t adapter, int64_t groups) {
            new (self) Adapted{at<const int64_t>(row), at<const int64_t>(start), at<const int64_t>(adapter), groups};
          },
          "row"_a, "start"_a, "adapter"_a, "groups"_a);
  nb::class_<Deltas>(m, "Deltas")
      .def("__init__", [](Deltas *self, const Table &t) { new (self) Deltas{t.kernels, {}, {}}; }, "table"_a)
      .def(
          "append",
          [](Deltas &self, const Linear *down, const std::vector<Delta::Up> &ups) {
            self.ups.push_back(ups);  // moves the vectors, not what they hold
            self.all.push_back({down ? down->weight : Weight{}, self.ups.back().data(), (int64_t)ups.size()});
          },
          "down"_a.none(), "ups"_a)
      .def(
          "add",
          [](const Deltas &self, const Adapted &rows, uintptr_t x, int64_t count, uintptr_t y, int64_t columns, bool wide,
             float factor) {
            self.kernels->add_deltas(self.all.data(), rows, at(x), count, at(y), columns, wide, factor);
          },
          release())
      .def(
          "gated",
          [](const Deltas &self, const Linear &gated, const Linear &sums, const Adapted &rows, uintptr_t x, int64_t count,
             uintptr_t memory, uintptr_t y) {
            self.kernels->gated_with(gated.weight, sums.weight, self.all.data(), rows, at(x), count, at<float>(memory),
                                     at(y));
          },
          release())
      .def("gated_rows", [](const Deltas &self, int64_t n) { return self.kernels->gated_rows(n); }, "n"_a);
}

void bind_attention(nb::module_ &m) {
  nb::class_<Pages>(m, "Pages").def(
      "__init__",
      [](Pages *self, uintptr_t keys, uintptr_t values, int64_t num_pages, int64_t page_size, int64_t kv_heads,
         int64_t width, Kind kind) {
        new (self) Pages{at(keys), at(values), num_pages, page_size, kv_heads, width, kind};
      },
      "keys"_a, "values"_a, "num_pages"_a, "page_size"_a, "kv_heads"_a, "width"_a, "kind"_a);
  nb::class_<Kernels::Heads>(m, "Heads").def(
      "__init__",
      [](Kernels::Heads *self, int64_t query_heads, int64_t rotated, uintptr_t cosine, uintptr_t sine,
         uintptr_t query_norm, uintptr_t key_norm, float eps, bool whole) {
        new (self) Kernels::Heads{query_heads, rotated, at<const float>(cosine), at<const float>(sine),
                                  at<const float>(query_norm), at<const float>(key_norm), eps, whole};
      },
      "query_heads"_a, "rotated"_a, "cosine"_a, "sine"_a, "query_norm"_a, "key_norm"_a, "eps"_a, "whole"_a);
  nb::class_<Plan>(m, "Plan")
      .def(
          "__init__",
          [](Plan *self, uintptr_t start, uintptr_t length, uintptr_t table, int64_t rows, int64_t row_length,
             int64_t page_size, int64_t num_pages, bool share) {
            new (self) Plan(at<const int64_t>(start), at<const int64_t>(length), at<const int32_t>(table), rows,
                            row_length, page_size, num_pages, share);
          },
          "start"_a, "length"_a, "table"_a, "rows"_a, "row_length"_a, "page_size"_a, "num_pages"_a, "share"_a, release())
      .def_prop_ro("num_levels", [](const Plan &plan) { return plan.level_ends.size(); })
      .def_prop_ro("segments", [](const Plan &plan) {
        nb::list out;
        for (const Segment &s : plan.segments)
          out.append(nb::make_tuple(s.first, s.count, s.row, s.begin, s.end, (bool)s.resume, (bool)s.keep));
        return out;
      })
      .def_prop_ro("order", [](const Plan &plan) { return plan.order; });
}

void bind_layer(nb::module_ &m) {
  nb::class_<Layer>(m, "Layer")
      .def(
          "__init__",
          [](Layer *self, const Table &t, const std::vector<uintptr_t> &norms, float eps, const Linear &qkv,
             const Linear &out, const Linear &gate_up, const Linear &down, const Kernels::Heads &heads, float scale,
             int64_t window, float softcap, float factor) {
            new (self) Layer{t.kernels, at<const float>(norms.at(0)), at<const float>(norms.at(1)),
                             at<const float>(norms.at(2)), at<const float>(norms.at(3)), eps, qkv.weight, out.weight,
                             gate_up.weight, down.weight, heads, scale, window, softcap, factor};
          },
          "table"_a, "norms"_a, "eps"_a, "qkv"_a, "out"_a, "gate_up"_a, "down"_a, "heads"_a, "scale"_a, "window"_a,
          "softcap"_a, "factor"_a)
      .def("memory", &Layer::memory, "tokens"_a, "Bytes that a call needs.");
  m.def(
      "run_layers",
      [](const std::vector<Layer> &layers, const Plan &plan, const std::vector<Pages> &pages, uintptr_t x, int64_t tokens,
         uintptr_t position, uintptr_t slot, uintptr_t memory, uintptr_t states) {
        for (size_t i = 0; i < layers.size() && i < pages.size(); i++)
          layers[i].run(plan.work(), pages[i], at(x), tokens, at<const int64_t>(position), at<const int64_t>(slot),
                        at<char>(memory), at<float>(states));
      },
      "layers"_a, "plan"_a, "pages"_a, "x"_a, "tokens"_a, "position"_a, "slot"_a, "memory"_a, "states"_a, release(),
      "Layers one after the other, each with its pages.");
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled kernels. Addresses and sizes are trusted: call them through shoal.kernels.cpu.";
  m.def("set_threads", &set_team_size, "threads"_a, "How many threads a call may use, the caller's included.");
  m.def("threads", &team_size);
  m.def("names", &names, "Instruction sets this machine can run, best first.");
  bind_linear(m);
  bind_deltas(m);
  bind_attention(m);
  bind_layer(m);
  nb::class_<Table>(m, "Table")
      .def(nb::init<const std::string &>(), "name"_a)
      .def_prop_ro("name", [](const Table &t) { return std::string(t.kernels->name); })
      .def("packed_bytes", [](const Table &t, Kind kind, int64_t n, int64_t k) { return t.kernels->packed_bytes(kind, n, k); })
      .def(
          "pack",
          [](const Table &t, Kind kind, uintptr_t weight, uintptr_t panels, int64_t n, int64_t k) {
            t.kernels->pack(kind, at(weight), at(panels), n, k);
          },
          release())
      .def(
          "rms_norm",
          [](const Table &t, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t columns, float eps,
             bool wide) { t.kernels->rms_norm(at(x), at<const float>(weight), at(y), rows, columns, eps, wide); },
          release())
      .def(
          "layer_norm",
          [](const Table &t, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t rows, int64_t columns,
             float eps, bool wide) {
            t.kernels->layer_norm(at(x), at<const float>(weight), at<const float>(bias), at(y), rows, columns, eps, wide);
          },
          release())
      .def(
          "gelu",
          [](const Table &t, uintptr_t x, uintptr_t y, int64_t count, bool wide) {
            t.kernels->gelu(at(x), at(y), count, wide);
          },
          release())
      .def(
          "gather",
          [](const Table &t, uintptr_t x, int64_t count, int64_t bytes, uintptr_t index, int64_t rows, uintptr_t y) {
            t.kernels->gather(at(x), count, bytes, at<const int64_t>(index), rows, at(y));
          },
          release())
      .def(
          "add",
          [](const Table &t, uintptr_t x, uintptr_t branch, float factor, uintptr_t y, int64_t count, bool wide) {
            t.kernels->add(at(x), at(branch), factor, at(y), count, wide);
          },
          release())
      .def(
          "place",
          [](const Table &t, uintptr_t qkv, const Kernels::Heads &heads, const Pages &pages, uintptr_t position,
             uintptr_t slot, int64_t tokens) {
            t.kernels->place(at(qkv), heads, pages, at<const int64_t>(position), at<const int64_t>(slot), tokens);
          },
          release())
      .def(
          "attention",
          [](const Table &t, const Plan &plan, const Pages &pages, uintptr_t q, int64_t stride, int64_t query_heads,
             float scale, int64_t window, float softcap, uintptr_t states, uintptr_t out) {
            t.kernels->attention(plan.work(), pages, at(q), stride, query_heads, scale, window, softcap,
                                 at<float>(states), at(out));
          },
          release())
      .def(
          "move",
          [](const Table &t, const Pages &pages, uintptr_t moves, int64_t count) {
            t.kernels->move(pages, at<const int64_t>(moves), count);
          },
          release())
      .def(
          "largest",
          [](const Table &t, uintptr_t x, uintptr_t index, uintptr_t value, int64_t rows, int64_t columns) {
            t.kernels->largest(at<const float>(x), at<int64_t>(index), at<float>(value), rows, columns);
          },
          release())
      .def(
          "forbid",
          [](const Table &t, uintptr_t x, int64_t columns, uintptr_t row, uintptr_t bits, int64_t count) {
            t.kernels->forbid(at<float>(x), columns, at<const int64_t>(row), at<const uint32_t>(bits), count);
          },
          release())
      .def(
          "draw",
          [](const Table &t, uintptr_t x, int64_t columns, int64_t count, uintptr_t row, uintptr_t number, uintptr_t best,
             uintptr_t heat, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t token) {
            const Draws draws = {count, at<const int64_t>(row), at<const uint64_t>(number), at<const float>(best),
                                 at<const float>(heat), at<const int64_t>(top_k), at<const double>(top_p),
                                 at<const float>(min_p)};
            t.kernels->draw(at<const float>(x), columns, draws, at<int64_t>(token));
          },
          release())
      .def(
          "score",
          [](const Table &t, uintptr_t x, int64_t columns, int64_t count, int64_t top, uintptr_t row, uintptr_t token,
             uintptr_t best, uintptr_t value, uintptr_t weight, uintptr_t rank, uintptr_t ids, uintptr_t values) {
            const Scores scores = {count, top, at<const int64_t>(row), at<const int64_t>(token), at<float>(best),
                                   at<float>(value), at<int64_t>(weight), at<int64_t>(rank), at<int64_t>(ids),
                                   at<float>(values)};
            t.kernels->score(at<const float>(x), columns, scores);
          },
          release())
      .def(
          "peak", [](const Table &t, Kind kind, int64_t iterations) { return t.kernels->peak(kind, iterations); },
          release())
      .def(
          "read", [](const Table &t, uintptr_t memory, int64_t bytes) { return t.kernels->read(at(memory), bytes); },
          release());
}
