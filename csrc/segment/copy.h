// Copies between a rank's memory and the segment.
#pragma once

#include <cstddef>

namespace cofire {

// Copies bytes that do not overlap, or are the same. Its own loop, since the C library's memcpy may choose `rep movsb`
// for sizes of a chunk, which is several times slower than vectors on some processors.
void copy_bytes(void* to, const void* from, size_t bytes);

}  // namespace cofire
