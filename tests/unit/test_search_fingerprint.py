"""Fingerprints: equal for operators that differ by a re-indexing of weights, and for no others."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from math import prod

import numpy as np
import pytest

from cofire.errors import SearchError
from cofire.search import Allowance, Assembler, Operator, Space, Symbols, enumerate_operators
from cofire.search.fingerprint import distinct, fingerprint, probe_sizes, redundant_weights
from cofire.search.lowering.loop_nest import coordinate

SMALL = {"N": 1, "Ci": 2, "Co": 5, "H": 11, "k": 3}
SYMBOLS = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [SMALL])


def convolution_space(**changes) -> Space:
    """[N, Ci, H] -> [N, Co, H] at sizes that a dense test can hold; H is long enough for a window of k*k."""
    n, ci, co, h = (SYMBOLS.size(name) for name in ("N", "Ci", "Co", "H"))
    allowance = Allowance.of(SYMBOLS, {"Ci": 2, "Co": 1, "H": 0, "k": 2})
    return replace(Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),), min_unfold_ratio=1.0), **changes)


def image_space(**changes) -> Space:
    """[N, Ci, H, W] -> [N, Co, H, W]."""
    symbols = Symbols.of(["N", "Ci", "Co", "H", "W"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "W": 64, "k": 3}])
    n, ci, co, h, w = (symbols.size(name) for name in symbols.primary)
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2})
    return replace(Space((n, ci, h, w), (n, co, h, w), allowance, fixed=((0, 0),), max_reductions=3), **changes)


def dense_span(operator: Operator) -> np.ndarray:
    """The coefficient of every weight element, a matrix [output, input] each, flattened; found point by point."""
    (weight,) = operator.weight_coordinates
    shapes = [tuple(d.size.value() for d in dims) for dims in (weight, operator.output, operator.input)]
    found = np.zeros([prod(shape) for shape in shapes])
    iterators = (*operator.output, *operator.reductions)
    for values in product(*(range(iterator.size.value()) for iterator in iterators)):
        point = dict(zip(iterators, values, strict=True))
        sites = [[coordinate(d, point) for d in dims] for dims in (weight, operator.output, operator.input_coordinates)]
        if all(value is not None for site in sites for value in site):
            found[*(np.ravel_multi_index(site, shape) for site, shape in zip(sites, shapes, strict=True))] += 1
    return found.reshape(len(found), -1)


def orthonormal_rows(matrix: np.ndarray) -> np.ndarray:
    _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    return rows[values > 1e-9 * values[0]]


def are_one_span(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two orthonormal bases span one space: the squared cosines of their angles add up to the dimension."""
    return len(left) == len(right) and bool(((left @ right.T) ** 2).sum() > len(left) - 1e-6)


def convolution(order: tuple[int, int] = (0, 1), *, reductions: tuple[str, str] = ("Ci", "k")) -> Operator:
    """A convolution; its reductions and its weight's dims in any order."""
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    dims = dict(zip(reductions, build.reduce(*reductions), strict=True))
    inner = [dims["Ci"], dims["k"]]
    shared = build.contract(inner=[inner[k] for k in order], outer=[d])
    c, a = (shared[order.index(k)] for k in range(2))
    return build.finish(n, c, build.unfold(h, a))


def windows_of_two_weights(swapped: bool) -> Operator:
    """W0[o, a, rho] * W1[c, b, rho] with windows a on H and b on W, or on W and H."""
    symbols = Symbols.of(["C", "D", "H", "W"], ["k", "g"], [{"C": 8, "D": 8, "H": 8, "W": 8, "k": 3, "g": 2}])
    build = Assembler(symbols)
    d, h, w = build.output("D", "H", "W")
    c, a, b, rho = build.reduce("C", "k", "k", "g")
    a, rho = build.contract(inner=[a, rho], outer=[d])
    c, b = build.contract(inner=[c, b], outer=[rho])
    return build.finish(c, build.unfold(h, b if swapped else a), build.unfold(w, a if swapped else b))


def test_the_order_of_reductions_and_of_a_weights_dims_does_not_count():
    marks = {
        fingerprint(convolution(order, reductions=names))
        for order in ((0, 1), (1, 0))
        for names in (("Ci", "k"), ("k", "Ci"))
    }
    assert len(marks) == 1


def test_a_weight_indexed_by_a_bijection_of_a_reduction_is_the_same_weight():
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    flat = build.reduce("Ci*k")
    (both,) = build.contract(inner=flat, outer=[d])
    c, a = build.merge(both, "k")
    reshaped = build.finish(n, c, build.unfold(h, a))
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    c, a = build.reduce("Ci", "k")
    a = build.shift(a)
    c, a = build.contract(inner=[c, a], outer=[d])
    shifted = build.finish(n, c, build.unfold(h, a))
    assert distinct([convolution(), reshaped, shifted]) == [
        sorted((convolution(), reshaped, shifted), key=lambda operator: operator.digest)
    ]


