"""Fprop, Dgrad and Wgrad of a linear layer, or of one per expert, on FP8 operands.

With a recipe's ``backend`` the products are those of ``gemm.py``, as a GPU's tensor cores or their model compute them.
Without one they run on dequantised operands, in BF16 or, for a CPU's FP32 activations, in FP32: they have FP8's
rounding of operands, not the narrow accumulators of a tensor core. Wgrad's tiles begin anew with each expert's rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cofire.precision.codec import GRADIENT_FLOOR
from cofire.precision.gemm import grouped_gemm, grouped_wgrad, scaled_gemm, transpose
from cofire.precision.product import grouped_product, grouped_weight_gradient, product, weight_gradient
from cofire.precision.quantize import (
    AMAX_FLOOR,
    BLOCK,
    COLUMN_TILE,
    TILE,
    Quantized,
    ScaleFormat,
    TileShape,
    quantize,
    quantize_and_round,
    quantize_both,
    quantize_transposed,
    requantize_transposed,
    round_values,
)
from cofire.precision.recipe import FP8Recipe

_ROWS = 128


class Operand(NamedTuple):
    """A tensor in FP8, and its values where they are what is multiplied."""

    quantized: Quantized
    values: Tensor | None


def operand(x: Tensor, tile: TileShape, scale_format: ScaleFormat, recipe: FP8Recipe, tensor: str) -> Operand:
    """Quantise an input or a weight, and show it to the recipe's watch under the name ``tensor``."""
    if recipe.backend is None:
        q, values = quantize_and_round(x, tile, scale_format=scale_format)
        recipe.see(tensor, x, values)
        return Operand(q, values)
    q = quantize(x, tile, scale_format=scale_format)
    recipe.see(tensor, x, q)
    return Operand(q, None)


def fprop(x: Operand, weight: Operand, rows: list[int] | None, recipe: FP8Recipe, dtype: torch.dtype) -> Tensor:
    """Return ``x @ weight.T``.

    Args:
        x: [M, I] in ``TILE``.
        weight: [O, I], or [E, O, I], in ``BLOCK``.
        rows: Of each expert; None: there is one matrix.
        recipe: How.
        dtype: Of the result.

    Returns:
        [M, O].
    """
    if recipe.backend is not None:
        return _scaled(x.quantized, weight.quantized, rows, recipe, dtype)
    assert x.values is not None
    assert weight.values is not None
    return _multiplied(x.values, weight.values, rows, dtype).to(dtype)


class Gradient(NamedTuple):
    """An output's gradient [M, O], and what Dgrad and Wgrad take of it where one pass makes both."""

    exact: Tensor
    by_row: Quantized | None = None
    by_column: Quantized | None = None


def gradient(grad: Tensor, rows: list[int] | None, recipe: FP8Recipe) -> Gradient:
    """Return an output's gradient for :func:`dgrad` and :func:`wgrad`, both of which will be called."""
    if recipe.backend is None or rows is not None or recipe.gradient_tile != TILE:
        return Gradient(grad)
    return Gradient(grad, *quantize_both(grad, scale_format=recipe.gradient_scale, amax_floor=GRADIENT_FLOOR))


