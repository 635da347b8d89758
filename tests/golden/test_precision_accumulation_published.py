"""Errors of Hopper's accumulation and of FP8 products with fine-grained scales, against known figures.

DeepSeek-V3 technical report, 3.3.2: with K = 4096 the limited accumulators cost up to about 2 %, and promotion every
128 elements mends it. The report names neither its inputs nor its measure. The table of products is known from a
separate calculation: N(0, 1), 1 - 2 <x, y> / (|x|^2 + |y|^2) against the exact product.
"""

from __future__ import annotations

import itertools
import statistics
from functools import cache

import pytest
import torch
from torch import Tensor

from cofire.precision.accumulate import AccumulatorSpec, LadderRow, error_ladder, scaled_gemm_reference

SIZE = 256
OUTLIER_CHANNEL = 5
Scaled = tuple[Tensor, Tensor]


@cache
def _ladder(inputs: str, seed: int) -> list[LadderRow]:
    assert inputs in ("positive", "normal")
    return error_ladder(seed=seed, inputs=inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", ["positive", "normal"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_shorter_interval_has_a_smaller_error(inputs: str, seed: int) -> None:
    rows = _ladder(inputs, seed)
    assert [row.interval for row in rows] == [None, 2048, 512, 128, 32]
    for longer, shorter in itertools.pairwise(rows):
        assert shorter.max_relative_error < longer.max_relative_error
        assert shorter.mean_relative_error < longer.mean_relative_error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_promotion_every_128_divides_the_error_of_positive_sums_by_far_more_than_50(seed: int) -> None:
    never, _, _, every_128, _ = _ladder("positive", seed)
    assert never.mean_relative_error > 100 * every_128.mean_relative_error
    assert never.max_relative_error > 100 * every_128.max_relative_error
    assert never.max_elementwise_error > 100 * every_128.max_elementwise_error


def test_without_promotion_a_random_product_errs_by_about_2_percent() -> None:
    worst = [_ladder("normal", seed)[0].max_relative_error for seed in range(5)]
    assert 0.010 < statistics.median(worst) < 0.025
    # Signs average the truncation out: promotion gains less here than with positive sums.
    gains = [_ladder("normal", s)[0].max_relative_error / _ladder("normal", s)[3].max_relative_error for s in range(5)]
    assert 10 < statistics.median(gains) < 50


def _quantize(x: Tensor, amax: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> Scaled:
    scale = amax.clamp(min=1e-4) / 448
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    spread = scale.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1) if amax.numel() > 1 else scale
    return (x / spread).to(torch.float8_e4m3fn), scale


def _tiles(x: Tensor, power_of_two: bool = False) -> Scaled:
    return _quantize(x, x.reshape(len(x), -1, 128).abs().amax(-1), (1, 128), power_of_two)


def _blocks(x: Tensor) -> Scaled:
    return _quantize(x, x.reshape(len(x) // 128, 128, -1, 128).abs().amax((1, 3)), (128, 128))


def _tensor(x: Tensor) -> Scaled:
    return _quantize(x, x.abs().amax().reshape(1, 1), (1, 1))


def _dequantize(x: Scaled, rows: int) -> Tensor:
    data, scale = x
    if scale.numel() > 1:
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(128, 1)
    return data.double() * scale.double()


def _difference(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


@cache
def _operands(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, k, generator=generator), torch.randn(SIZE, k, generator=generator)


@pytest.mark.parametrize(
    ("k", "tiled", "in_ue8m0", "per_tensor"),
    [(512, 6.83e-4, 7.05e-4, 7.11e-4), (2048, 6.81e-4, 7.02e-4, 6.99e-4), (7168, 6.78e-4, 7.07e-4, 6.93e-4)],
)
def test_products_in_fp8_have_the_known_errors(k: int, tiled: float, in_ue8m0: float, per_tensor: float) -> None:
    x, w = _operands(k)
    exact = x.double() @ w.double().T
    for a, b, known in (
        (_tiles(x), _blocks(w), tiled),
        (_tiles(x, power_of_two=True), _blocks(w), in_ue8m0),
        (_tensor(x), _tensor(w), per_tensor),
    ):
        assert _difference(scaled_gemm_reference(*a, *b), exact) == pytest.approx(known, rel=0.03)


def test_promoted_accumulation_adds_a_thousandth_to_the_error_of_rounding() -> None:
    x, w = _operands(2048)
    exact = x.double() @ w.double().T
    a, b = _tiles(x), _blocks(w)
    rounding_alone = _difference(_dequantize(a, 1) @ _dequantize(b, 128).T, exact)
    assert _difference(scaled_gemm_reference(*a, *b), exact) == pytest.approx(rounding_alone, rel=1e-3)


@pytest.mark.parametrize("k", [2048, 7168])
def test_an_outlier_channel_costs_the_others_nothing_with_tiles_and_three_times_without(k: int) -> None:
    x, w = _operands(k)
    x = x.clone()
    x[:, OUTLIER_CHANNEL] *= 2e4
    errors = {}
    for name, a, b in (("tile", _tiles(x), _blocks(w)), ("tensor", _tensor(x), _tensor(w))):
        # The other channels' part of the product: scales are those with the outlier, its own products are taken out.
        others = a[0].float()
        others[:, OUTLIER_CHANNEL] = 0
        got = scaled_gemm_reference(others.to(torch.float8_e4m3fn), a[1], *b, AccumulatorSpec())
        rest = x.double()
        rest[:, OUTLIER_CHANNEL] = 0
        errors[name] = _difference(got, rest @ w.double().T)
    assert errors["tile"] == pytest.approx(6.85e-4, rel=0.03)
    assert 2.3e-3 < errors["tensor"] < 2.9e-3
    assert errors["tensor"] > 3 * errors["tile"]
