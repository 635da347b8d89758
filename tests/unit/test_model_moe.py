"""The mixture-of-experts layer against a loop over tokens and their experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model.moe import LocalDispatcher, MoELayer, SwiGLU, silu_product
from cofire.model.router import Routing
from cofire.spec import BalanceSpec, MoESpec


def moe_spec(**changes: Any) -> MoESpec:
    fields: dict[str, Any] = {
        "num_routed_experts": 8, "num_shared_experts": 1, "num_experts_per_token": 3, "expert_intermediate_size": 8,
        "num_expert_groups": 4, "num_limited_groups": 2, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    return MoESpec(**(fields | changes))


def make_layer(moe: MoESpec, dtype: torch.dtype = torch.float64, seed: int = 0, hidden: int = 16) -> MoELayer:
    layer = MoELayer(hidden, moe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer.to(dtype)


def slow_swiglu(gate_up: torch.Tensor, down: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[0] // 2
    gate, up = gate_up[:width] @ token, gate_up[width:] @ token
    return down @ (gate / (1 + (-gate).exp()) * up)


def slow_layer(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """y = shared(x) + sum over the chosen experts of gate * expert(x), one token at a time."""
    routing, out = layer.router(x), []
    for token, chosen, gates in zip(x, routing.expert_index.tolist(), routing.gates, strict=True):
        y = torch.zeros_like(token)
        for e, gate in zip(chosen, gates, strict=True):
            y = y + gate * slow_swiglu(layer.gate_up[e], layer.down[e], token)
        if layer.shared is not None:
            y = y + slow_swiglu(layer.shared.gate_up.weight, layer.shared.down.weight, token)
        out.append(y)
    return torch.stack(out)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), batch=st.integers(1, 3), length=st.integers(1, 9), shared=st.integers(0, 2),
    k=st.integers(1, 4), score=st.sampled_from(["sigmoid", "softmax"]), skew=st.booleans(),
)  # fmt: skip
def test_the_layer_and_its_gradients_equal_a_loop_over_tokens(
    seed: int, batch: int, length: int, shared: int, k: int, score: Any, skew: bool
) -> None:
    layer = make_layer(moe_spec(num_shared_experts=shared, num_experts_per_token=k, score_function=score), seed=seed)
    assert layer.router.bias is not None
    if skew:  # all tokens to the same few experts, the others get none
        layer.router.bias[:k] += 100.0
    x = torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grads = []
    for slow in (False, True):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = slow_layer(layer, own.flatten(0, 1)).view(x.shape) if slow else layer(own)[0]
        y.sin().sum().backward()
        found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in layer.named_parameters()}
        grads.append({"y": y.detach(), "x": own.grad, **{n: g.clone() for n, g in found.items()}})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 50])
def test_inference_equals_a_loop_for_few_tokens_and_for_many(tokens: int, dtype: torch.dtype) -> None:
    """A handful of tokens takes another path than a batch; both are the same layer."""
    layer = make_layer(moe_spec(), dtype=dtype, seed=tokens)
    x = torch.randn(1, tokens, 16).to(dtype)
    with torch.no_grad():
        y, stats = layer(x)
        expected = slow_layer(layer, x[0])[None]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert ((y - expected).abs().max() / expected.abs().max()).item() < limit
    assert y.dtype == dtype
    assert stats.expert_counts.sum() == tokens * 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(0, 40), favourite=st.integers(0, 7))
def test_no_token_is_ever_dropped(seed: int, length: int, favourite: int) -> None:
    """A.9: no token dropping, however unequal the load; every token reaches K experts, each once."""
    layer = make_layer(moe_spec(num_expert_groups=1, num_limited_groups=1), seed=seed)
    assert layer.router.bias is not None
    layer.router.bias[favourite] += 100.0
    x = torch.randn(1, length, 16, dtype=torch.float64)
    y, stats = layer(x)
    assert y.shape == x.shape
    assert stats.expert_counts[favourite] == length
    assert stats.expert_counts.sum() == 3 * length
    assert all(len(set(row)) == 3 for row in layer.router(x[0]).expert_index.tolist())


def test_tokens_do_not_influence_each_other() -> None:
    layer = make_layer(moe_spec())
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    changed = x.clone()
    changed[0, 5] += 1.0
    y, z = layer(x)[0], layer(changed)[0]
    same = torch.ones(12, dtype=torch.bool)
    same[5] = False
    torch.testing.assert_close(y[:, same], z[:, same], rtol=1e-12, atol=1e-13)
    assert (y[0, 5] - z[0, 5]).abs().max() > 1e-3


def test_load_counts_are_the_router_choices_and_leave_no_trace_in_the_module() -> None:
    """D (torchtitan PR 1593): a module that accumulates counts doubles them under recomputation."""
    layer = make_layer(moe_spec())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    first, second = layer(x)[1].expert_counts, layer(x)[1].expert_counts
    expected = torch.bincount(layer.router(x.flatten(0, 1)).expert_index.flatten(), minlength=8)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert first.dtype == torch.int64
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_dispatch_sorts_by_expert_and_combine_undoes_it() -> None:
    torch.manual_seed(0)
    index = torch.rand(11, 5).topk(2, -1).indices
    x = torch.randn(11, 4, dtype=torch.float64)
    gates = torch.rand(11, 2, dtype=torch.float64)
    routing, dispatcher = Routing(index, gates, gates), LocalDispatcher(5)
    sent = dispatcher.dispatch(x, routing)
    order = [(e, t) for e in range(5) for t in range(11) if e in index[t].tolist()]
    assert torch.equal(sent.rows, x[[t for _, t in order]])
    assert sent.counts.tolist() == [sum(e == f for f, _ in order) for e in range(5)]
    scale = torch.tensor([float(e + 1) for e, _ in order], dtype=torch.float64)[:, None]
    y = dispatcher.combine(sent.rows * scale, sent, routing)
    torch.testing.assert_close(y, x * (gates * (index + 1)).sum(-1, keepdim=True), rtol=1e-13, atol=0)


def test_another_dispatcher_can_take_the_place_of_the_local_one() -> None:
    layer = make_layer(moe_spec())
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    expected = layer(x)[0]
    seen: list[int] = []

    class Recording(LocalDispatcher):
        def dispatch(self, x: torch.Tensor, routing: Routing) -> Any:
            seen.append(len(x))
            return super().dispatch(x, routing)

    layer.dispatcher = Recording(8)
    assert torch.equal(layer(x)[0], expected)
    with torch.no_grad():  # also where few tokens would take the short way: it may not go past the dispatcher
        torch.testing.assert_close(layer(x[:, :1])[0], expected[:, :1], rtol=1e-12, atol=1e-13)
    assert seen == [20, 1]


def test_the_layer_reports_its_balance_loss() -> None:
    plain, weighted = (moe_spec(balance=BalanceSpec(expert_loss_weight=w)) for w in (0.0, 0.5))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    assert make_layer(plain)(x)[1].balance_loss.item() == 0
    loss = make_layer(weighted)(x)[1].balance_loss
    assert loss.item() > 0
    assert loss.requires_grad


@pytest.mark.parametrize("shape", [(3, 10), (2, 4, 6), (0, 8)])
def test_the_fused_activation_equals_silu_times_up_with_its_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate, up = x.detach().chunk(2, -1)
    torch.testing.assert_close(silu_product(x), gate * gate.sigmoid() * up, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(silu_product(x.detach()), gate * gate.sigmoid() * up, rtol=1e-12, atol=1e-14)
    if x.numel():
        assert torch.autograd.gradcheck(silu_product, (x,))


def test_swiglu_is_its_definition() -> None:
    module = SwiGLU(6, 5).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.stack([slow_swiglu(module.gate_up.weight, module.down.weight, row) for row in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-13)


def test_copying_the_chosen_matrices_gives_the_same_output() -> None:
    """The way that accelerators take for a handful of tokens."""
    layer = make_layer(moe_spec())
    x = torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad():
        routing = layer.router(x)
        torch.testing.assert_close(
            layer._run_batched(x, routing), layer._run_gathered(x, routing), rtol=1e-12, atol=1e-13
        )
