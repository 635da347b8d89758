"""What a spec accepts, and the one line it answers with otherwise."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import SpecError
from cofire.spec import BalanceSpec, ModelSpec, MoESpec, RunSpec, YarnSpec, load, load_as, parse
from cofire.spec.spec_type import nearest_divisor
from cofire.testing.strategies import model_specs, run_specs


def message(spec_type: type, table: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse(spec_type, table, "x.toml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("x.toml: ")
    return text.removeprefix("x.toml: ")


def changed(name: str, *items: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(name, items)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{name}: ")


def test_a_spec_cannot_be_changed_after_it_was_made() -> None:
    spec = load_as(ModelSpec, "tiny")
    with pytest.raises(pydantic.ValidationError):
        spec.num_layers = 4  # type: ignore[misc]


def test_specs_are_equal_by_value_and_can_be_keys() -> None:
    assert load("tiny") == load("tiny")
    assert len({load("tiny"), load("tiny"), load("small")}) == 2


@settings(max_examples=50, deadline=None)
@given(model_specs())
def test_layers_are_dense_first_and_mixture_after(spec: ModelSpec) -> None:
    assert spec.num_dense_layers + spec.num_moe_layers == spec.num_layers
    assert spec.num_moe_layers == 0 or spec.moe is not None


@settings(max_examples=50, deadline=None)
@given(run_specs())
def test_tokens_of_a_run_are_steps_times_batch_times_length(run: RunSpec) -> None:
    assert run.training_tokens == run.steps * run.batch_size * run.data.sequence_length


@given(st.integers(1, 300), st.integers(1, 400))
def test_nearest_divisor_is_the_closest_of_all_divisors(number: int, wish: int) -> None:
    best = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wish), d))
    assert nearest_divisor(number, wish) == best


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("num_layers=0", "num_layers = 0 must be greater than or equal to 1"),
        ("num_layers=true", "num_layers = True must be a number, not true or false"),
        ("num_layers=x", "num_layers = 'x' must be a valid integer"),
        ("num_layers=1.5", "num_layers = 1.5 must be a valid integer, got a number with a fractional part"),
        ("norm_epsilon=inf", "norm_epsilon = inf must be a finite number"),
        ("attention.qk_rope_head_dim=7", "attention.qk_rope_head_dim = 7 must be even (RoPE rotates pairs)"),
        ("moe.num_expert_groups=5", "moe.num_expert_groups = 5 must divide num_routed_experts = 8; nearest: 4"),
        ("moe.num_limited_groups=5", "moe.num_limited_groups = 5 must be at most num_expert_groups = 4"),
        (
            "moe.num_experts_per_token=5",
            "moe.num_experts_per_token = 5 must be at most the 4 experts in 2 of 4 groups",
        ),
        (
            "moe.num_expert_groups=8",
            "moe.group_score = top2_sum needs at least 2 experts in each of 8 groups; use max",
        ),
        ("moe.num_first_dense_layers=4", "moe.num_first_dense_layers = 4 must be at most num_layers = 3"),
        ("moe.selection_bias=false", "moe.balance.bias_rule = sign needs selection_bias = true"),
        ("moe.balance.bias_rule=sgn", "moe.balance.bias_rule = 'sgn' is not one of none, sign, proportional, "),
        ("attention.kind=mqa", "attention.kind = 'mqa' is not one of mla, gqa; nearest: mla"),
        ("attention={num_heads=4}", "missing key 'attention.kind'; known kinds: mla, gqa"),
        ("attention=mla", "attention = 'mla' must be a"),
        ("rope.yarn.factor=0.5", "rope.yarn.factor = 0.5 must be greater than 1"),
        ("vocab_size=none", "vocab_size = 'none' must be a valid integer"),
    ],
)
def test_a_broken_rule_names_the_value_and_the_rule(item: str, text: str) -> None:
    assert changed("tiny", item).startswith(text)


@pytest.mark.parametrize(
    ("item", "near"),
    [
        ("hidden_sise=8", "hidden_size"),
        ("num_heads=4", "attention.num_heads"),
        ("attention.num_head=4", "attention.num_heads"),
        ("attention.kv_rank=4", "attention.kv_lora_rank"),
        ("moe.num_routed=4", "moe.num_routed_experts"),
        ("experts_per_token=4", "moe.num_experts_per_token"),
        ("bias_rule=sign", "moe.balance.bias_rule"),
        ("moe.balance.bias_rul=sign", "moe.balance.bias_rule"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(item: str, near: str) -> None:
    assert changed("tiny", item) == f"unknown key {item.split('=')[0]!r}; nearest: {near}"


def test_an_unknown_key_near_no_other_names_all_known_ones() -> None:
    assert changed("tiny", "moe.balance.zzz=1").startswith("unknown key 'moe.balance.zzz'; known: bias_rule, bias_up")


def test_a_misspelt_key_is_reported_before_the_key_it_leaves_missing() -> None:
    table = load("tiny").model_dump(mode="json")
    table["vocab_sise"] = table.pop("vocab_size")
    assert message(ModelSpec, table) == "unknown key 'vocab_sise'; nearest: vocab_size (and 1 more)"
    del table["vocab_sise"]
    assert message(ModelSpec, table) == "missing key 'vocab_size'"


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("batch_size=12", "micro_batch_size = 8 must divide batch_size = 12; nearest: 6"),
        ("data.sequence_length=4096", "data.sequence_length = 4096 must be at most model.max_sequence_length = 2048"),
        ("device=gpu", "device = 'gpu' must be auto, cpu, cuda or cuda:N"),
        ("data.paths=[]", "data.paths = [] must name at least one file"),
        ("model=smal", "'smal' is neither a preset nor a .toml or .json file; nearest: small"),
        ("model.kind=cluster", "model.kind = 'cluster' is not one of model"),
    ],
)
def test_a_broken_rule_of_a_run_names_the_value_and_the_rule(item: str, text: str) -> None:
    assert changed("demo", item).startswith(text)


def test_a_sequence_must_be_longer_than_the_prediction_depth() -> None:
    assert "must exceed mtp.depth = 1" in changed("demo", "data.sequence_length=1")


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(changed("tiny", f"num_layers={'x' * 5000}")) < 200


def test_yarn_needs_its_two_bounds_in_order() -> None:
    with pytest.raises(pydantic.ValidationError, match="beta_slow"):
        YarnSpec(factor=4, beta_fast=1, beta_slow=32)


def test_a_single_path_may_be_given_as_text() -> None:
    assert load_as(RunSpec, "demo", ["data.paths=a/*.txt"]).data.paths == ("a/*.txt",)
    assert load_as(RunSpec, "demo", ['data.paths=["a.txt", "b.txt"]']).data.paths == ("a.txt", "b.txt")


def test_none_empties_only_fields_that_may_be_empty() -> None:
    assert load_as(ModelSpec, "small", ["mtp=none"]).mtp is None
    assert load_as(ModelSpec, "small", ["attention.q_lora_rank=none"]).attention.q_lora_rank is None  # type: ignore[union-attr]
    moe = load_as(ModelSpec, "small", ["moe.balance.bias_rule=none"]).moe
    assert moe is not None
    assert moe.balance.bias_rule == "none"
    assert load_as(RunSpec, "demo", ["recompute=none"]).recompute == "none"


def test_device_groups_must_divide_the_experts() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"num_device_groups = 3 must divide.*nearest: 2"):
        MoESpec(
            num_routed_experts=8,
            num_experts_per_token=2,
            expert_intermediate_size=4,
            balance=BalanceSpec(num_device_groups=3),
        )
