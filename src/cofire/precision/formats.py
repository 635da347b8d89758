"""Number formats of 8 to 16 bits, exact: codes from FP32 values and FP32 values from codes.

E4M3 and E5M2 hold the operands of DeepSeek-V3's FP8 products, E5M6 the input of the linear layer after attention,
UE8M0 scales that are powers of two (technical report, 3.3; DeepSeek-V3.1's ``scale_fmt``), BF16 the rest.

A code is sign, exponent and mantissa from the highest bit down. With exponent field 0 the value is
``mantissa * smallest``, else ``(1 + mantissa / 2**mantissa_bits) * 2**(field - bias)``. Formats with an infinity use
the highest exponent field for it and for NaN, as IEEE 754 does; E4M3 and UE8M0 have none, and NaN where all bits but
the sign are ones. UE8M0 has neither sign nor zero; its code 0 is 2**-127.

Rounding is to nearest, a tie to the even code, subnormals included. A value beyond the largest one, an infinity too,
becomes the largest one of its sign if ``saturate``. Otherwise, as if exponents went on, what rounds beyond the largest
becomes infinity, or NaN where there is none. NaN becomes the format's one NaN; it and zero keep their sign. UE8M0
takes both zeros to 2**-127 and negative numbers to NaN. PyTorch's cast to ``float8_e4m3fn`` saturates, those to
``float8_e5m2`` and ``bfloat16`` do not, and but for NaN all three give these codes; that to ``float8_e8m0fnu`` sends
ties up.

Left out: stochastic rounding, payloads of NaN, FP4 and FP6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cofire.errors import PrecisionError

_FP32_BIAS = 127
_FP32_MANTISSA_BITS = 23
_FP32_INFINITY = 0x7F800000
_FP32_SMALLEST_NORMAL = 0x00800000
# Elements that a thread of a CPU takes at a time: what lies between the steps stays in its second-level cache.
_CHUNK = 2**17


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format whose every value is an FP32 number.

    Attributes:
        name: In lower case, as specs have it.
        exponent_bits: At most 8.
        mantissa_bits: Bits after the point.
        bias: Exponent field of the number one.
        nan_code: The code of every NaN but for the sign; above all others.
        signed: Whether the highest bit is a sign.
        has_infinity: Whether the highest exponent field is kept for infinity and NaN; if not, only the code of all ones
            is NaN.
        has_zero: Whether exponent field 0 is for zero and subnormals.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nan_code: int
    signed: bool = True
    has_infinity: bool = True
    has_zero: bool = True

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """The code's bit of the sign, also the number of codes without it."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def largest_code(self) -> int:
        """Code of the largest finite value."""
        return self.sign_bit - 2 if not self.has_infinity else self.infinity_code - 1

    @property
    def infinity_code(self) -> int:
        """Code of infinity; meaningless without one."""
        return self.sign_bit - (1 << self.mantissa_bits)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        field, mantissa = divmod(self.largest_code, 1 << self.mantissa_bits)
        return (1 + mantissa / 2**self.mantissa_bits) * 2.0 ** (field - self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive value with an implicit one before the point."""
        return 2.0 ** (int(self.has_zero) - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return self.smallest_normal * (2.0**-self.mantissa_bits if self.has_zero else 1.0)

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of a tensor of codes: ``uint8``, or ``int16`` for more than 8 bits."""
        return torch.uint8 if self.num_bits <= 8 else torch.int16


E4M3 = FloatFormat("e4m3", exponent_bits=4, mantissa_bits=3, bias=7, nan_code=0x7F, has_infinity=False)
E5M2 = FloatFormat("e5m2", exponent_bits=5, mantissa_bits=2, bias=15, nan_code=0x7F)
E5M6 = FloatFormat("e5m6", exponent_bits=5, mantissa_bits=6, bias=15, nan_code=0x7E0)
BF16 = FloatFormat("bf16", exponent_bits=8, mantissa_bits=7, bias=127, nan_code=0x7FC0)
UE8M0 = FloatFormat(
    "ue8m0",
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    nan_code=0xFF,
    signed=False,
    has_infinity=False,
    has_zero=False,
)
FORMATS = {each.name: each for each in (E4M3, E5M2, E5M6, UE8M0, BF16)}


def encode(x: Tensor, format: FloatFormat, saturate: bool = True) -> Tensor:
    """Return the codes of the nearest values.

    Args:
        x: FP32, any shape.
        format: What to encode to.
        saturate: Whether what is beyond the largest value becomes that value, not infinity or NaN.

    Returns:
        Of ``x``'s shape and ``format.code_dtype``; codes of more than 15 bits wrap around to negative numbers.

    Raises:
        PrecisionError: ``x`` is not FP32.
    """
    if x.dtype != torch.float32:
        raise PrecisionError(f"{x.dtype} is not encoded to {format.name}; give x.float()")
    return _in_chunks(x.detach(), format.code_dtype, lambda chunk: _encode(chunk, format, saturate))


def _in_chunks(x: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what an elementwise function makes of a tensor."""
    size = _CHUNK * torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() <= size:
        return function(x).to(dtype)
    y = torch.empty(x.shape, dtype=dtype)
    for source, target in zip(x.reshape(-1).split(size), y.view(-1).split(size), strict=True):
        target.copy_(function(source))
    return y


def _encode(x: Tensor, format: FloatFormat, saturate: bool) -> Tensor:
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    code = _nearest_code(magnitude, format)
    # Without an infinity the code after the largest is NaN.
    code.clamp_(max=format.largest_code if saturate else format.largest_code + 1)
    # Selecting by a mask costs a CPU more than these four steps; the code of NaN is above all others.
    nan = magnitude.sub_(_FP32_INFINITY).clamp_(0, 1).mul_(format.nan_code)
    code = torch.maximum(code, nan, out=code)
    if not format.signed:
        return code.masked_fill_(x < 0, format.nan_code)
    # The shift drags the sign along all bits; one of them is the code's.
    return code.bitwise_or_((bits >> 31).bitwise_and_(format.sign_bit))


def _nearest_code(magnitude: Tensor, format: FloatFormat) -> Tensor:
    """Return codes without sign or upper bound for the bits of non-negative FP32 numbers; of NaN, any code."""
    drop = _FP32_MANTISSA_BITS - format.mantissa_bits
    # Half of the place that is kept, less one where the kept bits are even. A carry runs on into the exponent.
    code = (magnitude >> drop).bitwise_and_(1).add_(magnitude).add_((1 << (drop - 1)) - 1)
    code.bitwise_right_shift_(drop).sub_((_FP32_BIAS - format.bias) << format.mantissa_bits)
    if not format.has_zero:
        # Such an FP32 number is subnormal: its field is 0, but the nearest value may be 2**-127 or 2**-126.
        middle = _FP32_SMALLEST_NORMAL * 3 // 4
        return torch.where(magnitude < _FP32_SMALLEST_NORMAL, (magnitude > middle).to(code.dtype), code)
    if format.bias == _FP32_BIAS:
        return code  # The exponents are those of FP32: subnormals are rounded like all others.
    # The last place of this sum is the smallest value, so that FP32's own addition rounds; what it adds to the bits is
    # the number of smallest values. That is more than the code above below the smallest normal value, and from
    # there on, for which the magnitude is cut off, it is not.
    anchor = torch.tensor(format.smallest * 2.0**_FP32_MANTISSA_BITS).item()
    anchor_bits = int(torch.tensor(anchor).view(torch.int32))
    smallest_normal = (_FP32_BIAS + 1 - format.bias) << _FP32_MANTISSA_BITS
    subnormal = magnitude.clamp(max=smallest_normal).view(torch.float32).add_(anchor).view(torch.int32)
    return torch.maximum(code, subnormal.sub_(anchor_bits), out=code)


def decode(codes: Tensor, format: FloatFormat) -> Tensor:
    """Return the values of codes.

    Args:
        codes: Of ``format.code_dtype``, any shape; bits above ``format.num_bits`` do not count.
        format: What they are codes of.

    Returns:
        FP32, of the same shape; exact.

    Raises:
        PrecisionError: Codes of another type.
    """
    if codes.dtype != format.code_dtype:
        raise PrecisionError(f"codes of {codes.dtype} are not {format.name}; encode() makes {format.code_dtype}")
    num_codes = 1 << format.num_bits
    if codes.numel() <= num_codes:
        return _decode(codes, format)
    table = _decode(torch.arange(num_codes, device=codes.device), format)

    def look_up(chunk: Tensor) -> Tensor:
        index = chunk.to(torch.int32) & (num_codes - 1)
        return table.index_select(0, index.view(-1)).view(chunk.shape)

    return _in_chunks(codes, torch.float32, look_up)


def _decode(codes: Tensor, format: FloatFormat) -> Tensor:
    code = codes.to(torch.int32)
    magnitude = code & (format.sign_bit - 1)
    bits = (magnitude << (_FP32_MANTISSA_BITS - format.mantissa_bits)).add_(
        (_FP32_BIAS - format.bias) << _FP32_MANTISSA_BITS
    )
    if not format.has_zero:
        bits.masked_fill_(magnitude == 0, _FP32_SMALLEST_NORMAL >> 1)
    elif format.bias != _FP32_BIAS:
        subnormal = (magnitude.to(torch.float32) * format.smallest).view(torch.int32)
        bits = torch.where(magnitude < (1 << format.mantissa_bits), subnormal, bits)
    if format.has_infinity:
        bits.masked_fill_(magnitude == format.infinity_code, _FP32_INFINITY)
        bits.masked_fill_(magnitude > format.infinity_code, _FP32_INFINITY | 0x400000)
    else:
        bits.masked_fill_(magnitude > format.largest_code, _FP32_INFINITY | 0x400000)
    if format.signed:
        bits |= (code & format.sign_bit).bitwise_left_shift_(32 - format.num_bits)
    return bits.view(torch.float32)


def round_to(x: Tensor, format: FloatFormat, saturate: bool = True) -> Tensor:
    """Return the nearest values of a format.

    Args:
        x: FP32, any shape.
        format: What to round to.
        saturate: As for :func:`encode`.

    Returns:
        FP32, of the same shape.

    Raises:
        PrecisionError: ``x`` is not FP32.
    """
    return decode(encode(x, format, saturate), format)


def ue8m0_scale(amax: Tensor, largest: float = E4M3.largest) -> Tensor:
    """Return the smallest power of two that brings magnitudes within a format's largest value.

    ``2 ** ceil(log2(amax / largest))``, by comparing mantissas: nothing is rounded, and a quotient that is a power of
    two is its own scale. Rounding a scale to nearest instead would let half of the tiles overflow.

    Args:
        amax: FP32, largest magnitudes of tiles.
        largest: Of the format that the scaled values go to.

    Returns:
        FP32 of ``amax``'s shape, within 2**-127 and 2**127: 2**-127 where ``amax`` is zero or needs less, which no
        maximum over tiles notices, and NaN where it is negative, infinite or NaN. All are exact in UE8M0.

    Raises:
        PrecisionError: ``amax`` is not FP32, or ``largest`` is not a positive number.
    """
    if amax.dtype != torch.float32:
        raise PrecisionError(f"largest magnitudes of {amax.dtype} have no exact scale; give amax.float()")
    if not 0 < largest < float("inf"):
        raise PrecisionError(f"a format's largest value is not {largest}; it is a positive number such as 448")
    mantissa, exponent = torch.frexp(amax)
    largest_mantissa, largest_exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    # Both mantissas are in [0.5, 1), so their quotient is in (0.5, 2): its logarithm rounds up to 0 or to 1.
    power = exponent - int(largest_exponent) + (mantissa.double() > float(largest_mantissa)).to(exponent.dtype)
    code = power.clamp(-UE8M0.bias, UE8M0.largest_code - UE8M0.bias) + UE8M0.bias
    code = torch.where(amax == 0, 0, code)
    code = torch.where(amax.isfinite() & (amax >= 0), code, UE8M0.nan_code)
    return decode(code.to(torch.uint8), UE8M0)
