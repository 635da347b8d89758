"""The lower bound that guides synthesis: it never exceeds what is needed, and sees what can never end."""

from dataclasses import replace
from random import Random

import pytest

from cofire.errors import SearchError
from cofire.search import Allowance, Space, Symbols, enumerate_operators
from cofire.search.completion import CompletionBound
from cofire.search.distance import INFINITE
from cofire.search.interface import Contraction, Interface
from cofire.search.primitives import Iterator, MergeMajor, MergeMinor, Reduction, Share, Shift, Split, Unfold
from cofire.search.sampling import Moves

SYMBOLS = Symbols.of(["N", "C", "D", "H"], ["k", "g"], [{"N": 4, "C": 64, "D": 64, "H": 28, "k": 3, "g": 8}])
C, D, H, K, G = (SYMBOLS.size(name) for name in ("C", "D", "H", "k", "g"))


def space(**changes) -> Space:
    """[N, C, H] -> [N, D, H] with C, D, k and g each allowed twice."""
    n = SYMBOLS.size("N")
    allowance = Allowance.of(SYMBOLS, {"C": 2, "D": 2, "k": 2, "g": 2})
    return replace(Space((n, C, H), (n, D, H), allowance, fixed=((0, 0),)), **changes)


def interface(*dims, weights=(), allowance=None, steps=()) -> Interface:
    return Interface(tuple(sorted(dims)), weights, (), (), allowance or space().allowance, steps)


d, h = Iterator(D, 1), Iterator(H, 2)
c, k = Reduction(C, 0), Reduction(K, 1)
shared_c, shared_k, shared_d = Share(c, 0), Share(k, 0), Share(d, 0)
contracted = {"weights": ((shared_c.source, shared_k.source, d),), "steps": (("contract", 1), ("reduce", 2))}


def steps(state: Interface, depth: int = 8, **changes) -> int:
    return CompletionBound(space(**changes), depth)(state)


def test_one_contraction_takes_any_number_of_dims():
    assert steps(interface(c, d, h)) == 1
    parts = MergeMajor(d, G), MergeMinor(d, G)
    assert steps(interface(c, *parts, h, steps=(("merge", 1), ("reduce", 1)))) == 1


def test_a_weight_that_must_come_is_a_step():
    assert steps(interface(c, h)) == 1
    assert steps(interface(c, h), needs_weight=False) == 0


def test_a_window_goes_by_an_unfold_and_an_even_dim_does_not():
    assert steps(interface(shared_c, shared_k, h, **contracted)) == 1
    even = Share(Reduction(G, 1), 0)
    assert steps(interface(shared_c, even, h, **contracted)) == INFINITE


def test_an_even_window_goes_where_windows_may_be_even():
    even = Share(Reduction(G, 1), 0)
    assert steps(interface(shared_c, even, h, **contracted), odd_windows=False) == 1


def test_a_reduction_that_no_weight_has_is_a_window_for_pooling_only():
    taken = {"weights": ((c, d),), "steps": (("contract", 1), ("reduce", 2))}
    assert steps(interface(shared_c, k, h, **taken), max_strides=0, max_merges=0) == INFINITE
    assert steps(interface(shared_c, k, h, **taken)) == 2
    assert steps(interface(shared_c, k, h, **taken), needs_weight=False) == 1


def test_a_primary_symbol_beyond_the_allowance_can_never_go():
    none = Allowance.of(SYMBOLS, {"C": 0, "D": 2, "k": 2, "g": 2})
    one = Allowance.of(SYMBOLS, {"C": 1, "D": 2, "k": 2, "g": 2})
    two = Reduction(C * C, 0)
    assert CompletionBound(space(), 8).is_hopeless(interface(two, d, h, allowance=none))
    assert not CompletionBound(space(), 8).is_hopeless(interface(c, d, h, allowance=one))


def test_more_than_weights_may_have_alone_can_never_go():
    state = interface(Reduction(C * G, 0), d, h)
    assert CompletionBound(space(max_outer=64), 8).is_hopeless(state)
    assert not CompletionBound(space(max_outer=512), 8).is_hopeless(state)


def test_a_reduction_is_parted_after_a_split_and_a_shift_at_most():
    assert steps(interface(Reduction(C * H, 0), d), max_splits=0) == INFINITE
    assert steps(interface(Reduction(C * H, 0), d)) >= 4


def test_an_iterator_is_parted_by_a_merge_and_above_a_split_a_shift_comes_first():
    wide = Iterator(C * H, 1)
    bound = CompletionBound(
        space(output=(SYMBOLS.size("N"), C * H), needs_weight=False, max_reshape_over_shift=64.0), 8
    )
    assert bound(interface(wide)) == 1
    split = Split(Iterator(C, 1), h)
    assert bound(interface(split, steps=(("split", 1),))) == 2
    assert bound(interface(Shift(split), steps=(("shift", 1), ("split", 1)))) == 1


