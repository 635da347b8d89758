// Kernels for Python, on addresses: whoever calls keeps the memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "kernels/kernels.h"

namespace nb = nanobind;
using namespace cofire;
using namespace nb::literals;

void bind_kernels(nb::module_& module) {
  module.def(
      "reduce",
      [](int isa, int element, int op, uintptr_t target, const std::vector<uintptr_t>& sources, size_t count, double divisor) {
        if (!is_supported(Element(element), Op(op))) throw nb::value_error("the operation makes no sense for the type");
        if (isa < 0 || isa > 2 || !has_isa(Isa(isa))) throw nb::value_error("this processor lacks the instruction set");
        if (sources.empty()) throw nb::value_error("nothing to reduce: give 1 source or more");
        std::vector<const void*> from;
        for (const uintptr_t source : sources) from.push_back(reinterpret_cast<const void*>(source));
        if (count && (!target || std::find(from.begin(), from.end(), nullptr) != from.end())) throw nb::value_error("no memory");
        nb::gil_scoped_release release;
        reduce(Isa(isa), Element(element), Op(op), reinterpret_cast<void*>(target), from.data(), from.size(), count, divisor);
      },
      "isa"_a, "element"_a, "op"_a, "target"_a, "sources"_a, "count"_a, "divisor"_a);
  module.def("element_size", [](int element) { return element_size(Element(element)); }, "element"_a);
  module.def("is_supported", [](int element, int op) { return is_supported(Element(element), Op(op)); }, "element"_a, "op"_a);
  module.def("has_isa", [](int isa) { return isa >= 0 && isa <= 2 && has_isa(Isa(isa)); }, "isa"_a);
  module.def("best_isa", [] { return static_cast<int>(best_isa()); });
}
