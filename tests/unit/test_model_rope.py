"""RoPE and YaRN against a slow reference written with complex numbers and one pair at a time."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model.rope import inverse_frequencies, mscale, rotate, rotation, softmax_scale
from cofire.spec import RopeSpec, YarnSpec

DEEPSEEK_V3 = YarnSpec(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)


def slow_frequency(rope: RopeSpec, width: int, pair: int) -> float:
    """YaRN by its paper: wavelengths shorter than original/beta_fast stay, longer than original/beta_slow stretch."""
    frequency = rope.theta ** (-2 * pair / width)
    if rope.yarn is None:
        return frequency
    yarn = rope.yarn

    def pair_with_turns(turns: float) -> float:  # the pair that makes that many turns over the original context
        wavelength = yarn.original_length / turns
        return width / 2 * math.log(wavelength / (2 * math.pi), rope.theta)

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), width - 1)
    stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
    return frequency * (1 - stretched) + frequency / yarn.factor * stretched


def slow_rotate(x: list[float], position: int, rope: RopeSpec) -> list[float]:
    half, out = len(x) // 2, list(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        z = complex(x[a], x[b]) * cmath.exp(1j * position * slow_frequency(rope, len(x), i))
        out[a], out[b] = z.real, z.imag
    return out


def turned(x: torch.Tensor, positions: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    frequencies = inverse_frequencies(rope, x.shape[-1])
    return rotate(x, rotation(frequencies, positions, rope, x.dtype), rope.interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("yarn", [None, DEEPSEEK_V3, YarnSpec(factor=8.0, original_length=256, beta_fast=4.0)])
def test_each_pair_turns_by_its_own_frequency(interleaved: bool, yarn: YarnSpec | None) -> None:
    rope = RopeSpec(interleaved=interleaved, yarn=yarn)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 64, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 4000], [163_839, 7, 7]])
    y = turned(x, positions, rope)
    for b in range(2):
        for t in range(3):
            for h in range(2):
                expected = slow_rotate(x[b, t, h].tolist(), int(positions[b, t]), rope)
                # mscale and mscale_all_dim are equal (or both absent), so vectors keep their length
                factor = (
                    1.0 if yarn is None else mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
                )
                torch.testing.assert_close(
                    y[b, t, h] / factor, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
                )


@settings(max_examples=25, deadline=None)
@given(p=st.integers(0, 4000), q=st.integers(0, 4000), shift=st.integers(0, 100_000), interleaved=st.booleans())
def test_a_score_depends_on_the_distance_only(p: int, q: int, shift: int, interleaved: bool) -> None:
    rope = RopeSpec(interleaved=interleaved)
    generator = torch.Generator().manual_seed(p)
    a, b = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)
    near = turned(a, torch.tensor([[p]]), rope) * turned(b, torch.tensor([[q]]), rope)
    far = turned(a, torch.tensor([[p + shift]]), rope) * turned(b, torch.tensor([[q + shift]]), rope)
    torch.testing.assert_close(near.sum(), far.sum(), rtol=1e-8, atol=1e-8)


def test_interleaved_and_half_split_are_one_rotation_of_permuted_elements() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 2, 12, dtype=torch.float64)
    positions = torch.arange(5)[None]
    split = turned(torch.cat((x[..., 0::2], x[..., 1::2]), -1), positions, RopeSpec(interleaved=False))
    paired = turned(x, positions, RopeSpec(interleaved=True))
    torch.testing.assert_close(torch.cat((paired[..., 0::2], paired[..., 1::2]), -1), split, rtol=1e-14, atol=1e-14)


def test_position_zero_is_left_alone() -> None:
    x = torch.randn(1, 1, 1, 8)
    assert torch.equal(turned(x, torch.zeros(1, 1, dtype=torch.int64), RopeSpec()), x)


def test_without_yarn_the_scale_is_one_over_the_root_of_the_width() -> None:
    assert softmax_scale(RopeSpec(), 192) == 192**-0.5


def test_yarn_multiplies_the_softmax_scale_by_mscale_squared() -> None:
    """DeepSeek-V3: mscale = 0.1 ln 40 + 1 = 1.36888..., squared (facts A.8)."""
    scale = softmax_scale(RopeSpec(yarn=DEEPSEEK_V3), 192)
    assert scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-14)


def test_yarn_without_mscale_all_dim_leaves_the_scale_and_lengthens_the_vectors() -> None:
    rope = RopeSpec(yarn=YarnSpec(factor=40.0, mscale=1.0, mscale_all_dim=0.0))
    assert softmax_scale(rope, 64) == 0.125
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    y = turned(x, torch.arange(3)[None], rope)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1) * 1.3688879454113936, rtol=1e-12, atol=0)


def test_angles_stay_exact_at_long_positions_in_fp32() -> None:
    """Position times frequency in FP32 would be off by 0.01 rad at 160k; angles are formed in FP64."""
    positions = torch.tensor([[163_839]])
    x = torch.randn(1, 1, 1, 64)
    torch.testing.assert_close(
        turned(x, positions, RopeSpec()).double(), turned(x.double(), positions, RopeSpec()), rtol=0, atol=1e-6
    )


def test_bf16_vectors_come_back_as_bf16() -> None:
    x = torch.randn(1, 2, 1, 8).bfloat16()
    y = turned(x, torch.arange(2)[None], RopeSpec())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, turned(x.float(), torch.arange(2)[None], RopeSpec()).bfloat16())
