"""Bias rules, balance losses and MaxVio, by hand-sized numbers and slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model import build
from cofire.model.balance import balance_loss, count_experts, max_violation, update_bias, update_biases
from cofire.model.router import Router, Routing
from cofire.spec import BalanceSpec, ModelSpec, MoESpec, load_as

SIGN = BalanceSpec(bias_rule="sign", bias_update_rate=1e-3)


def moe_with(experts: int, k: int, **balance: Any) -> MoESpec:
    return MoESpec(
        num_routed_experts=experts, num_experts_per_token=k, expert_intermediate_size=4, balance=BalanceSpec(**balance)
    )


def test_an_overloaded_expert_becomes_less_attractive() -> None:
    """Trap 11: several summaries print e = c - mean with b += u sign(e); the paper has e = mean - c."""
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10, 2, 4, 4]), BalanceSpec(bias_rule="sign", bias_update_rate=0.5))
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_an_expert_with_exactly_the_mean_load_keeps_its_bias() -> None:
    bias = torch.tensor([0.25, 0.25, 0.25])
    update_bias(bias, torch.tensor([6, 5, 4]), BalanceSpec(bias_rule="sign", bias_update_rate=0.5))
    assert bias.tolist() == [-0.25, 0.25, 0.75]


def test_the_proportional_rule_is_relative_to_the_mean_load() -> None:
    """B: raw counts cannot work with the paper's u = 1e-4; e is divided by the mean load."""
    rule = BalanceSpec(bias_rule="proportional", bias_update_rate=0.1)
    few, many = torch.zeros(2), torch.zeros(2)
    update_bias(few, torch.tensor([3, 1]), rule)
    update_bias(many, torch.tensor([3_000_000, 1_000_000]), rule)
    torch.testing.assert_close(few, torch.tensor([-0.05, 0.05]))
    assert torch.equal(few, many)


def test_the_multiplicative_rule_moves_a_bias_around_one() -> None:
    bias = torch.ones(3)
    update_bias(bias, torch.tensor([9, 0, 0]), BalanceSpec(bias_rule="multiplicative", bias_update_rate=0.25))
    assert bias.tolist() == [0.75, 1.25, 1.25]


@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 7, 7]])
@pytest.mark.parametrize("rule", ["none", "sign", "proportional", "multiplicative"])
def test_no_load_or_even_load_moves_nothing(rule: Any, counts: list[int]) -> None:
    bias = torch.tensor([0.5, 1.0, 1.5])
    update_bias(bias, torch.tensor(counts), BalanceSpec(bias_rule=rule, bias_update_rate=0.1))
    assert bias.tolist() == [0.5, 1.0, 1.5]


def test_small_steps_on_a_large_bias_are_not_lost() -> None:
    """D (vLLM PR 23640): in BF16, 2.02 + 1e-3 = 2.02; a thousand FP32 steps arrive."""
    bias = torch.full((2,), 2.02)
    for _ in range(1000):
        update_bias(bias, torch.tensor([0, 2]), SIGN)
    torch.testing.assert_close(bias, torch.tensor([3.02, 1.02]), rtol=1e-4, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=2, max_size=5))
def test_one_update_per_step_from_summed_counts_is_not_one_update_per_micro_batch(micro: list[list[int]]) -> None:
    """D (torchtitan PR 1304): the step's whole load decides, once; |change| <= u however many micro-batches."""
    counts = torch.tensor(micro)
    once = torch.zeros(6)
    update_bias(once, counts.sum(0), SIGN)
    assert once.abs().max() <= 1e-3 + 1e-9
    expected = (counts.sum().double() / 6 - counts.sum(0)).sign() * 1e-3
    torch.testing.assert_close(once.double(), expected, rtol=1e-6, atol=0)


def test_each_router_gets_its_own_row_and_routers_without_a_bias_are_passed_over() -> None:
    moe = moe_with(2, 1, bias_rule="sign", bias_update_rate=1.0)
    routers = [Router(3, moe), Router(3, moe_with(2, 1).model_copy(update={"selection_bias": False})), Router(3, moe)]
    update_biases(routers, torch.tensor([[4, 0], [4, 0], [1, 3]]), moe.balance)
    biases = [r.bias for r in routers]
    assert biases[1] is None
    assert biases[0] is not None
    assert biases[2] is not None
    assert biases[0].tolist() == [-1.0, 1.0]
    assert biases[2].tolist() == [1.0, -1.0]


