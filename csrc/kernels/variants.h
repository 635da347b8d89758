// The variants of the kernel, one per translation unit, and what they take. Only dispatch.cpp calls them.
#pragma once

#include "kernels/kernels.h"

namespace cofire {

struct Task {
  Element element;
  Op op;
  void* target;
  const void* const* sources;
  size_t num_sources;
  size_t size_bytes;  // of each source
  double divisor;  // 1 unless the operation is the average
};

void reduce_scalar(const Task& task);
#ifdef COFIRE_X86
void reduce_avx2(const Task& task);
void reduce_avx512(const Task& task);
#endif

}  // namespace cofire
