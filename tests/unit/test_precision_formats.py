"""Number formats: every code and every rounding against a search among all values, and against PyTorch's casts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PrecisionError
from cofire.precision import formats, reference
from cofire.precision.formats import BF16, E4M3, E5M2, E5M6, FORMATS, UE8M0, FloatFormat, ue8m0_scale

TORCH_TYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "ue8m0": torch.float8_e8m0fnu,
}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
each_saturate = pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "overflow"])


def all_codes(format: FloatFormat) -> torch.Tensor:
    return torch.arange(1 << format.num_bits).to(format.code_dtype)


def unsigned(codes: torch.Tensor) -> np.ndarray:
    """Return codes as numbers that are not negative."""
    return codes.numpy().astype(np.int64) & (0xFF if codes.dtype == torch.uint8 else 0xFFFF)


def from_bits(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def bits_of(x: torch.Tensor) -> np.ndarray:
    """Return the bits of FP32 numbers, with one NaN, so that the sign of zero compares."""
    return np.where(x.isnan().numpy(), 0x7FC00000, x.numpy().view(np.uint32))


def every_bf16() -> torch.Tensor:
    return from_bits(np.arange(1 << 16) << 16)


def hard_values(format: FloatFormat) -> torch.Tensor:
    """Return each value, each middle of neighbours, the first beyond the largest, and FP32's next to all of them."""
    values = reference.all_values(format)
    values = np.unique(np.abs(values[np.isfinite(values)]))
    beyond = [values[-1] * factor for factor in (1 + 2.0**-format.mantissa_bits / 4, 1.5, 2, 4, 1e6)]
    steps = np.concatenate([values, [2 * values[-1] - values[-2]]])
    with np.errstate(over="ignore"):
        exact = np.concatenate([steps, (steps[1:] + steps[:-1]) / 2, beyond]).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    near = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))]
    special = np.array([0, 1, 2, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF, 0x800000])
    special = np.concatenate([special, [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]])
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14)
    magnitudes = np.concatenate([*near, from_bits(special).numpy(), from_bits(random).numpy()])
    return torch.from_numpy(np.concatenate([magnitudes, -magnitudes]))


@each_format
def test_every_code_decodes_to_the_value_of_its_bit_fields(format: FloatFormat) -> None:
    expected = torch.from_numpy(reference.all_values(format).astype(np.float32))
    assert (bits_of(formats.decode(all_codes(format), format)) == bits_of(expected)).all()


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_every_code_decodes_as_in_torch(name: str) -> None:
    codes = all_codes(FORMATS[name])
    expected = codes.view(TORCH_TYPES[name]).to(torch.float32)
    assert (bits_of(formats.decode(codes, FORMATS[name])) == bits_of(expected)).all()


def test_the_formats_have_their_published_ranges() -> None:
    assert (E4M3.largest, E4M3.smallest_normal, E4M3.smallest) == (448.0, 2.0**-6, 2.0**-9)
    assert (E5M2.largest, E5M2.smallest_normal, E5M2.smallest) == (57344.0, 2.0**-14, 2.0**-16)
    assert (E5M6.largest, E5M6.smallest_normal, E5M6.smallest) == (65024.0, 2.0**-14, 2.0**-20)
    assert (UE8M0.largest, UE8M0.smallest_normal, UE8M0.smallest) == (2.0**127, 2.0**-127, 2.0**-127)
    info = torch.finfo(torch.bfloat16)
    assert (BF16.largest, BF16.smallest_normal, BF16.smallest) == (info.max, info.tiny, 2.0**-133)
    assert [each.num_bits for each in FORMATS.values()] == [8, 8, 12, 8, 16]


@each_format
@each_saturate
def test_decoded_codes_encode_to_themselves(format: FloatFormat, saturate: bool) -> None:
    codes = all_codes(format)
    values = formats.decode(codes, format)
    keeps = values.isfinite() if saturate else ~values.isnan()
    again = formats.encode(values, format, saturate)
    assert torch.equal(again[keeps], codes[keeps])
    nan = values.isnan()
    assert set(unsigned(again[nan])) == {format.nan_code | (format.sign_bit if format.signed else 0), format.nan_code}
    largest = formats.encode(torch.tensor(format.largest), format)
    assert (again[values == math.inf] == (largest if saturate else format.infinity_code)).all()


