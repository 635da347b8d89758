"""The native kernels for tiles of FP8, bit by bit: beside PyTorch's operations, and vectors beside plain code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.precision import _native, cpu_kernels
from cofire.precision.quantize import BLOCK, COLUMN_TILE, TILE, Quantized, _quantize, quantize, round_values

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
TILES = st.sampled_from([TILE, COLUMN_TILE, BLOCK, (1, 1), (1, 7), (3, 1), (5, 24), (1, 600), (64, 300), (2, 3000)])


def native(x, tile, dtype, power_of_two=False, floor=1e-4, plain=False, threads=1, guard=0):
    """Return codes, scale bits and values of ``x`` [R, C], with ``guard`` numbers of slack before and after each."""
    rows, columns = x.shape
    count = -(-rows // tile[0]) * -(-columns // tile[1])
    codes = torch.full((x.numel() + 2 * guard,), 0x55, dtype=torch.uint8)
    scales = torch.full((count + 2 * guard,), 0x55, dtype=torch.uint8 if power_of_two else torch.int32)
    values = torch.full((x.numel() + 2 * guard,), 0x55, dtype=torch.int32)
    made = codes, scales, values
    codes_at, scales_at, values_at = (each.data_ptr() + guard * each.element_size() for each in made)
    _native.quantize(
        x.data_ptr(),
        codes_at,
        scales_at,
        values_at,
        1,
        rows,
        columns,
        tile[0],
        tile[1],
        TYPES.index(dtype),
        power_of_two,
        floor,
        threads,
        plain,
    )
    for each in made if guard else ():
        assert (each[:guard] == 0x55).all()
        assert (each[-guard:] == 0x55).all()
    return [each[guard : each.numel() - guard] for each in made]


def middles(dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers halfway between neighbours of a format, which FP32 has exactly."""
    codes = torch.arange(0x7F if dtype == TYPES[0] else 0x7C, dtype=torch.uint8)
    values = codes.view(dtype).float()
    return (values[1:] + values[:-1]) / 2


def beside_middles(largest: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return rows of 128 with these largest values, [R], and numbers within 4 places of a middle times the scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = largest / torch.finfo(dtype).max
    x = torch.zeros(len(largest), 128)
    x[:, 0] = largest
    near = scale[:, None] * middles(dtype)
    places = torch.randint(-4, 5, near.shape, generator=generator, dtype=torch.int32)
    x[:, 1 : 1 + near.shape[1]] = (near.view(torch.int32) + places).view(torch.float32).minimum(largest[:, None])
    return x * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)


