"""Each rule of the normal form: what it refuses is the same function as what replaces it, or is really lost.

Dims are compared by their coordinates at every point, operators by brute force: the linear maps that multiply each
monomial of the weights, and the span of these, which says what an operator computes up to a re-indexing of its weights.

Four kinds of rule, and ``test_every_rule_is_of_one_kind`` holds them complete:

- *equal*: the other form has the same coordinates, or the same up to a bijection of a reduction, a weight's layout or
  an unordered dim;
- *equal inside*: the same wherever both forms stay inside their domain or block, and another function at the border,
  which no other graph builds (V1, V2, V3, V6, V11);
- *lost*: no other graph builds what is refused (V10, "R3 sums");
- *quality*: nothing equal is meant to replace what is refused (V9: pooling, V12, C3).

Three of the equal ones lose functions too: R1 where the blocks of a Merge and of the Split below do not divide each
other; V8 above a Shift, since a space shifts by 1 alone; V7 above an Unfold, whose other form reads beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from itertools import product as cartesian
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_search_graph import evaluate, table

from cofire.search import Allowance, Assembler, Operator, Space, Symbols, enumerate_operators
from cofire.search.canonical import RULES
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

EQUAL = {"R1", "R2", "R3", "R4", "C2", "C4", "C5", "C6", "U1", "U2", "U3", "V4", "V5", "V7", "V8"}
EQUAL_INSIDE = {"V1", "V2", "V3", "V6", "V11"}
LOST = {"V10", "R3 sums"}
QUALITY = {"V9", "V12", "C3", "C3 outer"}


def test_every_rule_is_of_one_kind():
    kinds = (EQUAL, EQUAL_INSIDE, LOST, QUALITY)
    assert {rule.name for rules in RULES.values() for rule in rules} == set().union(*kinds)
    assert sum(map(len, kinds)) == len(set().union(*kinds))


# --- dims: random sizes, every point ---

numbers = st.fixed_dictionaries(
    {name: st.integers(1, 4) for name in ("P", "Q", "R", "s")} | {"k": st.integers(1, 5), "Z": st.integers(5, 9)}
)
every_size = settings(max_examples=30, deadline=None)


class Scene:
    """Iterators of given sizes and the space that the rules are asked in."""

    def __init__(self, values: dict[str, int]) -> None:
        self.symbols = Symbols.of(["P", "Q", "R", "Z"], ["k", "s"], [values])
        z = self.symbols.size("Z")
        self.space = Space((z,), (z,), Allowance.of(self.symbols, {}), unordered_output=frozenset({0}))
        self.blank = Interface((), (), (), (), self.space.allowance)

    def size(self, text: str):
        return self.symbols.size(text)

    def dims(self, *sizes: str) -> tuple[Iterator, ...]:
        return tuple(Iterator(self.size(text), index) for index, text in enumerate(sizes))

    def reductions(self, *sizes: str) -> tuple[Reduction, ...]:
        return tuple(Reduction(self.size(text), index) for index, text in enumerate(sizes))

    def refuses(self, name: str, candidate: Dim | Contraction, state: Interface | None = None, **limits) -> bool:
        (rule,) = [rule for rule in RULES[type(candidate)] if rule.name == name]
        return rule.refuses(candidate, state or self.blank, replace(self.space, **limits))


Pairs = list[tuple[Dim, Dim]]


def iterators_of(dim: Dim) -> list[Iterator]:
    return sorted((i for i in dim.iterators if isinstance(i, Iterator)), key=lambda i: i.index)


def parts(dim: Dim, block) -> tuple[MergeMajor, MergeMinor]:
    return MergeMajor(dim, block), MergeMinor(dim, block)


def merges_of_split(scene: Scene) -> Pairs:
    i, j = scene.dims("P*Q", "R")
    large = parts(Split(i, j), scene.size("Q*R"))
    wide, narrow = scene.dims("P", "Q*R")
    small = parts(Split(wide, narrow), scene.size("R"))
    outer, inner = parts(narrow, scene.size("R"))
    return [
        (large[1], Split(MergeMinor(i, scene.size("Q")), j)),
        (large[0], MergeMajor(i, scene.size("Q"))),
        (small[1], inner),
        (small[0], Split(wide, outer)),
    ]


def merges_of_merge(scene: Scene) -> Pairs:
    (i,) = scene.dims("P*Q*R")
    q, r, both = (scene.size(text) for text in ("Q", "R", "Q*R"))
    major, minor = parts(MergeMajor(i, r), q)
    return [(minor, MergeMajor(MergeMinor(i, both), r)), (major, MergeMajor(i, both))]


def splits_of_fragments(scene: Scene) -> Pairs:
    i, j = scene.dims("P*Q*R", "k")
    r, both = scene.size("R"), scene.size("Q*R")
    outer, inner = parts(i, both)
    first, second = parts(inner, r)
    return [
        (Split(*parts(i, r)), i),
        (Split(outer, first), MergeMajor(i, r)),
        (Split(first, second), inner),
        (Split(outer, Split(inner, j)), Split(i, j)),
    ]


def splits_of_split(scene: Scene) -> Pairs:
    p, q, r = scene.dims("P", "Q", "R")
    return [(Split(Split(p, q), r), Split(p, Split(q, r)))]


def strides_of_split(scene: Scene) -> Pairs:
    i, j = scene.dims("P", "Q")
    return [(Stride(Split(i, j), scene.size("s")), Split(i, Stride(j, scene.size("s"))))]


def strides_of_stride(scene: Scene) -> Pairs:
    (i,) = scene.dims("P")
    return [(Stride(Stride(i, scene.size("k")), scene.size("s")), Stride(i, scene.size("k*s")))]


def merges_of_stride(scene: Scene) -> Pairs:
    (i,) = scene.dims("P*Q")
    s, q = scene.size("s"), scene.size("Q")
    major, minor = parts(Stride(i, s), scene.size("Q*s"))
    return [(minor, Stride(MergeMinor(i, q), s)), (major, MergeMajor(i, q))]


def shifts_of_shift(scene: Scene) -> Pairs:
    (i,) = scene.dims("Z")
    return [(Shift(Shift(i)), Shift(i, 2)), (Shift(Shift(i, 3), -2), Shift(i, 1))]


@pytest.mark.parametrize(
    ("rule", "forms"),
    [
        ("R1", merges_of_split),
        ("R1", merges_of_merge),
        ("R2", splits_of_split),
        ("R3", splits_of_fragments),
        ("V4", strides_of_split),
        ("V5", merges_of_stride),
        ("V7", strides_of_stride),
        ("V8", shifts_of_shift),
    ],
)
@given(values=numbers)
@every_size
def test_the_refused_form_and_the_normal_one_have_the_same_coordinates(rule, forms, values):
    scene = Scene(values)
    for refused, normal in forms(scene):
        assert refused != normal
        if not isinstance(refused, MergeMajor):  # a Merge is asked for by its minor side
            assert scene.refuses(rule, refused)
        iterators = iterators_of(refused)
        assert refused.size.value() == normal.size.value()
        assert table(refused, *iterators) == table(normal, *iterators)


def is_permutation(*dims: Dim, over: Sequence[Iterator]) -> bool:
    """Whether the dims together take every value of their domains exactly once."""
    found = sorted(zip(*(table(dim, *over) for dim in dims), strict=True))
    return found == sorted(cartesian(*(range(dim.size.value()) for dim in dims)))


@given(values=numbers)
@every_size
def test_what_is_refused_above_reductions_is_a_bijection_of_them(values):
    scene = Scene(values)
    (r,) = scene.reductions("P*Q")
    minor = MergeMinor(r, scene.size("Q"))
    assert scene.refuses("R4", minor)
    assert is_permutation(MergeMajor(r, scene.size("Q")), minor, over=[r])
    assert scene.refuses("V8", Shift(r))
    assert is_permutation(Shift(r), over=[r])
    one, other = scene.reductions("P", "Q")
    assert scene.refuses("R3", Split(one, other))
    assert is_permutation(Split(one, other), over=[one, other])


@given(values=numbers)
@every_size
def test_what_is_refused_of_an_unordered_dim_is_a_permutation_of_it(values):
    scene = Scene(values)
    (i,) = scene.dims("P*Q*R")
    assert scene.refuses("U1", Shift(i))
    assert is_permutation(Shift(i), over=[i])
    outer, inner = parts(i, scene.size("Q*R"))
    fragments = outer, *parts(inner, scene.size("R"))
    for left, middle, right in permutations(fragments):
        joined = Split(middle, right)
        assert scene.refuses("U3", joined)
        # The dim with its fragments in another order has these two as its minor part and the third as its major one.
        reordered = Split(left, joined)
        assert is_permutation(reordered, over=[i])
        assert table(MergeMinor(reordered, joined.size), i) == table(joined, i)
        assert table(MergeMajor(reordered, joined.size), i) == table(left, i)


@given(values=numbers)
@every_size
def test_fragments_out_of_order_are_those_of_a_permuted_dim_in_order(values):
    scene = Scene(values)
    (i,) = scene.dims("P*Q")
    major, minor = parts(i, scene.size("Q"))
    swapped = Split(minor, major)
    assert is_permutation(swapped, over=[i])
    again = parts(swapped, major.size)
    assert [table(dim, i) for dim in again] == [table(minor, i), table(major, i)]
    ordered = [scene.refuses("U2", MergeMinor(i, scene.size(block))) for block in ("P", "Q")]
    assert ordered.count(True) == 1


# --- dims: equal where no border is near ---


def window_of_window(scene: Scene) -> Pairs:
    i, a, b = scene.dims("Z", "k*s", "k")
    return [(Unfold(Unfold(i, a), b), Unfold(Unfold(i, b), a))]


def window_of_split(scene: Scene) -> Pairs:
    i, j, w = scene.dims("P", "Z", "k")
    return [(Unfold(Split(i, j), w), Split(i, Unfold(j, w)))]


def window_of_shift(scene: Scene) -> Pairs:
    i, w = scene.dims("Z", "k")
    return [(Unfold(Shift(i), w), Shift(Unfold(i, w)))]


def merges_of_window(scene: Scene) -> Pairs:
    i, w = scene.dims("P*Z", "k")
    z = scene.size("Z")
    return [(MergeMinor(Unfold(i, w), z), Unfold(MergeMinor(i, z), w))]


@pytest.mark.parametrize(
    ("rule", "forms"),
    [("V1", window_of_window), ("V2", window_of_split), ("V3", merges_of_window), ("V6", window_of_shift)],
)
@given(values=numbers)
@every_size
def test_wherever_both_forms_stay_inside_their_domain_they_are_equal(rule, forms, values):
    scene = Scene(values | {"s": 2})
    for refused, normal in forms(scene):
        assert scene.refuses(rule, refused)
        assert not isinstance(normal, type(refused)) or not scene.refuses(rule, normal)
        iterators = iterators_of(refused)
        pairs = list(zip(table(refused, *iterators), table(normal, *iterators), strict=True))
        both = [pair for pair in pairs if None not in pair]
        assert len(both) >= len(pairs) / 8
        assert all(one == other for one, other in both)


@given(values=numbers)
@every_size
def test_a_shift_and_a_reshape_commute_but_for_one_position_of_a_block(values):
    scene = Scene(values)
    z = scene.size("Z")
    (i,), (p, j) = scene.dims("P*Z"), scene.dims("P", "Z")
    cut, joined = MergeMinor(Shift(i), z), Shift(Split(p, j))
    for refused in (cut, joined):
        assert scene.refuses("V11", refused, max_reshape_over_shift=1.0)
        assert not scene.refuses("V11", refused, max_reshape_over_shift=9.0)
    last = z.value() - 1
    parted = zip(table(MergeMajor(Shift(i), z), i), table(MergeMajor(i, z), i), strict=True)
    assert [one == other for one, other in parted] == [
        at % z.value() != last or values["P"] == 1 for at in range(i.size.value())
    ]
    assert table(cut, i) == table(Shift(MergeMinor(i, z)), i)
    pairs = zip(table(joined, p, j), table(Split(p, Shift(j)), p, j), table(j, p, j), strict=True)
    assert all((one == other) == (at != last or values["P"] == 1) for one, other, at in pairs)


@given(values=numbers)
@every_size
def test_a_strided_window_differs_from_a_window_of_strides_by_a_constant(values):
    scene = Scene(values)
    i, w = scene.dims("Z", "k")
    s, k = values["s"], values["k"]
    refused, normal = (
        Stride(Unfold(i, w), scene.size("s")),
        Unfold(Stride(i, scene.size("s")), Stride(w, scene.size("s"))),
    )
    assert scene.refuses("V7", refused)
    pairs = zip(table(refused, i, w), table(normal, i, w), strict=True)
    beside = {one - other for one, other in pairs if one is not None and other is not None}
    assert beside == {s * k // 2 - s * (k // 2)}


# --- operators: by brute force ---

Monomial = tuple[tuple[int, ...], ...]


def coefficients(operator: Operator) -> dict[Monomial, NDArray[np.float64]]:
    """The map from input to output, flat, that multiplies each monomial: an index of every weight."""
    iterators = (*operator.output, *operator.reductions)
    shapes = [[dim.size.value() for dim in dims] for dims in (operator.output, operator.input)]
    found: dict[Monomial, NDArray[np.float64]] = {}
    for point in cartesian(*(range(dim.size.value()) for dim in iterators)):
        at: dict[Dim, int] = dict(zip(iterators, point, strict=True))
        groups = (operator.input, operator.expansions, *operator.weights)
        read: list[tuple[Any, ...]] = [tuple(evaluate(dim, at) for dim in dims) for dims in groups]
        if any(value is None for values in read for value in values):
            continue
        y, x = point[: len(operator.output)], read[0]
        where = int(np.ravel_multi_index(y, shapes[0])), int(np.ravel_multi_index(x, shapes[1]))
        key = tuple(read[2:])
        found.setdefault(key, np.zeros([prod(shape) for shape in shapes]))[where] += 1
    return found


class Function:
    """What an operator computes, whatever the layout of its weights; weightless, the map itself."""

    def __init__(self, operator: Operator) -> None:
        rows = np.stack([row.ravel() for row in coefficients(operator).values()])
        self.weights = len(operator.weights)
        self.rows = rows
        if self.weights:
            _, values, directions = np.linalg.svd(rows, full_matrices=False)
            self.rows = directions[values > 1e-9]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Function) or self.weights != other.weights or self.rows.shape != other.rows.shape:
            return False
        mine = self.rows @ other.rows.T @ other.rows if self.weights else other.rows
        return bool(np.allclose(mine, self.rows, atol=1e-8))

    def __hash__(self) -> int:
        return hash(self.rows.shape)


few = st.fixed_dictionaries({name: st.integers(2, 3) for name in ("P", "Q", "R", "k", "s")} | {"Z": st.just(4)})


def merge_of_share(build: Assembler, first: bool) -> Operator:
    """x[i div Q, i mod Q] * W[i], and with the Merge first."""
    (i,) = build.output("P*Q")
    if first:
        return build.finish(*build.contract(build.merge(i, "Q")))
    (shared,) = build.contract([i])
    return build.finish(*build.merge(shared, "Q"))


def split_of_shares(build: Assembler, first: bool) -> Operator:
    """x[i*Q + j] * W[i, j], and with the Split first."""
    i, j = build.output("P", "Q")
    if first:
        return build.finish(*build.contract([build.split(i, j)]))
    return build.finish(build.split(*build.contract([i, j])))


def rejoined_shares(build: Assembler, first: bool) -> Operator:
    """x[i] * W[i div Q, i mod Q], its parts joined again, and W[i] of the dim itself."""
    (i,) = build.output("P*Q")
    if first:
        return build.finish(*build.contract([i]))
    return build.finish(build.split(*build.contract(build.merge(i, "Q"))))


def joined_reductions(build: Assembler, first: bool) -> Operator:
    """Two reductions joined, both with one weight, and one reduction of their size."""
    (o,) = build.output("R")
    if first:
        return build.finish(*build.contract(build.reduce("P*Q"), [o]))
    return build.finish(build.split(*build.contract(build.reduce("P", "Q"), [o])))


def merged_reduction(build: Assembler, first: bool) -> Operator:
    """A Merge of a reduction, one part with the weight, and two reductions."""
    (o,) = build.output("R")
    major, minor = build.reduce("P", "Q") if first else build.merge(build.reduce("P*Q")[0], "Q")
    (major,) = build.contract([major], [o])
    return build.finish(minor, major)


def shifted_share(build: Assembler, first: bool) -> Operator:
    """A Shift above a Share, and below."""
    i, _ = build.output("P*Q", "R")
    build.expand(build.interface[1])
    if first:
        return build.finish(*build.contract([build.shift(i)]))
    (shared,) = build.contract([i])
    return build.finish(build.shift(shared))


def outer_parts(build: Assembler, first: bool) -> Operator:
    """Both parts of a Merge as outer dims, and the dim itself."""
    (o,) = build.output("P*Q")
    outer = [o] if first else build.merge(o, "Q")
    return build.finish(*build.contract(build.reduce("R"), outer))


@pytest.mark.parametrize(
    "forms",
    [merge_of_share, split_of_shares, rejoined_shares, joined_reductions, merged_reduction, shifted_share, outer_parts],
)
@given(values=few)
@settings(max_examples=8, deadline=None)
def test_a_refused_operator_and_the_normal_one_differ_in_the_layout_of_weights_alone(forms, values):
    refused, normal = (forms(Assembler(Scene(values).symbols), first) for first in (False, True))
    assert refused != normal
    assert Function(refused) == Function(normal)


@given(values=few)
@settings(max_examples=8, deadline=None)
def test_the_normal_forms_of_contractions_are_told_by_their_rules(values):
    scene = Scene(values)
    (i,) = scene.dims("P*Q")
    major, minor = parts(i, scene.size("Q"))
    (r,) = scene.reductions("R")
    assert scene.refuses("C4", Contraction(0, (r,), (major, minor)))
    assert not scene.refuses("C4", Contraction(0, (r,), (i,)))
    assert scene.refuses("C6", Split(Share(major, 0), Share(minor, 0)))
    assert not scene.refuses("C6", Split(Share(major, 0), Share(minor, 1)))
    assert scene.refuses("R1", MergeMinor(Share(i, 0), scene.size("Q")))
    assert scene.refuses("V8", Shift(Share(i, 0)))


@given(values=few)
@settings(max_examples=8, deadline=None)
def test_contractions_that_commute_are_one_function_with_its_weights_renamed(values):
    operators = []
    for turned in (False, True):
        build = Assembler(Scene(values).symbols)
        i, j = build.output("P", "Q")
        for dim in (j, i) if turned else (i, j):
            build.contract([dim])
        operators.append(build.finish(*sorted(build.interface, key=lambda dim: str(dim))))
    one, other = map(coefficients, operators)
    assert one.keys() == {(second, first) for first, second in other}
    assert all(np.array_equal(row, other[second, first]) for (first, second), row in one.items())


def test_a_split_of_two_older_dims_gives_the_graph_that_it_gives_before_the_contraction():
    scene = Scene({"P": 2, "Q": 3, "R": 2, "Z": 5, "k": 3, "s": 2})
    i, j, a = scene.dims("P", "Q", "R")
    state = replace(scene.blank, dims=tuple(sorted((i, j, a))))

    def split(before: Interface) -> Interface:
        return before.step("split", (i, j), (Split(i, j),), before.allowance)

    def contract(before: Interface) -> Interface:
        return before.step("contract", (a,), (Share(a, 0),), before.allowance, weight=(a,))

    late, early = split(contract(state)), contract(split(state))
    assert scene.refuses("C5", Split(i, j), contract(state))
    assert not scene.refuses("C5", Split(i, j), state)
    assert late.digest == early.digest
    assert late == early


# --- whole spaces: what is lost without a rule, and what with it ---

SYMBOLS = Symbols.of(["A", "H", "P"], ["g", "k"], [{"A": 24, "H": 8, "P": 4, "g": 2, "k": 3}])


def space(input: str, output: str, allowance: dict[str, int] | None = None, **limits) -> Space:
    """A space of views, with the limits of quality out of the way; tensors, reductions and views as ``limits`` say."""
    least: dict[str, Any] = dict.fromkeys(("max_reductions", "max_unfolds", "max_shifts", "max_strides"), 0)
    wide = {"max_pooling": 10**6, "max_outer": 10**6, "max_reduction_ratio": 10**6, "min_unfold_ratio": 1.0}
    free = {"max_tensors": 1, "needs_weight": False, "needs_matmul": False, "odd_windows": False}
    shapes = [tuple(map(SYMBOLS.size, text.split())) for text in (input, output)]
    return Space(shapes[0], shapes[1], Allowance.of(SYMBOLS, allowance or {}), **(least | wide | free | limits))


def functions_without(rule: str, kind: type, within: Space, depth: int, monkeypatch) -> tuple[set[str], set[str]]:
    """Operators that a space has only without one rule: those whose function it has anyway, and those that are new."""
    rules = RULES[kind]
    assert rule in {r.name for r in rules}
    monkeypatch.setitem(RULES, kind, tuple(replace(r, compat_only=r.compat_only and r.name != rule) for r in rules))
    kept = enumerate_operators(within, depth, "none")
    monkeypatch.setitem(RULES, kind, tuple(r for r in rules if r.name != rule))
    extra = [operator for operator in enumerate_operators(within, depth, "none") if operator not in set(kept)]
    functions = [Function(operator) for operator in kept]
    new = {str(operator) for operator in extra if Function(operator) not in functions}
    return {str(operator) for operator in extra} - new, new


WEIGHT = {"max_tensors": 2}
WINDOW = {"max_tensors": 2, "max_reductions": 1, "max_unfolds": 1}


@pytest.mark.parametrize(
    ("rule", "kind", "within", "depth"),
    [
        ("R1", MergeMinor, space("A/g/k g k", "A", {"g": 1, "k": 1}), 2),
        ("R1", MergeMinor, space("A/g g", "A", {"A": 1, "g": 1}, **WEIGHT), 2),
        ("R2", Split, space("A", "A/g/k g k"), 2),
        ("R3", Split, space("A", "A", {"g": 1}), 2),
        ("R4", MergeMinor, space("A/g g", "H", {"A": 2, "g": 2, "H": 1}, max_reductions=2, **WEIGHT), 3),
        ("V8", Shift, space("H", "H", {"H": 1}, max_shifts=1, **WEIGHT), 2),
        ("C2", Contraction, space("A P", "A P", {"A": 1, "P": 1}, max_tensors=3), 2),
        ("C4", Contraction, space("P", "A", {"A": 1, "P": 2, "g": 1}, max_reductions=1, **WEIGHT), 3),
        ("C6", Split, space("A", "A/g g", {"A": 1}, **WEIGHT), 2),
    ],
)
def test_a_rule_takes_graphs_and_no_function_from_a_space(rule, kind, within, depth, monkeypatch):
    same, new = functions_without(rule, kind, within, depth, monkeypatch)
    assert same
    assert new == set()


@pytest.mark.parametrize(("uses", "tensors", "depth"), [(1, 4, 3), (2, 4, 3), (2, 5, 4)])
def test_ordering_contractions_that_commute_loses_no_set_of_weights(uses, tensors, depth, monkeypatch):
    shape = "A P H"
    limits = {"max_tensors": tensors, "max_splits": 0, "max_merges": 0}
    within = space(shape, shape, dict.fromkeys(shape.split(), uses), **limits)

    def sets() -> list[tuple[tuple[str, ...], ...]]:
        found = enumerate_operators(within, depth, "none")
        return [tuple(sorted(tuple(sorted(map(str, weight))) for weight in operator.weights)) for operator in found]

    ordered = sets()
    monkeypatch.setitem(RULES, Contraction, tuple(rule for rule in RULES[Contraction] if rule.name != "C2"))
    unordered = sets()
    assert set(ordered) == set(unordered)
    assert len(ordered) < len(unordered)


FLAT = "x[[i0*H + i1 + r0 - floor(k/2)]] * W0[r0]"
SHIFTED = "x[[(i0 + 1) mod (H) + r0 - floor(k/2)]] * W0[r0]"
TWICE = "x[[[i0 + r0 - floor(k/2)] + r1 - floor(g/2)]] * W0[r0]"
ACROSS = "x[([i0 + r0 - floor(k/2)]) div (g^2), ([i0 + r0 - floor(k/2)]) mod (g^2)] * W0[r0]"
ONE_SHIFT = {"max_shifts": 1, "max_reshape_over_shift": 1.0}
TWO_SUMS = {"max_tensors": 2, "max_reductions": 2}


@pytest.mark.parametrize(
    ("rule", "kind", "within", "depth", "lost"),
    [
        ("R1", MergeMinor, space("A/k k", "A/g g", {"g": 2, "k": 2}), 2, "x[(i0*g + i1) div (k), (i0*g + i1) mod (k)]"),
        ("V1", Unfold, space("H", "H", {"k": 1, "g": 1}, max_unfolds=2, **TWO_SUMS), 5, f"sum(r0, r1) {TWICE}"),
        ("V2", Unfold, space("P*H", "P H", {"k": 1}, **WINDOW), 4, f"sum(r0) {FLAT}"),
        ("V3", MergeMinor, space("H/g^2 g^2", "H", {"k": 1, "g": 2}, **WINDOW), 4, f"sum(r0) {ACROSS}"),
        ("V6", Unfold, space("H", "H", {"k": 1}, max_shifts=1, **WINDOW), 4, f"sum(r0) {SHIFTED}"),
        (
            "V10",
            Unfold,
            space("H", "P", {"k": 1, "H": 1, "P": 1}, max_unfolds=1, **TWO_SUMS),
            4,
            "sum(r0, r1) x[[r1 + r0 - floor(k/2)]] * W0[i0]",
        ),
        (
            "V11",
            MergeMinor,
            space("H/g g", "H", {"g": 1}, **ONE_SHIFT),
            2,
            "x[((i0 + 1) mod (H)) div (g), ((i0 + 1) mod (H)) mod (g)]",
        ),
        ("V11", Shift, space("H", "H/g g", {"g": 1}, **ONE_SHIFT), 2, "x[(i0*g + i1 + 1) mod (H)]"),
        ("V8", Shift, space("H", "H", max_shifts=2), 2, "x[((i0 + 1) mod (H) + 1) mod (H)]"),
        (
            "R3 sums",
            Split,
            space("A", "P", {"A": 1, "g": 2, "P": 1}, **TWO_SUMS),
            4,
            "sum(r0, r1) x[r1*g + r0] * W0[i0, r0]",
        ),
    ],
)
def test_a_rule_loses_a_function(rule, kind, within, depth, lost, monkeypatch):
    _, new = functions_without(rule, kind, within, depth, monkeypatch)
    assert any(text.endswith(f"= {lost}") for text in new), sorted(new)
