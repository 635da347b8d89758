// Reduction kernels: one pass over several sources, each element accumulated in the order of the sources.
//
// The rule that every variant obeys, bit for bit (Fire-Flyer, arXiv 2408.14158, IV-A, "inside a node"):
//   acc = source 0; acc = acc OP source s for s = 1, 2, ...; result = round(acc / divisor), once.
// acc is fp32 for fp32, fp16, bf16, e4m3 and e5m2; fp64 for fp64; the type itself, wrapping around, for integers. The
// divisor and the quotient are of acc's type too. Rounding is to nearest even. A NaN result is one quiet NaN per type:
// 0x7fc00000, 0x7ff8000000000000, 0x7e00 (fp16), 0x7fc0 (bf16), 0x7f (e4m3 and e5m2). Minimum and maximum return NaN
// where any source is NaN, and order -0 below +0. e4m3 (fn) has no infinity: what rounds beyond 448 becomes NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cofire {

enum class Element : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, e4m3 = 4, e5m2 = 5, i32 = 6, i64 = 7 };
enum class Op : int32_t { sum = 0, average = 1, product = 2, min = 3, max = 4, bit_and = 5, bit_or = 6, bit_xor = 7 };
enum class Isa : int32_t { scalar = 0, avx2 = 1, avx512 = 2 };

// Bytes of one element; 0 for an unknown type.
size_t element_size(Element element);

// Whether the operation makes sense for the type: bitwise ones are for integers only.
bool is_supported(Element element, Op op);

// Whether this processor runs the variant, and the widest that it runs.
bool has_isa(Isa isa);
Isa best_isa();

// target[i] = round(sources[0][i] OP sources[1][i] OP ... / divisor) for i < count.
//
// `divisor` counts for Op::average alone, truncating towards zero for integers; 1 leaves the sum as it is. `target` may
// be one of the sources exactly; it must not overlap one otherwise. Any alignment is fine. The caller has checked
// is_supported, has_isa and num_sources >= 1. The rounding mode and the flushing of denormals that the calling thread
// has set do not matter.
void reduce(Isa isa, Element element, Op op, void* target, const void* const* sources, size_t num_sources, size_t count,
            double divisor);

}  // namespace cofire