def assert_same_codes(x: torch.Tensor, tile, dtype: torch.dtype, floor: float) -> None:
    expected, found = _quantize(x, tile, dtype, "fp32", floor), quantize(x, tile, dtype, "fp32", floor)
    assert torch.equal(found.scale.view(torch.int32), expected.scale.view(torch.int32))
    assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))
    values = expected.data.float() * found.scale.repeat_interleave(tile[1], 1).repeat_interleave(tile[0], 0)
    assert torch.equal(round_values(x, tile, dtype, "fp32", floor).view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("power", [0, -100, -82, -83, -81, 96, 97, 98, 110])
def test_quotients_beside_the_middle_of_two_codes_round_as_exact_division_does(dtype, power):
    generator = torch.Generator().manual_seed(power)
    largest = (1.0 + torch.rand(2000, generator=generator)) * 2.0**power
    largest[:2] = torch.tensor([1.0, 1.75]) * 2.0**power
    # Scales whose significands are all ones: products with their inverses round wrongly beside powers of two.
    largest[2:200] = (1.75 - 2.0**-23) * 2.0**power
    x = beside_middles(largest, dtype, seed=power)
    assert_same_codes(x, TILE, dtype, 1e-38)
    assert_same_codes(x.T.contiguous(), COLUMN_TILE, dtype, 1e-38)


def test_a_scale_whose_significand_is_all_ones_is_among_those_tried():
    scale = torch.tensor([1.75 - 2.0**-23]) / 448.0
    assert int(scale.view(torch.int32)) & 0x7FFFFF == 0x7FFFFF


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 2200)),
    TILES,
    st.sampled_from(TYPES),
    st.booleans(),
    st.sampled_from([1e-4, 1e-30]),
    st.integers(0, 10**6),
)
def test_vectors_and_plain_code_give_the_same_bits_and_write_nothing_else(
    shape, tile, dtype, power_of_two, floor, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-40, 40, (shape[0], 1), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.01] = -0.0
    if seed % 4 == 0:
        x.view(-1)[seed % x.numel()] = [math.inf, -math.inf, math.nan][seed % 12 // 4]
    fast = native(x, tile, dtype, power_of_two, floor, threads=1 + seed % 3, guard=64)
    slow = native(x, tile, dtype, power_of_two, floor, plain=True)
    numbers = ~slow[2].view(torch.float32).isnan()
    assert torch.equal(fast[1], slow[1])
    assert torch.equal(fast[0][numbers], slow[0][numbers])
    assert torch.equal(fast[2][numbers], slow[2][numbers])
    assert fast[2].view(torch.float32)[~numbers].isnan().all()
    assert (fast[0][~numbers] & 0x7F > 0x7B).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tile", [(1, 256), (1, 1)])
def test_every_code_times_every_kind_of_scale_is_what_pytorch_makes_of_it(dtype, tile):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    scales = [1.0, 1 / 3, 2.0**-149, 2.0**-126, 2.0**118, 2.0**119, 1.5 * 2.0**119, 3e38, 0.0, -2.5, math.inf, math.nan]
    data = codes.expand(len(scales), 256).contiguous()
    scale = torch.tensor(scales)[:, None].expand(-1, 256 // tile[1]).contiguous()
    expected = data.float() * scale.repeat_interleave(tile[1], 1)
    found = Quantized(data, scale, tile).dequantize()
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found.view(torch.int32)[numbers], expected.view(torch.int32)[numbers])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tile", [TILE, COLUMN_TILE])
def test_scales_below_the_smallest_normal_number_overflow_as_pytorch_does(dtype, tile):
    generator = torch.Generator().manual_seed(5)
    # Scales of one or two bits are up to half too small.
    x = torch.randn(512, 128, generator=generator) * 2.0 ** torch.randint(-149, -110, (512, 1), generator=generator)
    x = x if tile == TILE else x.T.contiguous()
    expected, found = _quantize(x, tile, dtype, "fp32", 1e-45), quantize(x, tile, dtype, "fp32", 1e-45)
    assert torch.equal(found.scale, expected.scale)
    # Where a scale is zero, zeros have no quotient.
    numbers = ~expected.data.float().isnan()
    assert torch.equal(found.data.view(torch.uint8)[numbers], expected.data.view(torch.uint8)[numbers])
    assert torch.equal(found.data.float().isnan(), ~numbers)


@pytest.mark.parametrize("tile", [TILE, COLUMN_TILE, BLOCK])
@pytest.mark.parametrize("shape", [(128, 8192), (8192, 128), (300, 2500)])
def test_threads_share_a_matrix_in_any_shape_and_give_the_same_bits(tile, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    alone = native(x, tile, TYPES[0])
    for threads in (2, 3, 64):
        together = native(x, tile, TYPES[0], threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("tile", [TILE, COLUMN_TILE, BLOCK, (5, 24)])
@pytest.mark.parametrize("dtype", TYPES)
def test_dequantising_gives_the_values_that_quantising_rounded_to(tile, dtype):
    x = torch.randn(3, 200, 2300, generator=torch.Generator().manual_seed(7))
    codes, scales, values = cpu_kernels.quantize_and_round(x, tile, dtype, False, 1e-4)
    assert torch.equal(cpu_kernels.dequantize_tiles(codes, scales, tile), values)
    assert torch.equal(cpu_kernels.round_to_tiles(x, tile, dtype, False, 1e-4), values)