def test_a_row_too_few_is_an_error() -> None:
    moe = moe_with(2, 1, bias_rule="sign")
    with pytest.raises(ValueError, match="shorter"):
        update_biases([Router(3, moe), Router(3, moe)], torch.tensor([[4, 0]]), moe.balance)


@pytest.mark.parametrize("rule", ["sign", "proportional", "multiplicative"])
def test_every_rule_evens_out_a_skewed_router(rule: Any) -> None:
    """The loop of algorithm 1 on scores that would send most tokens to two of eight experts."""
    torch.manual_seed(0)
    moe = moe_with(8, 2, bias_rule=rule, bias_update_rate=0.004)
    router = Router(4, moe)
    x = torch.randn(512, 4)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.4)
        x[:, 0] += 3.0  # a direction that all tokens share makes some experts everyone's choice
        first = max_violation(count_experts(router(x).expert_index, 8)).item()
        for _ in range(500):
            update_biases([router], count_experts(router(x).expert_index, 8)[None], moe.balance)
        last = max_violation(count_experts(router(x).expert_index, 8)).item()
    assert first > 1.0
    assert last < 0.15


def slow_losses(scores: torch.Tensor, index: torch.Tensor, moe: MoESpec) -> dict[str, float]:
    """scores [B, T, E], index [B, T, K]; Python loops after DeepSeek-V3 eq. 17-20 and DeepSeekMoE eq. 12-17."""
    batch, tokens, experts = scores.shape
    k, groups = moe.num_experts_per_token, moe.balance.num_device_groups
    size, out = experts // groups, {"sequence": 0.0, "expert": 0.0, "device": 0.0}
    for b in range(batch):
        table, chosen = scores[b].tolist(), index[b].tolist()
        own_top = [sorted(range(experts), key=lambda e, row=row: row[e], reverse=True)[:k] for row in table]
        factor = experts / (k * tokens)
        f_unbiased = [factor * sum(e in top for top in own_top) for e in range(experts)]
        f = [factor * sum(e in row for row in chosen) for e in range(experts)]
        p_normal = [sum(row[e] / sum(row) for row in table) / tokens for e in range(experts)]
        p = [sum(row[e] for row in table) / tokens for e in range(experts)]
        out["sequence"] += sum(a * c for a, c in zip(f_unbiased, p_normal, strict=True)) / batch
        out["expert"] += sum(a * c for a, c in zip(f, p, strict=True)) / batch
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            out["device"] += sum(f[part]) / size * sum(p[part]) / batch
    return out


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), batch=st.integers(1, 3), tokens=st.integers(1, 6), groups=st.sampled_from([1, 2, 4])
)
def test_the_three_losses_equal_their_loops(seed: int, batch: int, tokens: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, tokens, 8, dtype=torch.float64, generator=generator)
    index = torch.rand(batch, tokens, 8, generator=generator).topk(3).indices  # a selection that the bias has moved
    routing = Routing(index.flatten(0, 1), scores.new_ones(batch * tokens, 3), scores.flatten(0, 1))
    weights = {"sequence": 0.5, "expert": 0.25, "device": 2.0}
    fields = {f"{name}_loss_weight": weight for name, weight in weights.items()}
    expected = slow_losses(scores, index, moe_with(8, 3, num_device_groups=groups, **fields))
    for name, weight in weights.items():
        alone = moe_with(8, 3, num_device_groups=groups, **{f"{name}_loss_weight": weight})
        assert balance_loss(routing, batch, alone).item() == pytest.approx(weight * expected[name], rel=1e-12)
    everything = balance_loss(routing, batch, moe_with(8, 3, num_device_groups=groups, **fields)).item()
    assert everything == pytest.approx(sum(weights[n] * expected[n] for n in weights), rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["sequence", "expert", "device"])
