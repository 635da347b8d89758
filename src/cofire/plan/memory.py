"""How many bytes one device holds, in training and in decoding.

Training, by role (the formats are those of the DeepSeek-V3 technical report, section 3.3, without FP8):

- ``weights``: what the matrix products read: the FP32 weights, or their BF16 copies beside FP32 master weights.
- ``gradients``: FP32.
- ``optimizer``: AdamW's two moments in FP32 or BF16, the FP32 master weights where ``weights`` are BF16 copies, and
  the moving average of the weights if one is kept.
- ``activations``: what the forward pass keeps for the backward pass of one micro-batch, and the workspace at the
  moment when most of it is held.

Weights, gradients and optimiser are exact products of parameter counts. Activations are *modelled* after the tensors
that ``cofire.model`` keeps on a CPU; a test compares them with measured peaks and holds them to -10 % and +25 %.

Left out: the framework itself, its kernels' scratch and caches, what the allocator keeps after it is freed, and
communication buffers. On a CPU that is much for a small model: *measured* with glibc and FP32, the ``small`` preset's
process grows by 2.2 GB where 1.3 GB of tensors are planned, the rest being the framework, oneDNN and freed blocks.
A plan is therefore a lower bound on what a process needs.
"""

from __future__ import annotations

from cofire.plan.kv_cache import kv_bytes_per_token
from cofire.plan.parameters import (
    ParameterCount,
    attention_matrix_parameters,
    count_parameters,
)
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

FORMAT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
# FP8 weights carry one FP32 scale per 128 x 128 block (DeepSeek-V3 technical report, section 3.3.2).
_FP8_SCALE_BYTES_PER_WEIGHT = 4 / (128 * 128)
# The head's logits exist for this many tokens at a time (cofire.model.cross_entropy).
_LOSS_CHUNK_TOKENS = 1024


class MemoryEstimate(Spec):
    """Bytes that training holds on one device that has the whole model; ``total`` is the sum of the roles.

    ``activation_parts`` says where the activations go; its values sum to ``activations``.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activation_parts: dict[str, int]
    total: int


class InferenceMemory(Spec):
    """Bytes that decoding holds: weights of the main model and the cache of all sequences."""

    weights: int
    cache: int
    total: int


def training_memory(model: ModelSpec, workload: WorkloadSpec) -> MemoryEstimate:
    """Return the memory of training a model, multi-token-prediction modules included, on one device.

    Args:
        model: The model.
        workload: Micro-batch, sequence length, formats, and whether activations are recomputed.

    Returns:
        Bytes by role.
    """
    parameters = count_parameters(model).total_with_mtp
    mixed = workload.recipe == "bf16"
    weights = _copied_weight_bytes(model, workload) if mixed else 4 * parameters
    moments = 2 * FORMAT_BYTES[workload.moments] * parameters
    optimizer = moments + (4 * parameters if mixed else 0) + (4 * parameters if workload.ema else 0)
    parts = activation_parts(model, workload)
    activations = sum(parts.values())
    return MemoryEstimate(
        weights=weights,
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=activations,
        activation_parts=parts,
        total=weights + 4 * parameters + optimizer + activations,
    )


def activation_parts(model: ModelSpec, workload: WorkloadSpec) -> dict[str, int]:
    """Return the bytes that the forward and backward pass of one micro-batch hold, by part of the model.

    The residual stream, norms and the router are FP32; everything between is in the recipe's format. With full
    recomputation each block keeps its inputs, and one block at a time is expanded. MTP module k sees T - k positions.

    Args:
        model: The model.
        workload: Micro-batch, sequence length, recipe and recomputation.

    Returns:
        Bytes of ``attention``, ``feed_forward``, ``mtp``, ``loss`` and ``workspace``; with recomputation
        ``block_inputs`` takes the place of the first three, and the expanded block is part of ``workspace``.
    """
    hidden, compute = model.hidden_size, FORMAT_BYTES[workload.recipe]
    tokens = workload.micro_batch_size * workload.sequence_length
    depth = model.mtp.depth if model.mtp else 0
    mtp_tokens = sum(workload.micro_batch_size * (workload.sequence_length - k) for k in range(1, depth + 1))
    attention, dense, moe = _attention_bytes(model, compute), _dense_bytes(model, compute), _moe_bytes(model, compute)
    last = moe if model.moe else dense
    # Two norms, each input and normalised value; the second input is the norm's output one depth before.
    entry = 4 * 4 * hidden + compute * 2 * hidden
    # Per pass through the head: gradients of its input and of its weights, formed in the forward pass; a final norm.
    loss = (tokens + mtp_tokens) * 4 * hidden + (1 + depth) * 4 * model.vocab_size * hidden
    final_norms = _norm_bytes(hidden) * (tokens + (mtp_tokens if workload.recompute == "none" else 0))
    chunk, backward = _loss_chunk_bytes(model, tokens, compute), _backward_bytes(model, tokens, compute)
    if workload.recompute == "full":
        one_block = attention + max(dense if model.num_dense_layers else 0, moe)
        one_block = max(one_block * tokens, (entry + attention + last) * mtp_tokens // max(depth, 1))
        return {
            "block_inputs": 4 * hidden * (model.num_layers * tokens + 2 * mtp_tokens),
            "loss": loss + final_norms,
            "workspace": max(chunk, one_block + backward),
        }
    return {
        "attention": model.num_layers * attention * tokens,
        "feed_forward": (model.num_dense_layers * dense + model.num_moe_layers * moe) * tokens,
        "mtp": (entry + attention + last) * mtp_tokens,
        "loss": loss + final_norms,
        "workspace": max(chunk, backward),
    }


def inference_memory(model: ModelSpec, workload: WorkloadSpec) -> InferenceMemory:
    """Return the memory of decoding with the main model on one device.

    Args:
        model: The model.
        workload: Sequences decoded together, their context, and the formats of weights and cache.

    Returns:
        Bytes of weights and cache.
    """
    count = count_parameters(model)
    weights = weight_bytes(count, workload.weight_format)
    per_token = kv_bytes_per_token(model, workload.cache_bytes_per_number)
    cache = round(per_token * workload.context_length * workload.batch_size)
    return InferenceMemory(weights=weights, cache=cache, total=weights + cache)


def weight_bytes(count: ParameterCount, weight_format: str) -> int:
    """Bytes of the main model's weights; in FP8, embedding, head, router and norms stay BF16, as in DeepSeek-V3."""
    if weight_format != "fp8":
        return count.total * FORMAT_BYTES[weight_format]
    kept = count.embedding + count.head + count.router + count.norms
    return round((count.total - kept) * (1 + _FP8_SCALE_BYTES_PER_WEIGHT)) + 2 * kept


