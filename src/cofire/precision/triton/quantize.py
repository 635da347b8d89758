"""FP8 by tiles on a GPU, in Triton: one read and one write where PyTorch's operations take six passes.

The bits are those of PyTorch's form in ``cofire.precision.quantize``, which is what the tests compare with, and so are
the types: tiles of 1 x 128, 128 x 1 and 128 x 128 with FP32 or UE8M0 scales (DeepSeek-V3 technical report, 3.3.2).
Hopper's FP8 products want both operands with what is contracted lying together, so Wgrad needs its operands
transposed: :func:`quantize_transposed` writes them so, :func:`quantize_both` makes Dgrad's and Wgrad's operand of
one read, :func:`requantize_transposed` begins with an input that was kept in FP8.

A quotient is that of IEEE 754 but costs six instructions, without division. Value and scale are first multiplied by
a power of two that brings the scale into [1, 2): exact. With the reciprocal ``r`` of that scale ``s``, which is
rounded once for the tile, ``q = x * r`` is off by less than two units in the last place, and ``q - r * (s * q - x)``
by less than one; the same step again gives the quotient rounded to nearest (Markstein, IBM Journal of Research and
Development 34(1), 1990, theorem for a reciprocal rounded to nearest). All remainders are exact with a fused
multiply-add; the negative ``r`` keeps the sign of a zero. A quotient by a power of two is one product.

The bound is a copy. At 3 TB/s and BF16 values a Hopper GPU has time for some 29 instructions per number of 3 bytes;
compiled, tiles of 1 x 128 take 14 with FP32 scales and 8 with powers of two, 128 x 1 17 and 9, transposed 19 and 12.
``quantize_both`` takes 33 and 19 where there is time for 39.

An ``amax_floor`` that makes a scale subnormal is refused: quotients would overflow, and then types differ in what a
cast does. Rows whose length is no multiple of 16 are correct but slow, as their accesses are not aligned. Left out:
scales of whole rows and tensors.
"""

# Kernels are compiled, not called: a checker takes their constants for wrappers and misses what they return.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision.quantize import (
    AMAX_FLOOR,
    BLOCK,
    COLUMN_TILE,
    TILE,
    Quantized,
    ScaleFormat,
    TileShape,
    scale_shape,
)
from cofire.precision.triton.compile import Variant

# Without it, a product and a sum become one operation in some kernels and not in others.
OPTIONS = {"enable_fp_fusion": False}
_SIZE = tl.constexpr(128)
# What is quantised, and what dequantising returns.
VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILES = (TILE, COLUMN_TILE, BLOCK)
_SMALLEST_NORMAL = 2.0**-126
# Tiles of 1 x 128 that one program takes: 32 numbers for each of its 128 threads.
_TILES = 32
# Columns of a program's patch where tiles go down columns.
_WIDTH = 64
# Of a program, by kernel. With two for a patch a thread holds 128 numbers and shares a column's scale among eight of
# them; with four it computes it for four.
WARPS = {"rows": 4, "columns": 2, "blocks": 8, "both": 4, "dequantize_rows": 4, "dequantize_patches": 8}


@dataclass(frozen=True)
class Launch:
    """What a kernel knows when it is compiled.

    Attributes:
        largest: Of the FP8 format.
        power_of_two: Scales are UE8M0.
        whole: No tile is cut off by an edge.
        rows_out: Tiles of 1 x 128 are written.
        transposed: Tiles of 128 x 1 are written as columns of the transpose.
        width: Columns of a program's patch.
    """

    largest: float
    power_of_two: bool
    whole: bool
    rows_out: bool = False
    transposed: bool = False
    width: int = 128

    @property
    def reciprocal(self) -> float:
        """The FP32 number nearest to that of the largest value."""
        return torch.tensor(self.largest).reciprocal().item()

    @property
    def exponent(self) -> int:
        """Of the largest value."""
        return math.frexp(self.largest)[1] - 1


