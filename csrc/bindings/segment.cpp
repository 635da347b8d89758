#include <nanobind/nanobind.h>

void bind_segment(nanobind::module_&) {}
