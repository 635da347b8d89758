"""Hopper's FP8 accumulation, bit by bit, and what promotion to FP32 saves.

A tensor core adds 32 products to its accumulator at a time (DeepSeek-V3 technical report, 3.3.2 and 3.5.2; ISCA'25,
3.1): products and accumulator are aligned to the largest exponent among them, keep 13 fraction bits, lose the rest,
and are added exactly; the sum is cut to FP22, 1 + 8 + 13 bits. Every N_C elements of the contraction the partial sum
is promoted: times its scales, it is added to FP32 and the accumulator starts from zero.

What the papers leave open follows measurements of the hardware (Xie et al., MMA-Sim, 2025): both cuts are towards zero;
the exponent of a product is the sum of its operands', so the product of two significands in [1, 2) may reach 4; a
subnormal has the smallest exponent of its format. Our own choices: a zero takes no part in the alignment, a sum that is
zero is +0, and promotion is one fused multiply-add with the FP32 product of both scales.

Left out: the range of FP22's exponent, which sums of FP8 products cannot leave; split contractions, whose partial sums
a library adds in an order of its own; speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import PrecisionError

# Elements of the contraction that share a scale, and rows of b that do (technical report, 3.3.2).
_TILE = 128
_SMALLEST_EXPONENT = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
# Below the exponent of every product of FP8 numbers, E5M2's smallest being 2**-32; where all are zero.
_LOWEST_EXPONENT = -64.0
# Products held at a time; a few MiB stay in a core's cache.
_CHUNK_PRODUCTS = 1 << 19


@dataclass(frozen=True)
class AccumulatorSpec:
    """Widths of the hardware that adds products.

    Attributes:
        group: Products that are aligned and added at a time.
        kept_bits: Bits of an aligned term, the one before the point of the largest exponent included.
        accumulator_bits: Bits of the accumulator's significand, the implicit one included.
        interval: N_C, elements of the contraction between promotions, a multiple of ``group``; None: never promoted.
    """

    group: int = 32
    kept_bits: int = 14
    accumulator_bits: int = 14
    interval: int | None = 128

    def __post_init__(self) -> None:
        """Check the widths.

        Raises:
            PrecisionError: One is out of range.
        """
        if self.group < 1:
            raise PrecisionError(f"a group of {self.group} products adds nothing; take 32, as Hopper does")
        widest = 52 - self.group.bit_length()
        if not 1 <= self.kept_bits <= widest:
            raise PrecisionError(
                f"kept_bits {self.kept_bits} with groups of {self.group} must be 1 to {widest}, which FP64 adds exactly"
            )
        if not 1 <= self.accumulator_bits <= 53:
            raise PrecisionError(f"accumulator_bits {self.accumulator_bits} must be 1 to 53; Hopper has 14")
        if self.interval is not None and (self.interval < 1 or self.interval % self.group):
            nearest = max(1, round(self.interval / self.group)) * self.group
            raise PrecisionError(
                f"interval {self.interval} is not a positive multiple of the group of {self.group}; take {nearest}"
            )

    @property
    def working_dtype(self) -> torch.dtype:
        """The narrowest type that holds the sum of a group's aligned terms."""
        fits = self.kept_bits + 1 + self.group.bit_length() <= 24 and self.accumulator_bits <= 24
        return torch.float32 if fits else torch.float64


HOPPER = AccumulatorSpec()


@dataclass(frozen=True)
class LadderRow:
    """Error of the accumulation alone at one interval.

    Attributes:
        interval: N_C; None: never promoted.
        max_relative_error: The largest ``|sum - exact|`` over the mean ``|exact|``.
        mean_relative_error: The mean ``|sum - exact|`` over the mean ``|exact|``.
        max_elementwise_error: The largest ``|sum - exact| / |exact|``; says little where sums come near zero.
    """

    interval: int | None
    max_relative_error: float
    mean_relative_error: float
    max_elementwise_error: float