def test_a_shift_of_the_data_is_another_function_and_one_of_the_channels_is_not():
    def shifted(dim: int) -> Operator:
        build = Assembler(SYMBOLS)
        dims = list(build.output("N", "Co", "H"))
        (c,) = build.contract(inner=build.reduce("Ci"), outer=[dims[1]])
        dims[1] = c
        if dim:
            dims[dim] = build.shift(dims[dim])
        return build.finish(*dims)

    plain, channels, rows = (shifted(dim) for dim in (0, 1, 2))
    assert {operator for group in distinct([plain, channels, rows]) for operator in group[:1]} >= {rows}
    assert [len(group) for group in sorted(distinct([plain, channels, rows]), key=len)] == [1, 2]


def test_equal_fingerprints_mean_equal_spans_over_all_pairs_of_a_small_space():
    operators = enumerate_operators(convolution_space(), 7)
    marks = [fingerprint(operator, SMALL) for operator in operators]
    spans = [orthonormal_rows(dense_span(operator)) for operator in operators]
    assert len(operators) > 10
    pairs = list(combinations(range(len(operators)), 2))
    for a, b in pairs:
        assert (marks[a] == marks[b]) == are_one_span(spans[a], spans[b]), f"{operators[a]}\n{operators[b]}"
    assert any(marks[a] == marks[b] for a, b in pairs)


def test_the_rank_of_a_weight_is_that_of_its_dense_span():
    for operator in enumerate_operators(convolution_space(), 6):
        span = dense_span(operator)
        assert redundant_weights(operator, SMALL) == (len(orthonormal_rows(span)), len(span))


def test_two_windows_over_one_dim_leave_seven_of_nine_taps():
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    c, a, b = build.reduce("Ci", "k", "k")
    c, a, b = build.contract(inner=[c, a, b], outer=[d])
    twice = build.finish(n, c, build.unfold(build.unfold(h, a), b))
    assert redundant_weights(twice, {"N": 1, "Ci": 2, "Co": 4, "H": 7, "k": 3}) == (56, 72)
    assert redundant_weights(twice, {"N": 1, "Ci": 4, "Co": 8, "H": 7, "k": 3}) == (224, 288)
    rank, parameters = redundant_weights(convolution())
    assert rank == parameters


def test_a_low_rank_pair_has_the_dimension_of_its_matrices():
    symbols = Symbols.of(["C", "D"], ["g"], [{"C": 16, "D": 16, "g": 4}])
    build = Assembler(symbols)
    (d,) = build.output("D")
    c, rho = build.reduce("C", "g")
    (rho,) = build.contract(inner=[rho], outer=[d])
    (c,) = build.contract(inner=[c], outer=[rho])
    pair = build.finish(c)
    assert probe_sizes([pair])["D"] > probe_sizes([pair])["g"]
    rank, parameters = redundant_weights(pair, {"C": 7, "D": 5, "g": 2})
    assert (rank, parameters) == (2 * (7 + 5) - 2**2, 2 * (7 + 5))


def test_two_weights_that_swap_their_windows_are_told_apart_and_a_renumbered_pair_is_not():
    plain, swapped = windows_of_two_weights(False), windows_of_two_weights(True)
    assert fingerprint(plain) != fingerprint(swapped)
    renumbered = replace(plain, weights=tuple(reversed(plain.weights)))
    assert renumbered != plain
    assert fingerprint(renumbered) == fingerprint(plain)


def test_an_operator_without_weights_is_told_from_its_multiple_and_its_roll():
    symbols = Symbols.of(["H"], ["k"], [{"H": 9, "k": 3}])

    def built(sums: int, shift: int) -> Operator:
        build = Assembler(symbols)
        (h,) = build.output("H")
        build.expand(*build.reduce(*["k"] * sums))
        return build.finish(build.shift(h, shift) if shift else h)

    marks = [fingerprint(built(*choice), {"H": 7, "k": 3}) for choice in ((0, 0), (1, 0), (2, 0), (0, 1), (0, -1))]
    assert len(set(marks)) == 5
    assert redundant_weights(built(1, 0)) == (0, 0)


def test_a_window_that_is_only_repeated_over_still_cuts_the_output():
    def built(cut: bool) -> Operator:
        build = Assembler(SYMBOLS)
        n, d, h = build.output("N", "Co", "H")
        c, a, r = build.reduce("Ci", "k", "H")
        (c, r) = build.contract(inner=[c, r], outer=[d])
        build.expand(*((build.unfold(h, a),) if cut else (h, a)))
        return build.finish(n, c, r)

    assert fingerprint(built(True), SMALL) != fingerprint(built(False), SMALL)


