"""Selection against sorting and filtering by hand."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import prod
from random import Random
from statistics import pvariance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import SearchError
from cofire.search import Allowance, Assembler, Operator, Space, Symbols, enumerate_operators
from cofire.search.cost import costs
from cofire.search.selection import Limits, Selector, weight_variance

SYMBOLS = Symbols.of(
    ["N", "Ci", "Co", "H"],
    ["k"],
    [{"N": 1, "Ci": 8, "Co": 16, "H": 12, "k": 3}, {"N": 2, "Ci": 32, "Co": 4, "H": 6, "k": 3}],
)


@cache
def operators() -> tuple[Operator, ...]:
    """A few dozen operators with up to two weights, over two mappings."""
    n, ci, co, h = map(SYMBOLS.size, SYMBOLS.primary)
    allowance = Allowance.of(SYMBOLS, {"Ci": 3, "Co": 2, "k": 2})
    space = Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),), max_tensors=3, max_strides=0, needs_matmul=False)
    return tuple(enumerate_operators(space, 5))


def multiply_adds(operator: Operator) -> int:
    return sum(found.multiply_adds for found in costs(operator))


def parameters(operator: Operator) -> int:
    return sum(prod(size.value(m) for size in shape) for shape in operator.weight_shapes for m in (0, 1))


def spread(operator: Operator) -> Fraction:
    """The variance of weights' sizes by the statistics module."""
    shapes = operator.weight_shapes
    each = [[Fraction(prod(size.value(m) for size in shape)) for shape in shapes] for m in (0, 1)]
    return sum((pvariance(elements) for elements in each if elements), Fraction(0))


def pair(rank: str) -> Operator:
    """x[n, c, h] through two matrices by way of ``rank`` channels."""
    build = Assembler(SYMBOLS)
    n, o, h = build.output("N", "Co", "H")
    c, r = build.reduce("Ci", rank)
    (r,) = build.contract([r], [o])
    build.contract([c], [r])
    return build.finish(n, build.interface[-1], h)


def test_there_is_something_to_choose_from():
    assert len(operators()) > 20
    assert {len(operator.weights) for operator in operators()} == {1, 2}
    assert len({spread(operator) for operator in operators()}) > 5


def test_variance_is_that_of_the_statistics_module():
    assert all(weight_variance(operator) == spread(operator) for operator in operators())


def test_one_weight_comes_before_two_of_unlike_size_that_cost_less():
    build = Assembler(SYMBOLS)
    n, o, h = build.output("N", "Co", "H")
    c, a = build.contract(build.reduce("Ci", "k"), [o])
    dense, low_rank = build.finish(n, c, build.unfold(h, a)), pair("k")
    assert multiply_adds(low_rank) < multiply_adds(dense)
    assert weight_variance(low_rank) == Fraction((48 - 24) ** 2 + (96 - 12) ** 2, 4)
    assert weight_variance(dense) == 0
    assert Selector().select([low_rank, dense]) == [dense, low_rank]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_selection_is_a_filter_and_a_sort_whatever_the_order(data):
    some = data.draw(st.lists(st.sampled_from(operators()), max_size=12))
    keep = data.draw(st.integers(1, 4))
    work = sorted(map(multiply_adds, operators()))
    low, high = sorted(data.draw(st.sampled_from(work)) for _ in "lh")
    most = data.draw(st.sampled_from(sorted(map(parameters, operators()))))
    room = data.draw(st.integers(2000, 12000))
    within = [
        operator
        for operator in set(some)
        if low <= multiply_adds(operator) <= high
        and parameters(operator) <= most
        and max(found.tensor_bytes(2) for found in costs(operator)) <= room
    ]
    best = sorted(within, key=lambda operator: (spread(operator), multiply_adds(operator), operator.digest))[:keep]
    limits = Limits(low, high, max_parameters=most, max_tensor_bytes=room, element_bytes=2)
    selector = Selector(limits, keep)
    assert selector.select(some) == best
    assert Selector(limits, keep).select(reversed(some)) == best
    assert selector.seen == len(set(some))
    assert selector.seen - sum(selector.refused.values()) == len(best)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(min_multiply_adds=10**9), "min_multiply_adds"),
        (Limits(max_multiply_adds=1), "max_multiply_adds"),
        (Limits(max_parameters=1), "max_parameters"),
        (Limits(max_tensor_bytes=1), "max_tensor_bytes"),
    ],
)
def test_refusals_are_counted_by_the_limit_that_refused(limits, name):
    selector = Selector(limits)
    assert selector.select(operators()[:5]) == []
    assert selector.select(operators()[5:8]) == []
    assert selector.refused == {name: 8}
    assert selector.seen == 8


def test_what_others_were_better_than_is_counted_too():
    selector = Selector(keep=2)
    assert (selector.seen, selector.refused) == (0, {})
    selector.select(operators()[:7])
    assert (selector.seen, selector.refused) == (7, {"keep": 5})


def test_a_ratio_is_in_units_of_the_baseline_over_all_mappings():
    baseline = pair("k")
    limits = Limits.of_ratio(baseline, 0.5, 1.5, max_parameters=10**6)
    kept = Selector(limits, keep=10**6).select(operators())
    total = multiply_adds(baseline)
    assert set(kept) == {o for o in operators() if 0.5 * total <= multiply_adds(o) <= 1.5 * total}
    assert 0 < len(kept) < len(operators())
    assert limits.max_parameters == 10**6
    assert Limits.of_ratio(baseline) == Limits()


def test_limits_at_the_very_cost_are_kept():
    (operator,) = Random(0).sample(operators(), 1)
    bytes_needed = max(found.tensor_bytes() for found in costs(operator))
    work = multiply_adds(operator)
    limits = Limits(work, work, parameters(operator), bytes_needed)
    assert Selector(limits).select([operator]) == [operator]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Limits(max_parameters=-1), "max_parameters = -1 is negative"),
        (lambda: Limits(5, 4), "min_multiply_adds = 5 is above max_multiply_adds = 4"),
        (lambda: Selector(keep=0), "keep = 0 keeps no operator"),
    ],
)
def test_limits_that_nothing_meets_are_refused_in_one_line(build, message):
    with pytest.raises(SearchError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
