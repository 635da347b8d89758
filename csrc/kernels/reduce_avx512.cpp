#include "kernels/variants.h"
namespace cofire {
size_t reduce_avx512(Element, Op, char*, const char* const*, size_t, size_t, double) { return 0; }
}
