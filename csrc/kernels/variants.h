// One function per instruction set; each returns how many elements it did, from the first on. The scalar one does all.
#pragma once

#include "kernels/kernels.h"

namespace cofire {

size_t reduce_scalar(Element element, Op op, char* target, const char* const* sources, size_t num_sources, size_t count,
                     double divisor);
size_t reduce_avx2(Element element, Op op, char* target, const char* const* sources, size_t num_sources, size_t count,
                   double divisor);
size_t reduce_avx512(Element element, Op op, char* target, const char* const* sources, size_t num_sources, size_t count,
                     double divisor);

}  // namespace cofire
