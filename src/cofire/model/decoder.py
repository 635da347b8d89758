"""The decoder: one class for every family, dense or mixture-of-experts, with or without MTP.

Shapes: B sequences, T positions, D hidden, V vocabulary, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cofire.model.attention import AttentionContext, Form, LayerCache
from cofire.model.block import Block
from cofire.model.cross_entropy import linear_cross_entropy
from cofire.model.linear import Linear
from cofire.model.moe import MoELayer, MoEStats
from cofire.model.mtp import MTPModule
from cofire.model.norm import RMSNorm
from cofire.model.rope import inverse_frequencies, rotation
from cofire.model.router import Router
from cofire.spec import ModelSpec


class DecoderOutput(NamedTuple):
    """``hidden`` [B, T, D] after the final norm, and loads [MoE layers, E] int64."""

    hidden: Tensor
    expert_counts: Tensor


class LossOutput(NamedTuple):
    """The loss to differentiate and its parts, in nats per token; loads [MoE layers + MTP depth, E].

    Balance losses are computed while gradients are recorded; in validation ``balance_loss`` is zero.
    """

    loss: Tensor
    main_loss: Tensor
    mtp_losses: Tensor
    balance_loss: Tensor
    expert_counts: Tensor


class Decoder(nn.Module):
    """A decoder-only language model. ``recompute`` = "full" trades a second forward pass for memory."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recompute: Literal["none", "full"] = "none"
        self._frequencies: dict[torch.device, Tensor] = {}
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, dense=i < spec.num_dense_layers) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.head = Linear(spec.hidden_size, spec.vocab_size)
        if spec.tie_embeddings:
            self.head.weight = self.embedding.weight
        depth = 0 if spec.mtp is None else spec.mtp.depth
        self.mtp = nn.ModuleList(MTPModule(spec) for _ in range(depth))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        form: Form = "auto",
    ) -> DecoderOutput:
        """Run the main model.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64; 0 to T - 1 for every sequence if not given.
            caches: One per main layer (further ones, of MTP modules, are left alone), or none.
            form: How MLA runs; ``auto`` decodes absorbed and does the rest expanded.
        """
        context = self.context(tokens.shape, positions, form, tokens.device)
        hidden, stats = self._run_main(tokens, context, caches)
        return DecoderOutput(hidden, self._counts(stats))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [..., D] to [..., V]."""
        return self.head(hidden)

    def draft(
        self,
        depth_index: int,
        hidden: Tensor,
        next_tokens: Tensor,
        positions: Tensor,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Run MTP module ``depth_index`` on ``hidden`` [B, T, D] and the tokens [B, T] that follow; [B, T, D]."""
        context = self.context(next_tokens.shape, positions, "auto", next_tokens.device)
        return self.mtp[depth_index](hidden, self.embedding(next_tokens), context, cache)[0]

    def loss(self, tokens: Tensor) -> LossOutput:
        """Return the training loss of samples ``tokens`` [B, T + 1].

        Depth k of MTP predicts over its T - k usable positions and divides by T (eq. 24); the mean over
        depths is weighted by lambda (eq. 25). Balance losses are summed over layers.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        context = self.context(inputs.shape, None, "expanded", tokens.device)
        hidden, stats = self._run_main(inputs, context, None)
        main_loss = self._cross_entropy(hidden, targets) / targets.numel()
        mtp_losses = []
        for k, module in enumerate(self.mtp, start=1):
            hidden, more = self._run_mtp(module, hidden, inputs, k)
            mtp_losses.append(self._cross_entropy(hidden, targets[:, k:]) / targets.numel())
            stats += more
        mtp = torch.stack(mtp_losses) if mtp_losses else main_loss.new_zeros(0)
        balance = sum((s.balance_loss for s in stats), main_loss.new_zeros(()))
        loss = main_loss + balance
        if self.spec.mtp is not None:
            loss = loss + self.spec.mtp.loss_weight * mtp.mean()
        return LossOutput(loss, main_loss, mtp, balance, self._counts(stats))

    def moe_routers(self) -> list[Router]:
        """Return the routers in the order of ``expert_counts``' rows: main layers, then MTP modules."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [b.feed_forward.router for b in blocks if isinstance(b.feed_forward, MoELayer)]

    def context(
        self, shape: Sequence[int], positions: Tensor | None, form: Form, device: torch.device
    ) -> AttentionContext:
        """Return what all layers share for ``shape`` = (B, T) new tokens at ``positions``."""
        batch, queries = shape
        dtype = self.embedding.weight.dtype
        frequencies = self._frequencies_on(device)
        steps = torch.arange(queries, device=device).expand(batch, -1)
        if positions is None:
            turn = rotation(frequencies, steps[:1], self.spec.rope, dtype)
            return AttentionContext(steps, turn, queries, True, None, form)
        turn = rotation(frequencies, positions, self.spec.rope, dtype)
        length = int(positions.max()) + 1
        if length == queries and torch.equal(positions, steps):
            return AttentionContext(positions, turn, length, True, None, form)
        uniform = queries == 1 and bool((positions == length - 1).all())
        keys = torch.arange(length, device=device)
        visible = None if uniform else positions.unsqueeze(-1) >= keys
        return AttentionContext(positions, turn, length, False, visible, form)

    def _frequencies_on(self, device: torch.device) -> Tensor:
        """Return the rotary frequencies, computed once per device; FP64 whatever the model is cast to."""
        known = self._frequencies.get(device)
        if known is None:
            known = inverse_frequencies(self.spec.rope, self.spec.attention.rope_dim).to(device)
            self._frequencies[device] = known
        return known

    def _run_main(
        self, tokens: Tensor, context: AttentionContext, caches: Sequence[LayerCache] | None
    ) -> tuple[Tensor, list[MoEStats]]:
        x = self.embedding(tokens)
        stats: list[MoEStats] = []
        for i, layer in enumerate(self.layers):
            x, layer_stats = self._call(layer, x, context, None if caches is None else caches[i])
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(x), stats

    def _run_mtp(self, module: nn.Module, hidden: Tensor, inputs: Tensor, k: int) -> tuple[Tensor, list[MoEStats]]:
        """Depth k over the positions whose k-th next token is an input: hidden loses its last position."""
        if inputs.shape[1] <= k:  # a sample too short for this depth has nothing to predict here
            return hidden[:, :0], self._no_stats(hidden)
        embedded = self.embedding(inputs[:, k:])
        context = self.context(embedded.shape[:2], None, "expanded", inputs.device)
        hidden, stats = self._call(module, hidden[:, :-1], embedded, context, None)
        return hidden, [] if stats is None else [stats]

    def _no_stats(self, hidden: Tensor) -> list[MoEStats]:
        if self.spec.moe is None:
            return []
        empty = torch.zeros(self.spec.moe.num_routed_experts, dtype=torch.int64, device=hidden.device)
        return [MoEStats(empty, hidden.new_zeros(()))]

    def _call(self, module: nn.Module, *args: object) -> tuple[Tensor, MoEStats | None]:
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)  # type: ignore[return-value]
        return module(*args)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.reshape(-1))

    def _counts(self, stats: list[MoEStats]) -> Tensor:
        if not stats:
            experts = 0 if self.spec.moe is None else self.spec.moe.num_routed_experts
            return torch.zeros(0, experts, dtype=torch.int64, device=self.embedding.weight.device)
        return torch.stack([s.expert_counts for s in stats])
