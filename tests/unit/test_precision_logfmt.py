"""LogFMT against tables of decoded values in FP64, and what must hold for any numbers."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PrecisionError
from cofire.precision import logfmt, reference
from cofire.precision.logfmt import TILE_SIZE, LogFMT, Underflow, pack_bits, unpack_bits

ALL_BITS = range(3, 11)
UNDERFLOWS: tuple[Underflow, ...] = ("clamp", "zero")
FLT_MAX = torch.finfo(torch.float32).max
# Of a step: where FP32 logarithms decide, not distance.
UNDECIDED = 1e-3

each_bits = pytest.mark.parametrize("bits", ALL_BITS)
each_underflow = pytest.mark.parametrize("underflow", UNDERFLOWS)


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32).copy())


def bits_of(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(torch.int32).reshape(-1).tolist()


def samples(name: str, *shape: int) -> torch.Tensor:
    random = np.random.default_rng(1)
    x = {
        "normal": lambda: random.standard_normal(shape),
        "laplace": lambda: random.laplace(size=shape),
        "student": lambda: random.standard_t(3, shape),
        "with zeros": lambda: random.standard_normal(shape) * (random.random(shape) < 0.5),
        "wide": lambda: random.standard_normal(shape) * np.exp2(random.uniform(-60, 20, shape)),
        "narrow": lambda: 3 + random.random(shape) * 0.01,
        "tiny": lambda: random.standard_normal(shape) * 2.0**-124,
        "huge": lambda: random.uniform(-1, 1, shape) * FLT_MAX,
    }[name]()
    return torch.from_numpy(x.astype(np.float32))


SAMPLES = ("normal", "laplace", "student", "with zeros", "wide", "narrow", "tiny", "huge")


@each_bits
@each_underflow
@pytest.mark.parametrize("name", SAMPLES)
def test_codes_and_values_are_those_of_a_search_through_each_tiles_table(
    name: str, bits: int, underflow: Underflow
) -> None:
    x = samples(name, 4, 300)
    encoded = logfmt.encode(x, bits, underflow)
    codes, values = encoded.codes(), encoded.decode().double()
    for row in range(x.shape[0]):
        for first in range(0, x.shape[1], TILE_SIZE):
            part = slice(first, first + TILE_SIZE)
            tile = x[row, part].numpy()
            expected, expected_values = reference.logfmt_tile(tile, bits, underflow)
            got = codes[row, part].numpy().astype(int)
            for i in np.flatnonzero(got != expected):
                # On the middle of two neighbours both are right.
                assert abs(got[i] - expected[i]) == 1
                one, other = abs(expected_values[i]), abs(float(values[row, first + i]))
                middle = (one + other) / 2
                assert abs(abs(float(tile[i])) - middle) <= UNDECIDED * abs(other - one)
            same = got == expected
            np.testing.assert_allclose(values[row, part].numpy()[same], expected_values[same], rtol=1e-5)
            assert same.mean() > 0.98


def assert_stable(x: torch.Tensor, bits: int, underflow: Underflow) -> None:
    encoded = logfmt.encode(x, bits, underflow)
    values = encoded.decode()
    again = logfmt.encode(values, bits, underflow)
    assert torch.equal(again.packed, encoded.packed)
    assert bits_of(again.low) == bits_of(encoded.low)
    assert bits_of(again.decode()) == bits_of(values)


finite_fp32 = st.integers(0, (1 << 32) - 1).filter(lambda bits: bits & 0x7F800000 != 0x7F800000)


@settings(max_examples=300, deadline=None)
@given(
    numbers=st.lists(finite_fp32, min_size=1, max_size=140),
    bits=st.sampled_from(ALL_BITS),
    underflow=st.sampled_from(UNDERFLOWS),
)
def test_encoding_any_decoded_numbers_changes_nothing(numbers: list[int], bits: int, underflow: Underflow) -> None:
    assert_stable(from_bits(numbers), bits, underflow)


@settings(max_examples=300, deadline=None)
@given(
    first=st.integers(0x00800000, 0x7F7FFFFF - (1 << 24)),
    shift=st.integers(0, 24),
    bits=st.sampled_from(ALL_BITS),
    seed=st.integers(0, 2**32 - 1),
)
def test_encoding_decoded_numbers_of_nearly_one_size_changes_nothing(
    first: int, shift: int, bits: int, seed: int
) -> None:
    offsets = np.random.default_rng(seed).integers(0, (1 << shift) + 1, TILE_SIZE)
    x = from_bits((first + offsets).tolist())
    assert_stable(x, bits, "clamp")
    error = (logfmt.encode(x, bits).decode().double() / x.double() - 1).abs().max()
    ratio = float(x.max()) / float(x.min())
    assert error <= max((ratio - 1) / (2 ** (bits - 1) - 2), 2.0**-19) * 0.51 + 2**-22


@each_bits
@pytest.mark.parametrize("name", SAMPLES)
def test_encoding_decoded_samples_changes_nothing(name: str, bits: int) -> None:
    for underflow in UNDERFLOWS:
        assert_stable(samples(name, 3, 5, 1000), bits, underflow)


@each_bits
def test_no_number_is_further_than_half_of_the_gap_around_it(bits: int) -> None:
    x = samples("student", 64, TILE_SIZE)
    encoded = logfmt.encode(x, bits)
    values = encoded.decode()
    magnitude, step = x.abs().double(), encoded.step.double()
    # Neighbours a and a * exp(step) around |x|: their gap is at most |x| * (exp(step) - 1).
    bound = magnitude * torch.expm1(step) / 2 * (1 + UNDECIDED) + magnitude * 1e-5
    assert ((x - values).abs() <= bound).all()
    assert torch.equal(values.signbit(), x.signbit())


@each_bits
def test_the_smallest_and_the_largest_of_a_tile_come_back_exactly(bits: int) -> None:
    x = samples("normal", 16, 3 * TILE_SIZE)
    values = logfmt.encode(x, bits).decode()
    tiles, decoded = x.view(-1, TILE_SIZE).abs(), values.view(-1, TILE_SIZE).abs()
    assert torch.equal(decoded.amax(-1), tiles.amax(-1))
    assert torch.equal(decoded.amin(-1), tiles.amin(-1))
    assert torch.equal(decoded.gather(1, tiles.argmax(-1, keepdim=True)), tiles.amax(-1, keepdim=True))


@each_bits
@each_underflow
def test_zeros_stay_zeros_and_lose_their_sign(bits: int, underflow: Underflow) -> None:
    encoded = logfmt.encode(torch.tensor([0.0, -0.0, 1e-40, -1e-40]), bits, underflow)
    assert encoded.words().tolist() == [0, 0, 0, 0]
    assert bits_of(encoded.decode()) == [0, 0, 0, 0]
    assert (encoded.low.tolist(), encoded.high.tolist()) == ([0.0], [0.0])
    assert encoded.min.tolist() == [-math.inf]
    beside = logfmt.encode(torch.tensor([-3.0, 0.0, -0.0, 1e-40, -1e-40]), bits, underflow)
    assert bits_of(beside.decode()) == bits_of(torch.tensor([-3.0, 0.0, 0.0, 0.0, 0.0]))


@each_bits
@pytest.mark.parametrize("magnitude", [1.0, 0.1, 2.0**-126, FLT_MAX])
def test_a_tile_of_one_magnitude_has_code_1_and_no_error(bits: int, magnitude: float) -> None:
    x = torch.tensor([magnitude, -magnitude] * 20)
    encoded = logfmt.encode(x, bits)
    assert (encoded.codes() == 1).all()
    assert torch.equal(encoded.decode(), x)


def test_magnitudes_below_the_clamp_become_its_code_or_zero() -> None:
    x = torch.tensor([1.0, 2.0**-32, -(2.0**-32.9), 2.0**-33, 2.0**-33.1, -(2.0**-60)])
    low = 2.0**-32
    assert logfmt.encode(x, 8, "clamp").decode().tolist() == [1.0, low, -low, low, low, -low]
    assert logfmt.encode(x, 8, "zero").decode().tolist() == [1.0, low, -low, low, 0.0, 0.0]
    # What becomes zero does not widen the grid of the others.
    alone = torch.tensor([1.0, 0.5, 1e-20])
    assert logfmt.encode(alone, 8, "zero").low.tolist() == [0.5]
    assert logfmt.encode(alone, 8, "clamp").low.tolist() == [low]


@each_bits
def test_numbers_next_to_the_largest_of_fp32_stay_finite(bits: int) -> None:
    x = from_bits([0x7F7FFFFF - i for i in range(TILE_SIZE)])
    assert logfmt.encode(x, bits).decode().isfinite().all()


def test_steps_are_those_of_the_paper() -> None:
    x = samples("student", 8, TILE_SIZE)
    for bits in ALL_BITS:
        logs = x.abs().double().log()
        low = torch.maximum(logs.amin(-1), logs.amax(-1) - 32 * math.log(2))
        encoded = logfmt.encode(x, bits)
        torch.testing.assert_close(encoded.min.double().view(-1), low, rtol=0, atol=1e-5)
        step = (logs.amax(-1) - low) / (2 ** (bits - 1) - 2)
        torch.testing.assert_close(encoded.step.double().view(-1), step, rtol=1e-5, atol=0)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), bits=st.integers(1, 10))
def test_packed_bits_are_one_long_number(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_bits(torch.tensor(codes, dtype=torch.int32), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 11))
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 3, 1), (2, 4, 37), (5, 256)])
def test_rows_are_packed_one_by_one(shape: tuple[int, ...], bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int16)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]).to(torch.int16), codes)
    # Columns that lie apart in memory.
    wider = torch.stack([codes, codes], dim=-1)[..., 0]
    assert torch.equal(pack_bits(wider, bits), packed)


@pytest.mark.parametrize("bits", range(1, 11))
def test_a_single_row_of_a_wider_tensor_is_packed_as_any_other(bits: int) -> None:
    codes = torch.arange(27, dtype=torch.int32).view(1, 27) % 2**bits
    for first in (0, 1, 8):
        row = codes[:, first : first + 8]
        packed = pack_bits(row, bits)
        assert torch.equal(packed, pack_bits(row[0].clone(), bits).unsqueeze(0))
        wider = torch.cat([packed[:, :first], packed, packed[:, :3]], dim=-1)
        begin = min(first, bits)
        assert torch.equal(unpack_bits(wider[:, begin : begin + bits], bits, 8).to(torch.int32), row)


@each_bits
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_rows_and_tiles_do_not_notice_each_other(length: int, bits: int) -> None:
    x = samples("normal", 2, 3, length)
    encoded = logfmt.encode(x, bits)
    values = encoded.decode()
    assert encoded.shape == values.shape == (2, 3, length)
    assert encoded.packed.shape == (2, 3, math.ceil(length * bits / 8))
    assert encoded.num_bytes == 6 * (math.ceil(length * bits / 8) + 8 * math.ceil(length / TILE_SIZE))
    for i, j in np.ndindex(2, 3):
        for first in range(0, length, TILE_SIZE):
            tile = x[i, j, first : first + TILE_SIZE]
            assert torch.equal(values[i, j, first : first + TILE_SIZE], logfmt.encode(tile, bits).decode())


@each_bits
def test_many_tiles_give_the_codes_of_few(bits: int) -> None:
    rows = 2 * logfmt._TILES_AT_A_TIME * torch.get_num_threads() // 3 + 7
    x = samples("student", rows, 2 * TILE_SIZE + 1)
    encoded = logfmt.encode(x, bits)
    few = [logfmt.encode(part, bits) for part in x.split(100)]
    assert torch.equal(encoded.packed, torch.cat([each.packed for each in few]))
    assert torch.equal(encoded.decode(), torch.cat([each.decode() for each in few]))


@pytest.mark.parametrize("shape", [(0,), (0, 128), (3, 0), (2, 0, 5)])
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    encoded = logfmt.encode(torch.empty(shape), 10)
    assert encoded.num_bytes == 0
    assert encoded.decode().shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_encoded_as_the_same_fp32_numbers(dtype: torch.dtype) -> None:
    x = samples("normal", 3, 200).to(dtype)
    assert torch.equal(logfmt.encode(x, 8).packed, logfmt.encode(x.float(), 8).packed)


def test_strides_and_gradients_do_not_matter_and_the_argument_is_left_alone() -> None:
    x = samples("normal", 128, 40)
    before = x.clone()
    encoded = logfmt.encode(x.t(), 7)
    assert torch.equal(encoded.decode(), logfmt.encode(x.t().contiguous(), 7).decode())
    assert torch.equal(x, before)
    needs_grad = x.clone().requires_grad_()
    assert not logfmt.encode(needs_grad, 7).decode().requires_grad


def test_decoding_leaves_the_codes_alone() -> None:
    for bits in ALL_BITS:
        encoded = logfmt.encode(samples("normal", 3, 200), bits)
        before = (encoded.packed.clone(), encoded.low.clone(), encoded.high.clone())
        first, second = encoded.decode(), encoded.decode()
        assert torch.equal(first, second)
        assert all(map(torch.equal, before, (encoded.packed, encoded.low, encoded.high)))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinity_or_a_nan_is_refused_with_its_place(bad: float) -> None:
    x = torch.ones(2, 3, 300)
    x[1, 2, 270] = bad
    for underflow in UNDERFLOWS:
        with pytest.raises(PrecisionError, match=r"^tile \[1, 2, 2\] holds an infinity or a NaN"):
            logfmt.encode(x, 8, underflow)


def test_a_wrong_argument_is_named_with_its_fix() -> None:
    x = torch.ones(4)
    with pytest.raises(PrecisionError, match=r"^LogFMT-11 is not defined; take 3 to 10 bits$"):
        logfmt.encode(x, 11)
    with pytest.raises(PrecisionError, match=r"^LogFMT-2 is not defined"):
        logfmt.encode(x, 2)
    with pytest.raises(PrecisionError, match=r"^underflow 'flush' is neither 'clamp' nor 'zero'$"):
        logfmt.encode(x, 8, "flush")  # type: ignore[arg-type]
    with pytest.raises(PrecisionError, match=r"^torch.float64 is not encoded to LogFMT; give float32"):
        logfmt.encode(x.double(), 8)
    with pytest.raises(PrecisionError, match=r"^a scalar has no tiles; give a vector$"):
        logfmt.encode(torch.tensor(1.0), 8)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    good = logfmt.encode(torch.ones(2, 130), 6)
    with pytest.raises(PrecisionError, match=r"^packed codes \[2, 98\] of torch.uint8 do not fit LogFMT-8 of"):
        LogFMT(8, good.packed, good.low, good.high, good.shape)
    with pytest.raises(PrecisionError, match=r"^lowest magnitudes \[2, 1\] of torch.float32 .* must be \[2, 2\]"):
        LogFMT(6, good.packed, good.low[:, :1], good.high, good.shape)
    with pytest.raises(PrecisionError, match=r"^highest magnitudes \[2, 2\] of torch.float64 do not fit"):
        LogFMT(6, good.packed, good.low, good.high.double(), good.shape)
    with pytest.raises(PrecisionError, match=r"^LogFMT-0 is not defined"):
        LogFMT(0, good.packed, good.low, good.high, good.shape)


def test_codes_read_from_bytes_decode_by_the_formula() -> None:
    # LogFMT-4 from 1 to 64: a step of log 2. Words: sign and code of 1, -2, 4, 64, 0, -1, 8.
    words = [1, 8 | 2, 3, 7, 0, 8 | 1, 4]
    number = sum(word << (4 * i) for i, word in enumerate(words))
    packed = torch.tensor(list(struct.pack("<I", number)), dtype=torch.uint8)
    encoded = LogFMT(4, packed, torch.tensor([1.0]), torch.tensor([64.0]), (7,))
    torch.testing.assert_close(encoded.decode(), torch.tensor([1.0, -2.0, 4.0, 64.0, 0.0, -1.0, 8.0]))
