"""Feed-forward layers: SwiGLU, and the DeepSeekMoE layer of fine-grained routed and shared experts.

``y = shared(x) + sum_k gate_k expert_k(x)`` (DeepSeek-V3 technical report, eq. 12; the residual is the
block's). Tokens are sorted by expert and the experts run as grouped matrix products; no token is
dropped. Who computes which expert is a ``TokenDispatcher``'s business: the one here keeps all experts on
one device, expert parallelism brings its own.

Load counts are part of the result, not state of the module, so a recomputed forward pass cannot count
a token twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cofire.model.balance import balance_loss, count_experts
from cofire.model.linear import Linear, grouped_linear, linear
from cofire.model.router import Router, Routing
from cofire.precision.codec import EXACT, ExpertCodecs, transfer
from cofire.precision.linear import (
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_swiglu_linear,
    swiglu,
    swiglu_gradient,
)
from cofire.precision.recipe import FP8Recipe
from cofire.spec import MoESpec

# Up to this many (token, expert) pairs, gathering the experts' weights beats sorting the tokens.
_GATHER_PAIRS_MAX = 8


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width)
        self.down = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        gate_up = self.gate_up(x)
        if self.down.fp8 is not None:
            return fp8_swiglu_linear(gate_up, self.down.weight, self.down.fp8)
        return self.down(silu_product(gate_up))


class _SiluProduct(torch.autograd.Function):
    """``silu(gate) * up`` that keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        return swiglu_gradient(gate_up, grads[0])