# -- bytes per token of one part --------------------------------------------------------------------


def _norm_bytes(width: int) -> int:
    """What RMSNorm keeps: its FP32 input and the normalised value, before the weight; and one FP32 scale."""
    return 4 * (2 * width + 1)


def _attention_bytes(model: ModelSpec, compute: int) -> int:
    """Norm, its output (one BF16 copy per product that reads it), latents, then what the attention kernel keeps."""
    attention, heads = model.attention, model.attention.num_heads
    readers = 1 if compute == 4 else 2 if isinstance(attention, MLASpec) else 3
    size = _norm_bytes(model.hidden_size) + compute * readers * model.hidden_size
    keys = heads * attention.qk_head_dim
    output = heads * attention.v_head_dim
    if not isinstance(attention, MLASpec):
        return size + compute * (3 * keys + output) + 4 * heads
    if attention.q_lora_rank is not None:
        size += _norm_bytes(attention.q_lora_rank) + compute * attention.q_lora_rank
    size += _norm_bytes(attention.kv_lora_rank) + compute * attention.cache_width
    # The kernel reads values of the keys' width: a padded copy, and a padded output, where they are narrower.
    padded = attention.v_head_dim < attention.qk_head_dim
    values = keys + keys if padded else heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return size + compute * (2 * keys + values + output) + 4 * heads


def _dense_bytes(model: ModelSpec, compute: int) -> int:
    """Norm, its output, gate and up, and their product."""
    return _norm_bytes(model.hidden_size) + compute * (model.hidden_size + 3 * model.intermediate_size)


def _moe_bytes(model: ModelSpec, compute: int) -> int:
    """Norm, its FP32 output for the router, rows sorted by expert, gate and up, product, rows in token order."""
    moe, hidden = model.moe, model.hidden_size
    if moe is None:
        return 0
    routed = moe.num_experts_per_token * (2 * hidden + 3 * moe.expert_intermediate_size)
    shared = 3 * moe.num_shared_experts * moe.expert_intermediate_size
    if compute != 4 and moe.num_shared_experts:
        shared += hidden
    # Three int64 indices and two FP32 gates per chosen expert.
    routing = 4 * moe.num_routed_experts + (3 * 8 + 2 * 4) * moe.num_experts_per_token
    return _norm_bytes(hidden) + 4 * hidden + compute * (routed + shared) + routing


# -- what exists for a moment -----------------------------------------------------------------------


def _loss_chunk_bytes(model: ModelSpec, tokens: int, compute: int) -> int:
    """FP32 logits and log-probabilities of a chunk beside the gradient of the last one; in BF16, the head's copy."""
    several = tokens > _LOSS_CHUNK_TOKENS
    copies = 4 * 3 if several else 4 * 2
    if compute != 4 and several:
        copies += compute
    head = compute * model.hidden_size if compute != 4 else 0
    return model.vocab_size * (copies * min(tokens, _LOSS_CHUNK_TOKENS) + head)


def _backward_bytes(model: ModelSpec, tokens: int, compute: int) -> int:
    """Gradients of a block's output and of its largest stack of matrices; others take the place of what they free."""
    moe, hidden = model.moe, model.hidden_size
    width = model.intermediate_size if moe is None else moe.num_routed_experts * moe.expert_intermediate_size
    return 4 * hidden * tokens + compute * 2 * width * hidden


def _copied_weight_bytes(model: ModelSpec, workload: WorkloadSpec) -> int:
    """BF16 copies held at once.

    Without recomputation those of all matrices. With it, the larger of one block's and of all matrices but the
    routed experts, since autocast keeps the copies of plain products until the forward pass ends.
    """
    count, moe = count_parameters(model), model.moe
    mtp = count.mtp
    plain = count.attention + count.shared_experts + count.dense_ffn
    plain += mtp.attention + mtp.shared_experts + mtp.dense_ffn + mtp.projection
    if workload.recompute == "none":
        return 2 * (plain + count.routed_experts + mtp.routed_experts)
    experts = 0 if moe is None else count.expert * (moe.num_routed_experts + moe.num_shared_experts)
    return 2 * max(plain, attention_matrix_parameters(model) + max(experts, count.dense_ffn_per_layer))
