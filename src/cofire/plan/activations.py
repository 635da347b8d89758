"""How many bytes the forward pass of one micro-batch keeps for the backward pass, by block, on a device of a layout.

What is kept follows the kernels of a GPU (flash attention saves its output and one sum per row), in the formats of
the DeepSeek-V3 technical report, section 3.3.3: with ``fp8`` the inputs of matrix products are kept as tiles, one byte
each. ``selective`` recomputation drops norms, SwiGLU products and what MLA expands from its latents, or, where the
attention kernel keeps scores, the scores alone (arXiv 2205.05198, section 4.2). ``full`` keeps the input of a layer.

Left out: masks of dropout outside the scores, and fragmentation.
"""

from __future__ import annotations

from cofire.plan.kernels import BlockKind
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.parallel import ParallelSpec, RecomputeName

# Kept scores: softmax output and dropped-out copy in BF16, and a mask (arXiv 2205.05198, equation 1: 5 a s^2 b).
_SCORE_BYTES = 5


def block_activation_bytes(
    model: ModelSpec,
    kind: BlockKind,
    layout: ParallelSpec,
    sequence_length: int,
    load_skew: float = 1.0,
    recompute: RecomputeName | None = None,
) -> float:
    """Return the bytes that a block keeps on one device for one micro-batch.

    Args:
        model: The model.
        kind: Which block.
        layout: Degrees, micro-batch, formats.
        sequence_length: Tokens per sequence.
        load_skew: Load of the fullest device over the mean, for routed experts.
        recompute: Instead of the layout's.
    """
    recompute = layout.recompute if recompute is None else recompute
    tokens = layout.micro_batch_size * sequence_length
    split = tokens / (layout.tp if layout.sequence_parallel else 1)
    width = 4 if layout.precision == "fp32" else 2
    entry = width * model.hidden_size * split
    if kind == "embedding":
        return 0.0
    if kind == "head":
        return entry
    if kind == "mtp_entry":
        return 3 * entry
    if recompute == "full":
        return entry if kind == "attention" else 0.0
    if kind == "attention":
        return entry + _attention(model, layout, sequence_length, tokens, recompute, entry)
    if kind == "dense":
        return entry + _feed_forward(layout, tokens, model.intermediate_size / layout.tp, recompute, entry)
    return entry + _moe(model, layout, tokens, load_skew, recompute, entry)


def _kept_width(layout: ParallelSpec) -> int:
    """Bytes per number of a matrix product's input."""
    return {"fp32": 4, "bf16": 2, "fp8": 1}[layout.precision]


def _drops(layout: ParallelSpec, recompute: RecomputeName) -> bool:
    """Whether norms and activations are dropped."""
    return recompute == "selective" and layout.attention_kernel == "flash"


def _attention(
    model: ModelSpec, layout: ParallelSpec, length: int, tokens: int, recompute: RecomputeName, entry: float
) -> float:
    attention, width, drops = model.attention, 4 if layout.precision == "fp32" else 2, _drops(layout, recompute)
    kept, heads = _kept_width(layout), attention.num_heads / layout.tp
    size = (width * attention.v_head_dim + 4) * heads * tokens  # output and row sums
    if layout.attention_kernel == "scores" and recompute == "none":
        size += _SCORE_BYTES * tokens * length * heads
    if not isinstance(attention, MLASpec):
        keys = max(1.0, attention.num_key_value_heads / layout.tp)
        size += width * (heads + 2 * keys) * attention.head_dim * tokens
        return size + (0 if drops else entry * kept / width)
    rank = attention.q_lora_rank
    size += width * (attention.cache_width + (rank or 0)) * tokens
    queries = width * heads * attention.qk_head_dim * tokens
    if drops:
        return size + (queries if rank is None else 0)
    normed = kept * (attention.kv_lora_rank + (rank or 0)) * tokens
    expanded = width * heads * (attention.qk_head_dim + attention.v_head_dim) * tokens
    return size + queries + normed + expanded + entry * kept / width


def _feed_forward(
    layout: ParallelSpec, rows: float, intermediate: float, recompute: RecomputeName, entry: float
) -> float:
    """Gate and up, their product, and the normed input."""
    kept = _kept_width(layout)
    size = 2 * kept * rows * intermediate
    if _drops(layout, recompute):
        return size
    width = 4 if layout.precision == "fp32" else 2
    return size + kept * rows * intermediate + entry * kept / width


def _moe(
    model: ModelSpec, layout: ParallelSpec, tokens: int, load_skew: float, recompute: RecomputeName, entry: float
) -> float:
    moe = model.moe
    assert moe is not None
    spread = layout.ep > 1
    local = tokens / (layout.tp if spread else 1)
    share = 1 if spread else layout.tp
    rows = local * moe.num_experts_per_token * (load_skew if spread else 1.0)
    kept, width = _kept_width(layout), 4 if layout.precision == "fp32" else 2
    size = rows * kept * model.hidden_size + 4 * local * moe.num_routed_experts
    size += _feed_forward(layout, rows, moe.expert_intermediate_size / share, recompute, 0.0)
    shared = moe.num_shared_experts * moe.expert_intermediate_size / share
    size += _feed_forward(layout, local, shared, recompute, entry)
    if not _drops(layout, recompute):
        size += rows * width * model.hidden_size  # the experts' output, for the gates' gradient
    return size
