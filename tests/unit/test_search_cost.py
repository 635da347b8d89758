"""Cost of an operator before it is lowered: closed forms, published counts, and the cheapest staging by brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator as Results
from functools import cache
from itertools import chain, combinations, product
from math import prod

import numpy as np
import pytest
from operators_by_hand import CASES, begin, random_operator

from cofire.errors import SearchError
from cofire.search import Assembler, Operator, Symbols
from cofire.search.cost import Cost, cost, costs
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.loop_nest import Array, coordinate, loop_nest
from cofire.search.lowering.planner import plan
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Reduction, Shift, Stride

SEEDS = range(120)

# Most points of loops that are run one by one.
MAX_POINTS = 2000


def sizes(operator: Operator) -> dict[str, int]:
    return dict(zip(operator.symbols.names, operator.symbols.mappings[0], strict=True))


def case(name: str) -> tuple[Operator, Cost]:
    operator = CASES[name]().operator
    return operator, cost(operator)


# -- closed forms --------------------------------------------------------------------------------------


def test_linear_costs_inputs_times_outputs() -> None:
    operator, found = case("linear")
    n = sizes(operator)
    assert found.multiply_adds == found.naive_multiply_adds == n["B"] * n["L"] * n["C"] * n["D"]
    assert found.parameters == n["C"] * n["D"]
    assert found.input_elements == n["B"] * n["L"] * n["C"]
    assert found.output_elements == n["B"] * n["L"] * n["D"]
    assert found.largest_intermediate_elements == 0


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_convolution_costs_taps_times_channels_per_place(k: int) -> None:
    operator, found = case(f"conv2d k={k}")
    n = sizes(operator)
    assert found.parameters == n["C"] * n["D"] * k * k
    assert found.multiply_adds == n["B"] * n["H"] * n["W"] * found.parameters
    assert found.naive_multiply_adds == found.multiply_adds
    assert len(found.stages) == 1


def test_groups_divide_the_cost_of_a_convolution() -> None:
    operator, found = case("grouped")
    n = sizes(operator)
    assert found.parameters == n["C"] * n["D"] * n["k"] ** 2 // n["g"]
    assert found.multiply_adds == n["B"] * n["H"] * n["W"] * found.parameters


def test_depthwise_separable_convolution_costs_its_two_convolutions() -> None:
    operator, found = case("depthwise separable")
    n = sizes(operator)
    places = n["B"] * n["H"] * n["W"]
    assert [stage.multiply_adds for stage in found.stages] == [places * n["C"] * n["k"] ** 2, places * n["C"] * n["D"]]
    assert found.naive_multiply_adds == 2 * places * n["C"] * n["D"] * n["k"] ** 2
    assert found.largest_intermediate_elements == places * n["C"]
    elements = 2 * places * n["C"] + places * n["D"] + n["C"] * n["D"] + n["C"] * n["k"] ** 2
    assert found.tensor_bytes() == 4 * elements
    assert found.tensor_bytes(element_bytes=2) == 2 * elements


def test_sliding_pooling_sums_rows_before_columns() -> None:
    operator, found = case("sliding average pooling")
    n = sizes(operator)
    assert found.multiply_adds == 2 * n["B"] * n["C"] * n["H"] * n["W"] * n["k"]
    assert found.naive_multiply_adds == n["B"] * n["C"] * n["H"] * n["W"] * n["k"] ** 2


@pytest.mark.parametrize("name", ["pixel shuffle", "pixel unshuffle", "nearest upsampling", "tiling", "shift by 1"])
def test_a_view_costs_nothing(name: str) -> None:
    _, found = case(name)
    assert found.multiply_adds == found.naive_multiply_adds == found.parameters == 0


def test_a_weight_is_multiplied_where_the_value_is_smallest() -> None:
    # A low-rank pair: the input is contracted to rank R first although W0 was shared first.
    build = begin("M K N R", M=5, K=64, N=32, R=2)
    m, n = build.output("M", "N")
    k, r = build.reduce("K", "R")
    (r,) = build.contract([r], [n])
    (k,) = build.contract([k], [r])
    found = cost(build.finish(m, k))
    assert [stage.factor for stage in found.stages] == [1, 0]
    assert found.multiply_adds == 5 * 64 * 2 + 5 * 2 * 32
    assert found.naive_multiply_adds == 2 * 5 * 64 * 2 * 32
    assert found.largest_intermediate_elements == 5 * 2


# -- the case studies ----------------------------------------------------------------------------------


def case_study(first: bool, channels: int, places: int) -> Cost:
    """Operator 1 or 2 of a ResNet at g = 32, s = 2, k = 3, R = C / (g * s), of as many channels in as out."""
    numbers = {"B": 1, "C": channels, "D": channels, "H": places, "W": places}
    build = begin("B C D H W", "g k R", **numbers, g=32, k=3, R=channels // 64)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, i, j, rank, c = build.reduce("g", "k", "k", "R", "C/g")
    if first:
        group, i, j, rank = build.contract([group, i, j, rank], [d])
    else:
        group, i, rank = build.contract([group, i, rank], [d])
    c, j = build.contract([c, j], [rank])
    up = build.unfold(h, i)
    return cost(build.finish(b, build.split(group, c), up if first else build.shift(up, 1), build.unfold(w, j)))


def test_operator_1_is_a_window_and_a_low_rank_pair_in_stages() -> None:
    channels, places, rank = 128, 28, 2
    found = case_study(True, channels, places)
    one, two = channels // 32 * 3 * rank, 32 * 9 * channels * rank
    assert found.parameters == one + two
    # The window along W and W2 in each group; then the window along H and W1 over groups, taps and rank.
    assert [stage.multiply_adds for stage in found.stages] == [places**2 * channels * 3 * rank, places**2 * two]
    assert found.largest_intermediate_elements == 32 * places**2 * 3 * rank
    assert found.naive_multiply_adds == 2 * places**2 * channels * channels * 9 * rank
    assert found.multiply_adds < 0.52 * places**2 * channels * channels * 9


def test_operator_2_sums_the_tap_of_one_window_before_the_other() -> None:
    channels, places, rank = 128, 28, 2
    found = case_study(False, channels, places)
    assert found.parameters == channels // 32 * 3 * rank + 32 * 3 * channels * rank
    assert [stage.multiply_adds for stage in found.stages] == [
        places**2 * channels * 3 * rank,
        places**2 * 32 * 3 * channels * rank,
    ]
    assert found.largest_intermediate_elements == 32 * places**2 * rank


def test_gpt2_operator_saves_what_its_authors_report() -> None:
    # Syno's artifact: 123.6 M to 107.7 M parameters and 253.2 G to 231.5 G per sample of 2048 tokens, over 12 layers.
    build = begin("B L C", "q p t", B=1, L=2048, C=384, q=2, p=72, t=16)
    b, s, out = build.output("B", "L", "p*q*t")
    p, qt = build.merge(out, "q*t")
    q, t = build.merge(qt, "t")
    (c,) = build.contract(build.reduce("C"), [p, t])
    found = cost(build.finish(b, s, build.split(q, c)))
    assert 12 * (768 * 2304 - found.parameters) == pytest.approx(123.6e6 - 107.7e6, rel=0.005)
    assert 12 * (2048 * 768 * 2304 - found.multiply_adds) == pytest.approx(253.2e9 - 231.5e9, rel=0.005)


# -- against other ways to count -------------------------------------------------------------------------


def operators() -> Results[tuple[str, Operator]]:
    for name, make in CASES.items():
        yield name, make().operator
    for seed in SEEDS:
        yield f"seed {seed}", random_operator(seed)


def test_staging_never_costs_more_than_one_loop_nest() -> None:
    for name, operator in operators():
        found = cost(operator)
        assert found.multiply_adds <= found.naive_multiply_adds, name


def test_staging_never_costs_more_than_the_optimised_lowering() -> None:
    for name, operator in operators():
        assert cost(operator).multiply_adds <= plan(operator).work, name


def test_stages_take_every_weight_and_reduction_once() -> None:
    for name, operator in operators():
        stages = cost(operator).stages
        factors = [stage.factor for stage in stages if stage.factor is not None]
        assert sorted(factors) == list(range(len(Bound(operator).factors))), name
        summed = [dim for stage in stages for dim in stage.summed]
        assert len(summed) == len(set(summed)), name
        assert set(summed) == {dim for dim in operator.reductions if dim in _read(operator)}, name
        for stage in stages:
            assert stage.multiply_adds == prod(dim.size.value() for dim in stage.loops), name


def test_stages_run_one_by_one_give_the_operator() -> None:
    rng, count = np.random.default_rng(0), 0
    for name, operator in operators():
        if cost(operator).naive_multiply_adds > MAX_POINTS:
            continue
        bound = Bound(operator)
        x, *weights = (rng.standard_normal(shape) for shape in (bound.input_shape, *bound.weight_shapes))
        assert run_stages(bound, x, weights) == pytest.approx(loop_nest(operator, x, weights)), name
        count += 1
    assert count > 80


def run_stages(bound: Bound, x: Array, weights: list[Array]) -> Array:
    """Compute the output as the stages say, each value held at the labels that its stage leaves."""
    factors = [*weights, *(np.ones(bound.shape((dim,))) for dim in bound.masks)]
    value, labels = x, bound.input
    for stage in cost(bound.operator).stages:
        kept = tuple(dim for dim in stage.loops if dim not in stage.summed)
        result = np.zeros(bound.shape(kept))
        for point in np.ndindex(bound.shape(stage.loops)):
            at = dict(zip(stage.loops, point, strict=True))
            times = 1.0 if stage.factor is None else read(factors[stage.factor], bound.factors[stage.factor], at)
            result[tuple(at[dim] for dim in kept)] += read(value, labels, at) * times
        value, labels = result, kept
    points = [dict(zip(bound.output, point, strict=True)) for point in np.ndindex(bound.output_shape)]
    return np.array([read(value, labels, at) * bound.idle for at in points]).reshape(bound.output_shape)


def read(array: Array, labels: tuple[Dim, ...], at: dict[Dim, int]) -> float:
    """The element at a point of loops over any coordinates; zero where an Unfold leaves its domain."""
    place = [place_of(label, at) for label in labels]
    return 0.0 if None in place else float(array[tuple(place)])


def place_of(dim: Dim, at: dict[Dim, int]) -> int | None:
    """The value of a coordinate, read off the loops or off those below it."""
    if dim in at or isinstance(dim, Iterator):
        return at[dim]
    below = [place_of(part, at) for part in dim.below]
    if None in below:
        return None
    # The oracle's own formula for one primitive, on iterators that stand for what is below.
    stand_ins = [Iterator(part.size, k) for k, part in enumerate(dim.below)]
    return coordinate(on_iterators(dim, stand_ins), dict(zip(stand_ins, below, strict=True)))


def on_iterators(dim: Dim, below: list[Iterator]) -> Dim:
    """One primitive rebuilt on other dims."""
    match dim:
        case MergeMajor() | MergeMinor():
            return type(dim)(below[0], dim.block)
        case Shift():
            return Shift(below[0], dim.distance)
        case Stride():
            return Stride(below[0], dim.stride)
        case _:
            return type(dim)(*below)


def _read(operator: Operator) -> frozenset[Dim]:
    bound = Bound(operator)
    return frozenset().union(*(dim.iterators for dims in (bound.input, *bound.factors) for dim in dims))


@pytest.mark.parametrize("name", list(CASES))
def test_staging_of_a_small_operator_is_the_cheapest_of_all(name: str) -> None:
    operator, found = case(name)
    assert found.multiply_adds == cheapest_by_brute_force(operator)


@pytest.mark.parametrize("seed", range(60))
def test_staging_of_a_random_operator_is_the_cheapest_of_all(seed: int) -> None:
    operator = random_operator(seed)
    assert cost(operator).multiply_adds == cheapest_by_brute_force(operator)


def cheapest_by_brute_force(operator: Operator) -> int:
    """Try every view at every time, every cut of a weight's coordinates, and every part of the sums."""
    factors = Bound(operator).factors

    def sums(loops: frozenset[Dim], pending: frozenset[int], least: int) -> Results[frozenset[Dim]]:
        return _part_sums(loops, [dim for number in pending for dim in factors[number]], least)

    def stages(labels: frozenset[Dim], pending: frozenset[int]) -> Results[tuple[int, frozenset[Dim], frozenset[int]]]:
        for rest in sums(labels, pending, 1):
            yield _elements(labels), rest, pending
        for number in pending:
            for cut in product(*(_all_cuts(label) for label in factors[number])):
                for loops in _views(labels.union(*cut)):
                    for rest in sums(loops, pending - {number}, 0):
                        yield _elements(loops), rest, pending - {number}

    @cache
    def best(labels: frozenset[Dim], pending: frozenset[int]) -> float:
        if not pending and not any(isinstance(i, Reduction) for dim in labels for i in dim.iterators):
            return 0
        found = [
            paid + best(rest, left) for view in _views(labels) for paid, rest, left in _cheapest(stages(view, pending))
        ]
        return min(found)

    return int(best(frozenset(operator.input_coordinates), frozenset(range(len(factors)))))


