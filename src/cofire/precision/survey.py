"""How much each number format loses, by distribution of the values: what ``cofire bench precision`` shows.

Signal over noise in decibels, ``20 log10(|x| / |x - y|)`` in L2, of values drawn at random with a seed (ISCA'25, 3.2,
whose comparison of LogFMT with FP8 and BF16 this repeats on synthetic values). FP8 has a scale for each 1 x 128 values
unless its name says otherwise. Left out: activations of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision import logfmt
from cofire.precision.quantize import TENSOR, TILE, Quantized, quantize

_COLUMNS = 1024
_OUTLIER = 2e4
_LOGFMT_BITS = (6, 8, 10)


@dataclass(frozen=True)
class NoiseRow:
    """What a format makes of a distribution.

    Attributes:
        format: Its name.
        distribution: Of the values.
        bits: Of a value, its share of scales included.
        snr_db: Signal over noise.
    """

    format: str
    distribution: str
    bits: float
    snr_db: float


def signal_to_noise_db(x: Tensor, y: Tensor) -> float:
    """Return by how much ``x`` exceeds ``x - y`` in L2; infinite where they are equal."""
    exact = x.double()
    noise = float((exact - y.double()).norm())
    return math.inf if noise == 0.0 else 20.0 * math.log10(float(exact.norm()) / noise)


def draw(distribution: str, rows: int, seed: int = 0) -> Tensor:
    """Return ``[rows, 1024]`` FP32 values of ``gaussian``, ``laplace``, ``student-t3`` or ``outlier`` kind.

    ``outlier`` is Gaussian with the first channel 20,000 times as large.

    Raises:
        PrecisionError: There is no such distribution, or no rows.
    """
    if distribution not in DISTRIBUTIONS:
        raise PrecisionError(f"distribution {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
    if rows < 1:
        raise PrecisionError(f"{rows} rows hold no values; take 1 or more")
    generator = torch.Generator().manual_seed(seed)
    return DISTRIBUTIONS[distribution](rows, generator)


def noise_table(rows: int = 1024, seed: int = 0) -> list[NoiseRow]:
    """Return every format on every distribution; the outlier channel itself is not counted.

    Args:
        rows: Of 1,024 values each.
        seed: Of the values.
    """
    found = []
    for distribution in DISTRIBUTIONS:
        x = draw(distribution, rows, seed)
        counted = slice(1, None) if distribution == "outlier" else slice(None)
        for name, coder in _coders().items():
            y, bits = coder(x)
            found.append(NoiseRow(name, distribution, bits, signal_to_noise_db(x[:, counted], y[:, counted])))
    return found


def _gaussian(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, _COLUMNS, generator=generator)


def _laplace(rows: int, generator: torch.Generator) -> Tensor:
    # Of two exponentials; the difference of two logarithms of uniform numbers above zero.
    u, v = (1.0 - torch.rand(rows, _COLUMNS, generator=generator) for _ in range(2))
    return u.log() - v.log()


def _student(rows: int, generator: torch.Generator) -> Tensor:
    squares = torch.randn(3, rows, _COLUMNS, generator=generator).square().sum(0)
    return _gaussian(rows, generator) / (squares / 3.0).sqrt()


def _outlier(rows: int, generator: torch.Generator) -> Tensor:
    x = _gaussian(rows, generator)
    x[:, 0] *= _OUTLIER
    return x


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student-t3": _student,
    "outlier": _outlier,
}


def _coders() -> dict[str, Callable[[Tensor], tuple[Tensor, float]]]:
    """Return what decodes to which values, and the bits of one."""

    def fp8(make: Callable[[Tensor], Quantized]) -> Callable[[Tensor], tuple[Tensor, float]]:
        def code(x: Tensor) -> tuple[Tensor, float]:
            q = make(x)
            return q.dequantize(), 8.0 * q.num_bytes / x.numel()

        return code

    def log(bits: int) -> Callable[[Tensor], tuple[Tensor, float]]:
        def code(x: Tensor) -> tuple[Tensor, float]:
            coded = logfmt.encode(x, bits)
            return coded.decode(), 8.0 * coded.num_bytes / x.numel()

        return code

    return {
        "bf16": lambda x: (x.bfloat16().float(), 16.0),
        "e4m3": fp8(lambda x: quantize(x, TILE)),
        "e4m3, ue8m0 scales": fp8(lambda x: quantize(x, TILE, scale_format="ue8m0")),
        "e4m3, one scale": fp8(lambda x: quantize(x, TENSOR)),
        "e5m2": fp8(lambda x: quantize(x, TILE, torch.float8_e5m2)),
        **{f"logfmt-{bits}": log(bits) for bits in _LOGFMT_BITS},
    }
