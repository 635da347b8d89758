"""Keeping expert load even: the bias of Loss-Free Balancing, three auxiliary losses, and MaxVio.

* Bias (arXiv 2408.15664, algorithm 1): after each optimiser step, with c the load of that whole step,
  e = mean(c) - c and b += u sign(e): an expert with too little load is made more attractive.
* Sequence-wise loss (DeepSeek-V3 technical report, eq. 17-20), expert- and device-level losses
  (DeepSeekMoE, arXiv 2401.06066, eq. 12-17), each a mean over sequences.
* MaxVio: (max load - mean load) / mean load.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cofire.model.router import Router, Routing
from cofire.spec import BalanceSpec, MoESpec


def count_experts(expert_index: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert is chosen: [E] int64 for ``expert_index`` of any shape."""
    flat = expert_index.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def max_violation(counts: Tensor) -> Tensor:
    """Return MaxVio of loads [..., E]; zero where an expert group has no load at all."""
    load = counts.to(torch.float64)
    mean = load.mean(-1)
    return torch.where(mean > 0, (load.amax(-1) - mean) / mean.clamp_min(1e-300), torch.zeros_like(mean))


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, balance: BalanceSpec) -> None:
    """Move one router's selection bias after an optimiser step, in place.

    Args:
        bias: [E] FP32.
        counts: [E] tokens that each expert got in the whole step (all micro-batches, all ranks).
        balance: The rule and its rate u. The proportional rule divides e by the mean load, because raw
            counts could not work with the paper's u = 1e-4.
    """
    load = counts.to(device=bias.device, dtype=torch.float64)
    mean = load.mean()
    if balance.bias_rule == "none" or mean == 0:
        return
    error = mean - load
    step = error / mean if balance.bias_rule == "proportional" else error.sign()
    bias += (balance.bias_update_rate * step).to(bias.dtype)
    if balance.bias_rule == "multiplicative":
        bias.clamp_(min=0.0)


def update_biases(routers: Iterable[Router], counts: Tensor, balance: BalanceSpec) -> None:
    """Apply :func:`update_bias` to every router; row i of ``counts`` [routers, E] belongs to router i."""
    for router, row in zip(routers, counts, strict=True):
        if router.bias is not None:
            update_bias(router.bias, row, balance)


def balance_loss(routing: Routing, sequences: int, moe: MoESpec) -> Tensor:
    """Return the weighted sum of the auxiliary losses that ``moe.balance`` asks for, a scalar.

    Args:
        routing: Of B*T tokens, sequence after sequence.
        sequences: B.
        moe: The layer's spec.
    """
    balance = moe.balance
    total = routing.scores.new_zeros(())
    scores = routing.scores.unflatten(0, (sequences, -1))
    if balance.sequence_loss_weight:
        unbiased = scores.detach().topk(moe.num_experts_per_token, dim=-1, sorted=False).indices
        share = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).mean(1)
        total = total + balance.sequence_loss_weight * _dot(_frequency(unbiased, moe, scores.dtype), share)
    if balance.expert_loss_weight or balance.device_loss_weight:
        chosen = routing.expert_index.unflatten(0, (sequences, -1))
        frequency, share = _frequency(chosen, moe, scores.dtype), scores.mean(1)
        total = total + balance.expert_loss_weight * _dot(frequency, share)
        if balance.device_loss_weight:
            groups = (balance.num_device_groups, -1)
            total = total + balance.device_loss_weight * _dot(
                frequency.unflatten(-1, groups).mean(-1), share.unflatten(-1, groups).sum(-1)
            )
    return total


def _frequency(chosen: Tensor, moe: MoESpec, dtype: torch.dtype) -> Tensor:
    """Return f [B, E] = E / (K T) * count of each expert per sequence; ``chosen`` is [B, T, K]."""
    batch, tokens, k = chosen.shape
    count = torch.zeros(batch, moe.num_routed_experts, dtype=dtype, device=chosen.device)
    flat = chosen.reshape(batch, -1)
    count.scatter_add_(1, flat, torch.ones_like(flat, dtype=dtype))
    return count * (moe.num_routed_experts / (k * tokens))


def _dot(frequency: Tensor, share: Tensor) -> Tensor:
    return (frequency * share).sum(-1).mean()
