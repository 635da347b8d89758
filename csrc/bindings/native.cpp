// The Python module cofire.collectives._native; only cofire/collectives/shm.py imports it.
#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_& module);
void bind_segment(nanobind::module_& module);

NB_MODULE(_native, module) {
  module.doc() = "Reduction kernels and the shared-memory segment (native core of cofire.collectives).";
  bind_kernels(module);
  bind_segment(module);
}
