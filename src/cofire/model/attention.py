"""Attention: multi-head latent attention in two forms, and grouped-query attention.

MLA (DeepSeek-V3 technical report, eq. 1-11) compresses keys and values of a token into one latent vector
c (``kv_lora_rank`` numbers) and one rotated key shared by all heads (``qk_rope_head_dim`` numbers): that is
all it caches, and c is cached *after* its norm. Over the same weights it runs

* *expanded*: keys and values are rebuilt from the latents and attention is ordinary; for training and
  for prefill, where many queries share the rebuilding;
* *absorbed*: the key up-projection moves to the query and the value up-projection to the context,
  so that attention works on the latents as they lie in the cache; for decoding.

Shapes: B sequences, T new positions, S cached positions, H heads, D hidden, C numbers cached per token.
A key at position j is visible to a query at position p iff j <= p, so one integer tensor of positions
describes a ragged batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.model.causal_attention import causal_attention, takes_blocks
from cofire.model.linear import Linear
from cofire.model.norm import RMSNorm
from cofire.model.rope import Rotation, rotate, softmax_scale
from cofire.spec import GQASpec, MLASpec, ModelSpec

Form = Literal["auto", "expanded", "absorbed"]

# Absorbed attention costs more per query than expanded attention but rebuilds no keys.
_ABSORBED_QUERIES_MAX = 8


class LayerCache(Protocol):
    """One layer's cache for the B sequences of a call."""

    def write(self, entries: Tensor, positions: Tensor) -> None:
        """Store ``entries`` [B, T, C] at ``positions`` [B, T] int64."""
        ...

    def read(self, length: int) -> Tensor:
        """Return [B, S, C], S at least ``length``: the entries of the first S positions; finite where unwritten."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    Attributes:
        positions: [B, T] int64.
        turn: The rotation of those positions.
        length: S, one more than the largest position.
        causal: Every sequence starts at position 0, so plain causal attention is right.
        visible: [B, T, S] bool where ``causal`` does not hold and it matters; else none.
        form: How MLA runs.
    """

    positions: Tensor
    turn: Rotation
    length: int
    causal: bool
    visible: Tensor | None
    form: Form


