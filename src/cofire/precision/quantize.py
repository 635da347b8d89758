"""FP8 with fine-grained scales: tiles, blocks, rows and whole tensors, and the way back.

A value is ``data * scale`` with one scale per tile: 1 x 128 along the contraction for activations and gradients,
128 x 1 where rows are contracted, 128 x 128 for weights (DeepSeek-V3 technical report, 3.3.2), or a row or the tensor,
which the report compares with. ``scale = max(amax, floor) / largest``, found from the data at hand, in FP32, or the
next power of two (UE8M0: 2 ** ceil(log2), as DeepSeek-V3.1's weights have it). Data are rounded to nearest, ties to
even.

The format of a scale is its PyTorch type, ``float32`` or ``float8_e8m0fnu``, and is never read as another one: a change
of format or of tiles takes the values through :func:`requantize`. Left out: scales kept from earlier steps, stochastic
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision import cpu_kernels
from cofire.precision.formats import ue8m0_scale

ScaleFormat = Literal["fp32", "ue8m0"]
TileShape = tuple[int | None, int | None]

# Rows and columns that share a scale; none: all of them.
TILE: TileShape = (1, 128)
COLUMN_TILE: TileShape = (128, 1)
BLOCK: TileShape = (128, 128)
ROW: TileShape = (1, None)
TENSOR: TileShape = (None, None)

# DeepSeek's kernels take at least this for a tile's largest value, so that a tile of zeros has a scale.
AMAX_FLOOR = 1e-4
_DATA_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_TYPES = {"fp32": torch.float32, "ue8m0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class Quantized:
    """Values in FP8 with their scales.

    Attributes:
        data: [..., R, C], ``float8_e4m3fn`` or ``float8_e5m2``.
        scale: [..., ceil(R / rows), ceil(C / columns)], ``float32`` or ``float8_e8m0fnu``; multiplies.
        tile: Rows and columns that share a scale.
    """

    data: Tensor
    scale: Tensor
    tile: TileShape

    def __post_init__(self) -> None:
        """Check that data and scales belong together.

        Raises:
            PrecisionError: They do not.
        """
        if self.data.dtype not in _DATA_TYPES:
            raise PrecisionError(f"data of {self.data.dtype} is not FP8; quantize() makes float8_e4m3fn or float8_e5m2")
        if self.scale.dtype not in SCALE_TYPES.values():
            raise PrecisionError(
                f"scales of {self.scale.dtype} are neither float32 nor float8_e8m0fnu; requantize() converts values"
            )
        expected = scale_shape(self.data.shape, self.tile)
        if tuple(self.scale.shape) != expected:
            raise PrecisionError(
                f"scales {list(self.scale.shape)} do not fit data {list(self.data.shape)} in tiles of "
                f"{_name(self.tile)}; they must be {list(expected)}"
            )
        if self.scale.device != self.data.device:
            raise PrecisionError(f"scales on {self.scale.device} and data on {self.data.device}; move one of them")

    @property
    def scale_format(self) -> ScaleFormat:
        """How scales are kept."""
        return "fp32" if self.scale.dtype == torch.float32 else "ue8m0"

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, [..., R, C]; exact in FP32 but for one rounding of the product with an FP32 scale."""
        dense = self.data.is_contiguous() and self.scale.is_contiguous()
        gpu = _gpu_kernels(self.data)
        if dense and gpu is not None and self.tile in gpu.TILES and dtype in gpu.VALUE_TYPES:
            return gpu.dequantize(self, dtype)
        if dense and _has_kernel(self.data, self.tile):
            return cpu_kernels.dequantize_tiles(self.data, self.scale, _fixed(self.tile)).to(dtype)
        values = self.data.to(torch.float32)
        view, original = _in_tiles(values, self.tile)
        scaled = view.mul_(self.scale.float()[..., :, None, :, None])
        return _from_tiles(scaled, original).to(dtype)


