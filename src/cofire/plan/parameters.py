"""How many parameters a model has, by role, and how many of them one token uses.

Formulas over the spec alone; ``tests/unit/test_plan_parameters.py`` compares them with real tensors. The counts of
DeepSeek-V3, -V2 and -V2-Lite follow their released configurations (arXiv 2412.19437, section 4.2).

Counting rules, since published figures differ by them:

- ``total`` is the main model: embedding, layers, final norm, head. Multi-token-prediction modules are counted apart
  (``mtp``): they share embedding and head with the main model.
- The router's FP32 selection bias is part of ``router``, although it is a buffer that no gradient reaches.
- ``activated_*`` counts what one token passes through: all of it, except that of the routed experts only
  ``num_experts_per_token`` per layer count. The three rules differ in the two vocabulary matrices. DeepSeek's printed
  "37B", "21B" and "2.4B" are the head-only rule.
- Where embedding and head are tied there is one matrix: ``head`` is 0, and it counts once under both rules that
  count the head.

Left out: Rotary tables and other values computed from the spec.
"""

from __future__ import annotations

from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.spec_type import Spec


class MTPParameterCount(Spec):
    """Parameters of the multi-token-prediction modules; embedding and head are shared and not in ``total``.

    ``activated`` is what one token passes through in all modules, still without embedding and head.
    """

    depth: int = 0
    projection: int = 0
    attention: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    dense_ffn: int = 0
    router: int = 0
    norms: int = 0
    total: int = 0
    activated: int = 0
    activated_with_both_embeddings: int = 0


class ParameterCount(Spec):
    """Parameters by role, all layers together, and the totals under the module's counting rules.

    ``*_per_layer`` and ``expert`` are the sizes of one unit. ``router_bias`` is contained in ``router``.
    """

    embedding: int
    head: int
    attention: int
    routed_experts: int
    shared_experts: int
    dense_ffn: int
    router: int
    router_bias: int
    norms: int
    attention_per_layer: int
    expert: int
    dense_ffn_per_layer: int
    router_per_layer: int
    total: int
    activated_with_both_embeddings: int
    activated_head_only: int
    activated_without_embeddings: int
    mtp: MTPParameterCount

    @property
    def total_with_mtp(self) -> int:
        """All numbers that a checkpoint of the model stores, selection biases included."""
        return self.total + self.mtp.total

    @property
    def total_without_router_bias(self) -> int:
        """``total`` as a framework counts it that lists only what has a gradient."""
        return self.total - self.router_bias

    def by_role(self) -> dict[str, int]:
        """The main model's roles; they sum to ``total``."""
        roles = (
            "embedding",
            "attention",
            "routed_experts",
            "shared_experts",
            "dense_ffn",
            "router",
            "norms",
            "head",
        )
        return {role: getattr(self, role) for role in roles}


def count_parameters(model: ModelSpec) -> ParameterCount:
    """Count the parameters of a model by formula; exact integers.

    Args:
        model: The model.

    Returns:
        The counts by role and the totals (see the module's text for the rules).
    """
    moe, hidden = model.moe, model.hidden_size
    attention = attention_parameters(model)
    dense_per_layer = feed_forward_parameters(hidden, model.intermediate_size)
    expert = feed_forward_parameters(hidden, moe.expert_intermediate_size) if moe else 0
    bias = moe.num_routed_experts if moe and moe.selection_bias else 0
    router_per_layer = hidden * moe.num_routed_experts + bias if moe else 0
    moe_layers = model.num_moe_layers
    vocabulary = model.vocab_size * hidden
    shared = moe_layers * moe.num_shared_experts * expert if moe else 0
    routed = moe_layers * moe.num_routed_experts * expert if moe else 0
    routed_active = moe_layers * moe.num_experts_per_token * expert if moe else 0
    always = (
        model.num_layers * attention
        + shared
        + model.num_dense_layers * dense_per_layer
        + moe_layers * router_per_layer
        + (2 * model.num_layers + 1) * hidden
    )
    head = 0 if model.tie_embeddings else vocabulary
    return ParameterCount(
        embedding=vocabulary,
        head=head,
        attention=model.num_layers * attention,
        routed_experts=routed,
        shared_experts=shared,
        dense_ffn=model.num_dense_layers * dense_per_layer,
        router=moe_layers * router_per_layer,
        router_bias=moe_layers * bias,
        norms=(2 * model.num_layers + 1) * hidden,
        attention_per_layer=attention,
        expert=expert,
        dense_ffn_per_layer=dense_per_layer,
        router_per_layer=router_per_layer,
        total=always + routed + vocabulary + head,
        activated_with_both_embeddings=always + routed_active + vocabulary + head,
        activated_head_only=always + routed_active + vocabulary,
        activated_without_embeddings=always + routed_active,
        mtp=_count_mtp(model, attention, expert, router_per_layer, dense_per_layer),
    )


def attention_parameters(model: ModelSpec) -> int:
    """Parameters of one layer's attention, norms of the latents and biases included.

    MLA: DeepSeek-V3 technical report, equations 1-11. ``attention_matrix_parameters`` leaves out what is no matrix.
    """
    attention = model.attention
    extra = attention_matrix_parameters(model)
    if isinstance(attention, MLASpec):
        return extra + attention.kv_lora_rank + (attention.q_lora_rank or 0)
    heads = attention.num_heads + 2 * attention.num_key_value_heads
    return extra + (heads * attention.head_dim if attention.qkv_bias else 0)


def attention_matrix_parameters(model: ModelSpec) -> int:
    """Elements of one layer's attention matrices: what a token is multiplied by, at 2 FLOP each."""
    attention, hidden = model.attention, model.hidden_size
    heads = attention.num_heads
    if isinstance(attention, MLASpec):
        queries = heads * attention.qk_head_dim
        rank = attention.q_lora_rank
        query = hidden * queries if rank is None else rank * (hidden + queries)
        down = hidden * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        up = attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        return query + down + up + heads * attention.v_head_dim * hidden
    return hidden * attention.head_dim * (2 * heads + 2 * attention.num_key_value_heads)


def feed_forward_parameters(hidden_size: int, intermediate_size: int) -> int:
    """Parameters of one SwiGLU: gate, up and down, without biases."""
    return 3 * hidden_size * intermediate_size


def _count_mtp(model: ModelSpec, attention: int, expert: int, router: int, dense: int) -> MTPParameterCount:
    """Each module: two input norms, projection 2D -> D, one block of the last layer's kind, output norm (eq. 21-25)."""
    if model.mtp is None:
        return MTPParameterCount()
    moe, depth, hidden = model.moe, model.mtp.depth, model.hidden_size
    shared = moe.num_shared_experts * expert if moe else 0
    routed = moe.num_routed_experts * expert if moe else 0
    routed_active = moe.num_experts_per_token * expert if moe else 0
    dense = 0 if moe else dense
    projection, norms = 2 * hidden * hidden, 5 * hidden
    always = projection + norms + attention + shared + dense + router
    vocabulary = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    return MTPParameterCount(
        depth=depth,
        projection=depth * projection,
        attention=depth * attention,
        routed_experts=depth * routed,
        shared_experts=depth * shared,
        dense_ffn=depth * dense,
        router=depth * router,
        norms=depth * norms,
        total=depth * (always + routed),
        activated=depth * (always + routed_active),
        activated_with_both_embeddings=depth * (always + routed_active) + vocabulary,
    )
