"""Cross entropy of a linear head, without ever holding all logits.

The head's logits are the largest tensor of a small model's step (tokens x vocabulary, FP32). They are
computed a chunk of tokens at a time; the gradients of that chunk are formed at once, while its logits
are at hand, and only they are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire.model.linear import linear
from cofire.precision.product import weight_gradient

_CHUNK_TOKENS = 1024


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        needs_grad = hidden.requires_grad or weight.requires_grad
        cast = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        for start in range(0, hidden.shape[0], _CHUNK_TOKENS):
            chunk = slice(start, start + _CHUNK_TOKENS)
            rows, goal = hidden[chunk].to(dtype), targets[chunk].unsqueeze(1)
            log_probability = linear(rows, cast).to(wide).log_softmax(-1)
            total -= log_probability.gather(1, goal).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = log_probability.exp_().scatter_add_(1, goal, torch.full_like(goal, -1, dtype=wide)).to(dtype)
            grad_hidden[chunk] = linear(grad, cast.t())
            grad_weight += weight_gradient(grad, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.weight_dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy, in nats, of ``softmax(hidden @ weight.T)``.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and hidden.requires_grad:
            loss = _FusedCrossEntropy.apply(hidden, weight, targets, dtype)
            assert isinstance(loss, Tensor)
            return loss
        wide = torch.promote_types(dtype, torch.float32)
        parts = [
            F.cross_entropy(linear(rows.to(dtype), weight.to(dtype)).to(wide), goal, reduction="sum")
            for rows, goal in zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
        ]
        return torch.stack(parts).sum()