def _part_sums(loops: frozenset[Dim], to_come: list[Dim], least: int) -> Results[frozenset[Dim]]:
    """What is left of loops after a sum over at least so many reductions."""
    compound = [dim for dim in loops if not isinstance(dim, Iterator)]
    needed = {i for dim in chain(compound, to_come) for i in dim.iterators}
    ready = [dim for dim in loops if isinstance(dim, Reduction) and dim not in needed]
    for count in range(least, len(ready) + 1):
        for chosen in combinations(ready, count):
            yield loops - set(chosen)


def _cheapest(
    stages: Results[tuple[int, frozenset[Dim], frozenset[int]]],
) -> Results[tuple[int, frozenset[Dim], frozenset[int]]]:
    """Of stages that lead to the same value, the cheapest."""
    least: dict[tuple[frozenset[Dim], frozenset[int]], int] = {}
    for paid, *state in stages:
        key = (state[0], state[1])
        least[key] = min(paid, least.get(key, paid))
    for (rest, left), paid in least.items():
        yield paid, rest, left


def _elements(labels: frozenset[Dim]) -> int:
    return prod(dim.size.value() for dim in labels)


def _all_cuts(label: Dim) -> list[frozenset[Dim]]:
    cuts = [frozenset((label,))]
    if not isinstance(label, Iterator):
        cuts += [frozenset().union(*cut) for cut in product(*map(_all_cuts, label.below))]
    return cuts


