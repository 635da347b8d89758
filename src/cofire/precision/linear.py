"""Linear layers whose three products take FP8 operands.

Fprop ``y = x w'``, Dgrad ``dx = dy w`` and Wgrad ``dw = dy' x`` (DeepSeek-V3 technical report, 3.3.1 and 3.3.2):
``x`` and ``dy`` in tiles of 1 x 128 along what is contracted, so 128 x 1 for Wgrad; ``w`` in blocks of 128 x 128, which
serve both directions. The input is kept for the backward pass in FP8, and taken into tiles of 128 x 1 from there.
Weights and their gradients are FP32.

Products here run on dequantised operands, in FP32 on a CPU and in BF16 elsewhere: they have FP8's rounding of operands,
not the narrow accumulators of a tensor core (``accumulate.py`` has those). Left out: scaled products of a GPU, and E5M6
for the input of the layer after attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire.precision.health import Watch
from cofire.precision.product import grouped_product, grouped_weight_gradient, product, weight_gradient
from cofire.precision.quantize import (
    BLOCK,
    COLUMN_TILE,
    TILE,
    Quantized,
    ScaleFormat,
    TileShape,
    quantize_and_round,
    round_values,
)

# Gradients of a mean over tokens are small: DeepSeek's floor for activations would take them below FP8's range.
GRADIENT_FLOOR = 1e-30
_ROWS = 128


@dataclass(frozen=True)
class FP8Recipe:
    """How one linear layer is quantised.

    Attributes:
        input_scale: Format of the input's scales.
        gradient_scale: Format of the scales of the output's gradient.
        gradient_tile: Of the output's gradient for Dgrad: ``TILE``; ``BLOCK`` is what the report found to diverge.
        layer: Its name, for the watch.
        watch: Sees the operands; none: nobody does.
    """

    input_scale: ScaleFormat = "fp32"
    gradient_scale: ScaleFormat = "fp32"
    gradient_tile: TileShape = TILE
    layer: str = ""
    watch: Watch | None = None

    def see(self, tensor: str, exact: Tensor, rounded: Tensor) -> None:
        """Show the watch an operand before and after."""
        if self.watch is not None:
            self.watch.see(self.layer, tensor, exact, rounded)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: FP8Recipe) -> Tensor:
    """Return ``x @ weight.T + bias`` with FP8 operands, forward and backward.

    Args:
        x: [..., I], FP32, BF16 or FP16.
        weight: [O, I].
        bias: [O] or none; added in the type of ``x``.
        recipe: How.
    """
    with torch.autocast(x.device.type, enabled=False):
        y = _FP8Linear.apply(x, weight, recipe)
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias.to(y.dtype)


def fp8_grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, recipe: FP8Recipe) -> Tensor:
    """Multiply the rows of each expert by the transpose of its matrix, with FP8 operands.

    Tiles of 128 x 1 begin anew with each expert's rows.

    Args:
        x: [M, I], rows sorted by expert.
        weight: [E, O, I].
        counts: [E] int64, rows of each expert; they sum to M.
        recipe: How.

    Returns:
        [M, O].
    """
    with torch.autocast(x.device.type, enabled=False):
        y = _FP8GroupedLinear.apply(x, weight, counts.tolist(), recipe)
    assert isinstance(y, Tensor)
    return y


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: FP8Recipe) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inputs, weights = _forward_operands(ctx, rows, weight, recipe)
        ctx.recipe, ctx.shape, ctx.dtype = recipe, x.shape, x.dtype
        y = product(inputs, weights)
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weights = _saved(ctx)
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            by_row = _gradient(grad, ctx.recipe.gradient_tile, ctx.recipe)
            ctx.recipe.see("gradient", grad, by_row)
            grad_x = product(by_row, _operand(weights).t()).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            columns = _columns(_operand(inputs), ctx.recipe)
            grad_weight = weight_gradient(_gradient(grad, COLUMN_TILE, ctx.recipe), columns).float()
        return grad_x, grad_weight, None


class _FP8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int], recipe: FP8Recipe) -> Tensor:
        inputs, weights = _forward_operands(ctx, x, weight, recipe)
        ctx.recipe, ctx.counts, ctx.dtype = recipe, counts, x.dtype
        return grouped_product(inputs, weights, counts).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weights = _saved(ctx)
        grad, counts = grads[0].contiguous(), ctx.counts
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            by_row = _gradient(grad, ctx.recipe.gradient_tile, ctx.recipe)
            ctx.recipe.see("gradient", grad, by_row)
            grad_x = grouped_product(by_row, _operand(weights).transpose(1, 2), counts).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            place, size = _expert_places(counts, grad.device)
            columns = _columns(_spread(_operand(inputs), place, size), ctx.recipe).index_select(0, place)
            by_column = _gradient(_spread(grad, place, size), COLUMN_TILE, ctx.recipe).index_select(0, place)
            grad_weight = grouped_weight_gradient(by_column, columns, counts).float()
        return grad_x, grad_weight, None, None


def _forward_operands(ctx: Any, x: Tensor, weight: Tensor, recipe: FP8Recipe) -> tuple[Tensor, Tensor]:
    """Quantise both, keep them for the backward pass, and return their values."""
    inputs, x_values = quantize_and_round(x, TILE, scale_format=recipe.input_scale)
    weights, weight_values = quantize_and_round(weight, BLOCK)
    ctx.save_for_backward(inputs.data, inputs.scale, weights.data, weights.scale)
    recipe.see("input", x, x_values)
    recipe.see("weight", weight, weight_values)
    return x_values.to(_product_dtype(x)), weight_values.to(_product_dtype(weight))


def _operand(q: Quantized) -> Tensor:
    """Return values in the type in which products run."""
    return q.dequantize(_product_dtype(q.data))


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" else torch.bfloat16


def _gradient(grad: Tensor, tile: TileShape, recipe: FP8Recipe) -> Tensor:
    values = round_values(grad, tile, scale_format=recipe.gradient_scale, amax_floor=GRADIENT_FLOOR)
    return values.to(_product_dtype(values))


def _columns(values: Tensor, recipe: FP8Recipe) -> Tensor:
    """Return inputs that were in tiles of 1 x 128 in tiles of 128 x 1."""
    return round_values(values, COLUMN_TILE, scale_format=recipe.input_scale).to(values.dtype)


def _saved(ctx: Any) -> tuple[Quantized, Quantized]:
    data, scale, weight_data, weight_scale = ctx.saved_tensors
    return Quantized(data, scale, TILE), Quantized(weight_data, weight_scale, BLOCK)


def _expert_places(counts: list[int], device: torch.device) -> tuple[Tensor, int]:
    """Return where each row goes if every expert's rows are filled up to whole tiles, and the rows then."""
    numbers = torch.tensor(counts)
    filled = (numbers + _ROWS - 1) // _ROWS * _ROWS
    shift = filled.cumsum(0) - filled - (numbers.cumsum(0) - numbers)
    place = torch.arange(int(numbers.sum())) + shift.repeat_interleave(numbers)
    return place.to(device), int(filled.sum())


def _spread(x: Tensor, place: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, x.shape[1]).index_copy_(0, place, x)
