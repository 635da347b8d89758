"""RMSNorm against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model.norm import RMSNorm


def reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 5), width=st.integers(1, 33), seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_it_is_the_definition_in_float64(rows: int, width: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, 1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator))
    x = torch.randn(2, rows, width, dtype=torch.float64, generator=generator) * scale
    torch.testing.assert_close(norm(x), reference(x, norm.weight, 1e-6), rtol=1e-12, atol=1e-14)


def test_its_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(7, 1e-3).double()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, w: torch.func.functional_call(norm, {"weight": w}, (v,)), (x, norm.weight)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_input_is_normalised_in_fp32_and_comes_back_in_its_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 64) * 200).to(dtype)  # 200^2 does not fit FP16
    norm = RMSNorm(64, 1e-6).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(x.float(), norm.weight.float(), 1e-6).to(dtype), rtol=1e-2, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(RMSNorm(8, 1e-6)(torch.zeros(2, 8)), torch.zeros(2, 8))
