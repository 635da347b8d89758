"""One decoder block: attention and a feed-forward layer, each behind a norm and a residual."""

from __future__ import annotations

from torch import Tensor, nn

from cofire.model.attention import GQA, MLA, AttentionContext, LayerCache
from cofire.model.moe import MoELayer, MoEStats, SwiGLU
from cofire.model.norm import RMSNorm
from cofire.spec import MLASpec, ModelSpec


class Block(nn.Module):
    """``h = x + attention(norm(x)); y = h + feed_forward(norm(h))``.

    Args:
        spec: The model.
        dense: Whether the feed-forward layer is one dense SwiGLU instead of a mixture of experts.
    """

    def __init__(self, spec: ModelSpec, dense: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.attention = MLA(spec) if isinstance(spec.attention, MLASpec) else GQA(spec)
        self.feed_forward_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        if dense or spec.moe is None:
            self.feed_forward: SwiGLU | MoELayer = SwiGLU(spec.hidden_size, spec.intermediate_size)
        else:
            self.feed_forward = MoELayer(spec.hidden_size, spec.moe)

    def forward(
        self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, MoEStats | None]:
        """Map ``x`` [B, T, D] to [B, T, D] and, in a mixture-of-experts block, its stats."""
        x = x + self.attention(self.attention_norm(x), context, cache)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoELayer):
            y, stats = self.feed_forward(normed)
            return x + y, stats
        return x + self.feed_forward(normed), None