@dataclass(frozen=True)
class _Operand:
    """One side of a product, in groups: [groups, group, rows], with the operands' exponents, -inf for a zero.

    ``special`` [rows, groups * group] is kept where some value is not finite; ``values`` has zeros there.
    """

    values: Tensor
    exponents: Tensor
    special: Tensor | None

    def rows(self, rows: slice) -> _Operand:
        special = None if self.special is None else self.special[rows]
        return _Operand(self.values[..., rows], self.exponents[..., rows], special)


def accumulate(a: Tensor, b: Tensor, spec: AccumulatorSpec = HOPPER) -> Tensor:
    """Return ``a @ b.T`` as the hardware of ``spec`` adds it.

    Infinities and NaN go by IEEE 754.

    Args:
        a: [M, K], ``float8_e4m3fn`` or ``float8_e5m2``, or FP32 that holds E4M3 values.
        b: [N, K], likewise.
        spec: Widths and interval.

    Returns:
        [M, N], FP32.

    Raises:
        PrecisionError: Shapes, types or devices do not fit, or an FP32 value is none of E4M3's.
    """
    left, right = _operands(a, b, spec)
    sums = torch.empty(a.shape[0], b.shape[0], device=a.device)
    for rows in _row_chunks(a.shape[0], b.shape[0] * spec.group):
        total = torch.zeros_like(sums[rows])
        for _, partial in _partial_sums(left.rows(rows), right, spec):
            total += partial
        sums[rows] = total
    return sums