def test_a_merge_above_an_unfold_takes_less_than_the_window_off():
    slid = Unfold(Iterator(C * H, 1), Share(k, 0))
    state = interface(slid, weights=((k, d),), steps=(("contract", 1), ("reduce", 1), ("unfold", 1)))
    assert steps(state) >= 2
    small = space(output=(SYMBOLS.size("N"), C * K, H))
    slid = Unfold(Iterator(C * K, 1), Share(k, 0))
    state = interface(slid, h, weights=((k, d),), steps=(("contract", 1), ("reduce", 1), ("unfold", 1)))
    assert CompletionBound(small, 8)(state) == 2


def test_the_bound_is_that_of_the_matrix_product_and_the_convolution():
    moves = Moves(space(), 6)
    assert 2 <= moves.ahead(moves.root) <= 6
    both = interface(c, k, d, h, steps=(("reduce", 2),))
    assert CompletionBound(space(), 6)(both) == 2
    after = both.step(
        "contract", (c, k, d), (shared_c, shared_k), both.allowance, weight=Contraction(0, (c, k), (d,)).dims
    )
    assert CompletionBound(space(), 6)(after) == 1


def test_a_bound_above_the_steps_left_is_infinite_and_grows_back_with_them():
    bound = CompletionBound(space(), 6)
    late = interface(c, k, d, h, steps=(("reduce", 2), ("shift", 3)))
    assert bound(late) == INFINITE
    assert bound(interface(c, k, d, h, steps=(("reduce", 2), ("shift", 2)))) == 2


def random_space(random: Random) -> Space | None:
    """A small space with any of the limits, or none where they contradict each other."""
    pick = random.choice
    mappings = [
        {"A": pick([4, 6, 8, 9, 12]), "B": pick([4, 6, 8, 9, 12]), "H": pick([6, 8, 9, 12, 18])}
        for _ in range(pick([1, 1, 2]))
    ]
    small = {"k": pick([3, 3, 5, 2]), "s": pick([2, 2, 3])}
    symbols = Symbols.of(["A", "B", "H"], ["k", "s"], [{**mapping, **small} for mapping in mappings])
    shapes = [
        (("A", "H"), ("B", "H")),
        (("A", "H"), ("A", "H")),
        (("H",), ("H",)),
        (("A",), ("B",)),
        (("A*s", "H"), ("A", "H*s")),
        (("A", "H*s"), ("A", "H")),
        (("A*H",), ("A", "H")),
        (("H", "A"), ("B*k", "H")),
    ]
    read, written = (tuple(symbols.size(text) for text in shape) for shape in pick(shapes))
    try:
        return Space(
            read,
            written,
            Allowance.of(symbols, {name: pick([0, 1, 1, 2]) for name in symbols.names}),
            unordered_input=frozenset(pick([(), (), (0,)])),
            unordered_output=frozenset(pick([(), (), (0,)])),
            max_tensors=pick([1, 2, 2, 3, 3]),
            max_reductions=pick([0, 1, 2]),
            max_chain=pick([3, 4, 6]),
            max_splits=pick([None, 1, 2]),
            max_merges=pick([None, 1, 2]),
            max_shifts=pick([None, 0, 1]),
            max_strides=pick([0, 0, 1]),
            max_unfolds=pick([None, 1]),
            odd_windows=pick([True, True, False]),
            max_reshape_over_shift=pick([2.0, 5.0, 64.0]),
            max_repeat=pick([1, 1, 1, 4]),
            max_outer=pick([8, 32, 512]),
            low_rank=pick([(3, 8), (2, 9)]),
            needs_matmul=pick([True, False]),
            needs_weight=pick([True, True, False]),
        )
    except SearchError:
        return None


@pytest.mark.parametrize("seed", range(6))
def test_guided_enumeration_of_random_spaces_loses_no_operator(seed):
    random, found = Random(seed), 0
    for _ in range(12):
        there = random_space(random)
        for depth in range(1, 4) if there is not None else ():
            assert there is not None
            unguided = {operator.digest for operator in enumerate_operators(there, depth, "none")}
            assert {operator.digest for operator in enumerate_operators(there, depth)} == unguided
            found += len(unguided)
    assert found > 0


def test_guided_enumeration_opens_a_split_by_the_share_above_it():
    # The weight has a Split; only its Share lets an Unfold and then a Merge come, which a narrower bound forbade.
    numbers = [{"A": 4, "B": 9, "H": 8, "k": 2, "s": 3}, {"A": 9, "B": 4, "H": 18, "k": 2, "s": 3}]
    symbols = Symbols.of(["A", "B", "H"], ["k", "s"], numbers)
    size = symbols.size
    there = Space(
        (size("A*s"), size("H")),
        (size("A"), size("H*s")),
        Allowance.of(symbols, {"A": 1, "H": 1, "s": 2}),
        unordered_output=frozenset({0}),
        max_reductions=1,
        max_chain=6,
        max_merges=1,
        max_shifts=0,
        max_strides=0,
        max_unfolds=1,
        needs_matmul=False,
    )
    found = [str(operator) for operator in enumerate_operators(there, 5)]
    assert len(found) == len(enumerate_operators(there, 5, "none")) == 210
    assert any("div (H)" in text and "[i1*A + i0 + r0" in text for text in found)