def quantize(
    x: Tensor,
    tile: TileShape = TILE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> Quantized:
    """Quantise with scales from the data at hand.

    A tile that holds an infinity or a NaN decodes to NaN throughout, so that a broken step is seen.

    Args:
        x: [..., R, C], FP32, BF16 or FP16. Sizes need not be multiples of the tile's: the last tiles are smaller.
        tile: Rows and columns that share a scale.
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        scale_format: FP32, or powers of two.
        amax_floor: A tile's largest value counts as at least this.

    Raises:
        PrecisionError: A type is not one of these, or ``x`` is a scalar or a vector.
    """
    x = _checked(x, dtype, scale_format)
    if _has_kernel(x, tile):
        codes, scale = cpu_kernels.quantize_tiles(
            x.float().contiguous(), _fixed(tile), dtype, scale_format == "ue8m0", amax_floor
        )
        return Quantized(codes, scale, tile)
    return _quantize_elsewhere(x, tile, dtype, scale_format, amax_floor)


def round_values(
    x: Tensor,
    tile: TileShape = TILE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> Tensor:
    """Return ``quantize(...).dequantize()``, [..., R, C] FP32, in one pass where there is a kernel for that."""
    x = _checked(x, dtype, scale_format)
    if _has_kernel(x, tile):
        return cpu_kernels.round_to_tiles(
            x.float().contiguous(), _fixed(tile), dtype, scale_format == "ue8m0", amax_floor
        )
    return _quantize_elsewhere(x, tile, dtype, scale_format, amax_floor).dequantize()


def quantize_and_round(
    x: Tensor,
    tile: TileShape = TILE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> tuple[Quantized, Tensor]:
    """Return ``q = quantize(...)`` and ``q.dequantize()``, in one pass where there is a kernel for that."""
    x = _checked(x, dtype, scale_format)
    if _has_kernel(x, tile):
        codes, scale, values = cpu_kernels.quantize_and_round(
            x.float().contiguous(), _fixed(tile), dtype, scale_format == "ue8m0", amax_floor
        )
        return Quantized(codes, scale, tile), values
    q = _quantize_elsewhere(x, tile, dtype, scale_format, amax_floor)
    return q, q.dequantize()


def quantize_transposed(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> Quantized:
    """Return ``quantize(x.mT, TILE)``: columns in tiles of 128 rows, stored one after the other.

    What Wgrad takes of both operands, in one pass where there is a kernel for that.

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
    x = _checked(x, dtype, scale_format)
    gpu = _gpu_kernels(x)
    if gpu is not None and gpu.takes(TILE, dtype, amax_floor):
        return gpu.quantize_transposed(x.contiguous(), dtype, scale_format, amax_floor)
    return quantize(x.mT, TILE, dtype, scale_format, amax_floor)


def quantize_both(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "fp32",
    amax_floor: float = AMAX_FLOOR,
) -> tuple[Quantized, Quantized]:
    """Return ``quantize(x, TILE)`` and ``quantize_transposed(x)``, what Dgrad and Wgrad take of a gradient.

    Reads memory once where there is a kernel for that. Arguments and errors are those of :func:`quantize_transposed`.
    """
    x = _checked(x, dtype, scale_format)
    gpu = _gpu_kernels(x)
    if gpu is not None and gpu.takes(TILE, dtype, amax_floor):
        return gpu.quantize_both(x.contiguous(), dtype, scale_format, amax_floor)
    return quantize(x, TILE, dtype, scale_format, amax_floor), quantize_transposed(x, dtype, scale_format, amax_floor)


def requantize_transposed(
    q: Quantized, scale_format: ScaleFormat | None = None, amax_floor: float = AMAX_FLOOR
) -> Quantized:
    """Return ``quantize_transposed`` of the values of ``q``; rounds once more.

    What Wgrad takes of an input that was kept in FP8, in one pass where there is a kernel for that.

    Args:
        q: [..., R, C] in ``TILE``.
        scale_format: None: its own.
        amax_floor: As for :func:`quantize`.

    Returns:
        Data [..., C, R] and scales [..., C, ceil(R / 128)].
    """
    gpu = _gpu_kernels(q.data)
    dense = q.data.is_contiguous() and q.scale.is_contiguous()
    if dense and q.tile == TILE and gpu is not None and gpu.takes(TILE, q.data.dtype, amax_floor):
        return gpu.requantize_transposed(q, scale_format, amax_floor)
    return quantize_transposed(q.dequantize(), q.data.dtype, scale_format or q.scale_format, amax_floor)


def _quantize_elsewhere(
    x: Tensor, tile: TileShape, dtype: torch.dtype, scale_format: ScaleFormat, amax_floor: float
) -> Quantized:
    """Quantise what the native code does not take, with Triton's kernels or PyTorch's operations: the same bits."""
    gpu = _gpu_kernels(x)
    if gpu is not None and gpu.takes(tile, dtype, amax_floor):
        return gpu.quantize(x.contiguous(), tile, dtype, scale_format, amax_floor)
    return _quantize(x.float(), tile, dtype, scale_format, amax_floor)


def _quantize(
    x: Tensor, tile: TileShape, dtype: torch.dtype, scale_format: ScaleFormat, amax_floor: float
) -> Quantized:
    """Quantise with PyTorch's operations, on any device."""
    view, original = _in_tiles(x, tile)
    scale = scale_of(_amax(view), torch.finfo(dtype).max, scale_format, amax_floor)
    scaled = view / scale.float()[..., :, None, :, None]
    return Quantized(_from_tiles(scaled, original).to(dtype), scale, tile)


def scale_of(amax: Tensor, largest: float, scale_format: ScaleFormat, amax_floor: float = AMAX_FLOOR) -> Tensor:
    """Return the scales of tiles with these largest magnitudes.

    Args:
        amax: FP32.
        largest: Of the data's format.
        scale_format: FP32, or the power of two that is not below it.
        amax_floor: ``amax`` counts as at least this.

    Returns:
        ``float32`` or ``float8_e8m0fnu``; NaN where ``amax`` is not finite.
    """
    least = amax.clamp(min=amax_floor)
    if scale_format == "ue8m0":
        return ue8m0_scale(least, largest).to(torch.float8_e8m0fnu)
    # By a tensor: CUDA divides by a number of Python with its rounded reciprocal.
    return torch.where(amax.isfinite(), least / torch.full_like(least, largest), torch.nan)


def requantize(
    q: Quantized,
    tile: TileShape | None = None,
    scale_format: ScaleFormat | None = None,
    amax_floor: float = AMAX_FLOOR,
) -> Quantized:
    """Return the same values in other tiles or with scales of another format; rounds once more.

    Args:
        q: What.
        tile: None: its own.
        scale_format: None: its own.
        amax_floor: As for :func:`quantize`.
    """
    return quantize(q.dequantize(), tile or q.tile, q.data.dtype, scale_format or q.scale_format, amax_floor=amax_floor)


def scale_shape(shape: torch.Size | tuple[int, ...], tile: TileShape) -> tuple[int, ...]:
    """Return the shape of the scales of data [..., R, C]."""
    *batch, rows, columns = shape
    return (*batch, _count(rows, tile[0]), _count(columns, tile[1]))


def _checked(x: Tensor, dtype: torch.dtype, scale_format: ScaleFormat) -> Tensor:
    """Return values outside autograd, once it is clear that they can be quantised."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise PrecisionError(f"{x.dtype} is not quantised; give float32, bfloat16 or float16")
    if dtype not in _DATA_TYPES:
        raise PrecisionError(f"{dtype} is not an FP8 format; take float8_e4m3fn or float8_e5m2")
    if scale_format not in SCALE_TYPES:
        raise PrecisionError(f"scale format {scale_format!r} is neither 'fp32' nor 'ue8m0'")
    if x.dim() == 0:
        raise PrecisionError("a scalar has no tiles; give a matrix")
    if x.dim() == 1:
        raise PrecisionError(f"a vector of {x.numel()} has no rows and columns; give x.unsqueeze(0)")
    return x.detach()


def _has_kernel(x: Tensor, tile: TileShape) -> bool:
    """Return whether ``cpu_kernels`` takes a tensor; it makes dense ones."""
    return x.device.type == "cpu" and None not in tile and x.numel() > 0 and not torch.compiler.is_compiling()


def _gpu_kernels(x: Tensor) -> Any:
    """Return the module of Triton's kernels if they run where a tensor is, else None."""
    if x.device.type != "cuda":
        return None
    from cofire.precision import triton

    if not triton.runs_on(x.device):
        return None
    from cofire.precision.triton import quantize

    return quantize


def _fixed(tile: TileShape) -> tuple[int, int]:
    height, width = tile
    assert height is not None
    assert width is not None
    return height, width


def _name(tile: TileShape) -> str:
    return " x ".join("all" if size is None else str(size) for size in tile)


def _count(size: int, tile: int | None) -> int:
    return 1 if tile is None else -(-size // tile)


def _in_tiles(x: Tensor, tile: TileShape) -> tuple[Tensor, tuple[int, int]]:
    """Return [..., row tiles, rows, column tiles, columns], ragged edges filled with zeros, and the size before."""
    rows, columns = x.shape[-2:]
    height, width = (size if wish is None else wish for size, wish in zip((rows, columns), tile, strict=True))
    num_rows, num_columns = _count(rows, tile[0]), _count(columns, tile[1])
    below, right = num_rows * height - rows, num_columns * width - columns
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    return x.reshape(*x.shape[:-2], num_rows, height, num_columns, width), (rows, columns)


def _from_tiles(view: Tensor, size: tuple[int, int]) -> Tensor:
    *batch, num_rows, height, num_columns, width = view.shape
    x = view.reshape(*batch, num_rows * height, num_columns * width)
    return x if x.shape[-2:] == size else x[..., : size[0], : size[1]].contiguous()


def _amax(view: Tensor) -> Tensor:
    """Return the largest magnitude of each tile, [..., row tiles, column tiles]."""
    if not view.numel():
        return view.new_zeros(*view.shape[:-4], view.shape[-4], view.shape[-2])
    magnitude = view.abs()
    # One dim after the other: PyTorch's reduction over two that do not lie together is slow.
    return magnitude.amax(dim=-1).amax(dim=-2)