class MLA(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        attention = spec.attention
        assert isinstance(attention, MLASpec)
        self.attention = attention
        self.interleaved = spec.rope.interleaved
        self.scale = softmax_scale(spec.rope, attention.qk_head_dim)
        hidden, heads = spec.hidden_size, attention.num_heads
        if attention.q_lora_rank is None:
            self.query = Linear(hidden, heads * attention.qk_head_dim)
        else:
            self.query_down = Linear(hidden, attention.q_lora_rank)
            self.query_norm = RMSNorm(attention.q_lora_rank, spec.norm_epsilon)
            self.query_up = Linear(attention.q_lora_rank, heads * attention.qk_head_dim)
        self.kv_down = Linear(hidden, attention.cache_width)
        self.kv_norm = RMSNorm(attention.kv_lora_rank, spec.norm_epsilon)
        self.kv_up = Linear(attention.kv_lora_rank, heads * (attention.qk_nope_head_dim + attention.v_head_dim))
        self.output = Linear(heads * attention.v_head_dim, hidden)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]; with a cache, first add the new entries to it."""
        query_nope, query_rope = self._query(x, context)
        entries = self._entries(x, context)
        if cache is not None:
            cache.write(entries, context.positions)
            if not context.causal or context.form == "absorbed":
                entries = cache.read(context.length).to(x.dtype)
        if self._absorbs(context, cache):
            y = self._absorbed(query_nope, query_rope, entries, context)
        else:
            y = self._expanded(query_nope, query_rope, entries, context)
        return self.output(y)

    def _absorbs(self, context: AttentionContext, cache: LayerCache | None) -> bool:
        if context.form != "auto":
            return context.form == "absorbed"
        return cache is not None and context.positions.shape[1] <= _ABSORBED_QUERIES_MAX

    def _query(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Return q^C [B, T, H, nope] and the rotated q^R [B, T, H, rope] (eq. 6-9)."""
        if self.attention.q_lora_rank is None:
            query = self.query(x)
        else:
            query = self.query_up(self.query_norm(self.query_down(x)))
        query = query.unflatten(-1, (self.attention.num_heads, -1))
        nope, rope = query.split([self.attention.qk_nope_head_dim, self.attention.qk_rope_head_dim], dim=-1)
        return nope, rotate(rope, context.turn, self.interleaved)

    def _entries(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Return what is cached, [B, T, C]: the normalised latent and the rotated key (eq. 1 and 3)."""
        latent, rope = self.kv_down(x).split([self.attention.kv_lora_rank, self.attention.qk_rope_head_dim], dim=-1)
        rope = rotate(rope.unsqueeze(2), context.turn, self.interleaved).squeeze(2)
        return torch.cat((self.kv_norm(latent), rope), dim=-1)

    def _expanded(self, nope: Tensor, rope: Tensor, entries: Tensor, context: AttentionContext) -> Tensor:
        """Rebuild k^C and v^C of all S positions and attend (eq. 2, 5, 10, 11)."""
        spec = self.attention
        entries = entries[:, : context.length]
        latent, rope_key = entries.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        expanded = self.kv_up(latent).unflatten(-1, (spec.num_heads, -1))
        nope_key, value = expanded.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        shared = rope_key.unsqueeze(2).expand(-1, -1, spec.num_heads, -1).to(nope_key.dtype)
        key = torch.cat((nope_key, shared), dim=-1)
        query = torch.cat((nope, rope), dim=-1)
        return attend(query, key, value, self.scale, context)

    def _absorbed(self, nope: Tensor, rope: Tensor, entries: Tensor, context: AttentionContext) -> Tensor:
        """Attend over the latents themselves: score = (q^C W^UK).c + q^R.k^R, context = softmax c, then W^UV."""
        spec = self.attention
        batch, queries = nope.shape[:2]
        weight = self.kv_up.weight.unflatten(0, (spec.num_heads, -1))
        key_up, value_up = weight.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
        by_head = torch.bmm(nope.flatten(0, 1).transpose(0, 1), key_up)  # [H, B*T, kv_lora_rank]
        latent_query = by_head.transpose(0, 1).unflatten(0, (batch, queries))
        query = torch.cat((latent_query, rope), dim=-1).flatten(1, 2)  # [B, T*H, C]
        # In this order the entries lie as the product wants them; in the other one BF16 would copy all of them.
        scores = torch.bmm(entries, query.transpose(1, 2)).transpose(1, 2).contiguous() * self.scale
        visible = context.visible
        if context.causal and queries > 1:
            visible = context.positions.unsqueeze(2) >= context.positions.unsqueeze(1)
        if visible is not None:
            hidden = ~visible.repeat_interleave(spec.num_heads, dim=1)
            scores[..., : context.length].masked_fill_(hidden, float("-inf"))
        if scores.shape[-1] > context.length:
            scores[..., context.length :] = float("-inf")
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(entries.dtype)
        mixed = torch.bmm(weights, entries)[..., : spec.kv_lora_rank]  # [B, T*H, kv_lora_rank]; the keys for nothing
        mixed = mixed.unflatten(1, (queries, spec.num_heads)).flatten(0, 1).transpose(0, 1)
        y = torch.bmm(mixed, value_up.transpose(1, 2))  # [H, B*T, v]
        return y.transpose(0, 1).reshape(batch, queries, -1)


class GQA(nn.Module):
    """Grouped-query attention; the dense presets and DeepSeekMoE use it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        attention = spec.attention
        assert isinstance(attention, GQASpec)
        self.attention = attention
        self.interleaved = spec.rope.interleaved
        self.scale = softmax_scale(spec.rope, attention.head_dim)
        width = attention.num_key_value_heads * attention.head_dim
        self.query = Linear(spec.hidden_size, attention.num_heads * attention.head_dim, attention.qkv_bias)
        self.key = Linear(spec.hidden_size, width, attention.qkv_bias)
        self.value = Linear(spec.hidden_size, width, attention.qkv_bias)
        self.output = Linear(attention.num_heads * attention.head_dim, spec.hidden_size)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]; with a cache, first add the new keys and values to it."""
        spec = self.attention
        query = rotate(self.query(x).unflatten(-1, (spec.num_heads, -1)), context.turn, self.interleaved)
        key = rotate(self.key(x).unflatten(-1, (spec.num_key_value_heads, -1)), context.turn, self.interleaved)
        value = self.value(x).unflatten(-1, (spec.num_key_value_heads, -1))
        if cache is not None:
            cache.write(torch.cat((key.flatten(2), value.flatten(2)), dim=-1), context.positions)
            if not context.causal:
                both = (
                    cache.read(context.length)[:, : context.length]
                    .to(x.dtype)
                    .unflatten(-1, (2, spec.num_key_value_heads, -1))
                )
                key, value = both.unbind(2)
        groups = spec.num_heads // spec.num_key_value_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        return self.output(attend(query, key, value, self.scale, context))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, context: AttentionContext) -> Tensor:
    """Return softmax(scale q.k) v as [B, T, H * v].

    Args:
        query: [B, T, H, qk].
        key: [B, S, H, qk].
        value: [B, S, H, v].
        scale: Factor on the scores.
        context: Says which keys each query sees.
    """
    if context.causal and takes_blocks(query, value):
        return causal_attention(query, key, value, scale).flatten(2)
    width = value.shape[-1]
    if value.device.type == "cpu" and width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - width))  # the CPU's flash kernel wants equal widths
    mask = None if context.visible is None else context.visible.unsqueeze(1)
    y = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=context.causal and query.shape[1] > 1,
        scale=scale,
    )
    return y[..., :width].transpose(1, 2).flatten(2)
