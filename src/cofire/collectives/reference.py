"""Reductions, slow and obvious: what each kernel of ``csrc/kernels`` must return, bit for bit.

The rule (Fire-Flyer, arXiv 2408.14158, IV-A, the sum inside a node): ``acc = source 0``, then ``acc = acc OP source s``
for each further source in order, and ``result = round(acc / divisor)`` once, at the end. ``acc`` is fp32 for fp32,
fp16, bf16, e4m3 and e5m2, fp64 for fp64, and the type itself, which wraps around, for integers; the divisor is of the
type of ``acc``. Rounding is to nearest even. A NaN result is one fixed NaN. Minimum and maximum return NaN where any
source is NaN, and order -0 below +0. e4m3 has no infinity: what rounds beyond 448 is NaN.

fp16, bf16, e4m3 and e5m2 are numpy arrays of their bits. Imports no PyTorch. Left out: speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cofire.collectives.elements import Element, Op
from cofire.errors import CollectiveError


@dataclass(frozen=True)
class MiniFormat:
    """A floating-point format of 16 bits or fewer.

    Attributes:
        exponent_bits: Bits of the exponent.
        mantissa_bits: Bits after the point.
        overflow: Bits, without the sign, of what is beyond the largest number.
        nan: Bits of the NaN that a reduction returns.
    """

    exponent_bits: int
    mantissa_bits: int
    overflow: int
    nan: int

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number, and of all below it."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (self.exponent_bits + self.mantissa_bits)


MINI_FORMATS = {
    Element.F16: MiniFormat(5, 10, 0x7C00, 0x7E00),
    Element.BF16: MiniFormat(8, 7, 0x7F80, 0x7FC0),
    Element.E4M3: MiniFormat(4, 3, 0x7F, 0x7F),
    Element.E5M2: MiniFormat(5, 2, 0x7C, 0x7F),
}

STORAGE = {
    Element.F32: np.dtype(np.float32),
    Element.F64: np.dtype(np.float64),
    Element.F16: np.dtype(np.uint16),
    Element.BF16: np.dtype(np.uint16),
    Element.E4M3: np.dtype(np.uint8),
    Element.E5M2: np.dtype(np.uint8),
    Element.I32: np.dtype(np.int32),
    Element.I64: np.dtype(np.int64),
}


def decode(element: Element, bits: np.ndarray) -> np.ndarray:
    """Return the numbers that bits stand for.

    Args:
        element: One of ``MINI_FORMATS``.
        bits: ``[n]`` of ``STORAGE[element]``.

    Returns:
        ``[n]`` of float32, which holds each of them exactly.
    """
    form = MINI_FORMATS[element]
    bits = bits.astype(np.int64)
    magnitude = bits & (form.sign - 1)
    exponent, mantissa = magnitude >> form.mantissa_bits, magnitude & ((1 << form.mantissa_bits) - 1)
    # A normal number has an implicit 1 before the point; a denormal has none, and the smallest exponent.
    significand = np.where(exponent > 0, mantissa + (1 << form.mantissa_bits), mantissa)
    power = np.maximum(exponent - 1, 0) + form.smallest_exponent - form.mantissa_bits
    value = np.ldexp(significand.astype(np.float64), power)
    if form.overflow == form.nan:
        value[magnitude == form.nan] = np.nan
    else:
        value[magnitude == form.overflow] = np.inf
        value[magnitude > form.overflow] = np.nan
    return np.where(bits & form.sign, -value, value).astype(np.float32)


def encode(element: Element, values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest numbers, ties to even.

    Args:
        element: One of ``MINI_FORMATS``.
        values: ``[n]`` of float32.

    Returns:
        ``[n]`` of ``STORAGE[element]``.
    """
    form = MINI_FORMATS[element]
    with np.errstate(invalid="ignore"):  # A NaN that is not quiet.
        magnitude = np.abs(values.astype(np.float64))
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    # frexp has numbers in [0.5, 1): an exponent one too large. Zero is among the smallest.
    exponent = np.where(finite > 0, np.frexp(finite)[1] - 1, form.smallest_exponent)
    exponent = np.maximum(exponent, form.smallest_exponent)
    places = np.rint(np.ldexp(finite, form.mantissa_bits - exponent)).astype(np.int64)
    # The implicit 1 of a normal number, and a carry to the next power of two, both add 1 to the exponent.
    bits = places + ((exponent - form.smallest_exponent).astype(np.int64) << form.mantissa_bits)
    bits = np.where(np.isfinite(magnitude), np.minimum(bits, form.overflow), form.overflow)
    bits = np.where(np.signbit(values), bits | form.sign, bits)
    is_nan = np.isnan(values) | ((form.overflow == form.nan) & ((bits & (form.sign - 1)) == form.nan))
    return np.where(is_nan, form.nan, bits).astype(STORAGE[element])


def reduce(element: Element, op: Op, sources: Sequence[np.ndarray], divisor: float = 1.0) -> np.ndarray:
    """Reduce several arrays into a new one by the rule of this module.

    Args:
        element: Type of the elements.
        op: What to do.
        sources: One or more ``[n]`` of ``STORAGE[element]``.
        divisor: Of ``Op.AVERAGE``; whole for integers, whose quotient is cut off towards zero.

    Returns:
        ``[n]`` of ``STORAGE[element]``.

    Raises:
        CollectiveError: No sources, an array of another type, or bits of numbers that are not whole.
    """
    if not sources:
        raise CollectiveError("nothing to reduce; give 1 source or more")
    for source in sources:
        if source.dtype != STORAGE[element]:
            raise CollectiveError(f"an array of {source.dtype} does not hold {element.name}; take {STORAGE[element]}")
    if op.is_bitwise and not element.is_integer:
        raise CollectiveError(f"{op.name} of {element.name} is not defined; bitwise operations need I32 or I64")
    with np.errstate(all="ignore"):
        if element in MINI_FORMATS:
            values = [decode(element, source) for source in sources]
            return encode(element, _accumulate(op, values, divisor))
        acc = _accumulate(op, sources, divisor)
    if not element.is_integer:
        acc[np.isnan(acc)] = np.nan
    return acc


def _accumulate(op: Op, values: Sequence[np.ndarray], divisor: float) -> np.ndarray:
    acc = values[0].copy()
    for value in values[1:]:
        acc = _combine(op, acc, value)
    if op is not Op.AVERAGE:
        return acc
    if acc.dtype.kind == "f":
        return acc / acc.dtype.type(divisor)
    whole = int(divisor)
    quotient = acc // whole  # Towards minus infinity.
    return quotient + ((acc < 0) & (quotient * whole != acc)).astype(acc.dtype)


def _combine(op: Op, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if op in (Op.SUM, Op.AVERAGE):
        return a + b
    if op is Op.PRODUCT:
        return a * b
    if op in (Op.MIN, Op.MAX):
        chosen = np.minimum(a, b) if op is Op.MIN else np.maximum(a, b)
        if a.dtype.kind != "f":
            return chosen
        # Zeros are equal but have an order here.
        return np.where(a == b, np.where(np.signbit(a) == (op is Op.MIN), a, b), chosen)
    return {Op.BIT_AND: np.bitwise_and, Op.BIT_OR: np.bitwise_or, Op.BIT_XOR: np.bitwise_xor}[op](a, b)
