"""Hypothesis strategies that draw valid specs, small enough to build.

They cover every alternative of a decoder: MLA with and without query compression, GQA with and without biases, dense
and mixture-of-experts layers with and without groups and shared experts, prediction depths 0 to 2, tied embeddings.
"""

from __future__ import annotations

from typing import Literal

from hypothesis import strategies as st

from cofire.spec import BalanceSpec, GQASpec, MLASpec, ModelSpec, MoESpec, MTPSpec, RopeSpec, RunSpec

BiasRule = Literal["none", "sign", "proportional", "multiplicative"]

_FRACTIONS = st.floats(0, 1, allow_nan=False)


def mla_specs() -> st.SearchStrategy[MLASpec]:
    """Multi-head latent attention of at most 4 heads."""
    return st.builds(
        MLASpec,
        num_heads=st.integers(1, 4),
        q_lora_rank=st.none() | st.integers(4, 16),
        kv_lora_rank=st.integers(4, 16),
        qk_nope_head_dim=st.sampled_from([4, 8, 12]),
        qk_rope_head_dim=st.sampled_from([4, 8]),
        v_head_dim=st.sampled_from([4, 8, 16]),
    )


@st.composite
def gqa_specs(draw: st.DrawFn) -> GQASpec:
    """Grouped-query attention of at most 8 heads."""
    key_value_heads = draw(st.integers(1, 2))
    return GQASpec(
        num_heads=key_value_heads * draw(st.integers(1, 4)),
        num_key_value_heads=key_value_heads,
        head_dim=draw(st.sampled_from([4, 8])),
        qkv_bias=draw(st.booleans()),
    )


@st.composite
def moe_specs(draw: st.DrawFn, num_layers: int = 2) -> MoESpec:
    """A mixture of experts of at most 4 groups of 4, for a model of ``num_layers``."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    limited = draw(st.integers(1, groups))
    bias = draw(st.booleans())
    rules: list[BiasRule] = ["none", "sign", "proportional", "multiplicative"] if bias else ["none"]
    return MoESpec(
        num_routed_experts=groups * per_group,
        num_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_token=draw(st.integers(1, limited * per_group)),
        expert_intermediate_size=draw(st.sampled_from([4, 8])),
        num_first_dense_layers=draw(st.integers(0, num_layers)),
        score_function=draw(st.sampled_from(["sigmoid", "softmax"])),
        num_expert_groups=groups,
        num_limited_groups=limited,
        group_score=draw(st.sampled_from(["top2_sum", "max"])),
        normalize_gates=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=bias,
        balance=BalanceSpec(
            bias_rule=draw(st.sampled_from(rules)),
            sequence_loss_weight=draw(st.sampled_from([0.0, 1e-4])),
            expert_loss_weight=draw(st.sampled_from([0.0, 1e-3])),
            num_device_groups=groups,
        ),
    )


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    """A decoder of at most 3 layers and some ten thousand parameters."""
    num_layers = draw(st.integers(1, 3))
    return ModelSpec(
        name=draw(st.text(min_size=1, max_size=8)),
        description=draw(st.text(max_size=20)),
        vocab_size=draw(st.integers(8, 64)),
        hidden_size=draw(st.sampled_from([8, 16, 24])),
        num_layers=num_layers,
        intermediate_size=draw(st.integers(1, 32)),
        max_sequence_length=draw(st.integers(16, 64)),
        attention=draw(mla_specs() | gqa_specs()),
        moe=draw(st.none() | moe_specs(num_layers)),
        mtp=draw(st.none() | st.builds(MTPSpec, depth=st.integers(1, 2), loss_weight=_FRACTIONS)),
        rope=draw(st.builds(RopeSpec, theta=st.floats(10, 1e6), interleaved=st.booleans())),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def run_specs(draw: st.DrawFn) -> RunSpec:
    """A training run of a drawn model; it validates, and names no data that exists."""
    micro = draw(st.integers(1, 4))
    return RunSpec.model_validate(
        {
            "model": draw(model_specs()),
            "data": {"paths": draw(st.lists(st.text(min_size=1), min_size=1)), "sequence_length": draw(st.just(8))},
            "steps": draw(st.integers(1, 10_000)),
            "batch_size": micro * draw(st.integers(1, 4)),
            "micro_batch_size": micro,
            "seed": draw(st.integers(0, 2**32)),
            "ema_decay": draw(st.none() | st.floats(0.5, 0.999)),
            "recompute": draw(st.sampled_from(["none", "full"])),
        }
    )
