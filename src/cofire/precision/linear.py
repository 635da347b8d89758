"""Linear layers whose three products take FP8 operands, alone and behind SwiGLU.

Fprop ``y = x w'``, Dgrad ``dx = dy w`` and Wgrad ``dw = dy' x`` (DeepSeek-V3 technical report, 3.3.1 and 3.3.2):
``x`` and ``dy`` in tiles of 1 x 128 along what is contracted, so 128 x 1 for Wgrad; ``w`` in blocks of 128 x 128, which
serve both directions. Weights and their gradients are FP32.

What is kept for the backward pass (3.3.3) beside the FP8 weight is the input in FP8, whose values are rounded once more
into tiles of 128 x 1, with two exceptions:

- The input of the layer after attention is kept in E5M6 with scales that are powers of two. Fprop takes it in E4M3 all
  the same; Wgrad takes the copy's values in E4M3 and tiles of 128 x 1. In the report the backward pass of attention
  reads this copy as well, which is why it has six bits after the point; ours does not.
- Behind SwiGLU only SwiGLU's own input is kept, in FP8 and tiles of 1 x 128; its output is computed again. The report
  does not say through which tiles that output reaches Wgrad. Here it is rounded to 128 x 1 at once: going through
  1 x 128, as Fprop's operand did, would round a second time.

``recipe.py`` says how, ``layer_products.py`` multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire.errors import PrecisionError
from cofire.precision.codec import E5M6Codec
from cofire.precision.layer_products import Gradient, Operand, dgrad, fprop, gradient, operand, wgrad
from cofire.precision.quantize import BLOCK, TILE, Quantized, quantize
from cofire.precision.recipe import FP8Recipe

_E5M6 = E5M6Codec()
_INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: FP8Recipe) -> Tensor:
    """Return ``x @ weight.T + bias`` with FP8 operands, forward and backward.

    An infinity or a NaN makes its tile NaN, and with it the sums that the tile takes part in.

    Args:
        x: [..., I], FP32, BF16 or FP16.
        weight: [O, I].
        bias: [O] or none; added in the type of ``x``.
        recipe: How.

    Returns:
        [..., O] of the type of ``x``, or of autocast where that is on.

    Raises:
        PrecisionError: Shapes, types or devices do not fit.
    """
    _check(x, weight, None, x.shape[-1:])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PrecisionError(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}; give [O] for [O, I]")
    dtype = _result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        y = _FP8Linear.apply(rows, weight, None, recipe, torch.is_grad_enabled(), dtype)
    assert isinstance(y, Tensor)
    y = y.view(*x.shape[:-1], weight.shape[0])
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
        [M, O] of the type of ``x``, or of autocast where that is on.

    Raises:
        PrecisionError: Shapes, types, devices or counts do not fit.
    """
    rows = _check(x, weight, counts, x.shape[-1:])
    dtype = _result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = _FP8Linear.apply(x, weight, rows, recipe, torch.is_grad_enabled(), dtype)
    assert isinstance(y, Tensor)
    return y


def fp8_swiglu_linear(gate_up: Tensor, weight: Tensor, recipe: FP8Recipe) -> Tensor:
    """Return ``swiglu(gate_up) @ weight.T`` with FP8 operands, keeping only ``gate_up`` in FP8 (report, 3.3.3).

    The output comes from ``gate_up`` as it is; gradients see its FP8 values. Its two halves have tiles of their own.

    Args:
        gate_up: [..., 2 F], gate and up side by side, FP32, BF16 or FP16.
        weight: [O, F].
        recipe: Of the product.

    Returns:
        [..., O] of the type of ``gate_up``, or of autocast where that is on.

    Raises:
        PrecisionError: Shapes, types or devices do not fit.
    """
    _check(gate_up, weight, None, _half(gate_up))
    dtype = _result_dtype(gate_up)
    with torch.autocast(gate_up.device.type, enabled=False):
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        y = _FP8SwiGLULinear.apply(rows, weight, None, recipe, torch.is_grad_enabled(), dtype)
    assert isinstance(y, Tensor)
    return y.view(*gate_up.shape[:-1], weight.shape[0])


