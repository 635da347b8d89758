"""The router against a loop over tokens and experts, and each bug once seen in routers downstream."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model.router import Router, select
from cofire.spec import BalanceSpec, MoESpec


def moe_spec(**changes: Any) -> MoESpec:
    fields: dict[str, Any] = {
        "num_routed_experts": 8, "num_experts_per_token": 2, "expert_intermediate_size": 4,
        "num_expert_groups": 4, "num_limited_groups": 2,
    }  # fmt: skip
    return MoESpec(**(fields | changes))


def make_router(moe: MoESpec, hidden: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Router:
    router = Router(hidden, moe)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return router.to(dtype)


def slow_route(router: Router, token: list[float]) -> dict[int, float]:
    """One token with Python floats: {expert: gate}. Technical report, eq. 12-16."""
    moe, weight = router.moe, router.weight.double().tolist()
    affinity = [math.fsum(a * b for a, b in zip(token, row, strict=True)) for row in weight]
    if moe.score_function == "sigmoid":
        scores = [1 / (1 + math.exp(-a)) for a in affinity]
    else:
        total = math.fsum(math.exp(a - max(affinity)) for a in affinity)
        scores = [math.exp(a - max(affinity)) / total for a in affinity]
    bias = [0.0] * len(scores) if router.bias is None else router.bias.tolist()
    if moe.balance.bias_rule == "multiplicative":
        biased = [s * b for s, b in zip(scores, bias, strict=True)]
    else:
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // moe.num_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(moe.num_expert_groups)]

    def group_score(group: range) -> float:
        best = sorted((biased[e] for e in group), reverse=True)
        return best[0] if moe.group_score == "max" else sum(best[:2])

    kept = groups
    if moe.num_expert_groups > 1:
        kept = sorted(groups, key=group_score, reverse=True)[: moe.num_limited_groups]
    allowed = sorted(itertools.chain.from_iterable(kept), key=lambda e: biased[e], reverse=True)
    chosen = allowed[: moe.num_experts_per_token]
    total = math.fsum(scores[e] for e in chosen) if moe.normalize_gates else 1.0
    return {e: scores[e] / total * moe.routed_scaling_factor for e in chosen}


def as_dicts(routing: Any) -> list[dict[int, float]]:
    pairs = zip(routing.expert_index.tolist(), routing.gates.tolist(), strict=True)
    return [dict(zip(index, gates, strict=True)) for index, gates in pairs]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(2, 5),
    score=st.sampled_from(["sigmoid", "softmax"]),
    group_score=st.sampled_from(["top2_sum", "max"]), normalize=st.booleans(),
    rule=st.sampled_from(["none", "sign", "multiplicative"]),
    biased=st.sampled_from(["absent", "small", "very negative"]), data=st.data(),
)  # fmt: skip
def test_it_equals_a_loop_over_tokens_and_experts(
    seed: int, groups: int, size: int, score: Any, group_score: Any, normalize: bool, rule: Any, biased: str, data: Any
) -> None:
    limited = data.draw(st.integers(1, groups))
    moe = moe_spec(
        num_routed_experts=groups * size, num_expert_groups=groups, num_limited_groups=limited,
        num_experts_per_token=data.draw(st.integers(1, limited * size)), score_function=score, group_score=group_score,
        normalize_gates=normalize, routed_scaling_factor=2.5, selection_bias=biased != "absent" or rule != "none",
        balance=BalanceSpec(bias_rule=rule),
    )  # fmt: skip
    router = make_router(moe, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if router.bias is not None and biased != "absent":
        router.bias += torch.randn(router.bias.shape, generator=generator) * 0.3
        if biased == "very negative" and rule != "multiplicative":
            router.bias -= 50.0
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    for found, token in zip(as_dicts(router(x)), x.tolist(), strict=True):
        expected = slow_route(router, token)
        assert found.keys() == expected.keys()
        assert all(found[e] == pytest.approx(expected[e], rel=1e-12) for e in expected)


def test_gates_come_from_the_scores_without_the_bias() -> None:
    """Trap 14 and D (vLLM PR 12002, transformers PR 41647): the bias selects, it never weighs."""
    router = make_router(moe_spec(num_expert_groups=1, num_limited_groups=1))
    x = torch.randn(1, 6, dtype=torch.float64)
    scores = (x @ router.weight.t()).sigmoid()[0]
    worst = scores.argsort()[:2]
    assert router.bias is not None
    router.bias[worst] += 10.0
    routing = router(x)
    assert set(routing.expert_index[0].tolist()) == set(worst.tolist())
    picked = scores[routing.expert_index[0]]
    torch.testing.assert_close(routing.gates[0], picked / picked.sum(), rtol=1e-13, atol=0)


def test_a_masked_group_never_wins_when_all_live_scores_are_negative() -> None:
    """Trap 14 and D (DeepSeek-V3 issue 741, vLLM PR 13474, transformers PR 45441): mask with -inf, not with 0."""
    moe = moe_spec(num_routed_experts=16, num_experts_per_token=4, num_expert_groups=4, num_limited_groups=2)
    scores = torch.rand(64, 16)
    bias = torch.full((16,), -5.0)
    index = select(scores, bias, moe)
    group = scores.add(bias).unflatten(1, (4, 4)).topk(2, -1).values.sum(-1)
    kept = group.topk(2, -1).indices
    assert all(set((i // 4).tolist()) <= set(k.tolist()) for i, k in zip(index, kept, strict=True))


def test_a_token_never_reaches_more_groups_than_the_limit() -> None:
    """Trap of A.9: with 8 groups of 32, top-8 and the limit of 4, at most 4 nodes, on average 3.954."""
    torch.manual_seed(0)
    moe = moe_spec(num_routed_experts=256, num_experts_per_token=8, num_expert_groups=8, num_limited_groups=4)
    scores = torch.rand(20_000, 256)
    zero = torch.zeros(256)
    nodes = torch.tensor([len(set(row)) for row in (select(scores, zero, moe) // 32).tolist()], dtype=torch.float64)
    assert nodes.max() == 4
    assert nodes.mean().item() == pytest.approx(3.954, abs=0.01)


def test_without_the_limit_the_expected_number_of_nodes_is_the_closed_form() -> None:
    """A.9: G (1 - C(E - E/G, k) / C(E, k)) = 5.2947 for top-8 of 256 over 8 nodes, not 8 and not 4."""
    torch.manual_seed(0)
    moe = moe_spec(num_routed_experts=256, num_experts_per_token=8, num_expert_groups=1, num_limited_groups=1)
    index = select(torch.rand(20_000, 256), None, moe)
    nodes = torch.tensor([len(set(row)) for row in (index // 32).tolist()], dtype=torch.float64)
    closed_form = 8 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert closed_form == pytest.approx(5.2947, abs=5e-5)
    assert nodes.mean().item() == pytest.approx(closed_form, abs=0.03)


def test_the_group_score_is_the_sum_of_the_two_best_biased_scores() -> None:
    """D (vLLM PR 13474): with a bias the group score is the top-2 sum, and of biased scores (A.9)."""
    moe = moe_spec(num_routed_experts=6, num_experts_per_token=2, num_expert_groups=3, num_limited_groups=1)
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.4, 0.4]])  # by maximum: group 0; by top-2 sum: group 1
    assert set(select(scores, torch.zeros(6), moe)[0].tolist()) == {2, 3}
    raised = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2, 0.2])  # biased top-2 sums: 0.9, 1.1, 1.2
    assert set(select(scores, raised, moe)[0].tolist()) == {4, 5}
    by_maximum = moe.model_copy(update={"group_score": "max"})
    assert set(select(scores, torch.zeros(6), by_maximum)[0].tolist()) == {0, 1}


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "to keyword"])
def test_the_bias_stays_fp32_whatever_the_model_is_cast_to(cast: str) -> None:
    """D (vLLM PR 23640): 2.02 + 1e-3 is lost in BF16."""
    router = make_router(moe_spec(), dtype=torch.float32)
    exact = torch.full((8,), 2.02) + torch.arange(8) * 1e-3
    assert router.bias is not None
    router.bias.copy_(exact)
    model = torch.nn.Sequential(router)
    if cast == "to":
        model.to(torch.bfloat16)
    elif cast == "to keyword":
        model.to(device="cpu", dtype=torch.float16)
    else:
        getattr(model, cast)()
    assert router.weight.dtype != torch.float32
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, exact)
    assert torch.equal(copy.deepcopy(model).state_dict()["0.bias"], exact)


def test_the_bias_is_a_buffer_that_is_saved_and_gets_no_gradient() -> None:
    router = make_router(moe_spec())
    assert "bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    routing = router(torch.randn(3, 6, dtype=torch.float64))
    routing.gates.sum().backward()
    assert router.bias is not None
    assert router.bias.grad is None
    assert not router.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_a_narrow_model_are_computed_in_fp32(dtype: torch.dtype) -> None:
    router = make_router(moe_spec(), dtype=dtype)
    x = torch.randn(5, 6).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            routing = router(x)
        assert routing.scores.dtype == routing.gates.dtype == torch.float32
        torch.testing.assert_close(routing.scores, (x.float() @ router.weight.float().t()).sigmoid(), rtol=1e-6, atol=0)


def test_all_zero_sigmoid_scores_give_finite_gates() -> None:
    """D (flashinfer PR 3946): 0/0 where every chosen score underflows; an epsilon keeps it finite."""
    router = make_router(moe_spec(num_expert_groups=1, num_limited_groups=1), dtype=torch.float32)
    with torch.no_grad():
        router.weight.fill_(-200.0)
    x = torch.ones(2, 6, requires_grad=True)
    routing = router(x)
    assert torch.equal(routing.scores, torch.zeros(2, 8))
    assert torch.equal(routing.gates, torch.zeros(2, 2))
    routing.gates.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-3, 3), groups=st.sampled_from([1, 2, 4]))
def test_recentring_the_bias_changes_no_selection_without_groups_or_with(seed: int, shift: float, groups: int) -> None:
    """D (torchtitan issue 1506): the same constant on every expert's bias moves nothing."""
    moe = moe_spec(
        num_routed_experts=16, num_experts_per_token=4, num_expert_groups=groups, num_limited_groups=max(1, groups // 2)
    )
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(9, 16, dtype=torch.float64, generator=generator)
    bias = torch.randn(16, dtype=torch.float64, generator=generator)
    before, after = select(scores, bias, moe), select(scores, bias + shift, moe)
    assert torch.equal(before.sort(-1).values, after.sort(-1).values)


def test_a_multiplicative_bias_starts_at_one_and_scales_the_score() -> None:
    """B: the variant selects on s * b with b = 1, which selects as no bias does."""
    moe = moe_spec(num_expert_groups=1, num_limited_groups=1, balance=BalanceSpec(bias_rule="multiplicative"))
    router = make_router(moe)
    assert router.bias is not None
    assert torch.equal(router.bias, torch.ones(8))
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    assert set(select(scores, router.bias, moe)[0].tolist()) == {6, 7}
    router.bias[0] = 9.0  # 0.9 by product; a sum would have put it first just as well,
    router.bias[1] = 3.0  # but 0.2 * 3 = 0.6 loses to 0.7 and 0.8 where 0.2 + 3 would win
    assert set(select(scores, router.bias, moe)[0].tolist()) == {0, 7}


def test_v2_gates_are_softmax_scores_times_the_factor_without_renormalising() -> None:
    """A.9: V2 has softmax, no renormalisation, factor 16, group score = max, no bias."""
    moe = moe_spec(
        score_function="softmax",
        normalize_gates=False,
        routed_scaling_factor=16.0,
        group_score="max",
        selection_bias=False,
    )
    router = make_router(moe)
    assert router.bias is None
    x = torch.randn(4, 6, dtype=torch.float64)
    routing = router(x)
    expected = (x @ router.weight.t()).softmax(-1).gather(1, routing.expert_index) * 16
    torch.testing.assert_close(routing.gates, expected, rtol=1e-13, atol=0)
    assert (routing.gates.sum(-1) < 16).all()


def test_gradients_reach_the_scores_of_chosen_experts_only_through_the_gates() -> None:
    router = make_router(moe_spec(normalize_gates=False))
    x = torch.randn(1, 6, dtype=torch.float64)
    routing = router(x)
    routing.gates.sum().backward()
    assert router.weight.grad is not None
    touched = set(router.weight.grad.abs().sum(-1).nonzero().flatten().tolist())
    assert touched == set(routing.expert_index[0].tolist())
