"""Rotary position embedding (arXiv 2104.09864) with YaRN (arXiv 2309.00071), as DeepSeek uses them.

Angles are computed for the positions at hand, in FP32 at least; there is no table to outgrow.
DeepSeek-V3 rotates adjacent elements (its released code views them as complex numbers); LLaMA's
Hugging Face form pairs element i with i + R/2. ``RopeSpec.interleaved`` says which.

YaRN blends the original and the stretched frequencies, and corrects the attention temperature by
``mscale = 0.1 m ln(factor) + 1`` in two places: on the rotated vectors by mscale(m) / mscale(m_all), and
on the softmax scale by mscale(m_all)^2 (facts of the released ``model.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cofire.spec import RopeSpec, YarnSpec


class Rotation(NamedTuple):
    """Cosines and sines, each [B, T, 1, R/2], of the angles by which T positions are rotated."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rope: RopeSpec, width: int) -> Tensor:
    """Return the R/2 angular frequencies (radians per position) in float64."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequency = rope.theta**-exponent
    if rope.yarn is None:
        return frequency
    low, high = _correction_range(rope.yarn, rope.theta, width)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return frequency / rope.yarn.factor * ramp + frequency * (1 - ramp)


def _correction_range(yarn: YarnSpec, theta: float, width: int) -> tuple[float, float]:
    """Return the first and last pair between which YaRN's ramp runs."""

    def pair_that_turns(turns: float) -> float:
        return width * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    return float(low), float(high) if high != low else low + 0.001


def mscale(factor: float, m: float) -> float:
    """Return YaRN's temperature term ``0.1 m ln(factor) + 1``; 1 where the context is not extended."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(rope: RopeSpec, qk_head_dim: int) -> float:
    """Return the factor on q.k before the softmax."""
    scale = qk_head_dim**-0.5
    if rope.yarn is not None and rope.yarn.mscale_all_dim:
        scale *= mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def rotation(frequencies: Tensor, positions: Tensor, rope: RopeSpec, dtype: torch.dtype) -> Rotation:
    """Return the rotation of ``positions`` [B, T]; ``frequencies`` [R/2] come from :func:`inverse_frequencies`."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = (positions[..., None].to(torch.float64) * frequencies).unsqueeze(-2)
    magnitude = 1.0
    if rope.yarn is not None:
        magnitude = mscale(rope.yarn.factor, rope.yarn.mscale) / mscale(rope.yarn.factor, rope.yarn.mscale_all_dim)
    return Rotation((angles.cos() * magnitude).to(wide), (angles.sin() * magnitude).to(wide))


def rotate(x: Tensor, turn: Rotation, interleaved: bool) -> Tensor:
    """Rotate ``x`` [B, T, heads, R] by ``turn``; the result has the dtype of ``x``."""
    wide = x.to(turn.cos.dtype)
    if interleaved:
        even, odd = wide[..., 0::2], wide[..., 1::2]
        pair = torch.stack((even * turn.cos - odd * turn.sin, even * turn.sin + odd * turn.cos), dim=-1)
        return pair.flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * turn.cos - second * turn.sin, first * turn.sin + second * turn.cos), dim=-1).to(x.dtype)
