"""Matrix products by whichever kernel is fastest, and the chunked cross entropy, against plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model import cross_entropy
from cofire.model.cross_entropy import linear_cross_entropy
from cofire.model.linear import Linear, grouped_linear, linear
from cofire.precision.product import padded_rows


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]


def assert_near(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    assert a.shape == b.shape
    if b.numel():
        assert ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item() < tolerance(
            dtype
        )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9), inner=st.integers(1, 40), outer=st.integers(1, 40), bias=st.booleans(),
    layout=st.sampled_from(["plain", "3d", "transposed", "column slice", "expanded"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_linear_and_its_gradients_equal_torch_for_any_layout(
    rows: int, inner: int, outer: int, bias: bool, layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows * 1000 + inner)
    x = torch.randn(rows, inner, dtype=dtype)
    if layout == "3d":
        x = torch.randn(2, rows, inner, dtype=dtype)
    elif layout == "transposed":
        x = torch.randn(inner, rows, dtype=dtype).t()
    elif layout == "column slice":
        x = torch.randn(rows, inner + 3, dtype=dtype)[:, 1 : inner + 1]
    elif layout == "expanded":
        x = torch.randn(1, inner, dtype=dtype).expand(rows, -1)
    weight, shift = torch.randn(outer, inner, dtype=dtype), torch.randn(outer, dtype=dtype) if bias else None
    results = []
    for function in (linear, F.linear):
        w = weight.clone().requires_grad_()
        s = None if shift is None else shift.clone().requires_grad_()
        own_x = x.detach().requires_grad_()  # keeps the layout
        y = function(own_x, w, s)
        (y * torch.arange(outer, dtype=dtype)).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(function(x, w, s), y)
        results.append([y.detach(), own_x.grad, w.grad, *([] if s is None else [s.grad])])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, dtype)


def test_linear_passes_gradcheck_in_float64() -> None:
    x, w = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 4, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(linear, (x, w))


def test_a_frozen_weight_or_input_gets_no_gradient() -> None:
    for x_grad, w_grad in ((True, False), (False, True)):
        x, w = torch.randn(3, 4, requires_grad=x_grad), torch.randn(2, 4, requires_grad=w_grad)
        linear(x, w).sum().backward()
        assert (x.grad is not None) == x_grad
        assert (w.grad is not None) == w_grad


def test_linear_under_autocast_is_torchs() -> None:
    module, x = Linear(8, 4), torch.randn(3, 8)
    torch.nn.init.normal_(module.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, module.weight))


def slow_grouped(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    expert = [e for e, c in enumerate(counts) for _ in range(c)]
    rows = [weight[e] @ row for e, row in zip(expert, x, strict=True)]
    return torch.stack(rows) if rows else x @ weight[0].t()


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    autocast=st.booleans(),
)  # fmt: skip
def test_grouped_products_equal_one_product_per_row(counts: list[int], dtype: torch.dtype, autocast: bool) -> None:
    """Experts without a single token included, and no token at all."""
    autocast = autocast and dtype == torch.float32
    torch.manual_seed(sum(counts))
    x, weight = torch.randn(sum(counts), 16).to(dtype), torch.randn(len(counts), 8, 16).to(dtype)
    # a linear loss: a curved one would turn the rounding of y into another gradient
    coefficients = torch.randint(-4, 5, (sum(counts), 8)).double()
    results = []
    for slow in (False, True):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if slow:
            y = slow_grouped(a.double(), w.double(), counts)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = grouped_linear(a, w, torch.tensor(counts))
            assert y.dtype == (torch.bfloat16 if autocast else dtype)
        (y.double() * coefficients).sum().backward()
        zeros = torch.zeros
        results.append((y.detach(), *(t.grad if t.grad is not None else zeros(t.shape) for t in (a, w))))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, torch.bfloat16 if autocast else dtype)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 15, 17, 31, 33, 65, 129]), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_products_over_wider_windows_neither_leak_nor_lose_rows(counts: list[int], dtype: torch.dtype) -> None:
    """Counts between two sizes make windows that reach into the next expert's rows, or back at the end."""
    torch.manual_seed(len(counts))
    x, weight = torch.randn(sum(counts), 16).to(dtype), torch.randn(len(counts), 8, 16).to(dtype)
    coefficients = torch.randint(-4, 5, (sum(counts), 8)).double()
    results = []
    for function, kind in ((grouped_linear, dtype), (slow_grouped, torch.float64)):
        a, w = (t.to(kind, copy=True).requires_grad_() for t in (x, weight))
        y = function(a, w, torch.tensor(counts) if function is grouped_linear else counts)
        (y.double() * coefficients).sum().backward()
        results.append([y.detach(), *(torch.zeros(t.shape) if t.grad is None else t.grad for t in (a, w))])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, dtype)


@given(rows=st.integers(0, 10**6))
def test_padded_rows_are_few_sizes_at_most_an_eighth_above(rows: int) -> None:
    width = padded_rows(rows)
    assert rows <= width <= rows * 9 / 8
    assert padded_rows(width) == width
    assert len({padded_rows(n) for n in range(1024, 2048)}) == 9  # eight per octave, and its upper end


def test_an_expert_without_tokens_gets_a_zero_gradient_not_a_stale_one() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = torch.randn(3, 8, 16).to(dtype).requires_grad_()
        grouped_linear(torch.randn(4, 16).to(dtype), weight, torch.tensor([4, 0, 0])).sum().backward()
        assert weight.grad is not None
        assert weight.grad[0].abs().sum() > 0
        assert torch.equal(weight.grad[1:], torch.zeros(2, 8, 16, dtype=dtype))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_cross_entropy_equals_torch_with_its_gradients(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", 8)
    torch.manual_seed(rows)
    targets = torch.randint(0, 13, (rows,))
    hidden, weight = torch.randn(rows, 6, dtype=dtype), torch.randn(13, 6, dtype=dtype)
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets) if chunked else F.cross_entropy(h @ w.t(), targets, reduction="sum")
        (loss * 3).backward()
        results.append((loss.detach(), h.grad, w.grad))
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(h, w, targets), loss.detach())
    for a, b in zip(*results, strict=True):
        assert_near(a, b, dtype)


def test_cross_entropy_keeps_no_logits_for_the_backward_pass() -> None:
    hidden, weight = torch.randn(600, 16, requires_grad=True), torch.randn(3000, 16, requires_grad=True)
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.int64))
    assert sum(sizes) <= hidden.numel() + weight.numel()  # 57,600 numbers; the logits would be 1,800,000


def test_cross_entropy_under_autocast_accumulates_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden.detach() @ weight.detach().t(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.stack([torch.full((4,), s) for s in (1.0, -1.0)]).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(8e4)
    loss.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (hidden, weight))


def test_pairs_of_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 6, dtype=torch.float64), torch.randn(13, 6, dtype=torch.float64)
    targets, totals = torch.randint(0, 13, (40,)), []
    for chunk in (1, 7, 40, 1000):
        monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", chunk)
        totals.append(linear_cross_entropy(hidden.clone().requires_grad_(), weight, targets).item())
    assert all(a == pytest.approx(b, rel=1e-13) for a, b in pairwise(totals))
