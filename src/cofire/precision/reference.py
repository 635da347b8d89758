"""Number formats, slow and obvious: what ``formats`` and ``logfmt`` must return.

A format's values come from its bit fields one code at a time, and the nearest one from a search among all of them.
LogFMT (ISCA'25, 3.2) goes tile by tile through the table of its decoded values, in FP64. Shares no arithmetic with
what it checks. Left out: speed.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from cofire.precision.formats import FloatFormat


def value_of(code: int, format: FloatFormat) -> float:
    """Return the value of one code by the definition of its bit fields."""
    mantissa = code % 2**format.mantissa_bits
    field = code // 2**format.mantissa_bits % 2**format.exponent_bits
    negative = format.signed and code // 2 ** (format.mantissa_bits + format.exponent_bits) % 2
    last_field, last_mantissa = 2**format.exponent_bits - 1, 2**format.mantissa_bits - 1
    if format.has_infinity and field == last_field:
        value = math.nan if mantissa else math.inf
    elif not format.has_infinity and (field, mantissa) == (last_field, last_mantissa):
        value = math.nan
    elif format.has_zero and field == 0:
        value = math.ldexp(mantissa, 1 - format.bias - format.mantissa_bits)
    else:
        value = math.ldexp(2**format.mantissa_bits + mantissa, field - format.bias - format.mantissa_bits)
    return -value if negative else value


def all_values(format: FloatFormat) -> np.ndarray:
    """Return the values of all codes in order, FP64; index with a code."""
    bits = format.signed + format.exponent_bits + format.mantissa_bits
    return np.array([value_of(code, format) for code in range(2**bits)])


def encode(x: np.ndarray, format: FloatFormat, saturate: bool = True) -> np.ndarray:
    """Return the codes of the nearest values, ties to the even code, by search.

    Args:
        x: ``[n]`` of float32.
        format: What to encode to.
        saturate: Whether what is beyond the largest value becomes that value.

    Returns:
        ``[n]`` of int64.
    """
    with np.errstate(invalid="ignore"):  # A NaN that is not quiet.
        x = x.astype(np.float64)
    values = all_values(format)[: 2 ** (format.exponent_bits + format.mantissa_bits)]
    finite = values[np.isfinite(values)]
    assert (np.diff(finite) > 0).all()
    # What would come next if exponents went on: what is nearer to it than to the largest overflows.
    beyond = 2 * finite[-1] - finite[-2] if format.mantissa_bits else 2 * finite[-1]
    steps = np.append(finite, beyond)
    magnitude = np.minimum(np.abs(x), beyond)
    above = np.searchsorted(steps, magnitude)  # The first step that is not below.
    above = np.where(np.isnan(x), 0, np.minimum(above, steps.size - 1))
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - steps[below], steps[above] - magnitude
    code = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    is_nan = np.isnan(x)
    overflow = code == finite.size
    if saturate:
        code[overflow] = finite.size - 1
    elif format.has_infinity:
        assert np.isinf(values[finite.size])
    else:
        is_nan |= overflow
    if not format.signed:
        return np.where(is_nan | (x < 0), format.nan_code, code)
    return np.where(is_nan, format.nan_code, code) + np.where(np.signbit(x), values.size, 0)


def ue8m0_scale(amax: float, largest: float) -> float:
    """Return the smallest power of two of UE8M0 that is at least ``amax / largest``, by trying all of them."""
    if not 0 <= amax < math.inf:
        return math.nan
    for power in range(-127, 127):
        # Both factors are of few bits and neither product is subnormal in FP64: exact.
        if math.ldexp(largest, power) >= amax:
            return math.ldexp(1.0, power)
    return math.ldexp(1.0, 127)


def logfmt_table(low: float, high: float, bits: int) -> np.ndarray:
    """Return the magnitudes of codes 1 to ``2**(bits-1) - 1`` for tiles from ``low`` to ``high``, FP64."""
    smallest, largest = math.log(low), math.log(high)
    step = (largest - smallest) / (2 ** (bits - 1) - 2)
    return np.array([math.exp(smallest + step * (code - 1)) for code in range(1, 2 ** (bits - 1))])


def logfmt_tile(
    tile: np.ndarray, bits: int, underflow: Literal["clamp", "zero"] = "clamp"
) -> tuple[list[int], np.ndarray]:
    """Encode and decode one tile.

    Args:
        tile: ``[n]`` of float32, finite.
        bits: Per element, sign included.
        underflow: What becomes of magnitudes far below the largest one.

    Returns:
        Codes without signs, and ``[n]`` of float64, the decoded values.
    """
    magnitudes = [abs(float(each)) for each in tile]
    magnitudes = [0.0 if each < 2.0**-126 else each for each in magnitudes]
    high = max(magnitudes, default=0.0)
    if underflow == "zero":
        magnitudes = [0.0 if each < high / 2**33 else each for each in magnitudes]
    if high == 0.0:
        return [0] * len(magnitudes), np.zeros(len(magnitudes))
    low = max(min(each for each in magnitudes if each), high / 2**32)
    table = logfmt_table(low, high, bits)
    codes, values = [], []
    for original, magnitude in zip(tile, magnitudes, strict=True):
        nearest = int(np.argmin(np.abs(table - magnitude)))
        codes.append(nearest + 1 if magnitude else 0)
        values.append(math.copysign(float(table[nearest]), float(original)) if magnitude else 0.0)
    return codes, np.array(values)
