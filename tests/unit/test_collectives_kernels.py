"""Reduction kernels of each instruction set: bit for bit against numpy twins, and against PyTorch's casts and fp64."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.collectives import _native, reference
from cofire.collectives.elements import Element, Isa, Op
from cofire.collectives.reference import MINI_FORMATS, STORAGE
from cofire.errors import CollectiveError

COUNTS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 1013)
GUARD_BYTES = 64
TORCH_TYPES = {
    Element.F16: torch.float16,
    Element.BF16: torch.bfloat16,
    Element.E4M3: torch.float8_e4m3fn,
    Element.E5M2: torch.float8_e5m2,
}
SPECIAL = {
    Element.F32: [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF],
    Element.F64: [0, 1, 0xFFFFFFFFFFFFF, 1 << 52, 0x3FF << 52, (0x7FF << 52) - 1, 0x7FF << 52, (0x7FF << 52) + 1],
    Element.F16: [0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF],
    Element.BF16: [0, 1, 0x7F, 0x80, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF],
    Element.E4M3: [0, 1, 7, 8, 0x38, 0x7D, 0x7E, 0x7F],
    Element.E5M2: [0, 1, 3, 4, 0x3C, 0x7B, 0x7C, 0x7D, 0x7E, 0x7F],
    Element.I32: [0, 1, 2, 3, 0x7FFF, 0x10000, 0x7FFFFFFE, 0x7FFFFFFF],
    Element.I64: [0, 1, 2, 3, 0xFFFFFFFF, 1 << 32, (1 << 63) - 2, (1 << 63) - 1],
}


def _isa_parameters() -> list[object]:
    def marks(isa: Isa) -> list[pytest.MarkDecorator]:
        return [] if _native.has_isa(isa) else [pytest.mark.skip(reason=f"this processor has no {isa.name}")]

    return [pytest.param(isa, marks=marks(isa), id=isa.name.lower()) for isa in Isa]


each_isa = pytest.mark.parametrize("isa", _isa_parameters())
each_element = pytest.mark.parametrize("element", list(Element), ids=lambda element: element.name.lower())


def _ops(element: Element) -> list[Op]:
    return [op for op in Op if element.is_integer or not op.is_bitwise]


def _bits(values: np.ndarray) -> np.ndarray:
    """Return an array's bits, so that NaN and the sign of zero compare."""
    return values.view(f"u{values.dtype.itemsize}")


def _native_reduce(
    isa: Isa, element: Element, op: Op, sources: Sequence[np.ndarray], divisor: float = 1.0, offset_bytes: int = 0
) -> np.ndarray:
    """Run a kernel on copies that start at any address and end where the memory does; the target has guards."""
    dtype, count = STORAGE[element], sources[0].size
    copies = []
    for source in sources:
        copy = np.empty(offset_bytes + source.nbytes, np.uint8)
        copy[offset_bytes:] = source.view(np.uint8)
        copies.append(copy)
    target = np.full(offset_bytes + count * dtype.itemsize + GUARD_BYTES, 0xA5, np.uint8)
    addresses = [copy.ctypes.data + offset_bytes for copy in copies]
    _native.reduce(isa, element, op, target.ctypes.data + offset_bytes, addresses, count, divisor)
    end = offset_bytes + count * dtype.itemsize
    assert (np.delete(target, slice(offset_bytes, end)) == 0xA5).all(), "wrote outside its target"
    for copy, source in zip(copies, sources, strict=True):
        assert copy[offset_bytes:].tobytes() == source.tobytes(), "wrote into a source"
    return target[offset_bytes:end].copy().view(dtype)


