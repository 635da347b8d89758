// Segment for Python: addresses as integers, waits with the GIL released, Ctrl-C heard while a rank sleeps.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "segment/segment.h"

namespace nb = nanobind;
using cofire::Call;
using cofire::Clock;
using cofire::Segment;
using namespace nb::literals;

namespace {

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

void check(const Segment& segment, const Call& call) {
  const auto& layout = segment.layout();
  const bool sums = call.kind == cofire::Kind::all_reduce || call.kind == cofire::Kind::reduce || call.kind == cofire::Kind::reduce_scatter;
  if (!cofire::element_size(call.element)) throw nb::value_error("unknown element type");
  if (sums && !cofire::is_supported(call.element, call.op)) throw nb::value_error("the operation makes no sense for the type");
  if (call.root < -1 || call.root >= int32_t(layout.num_ranks)) throw nb::value_error("the root is not a rank of the segment");
  if (call.count && (!call.input || !call.output) && call.kind != cofire::Kind::barrier) throw nb::value_error("no memory");
  if ((call.network || call.stepped) && call.num_lanes != 1) throw nb::value_error("between nodes and step by step there is one lane");
}

void hear_signals() {
  nb::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

}  // namespace

void bind_segment(nb::module_& module) {
  nb::class_<Call>(module, "Call")
      .def("__init__",
           [](Call* self, int kind, int element, int op, uint64_t count, int root, double divisor, uintptr_t input,
              uintptr_t output, double timeout_s, uint64_t chunk_bytes, uint32_t num_lanes, bool network, bool sends, bool stepped) {
             new (self) Call{};
             self->kind = static_cast<cofire::Kind>(kind);
             self->element = static_cast<cofire::Element>(element);
             self->op = static_cast<cofire::Op>(op);
             self->count = count;
             self->root = root;
             self->divisor = divisor;
             self->input = reinterpret_cast<const void*>(input);
             self->output = reinterpret_cast<void*>(output);
             self->deadline = after(timeout_s);
             self->chunk_bytes = chunk_bytes;
             self->num_lanes = num_lanes;
             self->network = network;
             self->sends = sends;
             self->stepped = stepped;
           },
           "kind"_a, "element"_a = 0, "op"_a = 0, "count"_a = 0, "root"_a = 0, "divisor"_a = 1.0, "input"_a = 0,
           "output"_a = 0, "timeout_s"_a = 1800.0, "chunk_bytes"_a = 0, "num_lanes"_a = 1, "network"_a = false,
           "sends"_a = false, "stepped"_a = false);

  nb::exception<cofire::CollectiveFailure>(module, "CollectiveFailure", PyExc_RuntimeError);

  nb::class_<Segment>(module, "Segment")
      .def("__init__",
           [](Segment* self, int file, uint32_t rank, uint32_t num_lanes, uint32_t num_slots, uint64_t slot_bytes,
              std::vector<int64_t> names, double spin_s) {
             cofire::Layout layout{static_cast<uint32_t>(names.size()), num_lanes, num_slots, slot_bytes};
             new (self) Segment(file, rank, layout, std::move(names), std::chrono::nanoseconds(int64_t(spin_s * 1e9)));
             self->on_idle = hear_signals;
           },
           "file"_a, "rank"_a, "num_lanes"_a, "num_slots"_a, "slot_bytes"_a, "names"_a, "spin_s"_a)
      .def("run",
           [](Segment& self, const Call& call) {
             check(self, call);
             nb::gil_scoped_release release;
             self.run(call);
           })
      .def("begin",
           [](Segment& self, const Call& call) {
             check(self, call);
             self.begin(call);
           })
      .def("wait_free", &Segment::wait_free, nb::call_guard<nb::gil_scoped_release>())
      .def("publish", &Segment::publish)
      .def("combine", &Segment::combine, nb::call_guard<nb::gil_scoped_release>())
      .def("wait_result", &Segment::wait_result, nb::call_guard<nb::gil_scoped_release>())
      .def("consume", &Segment::consume)
      .def("end", &Segment::end, nb::call_guard<nb::gil_scoped_release>())
      .def("wait_reduced",
           [](Segment& self, uint64_t chunk, double timeout_s) {
             nb::gil_scoped_release release;
             self.wait_reduced(chunk, after(timeout_s));
           })
      .def("mark_exchanged", &Segment::mark_exchanged)
      .def("mark_sent", &Segment::mark_sent)
      .def("abort", &Segment::abort, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("aborted", &Segment::aborted)
      .def_prop_ro("abort_message", &Segment::abort_message)
      .def("is_alive", &Segment::is_alive)
      .def_prop_ro("memory", [](const Segment& self) { return reinterpret_cast<uintptr_t>(self.memory()); })
      .def_prop_ro("first_step", &Segment::first_step)
      .def("slot", [](const Segment& self, uint64_t step, uint32_t rank) {
        if (rank >= self.layout().num_ranks) throw nb::value_error("no such rank");
        return reinterpret_cast<uintptr_t>(self.slot(0, step, rank));
      })
      .def("result", [](const Segment& self, uint64_t step) { return reinterpret_cast<uintptr_t>(self.result(0, step)); })
      .def_static("total_bytes", [](uint32_t num_ranks, uint32_t num_lanes, uint32_t num_slots, uint64_t slot_bytes) {
        return cofire::Layout{num_ranks, num_lanes, num_slots, slot_bytes}.total_bytes();
      });
}
