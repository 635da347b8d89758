"""Hopper's accumulation: bit for bit against fractions, and against FP64 where nothing is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision import accumulate as module
from cofire.precision.accumulate import HOPPER, AccumulatorSpec, accumulate, error_ladder, scaled_gemm_reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Bits of exponent and mantissa, and the codes, without sign, below infinity and NaN.
LAYOUTS = {E4M3: (4, 3, 0x7F), E5M2: (5, 2, 0x7C)}
# So wide that nothing is lost where sums stay below 2**20.
WIDE = AccumulatorSpec(kept_bits=46, accumulator_bits=53, interval=None)
Number = tuple[Fraction, int]


def _read(code: int, dtype: torch.dtype) -> Number:
    """Return the value of a code and the exponent that the hardware goes by."""
    exponent_bits, mantissa_bits, _ = LAYOUTS[dtype]
    field, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    exponent = max(field, 1) - (2 ** (exponent_bits - 1) - 1)
    significand = Fraction(mantissa, 1 << mantissa_bits) + (field > 0)
    return (-1 if code & 0x80 else 1) * significand * Fraction(2) ** exponent, exponent


def _floor_log2(value: Fraction) -> int:
    value = abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def _cut(value: Fraction, bits: int) -> Fraction:
    if value == 0:
        return value
    unit = Fraction(2) ** (_floor_log2(value) - bits + 1)
    return math.trunc(value / unit) * unit


def _to_fp32(value: Fraction) -> Fraction:
    if value == 0:
        return value
    unit = Fraction(2) ** (max(_floor_log2(value), -126) - 23)
    return round(value / unit) * unit


def _slow_dot(
    a: Sequence[Number], b: Sequence[Number], spec: AccumulatorSpec, scales: Sequence[tuple[Fraction, Fraction]] = ()
) -> Fraction:
    """Add one dot product in fractions, as the module's docstring says; scales are for 128 elements each."""
    total = Fraction(0)
    interval = spec.interval or max(1, len(a))
    for start in range(0, len(a), interval):
        stop = min(start + interval, len(a))
        acc = Fraction(0)
        for first in range(start, stop, spec.group):
            group = slice(first, min(first + spec.group, stop))
            pairs = list(zip(a[group], b[group], strict=True))
            exponents = [x[1] + y[1] for x, y in pairs if x[0] and y[0]] + ([_floor_log2(acc)] if acc else [])
            if exponents:
                unit = Fraction(2) ** (max(exponents) - spec.kept_bits + 1)
                terms = [math.trunc(x[0] * y[0] / unit) for x, y in pairs] + [math.trunc(acc / unit)]
                acc = _cut(sum(terms) * unit, spec.accumulator_bits)
        factor = Fraction(1)
        if scales:
            of_a, of_b = scales[start // 128]
            factor = _to_fp32(of_a * of_b)
        total = _to_fp32(total + factor * _to_fp32(acc))
    return total


def _tensor(codes: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(codes, dtype=torch.uint8).view(dtype)


def _assert_same(got: Tensor, expected: list[list[Fraction]]) -> None:
    assert got.dtype == torch.float32
    values = torch.tensor([[float(each) for each in row] for row in expected], dtype=torch.float64)
    assert torch.equal(got.double(), values), f"{got.tolist()} instead of {values.tolist()}"
    assert not torch.signbit(got[got == 0]).any()


@st.composite
def _codes(draw: st.DrawFn, dtype: torch.dtype, k: int) -> list[int]:
    """Draw one side of a dot product: any numbers, the extremes of the range, near-equal ones, zeros, one sign."""
    end = LAYOUTS[dtype][2]
    magnitudes = {
        "any": st.integers(0, end - 1),
        "extremes": st.sampled_from([0, 1, 2, 7, 8, 9, end - 2, end - 1]),
        "near": st.integers(end // 2 - 4, end // 2 + 4),
        "zeros": st.sampled_from([0, 0, 0, 0, 0, 0, 0, end // 2]),
    }[draw(st.sampled_from(["any", "extremes", "near", "zeros"]))]
    sign = draw(st.sampled_from([st.just(0), st.just(0x80), st.sampled_from([0, 0x80])]))
    return [draw(magnitudes) | draw(sign) for _ in range(k)]


@st.composite
def _specs(draw: st.DrawFn) -> AccumulatorSpec:
    group = draw(st.sampled_from([1, 4, 16, 32, 32]))
    interval = draw(st.sampled_from([None, 1, 2, 4]))
    kept, width = draw(
        st.sampled_from([(14, 14), (14, 14), (14, 24), (4, 4), (12, 53), (18, 14), (23, 24), (46, 53), (1, 1)])
    )
    return AccumulatorSpec(group, kept, width, interval and interval * group)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_product_has_the_bits_of_a_sum_in_fractions(data: st.DataObject) -> None:
    of_a, of_b = data.draw(st.sampled_from([(E4M3, E4M3), (E4M3, E4M3), (E5M2, E4M3), (E5M2, E5M2)]))
    k, spec = data.draw(st.sampled_from([1, 2, 31, 32, 33, 64, 70, 130])), data.draw(_specs())
    a = [data.draw(_codes(of_a, k)) for _ in range(2)]
    b = [data.draw(_codes(of_b, k))]
    if of_a == of_b and k % 2 == 0 and data.draw(st.booleans()):  # Each product meets its negative in the other half.
        a[0] = a[0][: k // 2] + [code ^ 0x80 for code in a[0][: k // 2]]
        b[0] = b[0][: k // 2] * 2
    got = accumulate(_tensor(a, of_a), _tensor(b, of_b), spec)
    rows = [[_read(code, of_a) for code in row] for row in a]
    columns = [[_read(code, of_b) for code in row] for row in b]
    _assert_same(got, [[_slow_dot(row, column, spec) for column in columns] for row in rows])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_random_matrices_have_the_bits_of_sums_in_fractions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, 300, generator=generator).to(dtype) for size in (5, 4))
    rows, columns = ([[_read(int(c), dtype) for c in row] for row in x.view(torch.uint8)] for x in (a, b))
    for spec in (HOPPER, AccumulatorSpec(interval=None), AccumulatorSpec(interval=32)):
        _assert_same(accumulate(a, b, spec), [[_slow_dot(row, column, spec) for column in columns] for row in rows])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_scaled_products_are_promoted_with_one_rounding(data: st.DataObject) -> None:
    # Scales of 24 bits and of far-apart sizes: FP64 alone would round some of these sums twice.
    scale = st.builds(
        math.ldexp, st.integers(2**23, 2**24 - 1), st.sampled_from([-60, -33, -30, -24, -24, -23, -12, 0])
    )
    k = data.draw(st.sampled_from([128, 200, 300]))
    spec = AccumulatorSpec(interval=data.draw(st.sampled_from([32, 64, 128])))
    a, b = data.draw(_codes(E4M3, k)), data.draw(_codes(E4M3, k))
    of_a, of_b = ([data.draw(scale) for _ in range(-(-k // 128))] for _ in range(2))
    got = scaled_gemm_reference(
        _tensor([a], E4M3), torch.tensor([of_a]), _tensor([b], E4M3), torch.tensor([of_b]), spec
    )
    numbers = [[_read(code, E4M3) for code in codes] for codes in (a, b)]
    scales = [(Fraction(x), Fraction(y)) for x, y in zip(of_a, of_b, strict=True)]
    _assert_same(got, [[_slow_dot(*numbers, spec, scales)]])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2**23, 2**24 - 1),
    st.integers(2**23, 2**24 - 1),
    st.integers(2**23, 2**24 - 1),
    st.integers(-60, 60),
    st.booleans(),
)
def test_a_fused_multiply_add_rounds_like_fractions(x: int, y: int, z: int, shift: int, negative: bool) -> None:
    addend = math.ldexp(-z if negative else z, shift)
    got = module._fused_multiply_add(*(torch.tensor([float(each)]) for each in (x, y, addend)))
    assert Fraction(got.item()) == _to_fp32(Fraction(x) * y + Fraction(addend))


@pytest.mark.parametrize(
    ("x", "y", "z", "expected"),
    [
        # 2**36 + 1 beside 2**60: FP64 drops the 1, which decides a tie of FP32.
        (2.0**12 + 1, 2.0**24 - 2.0**12 + 1, 2.0**60, 2.0**60 + 2.0**37),
        (2.0**18 - 1, 2.0**18 + 1, 2.0**60 + 2.0**37, 2.0**60 + 2.0**37),
    ],
)
def test_a_fused_multiply_add_keeps_the_side_of_a_tie(x: float, y: float, z: float, expected: float) -> None:
    for sign in (1, -1):
        got = module._fused_multiply_add(*(torch.tensor([value]) for value in (sign * x, y, sign * z)))
        assert got.item() == sign * expected
    assert torch.tensor([x * y + z]).float().item() != expected, "FP64 would do"


def test_the_widths_are_those_of_the_papers() -> None:
    assert AccumulatorSpec(group=32, kept_bits=14, accumulator_bits=14, interval=128) == HOPPER
    # 13 fraction bits: beside 1.0 a product of 2**-13 counts and one of 2**-14 does not, however many there are.
    a = torch.tensor([[1.0] + [2.0**-7] * 31])
    for size, expected in ((2.0**-6, 1 + 31 * 2.0**-13), (2.0**-7, 1.0)):
        assert accumulate(a, torch.tensor([[1.0] + [size] * 31])).item() == expected


def test_an_aligned_term_is_cut_towards_zero_in_both_directions() -> None:
    # 1.75 * 2**-13 keeps 2**-13 of itself beside 1.0, negative or not.
    for sign in (1.0, -1.0):
        a, b = torch.tensor([[sign, sign * 1.75 * 2.0**-6]]), torch.tensor([[1.0, 2.0**-7]])
        assert b[0, 1] == b.to(E4M3).float()[0, 1]
        assert accumulate(a, b).item() == sign * (1 + 2.0**-13)


def test_a_sum_wider_than_fp32_is_cut_and_not_rounded() -> None:
    # 20 * 448**2 - 2**-6 takes 28 bits; FP32 would round it up, 24 bits cut towards zero do not.
    a = torch.tensor([[448.0] * 20 + [2.0**-3]])
    b = torch.tensor([[448.0] * 20 + [-(2.0**-3)]])
    got = accumulate(a, b, AccumulatorSpec(kept_bits=23, accumulator_bits=24))
    assert got.item() == 20 * 448**2 - 0.25


def test_a_large_partial_sum_swallows_what_promotion_keeps() -> None:
    # 448 * 448 in the first interval; ones after it are below its last bit unless the accumulator starts again.
    a = torch.ones(1, 256)
    a[0, 0] = 448
    b = a.clone()
    assert accumulate(a, b, AccumulatorSpec(interval=None)).item() == 448**2
    assert accumulate(a, b).item() == 448**2 + 128
    assert accumulate(a, b, WIDE).item() == 448**2 + 255


def test_subnormals_align_at_the_smallest_exponent_of_their_format() -> None:
    # E4M3's smallest number is 2**-9 with exponent -6, so the pair's largest exponent is -12 and nothing above it.
    tiny = torch.tensor([[2.0**-9]])
    spec = AccumulatorSpec(kept_bits=6)
    assert accumulate(tiny, tiny, spec).item() == 0.0
    assert accumulate(tiny, tiny, AccumulatorSpec(kept_bits=7)).item() == 2.0**-18
    # E5M2 goes down to 2**-16; there the same number is normal and keeps its only bit.
    assert accumulate(tiny.to(E5M2), tiny.to(E5M2), AccumulatorSpec(kept_bits=1)).item() == 2.0**-18


def test_with_enough_bits_it_is_the_fp64_sum_rounded() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(size, 1000, generator=generator).mul(40).to(E4M3) for size in (17, 9))
    expected = (a.double() @ b.double().T).float()
    assert torch.equal(accumulate(a, b, WIDE), expected)
    assert not torch.equal(accumulate(a, b, AccumulatorSpec(interval=None)), expected)


def test_order_within_a_group_does_not_matter_and_order_of_groups_does() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(6, 256, generator=generator).to(E4M3) for _ in range(2))
    within = torch.cat([first + torch.randperm(32, generator=generator) for first in range(0, 256, 32)])
    of_groups = torch.cat([first + torch.arange(32) for first in range(224, -1, -32)])
    expected = accumulate(a, b, AccumulatorSpec(interval=None))
    for order, same in ((within, True), (of_groups, False)):
        got = accumulate(*(x.float()[:, order].to(E4M3) for x in (a, b)), AccumulatorSpec(interval=None))
        assert torch.equal(got, expected) is same
    # Where nothing is cut, the order of groups does not matter either.
    assert torch.equal(accumulate(*(x.float()[:, of_groups] for x in (a, b)), WIDE), accumulate(a, b, WIDE))


def test_an_interval_of_the_whole_contraction_is_none() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(8, 320, generator=generator).to(E4M3) for _ in range(2))
    never = accumulate(a, b, AccumulatorSpec(interval=None))
    for interval in (320, 352, 32000):
        assert torch.equal(accumulate(a, b, AccumulatorSpec(interval=interval)), never)
    assert not torch.equal(accumulate(a, b, AccumulatorSpec(interval=288)), never)


def test_partial_sums_are_rounded_to_fp32_before_they_are_promoted() -> None:
    generator = torch.Generator().manual_seed(10)
    a, b = (torch.randn(40, 256, generator=generator).mul(3).exp().clamp(max=448).to(E4M3).float() for _ in range(2))
    total = torch.zeros(40, 40)
    for part in torch.arange(256).split(64):
        total += (a[:, part].double() @ b[:, part].double().T).float()
    assert torch.equal(accumulate(a, b, AccumulatorSpec(kept_bits=46, accumulator_bits=53, interval=64)), total)


def test_the_sum_of_negated_operands_is_the_negative() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(8, 200, generator=generator).to(E4M3).float() for _ in range(2))
    assert torch.equal(accumulate(-a, b), -accumulate(a, b))
    assert torch.equal(accumulate(b, a), accumulate(a, b).T)


def test_scales_that_are_powers_of_two_commute_with_everything() -> None:
    generator = torch.Generator().manual_seed(6)
    m, n, k = 5, 130, 300
    a, b = torch.randn(m, k, generator=generator).to(E4M3), torch.randn(n, k, generator=generator).to(E4M3)
    plain = accumulate(a, b)
    of_rows, of_blocks = torch.randint(-20, 20, (m, 1), generator=generator), torch.tensor([[-3], [7]])
    a_scale, b_scale = torch.exp2(of_rows.float()), torch.exp2(of_blocks.float())
    expected = plain * a_scale * b_scale.repeat_interleave(128, 0)[:n].T
    assert torch.equal(scaled_gemm_reference(a, a_scale, b, b_scale), expected)
    in_ue8m0 = [each.to(torch.float8_e8m0fnu) for each in (a_scale.expand(m, 3).contiguous(), b_scale.expand(2, 3))]
    assert torch.equal(scaled_gemm_reference(a, in_ue8m0[0], b, in_ue8m0[1].contiguous()), expected)


def test_each_tile_and_block_gets_its_own_scale() -> None:
    # One product in each of three tiles, and rows of two blocks: every scale is seen once in some element.
    m, n, k = 2, 129, 257
    a, b = torch.zeros(m, k), torch.zeros(n, k)
    a[:, [0, 128, 256]] = b[:, [0, 128, 256]] = 1.0
    a_scale = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    b_scale = torch.tensor([[1.0, 3.0, 5.0], [7.0, 11.0, 13.0]])
    got = scaled_gemm_reference(a, a_scale, b, b_scale)
    expected = a_scale @ b_scale.T
    assert torch.equal(got, expected.repeat_interleave(128, 1)[:, :n])
    by_row = b_scale.repeat_interleave(128, 0)[:n]
    assert torch.equal(scaled_gemm_reference(a, a_scale, b, by_row), got)


def test_one_scale_for_the_tensor_goes_with_any_interval() -> None:
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(3, 400, generator=generator).to(E4M3) for _ in range(2))
    scales = torch.tensor([[0.5]]), torch.tensor([[4.0]])
    for interval in (None, 32, 96, 160, 512):
        spec = AccumulatorSpec(interval=interval)
        assert torch.equal(scaled_gemm_reference(a, scales[0], b, scales[1], spec), 2 * accumulate(a, b, spec))


def test_rows_in_chunks_are_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(7, 96, generator=generator).to(E4M3), torch.randn(3, 96, generator=generator).to(E4M3)
    together = accumulate(a, b)
    monkeypatch.setattr(module, "_CHUNK_PRODUCTS", 2 * 3 * 32)
    assert torch.equal(accumulate(a, b), together)
    a[5, 0], b[1, 40] = torch.nan, torch.nan
    spoiled = accumulate(a, b)
    assert spoiled.isnan().sum() == 7 + 3 - 1
    assert torch.equal(spoiled[:5, [0, 2]], together[:5, [0, 2]])


def test_infinities_and_nans_go_by_ieee() -> None:
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([[inf, 1.0], [-inf, 1.0], [nan, 1.0], [2.0, inf], [inf, -inf]]).to(E5M2)
    b = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).to(E5M2)
    expected = torch.tensor([[inf, nan], [-inf, nan], [nan, nan], [inf, inf], [nan, nan]])
    for got in (accumulate(a, b), scaled_gemm_reference(a, torch.ones(1, 1), b, torch.ones(1, 1))):
        assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


def test_a_scale_that_is_not_finite_shows_in_the_sum() -> None:
    a, b = torch.ones(3, 256), torch.ones(1, 256)
    got = scaled_gemm_reference(a, torch.tensor([[torch.nan], [torch.inf], [-torch.inf]]), b, torch.ones(1, 1))
    assert got[0].isnan().all()
    assert got[1:].flatten().tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 40), (3, 0, 40), (3, 2, 0)])