def _hard_values(element: Element, num_sources: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """Make sources of random bits, of numbers of one size, and of special values that meet each other."""
    random = np.random.default_rng(seed)
    dtype = STORAGE[element]
    size_bits = 8 * dtype.itemsize
    special = np.array(SPECIAL[element], np.uint64)
    special = np.concatenate([special, special | np.uint64(1 << (size_bits - 1))]).astype(f"u{dtype.itemsize}")
    sources = []
    for _ in range(num_sources):
        bits = random.integers(0, 1 << 32, 2 * count, np.uint32).view(f"u{dtype.itemsize}")[:count].copy()
        kind = random.integers(0, 3, count)
        near_one = _near_one(element, random.standard_normal(count))
        bits = np.where(kind == 0, bits, np.where(kind == 1, random.choice(special, count), _bits(near_one)))
        sources.append(bits.astype(f"u{dtype.itemsize}").view(dtype))
    return sources


def _near_one(element: Element, values: np.ndarray) -> np.ndarray:
    if element in TORCH_TYPES:
        cast = torch.from_numpy(values).to(torch.float32).to(TORCH_TYPES[element])
        return cast.view(torch.uint8).numpy().view(STORAGE[element])
    if element.is_integer:
        return (values * 1000).astype(STORAGE[element])
    return values.astype(STORAGE[element])


@each_isa
@each_element
@pytest.mark.parametrize("num_sources", [1, 2, 3, 8])
def test_each_kernel_returns_the_bits_of_its_twin(isa: Isa, element: Element, num_sources: int) -> None:
    sources = _hard_values(element, num_sources, max(COUNTS), seed=num_sources)
    for op in _ops(element):
        divisor = 3.0 if op is Op.AVERAGE else 1.0
        expected = reference.reduce(element, op, sources, divisor)
        for count in COUNTS:
            got = _native_reduce(isa, element, op, [source[:count] for source in sources], divisor)
            wrong = np.flatnonzero(_bits(got) != _bits(expected[:count]))
            assert not wrong.size, (
                f"{op.name}, {count} elements: element {wrong[0]} of {[hex(_bits(s)[wrong[0]]) for s in sources]} is "
                f"{_bits(got)[wrong[0]]:#x}, not {_bits(expected)[wrong[0]]:#x}"
            )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_at_any_address_reduce_to_the_twins_bits(data: st.DataObject) -> None:
    element = data.draw(st.sampled_from(list(Element)))
    op = data.draw(st.sampled_from(_ops(element)))
    isa = data.draw(st.sampled_from([isa for isa in Isa if _native.has_isa(isa)]))
    count, num_sources = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 5))
    divisor = float(data.draw(st.integers(1, 2000)))
    dtype = STORAGE[element]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sources = [np.frombuffer(random.bytes(count * dtype.itemsize), dtype) for _ in range(num_sources)]
    got = _native_reduce(isa, element, op, sources, divisor, offset_bytes=data.draw(st.integers(0, 63)))
    assert got.tobytes() == reference.reduce(element, op, sources, divisor).tobytes()


@each_isa
@each_element
def test_the_target_may_be_any_one_of_the_sources(isa: Isa, element: Element) -> None:
    sources = _hard_values(element, 3, 257)
    for op in _ops(element):
        expected = reference.reduce(element, op, sources, 3.0)
        for target in range(3):
            copies = [source.copy() for source in sources]
            addresses = [copy.ctypes.data for copy in copies]
            _native.reduce(isa, element, op, addresses[target], addresses, 257, 3.0)
            assert copies[target].tobytes() == expected.tobytes(), f"{op.name} into source {target}"
            for other in {0, 1, 2} - {target}:
                assert copies[other].tobytes() == sources[other].tobytes()


@pytest.mark.parametrize("element", list(TORCH_TYPES), ids=lambda element: element.name.lower())
def test_every_bit_pattern_decodes_as_in_pytorch(element: Element) -> None:
    patterns = _all_patterns(element)
    ours, theirs = reference.decode(element, patterns), _to_torch(element, patterns).float().numpy()
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    known = ~np.isnan(ours)
    assert (_bits(ours)[known] == _bits(theirs)[known]).all()


@each_isa
@pytest.mark.parametrize("element", list(TORCH_TYPES), ids=lambda element: element.name.lower())
def test_every_number_survives_a_sum_of_itself_alone(isa: Isa, element: Element) -> None:
    patterns = _all_patterns(element)
    is_nan = _to_torch(element, patterns).isnan().numpy()
    got = _native_reduce(isa, element, Op.SUM, [patterns])
    assert (got[~is_nan] == patterns[~is_nan]).all()
    assert (got[is_nan] == MINI_FORMATS[element].nan).all()
    assert _to_torch(element, got[is_nan]).isnan().all()


@each_isa
@pytest.mark.parametrize("op", [Op.SUM, Op.PRODUCT, Op.AVERAGE, Op.MIN, Op.MAX], ids=lambda op: op.name.lower())
@pytest.mark.parametrize("element", [Element.E4M3, Element.E5M2], ids=lambda element: element.name.lower())
def test_every_pair_of_fp8_numbers_reduces_as_pytorch_computes_and_casts(isa: Isa, element: Element, op: Op) -> None:
    patterns = _all_patterns(element)
    first, second = np.repeat(patterns, 256), np.tile(patterns, 256)
    got = _native_reduce(isa, element, op, [first, second], 2.0)
    a, b = _to_torch(element, first).float(), _to_torch(element, second).float()
    exact = {
        Op.SUM: a + b,
        Op.PRODUCT: a * b,
        Op.AVERAGE: (a + b) / 2,
        Op.MIN: torch.minimum(a, b),
        Op.MAX: torch.maximum(a, b),
    }[op]
    _assert_cast_of(element, got, exact)
    if op in (Op.MIN, Op.MAX):
        zeros = ((a == 0) & (b == 0)).numpy()
        some, both = (first | second) & 0x80, first & second & 0x80
        assert ((got & 0x80)[zeros] == (some if op is Op.MIN else both)[zeros]).all()