def test_perfect_balance_costs_exactly_the_weight(name: str, groups: int) -> None:
    """C: perfect balance gives L = alpha exactly; scores that sum to one, every expert equally often."""
    index = torch.arange(8).view(4, 2).repeat(2, 1)
    scores = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    scores.scatter_(1, index, 0.2).scatter_(1, (index + 2) % 8, 0.05)  # each expert as often up as down
    routing = Routing(index, scores.new_ones(8, 2), scores)
    moe = moe_with(8, 2, num_device_groups=groups, **{f"{name}_loss_weight": 0.003})
    assert balance_loss(routing, 2, moe).item() == pytest.approx(0.003, rel=1e-12)


def test_the_sequence_loss_counts_the_choice_without_the_bias() -> None:
    """A.9: f_i is taken from the top-K of un-biased scores, so the bias cannot hide imbalance from it."""
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    moved = Routing(torch.tensor([[1], [1]]), scores.new_ones(2, 1), scores)
    kept = Routing(torch.tensor([[0], [0]]), scores.new_ones(2, 1), scores)
    moe = moe_with(2, 1, sequence_loss_weight=1.0)
    assert balance_loss(moved, 1, moe).item() == balance_loss(kept, 1, moe).item() == pytest.approx(2 * 0.85)


def test_losses_are_taken_per_sequence_and_then_averaged() -> None:
    """C: two sequences, each unbalanced in the other's favour, do not cancel out."""
    scores = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2, dtype=torch.float64)
    routing = Routing(torch.tensor([[0], [0], [1], [1]]), scores.new_ones(4, 1), scores)
    moe = moe_with(2, 1, expert_loss_weight=1.0)
    assert balance_loss(routing, 2, moe).item() == 2.0
    assert balance_loss(routing, 1, moe).item() == 1.0


def test_the_loss_pushes_the_popular_experts_scores_down() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64, requires_grad=True)
    routing = Routing(torch.tensor([[0], [0]]), torch.ones(2, 1), scores)
    balance_loss(routing, 1, moe_with(2, 1, expert_loss_weight=1.0)).backward()
    assert scores.grad is not None
    assert (scores.grad[:, 0] > scores.grad[:, 1]).all()


def test_max_violation_is_the_excess_of_the_fullest_expert_over_the_mean() -> None:
    assert max_violation(torch.tensor([4, 4, 4, 4])).item() == 0
    assert max_violation(torch.tensor([16, 0, 0, 0])).item() == 3
    both = max_violation(torch.tensor([[6, 2], [0, 0]]))
    assert both.tolist() == [0.5, 0.0]  # a layer without tokens violates nothing
    assert max_violation(torch.tensor([2**53 + 2, 0])).item() == 1.0


def test_uniform_routing_of_one_batch_still_shows_the_sampling_floor() -> None:
    """B: at 2,048 tokens, top-6 of 64, perfectly uniform routing shows a batch MaxVio of about 0.17, not 0."""
    torch.manual_seed(0)
    batches = [count_experts(torch.rand(2048, 64).topk(6, -1).indices, 64) for _ in range(40)]
    batch = torch.stack([max_violation(c) for c in batches]).mean().item()
    assert batch == pytest.approx(0.17, abs=0.02)
    together = max_violation(torch.stack(batches).sum(0)).item()
    assert together < batch / 4  # the global figure, over all batches, is another quantity


def test_counting_is_exact_for_any_shape() -> None:
    counts = count_experts(torch.tensor([[[0, 3], [3, 3]]]), 5)
    assert counts.tolist() == [1, 0, 0, 3, 0]
    assert counts.dtype == torch.int64
    assert count_experts(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_the_routers_of_prediction_modules_are_balanced_too() -> None:
    spec = load_as(ModelSpec, "tiny", ["mtp.depth=2"])
    decoder = build(spec, seed=0)
    out = decoder.loss(torch.randint(0, 512, (2, 17)))
    routers = decoder.moe_routers()
    assert spec.moe is not None
    assert len(routers) == len(out.expert_counts) == spec.num_moe_layers + 2
    update_biases(routers, out.expert_counts, spec.moe.balance)
    for router, counts in zip(routers, out.expert_counts, strict=True):
        assert router.bias is not None
        expected = (counts.double().mean() - counts).sign() * spec.moe.balance.bias_update_rate
        torch.testing.assert_close(router.bias.double(), expected, rtol=1e-6, atol=0)