def silu_product(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for ``gate_up`` = [gate; up] along the last dim, [..., 2F] -> [..., F].

    Args:
        gate_up: [..., 2F].
    """
    if not (torch.is_grad_enabled() and gate_up.requires_grad) or torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    y = _SiluProduct.apply(gate_up)
    assert isinstance(y, Tensor)
    return y


class Dispatched(NamedTuple):
    """Rows sorted by expert: ``rows`` [M, D], ``counts`` [E], and what ``combine`` needs to undo it."""

    rows: Tensor
    counts: Tensor
    state: Any


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and results back; implemented per way of placing experts."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Send tokens ``x`` [N, D] to their experts."""
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Return [N, D]: each token's expert outputs, weighted by its gates and summed."""
        ...


class _Gather(torch.autograd.Function):
    """``x[index // copies]`` where ``index`` permutes N * copies pairs; the backward is a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order.div(copies, rounding_mode="floor"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class LocalDispatcher:
    """All experts on this device: dispatch is a sort by expert, combine its inverse.

    With codecs, rows and their gradients are what would arrive if experts were elsewhere, each (token, expert) pair
    sent for itself: activations on the way to experts, outputs and the gradients of inputs on the way back, and the
    outputs' gradients, gates included, on the way to experts once more.
    """

    def __init__(self, num_experts: int, codecs: ExpertCodecs = EXACT) -> None:
        self.num_experts = num_experts
        self.codecs = codecs

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """See :class:`TokenDispatcher`."""
        flat = routing.expert_index.reshape(-1)
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        # All of a token's pairs arrive alike, so that one encoding serves them; their gradients differ.
        sent = transfer(x, self.codecs.dispatch, None)
        rows = _Gather.apply(sent, order, inverse, routing.expert_index.shape[1])
        assert isinstance(rows, Tensor)
        rows = transfer(rows, None, self.codecs.combine)
        return Dispatched(rows, count_experts(flat, self.num_experts), (order, inverse))

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """See :class:`TokenDispatcher`."""
        order, inverse = dispatched.state
        rows = transfer(rows, self.codecs.combine, self.codecs.gradient)
        pairs = _Gather.apply(rows, inverse, order, 1)
        assert isinstance(pairs, Tensor)
        tokens, k = routing.expert_index.shape
        gates = routing.gates.to(rows.dtype)
        return torch.bmm(gates.unsqueeze(1), pairs.view(tokens, k, rows.shape[1])).squeeze(1)


class MoEStats(NamedTuple):
    """What a layer reports beside its output: load [E] int64 and its auxiliary loss, a scalar."""

    expert_counts: Tensor
    balance_loss: Tensor


class MoELayer(nn.Module):
    """Routed experts with stacked weights plus shared experts fused into one SwiGLU.

    Attributes:
        fp8: How the experts' products take FP8 operands, up and down; none: they do not.
    """

    def __init__(self, hidden_size: int, moe: MoESpec) -> None:
        super().__init__()
        experts, width = moe.num_routed_experts, moe.expert_intermediate_size
        self.moe = moe
        self.router = Router(hidden_size, moe)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))
        self.shared = SwiGLU(hidden_size, moe.num_shared_experts * width) if moe.num_shared_experts else None
        self.dispatcher: TokenDispatcher = LocalDispatcher(experts)
        self.fp8: tuple[FP8Recipe, FP8Recipe] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, MoEStats]:
        """Map ``x`` [B, T, D] to [B, T, D] and the layer's stats."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        if self._is_handful(routing):
            y, counts = self._run_gathered(tokens, routing), None
        else:
            dispatched = self.dispatcher.dispatch(tokens, routing)
            y = self.dispatcher.combine(self._run_experts(dispatched.rows, dispatched.counts), dispatched, routing)
            counts = dispatched.counts
        if self.shared is not None:
            y = y + self.shared(tokens)
        if counts is None:
            counts = count_experts(routing.expert_index, self.moe.num_routed_experts)
        loss = balance_loss(routing, x.shape[0], self.moe) if torch.is_grad_enabled() else y.new_zeros(())
        return y.view(x.shape), MoEStats(counts, loss)

    def _run_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map rows [M, D], sorted by expert, to [M, D]."""
        if self.fp8 is None:
            return grouped_linear(silu_product(grouped_linear(rows, self.gate_up, counts)), self.down, counts)
        up, down = self.fp8
        gate_up = fp8_grouped_linear(rows, self.gate_up, counts, up)
        return fp8_grouped_swiglu_linear(gate_up, self.down, counts, down)

    def _is_handful(self, routing: Routing) -> bool:
        """Whether to skip the sort: few pairs, no gradients, all experts here, and in the weights' own format."""
        if routing.expert_index.numel() > _GATHER_PAIRS_MAX or self.fp8 is not None or torch.is_grad_enabled():
            return False
        return type(self.dispatcher) is LocalDispatcher and self.dispatcher.codecs == EXACT

    def _run_gathered(self, x: Tensor, routing: Routing) -> Tensor:
        """A handful of tokens: multiply by the chosen experts' own matrices, one after the other."""
        k = routing.expert_index.shape[1]
        if x.device.type != "cpu":  # no synchronisation with the host
            return self._run_batched(x, routing)
        index = routing.expert_index.reshape(-1).tolist()
        gates = routing.gates.to(x.dtype)
        parts = [
            linear(silu_product(linear(x[i // k : i // k + 1], self.gate_up[e])), self.down[e])
            for i, e in enumerate(index)
        ]
        pairs = torch.cat(parts).view(x.shape[0], k, -1)
        return torch.bmm(gates.unsqueeze(1), pairs).squeeze(1)

    def _run_batched(self, x: Tensor, routing: Routing) -> Tensor:
        """The same by copying the chosen matrices next to each other."""
        k = routing.expert_index.shape[1]
        index = routing.expert_index.reshape(-1)
        rows = x.repeat_interleave(k, dim=0).unsqueeze(2)
        hidden = silu_product(torch.bmm(self.gate_up[index], rows).squeeze(2))
        pairs = torch.bmm(self.down[index], hidden.unsqueeze(2)).view(x.shape[0], k, -1)
        return torch.bmm(routing.gates.to(pairs.dtype).unsqueeze(1), pairs).squeeze(1)
