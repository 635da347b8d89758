"""LogFMT and FP8 against the vectors, errors and sizes that follow from the papers; ``-s`` prints the errors.

LogFMT is ISCA'25 (arXiv 2505.09343), 3.2; FP8 takes one FP32 scale, amax / largest, per tile of 128, as DeepSeek-V3
(2412.19437), 3.3.2. SNR is the energy of the numbers over that of the errors, in dB.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cofire.precision import formats, logfmt
from cofire.precision.formats import BF16, E4M3, E5M2, FloatFormat

ROWS = 4096
# The energy of Student's t with 3 degrees of freedom is that of a few large numbers: 24 draws of 4096 tiles gave a
# standard deviation of 0.13 dB. The others vary by 0.03.
TOLERANCE_DB = {"normal": 0.1, "laplace": 0.1, "student": 0.3}


def numbers(distribution: str, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, logfmt.TILE_SIZE)
    if distribution == "uniform":
        return torch.rand(shape, generator=generator)
    if distribution == "laplace":
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return torch.empty(shape).exponential_(generator=generator) * sign
    normal = torch.randn(shape, generator=generator)
    if distribution == "normal":
        return normal
    return normal / (torch.randn((3, *shape), generator=generator).square().sum(0) / 3).sqrt()


def snr_db(x: Tensor, decoded: Tensor) -> float:
    signal, error = x.double().square().sum(), (x.double() - decoded.double()).square().sum()
    return 10 * math.log10(float(signal / error))


def logfmt_db(x: Tensor, bits: int) -> float:
    return snr_db(x, logfmt.encode(x, bits).decode())


def fp8_db(x: Tensor, format: FloatFormat) -> float:
    scale = x.abs().amax(-1, keepdim=True) / format.largest
    return snr_db(x, formats.round_to(x / scale, format) * scale)


def test_four_bits_give_the_vector_of_the_formula() -> None:
    encoded = logfmt.encode(torch.tensor([1, 2, 4, 8, 3, 2.9, -1, 0]), 4)
    assert encoded.codes().tolist() == [1, 3, 5, 7, 4, 4, 1, 0]
    expected = [1, 2, 4, 8, 8**0.5, 8**0.5, -1, 0]
    assert encoded.decode().tolist() == pytest.approx(expected, rel=2e-7, abs=0)
    assert encoded.step.tolist() == pytest.approx([0.346574], abs=5e-7)
    assert encoded.min.tolist() == [0.0]


def test_three_bits_give_the_vector_of_the_formula() -> None:
    encoded = logfmt.encode(torch.tensor([1, 2, 4, 8, 3, 2.9, -1, 0]), 3)
    assert encoded.codes().tolist() == [1, 2, 2, 3, 2, 2, 1, 0]
    middle = 8**0.5
    assert encoded.decode().tolist() == pytest.approx([1, middle, middle, 8, middle, middle, -1, 0], rel=2e-7, abs=0)


def test_another_vector_with_zero_first() -> None:
    encoded = logfmt.encode(torch.tensor([0, 1, -2, 4, 8, -16, 0.5, 3]), 4)
    assert encoded.codes().tolist() == [0, 2, 3, 5, 6, 7, 1, 4]


def test_small_numbers_are_clamped_to_the_largest_over_2_to_the_32() -> None:
    encoded = logfmt.encode(torch.tensor([2.0**40, 1, 2.0**8]), 8)
    assert encoded.codes().tolist() == [127, 1, 1]
    assert encoded.decode().tolist() == [2.0**40, 2.0**8, 2.0**8]
    assert encoded.step.tolist() == pytest.approx([0.1760], abs=5e-5)


@pytest.mark.parametrize(("bits", "expected"), [(6, 24.55), (8, 36.99), (10, 49.15)])
def test_logfmt_of_normal_numbers_has_its_error(bits: int, expected: float) -> None:
    found = logfmt_db(numbers("normal"), bits)
    print(f"LogFMT-{bits} normal {found:.2f} dB, expected {expected}")
    assert found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("distribution", "expected"), [("laplace", 36.17), ("student", 36.96)])
def test_logfmt_8_of_long_tails_has_its_error(distribution: str, expected: float) -> None:
    found = logfmt_db(numbers(distribution), 8)
    print(f"LogFMT-8 {distribution} {found:.2f} dB, expected {expected}")
    assert found == pytest.approx(expected, abs=TOLERANCE_DB[distribution])


@pytest.mark.parametrize(
    ("format", "distribution", "expected"),
    [(E4M3, "normal", 31.80), (E5M2, "normal", 25.80), (E4M3, "laplace", 32.10), (E4M3, "student", 33.09)],
    ids=["e4m3-normal", "e5m2-normal", "e4m3-laplace", "e4m3-student"],
)
def test_fp8_in_tiles_has_its_error(format: FloatFormat, distribution: str, expected: float) -> None:
    found = fp8_db(numbers(distribution), format)
    print(f"{format.name} {distribution} {found:.2f} dB, expected {expected}")
    assert found == pytest.approx(expected, abs=TOLERANCE_DB[distribution])


def test_bf16_has_its_error() -> None:
    x = numbers("normal")
    assert snr_db(x, formats.round_to(x, BF16)) == pytest.approx(55.58, abs=0.1)


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student"])
def test_logfmt_8_is_3_db_above_both_kinds_of_fp8(distribution: str) -> None:
    x = numbers(distribution)
    assert logfmt_db(x, 8) > fp8_db(x, E4M3) + 3
    assert logfmt_db(x, 8) > fp8_db(x, E5M2) + 3


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student"])
def test_logfmt_10_is_nearer_to_bf16_than_to_logfmt_8(distribution: str) -> None:
    x = numbers(distribution)
    bf16, ten, eight = snr_db(x, formats.round_to(x, BF16)), logfmt_db(x, 10), logfmt_db(x, 8)
    assert eight < ten < bf16
    assert bf16 - ten < ten - eight


def test_logfmt_8_steps_as_e4m3_where_a_tile_spans_15_75_octaves() -> None:
    # E4M3 has 8 values in an octave.
    encoded = logfmt.encode(torch.tensor([1.0, 2.0**15.75]), 8)
    assert encoded.step.tolist() == pytest.approx([math.log(2) / 8], rel=1e-6)


@pytest.mark.parametrize(("bits", "log_bias"), [(4, 9.57e-2), (6, 4.15e-3), (8, 2.44e-4)])
def test_rounding_in_linear_space_has_no_bias_and_rounding_logarithms_has(bits: int, log_bias: float) -> None:
    x = numbers("uniform", rows=4 * ROWS)
    encoded, exact = logfmt.encode(x, bits), x.double()
    error = encoded.decode().double() - exact
    step, smallest = encoded.step.double(), encoded.min.double()
    rounded_logs = torch.exp(smallest + step * ((exact.log() - smallest) / step).round())
    log_error = rounded_logs - exact
    linear = float(error.mean() / exact.mean())
    by_logs = float(log_error.mean() / exact.mean())
    chance = float(error.std() / math.sqrt(error.numel()) / exact.mean())
    print(f"LogFMT-{bits} bias of the mean: linear {linear:+.1e} (standard error {chance:.1e}), log {by_logs:+.2e}")
    assert abs(linear) < 4 * chance
    assert by_logs == pytest.approx(log_bias, rel=0.02, abs=4 * chance)
    assert by_logs > 10 * chance


def test_bytes_of_a_token_of_deepseek_v3() -> None:
    x = torch.randn(1, 7168, generator=torch.Generator().manual_seed(0))
    ten, eight = logfmt.encode(x, 10), logfmt.encode(x, 8)
    # DeepEP counts 4 bytes for a tile, two BF16 numbers; ours are FP32.
    assert ten.packed.nbytes + 4 * ten.low.numel() == 9_184
    assert ten.num_bytes == 9_408
    assert eight.num_bytes == 7_616
    assert x.bfloat16().nbytes == 14_336
    codes = formats.encode(x, E4M3)
    assert codes.nbytes + 4 * ten.low.numel() == 7_392