@each_format
@each_saturate
def test_every_bf16_number_encodes_to_the_nearest_value(format: FloatFormat, saturate: bool) -> None:
    x = every_bf16()
    assert_nearest(x, format, saturate)


@each_format
@each_saturate
def test_values_middles_and_their_neighbours_encode_to_the_nearest_value(format: FloatFormat, saturate: bool) -> None:
    assert_nearest(hard_values(format), format, saturate)


def assert_nearest(x: torch.Tensor, format: FloatFormat, saturate: bool) -> None:
    got = unsigned(formats.encode(x, format, saturate))
    expected = reference.encode(x.numpy(), format, saturate)
    wrong = np.flatnonzero(got != expected)
    assert not wrong.size, (
        f"{wrong.size} wrong: {float(x[wrong[0]])!r} is {got[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"
    )


@pytest.mark.parametrize(
    ("format", "saturate"), [(E4M3, True), (E5M2, False), (BF16, False)], ids=["e4m3", "e5m2", "bf16"]
)
def test_codes_are_those_of_the_casts_of_torch(format: FloatFormat, saturate: bool) -> None:
    x = torch.cat([every_bf16(), hard_values(format)])
    expected = x.to(TORCH_TYPES[format.name])
    got = formats.encode(x, format, saturate)
    number = ~x.isnan()
    assert torch.equal(got[number], expected.view(format.code_dtype)[number])
    assert formats.decode(got, format)[~number].isnan().all()


def test_torch_saturates_e4m3_as_we_do_and_sends_ue8m0_ties_up() -> None:
    x = torch.tensor([449.0, 464.1, 1e9, math.inf, -math.inf])
    assert torch.equal(formats.round_to(x, E4M3), x.to(torch.float8_e4m3fn).float())
    ties = torch.tensor([1.5, 3.0])
    assert ties.to(torch.float8_e8m0fnu).float().tolist() == [2.0, 4.0]
    assert formats.round_to(ties, UE8M0).tolist() == [2.0, 2.0]


def test_overflow_without_saturation_becomes_infinity_or_nan() -> None:
    at_the_middle, beyond = torch.tensor([464.0, -464.0]), torch.tensor([464.1, -math.inf])
    assert formats.round_to(at_the_middle, E4M3, saturate=False).tolist() == [448.0, -448.0]
    assert formats.round_to(beyond, E4M3, saturate=False).isnan().all()
    assert formats.round_to(torch.tensor([61439.0, -61440.0]), E5M2, saturate=False).tolist() == [57344.0, -math.inf]


any_fp32 = st.integers(0, (1 << 32) - 1)


@settings(max_examples=100, deadline=None)
@given(bits=st.lists(any_fp32, min_size=1, max_size=40), name=st.sampled_from(list(FORMATS)), saturate=st.booleans())
def test_rounding_is_idempotent_monotone_and_odd(bits: list[int], name: str, saturate: bool) -> None:
    format = FORMATS[name]
    x = from_bits(np.array(bits))
    rounded = formats.round_to(x, format, saturate)
    assert (bits_of(formats.round_to(rounded, format, saturate)) == bits_of(rounded)).all()
    if format.signed:
        assert (bits_of(formats.round_to(-x, format, saturate)) == bits_of(-rounded)).all()
    number = ~rounded.isnan()
    order = x[number].argsort(stable=True)
    assert (rounded[number][order].diff() >= 0).all() or rounded.isinf().any()


