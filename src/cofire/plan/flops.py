"""How many floating-point operations a token costs, in training and in decoding.

Training, arXiv 2505.09343, table 2: ``6 (N - N_embedding) + 3 L s h (d_qk + d_v)`` for causal attention, where N is
what a token activates. The rule gives that table's DeepSeek-V2 (155) and DeepSeek-V3 (250 GFLOP) exactly; the same
accounting gives 445 for Qwen2.5-72B where the table prints 394, and 2473 for LLaMA-3.1-405B where it prints 2448.

:func:`deepseekmoe_flops_per_token` is the other accounting in use, recovered from the FLOPs column of DeepSeekMoE
(arXiv 2401.06066): feed-forward sizes in units of a standard one, attention matrices as ``4 d^2``, full (not causal)
attention.

Decoding counts matrix products only, at 2 FLOP per element, and attention over the tokens already cached.

Left out: softmax, norms, activations and the optimiser, all linear in the width.
"""

from __future__ import annotations

from typing import Literal

from cofire.errors import PlanError
from cofire.plan.parameters import attention_matrix_parameters, count_parameters
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.spec_type import Spec

DecodeForm = Literal["recompute", "absorbed", "full"]


class TrainingFlops(Spec):
    """FLOP per trained token, forward and backward.

    ``matrices`` and ``attention`` are the two terms of the papers' rule, ``main`` their sum: what tables print.
    ``mtp`` is the cost of the multi-token-prediction modules, each with its own pass through the shared head, over
    all positions. ``total = main + mtp`` is what a training run really computes, and what MFU divides by.
    """

    sequence_length: int
    causal: bool
    matrices: int
    attention: int
    main: int
    mtp: int
    total: int


class DecodeFlops(Spec):
    """FLOP to decode one token with ``context_length`` tokens cached.

    ``attention_per_layer`` holds projections and core; the other fields are sums over all layers.
    """

    context_length: int
    form: DecodeForm
    attention_per_layer: int
    attention: int
    feed_forward: int
    router: int
    head: int
    total: int


def training_flops_per_token(model: ModelSpec, sequence_length: int, causal: bool = True) -> TrainingFlops:
    """Return the training cost of one token (arXiv 2505.09343, table 2).

    Args:
        model: The model.
        sequence_length: s; the attention term grows with it.
        causal: Count half of the s x s score matrix, as a causal kernel computes; ``False`` counts all of it.

    Returns:
        FLOP per token.
    """
    if sequence_length < 1:
        raise PlanError(f"sequence_length = {sequence_length} must be at least 1")
    count, attention = count_parameters(model), model.attention
    per_layer = (
        (3 if causal else 6) * sequence_length * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    )
    matrices = 6 * count.activated_head_only
    core = model.num_layers * per_layer
    depth = count.mtp.depth
    mtp = 6 * (count.mtp.activated + depth * model.vocab_size * model.hidden_size) + depth * per_layer
    return TrainingFlops(
        sequence_length=sequence_length,
        causal=causal,
        matrices=matrices,
        attention=core,
        main=matrices + core,
        mtp=mtp,
        total=matrices + core + mtp,
    )


def deepseekmoe_flops_per_token(
    num_layers: int, hidden_size: int, ffn_units: float, vocab_size: int, sequence_length: int
) -> float:
    """Return FLOP per token as DeepSeekMoE counts (arXiv 2401.06066): ``6 (4L + 8U) d^2 + 12 L d s + 6 V d``.

    Args:
        num_layers: L.
        hidden_size: d.
        ffn_units: U, the activated feed-forward parts of all layers in units of a standard one of ``8 d^2``
            parameters; a dense first layer counts like the mixture layers.
        vocab_size: V.
        sequence_length: s, tokens per sequence.

    Returns:
        FLOP per token, forward and backward.
    """
    matrices = (4 * num_layers + 8 * ffn_units) * hidden_size**2
    return 6 * matrices + 12 * num_layers * hidden_size * sequence_length + 6 * vocab_size * hidden_size