def _views(labels: frozenset[Dim]) -> frozenset[frozenset[Dim]]:
    """Every set of labels that views lead to."""
    found = {labels}
    waiting = [labels]
    while waiting:
        now = waiting.pop()
        for label in now:
            if isinstance(label, Iterator):
                continue
            gone = {label}
            if isinstance(label, MergeMajor):
                gone.add(MergeMinor(label.source, label.block))
            made = [(now - gone).union(label.below), (now - {label}).union(label.below)]
            for after in made:
                if after not in found:
                    found.add(after)
                    waiting.append(after)
    return frozenset(found)


# -- several mappings, other processes, bad input ----------------------------------------------------------


def test_every_mapping_has_its_own_cost_and_order() -> None:
    mappings = [{"M": 8, "K": 4, "N": 6, "k": 3}, {"M": 2, "K": 9, "N": 5, "k": 3}]
    build = Assembler(Symbols.of(["M", "K", "N"], ["k"], mappings))
    m, n = build.output("M", "N")
    (k,) = build.contract(build.reduce("K"), [n])
    operator = build.finish(m, k)
    assert [found.multiply_adds for found in costs(operator)] == [8 * 4 * 6, 2 * 9 * 5]
    assert [found.parameters for found in costs(operator)] == [4 * 6, 9 * 5]