@each_format
def test_many_numbers_give_the_codes_and_values_of_few(format: FloatFormat) -> None:
    x = hard_values(format)
    count = 2 * formats._CHUNK * torch.get_num_threads() + 6
    many = x.repeat(1 + count // x.numel())[:count]
    matrix = many.reshape(-1, 2).t()  # Not contiguous.
    codes = formats.encode(matrix, format)
    assert codes.shape == matrix.shape
    few = torch.cat([formats.encode(part, format) for part in matrix.reshape(-1).split(1000)])
    assert torch.equal(codes.reshape(-1), few)
    values = torch.cat([formats.decode(part, format) for part in few.split(100)])
    assert (bits_of(formats.decode(codes, format).reshape(-1)) == bits_of(values)).all()


@each_format
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes_are_kept(format: FloatFormat, shape: tuple[int, ...]) -> None:
    codes = formats.encode(torch.ones(shape), format)
    assert codes.shape == shape
    assert codes.dtype == format.code_dtype
    assert torch.equal(formats.decode(codes, format), torch.ones(shape))


def test_bits_above_a_code_do_not_count() -> None:
    codes = all_codes(E5M6)
    above = codes | 0x7000
    assert (bits_of(formats.decode(above, E5M6)) == bits_of(formats.decode(codes, E5M6))).all()
    many = above.repeat(3)
    assert (bits_of(formats.decode(many, E5M6)) == np.tile(bits_of(formats.decode(codes, E5M6)), 3)).all()


def test_encoding_leaves_its_argument_alone() -> None:
    x = torch.tensor([1.5, -0.0, math.nan, math.inf, 2.0**-10, 1e-40])
    before = x.clone()
    for format in FORMATS.values():
        formats.encode(x, format)
        codes = formats.encode(before, format)
        kept = codes.clone()
        formats.decode(codes, format)
        assert torch.equal(codes, kept)
    assert (bits_of(x) == bits_of(before)).all()


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(0, 0x7F800000), largest=st.sampled_from([448.0, 57344.0, 65024.0, 240.0, 6.0]))
def test_the_scale_is_the_smallest_power_of_two_that_is_enough(bits: int, largest: float) -> None:
    amax = from_bits(np.array([bits]))
    assert float(ue8m0_scale(amax, largest)) == pytest.approx(
        reference.ue8m0_scale(float(amax), largest), rel=0, abs=0, nan_ok=True
    )


@pytest.mark.parametrize("largest", [448.0, 57344.0, 65024.0, 127.0])
def test_the_scale_changes_exactly_at_powers_of_two(largest: float) -> None:
    powers = torch.arange(-110, 110)
    at = (largest * powers.double().exp2()).float()
    scale = powers.double().exp2().float()
    keep = at.isfinite()
    at, scale = at[keep], scale[keep]
    assert torch.equal(ue8m0_scale(at, largest), scale)
    assert torch.equal(ue8m0_scale(torch.nextafter(at, torch.tensor(0.0)), largest), scale)
    assert torch.equal(ue8m0_scale(torch.nextafter(at, torch.tensor(math.inf)), largest), 2 * scale)


def test_the_scale_of_no_magnitude_is_nan_and_of_a_tiny_one_the_smallest() -> None:
    amax = torch.tensor([0.0, -0.0, 1e-45, 2.0**-120, math.inf, math.nan, -1.0])
    scale = ue8m0_scale(amax)
    assert scale[:3].tolist() == [2.0**-127] * 3
    assert scale[3].item() == 2.0**-127
    assert scale[4:].isnan().all()
    assert ue8m0_scale(torch.tensor(3e38), largest=0.25).item() == 2.0**127


def test_scaled_values_never_overflow_and_scales_are_exact_in_ue8m0() -> None:
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(0)).exp2() * 1000
    scale = ue8m0_scale(amax)
    assert (amax / scale <= E4M3.largest).all()
    assert (amax / scale > E4M3.largest / 2).all()
    assert torch.equal(formats.round_to(scale, UE8M0), scale)


def test_a_wrong_argument_is_named_with_its_fix() -> None:
    with pytest.raises(PrecisionError, match=r"^torch.float64 is not encoded to e4m3; give x.float\(\)$"):
        formats.encode(torch.ones(1, dtype=torch.float64), E4M3)
    with pytest.raises(PrecisionError, match=r"^codes of torch.uint8 are not bf16; encode\(\) makes torch.int16$"):
        formats.decode(torch.ones(1, dtype=torch.uint8), BF16)
    with pytest.raises(PrecisionError, match=r"^largest magnitudes of torch.bfloat16 .* give amax.float\(\)$"):
        ue8m0_scale(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(PrecisionError, match=r"^a format's largest value is not -1; it is a positive number"):
        ue8m0_scale(torch.ones(1), largest=-1)
