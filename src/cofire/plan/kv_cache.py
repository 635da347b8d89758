"""How many bytes the key-value cache takes per token (arXiv 2505.09343, table 1).

MLA caches the latent and the shared rotated key of each layer: ``kv_lora_rank + qk_rope_head_dim`` numbers. GQA caches
keys and values of its key-value heads. The paper counts 1 KB = 1000 bytes and BF16.

Left out: padding to blocks or slots, which is the server's choice.
"""

from __future__ import annotations

from cofire.spec.model import ModelSpec
from cofire.spec.spec_type import Spec


class KVCacheSize(Spec):
    """Bytes of cache per token, all layers together.

    ``bytes_per_token`` is the main model's cache as it is stored; ``with_mtp`` adds one entry per multi-token-
    prediction module; ``expanded`` is what caching every head's key and value would take instead; ``width`` counts
    numbers per token and layer.
    """

    width: int
    bytes_per_number: int | float
    bytes_per_token: int | float
    bytes_per_token_with_mtp: int | float
    bytes_per_token_expanded: int | float


def kv_cache_size(model: ModelSpec, bytes_per_number: float = 2) -> KVCacheSize:
    """Return the sizes of a model's cache per token."""
    return KVCacheSize(
        width=model.attention.cache_width,
        bytes_per_number=bytes_per_number,
        bytes_per_token=kv_bytes_per_token(model, bytes_per_number),
        bytes_per_token_with_mtp=kv_bytes_per_token(model, bytes_per_number, include_mtp=True),
        bytes_per_token_expanded=expanded_kv_bytes_per_token(model, bytes_per_number),
    )


def kv_bytes_per_token(model: ModelSpec, bytes_per_number: float = 2, include_mtp: bool = False) -> float:
    """Bytes of cache that one token takes over all layers.

    Args:
        model: The model.
        bytes_per_number: 2 for BF16, the papers' case.
        include_mtp: Also count one entry per multi-token-prediction module, as speculative decoding keeps it.

    Returns:
        Bytes; an integer where ``bytes_per_number`` is one.
    """
    layers = model.num_layers + (model.mtp.depth if include_mtp and model.mtp else 0)
    return layers * model.attention.cache_width * bytes_per_number


def expanded_kv_bytes_per_token(model: ModelSpec, bytes_per_number: float = 2) -> float:
    """Bytes per token if keys and values of every attention head were cached, as multi-head attention does."""
    attention = model.attention
    return model.num_layers * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim) * bytes_per_number