def test_empty_products_have_their_shape(m: int, n: int, k: int) -> None:
    a, b = torch.zeros(m, k).to(E4M3), torch.zeros(n, k).to(E4M3)
    for spec in (HOPPER, AccumulatorSpec(interval=None)):
        got = accumulate(a, b, spec)
        assert got.shape == (m, n)
        assert not got.any()
        assert scaled_gemm_reference(a, torch.ones(1, 1), b, torch.ones(1, 1), spec).shape == (m, n)


def test_fp32_that_holds_e4m3_is_taken_as_e4m3() -> None:
    generator = torch.Generator().manual_seed(9)
    a, b = (torch.randn(4, 70, generator=generator).mul(0.01).to(E4M3) for _ in range(2))
    assert torch.equal(accumulate(a.float(), b.float()), accumulate(a, b))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccumulatorSpec(group=0), "a group of 0 products adds nothing"),
        (lambda: AccumulatorSpec(kept_bits=47), "kept_bits 47 with groups of 32 must be 1 to 46"),
        (lambda: AccumulatorSpec(kept_bits=0), "kept_bits 0"),
        (lambda: AccumulatorSpec(accumulator_bits=54), "accumulator_bits 54 must be 1 to 53"),
        (lambda: AccumulatorSpec(interval=100), "interval 100 is not a positive multiple of the group of 32; take 96"),
        (lambda: AccumulatorSpec(interval=0), "interval 0 .* take 32"),
        (lambda: accumulate(torch.full((1, 1), 0.3), torch.ones(1, 1)), "a has 0.3, no value of E4M3"),
        (lambda: accumulate(torch.ones(1, 1), torch.full((1, 1), 449.0)), "b has 449, no value of E4M3"),
        (lambda: accumulate(torch.full((1, 1), torch.inf), torch.ones(1, 1)), "a has inf, no value of E4M3"),
        (lambda: accumulate(torch.ones(2), torch.ones(1, 2)), r"a has shape \[2\]; give a matrix"),
        (lambda: accumulate(torch.ones(1, 2), torch.ones(1, 2).half()), "b of torch.float16 is not FP8"),
        (lambda: accumulate(torch.ones(1, 2), torch.ones(2, 1)), "share no contraction"),
        (lambda: accumulate(torch.ones(1, 2), torch.ones(1, 2, device="meta")), "a on cpu and b on meta"),
        (lambda: error_ladder(k=32, inputs="other"), "inputs 'other' are neither"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: object, message: str) -> None:
    with pytest.raises(PrecisionError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("a_scale", "b_scale", "interval", "message"),
    [
        (torch.ones(2, 2), torch.ones(1, 3), 128, r"a_scale \[2, 2\] does not fit; it must be \[2 or 1, 3 or 1\]"),
        (
            torch.ones(2, 3),
            torch.ones(3, 3),
            128,
            r"b_scale \[3, 3\] does not fit; it must be \[2 or 130 or 1, 3 or 1\]",
        ),
        (torch.ones(3), torch.ones(1, 1), 128, r"a_scale \[3\] does not fit"),
        (torch.ones(2, 3).half(), torch.ones(1, 1), 128, "a_scale of torch.float16 is neither"),
        (torch.ones(2, 3), torch.ones(2, 3), None, "interval None promotes sums of several scales"),
        (torch.ones(1, 1), torch.ones(2, 3), 256, "interval 256 .* it must divide 128: take 128"),
        (torch.ones(2, 3), torch.ones(1, 1), 96, "interval 96 .* it must divide 128"),
    ],
)
def test_scales_and_intervals_that_do_not_fit_are_refused(
    a_scale: Tensor, b_scale: Tensor, interval: int | None, message: str
) -> None:
    a, b = torch.ones(2, 300), torch.ones(130, 300)
    with pytest.raises(PrecisionError, match=message):
        scaled_gemm_reference(a, a_scale, b, b_scale, AccumulatorSpec(interval=interval))
