"""Sizes: monomials as packed integers, their classes, several mappings, allowances."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofire.errors import SearchError
from cofire.search.sizes import Allowance, SizeKind, Symbols, product

SYMBOLS = Symbols.of(
    ["C", "H"],
    ["k", "s"],
    [{"C": 64, "H": 28, "k": 3, "s": 2}, {"C": 128, "H": 14, "k": 5, "s": 2}],
)
NUMBERS = SYMBOLS.mappings
EXPONENTS = st.lists(st.integers(-7, 7), min_size=4, max_size=4)


def value(exponents: list[int], mapping: int) -> Fraction:
    return prod((Fraction(n) ** e for n, e in zip(NUMBERS[mapping], exponents, strict=True)), start=Fraction(1))


@given(EXPONENTS, EXPONENTS)
def test_product_and_quotient_are_those_of_the_values_under_every_mapping(a, b):
    x, y = SYMBOLS.from_exponents(a), SYMBOLS.from_exponents(b)
    for mapping in range(2):
        assert (x * y).values[mapping] == value(a, mapping) * value(b, mapping)
        assert (x / y).values[mapping] == value(a, mapping) / value(b, mapping)


@given(EXPONENTS, EXPONENTS, EXPONENTS)
def test_sizes_are_a_commutative_group(a, b, c):
    x, y, z = (SYMBOLS.from_exponents(e) for e in (a, b, c))
    assert x * y == y * x
    assert (x * y) * z == x * (y * z)
    assert x * y / y == x
    assert x / x == SYMBOLS.one
    assert product(SYMBOLS, [x, y, z]) == x * y * z


@given(EXPONENTS)
def test_a_size_is_read_back_from_its_text(exponents):
    size = SYMBOLS.from_exponents(exponents)
    assert SYMBOLS.size(str(size)) is size


@given(EXPONENTS)
def test_a_legal_size_is_whole_and_at_least_one_under_every_mapping(exponents):
    size = SYMBOLS.from_exponents(exponents)
    whole = all(value(exponents, m).denominator == 1 and value(exponents, m) >= 1 for m in range(2))
    assert size.is_legal == (size.kind in (SizeKind.COEFFICIENT, SizeKind.GENERAL) and whole)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1", SizeKind.ONE),
        ("k", SizeKind.COEFFICIENT),
        ("k*s^2", SizeKind.COEFFICIENT),
        ("k/s", SizeKind.ILLEGAL),
        ("1/C", SizeKind.ILLEGAL),
        ("C/s", SizeKind.GENERAL),
        ("C*H", SizeKind.GENERAL),
    ],
)
def test_kind_follows_from_primary_and_coefficient_exponents(text, kind):
    assert SYMBOLS.size(text).kind is kind


def test_a_size_that_divides_under_one_mapping_only_is_not_legal():
    assert SYMBOLS.size("H/s").is_legal
    only_second = Symbols.of(["H"], ["k"], [{"H": 28, "k": 3}, {"H": 15, "k": 3}])
    assert not only_second.size("H/k").is_legal
    with pytest.raises(SearchError, match=r"size H/k is 28/3 under mapping 0"):
        only_second.size("H/k").value(0)
    assert only_second.size("H/k").value(1) == 5


def test_bounds_are_taken_over_all_mappings():
    size = SYMBOLS.size("C*k")
    assert (size.smallest, size.largest) == (192, 640)
    assert SYMBOLS.size("C^2*k/s").degree == 4
    assert SYMBOLS.size("C^2*k/s").primary_part == SYMBOLS.size("C^2")


def test_equal_sizes_are_one_object():
    assert SYMBOLS.size("C*k") is SYMBOLS.size("C") * SYMBOLS.size("k")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Symbols.of(["C"], ["C"], [{"C": 1}]), "symbol 'C' is declared twice"),
        (lambda: Symbols.of(["C"], [], []), "no mapping"),
        (lambda: Symbols.of(["C"], [], [{"C": 0}]), "C = 0 in a mapping"),
        (lambda: Symbols.of(["C"], [], [{}]), "has no number for C"),
        (lambda: Symbols.of(["C"], [], [{"C": 1, "D": 1}]), "a number for D"),
        (lambda: Symbols.of(["C!"], [], [{"C!": 1}]), "is not a name"),
        (lambda: Symbols.of([f"x{i}" for i in range(9)], [], []), "at most 8"),
        (lambda: SYMBOLS.size("X"), "names 'X', which is not among"),
        (lambda: SYMBOLS.size("C^a"), "is not a whole number"),
        (lambda: SYMBOLS.size("C^40"), "beyond 31"),
        (lambda: SYMBOLS.from_exponents([1]), "1 exponents for 4 symbols"),
        (lambda: Symbols(("C",), (), ((1, 2),)), "gives 2 numbers to 1 symbols"),
        (lambda: Allowance.of(SYMBOLS, {"X": 1}), "allowance for 'X'"),
        (lambda: Allowance.of(SYMBOLS, {"C": -1}), "is negative"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line(build, message):
    with pytest.raises(SearchError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_matrix_product_spends_its_inner_dim_twice():
    allowance = Allowance.of(SYMBOLS, {"C": 2})
    reduced = allowance.charge(SYMBOLS.size("C"))
    assert reduced is not None
    shared = reduced.charge(SYMBOLS.size("C"))
    assert shared is not None
    assert shared.left == (0, 0, 0, 0)
    assert shared.charge(SYMBOLS.size("C")) is None


@given(EXPONENTS, EXPONENTS)
def test_a_merge_is_charged_for_exponents_moved_away_from_zero(size, block):
    allowance = Allowance.of(SYMBOLS, {"C": 30, "H": 30, "k": 30, "s": 30})
    after = allowance.charge_merge(SYMBOLS.from_exponents(size), SYMBOLS.from_exponents(block))
    parts = [(a - b, b) for a, b in zip(size, block, strict=True)]
    assert after is not None
    assert after.left == tuple(30 - (abs(x) + abs(y) - abs(x + y)) // 2 for x, y in parts)
