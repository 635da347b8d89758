"""Tiles and scales of FP8: against a loop over tiles, at ragged edges, and on input that no scale can save."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PrecisionError
from cofire.precision.quantize import (
    AMAX_FLOOR,
    BLOCK,
    COLUMN_TILE,
    ROW,
    TENSOR,
    TILE,
    Quantized,
    _from_tiles,
    _in_tiles,
    _quantize,
    quantize,
    quantize_and_round,
    quantize_both,
    quantize_transposed,
    requantize,
    requantize_transposed,
    round_values,
    scale_of,
)

TILES = [TILE, COLUMN_TILE, BLOCK, ROW, TENSOR]
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def slow(x: torch.Tensor, tile, dtype: torch.dtype, scale_format: str) -> torch.Tensor:
    """Quantise and dequantise tile by tile, in Python."""
    rows, columns = x.shape
    height, width = tile[0] or max(rows, 1), tile[1] or max(columns, 1)
    out = torch.empty_like(x)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = x[top : top + height, left : left + width]
            scale = torch.tensor(max(part.abs().max().item(), AMAX_FLOOR)) / torch.finfo(dtype).max
            if scale_format == "ue8m0":
                power = math.ceil(math.log2(scale.item()))
                while 2.0 ** (power - 1) >= scale.item():
                    power -= 1
                while 2.0**power < scale.item():
                    power += 1
                scale = torch.tensor(2.0**power)
            out[top : top + height, left : left + width] = (part / scale).to(dtype).float() * scale
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(TILES),
    st.sampled_from(TYPES),
    st.sampled_from(["fp32", "ue8m0"]),
    st.integers(-30, 30),
    st.integers(0, 1000),
)
def test_every_tile_is_what_a_loop_over_tiles_makes_of_it(rows, columns, tile, dtype, scale_format, power, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q = quantize(x, tile, dtype, scale_format)
    assert q.scale_format == scale_format
    assert torch.equal(q.dequantize(), slow(x, tile, dtype, scale_format))


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=80, deadline=None)
@given(
    SHAPES,
    st.sampled_from([TILE, COLUMN_TILE, BLOCK]),
    st.sampled_from(TYPES),
    st.sampled_from(["fp32", "ue8m0"]),
    st.sampled_from([AMAX_FLOOR, 1e-30]),
    st.integers(0, 1000),
)
def test_native_kernels_give_the_bits_of_pytorch(shape, tile, dtype, scale_format, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-60, 60, shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.01] = 0.0
    if seed % 3 == 0:
        x.view(-1)[seed % x.numel()] = [math.inf, -math.inf, math.nan][seed % 9 // 3]
    native, plain = quantize(x, tile, dtype, scale_format, floor), _quantize(x, tile, dtype, scale_format, floor)
    scales = [q.scale.float().nan_to_num(-1.0) for q in (native, plain)]
    assert torch.equal(scales[0], scales[1])
    numbers = ~plain.data.float().isnan()
    codes = [q.data.view(torch.uint8) for q in (native, plain)]
    assert torch.equal(native.data.float().isnan(), ~numbers)
    assert torch.equal(codes[0][numbers], codes[1][numbers])
    values = native.dequantize()
    view, size = _in_tiles(native.data.float(), tile)
    slow_values = _from_tiles(view * native.scale.float()[..., :, None, :, None], size)
    assert torch.equal(values.nan_to_num(7.0), slow_values.nan_to_num(7.0))
    assert torch.equal(round_values(x, tile, dtype, scale_format, floor).nan_to_num(7.0), values.nan_to_num(7.0))
    both, both_values = quantize_and_round(x, tile, dtype, scale_format, floor)
    assert torch.equal(both.data.view(torch.uint8), codes[0])
    assert torch.equal(both_values.nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_and_every_bf16_number_is_rounded_as_pytorch_casts_it(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    q = Quantized(codes.view(2, 128), torch.ones(2, 1), TILE)
    assert torch.equal(q.dequantize().view(-1).nan_to_num(7.0, 8.0, 9.0), codes.float().nan_to_num(7.0, 8.0, 9.0))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    largest = torch.finfo(dtype).max
    inside = every[every.abs() <= largest].view(-1, 1)
    # A second column with the largest value makes the scale 1 for every row.
    x = torch.cat([inside, torch.full_like(inside, largest)], dim=1)
    found = quantize(x, TILE, dtype)
    assert (found.scale == 1).all()
    assert torch.equal(found.data[:, 0].view(torch.uint8), inside[:, 0].to(dtype).view(torch.uint8))
    assert torch.equal(round_values(x, TILE, dtype)[:, 0], inside[:, 0].to(dtype).float())


@pytest.mark.parametrize("tile", TILES)
def test_a_batch_of_matrices_is_each_matrix_by_itself(tile):
    x = torch.randn(3, 2, 130, 200)
    q = quantize(x, tile)
    for index in [(0, 0), (2, 1)]:
        one = quantize(x[index], tile)
        assert torch.equal(q.scale[index], one.scale)
        assert torch.equal(q.data[index].view(torch.uint8), one.data.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0), (2, 0, 7)])
@pytest.mark.parametrize("tile", TILES)
def test_empty_matrices_come_back_empty(shape, tile):
    q = quantize(torch.empty(shape), tile)
    assert q.dequantize().shape == shape


def test_relative_error_of_a_tile_is_that_of_three_bits():
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    for scale_format, published in (("fp32", 0.0257), ("ue8m0", 0.0266)):
        error = quantize(x, TILE, scale_format=scale_format).dequantize() - x
        assert (error.norm() / x.norm()).item() == pytest.approx(published, rel=0.01)


def test_an_outlier_spoils_its_own_tile_alone():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    spoilt = x.clone()
    spoilt[:, 7] *= 2e4
    by_tile, by_tensor = quantize(spoilt, TILE).dequantize(), quantize(spoilt, TENSOR).dequantize()
    clean = quantize(x, TILE).dequantize()
    assert torch.equal(by_tile[:, 128:], clean[:, 128:])
    assert (by_tensor[:, 128:] - x[:, 128:]).norm() > 3 * (clean[:, 128:] - x[:, 128:]).norm()


def test_tiles_of_zeros_and_of_small_numbers_have_the_floor_as_their_scale():
    x = torch.zeros(2, 128)
    x[1, 3] = 1e-6
    q = quantize(x)
    assert q.scale.flatten().tolist() == [torch.tensor(AMAX_FLOOR).div(448).item()] * 2
    assert torch.equal(q.dequantize()[0], torch.zeros(128))
    assert quantize(x, amax_floor=1e-12).dequantize()[1, 3].item() == pytest.approx(1e-6, rel=1e-6)


def test_the_sign_of_zero_and_the_largest_value_survive():
    x = torch.tensor([[-0.0, 0.0, 3.0, -3.0]])
    values = quantize(x, scale_format="ue8m0").dequantize()
    assert torch.signbit(values).tolist() == [[True, False, False, True]]
    assert quantize(x).data.float().abs().max().item() == 448.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_a_tile_with_a_number_that_is_not_finite_is_not_a_number_at_all(bad, scale_format):
    x = torch.ones(2, 256)
    x[1, 130] = bad
    values = quantize(x, scale_format=scale_format).dequantize()
    assert values[1, 128:].isnan().all()
    assert values[0].isfinite().all()
    assert values[1, :128].isfinite().all()


@given(st.floats(2.0**-110, 2.0**127, width=32))
def test_power_of_two_scales_are_the_next_above_and_hold_the_largest_value(amax):
    scale = scale_of(torch.tensor([amax]), 448.0, "ue8m0", 0.0).float().item()
    exact = (torch.tensor(amax) / 448.0).item()
    assert math.frexp(scale)[0] == 0.5
    assert scale >= exact
    assert scale / 2 < exact


def test_a_change_of_tiles_or_scales_rounds_the_values_again():
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(3))
    q = quantize(x)
    turned = requantize(q, COLUMN_TILE)
    assert torch.equal(turned.data.float(), quantize(q.dequantize(), COLUMN_TILE).data.float())
    powers = requantize(q, scale_format="ue8m0")
    assert powers.scale_format == "ue8m0"
    assert (powers.dequantize() - q.dequantize()).norm() < 0.04 * x.norm()
    exact = quantize(x, scale_format="ue8m0")
    # With powers of two, values on a coarser grid move to other tiles with their mantissa as it is.
    moved = requantize(requantize(exact, TENSOR), TILE).dequantize()
    assert (moved - exact.dequantize()).norm() < 0.03 * x.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(torch.ones(2, 2, dtype=torch.float64)), "float64 is not quantised"),
        (lambda: quantize(torch.ones(2, 2, dtype=torch.int32)), "int32 is not quantised"),
        (lambda: quantize(torch.ones(())), "a scalar has no tiles"),
        (lambda: quantize(torch.ones(5)), "a vector of 5"),
        (lambda: quantize(torch.ones(2, 2), dtype=torch.float16), "not an FP8 format"),
        (lambda: quantize(torch.ones(2, 2), scale_format="bf16"), "neither 'fp32' nor 'ue8m0'"),  # pyright: ignore
        (lambda: Quantized(torch.ones(2, 2), torch.ones(2, 1), TILE), "is not FP8"),
        (lambda: Quantized(torch.ones(2, 256).to(TYPES[0]), torch.ones(2, 1), TILE), "must be \\[2, 2\\]"),
        (lambda: Quantized(torch.ones(2, 2).to(TYPES[0]), torch.ones(2, 1, dtype=torch.uint8), TILE), "requantize"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(PrecisionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(128, 128), (130, 70), (2, 5, 300), (0, 128), (3, 0)])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_the_transpose_is_quantised_as_the_column_tiles_are(shape, scale_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = quantize_transposed(x, scale_format=scale_format)
    expected = quantize(x, COLUMN_TILE, scale_format=scale_format)
    assert found.tile == TILE
    assert found.data.is_contiguous()
    assert torch.equal(found.data.view(torch.uint8), expected.data.mT.view(torch.uint8))
    assert torch.equal(found.scale.float(), expected.scale.mT.float())
    by_row, turned = quantize_both(x, scale_format=scale_format)
    assert torch.equal(by_row.data.view(torch.uint8), quantize(x, scale_format=scale_format).data.view(torch.uint8))
    assert torch.equal(turned.data.view(torch.uint8), found.data.view(torch.uint8))
    again = requantize_transposed(by_row, "ue8m0")
    expected = quantize(by_row.dequantize(), COLUMN_TILE, scale_format="ue8m0")
    assert torch.equal(again.data.view(torch.uint8), expected.data.mT.view(torch.uint8))
    assert again.scale_format == "ue8m0"
