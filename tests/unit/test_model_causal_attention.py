"""Causal attention by blocks against plain softmax over a masked square."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model import causal_attention as module
from cofire.model.causal_attention import causal_attention, takes_blocks


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, float("-inf")).softmax(-1), value)


def run(function: object, tensors: list[torch.Tensor], grad: torch.Tensor, scale: float) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves, scale)  # type: ignore[operator]
    y.backward(grad)
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 40), width=st.integers(1, 9),
    value_width=st.integers(1, 9), bf16=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_blocks_equal_a_masked_square_with_all_gradients(
    batch: int, heads: int, length: int, width: int, value_width: int, bf16: bool, seed: int
) -> None:
    """Lengths that fill no block, one block exactly, and several with a remainder; q.k and v of unequal width."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, w) for w in (width, width, value_width, value_width)]
    *tensors, grad = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_QUERIES", {torch.float32: 8, torch.bfloat16: 8})
        found = run(causal_attention, tensors, grad, 0.5)
    expected = run(plain, [t.double() for t in tensors], grad.double(), 0.5)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        scale = max(b.abs().max().item(), 1.0)
        assert ((a.double() - b).abs().max() / scale).item() < (4e-2 if bf16 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_as_torchs_own_kernel_at_a_real_length(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 300, 2, 32).to(dtype) for _ in range(3)]
    grad = torch.randn(1, 300, 2, 32).to(dtype)

    def fused(*leaves: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in leaves[:3])
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=32**-0.5)
        return y.transpose(1, 2)

    exact = run(plain, [t.double() for t in tensors], grad.double(), 32**-0.5)
    errors = []
    for found in (
        run(causal_attention, tensors, grad, 32**-0.5),
        run(lambda *leaves: fused(*leaves[:3]), tensors, grad, 32**-0.5),
    ):
        errors.append([(a.double() - b).norm().item() / b.norm().item() for a, b in zip(found, exact, strict=True)])
    limit = 3.0 if dtype == torch.bfloat16 else 2.0  # BF16 rounds the scores, torch's kernel does not
    assert all(ours <= limit * theirs + 1e-7 for ours, theirs in zip(*errors, strict=True)), errors


def test_a_later_key_changes_nothing_before_it_across_a_block_border() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 600, 1, 8) for _ in range(3))
    before = causal_attention(q, k, v, 1.0)
    for at in (255, 256, 257, 511, 512, 599):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[0, at] += 5
        changed_v[0, at] -= 5
        after = causal_attention(q, changed_k, changed_v, 1.0)
        assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at], before[:, at])


def test_no_square_of_scores_is_kept_for_the_backward_pass() -> None:
    tensors = [torch.randn(1, 512, 2, 16, requires_grad=True) for _ in range(3)]
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        causal_attention(tensors[0], tensors[1], tensors[2], 1.0)
    assert sum(kept) <= 3 * tensors[0].numel()  # 49,152 numbers; the square is 524,288


def test_only_long_enough_operands_of_one_narrow_type_go_by_blocks() -> None:
    def operand(length: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, length, 1, 4, dtype=dtype)

    long = operand(128, torch.float32)
    assert takes_blocks(long, long)
    assert not takes_blocks(long[:, :127], long[:, :127])
    assert not takes_blocks(long.double(), long.double())
    assert not takes_blocks(long, long.bfloat16())
    assert takes_blocks(long.bfloat16(), long.bfloat16())
