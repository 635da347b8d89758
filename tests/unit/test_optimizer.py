"""AdamW against torch.optim.AdamW, the schedules against their closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn

from cofire.spec import OptimizerSpec, ScheduleSpec
from cofire.train.optimizer import AdamW
from cofire.train.schedule import learning_rate


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def _train(module: nn.Module, optimizer, steps: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 7, generator=generator)
        module(x).square().mean().backward()
        optimizer(module)
        module.zero_grad()
    return [p.detach().clone() for p in module.parameters()]


def test_adamw_equals_torchs_with_decay_on_matrices_only():
    spec = OptimizerSpec(learning_rate=1e-2, weight_decay=0.1)
    ours_module, peer_module = _module(), _module()
    ours = AdamW(ours_module.named_parameters(), spec)
    matrices = [p for p in peer_module.parameters() if p.dim() >= 2]
    others = [p for p in peer_module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    got = _train(ours_module, lambda _: ours.step(1e-2))
    wanted = _train(peer_module, lambda _: peer.step())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_moments_are_stored_in_bf16_and_stay_near_the_fp32_ones():
    spec = OptimizerSpec(learning_rate=1e-2)
    exact_module, rounded_module = _module(), _module()
    exact = AdamW(exact_module.named_parameters(), spec)
    rounded = AdamW(rounded_module.named_parameters(), spec, torch.bfloat16)
    a = _train(exact_module, lambda _: exact.step(1e-2))
    b = _train(rounded_module, lambda _: rounded.step(1e-2))
    assert all(m.dtype == torch.bfloat16 for m in rounded.exp_avg.values())
    assert any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-2)


def test_bf16_parameters_have_fp32_masters_that_small_steps_reach():
    parameter = nn.Parameter(torch.full((2, 2), 256.0, dtype=torch.bfloat16))
    spec = OptimizerSpec(weight_decay=0.0)
    optimizer = AdamW([("p", parameter)], spec)
    for _ in range(10):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.1)  # far below bfloat16's spacing of 2 at 256
    assert optimizer.masters["p"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters["p"], torch.full((2, 2), 255.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bound", [0.01, 1e6])
def test_clip_bounds_the_global_norm_and_leaves_small_gradients_alone(bound):
    module = _module()
    module(torch.randn(4, 7)).square().mean().backward()
    before = [p.grad.clone() for p in module.parameters()]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    norm = AdamW(module.named_parameters(), OptimizerSpec(clip_norm=bound)).clip()
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, bound / expected)
    for p, g in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-3, atol=0)


def test_warm_up_is_linear_and_cosine_ends_on_its_floor():
    schedule = ScheduleSpec(kind="cosine", warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate(schedule, 2.0, step, 110) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[59] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_wsd_is_flat_and_then_linear():
    schedule = ScheduleSpec(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(1, 101)]
    assert rates[9:80] == [1.0] * 71
    assert rates[89] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.0)


def test_constant_stays_and_no_warm_up_starts_at_the_peak():
    schedule = ScheduleSpec(kind="constant", warmup_steps=0)
    assert {learning_rate(schedule, 3.0, step, 50) for step in range(1, 51)} == {3.0}
