// Kernels for Python: addresses as integers, every precondition of kernels.h checked, the sum with the GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace nb = nanobind;
using cofire::Element;
using cofire::Isa;
using cofire::Op;
using namespace nb::literals;

namespace {

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

bool is_integer(Element element) { return element == Element::i32 || element == Element::i64; }

void check_kernel(int isa, int element, int op) {
  if (!cofire::has_isa(Isa(isa))) {
    refuse("instruction set " + std::to_string(isa) + " is not of this processor; the widest is best_isa() = " +
           std::to_string(int(cofire::best_isa())));
  }
  if (!cofire::element_size(Element(element))) {
    refuse("element type " + std::to_string(element) + " is unknown; give 0 to 7");
  }
  if (!cofire::is_supported(Element(element), Op(op))) {
    refuse("operation " + std::to_string(op) + " is not for element type " + std::to_string(element) +
           "; those of bits (5 to 7) are for integers (6, 7), all others 0 to 4");
  }
}

void check_divisor(Element element, Op op, double divisor) {
  if (op != Op::average) return;
  if (!std::isfinite(divisor) || divisor <= 0) {
    refuse("divisor " + std::to_string(divisor) + " is not a number above 0; give the number of ranks");
  }
  if (is_integer(element) && (divisor != std::floor(divisor) || divisor >= 0x1p63)) {
    refuse("divisor " + std::to_string(divisor) + " of integers is not whole; give the number of ranks");
  }
}

void check_memory(uintptr_t target, const std::vector<uintptr_t>& sources, int64_t count, size_t element_bytes) {
  if (sources.empty()) refuse("no sources; give 1 or more");
  if (count < 0 || uint64_t(count) > INT64_MAX / element_bytes) {
    refuse("count " + std::to_string(count) + " is not a number of elements in memory; give 0 or more");
  }
  const uint64_t bytes = uint64_t(count) * element_bytes;
  if (!bytes) return;
  if (!target) refuse("the target has no address; give memory of " + std::to_string(bytes) + " bytes");
  for (const uintptr_t source : sources) {
    if (!source) refuse("a source has no address; give memory of " + std::to_string(bytes) + " bytes");
    const uint64_t apart = source > target ? source - target : target - source;
    if (apart && apart < bytes) {
      refuse("target and source overlap, " + std::to_string(apart) + " bytes apart; give one address or two memories");
    }
  }
}

void reduce(int isa, int element, int op, uintptr_t target, const std::vector<uintptr_t>& sources, int64_t count,
            double divisor) {
  check_kernel(isa, element, op);
  check_divisor(Element(element), Op(op), divisor);
  check_memory(target, sources, count, cofire::element_size(Element(element)));
  std::vector<const void*> from;
  for (const uintptr_t source : sources) from.push_back(reinterpret_cast<const void*>(source));
  nb::gil_scoped_release release;
  cofire::reduce(Isa(isa), Element(element), Op(op), reinterpret_cast<void*>(target), from.data(), from.size(),
                 size_t(count), divisor);
}

}  // namespace

void bind_kernels(nb::module_& module) {
  module.def("reduce", &reduce, "isa"_a, "element"_a, "op"_a, "target"_a, "sources"_a, "count"_a, "divisor"_a = 1.0);
  module.def("element_size", [](int element) { return cofire::element_size(Element(element)); }, "element"_a);
  module.def(
      "is_supported", [](int element, int op) { return cofire::is_supported(Element(element), Op(op)); }, "element"_a,
      "op"_a);
  module.def("has_isa", [](int isa) { return cofire::has_isa(Isa(isa)); }, "isa"_a);
  module.def("best_isa", [] { return int(cofire::best_isa()); });
}
