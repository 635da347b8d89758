"""Searching Canvas's kernels: moves, tree search and random search on the base that Syno's searchers have."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product as pairs
from math import log10, nan
from random import Random
from statistics import median

import pytest
from canvas_in_torch import Runner

from cofire.errors import SearchError
from cofire.search.canvas import Extent, Kernel, Limits
from cofire.search.canvas.actions import Action, State, actions
from cofire.search.canvas.primitives import Activation, Bmm, Broadcast, Convolution, Fc
from cofire.search.canvas.search import (
    CanvasMoves,
    KernelRandomSearch,
    KernelSearcher,
    KernelSpace,
    KernelTreeSearch,
    Stage,
    within,
)
from cofire.search.canvas.variables import C

PLACES = (Extent(16, 8, 8), Extent(32, 4, 4))
LIMITS = Limits(primitives=(4, 6))
SPACE = KernelSpace(PLACES, LIMITS)
TINY = KernelSpace(PLACES, Limits(primitives=(2, 3), weighted=(1, 2), kinds=("fc", "softmax", "broadcast")))
SEARCHERS = (KernelTreeSearch, KernelRandomSearch)
RELU = Activation("relu")


def cheapness(kernel: Kernel) -> float:
    return -float(kernel.multiply_adds(PLACES[0]))


def parts(kernel: Kernel) -> tuple[bool, bool]:
    """Whether a kernel has a Bmm, and whether it has a depthwise convolution."""
    primitives = [node.primitive for node in kernel.graph.nodes]
    depthwise = any(isinstance(one, Convolution) and one.channels is None for one in primitives)
    return any(isinstance(one, Bmm) for one in primitives), depthwise


def planted(kernel: Kernel) -> float:
    """A half for each part, less a tenth for every tenfold of multiply-adds."""
    return sum(parts(kernel)) / 2 - 0.1 * log10(1 + kernel.multiply_adds(PLACES[0]))


def evaluations_until_planted(searcher: KernelSearcher, budget: int) -> int:
    for found in searcher.run(budget):
        if all(parts(found.operator)) and found.operator.multiply_adds(PLACES[0]) <= 60_000:
            return found.evaluation + 1
    return budget + 1


def history(searcher: KernelSearcher, budget: int) -> list[tuple[str, float]]:
    return [(f"{found.operator.digest:x}", found.reward) for found in searcher.run(budget)]


def planned(space: KernelSpace = SPACE, num_primitives: int = 5, *choices: tuple) -> Stage:
    """The stage after the first plan of so many primitives and some of them applied."""
    stage = Stage(None, space.plans(num_primitives)[0])
    for primitive, *inputs in choices:
        stage = Stage(stage.state, Action(primitive, tuple(inputs)))
    return stage


# Moves


def test_candidates_that_are_kept_are_the_legal_actions():
    moves, random = CanvasMoves(SPACE), Random(4)
    for plan in random.sample(SPACE.plans(5), 4):
        stage = Stage(None, plan)
        while stage.state is not None and stage.state.left:
            found = [after for kind in moves.kinds(stage) for after in moves.candidates(stage, kind)]
            kept = [after for after in found if moves.keeps(after)]
            legal = Counter(map(str, actions(stage.state)))
            assert Counter(str(after.choice) for after in kept) == legal
            if not kept:
                break
            stage = random.choice(kept)


def test_the_first_step_is_a_plan_of_some_primitives_for_every_number_of_groups():
    moves = CanvasMoves(SPACE)
    assert moves.kinds(moves.root) == ["4 primitives", "5 primitives", "6 primitives"]
    plans = [after.state.plan for after in moves.candidates(moves.root, "5 primitives") if after.state is not None]
    assert {plan.num_primitives for plan in plans} == {5}
    assert {(plan.target.groups, plan.needs_bmm) for plan in plans} == set(pairs((1, 2, 4, 8, 16), (False, True)))
    ungrouped = replace(SPACE, limits=replace(LIMITS, bmm_share=0.0, kinds=("fc", "bmm")))
    assert [(plan.target.groups, plan.needs_bmm) for plan in ungrouped.plans(4)] == [(1, False)]
    weighty = replace(SPACE, limits=replace(LIMITS, primitives=(2, 6), weighted=(3, 4)))
    assert list(weighty.plan_sizes()) == [5, 6]


def test_a_state_is_the_same_whatever_the_order_of_its_primitives():
    one = planned(SPACE, 5, (RELU, 0), (Fc(C), 0), (Broadcast("add"), 1, 2))
    other = planned(SPACE, 5, (Fc(C), 0), (RELU, 0), (Broadcast("add"), 2, 1))
    turned = planned(SPACE, 5, (Fc(C), 0), (RELU, 0), (Broadcast("add"), 1, 2))
    assert one.digest == other.digest
    assert len({one.digest, turned.digest, planned(SPACE, 5, (RELU, 0)).digest}) == 3
    stages = [Stage(None, plan) for count in (4, 5) for plan in SPACE.plans(count)]
    assert len({stage.digest for stage in (CanvasMoves(SPACE).root, *stages)}) == len(stages) + 1


def test_a_step_has_the_same_name_wherever_it_is_done_to_the_same():
    moves = CanvasMoves(SPACE)

    def name(before: Stage, *inputs: int) -> str:
        return moves.key(before, Stage(before.state, Action(RELU, inputs)))

    here, there = planned(SPACE, 5, (Fc(C), 0)), planned(SPACE, 6, (Activation("tanh"), 0), (Fc(C), 0))
    assert name(here, 1) == name(there, 2)
    assert len({name(here, 0), name(here, 1), name(there, 1)}) == 3
    assert moves.key(here, Stage(here.state, Action(Activation("gelu"), (1,)))) != name(here, 1)


def brute_force(state: State) -> dict[int, Kernel]:
    """All kernels below a state."""
    if not state.left:
        return {kernel.digest: kernel for kernel in state.kernels()}
    found: dict[int, Kernel] = {}
    for action in actions(state):
        found |= brute_force(state.apply(action))
    return found


def test_the_tree_finds_every_kernel_of_a_small_space_and_then_stops():
    every = {digest: one for n in (2, 3) for digest, one in brute_force(State.start(TINY.plans(n)[0])).items()}
    search = KernelTreeSearch(TINY, cheapness)
    assert {found.operator.digest for found in search.run(2000)} == set(every)
    assert 100 < len(every) < 2000
    assert search.propose() is None


def test_what_walks_have_buried_has_no_kernel_below_it():
    limits = Limits(primitives=(3, 3), kinds=("fc", "fold", "broadcast"))
    moves, random = CanvasMoves(KernelSpace(PLACES, limits)), Random(0)
    for _ in range(150):
        moves.complete(moves.root, random)
    start = State.start(moves.space.plans(3)[0])
    after_one = [start.apply(action) for action in actions(start)]
    stages = [Stage(state, action) for state in after_one for action in actions(state)]
    buried = [stage.state for stage in stages if not moves.keeps(stage)]
    assert 5 < len(buried) < len(stages) / 2
    assert not any(brute_force(state) for state in buried if state is not None)


# Searchers


@pytest.mark.parametrize("kind", SEARCHERS)
def test_every_result_closes_at_every_place_and_is_evaluated_once(kind):
    search = kind(SPACE, planted, seed=1)
    kernels = [found.operator for found in search.run(16)]
    assert len({kernel.digest for kernel in kernels}) == len(kernels) == 16
    for kernel, extent in pairs(kernels, PLACES):
        assert 4 <= kernel.graph.num_primitives <= 6
        runner = Runner(kernel, extent)
        assert runner.output.shape == (1, *extent)
        assert runner.parameters == kernel.parameters(extent)


def test_the_tree_finds_a_planted_kernel_with_fewer_evaluations_than_random_search():
    needed = {
        kind: median(evaluations_until_planted(kind(SPACE, planted, seed), 70) for seed in range(5))
        for kind in SEARCHERS
    }
    assert needed[KernelTreeSearch] < 0.7 * needed[KernelRandomSearch]


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_seed_decides_everything(kind):
    first, again, other = (history(kind(SPACE, cheapness, seed), 15) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_restored_search_goes_on_as_if_never_stopped(kind):
    whole = history(kind(SPACE, cheapness, seed=5), 30)
    first = kind(SPACE, cheapness, seed=5)
    head = history(first, 12)
    saved = json.loads(json.dumps(first.state()))

    def unasked(kernel: Kernel) -> float:
        raise AssertionError(f"{kernel} was evaluated again")

    resumed = kind(SPACE, unasked)
    resumed.restore(saved)
    resumed.reward = cheapness
    assert head + history(resumed, 18) == whole


def test_a_proposal_in_flight_survives_a_restart():
    search = KernelTreeSearch(SPACE, cheapness, seed=2)
    history(search, 4)
    flying = [search.propose(), search.propose()]
    resumed = KernelTreeSearch(SPACE, cheapness)
    resumed.restore(search.state())
    assert list(resumed.in_flight) == flying
    assert history(resumed, 6) == history(search, 6)


def test_kernels_in_flight_are_distinct_and_their_order_does_not_depend_on_timing():
    with ThreadPoolExecutor(3) as executor:
        runs = [history(KernelTreeSearch(SPACE, cheapness, 4), 1)]
        for _ in range(2):
            search = KernelTreeSearch(SPACE, cheapness, seed=4)
            runs.append([(f"{f.operator.digest:x}", f.reward) for f in search.run(20, executor, in_flight=3)])
    assert runs[1] == runs[2]
    assert len(set(runs[1])) == len(runs[1]) == 20
    assert runs[1][0] == runs[0][0]


def test_kernels_travel_between_processes():
    for found in KernelRandomSearch(SPACE, cheapness, 3).run(10):
        again = pickle.loads(pickle.dumps(found.operator))
        assert again == found.operator
        assert again.digest == found.operator.digest
        assert cheapness(again) == found.reward


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_failed_kernel_is_left_out_and_not_tried_again(kind):
    asked: list[int] = []

    def reward(kernel: Kernel) -> float:
        asked.append(kernel.digest)
        return nan if len(asked) % 2 else 1.0

    search = kind(SPACE, reward, seed=1)
    assert len(list(search.run(10))) == 5
    assert len(set(asked)) == len(asked) == 10
    again = kind(SPACE, reward)
    again.restore(search.state())
    assert again.state() == search.state()


def test_the_history_is_equal_in_every_process_and_needs_no_pytorch():
    script = (
        "import sys\n"
        "from cofire.search.canvas.search import KernelRandomSearch, KernelSpace, KernelTreeSearch, Limits\n"
        "space = KernelSpace(((16, 8, 8), (32, 4, 4)), Limits(primitives=(4, 6)))\n"
        "for kind in KernelTreeSearch, KernelRandomSearch:\n"
        "    search = kind(space, lambda kernel: -kernel.multiply_adds(space.extents[0]), 7)\n"
        "    print(*(f'{found.operator.digest:x}' for found in search.run(12)))\n"
        "print('torch' in sys.modules)"
    )
    expected = [[digest for digest, _ in history(kind(SPACE, cheapness, 7), 12)] for kind in SEARCHERS]
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert [line.split() for line in run.stdout.splitlines()] == [*expected, ["False"]]


# Filters


@pytest.mark.parametrize("kind", SEARCHERS)
def test_results_pass_all_filters_and_refusals_are_counted_by_name(kind):
    first, second = PLACES
    window = {first: (1000, 60_000), second: (0, 50_000)}
    seen: list[Kernel] = []
    filters = {
        "multiply-adds": within(Kernel.multiply_adds, window),
        "parameters": within(Kernel.parameters, {second: (1, 2000)}),
        "depthwise": lambda kernel: bool(seen.append(kernel)) or not parts(kernel)[1],
    }
    search = kind(replace(SPACE, filters=filters), lambda _: 0.0, seed=3)
    kernels = [found.operator for found in search.run(25)]
    assert len(kernels) == 25
    for kernel in kernels:
        assert 1000 <= kernel.multiply_adds(first) <= 60_000
        assert kernel.multiply_adds(second) <= 50_000
        assert 1 <= kernel.parameters(second) <= 2000
        assert not parts(kernel)[1]
    assert search.refused["multiply-adds"] > search.refused["depthwise"] == sum(parts(kernel)[1] for kernel in seen)
    assert search.refused["closing"] > 0


def test_where_all_plans_are_due_every_kernel_has_a_bmm():
    space = replace(SPACE, limits=replace(LIMITS, bmm_share=1.0))
    for kind in SEARCHERS:
        assert all(parts(found.operator)[0] for found in kind(space, cheapness).run(8))


def test_a_bmm_is_due_in_some_walks_as_the_limits_say():
    shares = []
    for share in (0.0, 0.2, 0.8):
        moves, random = CanvasMoves(replace(SPACE, limits=replace(LIMITS, bmm_share=share))), Random(1)
        plans = [Stage(None, plan) for n in moves.space.plan_sizes() for plan in moves.space.plans(n) if plan.needs_bmm]
        due = {moves.key(moves.root, stage) for stage in plans}
        walks = [walk for walk in (moves.complete(moves.root, random) for _ in range(40)) if walk is not None]
        assert len(walks) > 30
        shares.append(sum(walk.keys[0] in due for walk in walks) / len(walks))
        assert all(parts(walk.operator)[0] for walk in walks if walk.keys[0] in due)
    assert 0 == shares[0] < shares[1] < shares[2] < 1


# Errors


@pytest.mark.parametrize("kind", SEARCHERS)
@pytest.mark.parametrize(
    ("kinds", "filters", "message"),
    [
        (("scale", "unfold"), {}, r"no kernel was found; rule 'closing' refused most, \d+ of \d+"),
        (
            ("scale", "shift"),
            {"cheap": lambda _: True, "none": lambda _: False},
            r"filter 'none' refused most, (\d+) of \1",
        ),
    ],
)
def test_a_search_that_finds_nothing_names_what_refused_most(kind, kinds, filters, message):
    limits = Limits(primitives=(2, 2), weighted=(1, 1), kinds=kinds, bmm_share=0.0, spatial_weights=True)
    with pytest.raises(SearchError, match=message) as caught:
        list(kind(KernelSpace(PLACES, limits, filters), cheapness).run(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KernelTreeSearch(SPACE, cheapness, exploration=-1.0), "exploration = -1.0"),
        (lambda: KernelSpace(()), "no place to fill"),
        (lambda: KernelSpace((Extent(16, 0, 4),)), "16, 0, 4 of a place must be at least 1"),
        (lambda: KernelSpace(PLACES, filters={"whole": lambda _: True}), "the name of rule 'whole'"),
        (lambda: within(Kernel.parameters, {PLACES[0]: (3, 2)}), "bounds 3 to 2 at C, H, W = 16, 8, 8"),
        (lambda: list(KernelTreeSearch(SPACE, cheapness).run(1, in_flight=2)), "needs an executor"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(call, message):
    with pytest.raises(SearchError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_state_of_another_search_is_refused():
    state = KernelRandomSearch(SPACE, cheapness).state()
    with pytest.raises(SearchError, match="searcher = 'KernelRandomSearch'"):
        KernelTreeSearch(SPACE, cheapness).restore(state)
    for other in (TINY, replace(SPACE, extents=PLACES[:1]), replace(SPACE, filters={"any": lambda _: True})):
        with pytest.raises(SearchError, match="the state has space = "):
            KernelRandomSearch(other, cheapness).restore(state)
