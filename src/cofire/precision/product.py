"""Matrix products in the form that is fastest on the device at hand.

On x86 CPUs PyTorch sends FP32 products to MKL, which on AMD processors runs at less than half the
speed of oneDNN (measured: docs/lab/LOG.md). These functions therefore take oneDNN for FP32 on the CPU, and
``torch.nn.functional.linear`` for everything else. Both compute the same sums in FP32; the order of
additions differs. None of them knows autograd.

oneDNN compiles a kernel for each shape that it meets and keeps the last 1,024. Compiling costs five to ten
times what one of our products takes, and routing gives every expert a new number of rows in every step, so
the products per expert run over ``padded_rows``: a few shapes for all counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# One row times a matrix of fewer numbers is faster through MKL: a call of oneDNN costs 10 us more.
_ONE_ROW_NUMBERS_MIN = 2**19


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN multiplies ``x`` [..., I] by ``weight`` [O, I] faster than PyTorch's choice."""
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


def dense(x: Tensor) -> Tensor:
    """Return a 2-D operand as oneDNN likes it: for a slice of a wider tensor it falls back to a slow loop."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` by oneDNN; FP32 on the CPU, both :func:`dense`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for 2-D operands."""
    if takes_onednn(x, weight):
        return onednn_product(dense(x), dense(weight))
    return F.linear(x, weight)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.mT`` for two matrices or two equal batches of them."""
    return product(a, b) if a.dim() == 2 else torch.bmm(a, b.mT)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad.T @ x`` [O, I] for [N, O] and [N, I]; oneDNN is faster with the wider side as columns."""
    if grad.shape[1] > x.shape[1]:
        return product(x.t(), grad.t()).t()
    return product(grad.t(), x.t())


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


def grouped_product(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Return [M, O] for rows ``x`` [M, I] sorted by expert and ``weight`` [E, O, I]."""
    total, matrices = x.shape[0], weight.unbind(0)
    y = x.new_empty(total, weight.shape[1])
    for e, first, rows, begin, width in _windows(counts, total):
        inputs = x[begin : begin + width]
        if begin == first and not takes_onednn(inputs, matrices[e]):
            # What it writes of the next experts' rows is written over when they come.
            torch.mm(inputs, matrices[e].t(), out=y[begin : begin + width])
        else:
            y[first : first + rows] = product(inputs, matrices[e])[first - begin : first - begin + rows]
    return y


def grouped_weight_gradient(grad: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """Return [E, O, I] for ``grad`` [M, O] and ``x`` [M, I], rows sorted by expert."""
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
        if takes_onednn(own, inputs):
            grad_weight[e] = weight_gradient(own, inputs)
        else:
            torch.mm(own.t(), inputs, out=grad_weight[e])
    return grad_weight