def fp8_grouped_swiglu_linear(gate_up: Tensor, weight: Tensor, counts: Tensor, recipe: FP8Recipe) -> Tensor:
    """Do what :func:`fp8_swiglu_linear` does for the rows of each expert and its matrix.

    Args:
        gate_up: [M, 2 F], rows sorted by expert.
        weight: [E, O, F].
        counts: [E] int64, rows of each expert; they sum to M.
        recipe: Of the product.

    Returns:
        [M, O] of the type of ``gate_up``, or of autocast where that is on.

    Raises:
        PrecisionError: Shapes, types, devices or counts do not fit.
    """
    rows = _check(gate_up, weight, counts, _half(gate_up))
    dtype = _result_dtype(gate_up)
    with torch.autocast(gate_up.device.type, enabled=False):
        y = _FP8SwiGLULinear.apply(gate_up, weight, rows, recipe, torch.is_grad_enabled(), dtype)
    assert isinstance(y, Tensor)
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` (arXiv 2002.05202) outside autograd, [..., 2 F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient [..., 2 F] of :func:`swiglu`'s input for that of its output, [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


class _FP8Linear(torch.autograd.Function):
    """Rows [M, I] by [O, I], or by [E, O, I] where ``counts`` says how many rows each expert has."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: list[int] | None,
        recipe: FP8Recipe,
        keeps: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = operand(x, TILE, recipe.input_scale, recipe, "input")
        kept = ()
        if keeps:
            in_fp8 = inputs.quantized.data, inputs.quantized.scale
            kept = (_E5M6.encode(x),) if recipe.kept == "e5m6" else in_fp8
        weights = _keep(ctx, weight, kept, recipe)
        ctx.counts, ctx.dtype, ctx.shape = counts, x.dtype, x.shape
        return fprop(inputs, weights, counts, recipe, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale, *kept = ctx.saved_tensors
        recipe: FP8Recipe = ctx.recipe
        grad_x = grad_weight = None
        grad = _gradient(ctx, grads[0])
        if ctx.needs_input_grad[0]:
            grad_x = dgrad(grad, Quantized(weight, scale, BLOCK), ctx.counts, recipe, ctx.dtype)
        if ctx.needs_input_grad[1]:
            in_e5m6 = recipe.kept == "e5m6"
            inputs = _E5M6.decode(kept[0], ctx.shape[1]) if in_e5m6 else Quantized(kept[0], kept[1], TILE)
            scale_format = "ue8m0" if in_e5m6 else recipe.input_scale
            grad_weight = wgrad(grad, inputs, scale_format, ctx.counts, recipe)
        return grad_x, grad_weight, None, None, None, None


class _FP8SwiGLULinear(torch.autograd.Function):
    """SwiGLU's output by a matrix, or by one per expert; of both only SwiGLU's input waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        weight: Tensor,
        counts: list[int] | None,
        recipe: FP8Recipe,
        keeps: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        hidden = swiglu(gate_up.float())
        inputs = operand(hidden, TILE, recipe.input_scale, recipe, "input")
        kept = ()
        if keeps:
            q = quantize(_halves(gate_up))
            kept = (q.data, q.scale)
        weights = _keep(ctx, weight, kept, recipe)
        ctx.counts, ctx.dtype, ctx.shape = counts, gate_up.dtype, gate_up.shape
        return fprop(inputs, weights, counts, recipe, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale, data, data_scale = ctx.saved_tensors
        recipe: FP8Recipe = ctx.recipe
        gate_up = Quantized(data, data_scale, TILE).dequantize().view(ctx.shape)
        grad_gate_up = grad_weight = None
        grad = _gradient(ctx, grads[0])
        if ctx.needs_input_grad[0]:
            grad_hidden = dgrad(grad, Quantized(weight, scale, BLOCK), ctx.counts, recipe, torch.float32)
            grad_gate_up = swiglu_gradient(gate_up, grad_hidden).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = wgrad(grad, swiglu(gate_up), recipe.input_scale, ctx.counts, recipe)
        return grad_gate_up, grad_weight, None, None, None, None


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _keep(ctx: Any, weight: Tensor, kept: tuple[Tensor, ...], recipe: FP8Recipe) -> Operand:
    """Keep the weight in FP8 and ``kept`` for the backward pass; return the weight."""
    weights = operand(weight, BLOCK, "fp32", recipe, "weight")
    ctx.save_for_backward(weights.quantized.data, weights.quantized.scale, *kept)
    ctx.recipe = recipe
    return weights


def _gradient(ctx: Any, grad: Tensor) -> Gradient:
    """Return the output's gradient for those of Dgrad and Wgrad that are asked for."""
    wants_both = all(ctx.needs_input_grad[:2])
    return gradient(grad, ctx.counts, ctx.recipe) if wants_both else Gradient(grad)


def _halves(gate_up: Tensor) -> Tensor:
    """Return [2 M, F] for [M, 2 F]: no tile then holds numbers of both gate and up."""
    return gate_up.reshape(2 * gate_up.shape[0], gate_up.shape[1] // 2)


def _half(gate_up: Tensor) -> torch.Size:
    if gate_up.shape[-1:].numel() % 2:
        raise PrecisionError(f"gate_up {list(gate_up.shape)} has no two halves; its last size must be even")
    return torch.Size(size // 2 for size in gate_up.shape[-1:])


def _check(x: Tensor, weight: Tensor, counts: Tensor | None, inputs: torch.Size) -> list[int] | None:
    """Return the experts' rows, once it is clear that the operands fit; ``inputs``: [I], columns of the operand."""
    wanted = "[O, I]" if counts is None else "[E, O, I]"
    for name, each in (("x", x), ("weight", weight)):
        if each.dtype not in _INPUT_TYPES:
            raise PrecisionError(f"{name} of {each.dtype} is not quantised; give float32, bfloat16 or float16")
    if weight.device != x.device:
        raise PrecisionError(f"x on {x.device} and weight on {weight.device}; move one of them")
    if weight.dim() != wanted.count(",") + 1 or weight.shape[-1:] != inputs or not inputs.numel():
        raise PrecisionError(
            f"weight {list(weight.shape)} does not take {list(inputs)} inputs of x {list(x.shape)}; it must be {wanted}"
        )
    return None if counts is None else _checked_counts(x, weight, counts)


def _checked_counts(x: Tensor, weight: Tensor, counts: Tensor) -> list[int]:
    if x.dim() != 2:
        raise PrecisionError(f"rows of shape {list(x.shape)} are no [M, I]; flatten all dims but the last")
    if counts.shape != weight.shape[:1] or counts.dtype not in (torch.int64, torch.int32):
        raise PrecisionError(
            f"counts {list(counts.shape)} of {counts.dtype} do not fit {weight.shape[0]} experts; "
            f"they must be {[weight.shape[0]]} of torch.int64"
        )
    rows = counts.tolist()
    if min(rows, default=0) < 0 or sum(rows) != x.shape[0]:
        raise PrecisionError(f"counts sum to {sum(rows)}, with {x.shape[0]} rows; they must sum to the rows, all >= 0")
    return rows
