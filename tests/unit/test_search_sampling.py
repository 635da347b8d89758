"""Searching a space by sampling: moves, random walks, beam and Monte Carlo tree search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from math import nan
from random import Random

import pytest

from cofire.errors import SearchError
from cofire.search import Allowance, Operator, Space, Symbols, Synthesis, enumerate_operators
from cofire.search.baselines import BeamSearch, RandomSearch
from cofire.search.mcts import Statistics, TreeSearch
from cofire.search.primitives import Dim
from cofire.search.sampling import KINDS, Moves, Searcher, step_key

SEEDS = range(3)
SEARCHERS = (TreeSearch, RandomSearch, BeamSearch)


def convolution_space(**changes) -> Space:
    """[N, Ci, H] -> [N, Co, H] with the batch N fixed: Ci:2, Co:1, H:0, k=3:2."""
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in ("N", "Ci", "Co", "H"))
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "H": 0, "k": 2})
    return replace(Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),)), **changes)


def grouped_space() -> Space:
    """The same with groups g=4:2, which has hundreds of operators."""
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k", "g"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3, "g": 4}])
    n, ci, co, h = (symbols.size(name) for name in ("N", "Ci", "Co", "H"))
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2, "g": 2})
    return Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),))


@cache
def operators(depth: int) -> tuple[Operator, ...]:
    return tuple(enumerate_operators(convolution_space(), depth))


def multiply_adds(operator: Operator) -> float:
    """Minus the multiply-adds of the naive loop nest: all iterators, once per weight."""
    total = 1
    for dim in (*operator.output, *operator.reductions):
        total *= dim.size.value()
    return -float(total * len(operator.weights))


def dims_of(operator: Operator) -> set[Dim]:
    ends = (*operator.input, *(dim for weight in operator.weights for dim in weight))
    return {dim for end in ends for dim in end.walk()}


def likeness(planted: Operator):
    """A reward that is 1 for the planted operator and grows with the dims that another has in common with it."""
    target = dims_of(planted)

    def reward(operator: Operator) -> float:
        found = dims_of(operator)
        return len(found & target) / len(found | target)

    return reward


def evaluations_until(searcher: Searcher, planted: Operator, budget: int) -> int:
    for found in searcher.run(budget):
        if found.operator == planted:
            return found.evaluation + 1
    return budget + 1


def history(searcher: Searcher, budget: int) -> list[tuple[str, float]]:
    return [(f"{found.operator.digest:x}", found.reward) for found in searcher.run(budget)]


def test_moves_by_kind_are_the_steps_of_the_synthesis():
    space = convolution_space()
    moves, synthesis = Moves(space, 5), Synthesis(space, 5)
    for root in synthesis.roots():
        for state in (root, *synthesis.steps(root)):
            mine = [after for kind in KINDS for after in moves.candidates(state, kind) if moves.may_end(after)]
            assert {after.digest for after in mine} == {after.digest for after in synthesis.steps(state)}


def test_reductions_taken_step_by_step_are_the_roots_of_the_synthesis():
    moves, synthesis = Moves(convolution_space(), 5), Synthesis(convolution_space(), 5)
    level, seen = [moves.root], {}
    while level:
        seen.update((state.digest, state) for state in level)
        level = [after for state in level for after in moves.candidates(state, "reduce")]
    assert {d for d, state in seen.items() if moves.may_end(state)} == {root.digest for root in synthesis.roots()}


def test_a_step_has_the_same_name_on_different_interfaces():
    moves = Moves(convolution_space(), 6)
    (root,) = [r for r in moves.roots() if [str(d.size) for d in r.reductions] == ["k", "Ci"]] or moves.roots()[-1:]
    names: dict[str, set[int]] = {}
    firsts = [after for kind in KINDS for after in moves.candidates(root, kind)]
    for state in (root, *firsts):
        for kind in KINDS:
            for after in moves.candidates(state, kind):
                names.setdefault(step_key(state, after), set()).add(state.digest)
    assert any(len(places) > 1 for places in names.values())


def test_every_walk_ends_at_an_operator_of_the_space():
    moves, random = Moves(convolution_space(), 6), Random(0)
    walks = [moves.walk(moves.root, random, backtracks=20) for _ in range(60)]
    found = [walk for walk in walks if walk is not None]
    assert len(found) > 10
    for walk in found:
        assert walk.operator in operators(6)
        assert len(walk.keys) <= 7


def test_guided_walks_reach_the_input_more_often_than_unguided_ones():
    guided = Moves(convolution_space(), 7)
    unguided = Moves(convolution_space(), 7, "none")
    reached = [sum(m.walk(m.root, Random(k)) is not None for k in range(400)) for m in (guided, unguided)]
    assert reached[0] > 4 * max(1, reached[1])


@pytest.mark.parametrize("kind", SEARCHERS)
def test_no_operator_is_evaluated_twice_and_each_is_of_the_space(kind):
    found = [f.operator for f in kind(convolution_space(), 6, multiply_adds, seed=3).run(30)]
    assert len(set(found)) == len(found) > 5
    assert set(found) <= set(operators(6))


def test_the_tree_exhausts_a_small_space_and_then_stops():
    search = TreeSearch(convolution_space(), 5, multiply_adds)
    assert {found.operator for found in search.run(1000)} == set(operators(5))
    assert search.propose() is None
    assert search.step() is None


def test_the_tree_finds_a_planted_operator_with_fewer_evaluations_than_random_walks():
    space = grouped_space()
    *_, last = RandomSearch(space, 5, lambda _: 0.0, seed=99).run(31)
    planted = last.operator
    cost = {
        kind: sum(evaluations_until(kind(space, 5, likeness(planted), seed), planted, 60) for seed in SEEDS)
        for kind in (TreeSearch, RandomSearch)
    }
    assert cost[TreeSearch] < cost[RandomSearch]


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_seed_decides_everything(kind):
    first, again, other = (history(kind(convolution_space(), 6, multiply_adds, seed), 8) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_restored_search_goes_on_as_if_never_stopped(kind):
    space = convolution_space()
    whole = history(kind(space, 6, multiply_adds, seed=5), 9)
    first = kind(space, 6, multiply_adds, seed=5)
    head = history(first, 4)
    saved = json.loads(json.dumps(first.state()))

    def unasked(operator: Operator) -> float:
        raise AssertionError(f"{operator} was evaluated again")

    resumed = kind(space, 6, unasked)
    resumed.restore(saved)
    resumed.reward = multiply_adds
    assert head + history(resumed, 5) == whole


def test_a_proposal_in_flight_survives_a_restart():
    search = TreeSearch(convolution_space(), 6, multiply_adds, seed=2)
    history(search, 2)
    flying = [search.propose(), search.propose()]
    resumed = TreeSearch(convolution_space(), 6, multiply_adds)
    resumed.restore(search.state())
    assert list(resumed.in_flight) == flying
    assert history(resumed, 4) == history(search, 4)


def test_leaves_in_flight_are_distinct_and_their_order_does_not_depend_on_timing():
    with ThreadPoolExecutor(3) as executor:
        runs = []
        for _ in range(2):
            search = TreeSearch(convolution_space(), 6, multiply_adds, seed=4)
            runs.append([found.operator for found in search.run(10, executor, in_flight=3)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) == 10


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_failed_operator_is_left_out_and_not_tried_again(kind):
    asked: list[Operator] = []

    def reward(operator: Operator) -> float:
        asked.append(operator)
        return nan if len(asked) % 2 else 1.0

    search = kind(convolution_space(), 6, reward, seed=1)
    found = list(search.run(8))
    assert len(found) == 4
    assert len(set(asked)) == len(asked) == 8
    again = kind(convolution_space(), 6, reward)
    again.restore(search.state())
    assert again.state() == search.state()


def test_the_history_is_equal_in_every_process():
    code = (
        "import json, sys; sys.path.insert(0, 'tests/unit')\n"
        "from test_search_sampling import *\n"
        "print(json.dumps([history(kind(convolution_space(), 6, multiply_adds, 7), 5) for kind in SEARCHERS]))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert [len(found) for found in json.loads(outputs[0])] == [5, 5, 5]


def test_statistics_are_the_mean_and_variance_of_what_was_added():
    stats = Statistics()
    for reward in (1.0, 2.0, 6.0):
        stats.add(reward)
    assert stats.mean == pytest.approx(3.0)
    assert stats.variance == pytest.approx(14 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TreeSearch(convolution_space(), 1, multiply_adds), "in 1 steps; raise depth"),
        (lambda: TreeSearch(convolution_space(), 5, multiply_adds, exploration=-1.0), "exploration = -1.0"),
        (lambda: BeamSearch(convolution_space(), 5, multiply_adds, width=0), "width = 0"),
        (lambda: BeamSearch(convolution_space(), 5, multiply_adds, noise=2.0), "noise = 2.0"),
        (lambda: RandomSearch(convolution_space(), 5, multiply_adds).learn(1.0), "call propose"),
        (lambda: list(RandomSearch(convolution_space(), 5, multiply_adds).run(1, in_flight=2)), "needs an executor"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(call, message):
    with pytest.raises(SearchError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_state_of_another_search_is_refused():
    state = RandomSearch(convolution_space(), 5, multiply_adds).state()
    with pytest.raises(SearchError, match="searcher = 'RandomSearch'"):
        TreeSearch(convolution_space(), 5, multiply_adds).restore(state)
    search = RandomSearch(convolution_space(), 6, multiply_adds, seed=1)
    history(search, 3)
    fewer = convolution_space(max_reductions=1)
    with pytest.raises(SearchError):
        RandomSearch(fewer, 6, multiply_adds).restore(search.state())