def test_long_outputs_are_looked_at_in_part_and_still_tell_functions_apart():
    long = {"N": 2, "Ci": 5, "Co": 7, "H": 401, "k": 3}
    plain, turned = convolution(), convolution((1, 0), reductions=("k", "Ci"))
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    c, a = build.contract(inner=build.reduce("Ci", "k"), outer=[d])
    shifted = build.finish(n, c, build.shift(build.unfold(h, a)))
    assert fingerprint(plain, long) == fingerprint(turned, long) != fingerprint(shifted, long)


def test_the_first_of_a_group_has_the_fewest_parameters():
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    c, a = build.reduce("Ci", "k")
    c, a = build.contract(inner=[c, a], outer=[d])
    build.expand(a)
    wide = build.finish(n, c, h)
    build = Assembler(SYMBOLS)
    n, d, h = build.output("N", "Co", "H")
    (c,) = build.contract(inner=build.reduce("Ci"), outer=[d])
    narrow = build.finish(n, c, h)
    assert distinct([wide, narrow]) == [[narrow, wide]]
    assert redundant_weights(wide, SMALL) == (10, 30)
    assert distinct([]) == []


@pytest.mark.parametrize(("depth", "canonical", "families"), [(6, 11, 11), (7, 19, 16), (8, 30, 25)])
def test_canonical_convolutions_in_one_dim_are_fewer_functions(depth, canonical, families):
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in symbols.primary)
    space = Space((n, ci, h), (n, co, h), Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2}), fixed=((0, 0),))
    operators = enumerate_operators(space, depth)
    groups = distinct(operators)
    assert (len(operators), len(groups)) == (canonical, families)
    assert groups == distinct(operators[::-1])


def test_canonical_convolutions_in_two_dims_are_fewer_functions():
    operators = enumerate_operators(image_space(), 6)
    assert (len(operators), len(distinct(operators))) == (48, 41)


def test_an_enumeration_may_keep_one_operator_per_function():
    every = enumerate_operators(convolution_space(), 6)
    kept = enumerate_operators(convolution_space(), 6, distinct=True)
    assert kept == [group[0] for group in distinct(every)]
    assert kept == sorted(kept, key=lambda operator: operator.digest)
    assert len(distinct(kept)) == len(kept) < len(every)


def test_probe_sizes_divide_and_exceed_windows_and_leave_the_batch_at_one():
    symbols = Symbols.of(["N", "C", "H"], ["k", "s", "g"], [{"N": 8, "C": 64, "H": 32, "k": 3, "s": 2, "g": 32}] * 2)
    build = Assembler(symbols)
    n, c, h = build.output("N", "C", "H")
    group, rest = build.merge(c, "C/g")
    a, t = build.reduce("k", "k")
    a, t = build.contract(inner=[a, t], outer=[group])
    (group,) = build.reduce("g")
    h = build.unfold(build.unfold(h, a), build.stride(t, "s"))
    sizes = probe_sizes([build.finish(n, build.split(group, rest), h)])
    assert sizes["N"] == 1
    assert sizes["s"] == 2
    assert sizes["C"] % sizes["g"] == 0
    assert sizes["H"] > sizes["k"] + 2 * sizes["k"]
    assert len({sizes[name] for name in symbols.names}) == 6


def test_fingerprints_are_equal_in_every_process_and_need_no_torch():
    code = (
        "import sys\nfrom cofire.search import *\nfrom cofire.search.fingerprint import fingerprint\n"
        "build = Assembler(Symbols.of(['M', 'K', 'N'], [], [{'M': 4, 'K': 4, 'N': 4}]))\n"
        "m, n = build.output('M', 'N')\n(k,) = build.contract(inner=build.reduce('K'), outer=[n])\n"
        "print(fingerprint(build.finish(m, k)), 'torch' in sys.modules)"
    )
    build = Assembler(Symbols.of(["M", "K", "N"], [], [{"M": 4, "K": 4, "N": 4}]))
    m, n = build.output("M", "N")
    (k,) = build.contract(inner=build.reduce("K"), outer=[n])
    here = fingerprint(build.finish(m, k))
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [str(here), "False"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe_sizes([]), "no operators to choose probe sizes for"),
        (lambda: fingerprint(convolution(), {"N": 1}), "give one to each of N, Ci, Co, H, k"),
        (lambda: fingerprint(convolution(), {**SMALL, "Ci": 10**6}), "more than 4194304; pass smaller sizes"),
        (lambda: distinct([convolution(), windows_of_two_weights(False)]), "different symbols have no common sizes"),
    ],
)
def test_a_call_that_cannot_be_answered_says_why(call, message):
    with pytest.raises(SearchError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_divide_are_refused():
    symbols = Symbols.of(["C"], ["g"], [{"C": 8, "g": 4}])
    build = Assembler(symbols)
    (c,) = build.output("C")
    operator = build.finish(build.split(*build.merge(c, "C/g")))
    assert fingerprint(operator) == fingerprint(operator, probe_sizes([operator]))
    with pytest.raises(SearchError, match="size C/g is 7/2 at the probe sizes"):
        fingerprint(operator, {"C": 7, "g": 2})
