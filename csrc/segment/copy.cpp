#include "segment/copy.h"

#include <cstring>
#ifdef COFIRE_X86
#include <immintrin.h>
#endif

namespace cofire {
namespace {

#ifdef COFIRE_X86
__attribute__((target("avx2"))) size_t copy_avx2(char* to, const char* from, size_t bytes) {
  constexpr size_t kVector = 32, kBlock = 4 * kVector;
  size_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) {
    __m256i v[4];
    for (size_t j = 0; j < 4; ++j) v[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + j * kVector));
    for (size_t j = 0; j < 4; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i + j * kVector), v[j]);
  }
  return i;
}
#endif

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (to == from || bytes == 0) return;
  size_t done = 0;
#ifdef COFIRE_X86
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) done = copy_avx2(static_cast<char*>(to), static_cast<const char*>(from), bytes);
#endif
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, bytes - done);
}

}  // namespace cofire
