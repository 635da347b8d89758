"""How many bytes one device holds, in training and in decoding.

Training, by role (the formats are those of the DeepSeek-V3 technical report, section 3.3, without FP8):

- ``weights``: what the matrix products read: FP32, or a BF16 copy.
- ``gradients``: FP32.
- ``optimizer``: AdamW's two moments in FP32 or BF16, the FP32 master weights where ``weights`` is a BF16 copy, and
  the moving average of the weights if one is kept.
- ``activations``: what the forward pass saves for the backward pass of one micro-batch, and the loss's logits.

Weights, gradients and moments are exact products of parameter counts. Activations are *modelled*: a sum over the
tensors that ``cofire.model`` saves, checked against measured peaks by a test.

Left out: the allocator's fragmentation, temporaries inside one operator, communication buffers, and the framework
itself.
"""

from __future__ import annotations

from cofire.plan.kv_cache import kv_bytes_per_token
from cofire.plan.parameters import ParameterCount, count_parameters
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

FORMAT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
# FP8 weights carry one FP32 scale per 128 x 128 block (DeepSeek-V3 technical report, section 3.3.2).
_FP8_SCALE_BYTES_PER_WEIGHT = 4 / (128 * 128)


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
    moments = 2 * FORMAT_BYTES[workload.moments] * parameters
    master = 4 * parameters if workload.recipe == "bf16" else 0
    average = 4 * parameters if workload.ema else 0
    weights = FORMAT_BYTES[workload.recipe] * parameters
    parts = activation_parts(model, workload)
    activations = sum(parts.values())
    return MemoryEstimate(
        weights=weights,
        gradients=4 * parameters,
        optimizer=moments + master + average,
        activations=activations,
        activation_parts=parts,
        total=weights + 4 * parameters + moments + master + average + activations,
    )


def activation_parts(model: ModelSpec, workload: WorkloadSpec) -> dict[str, int]:
    """Return the bytes saved for the backward pass of one micro-batch, by part of the model.

    The residual stream and the norms are FP32; everything between is in the recipe's format. With full recomputation
    each block keeps its input, and one block at a time is expanded.

    Args:
        model: The model.
        workload: Micro-batch, sequence length, recipe and recomputation.

    Returns:
        Bytes of ``attention``, ``feed_forward``, ``mtp`` and ``loss``, or with recomputation of ``block_inputs`` and
        ``one_block`` instead of the first two.
    """
    tokens = workload.micro_batch_size * workload.sequence_length
    compute = FORMAT_BYTES[workload.recipe]
    attention = _attention_bytes(model, compute)
    dense, moe = _dense_bytes(model, compute), _moe_bytes(model, compute)
    depth = model.mtp.depth if model.mtp else 0
    last = moe if model.moe else dense
    loss = _loss_bytes(model, compute)
    entry = 4 * 4 * model.hidden_size + compute * 2 * model.hidden_size
    if workload.recompute == "full":
        block_inputs = (model.num_layers + depth) * 4 * model.hidden_size
        parts = {
            "block_inputs": block_inputs,
            "one_block": attention + max(dense if model.num_dense_layers else 0, moe),
            "mtp": depth * entry,
        }
    else:
        parts = {
            "attention": model.num_layers * attention,
            "feed_forward": model.num_dense_layers * dense + model.num_moe_layers * moe,
            "mtp": depth * (entry + attention + last),
        }
    parts["loss"] = (1 + depth) * loss
    return {part: tokens * size for part, size in parts.items()}


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


def _norm_bytes(width: int, compute: int) -> int:
    """RMSNorm saves its FP32 input and its output, which the next product reads."""
    return (4 + compute) * width


def _attention_bytes(model: ModelSpec, compute: int) -> int:
    attention, hidden = model.attention, model.hidden_size
    heads = attention.num_heads
    core = heads * (2 * attention.qk_head_dim + 2 * attention.v_head_dim)
    size = _norm_bytes(hidden, compute) + compute * core + 4 * heads
    if isinstance(attention, MLASpec):
        size += _norm_bytes(attention.kv_lora_rank, compute) + compute * attention.qk_rope_head_dim
        size += _norm_bytes(attention.q_lora_rank, compute) if attention.q_lora_rank else 0
    return size


def _dense_bytes(model: ModelSpec, compute: int) -> int:
    return _norm_bytes(model.hidden_size, compute) + compute * 4 * model.intermediate_size


def _moe_bytes(model: ModelSpec, compute: int) -> int:
    moe, hidden = model.moe, model.hidden_size
    if moe is None:
        return 0
    routed = moe.num_experts_per_token * (2 * hidden + 4 * moe.expert_intermediate_size)
    shared = 4 * moe.num_shared_experts * moe.expert_intermediate_size
    return _norm_bytes(hidden, compute) + compute * (routed + shared) + 4 * 3 * moe.num_routed_experts


def _loss_bytes(model: ModelSpec, compute: int) -> int:
    """Final norm, then logits and their FP32 log-probabilities, of one pass through the head."""
    return _norm_bytes(model.hidden_size, compute) + (compute + 4) * model.vocab_size
