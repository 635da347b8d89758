"""AdamW with FP32 master weights and moments in FP32 or BF16 (arXiv 1711.05101).

DeepSeek-V3 keeps master weights and gradients in FP32 and both moments in BF16 (technical report, section
3.3.2). Weight decay applies to matrices only: norms and biases are left alone. Arithmetic is FP32 in either
case; with BF16 moments each is widened, updated and rounded back. PyTorch's fused kernel does the update of
one tensor in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cofire.spec import OptimizerSpec


class AdamW:
    """Steps the parameters of a module.

    Args:
        parameters: ``(name, parameter)`` pairs.
        spec: Rates and bounds.
        moment_dtype: Storage of the two moments.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        spec: OptimizerSpec,
        moment_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = spec
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.masters = {n: p.detach().float() for n, p in self.parameters.items() if p.dtype != torch.float32}
        self.exp_avg = {n: torch.zeros_like(p, dtype=moment_dtype) for n, p in self.parameters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p, dtype=moment_dtype) for n, p in self.parameters.items()}
        self.num_steps = torch.zeros((), dtype=torch.float32)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradients so that their global norm is at most ``clip_norm``; return the norm before."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.float() for g in torch._foreach_norm(grads)]))
        # A factor of one where nothing is to be clipped, without waiting for the value.
        torch._foreach_mul_(grads, torch.clamp(self.spec.clip_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update; parameters without a gradient are left alone."""
        self.num_steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master = self.masters.get(name, parameter)
            exact = self.exp_avg[name].dtype == torch.float32
            first, second = self.exp_avg[name].float(), self.exp_avg_sq[name].float()
            torch._fused_adamw_(
                [master],
                [parameter.grad.to(torch.float32)],
                [first],
                [second],
                [],
                [self.num_steps.to(parameter.device)],
                lr=learning_rate,
                beta1=self.spec.beta1,
                beta2=self.spec.beta2,
                weight_decay=self.spec.weight_decay if parameter.dim() >= 2 else 0.0,
                eps=self.spec.epsilon,
                amsgrad=False,
                maximize=False,
            )
            if not exact:
                self.exp_avg[name].copy_(first)
                self.exp_avg_sq[name].copy_(second)
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the live tensors of the state; filling them in place restores it."""
        return {
            "num_steps": self.num_steps,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "masters": self.masters,
        }