def dgrad(grad: Gradient, weight: Quantized, rows: list[int] | None, recipe: FP8Recipe, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ weight`` with the gradient in the recipe's tiles.

    Args:
        grad: Of the output.
        weight: [O, I], or [E, O, I], in ``BLOCK``.
        rows: As for :func:`fprop`.
        recipe: How.
        dtype: Of the result.

    Returns:
        [M, I].
    """
    tile, scale_format = recipe.gradient_tile, recipe.gradient_scale
    if recipe.backend is None:
        values = round_values(grad.exact, tile, scale_format=scale_format, amax_floor=GRADIENT_FLOOR)
        recipe.see("gradient", grad.exact, values)
        return _multiplied(values, weight.dequantize().mT, rows, grad.exact.dtype).to(dtype)
    q = grad.by_row or quantize(grad.exact, tile, scale_format=scale_format, amax_floor=GRADIENT_FLOOR)
    recipe.see("gradient", grad.exact, q)
    return _scaled(_in_row_tiles(q), transpose(weight), rows, recipe, dtype)


def wgrad(
    grad: Gradient,
    inputs: Tensor | Quantized,
    scale_format: ScaleFormat,
    rows: list[int] | None,
    recipe: FP8Recipe,
) -> Tensor:
    """Return ``grad.T @ inputs`` with both in tiles of 128 x 1.

    Args:
        grad: Of the output.
        inputs: [M, I], or as they were kept, in ``TILE``.
        scale_format: Of the inputs in their new tiles.
        rows: As for :func:`fprop`.
        recipe: How.

    Returns:
        [O, I], or [E, O, I]; FP32.
    """
    where = None if rows is None else _expert_places(rows, grad.exact.device)
    if recipe.backend is None:
        values = inputs if isinstance(inputs, Tensor) else inputs.dequantize()
        by_column = _in_column_tiles(grad.exact, recipe.gradient_scale, GRADIENT_FLOOR, where, grad.exact.dtype)
        columns = _in_column_tiles(values, scale_format, AMAX_FLOOR, where, grad.exact.dtype)
        if rows is None:
            return weight_gradient(by_column, columns).float()
        return grouped_weight_gradient(by_column, columns, rows).float()
    left = grad.by_column or _turned(grad.exact, recipe.gradient_scale, GRADIENT_FLOOR, where)
    right = _turned(inputs, scale_format, AMAX_FLOOR, where)
    if rows is None:
        return scaled_gemm(left, right, recipe.backend)
    return grouped_wgrad(left, right, torch.tensor(rows, device=grad.exact.device), recipe.backend)


def _turned(
    x: Tensor | Quantized, scale_format: ScaleFormat, floor: float, where: tuple[Tensor, int] | None
) -> Quantized:
    """Return the transpose in tiles of 1 x 128, each expert's columns filled up to whole tiles."""
    if isinstance(x, Quantized) and where is None:
        return requantize_transposed(x, scale_format, floor)
    values = x if isinstance(x, Tensor) else x.dequantize()
    return quantize_transposed(_spread(values, where), scale_format=scale_format, amax_floor=floor)


def _scaled(x: Quantized, weight: Quantized, rows: list[int] | None, recipe: FP8Recipe, dtype: torch.dtype) -> Tensor:
    assert recipe.backend is not None
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if rows is None:
        return scaled_gemm(x, weight, recipe.backend, wide).to(dtype)
    counts = torch.tensor(rows, device=x.data.device)
    return grouped_gemm(x, weight, counts, recipe.backend, wide).to(dtype)


def _in_row_tiles(q: Quantized) -> Quantized:
    """Return the same values with a scale for each row of a block, as products take them."""
    if q.tile != BLOCK:
        return q
    scale = q.scale.repeat_interleave(_ROWS, dim=-2)[..., : q.data.shape[-2], :]
    return Quantized(q.data, scale.contiguous(), TILE)


def _multiplied(x: Tensor, weight: Tensor, rows: list[int] | None, dtype: torch.dtype) -> Tensor:
    x, weight = _as_operand(x, dtype), _as_operand(weight, dtype)
    return product(x, weight) if rows is None else grouped_product(x, weight, rows)


def _in_column_tiles(
    x: Tensor, scale_format: ScaleFormat, floor: float, where: tuple[Tensor, int] | None, dtype: torch.dtype
) -> Tensor:
    values = round_values(_spread(x, where), COLUMN_TILE, scale_format=scale_format, amax_floor=floor)
    return _as_operand(values if where is None else values.index_select(0, where[0]), dtype)


def _as_operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in the type in which products run on them, beside activations or gradients of type ``dtype``."""
    wide = values.device.type == "cpu" and dtype != torch.bfloat16
    return values.to(torch.float32 if wide else torch.bfloat16)


def _spread(x: Tensor, where: tuple[Tensor, int] | None) -> Tensor:
    """Return rows with each expert's filled up to whole tiles."""
    return x if where is None else x.new_zeros(where[1], x.shape[1]).index_copy_(0, where[0], x)


def _expert_places(rows: list[int], device: torch.device) -> tuple[Tensor, int]:
    """Return where each row goes if every expert's rows are filled up to whole tiles, and the rows then."""
    numbers = torch.tensor(rows)
    filled = (numbers + _ROWS - 1) // _ROWS * _ROWS
    shift = filled.cumsum(0) - filled - (numbers.cumsum(0) - numbers)
    place = torch.arange(int(numbers.sum())) + shift.repeat_interleave(numbers)
    return place.to(device), int(filled.sum())
