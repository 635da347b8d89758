"""Causal self-attention on a CPU by blocks of queries, with the matrix products of ``cofire.precision``.

PyTorch's fused kernel for the CPU sends its products to MKL, in FP32 and BF16 alike, which on AMD
processors reaches a fraction of what oneDNN does. Here a block of queries meets the keys up to its own
end: scores, softmax and context of one block fit the cache, nothing above the diagonal but the block's
own triangle is computed, and the backward pass forms the probabilities again instead of keeping them
(the idea of FlashAttention, arXiv 2205.14135, without its online softmax: a whole row is at hand).

In BF16 the scores are rounded to BF16 before the softmax, as unfused attention rounds them; the softmax
itself runs in FP32. Left out: masks other than the causal one, other devices and FP64, which take
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire.precision.product import matrix_product

# Queries of one block, by measurement; FP32 runs head by head and wants fewer, larger products.
_BLOCK_QUERIES = {torch.float32: 256, torch.bfloat16: 128}
_QUERIES_MIN = 128


def takes_blocks(query: Tensor, value: Tensor) -> bool:
    """Whether :func:`causal_attention` is the fast way for these operands, [B, T, H, ...] each."""
    return (
        query.device.type == "cpu"
        and query.dtype == value.dtype
        and query.dtype in _BLOCK_QUERIES
        and query.shape[1] >= _QUERIES_MIN
        and not torch.compiler.is_compiling()
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q.k) v over the keys at or before each query.

    Args:
        query: [B, T, H, qk].
        key: [B, T, H, qk].
        value: [B, T, H, v].
        scale: Factor on the scores.

    Returns:
        [B, T, H, v].
    """
    batch = query.shape[0]
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query * scale, key, value)]
    y = _BlockAttention.apply(*flat)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


class _BlockAttention(torch.autograd.Function):
    """Operands are [G, T, ...] for G = B * H, the query already scaled."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.contiguous() for t in (query, key, value))
        ctx.save_for_backward(query, key, value)
        y = torch.empty_like(value)
        for q, k, v, out in _parts(query, key, value, y):
            for rows, seen in _blocks(q):
                weights = _weights(q[..., rows, :], k[..., seen, :])
                out[..., rows, :] = matrix_product(weights, v[..., seen, :].mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        tensors = (query, key, value, grads[0].contiguous(), grad_query, grad_key, grad_value)
        for q, k, v, g, gq, gk, gv in _parts(*tensors):
            for rows, seen in _blocks(q):
                q_rows, g_rows, k_seen = q[..., rows, :], g[..., rows, :], k[..., seen, :]
                weights = _weights(q_rows, k_seen)
                gv[..., seen, :] += matrix_product(weights.mT, g_rows.mT)
                slope = matrix_product(g_rows, v[..., seen, :])
                slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
                gq[..., rows, :] = matrix_product(slope, k_seen.mT)
                gk[..., seen, :] += matrix_product(slope.mT, q_rows.mT)
        return grad_query, grad_key, grad_value


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """FP32 runs head by head, as oneDNN's FP32 product takes matrices only; BF16 runs all heads at once."""
    if tensors[0].dtype == torch.float32:
        yield from zip(*(t.unbind(0) for t in tensors), strict=True)
    else:
        yield tensors


def _blocks(query: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield each block of queries and the keys that its last query sees."""
    length, block = query.shape[-2], _BLOCK_QUERIES[query.dtype]
    for start in range(0, length, block):
        end = min(start + block, length)
        yield slice(start, end), slice(0, end)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Return the probabilities of the last queries [..., n, qk] over all keys [..., end, qk]."""
    scores = matrix_product(query, key)
    n = query.shape[-2]
    above = torch.full((n, n), float("-inf"), dtype=scores.dtype).triu_(1)
    scores[..., key.shape[-2] - n :] += above
    return scores.softmax(-1)
