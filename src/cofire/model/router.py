"""The router of a mixture-of-experts layer (DeepSeek-V3 technical report, eq. 12-16).

Scores s are a sigmoid (V3) or a softmax (V2, DeepSeekMoE) of the tokens' affinities. A bias per expert
takes part in the *selection* only: the gates come from the scores without it (Loss-Free Balancing,
arXiv 2408.15664). With groups, each token first keeps the best ``num_limited_groups`` groups; experts
of the others are masked with -inf, so that they lose even where every kept score is negative.

Scores, bias and selection are FP32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cofire.spec import MoESpec

# Keeps an all-zero row of gates finite; below FP32's smallest normal sum of sigmoids that matter.
_GATE_EPSILON = 1e-20


class Routing(NamedTuple):
    """Where N tokens go: chosen experts and their gates [N, K], and all scores [N, E]."""

    expert_index: Tensor
    gates: Tensor
    scores: Tensor


class Router(nn.Module):
    """Chooses ``num_experts_per_token`` of E experts for each token."""

    bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_routed_experts, hidden_size))
        self.register_buffer("bias", self.initial_bias() if moe.selection_bias else None)

    def initial_bias(self) -> Tensor:
        """Return the bias that changes no selection: zeros, or ones where it multiplies."""
        start = 1.0 if self.moe.balance.bias_rule == "multiplicative" else 0.0
        return torch.full((self.moe.num_routed_experts,), start, dtype=torch.float32)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        """Move the bias with the module, but never round it: ``model.bfloat16()`` leaves it FP32."""
        exact = self.bias
        super()._apply(fn, recurse)
        if exact is not None and self.bias is not None and self.bias.dtype != torch.float32:
            self.bias = exact.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> Routing:
        """Route ``x`` [N, D]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            affinity = torch.nn.functional.linear(x.to(wide), self.weight.to(wide))
            scores = affinity.sigmoid() if self.moe.score_function == "sigmoid" else affinity.softmax(-1)
            index = select(scores.detach(), self.bias, self.moe)
            gates = scores.gather(1, index)
            if self.moe.normalize_gates:
                gates = gates / (gates.sum(-1, keepdim=True) + _GATE_EPSILON)
            return Routing(index, gates * self.moe.routed_scaling_factor, scores)


def select(scores: Tensor, bias: Tensor | None, moe: MoESpec) -> Tensor:
    """Return the chosen experts [N, K] for scores [N, E] and a selection bias [E]."""
    biased = scores
    if bias is not None:
        biased = scores * bias if moe.balance.bias_rule == "multiplicative" else scores + bias
    if moe.num_expert_groups > 1:
        biased = _keep_best_groups(biased, moe)
    return biased.topk(moe.num_experts_per_token, dim=-1, sorted=False).indices


def _keep_best_groups(biased: Tensor, moe: MoESpec) -> Tensor:
    grouped = biased.unflatten(-1, (moe.num_expert_groups, -1))
    if moe.group_score == "top2_sum":
        group_score = grouped.topk(2, dim=-1).values.sum(-1)
    else:
        group_score = grouped.amax(-1)
    kept = group_score.topk(moe.num_limited_groups, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
