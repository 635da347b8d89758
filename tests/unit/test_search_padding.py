"""Padding is the least that makes every size whole, by brute force over all larger values."""

from __future__ import annotations

from fractions import Fraction
from itertools import product as cartesian
from math import lcm, prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cofire.errors import SearchError
from cofire.search import Assembler, Size, Symbols
from cofire.search.padding import pad, sizes_of

SYMBOLS = Symbols.of(["C", "H", "W"], ["g", "k"], [{"C": 8, "H": 8, "W": 8, "g": 2, "k": 3}])


def padded(mapping: dict[str, int], *sizes: str, **options) -> dict[str, int]:
    return pad(SYMBOLS, mapping, [SYMBOLS.size(text) for text in sizes], **options)


def number(size: Size, mapping: dict[str, int]) -> Fraction:
    return prod(
        (Fraction(mapping[n]) ** e for n, e in zip(size.symbols.names, size.exponents, strict=True)), start=Fraction(1)
    )


def brute_force(mapping: dict[str, int], sizes: list[Size], tensors: list[Size], reach: int) -> dict[str, int]:
    """The best of all values of primaries less than ``reach`` above the given ones."""
    found = []
    for more in cartesian(range(reach), repeat=3):
        values = tuple(mapping[name] + by for name, by in zip("CHW", more, strict=True))
        candidate = mapping | dict(zip("CHW", values, strict=True))
        if all(number(size, candidate).denominator == 1 for size in sizes):
            found.append((sum(number(size, candidate) for size in tensors), values))
    return mapping | dict(zip("CHW", min(found)[1], strict=True))


def least_multiple(sizes: list[Size], mapping: dict[str, int]) -> int:
    """What makes every size whole if each primary is a multiple of it; so no best padding adds as much to one."""
    ones = mapping | dict.fromkeys("CHW", 1)
    return lcm(*(number(size, ones).denominator for size in sizes))


exponents = st.tuples(*[st.integers(0, 2)] * 3, *[st.integers(-2, 1)] * 2).filter(lambda e: any(e[:3]))
mappings = st.fixed_dictionaries(
    {name: st.integers(1, 20) for name in "CHW"} | {"g": st.integers(1, 4), "k": st.integers(1, 3)}
)


@given(mappings, st.lists(exponents, min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_padding_is_the_least_of_all_larger_values(mapping, powers, two_tensors):
    sizes = [SYMBOLS.from_exponents(e) for e in powers]
    reach = least_multiple(sizes, mapping)
    assume(reach <= 12)
    tensors = [SYMBOLS.size("C*H"), SYMBOLS.size("C*W/g")] if two_tensors else []
    best = brute_force(mapping, sizes, tensors or [SYMBOLS.size("C*H*W")], reach)
    assert pad(SYMBOLS, mapping, sizes, tensors) == best


@given(mappings, st.lists(exponents, min_size=1, max_size=4), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_greedy_padding_is_whole_and_never_below_the_exact_one(mapping, powers, max_states):
    sizes = [SYMBOLS.from_exponents(e) for e in powers]
    exact, greedy = (pad(SYMBOLS, mapping, sizes, max_states=most) for most in (20_000, max_states))
    assert all(number(size, greedy).denominator == 1 for size in sizes)
    assert all(greedy[name] >= mapping[name] for name in mapping)
    assert number(SYMBOLS.size("C*H*W"), greedy) >= number(SYMBOLS.size("C*H*W"), exact)


@pytest.mark.parametrize(
    ("changes", "sizes", "expected"),
    [
        ({}, ["C/g", "H/g"], {}),
        ({"C": 62, "g": 4}, ["C/g"], {"C": 64}),
        ({"C": 62, "g": 4}, ["C/g", "C/k"], {"C": 72}),
        ({"H": 7, "W": 9}, ["H*W/g"], {"W": 10}),
        ({"H": 9, "W": 7}, ["H*W/g"], {"H": 10}),
        ({"H": 7, "W": 7}, ["H*W/g"], {"W": 8}),
        ({"H": 7, "W": 100}, ["H*W/g^3", "H/g"], {"H": 8}),
        ({"C": 100, "H": 5}, ["C^2/k^2", "C*H*k/k"], {"C": 102}),
        ({"C": 10, "g": 12, "k": 18}, ["C*k/g"], {}),
        ({"C": 11, "g": 12, "k": 18}, ["C*k/g"], {"C": 12}),
        ({"C": 30, "g": 31}, ["C/g"], {"C": 31}),
    ],
)
def test_padding_of_known_cases(changes, sizes, expected):
    mapping = {"C": 8, "H": 8, "W": 8, "g": 2, "k": 3} | changes
    assert padded(mapping, *sizes) == mapping | expected


def test_the_greedy_way_may_miss_the_least():
    mapping = {"C": 21, "H": 10, "W": 5, "g": 11, "k": 3}
    assert padded(mapping, "C*H^2/g^2/k") == mapping | {"H": 11}
    assert padded(mapping, "C*H^2/g^2/k", max_states=0) == mapping | {"C": 22, "H": 33}


def test_an_operator_exists_at_the_sizes_that_were_padded_for_it():
    mapping = {"N": 3, "C": 62, "H": 29, "g": 4, "k": 3}

    def grouped(symbols: Symbols):
        build = Assembler(symbols)
        n, c, h = build.output("N", "C", "H")
        group, channel = build.merge(c, "C/g")
        r, a = build.reduce("C/g", "k")
        group, r, a = build.contract(inner=[group, r, a], outer=[channel])
        return build.finish(n, build.split(group, r), build.unfold(h, a))

    names = ["N", "C", "H"], ["g", "k"]
    nominal = grouped(Symbols.of(*names, [{"N": 2, "C": 8, "H": 9, "g": 4, "k": 3}]))
    with pytest.raises(SearchError, match="C/g"):
        grouped(Symbols.of(*names, [mapping]))
    found = pad(nominal.symbols, mapping, sizes_of(nominal))
    assert found == mapping | {"C": 64}
    there = grouped(Symbols.of(*names, [found]))
    assert [size.value() for size in there.input_shape] == [3, 64, 29]
    assert [str(size) for size in sizes_of(nominal)] == ["k", "g", "H", "C/g", "C", "N"]


@pytest.mark.parametrize(
    ("mapping", "sizes", "message"),
    [
        ({}, ["k/g"], "size k/g has no primary to pad and is not whole"),
        ({}, ["H/C"], "size H/C divides by a primary symbol"),
        ({"C": 0}, ["C/g"], "C = 0 in a mapping"),
        ({"D": 3}, ["C/g"], "number for D, which is not among"),
    ],
)
def test_what_no_padding_makes_whole_is_refused_in_one_line(mapping, sizes, message):
    with pytest.raises(SearchError, match=message) as caught:
        padded({"C": 8, "H": 8, "W": 8, "g": 2, "k": 3} | mapping, *sizes)
    assert "\n" not in str(caught.value)


def test_sizes_of_other_symbols_are_refused():
    other = Symbols.of(["C"], [], [{"C": 4}])
    with pytest.raises(SearchError, match="size C is of other symbols than C, H, W, g, k"):
        pad(SYMBOLS, dict(zip("CHWgk", (8, 8, 8, 2, 3), strict=True)), [other.size("C")])
    with pytest.raises(SearchError, match="size C/H divides by a primary symbol"):
        pad(SYMBOLS, dict(zip("CHWgk", (8, 8, 8, 2, 3), strict=True)), [], [SYMBOLS.size("C/H")])