def scaled_gemm_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, spec: AccumulatorSpec = HOPPER
) -> Tensor:
    """Return ``(a * a_scale) @ (b * b_scale).T`` with the scales applied where partial sums are promoted.

    Args:
        a: [M, K], as for :func:`accumulate`.
        a_scale: [M or 1, ceil(K / 128) or 1], FP32 or ``float8_e8m0fnu``; a size of 1: the same for all.
        b: [N, K], likewise.
        b_scale: [ceil(N / 128), N or 1, ceil(K / 128) or 1], likewise.
        spec: Widths and interval. Scales that change along K need an interval that divides 128.

    Returns:
        [M, N], FP32.

    Raises:
        PrecisionError: As for :func:`accumulate`, or scales do not fit the data or the interval.
    """
    left, right = _operands(a, b, spec)
    (m, k), n = a.shape, b.shape[0]
    _check_scale("a_scale", a_scale, (m, 1), k)
    _check_scale("b_scale", b_scale, (-(-n // _TILE), n, 1), k)
    _check_interval(max(a_scale.shape[1], b_scale.shape[1]), spec)
    of_a, of_b = _scale_of_rows(a_scale, m), _scale_of_rows(b_scale, n)
    sums = torch.empty(m, n, device=a.device)
    for rows in _row_chunks(m, n * spec.group):
        total = torch.zeros_like(sums[rows])
        for first, partial in _partial_sums(left.rows(rows), right, spec):
            factor = _scale_at(of_a[rows], first)[:, None] * _scale_at(of_b, first)
            total = _fused_multiply_add(factor, partial, total)
        sums[rows] = total
    return sums


def error_ladder(
    k: int = 4096,
    intervals: tuple[int | None, ...] = (None, 2048, 512, 128, 32),
    seed: int = 0,
    inputs: Literal["positive", "normal"] = "positive",
    size: int = 64,
) -> list[LadderRow]:
    """Return the error of the accumulation alone, interval by interval.

    Both operands are E4M3 with one scale per tensor, and the exact sums are of these rounded values.

    Args:
        k: Elements of the contraction.
        intervals: Values of N_C.
        seed: Of the operands.
        inputs: Uniform over [0, 1), or N(0, 1).
        size: Rows of both operands.

    Raises:
        PrecisionError: An interval is not a multiple of 32, or ``inputs`` is neither.
    """
    if inputs not in ("positive", "normal"):
        raise PrecisionError(f"inputs {inputs!r} are neither 'positive' nor 'normal'")
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if inputs == "positive" else torch.randn
    x, y = (draw(size, k, generator=generator) for _ in range(2))
    a, b = ((each * (448.0 / each.abs().amax())).to(torch.float8_e4m3fn) for each in (x, y))
    # Products of E4M3 are multiples of 2**-18 below 2**18: FP64 adds 2**17 of them without rounding, in any order.
    exact = a.double() @ b.double().T
    rows = []
    for interval in intervals:
        error = (accumulate(a, b, AccumulatorSpec(interval=interval)).double() - exact).abs()
        mean = float(exact.abs().mean())
        elementwise = float((error / exact.abs()).max())
        rows.append(LadderRow(interval, float(error.max()) / mean, float(error.mean()) / mean, elementwise))
    return rows


def _operands(a: Tensor, b: Tensor, spec: AccumulatorSpec) -> tuple[_Operand, _Operand]:
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2:
            raise PrecisionError(f"{name} has shape {list(x.shape)}; give a matrix of rows and the contraction")
        if x.dtype != torch.float32 and x.dtype not in _SMALLEST_EXPONENT:
            raise PrecisionError(f"{name} of {x.dtype} is not FP8; give float8_e4m3fn, float8_e5m2, or E4M3 in float32")
    if a.shape[1] != b.shape[1]:
        raise PrecisionError(f"a {list(a.shape)} and b {list(b.shape)} share no contraction; give [M, K] and [N, K]")
    if a.device != b.device:
        raise PrecisionError(f"a on {a.device} and b on {b.device}; move one of them")
    return _operand("a", a, spec), _operand("b", b, spec)


def _operand(name: str, x: Tensor, spec: AccumulatorSpec) -> _Operand:
    values = x.to(torch.float32)
    if x.dtype == torch.float32:
        strange = values[(values != values.to(torch.float8_e4m3fn).float()) & ~values.isnan()]
        if strange.numel():
            raise PrecisionError(f"{name} has {strange[0].item():g}, no value of E4M3; cast it to float8_e4m3fn first")
    values = F.pad(values, (0, -values.shape[1] % spec.group))
    finite = values.isfinite()
    special = None if bool(finite.all()) else values
    values = values.where(finite, 0.0)
    smallest = _SMALLEST_EXPONENT.get(x.dtype, _SMALLEST_EXPONENT[torch.float8_e4m3fn])
    exponents = _exponent(values).clamp_(min=smallest).where(values != 0, -torch.inf)
    # Rows last: all sums over a group then run along contiguous rows of b.
    shape = (values.shape[0], values.shape[1] // spec.group, spec.group)
    in_groups = [each.reshape(shape).permute(1, 2, 0).contiguous() for each in (values, exponents)]
    return _Operand(in_groups[0].to(spec.working_dtype), in_groups[1], special)


def _row_chunks(count: int, products_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_PRODUCTS // max(1, products_per_row))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _partial_sums(left: _Operand, right: _Operand, spec: AccumulatorSpec) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each interval, its first element of the contraction and its sum [m, N] in FP32."""
    num_groups = left.values.shape[0]
    step = num_groups if spec.interval is None else spec.interval // spec.group
    for first in range(0, num_groups, max(1, step)):
        last = min(first + step, num_groups)
        acc = left.values.new_zeros(left.values.shape[-1], right.values.shape[-1])
        for g in range(first, last):
            acc = _add_group(acc, left, right, g, spec)
        partial = acc.to(torch.float32)
        if left.special is not None or right.special is not None:
            sides = [_special(side, slice(first * spec.group, last * spec.group)) for side in (left, right)]
            exact = sides[0] @ sides[1].T
            partial = partial.where(exact.isfinite(), exact)
        yield first * spec.group, partial


def _special(side: _Operand, columns: slice) -> Tensor:
    """Return values [rows, columns] in FP32, those that are not finite among them."""
    if side.special is not None:
        return side.special[:, columns]
    group = side.values.shape[1]
    in_groups = side.values[columns.start // group : columns.stop // group]
    return in_groups.permute(2, 0, 1).reshape(side.values.shape[-1], -1).float()


def _add_group(acc: Tensor, left: _Operand, right: _Operand, g: int, spec: AccumulatorSpec) -> Tensor:
    """Return the accumulator [m, N] after one more group."""
    exponents = (left.exponents[g].T[:, :, None] + right.exponents[g]).amax(dim=1)
    largest = torch.maximum(exponents, _exponent(acc)).clamp_(min=_LOWEST_EXPONENT)
    fraction_bits = spec.kept_bits - 1
    to_integer = _power_of_two(fraction_bits - largest, acc.dtype)
    terms = (left.values[g].T[:, :, None] * right.values[g]).mul_(to_integer[:, None])
    # A cast to integers cuts towards zero, and at a tenth of the time that trunc() takes.
    integer = _INTEGERS[acc.dtype]
    total = terms.to(integer).sum(dim=1, dtype=integer) + (acc * to_integer).to(integer)
    return _cut(total.to(acc.dtype) * _power_of_two(largest - fraction_bits, acc.dtype), spec.accumulator_bits)


def _exponent(x: Tensor) -> Tensor:
    """Return floor(log2(abs(x))) in FP32, -inf for a zero."""
    exponent = torch.frexp(x).exponent.to(torch.float32) - 1.0
    return exponent.where(x != 0, -torch.inf)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 ** exponent, put together from its bits: exp2 is not exact on every device."""
    if dtype == torch.float32:
        return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _cut(x: Tensor, bits: int) -> Tensor:
    """Return ``x`` with its significand cut to so many bits, towards zero."""
    width = 24 if x.dtype == torch.float32 else 53
    return x if bits >= width else (x.view(_INTEGERS[x.dtype]) & -(1 << (width - bits))).view(x.dtype)


def _fused_multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``x * y + z`` of FP32, rounded once."""
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    # FP64 may round onto the middle between two FP32 numbers. Rounding to odd instead keeps the side it came from.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    # An infinity, whose loss is NaN, may become FP64's largest number, which is an infinity again for FP32.
    even = (total.view(torch.int64) & 1) == 0
    beside = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), lost))
    return torch.where(even & (lost != 0), beside, total).to(torch.float32)


def _scale_of_rows(scale: Tensor, rows: int) -> Tensor:
    """Return a scale for each row of the data: [rows, columns], FP32."""
    scale = scale.float()
    if scale.shape[0] == rows:
        return scale
    return scale.expand(rows, -1) if scale.shape[0] == 1 else scale.repeat_interleave(_TILE, dim=0)[:rows]


def _scale_at(scale: Tensor, element: int) -> Tensor:
    """Return the scales [rows] of an element of the contraction."""
    return scale[:, element // _TILE if scale.shape[1] > 1 else 0]


def _check_scale(name: str, scale: Tensor, rows: tuple[int, ...], k: int) -> None:
    if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise PrecisionError(f"{name} of {scale.dtype} is neither float32 nor float8_e8m0fnu; convert the values")
    columns = -(-k // _TILE)
    if scale.dim() != 2 or scale.shape[0] not in rows or scale.shape[1] not in (columns, 1):
        wanted = " or ".join(str(count) for count in dict.fromkeys(rows))
        raise PrecisionError(
            f"{name} {list(scale.shape)} does not fit; it must be [{wanted}, {columns} or 1], a scale for {_TILE} of K"
        )


def _check_interval(columns: int, spec: AccumulatorSpec) -> None:
    if columns > 1 and (spec.interval is None or _TILE % spec.interval):
        raise PrecisionError(
            f"interval {spec.interval} promotes sums of several scales; with a scale for each {_TILE} of K it must "
            f"divide {_TILE}: take {_TILE}"
        )
