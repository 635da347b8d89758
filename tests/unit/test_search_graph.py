"""Primitives, the finished operator, and the assembler that builds it by hand."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from itertools import product
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofire.errors import SearchError
from cofire.search import Assembler, Operator, Symbols
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
    without_shares,
)

SYMBOLS = Symbols.of(["N", "Ci", "Co", "H"], ["k", "s"], [{"N": 2, "Ci": 4, "Co": 6, "H": 12, "k": 3, "s": 2}])


def size(text: str):
    return SYMBOLS.size(text)


def evaluate(dim: Dim, at: dict[Dim, int]) -> int | None:
    """The coordinate for given iterators; none where an Unfold leaves its domain."""
    if isinstance(dim, Iterator):
        return at[dim]
    below = [evaluate(child, at) for child in dim.below]
    if any(value is None for value in below):
        return None
    n = dim.size.value()
    match dim:
        case Split():
            return below[0] * dim.minor.size.value() + below[1]
        case MergeMajor():
            return below[0] // dim.block.value()
        case MergeMinor():
            return below[0] % dim.block.value()
        case Shift():
            return (below[0] + dim.distance) % n
        case Stride():
            return below[0] * dim.stride.value()
        case Unfold():
            at_input = below[0] + below[1] - dim.window.size.value() // 2
            return at_input if 0 <= at_input < n else None
        case Share():
            return below[0]
    raise AssertionError(dim)


def table(dim: Dim, *iterators: Iterator) -> list[int | None]:
    points: list[dict[Dim, int]] = [{}]
    for iterator in iterators:
        points = [{**p, iterator: value} for p in points for value in range(iterator.size.value())]
    return [evaluate(dim, p) for p in points]


def convolution(order: bool = False) -> Operator:
    build = Assembler(SYMBOLS)
    n, o, h = build.output("N", "Co", "H")
    c, k = build.reduce("Ci", "k")
    if order:
        k, c = build.contract(inner=[k, c], outer=[o])
    else:
        c, k = build.contract(inner=[c, k], outer=[o])
    return build.finish(n, c, build.unfold(h, k))


H, K, S, C = (Iterator(size(text), i) for i, text in enumerate(("H", "k", "s", "Ci")))


@pytest.mark.parametrize(
    ("dim", "iterators"),
    [
        (Split(H, K), (H, K)),
        (MergeMajor(H, size("k")), (H,)),
        (MergeMinor(H, size("k")), (H,)),
        (Shift(H, 1), (H,)),
        (Shift(H, -5), (H,)),
        (Stride(K, size("s")), (K,)),
        (Share(H, 0), (H,)),
    ],
)
def test_a_coordinate_stays_in_its_domain(dim, iterators):
    assert all(value is not None and 0 <= value < dim.size.value() for value in table(dim, *iterators))


def test_a_merge_and_the_split_of_its_parts_are_the_dim_itself():
    joined = Split(MergeMajor(H, size("k")), MergeMinor(H, size("k")))
    assert table(joined, H) == table(H, H)


def test_a_window_is_centred_and_zero_padded():
    assert table(Unfold(H, K), H, K)[:6] == [None, 0, 1, 0, 1, 2]
    assert table(Unfold(H, K), H, K)[-3:] == [10, 11, None]


def test_a_strided_window_is_padded_left_by_half_of_stride_times_window():
    dilated = Unfold(H, Stride(K, size("s")))
    assert table(dilated, H, K)[:3] == [None, None, 1]  # left: floor(2*3 / 2) = 3, not 2 * floor(3 / 2)


@pytest.mark.parametrize(
    ("one", "other", "iterators"),
    [
        (Split(Split(H, K), S), Split(H, Split(K, S)), (H, K, S)),
        (MergeMajor(MergeMajor(H, size("k")), size("s")), MergeMajor(H, size("k*s")), (H,)),
        (MergeMinor(MergeMajor(H, size("k")), size("s")), MergeMajor(MergeMinor(H, size("k*s")), size("k")), (H,)),
        (MergeMajor(Split(H, K), size("k")), H, (H, K)),
        (MergeMinor(Split(H, K), size("k")), K, (H, K)),
        (Stride(Split(H, K), size("s")), Split(H, Stride(K, size("s"))), (H, K)),
        (MergeMajor(Stride(H, size("s")), size("k*s")), MergeMajor(H, size("k")), (H,)),
        (MergeMinor(Stride(H, size("s")), size("k*s")), Stride(MergeMinor(H, size("k")), size("s")), (H,)),
        (Shift(Shift(H, 1), 1), Shift(H, 2), (H,)),
    ],
)
def test_forms_that_the_rules_choose_between_are_the_same_function(one, other, iterators):
    assert one != other
    assert table(one, *iterators) == table(other, *iterators)


@given(st.integers(-30, 30).filter(bool), st.integers(-30, 30).filter(bool))
def test_shifts_add_up(a, b):
    expected = [(i + a + b) % 12 for i in range(12)]
    assert table(Shift(Shift(H, a), b), H) == expected


def test_shares_are_left_out_of_coordinates():
    dim = Unfold(Shift(Share(H, 0), 1), Share(Share(K, 0), 1))
    assert without_shares(dim) == Unfold(Shift(H, 1), K)
    assert without_shares(Split(MergeMajor(Share(H, 0), size("k")), Stride(Share(K, 0), size("s")))) == Split(
        MergeMajor(H, size("k")), Stride(K, size("s"))
    )
    assert without_shares(H) is H


def test_a_dim_knows_what_lies_below_it():
    r = Reduction(size("k"), 0)
    dim = Unfold(H, Stride(Share(r, 1), size("s")))
    assert dim.chain == 3
    assert dim.weights == {1}
    assert dim.iterators == {H, r}
    assert Stride(r, size("s")).discards
    assert not dim.discards
    assert dim.window.ends_in_reduce
    assert not dim.ends_in_reduce
    assert len(list(Split(dim, dim).walk())) == 6


def test_a_convolution_is_printed_as_text_latex_and_graph():
    operator = convolution()
    assert str(operator) == ("y[i0, i1, i2] = sum(r0, r1) x[i0, r0, [i2 + r1 - floor(k/2)]] * W0[r0, r1, i1]")
    assert r"\sum_{r_{0}, r_{1}} x[i_{0}, r_{0}, [i_{2} + r_{1} - \lfloor k/2 \rfloor]]" in operator.formula(latex=True)
    dot = operator.graphviz()
    assert dot.startswith("digraph operator {")
    assert dot.count("shape=box") == 7  # three of x, three of W0, one repeated
    assert '"unfold: H"' in dot


def test_every_primitive_has_a_formula():
    dim = Shift(Split(MergeMajor(H, size("k")), MergeMinor(H, size("k"))), -2)
    assert str(dim) == "(((i0) div (k))*k + (i0) mod (k) - 2) mod (H)"
    assert str(Stride(K, size("s"))) == "s*i1"
    for shown in (dim, Stride(K, size("s")), Unfold(H, K), Share(H, 0)):
        assert shown.formula(latex=True).isascii()


def test_shapes_follow_from_the_coordinates():
    operator = convolution()
    assert [str(s) for s in operator.input_shape] == ["N", "Ci", "H"]
    assert [str(s) for s in operator.output_shape] == ["N", "Co", "H"]
    assert [[str(s) for s in shape] for shape in operator.weight_shapes] == [["Ci", "k", "Co"]]
    assert operator.input_coordinates[1] == operator.reductions[0]
    assert operator.weight_coordinates[0][2] == operator.output[1]


def test_the_digest_does_not_depend_on_the_order_of_a_weights_dims():
    assert convolution() == convolution(order=True)
    assert len({convolution(), convolution(order=True)}) == 1


def test_the_digest_is_equal_in_every_process():
    code = (
        "import json, sys; sys.path.insert(0, 'tests/unit'); from test_search_graph import convolution\n"
        "torch = 'torch' in sys.modules; print(json.dumps([hex(convolution().digest), torch]))"
    )
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        found.append(json.loads(done.stdout))
    assert found == [[hex(convolution().digest), False]] * 2


def test_a_weightless_and_a_repeating_operator_can_be_built():
    build = Assembler(SYMBOLS)
    n, c, h = build.output("N", "Ci", "H")
    major, minor = build.merge(h, "s")
    build.expand(minor)
    operator = build.finish(n, c, build.shift(major))
    assert operator.weights == ()
    assert operator.expansions == (minor,)
    assert str(operator) == "y[i0, i1, i2] = x[i0, i1, ((i2) div (s) + 1) mod (H/s)]"


def test_every_method_of_the_assembler_takes_its_dims_off_the_interface():
    build = Assembler(SYMBOLS)
    n, h = build.output("N", "H")
    (k,) = build.reduce("k")
    joined = build.split(n, h)
    strided = build.stride(k, "s")
    assert build.interface == [joined, strided]
    assert build.finish(joined, strided).input_shape == (size("N*H"), size("k*s"))


def test_a_dim_is_used_once():
    build = Assembler(SYMBOLS)
    n, h = build.output("N", "H")
    build.shift(h)
    with pytest.raises(SearchError, match="i1 is not on the interface; it was used already"):
        build.split(n, h)
    with pytest.raises(SearchError, match="i0 is not on the interface"):
        build.unfold(n, n)
    assert n in build.interface


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda b, h: b.finish(), "i0 not used; give them to the input"),
        (lambda b, h: b.merge(h, "Ci/k"), "size Ci/k is not whole"),
        (lambda b, h: b.merge(h, "Co"), "a block of Co does not divide a dim of H"),
        (lambda b, h: b.shift(h, 0), "a Shift by 0 moves nothing"),
        (lambda b, h: b.share(h, 0), "weight 0 was not begun"),
        (lambda b, h: b.output("1"), "size 1 is not whole"),
        (lambda b, h: (b.weight(), b.finish(h)), "weight 0 has no dims"),
        (lambda b, h: Stride(h, SYMBOLS.size("1/k")), "a stride of 1/k is not a size"),
        (lambda b, h: Operator(SYMBOLS, (H,), (), (K,)), "i1, which is no iterator of the operator"),
        (lambda b, h: Operator(SYMBOLS, (K,), (), (K,)), "iterator i1 stands at position 0"),
    ],
)
def test_a_wrong_use_is_refused_in_one_line(act, message):
    build = Assembler(SYMBOLS)
    (h,) = build.output("H")
    with pytest.raises(SearchError, match=message) as caught:
        act(build, h)
    assert "\n" not in str(caught.value)


def test_an_operator_travels_between_processes_whatever_was_asked_of_it():
    build = Assembler(Symbols.of(["N", "C", "D", "H"], ["k"], [{"N": 2, "C": 3, "D": 4, "H": 9, "k": 3}]))
    n, d, h = build.output("N", "D", "H")
    c, a = build.contract(inner=build.reduce("C", "k"), outer=[d])
    operator = build.finish(n, c, build.unfold(h, a))
    for dim in (*operator.output, *operator.input):
        assert dim.iterators
    copy = pickle.loads(pickle.dumps(operator))
    assert copy == operator
    assert str(copy) == str(operator)
    assert copy.output[0].iterators == operator.output[0].iterators


def test_an_operator_may_be_sent_while_its_space_is_searched():
    # A pool pickles in a thread of its own, while the search makes more sizes and asks dims for their properties.
    symbols = Symbols.of(["N", "C", "D", "H"], ["k", "g"], [{"N": 2, "C": 8, "D": 8, "H": 12, "k": 3, "g": 2}])
    build = Assembler(symbols)
    n, d, h = build.output("N", "D", "H")
    c, a = build.contract(inner=build.reduce("C", "k"), outer=[d])
    operator = build.finish(n, c, build.unfold(h, a))
    ended, sent = Event(), 0

    def search() -> None:
        for powers in product(range(-9, 10), repeat=4):
            symbols.from_exponents((0, 0, *powers))
            if ended.is_set():
                return

    before = len(pickle.dumps(operator))
    searcher = Thread(target=search)
    searcher.start()
    try:
        while searcher.is_alive() and sent < 300:
            assert pickle.loads(pickle.dumps(operator)) == operator
            sent += 1
    finally:
        ended.set()
        searcher.join()
    assert sent == 300
    assert len(pickle.dumps(operator)) == before