def ffn_units(model: ModelSpec) -> float:
    """U of :func:`deepseekmoe_flops_per_token`: every layer counts like a mixture layer, if there is one."""
    unit = 8 * model.hidden_size / 3
    if model.moe is None:
        return model.num_layers * model.intermediate_size / unit
    experts = model.moe.num_shared_experts + model.moe.num_experts_per_token
    return model.num_layers * experts * model.moe.expert_intermediate_size / unit


def default_decode_form(model: ModelSpec) -> DecodeForm:
    """The form that a server uses: MLA absorbed over its latent cache, others over full keys and values."""
    return "absorbed" if isinstance(model.attention, MLASpec) else "full"


def decode_attention_flops_per_layer(model: ModelSpec, context_length: int, form: DecodeForm) -> int:
    """FLOP of one layer's attention for one new token (DeepSeek-V3 technical report, equations 1-11).

    ``recompute`` expands the cached latent to keys and values anew at each token; ``absorbed`` moves that matrix to
    the query and the output, so the core works on the latent; ``full`` caches keys and values of every head.

    Args:
        model: The model.
        context_length: Tokens attended to, the new one included.
        form: One of ``recompute``, ``absorbed``, ``full``; without MLA only ``full`` exists.

    Raises:
        PlanError: The form does not exist for this attention, or the context is empty.
    """
    if context_length < 1:
        raise PlanError(f"context_length = {context_length} must be at least 1")
    attention = model.attention
    matrices = attention_matrix_parameters(model)
    core = attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    if form == "full":
        return 2 * matrices + 2 * context_length * core
    if form not in ("recompute", "absorbed"):
        raise PlanError(f"form = {form!r} is not one of recompute, absorbed, full")
    if not isinstance(attention, MLASpec):
        raise PlanError(f"form = {form!r} needs MLA, but {model.name} has {attention.kind}; use full")
    rank, heads = attention.kv_lora_rank, attention.num_heads
    up = rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    if form == "recompute":
        return 2 * (matrices - up) + 2 * context_length * (up + core)
    return 2 * matrices + 2 * context_length * heads * (attention.cache_width + rank)


def decode_flops_per_token(
    model: ModelSpec, context_length: int, form: DecodeForm | Literal["auto"] = "auto"
) -> DecodeFlops:
    """Return the cost of decoding one token with the main model.

    Args:
        model: The model.
        context_length: Tokens attended to, the new one included.
        form: See :func:`decode_attention_flops_per_layer`; ``auto`` is :func:`default_decode_form`.

    Returns:
        FLOP per token.

    Raises:
        PlanError: The form does not exist for this attention, or the context is empty.
    """
    form = default_decode_form(model) if form == "auto" else form
    per_layer = decode_attention_flops_per_layer(model, context_length, form)
    count, moe = count_parameters(model), model.moe
    routed = moe.num_experts_per_token * count.expert * model.num_moe_layers if moe else 0
    feed_forward = 2 * (count.dense_ffn + count.shared_experts + routed)
    router = 2 * (count.router - count.router_bias)
    head = 2 * model.vocab_size * model.hidden_size
    attention = model.num_layers * per_layer
    return DecodeFlops(
        context_length=context_length,
        form=form,
        attention_per_layer=per_layer,
        attention=attention,
        feed_forward=feed_forward,
        router=router,
        head=head,
        total=attention + feed_forward + router + head,
    )


def decode_core_intensity(model: ModelSpec, bytes_per_number: float = 2) -> float:
    """FLOP that the attention core of one layer does per byte of cache it reads, in the form a server uses."""
    attention = model.attention
    widths = attention.qk_head_dim + attention.v_head_dim
    if isinstance(attention, MLASpec):
        widths = attention.cache_width + attention.kv_lora_rank
    return 2 * attention.num_heads * widths / (attention.cache_width * bytes_per_number)