@pytest.mark.parametrize("element", list(TORCH_TYPES), ids=lambda element: element.name.lower())
def test_random_and_halfway_numbers_encode_as_in_pytorch(element: Element) -> None:
    random = np.random.default_rng(5)
    patterns = reference.decode(element, _all_patterns(element))
    finite = np.unique(patterns[np.isfinite(patterns)]).astype(np.float64)
    halfway = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)  # Exact: one more bit than the type has.
    values = np.concatenate(
        [
            random.integers(0, 1 << 32, 300_000, np.uint32).view(np.float32),
            (random.standard_normal(300_000) * np.exp2(random.integers(-30, 20, 300_000))).astype(np.float32),
            halfway,
            np.nextafter(halfway, np.float32(np.inf)),
            np.nextafter(halfway, np.float32(-np.inf)),
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 448, 464, np.nextafter(np.float32(464), 500)], np.float32),
        ]
    )
    _assert_cast_of(element, reference.encode(element, values), torch.from_numpy(values))


@each_isa
@pytest.mark.parametrize("element", [Element.F16, Element.BF16], ids=lambda element: element.name.lower())
def test_sums_and_products_of_16_bit_numbers_round_as_pytorch_casts(isa: Isa, element: Element) -> None:
    random = np.random.default_rng(6)
    first, second = (random.integers(0, 1 << 16, 200_000, np.uint16) for _ in range(2))
    a, b = _to_torch(element, first).float(), _to_torch(element, second).float()
    _assert_cast_of(element, _native_reduce(isa, element, Op.SUM, [first, second]), a + b)
    _assert_cast_of(element, _native_reduce(isa, element, Op.PRODUCT, [first, second]), a * b)


@each_isa
@pytest.mark.parametrize("element", [Element.F32, Element.F64, *TORCH_TYPES], ids=lambda element: element.name.lower())
def test_a_sum_is_within_the_error_bound_of_the_exact_sum(isa: Isa, element: Element) -> None:
    """n - 1 roundings of the accumulator, each at most its unit of the sum of magnitudes; then one of the type."""
    random = np.random.default_rng(8)
    num_sources = 8
    sources = [_near_one(element, random.standard_normal(4001)) for _ in range(num_sources)]
    got = _numbers(element, _native_reduce(isa, element, Op.SUM, sources))
    columns = np.stack([_numbers(element, source) for source in sources], axis=1)
    unit = 2.0**-53 if element is Element.F64 else 2.0**-24
    for row, result in zip(columns, got, strict=True):
        exact = math.fsum(row)
        in_accumulator = (num_sources - 1) * unit * 1.01 * math.fsum(abs(row))
        bound = in_accumulator
        if element in MINI_FORMATS:
            form = MINI_FORMATS[element]
            bound += 2.0 ** -(form.mantissa_bits + 1) * (abs(exact) + in_accumulator)
            bound += 2.0 ** (form.smallest_exponent - form.mantissa_bits - 1)
        assert abs(result - exact) <= bound


@each_isa
@each_element
def test_flushing_of_denormals_changes_nothing_and_stays_as_it_was(isa: Isa, element: Element) -> None:
    sources = _hard_values(element, 3, 999)
    denormal = torch.tensor([1e-40])
    for op in _ops(element):
        expected = reference.reduce(element, op, sources, 3.0)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush denormals")
        try:
            got = _native_reduce(isa, element, op, sources, 3.0)
            flushed = (denormal * 1.0).item()
        finally:
            torch.set_flush_denormal(False)
        assert got.tobytes() == expected.tobytes()
        assert flushed == 0.0


@contextmanager
def _rounding_upward() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    before = library.fegetround()
    assert library.fesetround(0x800) == 0
    try:
        yield library
    finally:
        library.fesetround(before)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a rounding mode is that of x86")
@each_isa
@each_element
def test_the_rounding_mode_of_the_caller_changes_nothing_and_stays(isa: Isa, element: Element) -> None:
    sources = [_near_one(element, np.random.default_rng(seed).standard_normal(999)) for seed in range(3)]
    for op in _ops(element):
        expected = reference.reduce(element, op, sources, 3.0)
        with _rounding_upward() as library:
            got = _native_reduce(isa, element, op, sources, 3.0)
            mode = library.fegetround()
        assert got.tobytes() == expected.tobytes()
        assert mode == 0x800


