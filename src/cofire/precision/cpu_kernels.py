"""FP8 by tiles on the CPU, in native code; the only importer of ``cofire.precision._native``.

One pass over memory where PyTorch's operations take six. ``quantize.py`` has the same in PyTorch, which is what the
tests compare with. Left out: tiles of whole rows and of the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.errors import PrecisionError

try:
    from cofire.precision import _native
except ImportError as error:  # pragma: no cover - a broken installation
    raise PrecisionError(
        f"the native core does not load ({error}); install Cofire again where a C++20 compiler is: pip install cofire"
    ) from None

_ELEMENTS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}


def quantize_tiles(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, power_of_two: bool, amax_floor: float
) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of ``x``.

    Args:
        x: [..., R, C], FP32, contiguous, on the CPU.
        tile: (1, w), (h, 1) or (h, w).
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        power_of_two: Scales are ``float8_e8m0fnu``; else ``float32``.
        amax_floor: A tile's largest value counts as at least this.

    Returns:
        [..., R, C] and [..., ceil(R / h), ceil(C / w)].
    """
    codes, scales = _empty(x, tile, dtype, power_of_two)
    _quantize(x, codes, scales, None, tile, dtype, power_of_two, amax_floor)
    return codes, scales


def quantize_and_round(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, power_of_two: bool, amax_floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`quantize_tiles` and :func:`round_to_tiles` return, in one pass."""
    (codes, scales), values = _empty(x, tile, dtype, power_of_two), torch.empty_like(x)
    _quantize(x, codes, scales, values, tile, dtype, power_of_two, amax_floor)
    return codes, scales, values


def round_to_tiles(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, power_of_two: bool, amax_floor: float
) -> Tensor:
    """Return the values of :func:`quantize_tiles`'s codes and scales, [..., R, C] FP32, without making them."""
    values = torch.empty_like(x)
    _quantize(x, None, None, values, tile, dtype, power_of_two, amax_floor)
    return values


def dequantize_tiles(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the values of codes and scales as :func:`quantize_tiles` makes them, [..., R, C] FP32."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    _native.dequantize(
        codes.data_ptr(),
        scales.data_ptr(),
        values.data_ptr(),
        *_sizes(codes),
        *tile,
        _ELEMENTS[codes.dtype],
        scales.dtype != torch.float32,
        torch.get_num_threads(),
    )
    return values


def _quantize(
    x: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    values: Tensor | None,
    tile: tuple[int, int],
    dtype: torch.dtype,
    power_of_two: bool,
    amax_floor: float,
) -> None:
    codes_at, scales_at, values_at = (0 if tensor is None else tensor.data_ptr() for tensor in (codes, scales, values))
    batches, rows, columns = _sizes(x)
    _native.quantize(
        x.data_ptr(),
        codes_at,
        scales_at,
        values_at,
        batches,
        rows,
        columns,
        *tile,
        _ELEMENTS[dtype],
        power_of_two,
        amax_floor,
        torch.get_num_threads(),
    )


def _sizes(x: Tensor) -> tuple[int, int, int]:
    rows, columns = x.shape[-2:]
    return (x.numel() // (rows * columns) if x.numel() else 0), rows, columns


def _empty(x: Tensor, tile: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return memory for codes and scales."""
    *batch, rows, columns = x.shape
    shape = (*batch, -(-rows // tile[0]), -(-columns // tile[1]))
    scales = torch.empty(shape, dtype=torch.float8_e8m0fnu if power_of_two else torch.float32)
    return torch.empty(x.shape, dtype=dtype), scales
