"""Matrix products in the form that is fastest on the device at hand.

On x86 CPUs PyTorch sends FP32 products to MKL, which on AMD processors runs at less than half the
speed of oneDNN (measured: docs/lab/LOG.md). ``linear`` therefore takes oneDNN for FP32 on the CPU, and
``torch.nn.functional.linear`` for everything else. Both compute the same sums in FP32; the order of
additions differs.

Grouped products multiply the rows of each expert with that expert's matrix. ``grouped_linear`` takes
``torch.nn.functional.grouped_mm`` for 16-bit types on an accelerator. Everywhere else it makes one product
per expert that has rows, inside a single autograd node: on a CPU ``grouped_mm`` is the same loop, costs more
per expert and fails for an expanded gradient.

oneDNN compiles a kernel for each shape that it meets and keeps the last 1,024. Compiling costs five to ten
times what one of our products takes, and routing gives every expert a new number of rows in every step, so
the products per expert run over ``padded_rows``: a few shapes for all counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# One row times a matrix of fewer numbers is faster through MKL: a call of oneDNN costs 10 us more.
_ONE_ROW_NUMBERS_MIN = 2**19


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    numbers = x.numel()
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and numbers > 0
        and (numbers > x.shape[-1] or weight.numel() >= _ONE_ROW_NUMBERS_MIN)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _dense(x: Tensor) -> Tensor:
    """Return a 2-D operand as oneDNN likes it: for a slice of a wider tensor it falls back to a slow loop."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for 2-D operands, without autograd."""
    if _takes_onednn(x, weight):
        return _onednn(_dense(x), _dense(weight))
    return F.linear(x, weight)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.mT`` for two matrices or two equal batches of them, without autograd."""
    return _product(a, b) if a.dim() == 2 else torch.bmm(a, b.mT)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad.T @ x`` [O, I] for [N, O] and [N, I]; oneDNN is faster with the wider side as columns."""
    if grad.shape[1] > x.shape[1]:
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = _product(grad, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or none.
    """
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    x = x if x.is_contiguous() or x.dim() == 2 else x.contiguous()
    x = _dense(x) if x.dim() == 2 else x
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _OneDNNLinear.apply(x, weight)
        assert isinstance(y, Tensor)
    else:
        y = _onednn(x, weight)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose product goes through :func:`linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the weights as they are: ``build`` initialises the whole decoder."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product; shapes as in :func:`linear`."""
        return linear(input, self.weight, self.bias)


class _PerExpertLinear(torch.autograd.Function):
    """One product per expert with rows: rows are sorted by expert, ``counts`` says how many each has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return _per_expert(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        counts: list[int] = ctx.counts
        grad = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _per_expert(grad, weight.transpose(1, 2), counts)
        if ctx.needs_input_grad[1]:
            grad_weight = _per_expert_weight_gradient(grad, x, counts)
        return grad_x, grad_weight, None


def padded_rows(rows: int) -> int:
    """Return the rows over which a product of so many rows runs: up to an eighth more, eight sizes per octave."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def _windows(counts: list[int], total: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (expert, first, rows, begin, width): its rows, and the wider window over which its product runs.

    A window reaches into the next experts' rows, or, at the end, begins in those before.
    """
    first = 0
    for e, rows in enumerate(counts):
        if rows:
            width = min(padded_rows(rows), total)
            yield e, first, rows, min(first, total - width), width
        first += rows


def _per_expert(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Return [M, O] for rows ``x`` [M, I] sorted by expert and ``weight`` [E, O, I], without autograd."""
    total, matrices = x.shape[0], weight.unbind(0)
    y = x.new_empty(total, weight.shape[1])
    for e, first, rows, begin, width in _windows(counts, total):
        inputs = x[begin : begin + width]
        if begin == first and not _takes_onednn(inputs, matrices[e]):
            # What it writes of the next experts' rows is written over when they come.
            torch.mm(inputs, matrices[e].t(), out=y[begin : begin + width])
        else:
            y[first : first + rows] = _product(inputs, matrices[e])[first - begin : first - begin + rows]
    return y


def _per_expert_weight_gradient(grad: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """Return [E, O, I] for ``grad`` [M, O] and ``x`` [M, I], rows sorted by expert, without autograd."""
    grad_weight = grad.new_empty(len(counts), grad.shape[1], x.shape[1])
    total = x.shape[0]
    scratch = grad.new_empty(min(padded_rows(max(counts, default=0)), total), grad.shape[1])
    for e, rows in enumerate(counts):
        if not rows:
            grad_weight[e].zero_()
    for e, first, rows, begin, width in _windows(counts, total):
        own = scratch[:width]  # the gradient of its own rows and zeros for the rest of the window
        place = first - begin
        own[:place].zero_()
        own[place : place + rows] = grad[first : first + rows]
        own[place + rows :].zero_()
        inputs = x[begin : begin + width]
        if _takes_onednn(own, inputs):
            grad_weight[e] = weight_gradient(own, inputs)
        else:
            torch.mm(own.t(), inputs, out=grad_weight[e])
    return grad_weight


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
