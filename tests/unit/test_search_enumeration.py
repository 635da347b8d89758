"""Canonical forms, shape distance, and the operators that a space holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import pytest

from cofire.errors import SearchError
from cofire.search import Allowance, Assembler, Space, Symbols, Synthesis, enumerate_operators
from cofire.search.canonical import are_adjacent, broken_rule, unordered_scope
from cofire.search.distance import INFINITE, Budget, Current, shape_distance
from cofire.search.interface import Contraction, Interface
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Reduction,
    Share,
    Shift,
    Split,
    Stride,
    Unfold,
)
from cofire.search.space import Guidance
from cofire.search.unordered import keeps_unordered_rules


def matmul_space(**changes) -> Space:
    """[M, K] -> [M, N] with M fixed, and K allowed twice: once to sum over, once in the weight."""
    symbols = Symbols.of(["M", "K", "N"], [], [{"M": 64, "K": 64, "N": 64}])
    m, k, n = (symbols.size(name) for name in ("M", "K", "N"))
    allowance = Allowance.of(symbols, {"K": 2, "N": 1})
    return replace(Space((m, k), (m, n), allowance, fixed=((0, 0),)), **changes)


def convolution_space(**changes) -> Space:
    """[N, Ci, H] -> [N, Co, H] with the batch N fixed: Ci:2, Co:1, H:0, k=3:2."""
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in ("N", "Ci", "Co", "H"))
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "H": 0, "k": 2})
    return replace(Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),)), **changes)


def per_channel_space(**changes) -> Space:
    """[N, C, H] -> [N, C, H] where a weight may be per channel or absent."""
    symbols = Symbols.of(["N", "C", "H"], ["k"], [{"N": 4, "C": 64, "H": 64, "k": 3}])
    shape = tuple(symbols.size(name) for name in ("N", "C", "H"))
    allowance = Allowance.of(symbols, {"C": 2, "k": 2})
    space = Space(shape, shape, allowance, fixed=((0, 0),), needs_matmul=False, needs_weight=False)
    return replace(space, **changes)


def formulas(space: Space, depth: int, guidance: Guidance) -> set[str]:
    return {str(operator) for operator in enumerate_operators(space, depth, guidance)}


def test_matrix_product_has_the_known_counts():
    assert [len(enumerate_operators(matmul_space(), depth, "compat")) for depth in range(2, 8)] == [0, 1, 1, 1, 1, 1]


def test_convolution_in_one_dim_has_the_known_counts():
    assert [len(enumerate_operators(convolution_space(), depth, "compat")) for depth in range(3, 8)] == [1, 2, 7, 9, 11]


def test_the_matrix_product_is_found_at_its_own_depth_by_a_true_lower_bound_only():
    (found,) = enumerate_operators(matmul_space(), 2, "exact")
    build = Assembler(found.symbols)
    m, n = build.output("M", "N")
    (k,) = build.contract(inner=build.reduce("K"), outer=[n])
    assert found == build.finish(m, k)
    assert enumerate_operators(matmul_space(), 2, "compat") == []


@pytest.mark.parametrize(
    ("space", "depth"),
    [
        (matmul_space(), 5),
        (convolution_space(), 6),
        (convolution_space(max_reshape_over_shift=64.0), 4),
        (convolution_space(unordered_input=frozenset({1}), unordered_output=frozenset({1})), 4),
        (
            convolution_space(
                max_tensors=3,
                allowance=Allowance.of(convolution_space().allowance.symbols, {"Ci": 3, "Co": 2, "k": 2}),
            ),
            4,
        ),
        (per_channel_space(), 3),
    ],
)
def test_the_exact_distance_loses_no_operator(space, depth):
    for steps in range(depth + 1):
        assert formulas(space, steps, "exact") == formulas(space, steps, "none")


def test_compat_is_a_subset_of_exact_and_loses_some():
    compat, exact = formulas(convolution_space(), 7, "compat"), formulas(convolution_space(), 7, "exact")
    assert compat < exact
    assert (len(compat), len(exact)) == (11, 19)


def test_convolution_in_two_dims_has_the_known_counts():
    symbols = Symbols.of(["N", "Ci", "Co", "H", "W"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "W": 64, "k": 3}])
    n, ci, co, h, w = (symbols.size(name) for name in symbols.primary)
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2})
    space = Space((n, ci, h, w), (n, co, h, w), allowance, fixed=((0, 0),), max_reductions=3)
    assert [len(enumerate_operators(space, 6, guidance)) for guidance in ("compat", "exact")] == [28, 48]


def test_the_convolution_and_its_dilated_form_are_found():
    found = formulas(convolution_space(), 5, "exact")
    assert any("[i2 + r0 - floor(k/2)]" in text for text in found)
    assert any("[i2 + k*r0 - floor(k^2/2)]" in text for text in found)


def test_depthwise_convolution_and_pooling_are_found_where_they_are_allowed():
    found = formulas(per_channel_space(), 3, "exact")
    assert "y[i0, i1, i2] = sum(r0) x[i0, i1, [i2 + r0 - floor(k/2)]]" in found
    window = "y[i0, i1, i2] = sum(r0) x[i0, i1, [i2 + r0 - floor(k/2)]] * W0"
    depthwise = {f"{window}[r0, i1]", f"{window}[i1, r0]"}
    assert found & depthwise
    assert not formulas(per_channel_space(needs_matmul=True), 3, "exact") & depthwise


def test_of_the_operators_that_one_interface_is_so_many_are_kept_as_the_space_says():
    symbols = Symbols.of(["K", "N", "H"], [], [{"K": 8, "N": 8, "H": 6}])
    k, n, h = (symbols.size(name) for name in symbols.primary)
    space = Space((k, h, h), (n, h, h), Allowance.of(symbols, {"K": 2, "N": 1}))
    both, one = (enumerate_operators(replace(space, max_ends=most), 2) for most in (None, 1))
    assert sorted(str(operator).partition(" * ")[0].partition("x")[2] for operator in both) == [
        "[r0, i1, i2]",
        "[r0, i2, i1]",
    ]
    assert len(one) == 1
    assert one[0] in both


def test_merges_over_several_mappings_need_a_block_that_divides_in_each():
    symbols = Symbols.of(["Ci", "Co"], ["g"], [{"Ci": 32, "Co": 32, "g": 4}, {"Ci": 32, "Co": 30, "g": 4}])
    ci, co = symbols.size("Ci"), symbols.size("Co")
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "g": 2})
    both = enumerate_operators(Space((ci,), (co,), allowance), 4, "exact")
    assert not any("Co/g" in str(operator) for operator in both)
    one = Symbols.of(["Ci", "Co"], ["g"], [{"Ci": 32, "Co": 32, "g": 4}])
    ci, co = one.size("Ci"), one.size("Co")
    single = enumerate_operators(Space((ci,), (co,), Allowance.of(one, {"Ci": 2, "Co": 1, "g": 2})), 4, "exact")
    assert len(single) > len(both)
    for operator in both:
        for mapping in range(2):
            assert all(dim.size.value(mapping) >= 1 for dim in operator.input)


def test_the_result_is_equal_in_every_process():
    code = (
        "import json, sys; sys.path.insert(0, 'tests/unit')\n"
        "from test_search_enumeration import convolution_space, enumerate_operators\n"
        "found = [hex(o.digest) for o in enumerate_operators(convolution_space(), 5)]\n"
        "print(json.dumps([found, 'torch' in sys.modules]))"
    )
    here = [hex(operator.digest) for operator in enumerate_operators(convolution_space(), 5)]
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert json.loads(done.stdout) == [here, False]


def test_an_interface_is_named_by_its_graph_and_not_by_the_way_to_it():
    synthesis = Synthesis(convolution_space(), 7, "none")
    by_digest: dict[int, Interface] = {}
    reached = 0
    for root in synthesis.roots():
        for first in synthesis.steps(root):
            for second in synthesis.steps(first):
                reached += 1
                assert by_digest.setdefault(second.digest, second) == second
    assert len(by_digest) < reached


# --- shape distance ---

SIZES = Symbols.of(["N", "H", "W"], ["k"], [{"N": 3, "H": 64, "W": 63, "k": 3}])
N, H, W, K = (SIZES.size(text) for text in ("N", "H", "W", "k"))


@pytest.mark.parametrize(
    ("current", "merges", "splits", "unfolds", "expected"),
    [
        ([(N, 0), (H, 1), (W, 1)], 0, 0, 0, 0),
        ([(N, 1), (H * W, 1)], 0, 0, 0, INFINITE),
        ([(N, 0), (H * W, 1)], 1, 0, 0, 1),
        ([(N, 1), (H, 1), (W, 1), (K, 1)], 1, 0, 0, INFINITE),
        ([(N, 0), (H, 0), (W, 1), (K, 1)], 1, 0, 1, 1),
        ([(N, 1), (H, 1), (W / K, 1), (K, 1)], 1, 0, 1, INFINITE),
        ([(N, 0), (H, 0), (W / K, 1), (K, 1)], 1, 1, 1, 1),
    ],
)
def test_shape_distance_has_the_known_values(current, merges, splits, unfolds, expected):
    dims = tuple(Current(size, left) for size, left in current)
    budget = Budget(steps=1, merges=merges, splits=splits, unfolds=unfolds)
    assert shape_distance((N, H, W), dims, budget) == expected


def test_shape_distance_does_not_depend_on_the_order_of_dims():
    dims = (Current(N * K, 3), Current(H, 3), Current(W / K, 3), Current(K, 3))
    budget = Budget(steps=9, merges=9, splits=9, unfolds=9)
    found = {shape_distance((N, H, W), order, budget) for order in permutations(dims)}
    assert found == {3}


def test_shape_distance_is_infinite_where_elements_are_missing():
    budget = Budget(steps=9, merges=9, splits=9, unfolds=9)
    assert shape_distance((N, H), (Current(N, 5), Current(H / K, 5)), budget) == INFINITE
    assert shape_distance((N, H), (), budget) == INFINITE
    assert shape_distance((N,), (Current(H, 5),), budget) == INFINITE


# --- rules ---

SPACE = convolution_space(unordered_output=frozenset({1}))
SYMBOLS = SPACE.allowance.symbols


def s(text: str):
    return SYMBOLS.size(text)


BATCH, CHANNEL, ROW = SPACE.iterators
R, R_K = Reduction(s("Ci"), 0), Reduction(s("k"), 1)
WIDE = Iterator(s("H*k"), 2)
BLANK = Interface((), (), (), (), SPACE.allowance)
WEIGHTED = replace(BLANK, weights=((R, CHANNEL),))


def parts(dim: Dim, block: str = "k") -> tuple[MergeMajor, MergeMinor]:
    return MergeMajor(dim, s(block)), MergeMinor(dim, s(block))


MAJOR, MINOR = parts(WIDE)


@pytest.mark.parametrize(
    ("rule", "candidate", "state"),
    [
        ("R2", Split(Split(ROW, R_K), R), BLANK),
        ("C5", Split(ROW, R_K), WEIGHTED),
        ("R3", Split(MAJOR, MINOR), BLANK),
        ("R3", Split(R, R_K), BLANK),
        ("R3", Split(Share(R, 0), Split(Share(R_K, 0), BATCH)), WEIGHTED),
        ("R3 sums", Split(Share(R, 0), R_K), BLANK),
        ("C6", Split(Share(ROW, 0), Share(R_K, 0)), WEIGHTED),
        ("U3", Split(*reversed(parts(Iterator(s("Co*k"), 1)))), BLANK),
        ("U2", MergeMinor(Iterator(s("Co*k"), 1), s("k")), BLANK),
        ("R1", MergeMinor(Split(ROW, R_K), s("k")), BLANK),
        ("R1", MergeMinor(Share(WIDE, 0), s("k")), BLANK),
        ("R1", MergeMinor(MergeMajor(Iterator(s("H*k^2"), 2), s("k")), s("k")), BLANK),
        ("R4", MergeMinor(Reduction(s("Ci*k"), 0), s("k")), BLANK),
        ("V3", MergeMinor(Unfold(WIDE, Share(R_K, 0)), s("k")), BLANK),
        ("V5", MergeMinor(Stride(WIDE, s("k")), s("k")), BLANK),
        ("V11", MergeMinor(Shift(WIDE), s("H")), BLANK),
        ("V8", Shift(R_K), BLANK),
        ("V8", Shift(Share(ROW, 0)), BLANK),
        ("V8", Shift(Shift(ROW)), BLANK),
        ("U1", Shift(CHANNEL), BLANK),
        ("V11", Shift(Split(ROW, Iterator(s("Ci"), 0))), BLANK),
        ("V4", Stride(Split(ROW, R_K), s("k")), BLANK),
        ("V7", Stride(Unfold(ROW, R_K), s("k")), BLANK),
        ("V7", Stride(Stride(R_K, s("k")), s("k")), BLANK),
        ("V9", Unfold(ROW, R_K), BLANK),
        ("V2", Unfold(Split(ROW, BATCH), Share(R_K, 0)), BLANK),
        ("V6", Unfold(Shift(ROW), Share(R_K, 0)), BLANK),
        ("V10", Unfold(Share(R, 0), Share(R_K, 0)), BLANK),
        ("V12", Unfold(ROW, Share(R, 0)), BLANK),
        ("V1", Unfold(Unfold(ROW, Share(Reduction(s("k^2"), 0), 0)), Share(R_K, 0)), BLANK),
        ("C3", Contraction(0, (R,), ()), BLANK),
        ("C3", Contraction(0, (), (CHANNEL,)), BLANK),
        ("C3 outer", Contraction(0, (R,), (Iterator(s("Co^2"), 1),)), BLANK),
        ("C4", Contraction(0, (R,), (MAJOR, MINOR)), replace(BLANK)),
    ],
)
def test_each_rule_refuses_what_it_says(rule, candidate, state):
    space = SPACE if rule != "C4" else replace(SPACE, max_outer=10**6)
    found = broken_rule(candidate, state, space, compat=True)
    assert found is not None
    assert found.name == rule
    assert found.statement
    assert found.compat_only == (rule == "R3 sums")
    assert (broken_rule(candidate, state, space) is None) == found.compat_only


@pytest.mark.parametrize(
    "candidate",
    [
        Split(ROW, Split(R_K, BATCH)),
        Split(MINOR, MAJOR),
        Split(Share(MAJOR, 0), MINOR),
        MergeMinor(WIDE, s("k")),
        MergeMinor(MergeMinor(Iterator(s("H*k^2"), 2), s("k^2")), s("k")),
        MergeMinor(Shift(WIDE), s("k")),
        Shift(ROW),
        Shift(Split(ROW, R_K)),
        Stride(R_K, s("k")),
        Unfold(ROW, Share(R_K, 0)),
        Unfold(Unfold(ROW, Share(R_K, 0)), Share(Reduction(s("k^2"), 0), 0)),
        Contraction(0, (R,), (CHANNEL,)),
    ],
)
def test_a_normal_form_breaks_no_rule(candidate):
    assert broken_rule(candidate, BLANK, SPACE) is None


def test_contractions_that_commute_come_in_one_order():
    one, two = Iterator(s("Co"), 0), Iterator(s("Ci"), 1)
    orders = [
        broken_rule(Contraction(1, (R,), (new,)), replace(BLANK, weights=((old,),)), SPACE)
        for old, new in ((one, two), (two, one))
    ]
    assert [rule and rule.name for rule in orders].count("C2") == 1
    above = broken_rule(Contraction(1, (Share(R, 0),), (two,)), replace(BLANK, weights=((one, R),)), SPACE)
    assert above is None


def test_pooling_may_slide_a_reduction_over_a_dim():
    assert broken_rule(Unfold(ROW, R_K), BLANK, replace(SPACE, needs_weight=False)) is None


def test_fragments_are_neighbours_until_a_weight_comes_between():
    assert are_adjacent(MAJOR, MINOR)
    assert not are_adjacent(MINOR, MAJOR)
    assert are_adjacent(Share(MAJOR, 0), Share(MINOR, 0))
    assert not are_adjacent(Share(MAJOR, 0), MINOR)
    outer, inner = parts(Iterator(s("H*k^2"), 2), "k^2")
    first, second = parts(inner)
    assert are_adjacent(outer, first)
    assert are_adjacent(Split(outer, first), second)
    assert not are_adjacent(outer, second)
    assert not are_adjacent(Shift(outer), first)


def test_a_dim_is_unordered_if_it_is_made_of_one_unordered_dim_alone():
    assert unordered_scope(CHANNEL, SPACE) == CHANNEL
    assert unordered_scope(ROW, SPACE) is None
    assert unordered_scope(Share(R, 0), SPACE) == R
    assert unordered_scope(Split(R, CHANNEL), SPACE) is None
    assert unordered_scope(Split(*parts(Iterator(s("Co*k"), 1))), SPACE) == Iterator(s("Co*k"), 1)


def state_of(*dims: Dim, expansions: tuple[Dim, ...] = ()) -> Interface:
    return replace(BLANK, dims=tuple(sorted(dims)), expansions=tuple(sorted(expansions)), reductions=(R, R_K))


def test_unordered_dims_of_the_input_are_followed_down():
    shifted = Shift(ROW)
    assert keeps_unordered_rules(state_of(shifted), {})
    assert not keeps_unordered_rules(state_of(shifted), {shifted: 1})
    major, minor = parts(Shift(WIDE))
    assert not keeps_unordered_rules(state_of(major, minor), {major: 1, minor: 1})
    assert keeps_unordered_rules(state_of(major, minor), {major: 1})
    assert not keeps_unordered_rules(state_of(major, expansions=(minor,)), {major: 1})
    ascending, descending = Split(R_K, ROW), Split(ROW, R_K)
    assert keeps_unordered_rules(state_of(ascending), {ascending: 1})
    assert not keeps_unordered_rules(state_of(descending), {descending: 1})
    both = Split(R_K, R)
    assert not keeps_unordered_rules(state_of(both), {})
    again = Split(MINOR, MAJOR)
    assert not keeps_unordered_rules(state_of(again), {again: 1})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: convolution_space(fixed=((0, 5),)), r"fixed pair \(0, 5\) is outside"),
        (lambda: convolution_space(fixed=((0, 1),)), r"fixed pair \(0, 1\) joins N and Co"),
        (lambda: convolution_space(max_tensors=1), "leaves no weight, yet needs_weight"),
        (lambda: convolution_space(input=(s("Ci/k"),), fixed=()), "input has a dim of Ci/k"),
        (lambda: matmul_space(input=matmul_space().input[:1]), "every dim of the input is fixed"),
        (
            lambda: convolution_space(allowance=Allowance.of(SYMBOLS, {"Co": 1})),
            "no operator reads the whole input; allow Ci: 1",
        ),
    ],
)
def test_a_space_without_a_solution_is_refused_before_the_search(build, message):
    with pytest.raises(SearchError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