def test_the_widest_instruction_set_is_one_that_the_processor_has() -> None:
    best = Isa(_native.best_isa())
    assert [isa for isa in Isa if _native.has_isa(isa)][-1] is best
    assert _native.has_isa(Isa.SCALAR)
    assert not any(_native.has_isa(unknown) for unknown in (-1, 3))


def test_the_core_and_python_agree_on_sizes_and_operations() -> None:
    for element in Element:
        assert _native.element_size(element) == element.size_bytes == STORAGE[element].itemsize
        assert [op for op in Op if _native.is_supported(element, op)] == _ops(element)
    assert [_native.element_size(unknown) for unknown in (-1, 8)] == [0, 0]
    assert not _native.is_supported(Element.I32, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isa": 3}, "instruction set 3"),
        ({"element": 8}, "element type 8"),
        ({"op": Op.BIT_XOR}, "operation 7 is not for element type 0"),
        ({"op": 8}, "operation 8"),
        ({"sources": []}, "no sources"),
        ({"count": -1}, "count -1"),
        ({"count": 2**62}, "count 4611686018427387904"),
        ({"target": 0}, "target has no address"),
        ({"sources": [0]}, "source has no address"),
        ({"op": Op.AVERAGE, "divisor": 0.0}, "divisor 0.0"),
        ({"op": Op.AVERAGE, "divisor": math.nan}, "divisor"),
        ({"op": Op.AVERAGE, "divisor": 2.5, "element": Element.I32}, "divisor 2.5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_call_that_breaks_a_rule_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    memory = np.zeros(64, np.float32)
    address = memory.ctypes.data
    call: dict[str, object] = {
        "isa": Isa.SCALAR,
        "element": Element.F32,
        "op": Op.SUM,
        "target": address,
        "sources": [address],
        "count": 4,
        "divisor": 1.0,
    }
    _native.reduce(**call)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        _native.reduce(**{**call, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("apart_bytes", [-15, -4, 4, 15])
def test_memory_that_overlaps_in_part_is_refused(apart_bytes: int) -> None:
    memory = np.zeros(64, np.float32)
    source = memory.ctypes.data + 64
    with pytest.raises(ValueError, match="overlap"):
        _native.reduce(Isa.SCALAR, Element.F32, Op.SUM, source + apart_bytes, [source], 4)
    for apart in (-16, 16):
        _native.reduce(Isa.SCALAR, Element.F32, Op.SUM, source + apart, [source], 4)


def test_the_twin_refuses_what_the_kernels_refuse() -> None:
    numbers = np.zeros(3, np.float32)
    with pytest.raises(CollectiveError, match="BIT_AND of F32"):
        reference.reduce(Element.F32, Op.BIT_AND, [numbers])
    with pytest.raises(CollectiveError, match="1 source or more"):
        reference.reduce(Element.F32, Op.SUM, [])
    with pytest.raises(CollectiveError, match="float32 does not hold BF16"):
        reference.reduce(Element.BF16, Op.SUM, [numbers])


def _all_patterns(element: Element) -> np.ndarray:
    dtype = STORAGE[element]
    return np.arange(1 << (8 * dtype.itemsize), dtype=np.uint32).astype(dtype)


def _to_torch(element: Element, bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.uint8).copy()).view(TORCH_TYPES[element])


def _numbers(element: Element, values: np.ndarray) -> np.ndarray:
    return (reference.decode(element, values) if element in MINI_FORMATS else values).astype(np.float64)


def _assert_cast_of(element: Element, got: np.ndarray, exact: torch.Tensor) -> None:
    """Compare with PyTorch's cast; in e4m3, where it may saturate, NaN is due for what rounds beyond 448."""
    expected = exact.to(TORCH_TYPES[element])
    is_nan = expected.isnan().numpy()
    if element is Element.E4M3:
        is_nan |= ~(exact.abs() <= 464).numpy()
    expected_bits = expected.view(torch.uint8).numpy().view(STORAGE[element])
    assert (got[is_nan] == MINI_FORMATS[element].nan).all()
    wrong = np.flatnonzero((got != expected_bits) & ~is_nan)
    # Zeros may be of either sign: minimum and maximum order them, PyTorch takes either.
    magnitudes = got[wrong] & (MINI_FORMATS[element].sign - 1)
    wrong = wrong[(exact.numpy()[wrong] != 0) | (magnitudes != 0)]
    assert not wrong.size, f"{exact[wrong[0]]} became {got[wrong[0]]:#x}, not {expected_bits[wrong[0]]:#x}"
