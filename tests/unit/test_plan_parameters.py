"""The counting formulas against the tensors of models that were really built."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from cofire.plan import count_parameters
from cofire.spec import ModelSpec, load_as
from cofire.testing.strategies import model_specs

torch = pytest.importorskip("torch")


def tensor_roles(spec: ModelSpec) -> dict[str, int]:
    """Count the elements of all stored tensors, selection biases included, by what their names say."""
    from cofire.model import build

    decoder = build(spec, device="meta")
    seen: set[int] = set()
    roles: dict[str, int] = {}
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        role = role_of(name)
        roles[role] = roles.get(role, 0) + tensor.numel()
    return roles


def role_of(name: str) -> str:
    part = "mtp" if name.startswith("mtp.") else ""
    for piece, role in [
        ("embedding.weight", "embedding"),
        ("head.weight", "head"),
        ("projection.", "projection"),
        (".attention.", "attention"),
        (".router.bias", "router_bias"),
        (".router.", "router"),
        (".shared.", "shared_experts"),
        ("norm.weight", "norms"),
        ("feed_forward.gate_up.weight", "dense_ffn"),
        ("feed_forward.down.weight", "dense_ffn"),
        ("feed_forward.gate_up", "routed_experts"),
        ("feed_forward.down", "routed_experts"),
    ]:
        if piece in name:
            return f"{part}.{role}" if part else role
    raise AssertionError(f"no role for {name}")


def planned_roles(spec: ModelSpec) -> dict[str, int]:
    count = count_parameters(spec)
    roles = count.by_role()
    roles["router"] -= count.router_bias
    roles["router_bias"] = count.router_bias
    mtp = count.mtp.model_dump(exclude={"depth", "total", "activated", "activated_with_both_embeddings"})
    bias = count.mtp.depth * spec.moe.num_routed_experts if spec.moe and spec.moe.selection_bias else 0
    mtp["router"] -= bias
    mtp["router_bias"] = bias
    roles |= {f"mtp.{role}": number for role, number in mtp.items()}
    return {role: number for role, number in roles.items() if number}


@settings(max_examples=60, deadline=None)
@given(model_specs())
def test_every_role_counts_the_elements_of_the_real_tensors(spec: ModelSpec) -> None:
    real = tensor_roles(spec)
    assert planned_roles(spec) == real
    assert count_parameters(spec).total_with_mtp == sum(real.values())


@pytest.mark.parametrize("name", ["tiny", "small", "deepseek-v3", "deepseek-v2-lite", "qwen2.5-72b", "gshard-2b"])
def test_presets_have_the_planned_tensors_without_allocating_them(name: str) -> None:
    spec = load_as(ModelSpec, name)
    assert planned_roles(spec) == tensor_roles(spec)


@settings(max_examples=60, deadline=None)
@given(model_specs())
def test_totals_are_the_sums_that_the_rules_say(spec: ModelSpec) -> None:
    count = count_parameters(spec)
    assert sum(count.by_role().values()) == count.total
    vocabulary = spec.vocab_size * spec.hidden_size
    assert count.activated_head_only - count.activated_without_embeddings == vocabulary
    both = count.activated_with_both_embeddings - count.activated_head_only
    assert both == (0 if spec.tie_embeddings else vocabulary)
    idle = 0
    if spec.moe is not None:
        idle = spec.num_moe_layers * (spec.moe.num_routed_experts - spec.moe.num_experts_per_token) * count.expert
    assert count.total - count.activated_with_both_embeddings == idle


@settings(max_examples=20, deadline=None)
@given(model_specs())
def test_a_token_touches_as_many_expert_weights_as_are_counted_active(spec: ModelSpec) -> None:
    """Routing one token through a real model reaches K experts of each layer."""
    if spec.moe is None or spec.num_moe_layers == 0:
        return
    from cofire.model import build

    decoder = build(spec, seed=1)
    counts = decoder(torch.zeros(1, 1, dtype=torch.int64)).expert_counts
    touched = int((counts > 0).sum())
    count = count_parameters(spec)
    active = touched * count.expert
    assert active == spec.num_moe_layers * spec.moe.num_experts_per_token * count.expert
    assert count.activated_with_both_embeddings == count.total - count.routed_experts + active