@triton.jit
def larger(a, b):
    """Return the larger of two numbers, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(x, AXIS: tl.constexpr):
    return tl.reduce(tl.abs(x), AXIS, larger)


@triton.jit
def _quotient(minus_x, divisor, minus_reciprocal):
    """Return ``x / divisor`` rounded to nearest, for the nearest reciprocal and no underflow on the way."""
    quotient = minus_x * minus_reciprocal
    quotient = tl.fma(tl.fma(quotient, divisor, minus_x), minus_reciprocal, quotient)
    return tl.fma(tl.fma(quotient, divisor, minus_x), minus_reciprocal, quotient)


@triton.jit
def _reciprocal(x):
    """Return ``1 / x`` rounded to nearest, for ``x`` in [1, 2)."""
    y = 1.0 / x
    y = tl.fma(tl.fma(-x, y, 1.0), y, y)
    y = tl.fma(tl.fma(-x, y, 1.0), y, y)
    # Newton's iteration ends at 1/2 for the number before 2, of all alone.
    return tl.maximum(y, 0.5 + 2.0**-24)


@triton.jit
def _scale_of(amax, floor, LAUNCH: tl.constexpr):
    """Return a tile's scale ``m * 2**e`` as it is kept, and what :func:`_scaled` takes.

    That is -2**-e, m and -1 / m, or 2**-e alone for a power of two; NaN if ``amax`` is not finite.
    """
    finite = amax < float("inf")
    least = tl.maximum(amax, floor)
    if LAUNCH.power_of_two:
        # Both largest values are 1.75 times a power of two: a mantissa above that carries into the exponent.
        exponent = (least.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
        code = exponent - LAUNCH.exponent
        kept = tl.where(finite, code, 255).to(tl.uint8)
        power = ((254 - code) << 23).to(tl.float32, bitcast=True)
        mantissa = power
        minus_reciprocal = power
    else:
        quotient = _quotient(-least, LAUNCH.largest, -LAUNCH.reciprocal)
        kept = tl.where(finite, quotient, float("nan"))
        bits = kept.to(tl.int32, bitcast=True)
        # With the sign bit; 254 - e is the exponent field of the inverse.
        power = (-(bits & 0x7F800000) - 0x01000000).to(tl.float32, bitcast=True)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        minus_reciprocal = -_reciprocal(mantissa)
    return kept, tl.where(finite, power, float("nan")), mantissa, minus_reciprocal


@triton.jit
def _scaled(x, power, mantissa, minus_reciprocal, LAUNCH: tl.constexpr):
    """Return ``x`` over the scale of :func:`_scale_of`, rounded to nearest."""
    x = x * power
    if not LAUNCH.power_of_two:
        x = _quotient(x, mantissa, minus_reciprocal)
    return x


@triton.jit
def _scale_value(kept):
    """Return scales as FP32: they are, or are codes of UE8M0."""
    if kept.dtype == tl.uint8:
        code = kept.to(tl.int32)
        # 2**-127 is subnormal, and the last code is NaN.
        bits = tl.where(code == 0, 0x400000, code << 23)
        value = tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        value = kept
    return value


@triton.jit
def tiles_at(num_tiles, columns, WHOLE: tl.constexpr, TILES: tl.constexpr):
    """Return this program's tiles [T], where their numbers are [T, 128], and which of both exist."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = tl.arange(0, _SIZE)[None, :]
    exists = tile < num_tiles
    if WHOLE:
        at = (tl.program_id(0).to(tl.int64) * (TILES * _SIZE)) + (tl.arange(0, TILES)[:, None] * _SIZE + inside)
        mask = exists[:, None] & (inside >= 0)
    else:
        tiles_per_row = tl.cdiv(columns, _SIZE)
        column = (tile % tiles_per_row)[:, None] * _SIZE + inside
        at = (tile // tiles_per_row).to(tl.int64)[:, None] * columns + column
        mask = exists[:, None] & (column < columns)
    return tile, exists, at, mask


@triton.jit
def _quantize_rows(x, codes, scales, num_tiles, columns, floor, LAUNCH: tl.constexpr, TILES: tl.constexpr):
    tile, exists, at, mask = tiles_at(num_tiles, columns, LAUNCH.whole, TILES)
    values = tl.load(x + at, mask, 0.0).to(tl.float32)
    kept, power, mantissa, inverse = _scale_of(_amax(values, 1), floor, LAUNCH)
    quotient = _scaled(values, power[:, None], mantissa[:, None], inverse[:, None], LAUNCH)
    tl.store(codes + at, quotient.to(codes.dtype.element_ty), mask)
    tl.store(scales + tile, kept, exists)


@triton.jit
def _dequantize_rows(codes, scales, values, num_tiles, columns, WHOLE: tl.constexpr, TILES: tl.constexpr):
    tile, exists, at, mask = tiles_at(num_tiles, columns, WHOLE, TILES)
    scale = _scale_value(tl.load(scales + tile, exists, 1))
    value = tl.load(codes + at, mask, 0.0).to(tl.float32) * scale[:, None]
    tl.store(values + at, value.to(values.dtype.element_ty), mask)


@triton.jit
def _patch(rows, columns, WIDTH: tl.constexpr):
    """Return this program's matrix of a batch and the indices of its rows [128] and columns [W]."""
    row_patches = tl.cdiv(rows, _SIZE)
    column_patches = tl.cdiv(columns, WIDTH)
    row_patch = tl.program_id(0) // column_patches
    batch = (row_patch // row_patches).to(tl.int64)
    row = (row_patch % row_patches) * _SIZE + tl.arange(0, _SIZE)
    column = (tl.program_id(0) % column_patches) * WIDTH + tl.arange(0, WIDTH)
    return batch, row, column


@triton.jit
def _patch_mask(row, column, rows, columns, WHOLE: tl.constexpr):
    if WHOLE:
        mask = (row[:, None] >= 0) & (column[None, :] >= 0)
    else:
        mask = (row[:, None] < rows) & (column[None, :] < columns)
    return mask


@triton.jit
def _quantize_patches(x, x_scales, row_codes, row_scales, codes, scales, rows, columns, floor, LAUNCH: tl.constexpr):
    batch, row, column = _patch(rows, columns, LAUNCH.width)
    first = batch * rows
    mask = _patch_mask(row, column, rows, columns, LAUNCH.whole)
    at = (first + row)[:, None] * columns + column[None, :]
    values = tl.load(x + at, mask, 0.0).to(tl.float32)
    tile_at = (first + row) * tl.cdiv(columns, _SIZE) + (tl.min(column, 0) // _SIZE)
    if x_scales is not None:
        values = values * _scale_value(tl.load(x_scales + tile_at, row < rows, 1))[:, None]
    amax = _amax(values, 0)
    if LAUNCH.rows_out:
        kept, power, mantissa, inverse = _scale_of(_amax(values, 1), floor, LAUNCH)
        quotient = _scaled(values, power[:, None], mantissa[:, None], inverse[:, None], LAUNCH)
        tl.store(row_codes + at, quotient.to(row_codes.dtype.element_ty), mask)
        tl.store(row_scales + tile_at, kept, row < rows)
        # From the cache: kept in registers, values would leave room for one program per multiprocessor.
        values = tl.load(x + at, mask, 0.0).to(tl.float32)
    kept, power, mantissa, inverse = _scale_of(amax, floor, LAUNCH)
    quotient = _scaled(values, power[None, :], mantissa[None, :], inverse[None, :], LAUNCH)
    row_tiles = tl.cdiv(rows, _SIZE)
    row_tile = tl.min(row, 0) // _SIZE
    if LAUNCH.transposed:
        at = (batch * columns + column)[None, :] * rows + row[:, None]
        scales_at = (batch * columns + column) * row_tiles + row_tile
    else:
        scales_at = (batch * row_tiles + row_tile) * columns + column
    tl.store(codes + at, quotient.to(codes.dtype.element_ty), mask)
    tl.store(scales + scales_at, kept, column < columns)


@triton.jit
def _quantize_blocks(x, codes, scales, rows, columns, floor, LAUNCH: tl.constexpr):
    batch, row, column = _patch(rows, columns, _SIZE)
    mask = _patch_mask(row, column, rows, columns, LAUNCH.whole)
    at = (batch * rows + row)[:, None] * columns + column[None, :]
    values = tl.load(x + at, mask, 0.0).to(tl.float32)
    kept, power, mantissa, inverse = _scale_of(_amax(_amax(values, 1), 0), floor, LAUNCH)
    quotient = _scaled(values, power, mantissa, inverse, LAUNCH)
    tl.store(codes + at, quotient.to(codes.dtype.element_ty), mask)
    tl.store(scales + tl.program_id(0), kept)


@triton.jit
def _dequantize_patches(codes, scales, values, rows, columns, WHOLE: tl.constexpr, BY_COLUMN: tl.constexpr):
    batch, row, column = _patch(rows, columns, _SIZE)
    mask = _patch_mask(row, column, rows, columns, WHOLE)
    at = (batch * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(codes + at, mask, 0.0).to(tl.float32)
    if BY_COLUMN:
        scale_at = (batch * tl.cdiv(rows, _SIZE) + tl.min(row, 0) // _SIZE) * columns + column
        value = value * _scale_value(tl.load(scales + scale_at, column < columns, 1))[None, :]
    else:
        value = value * _scale_value(tl.load(scales + tl.program_id(0)))
    tl.store(values + at, value.to(values.dtype.element_ty), mask)


def takes(tile: TileShape, dtype: torch.dtype, amax_floor: float) -> bool:
    """Return whether there is a kernel for tiles and floor: 1 x 128, 128 x 1 or 128 x 128, and no subnormal scale."""
    largest = torch.finfo(dtype).max
    return tile in TILES and largest * _SMALLEST_NORMAL <= amax_floor < math.inf


def quantize(
    x: Tensor,
    tile: TileShape = TILE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> Quantized:
    """Quantise on a GPU; the bits of :func:`cofire.precision.quantize.quantize` (technical report, 3.3.2).

    Args:
        x: [..., R, C], FP32, BF16 or FP16, contiguous, on a CUDA device.
        tile: ``TILE``, ``COLUMN_TILE`` or ``BLOCK``.
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        scale_format: FP32, or powers of two.
        amax_floor: A tile's largest value counts as at least this; at least 2**-126 times the largest of ``dtype``.

    Raises:
        PrecisionError: One of these does not hold.
    """
    _check(x, tile, dtype, amax_floor)
    codes, scales = torch.empty_like(x, dtype=dtype), _empty_scales(x, tile, scale_format)
    rows, columns = x.shape[-2:]
    launch = _launch_of(x, tile, dtype, scale_format)
    if tile == TILE:
        sizes, grid = (scales.numel(), columns), -(-scales.numel() // _TILES)
        arguments = (x, codes, _bytes(scales), *sizes, float(amax_floor), launch, _TILES)
        start(_quantize_rows, grid, WARPS["rows"], arguments)
    elif tile == BLOCK:
        arguments = (x, codes, _bytes(scales), rows, columns, float(amax_floor), launch)
        start(_quantize_blocks, scales.numel(), WARPS["blocks"], arguments)
    else:
        arguments = (x, None, None, None, codes, _bytes(scales), rows, columns, float(amax_floor))
        start(_quantize_patches, _patches(x, _WIDTH), WARPS["columns"], (*arguments, replace(launch, width=_WIDTH)))
    return Quantized(codes, scales, tile)


def quantize_transposed(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> Quantized:
    """Quantise the transpose in tiles of 1 x 128: ``quantize(x.mT, TILE)`` from one read of ``x``.

    What an operand of Wgrad has to be for Hopper: in tiles of 128 x 1 of ``x``, and stored by columns.

    Args:
        x: [..., R, C], as for :func:`quantize`.
        dtype: As there.
        scale_format: As there.
        amax_floor: As there.

    Returns:
        Data [..., C, R] and scales [..., C, ceil(R / 128)].

    Raises:
        PrecisionError: As there.
    """
    _check(x, TILE, dtype, amax_floor)
    codes, scales = _empty_transposed(x, dtype, scale_format)
    launch = replace(_launch_of(x, COLUMN_TILE, dtype, scale_format), transposed=True, width=_WIDTH)
    arguments = (x, None, None, None, codes, _bytes(scales), *x.shape[-2:], float(amax_floor), launch)
    start(_quantize_patches, _patches(x, _WIDTH), WARPS["columns"], arguments)
    return Quantized(codes, scales, TILE)


def quantize_both(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> tuple[Quantized, Quantized]:
    """Return ``quantize(x, TILE)`` and :func:`quantize_transposed` of ``x``, from one read of memory.

    What Dgrad and Wgrad take of the output's gradient.

    Args:
        x: [..., R, C], as for :func:`quantize`.
        dtype: As there.
        scale_format: As there.
        amax_floor: As there.

    Raises:
        PrecisionError: As there.
    """
    _check(x, TILE, dtype, amax_floor)
    row_codes, row_scales = torch.empty_like(x, dtype=dtype), _empty_scales(x, TILE, scale_format)
    codes, scales = _empty_transposed(x, dtype, scale_format)
    launch = replace(_launch_of(x, BLOCK, dtype, scale_format), rows_out=True, transposed=True)
    outputs = (row_codes, _bytes(row_scales), codes, _bytes(scales))
    arguments = (x, None, *outputs, *x.shape[-2:], float(amax_floor), launch)
    start(_quantize_patches, _patches(x, 128), WARPS["both"], arguments)
    return Quantized(row_codes, row_scales, TILE), Quantized(codes, scales, TILE)


def requantize_transposed(
    q: Quantized, scale_format: ScaleFormat | None = None, amax_floor: float = AMAX_FLOOR
) -> Quantized:
    """Return the transpose of values that were kept in tiles of 1 x 128, in such tiles: Wgrad's other operand.

    The bits of ``quantize(q.dequantize().mT, TILE)``; rounds once more.

    Args:
        q: Data [..., R, C] in ``TILE``, contiguous, on a CUDA device.
        scale_format: None: its own.
        amax_floor: As for :func:`quantize`.

    Raises:
        PrecisionError: Other tiles, another device or a floor that is too low.
    """
    if q.tile != TILE:
        raise PrecisionError(f"tiles of {q.tile} are not taken to those of the transpose; requantize() takes any")
    _check_codes(q)
    _check_floor(TILE, q.data.dtype, amax_floor)
    wanted = scale_format or q.scale_format
    codes, scales = _empty_transposed(q.data, q.data.dtype, wanted)
    launch = replace(_launch_of(q.data, COLUMN_TILE, q.data.dtype, wanted), transposed=True, width=_WIDTH)
    outputs = (codes, _bytes(scales), *q.data.shape[-2:])
    arguments = (q.data, _bytes(q.scale), None, None, *outputs, float(amax_floor), launch)
    start(_quantize_patches, _patches(q.data, _WIDTH), WARPS["columns"], arguments)
    return Quantized(codes, scales, TILE)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values, [..., R, C]; the bits of PyTorch's form in ``Quantized.dequantize``.

    Args:
        q: In ``TILE``, ``COLUMN_TILE`` or ``BLOCK``, contiguous, on a CUDA device.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        PrecisionError: One of these does not hold.
    """
    if q.tile not in TILES:
        raise PrecisionError(f"there is no kernel for tiles of {q.tile}; Quantized.dequantize takes any")
    if dtype not in VALUE_TYPES:
        raise PrecisionError(f"values do not become {dtype}; take float32, bfloat16 or float16")
    _check_codes(q)
    values, scales = torch.empty_like(q.data, dtype=dtype), _bytes(q.scale)
    rows, columns = q.data.shape[-2:]
    whole = _is_whole(q.data, q.tile)
    if q.tile == TILE:
        sizes, grid = (scales.numel(), columns), -(-scales.numel() // _TILES)
        start(_dequantize_rows, grid, WARPS["dequantize_rows"], (q.data, scales, values, *sizes, whole, _TILES))
    else:
        arguments = (q.data, scales, values, rows, columns, _is_whole(q.data, BLOCK), q.tile == COLUMN_TILE)
        start(_dequantize_patches, _patches(q.data, 128), WARPS["dequantize_patches"], arguments)
    return values


def start(
    kernel: Any, grid: int, num_warps: int, arguments: tuple[Any, ...], options: dict[str, Any] = OPTIONS
) -> None:
    """Start a kernel on the device of its first argument and that device's current stream; nothing for no numbers."""
    if grid:
        with on_device(arguments[0]):
            kernel[(grid,)](*arguments, num_warps=num_warps, **options)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton starts kernels where a tensor is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_place(x: Tensor) -> None:
    """Check that kernels can take a tensor as it lies in memory.

    Raises:
        PrecisionError: It is elsewhere or has gaps.
    """
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise PrecisionError(f"a tensor on {x.device} is not for Triton's kernels; give x.cuda()")
    if not x.is_contiguous():
        raise PrecisionError(f"strides {x.stride()} of {list(x.shape)} leave gaps; give x.contiguous()")


def _check(x: Tensor, tile: TileShape, dtype: torch.dtype, amax_floor: float) -> None:
    if x.dtype not in VALUE_TYPES:
        raise PrecisionError(f"{x.dtype} is not quantised; give float32, bfloat16 or float16")
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise PrecisionError(f"{dtype} is not an FP8 format; take float8_e4m3fn or float8_e5m2")
    if x.dim() < 2:
        raise PrecisionError(f"{list(x.shape)} has no rows and columns; give a matrix")
    check_place(x)
    _check_floor(tile, dtype, amax_floor)


def _check_floor(tile: TileShape, dtype: torch.dtype, amax_floor: float) -> None:
    if tile not in TILES:
        raise PrecisionError(f"there is no kernel for tiles of {tile}; take TILE, COLUMN_TILE or BLOCK")
    if not takes(tile, dtype, amax_floor):
        least = torch.finfo(dtype).max * _SMALLEST_NORMAL
        raise PrecisionError(f"amax_floor {amax_floor} would make a scale subnormal; take at least {least:.2e}")


def _check_codes(q: Quantized) -> None:
    check_place(q.data)
    check_place(q.scale)


def _launch_of(x: Tensor, tile: TileShape, dtype: torch.dtype, scale_format: ScaleFormat) -> Launch:
    # A patch of a column's tiles is a block.
    whole = _is_whole(x, TILE if tile == TILE else BLOCK)
    return Launch(torch.finfo(dtype).max, scale_format == "ue8m0", whole)


def _is_whole(x: Tensor, tile: TileShape) -> bool:
    height, width = tile
    return not (x.shape[-2] % (height or 1) or x.shape[-1] % (width or 1))


def _patches(x: Tensor, width: int) -> int:
    if not x.numel():
        return 0
    rows, columns = x.shape[-2:]
    return x.numel() // (rows * columns) * -(-rows // 128) * -(-columns // width)


def _empty_scales(x: Tensor, tile: TileShape, scale_format: ScaleFormat) -> Tensor:
    if scale_format not in ("fp32", "ue8m0"):
        raise PrecisionError(f"scale format {scale_format!r} is neither 'fp32' nor 'ue8m0'")
    dtype = torch.float32 if scale_format == "fp32" else torch.float8_e8m0fnu
    return torch.empty(scale_shape(x.shape, tile), dtype=dtype, device=x.device)


def _empty_transposed(x: Tensor, dtype: torch.dtype, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    codes = torch.empty(*x.shape[:-2], x.shape[-1], x.shape[-2], dtype=dtype, device=x.device)
    return codes, _empty_scales(codes, TILE, scale_format)


def _bytes(scales: Tensor) -> Tensor:
    """Return scales in a type that Triton knows: codes of UE8M0 are bytes."""
    return scales if scales.dtype == torch.float32 else scales.view(torch.uint8)


def variants() -> list[Variant]:
    """Return what the functions above start, for :mod:`cofire.precision.triton.compile`."""
    largest = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
    found = []
    for x, dtype, power_of_two, whole in (
        ("bf16", "fp8e4nv", False, True),
        ("bf16", "fp8e4nv", True, True),
        ("fp32", "fp8e4nv", False, True),
        ("fp16", "fp8e4nv", True, False),
        ("bf16", "fp8e5", False, False),
    ):
        found += _variants_of(x, dtype, Launch(largest[dtype], power_of_two, whole))
    return found


def _variants_of(x: str, dtype: str, launch: Launch) -> list[Variant]:
    codes, scales = f"*{dtype}", "*u8" if launch.power_of_two else "*fp32"
    sizes, floor = {"rows": "i32", "columns": "i32"}, {"floor": "fp32"}
    tiles = {"num_tiles": "i32", "columns": "i32"}
    forward = {"x": f"*{x}", "codes": codes, "scales": scales}
    back = {"codes": codes, "scales": scales, "values": f"*{x}"}
    row_out = {"row_codes": codes, "row_scales": scales}
    no_row = {"row_codes": None, "row_scales": None}
    whole = {"WHOLE": launch.whole}
    columns, both = replace(launch, width=_WIDTH), replace(launch, rows_out=True, transposed=True)
    turned = replace(columns, transposed=True)
    kept = {"x": codes, "x_scales": scales}
    plain = {"x_scales": None}
    name = f"{x} {dtype} {'ue8m0' if launch.power_of_two else 'fp32'} {'whole' if launch.whole else 'ragged'}"
    rows = [
        ("rows", _quantize_rows, forward | tiles | floor, {"LAUNCH": launch, "TILES": _TILES}),
        ("blocks", _quantize_blocks, forward | sizes | floor, {"LAUNCH": launch}),
        ("columns", _quantize_patches, forward | sizes | floor, plain | no_row | {"LAUNCH": columns}),
        ("columns", _quantize_patches, forward | sizes | floor, plain | no_row | {"LAUNCH": turned}),
        ("columns", _quantize_patches, forward | kept | sizes | floor, no_row | {"LAUNCH": turned}),
        ("both", _quantize_patches, forward | row_out | sizes | floor, plain | {"LAUNCH": both}),
        ("dequantize_rows", _dequantize_rows, back | tiles, whole | {"TILES": _TILES}),
        ("dequantize_patches", _dequantize_patches, back | sizes, whole | {"BY_COLUMN": True}),
        ("dequantize_patches", _dequantize_patches, back | sizes, whole | {"BY_COLUMN": False}),
    ]
    return [
        Variant(f"{kind} {index} {name}", kernel, signature, constants, {"num_warps": WARPS[kind], **OPTIONS})
        for index, (kind, kernel, signature, constants) in enumerate(rows)
    ]
