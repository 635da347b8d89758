"""Multi-token prediction modules (DeepSeek-V3 technical report, eq. 21-25).

Module k turns the representation that predicts token i + k into one that predicts token i + k + 1:
``h' = block(M [norm(embedding of t_{i+k}); norm(h)])``. Embedding and output head are the main model's.

Two points on which paper and released weights differ, settled for the released weights: the
concatenation is embedding first, and h is the main model's output *after* its final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cofire.model.attention import AttentionContext, LayerCache
from cofire.model.block import Block
from cofire.model.linear import Linear
from cofire.model.moe import MoEStats
from cofire.model.norm import RMSNorm
from cofire.spec import ModelSpec


class MTPModule(nn.Module):
    """One prediction depth: two norms, a 2D -> D projection, a block and a final norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.projection = Linear(2 * spec.hidden_size, spec.hidden_size)
        self.block = Block(spec, dense=spec.moe is None)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)

    def forward(
        self, hidden: Tensor, embedded: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, MoEStats | None]:
        """Return the next depth's representation [B, T, D], ready for the head, and the block's stats.

        Args:
            hidden: [B, T, D], the previous depth's output after its norm.
            embedded: [B, T, D], embeddings of the tokens that follow.
            context: Positions of ``hidden``.
            cache: This module's own cache, when decoding.
        """
        both = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        y, stats = self.block(self.projection(both), context, cache)
        return self.norm(y), stats
