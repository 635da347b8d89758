"""Linear layers, and linear layers of many experts, over the products of ``cofire.precision.product``.

Grouped products multiply the rows of each expert with that expert's matrix. ``grouped_linear`` takes
``torch.nn.functional.grouped_mm`` for 16-bit types on an accelerator. Everywhere else it makes one product
per expert that has rows, inside a single autograd node: on a CPU ``grouped_mm`` is the same loop, costs more
per expert and fails for an expanded gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cofire.precision.linear import fp8_linear
from cofire.precision.product import (
    dense,
    grouped_product,
    grouped_weight_gradient,
    onednn_product,
    product,
    takes_onednn,
    weight_gradient,
)
from cofire.precision.recipe import FP8Recipe


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = product(grad, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or none.
    """
    if not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    x = x if x.is_contiguous() or x.dim() == 2 else x.contiguous()
    x = dense(x) if x.dim() == 2 else x
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _OneDNNLinear.apply(x, weight)
        assert isinstance(y, Tensor)
    else:
        y = onednn_product(x, weight)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose product goes through :func:`linear`.

    Attributes:
        fp8: How its products take FP8 operands; none: they do not.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.fp8: FP8Recipe | None = None

    def reset_parameters(self) -> None:
        """Leave the weights as they are: ``build`` initialises the whole decoder."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product; shapes as in :func:`linear`."""
        if self.fp8 is not None:
            return fp8_linear(input, self.weight, self.bias, self.fp8)
        return linear(input, self.weight, self.bias)


class _PerExpertLinear(torch.autograd.Function):
    """One product per expert with rows: rows are sorted by expert, ``counts`` says how many each has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return grouped_product(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        counts: list[int] = ctx.counts
        grad = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad, weight.transpose(1, 2), counts)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(grad, x, counts)
        return grad_x, grad_weight, None


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is laid out densely: ``grouped_mm`` rejects an expanded one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].contiguous()


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the rows of each expert by the transpose of its matrix.

    Args:
        x: [M, I], rows sorted by expert.
        weight: [E, O, I].
        counts: [E] int64, rows of each expert; they sum to M.

    Returns:
        [M, O].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if device != "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        y = F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
        y = _DenseGradient.apply(y)
    else:
        with torch.autocast(device, enabled=False):
            y = _PerExpertLinear.apply(x, weight, counts.tolist())
    assert isinstance(y, Tensor)
    return y