def test_a_mapping_that_is_not_there_is_one_line() -> None:
    operator, _ = case("linear")
    with pytest.raises(SearchError, match=r"^mapping 1 of an operator with 1; count from 0 to 0$"):
        cost(operator, mapping=1)


def test_more_weights_than_stagings_are_searched_for_is_one_line() -> None:
    build = begin("M", M=3)
    (m,) = build.output("M")
    for _ in range(11):
        (m,) = build.contract([m])
    with pytest.raises(SearchError, match=r"^11 weights; stagings are searched for up to 10, use fewer$"):
        cost(build.finish(m))


def test_another_process_finds_the_same_stages_without_torch() -> None:
    code = """
import json, sys
from cofire.search import Assembler, Symbols
from cofire.search.cost import cost
build = Assembler(Symbols.of("BCDHW", "k", [dict(B=2, C=3, D=4, H=5, W=5, k=3)]))
b, d, h, w = build.output("B", "D", "H", "W")
c, i, j = build.reduce("C", "k", "k")
(c,) = build.contract([c], [d])
c, i, j = build.contract([c, i, j])
stages = cost(build.finish(b, c, build.unfold(h, i), build.unfold(w, j))).stages
print(json.dumps(["torch" in sys.modules, [str(s) for s in stages]]))
"""
    found = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0][0] is False
