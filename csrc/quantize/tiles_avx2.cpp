#define COFIRE_VARIANT avx2
#include "quantize/tiles_generic.h"
