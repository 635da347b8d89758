"""How fast operators are searched for, on one core.

Measures evaluations of the bound on what is left per second (cold: each interface new; warm: all met before),
expansions of an interface and complete operators per second, how often a walk without memory ends at an operator with
and without guidance, on the 1-D convolution's space at depth 7, and distinct valid operators per second at depth 12 in
a space of 2-D operators with two weights, by walks and by each searcher. Seconds are those of the processor, which
other programs disturb little.

    .venv/bin/python benchmarks/bench_search.py
    .venv/bin/python benchmarks/bench_search.py --seconds 20 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from random import Random

from cofire.search import Allowance, Space, Symbols, Synthesis
from cofire.search.baselines import BeamSearch, RandomSearch
from cofire.search.interface import Interface
from cofire.search.mcts import TreeSearch
from cofire.search.sampling import KINDS, Moves


def convolution_1d() -> Space:
    """[N, Ci, H] -> [N, Co, H] with Ci:2, Co:1, k=3:2, two tensors, two reductions."""
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in symbols.primary)
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2})
    return Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),))


def convolution_2d() -> Space:
    """[N, Ci, H, W] -> [N, Co, H, W], unordered channels, three tensors; limits of Syno's published searches."""
    numbers = {"N": 1, "Ci": 128, "Co": 128, "H": 28, "W": 28, "k": 3, "s": 2, "g": 32}
    symbols = Symbols.of(["N", "Ci", "Co", "H", "W"], ["k", "s", "g"], [numbers])
    n, ci, co, h, w = (symbols.size(name) for name in symbols.primary)
    channels = frozenset((1,))
    return Space(
        (n, ci, h, w),
        (n, co, h, w),
        Allowance.of(symbols, {"Ci": 2, "Co": 4, "k": 2, "s": 2, "g": 3}),
        fixed=((0, 0),),
        unordered_input=channels,
        unordered_output=channels,
        max_tensors=3,
        max_reductions=5,
        max_chain=6,
        max_splits=3,
        max_merges=2,
        max_shifts=2,
        max_strides=0,
        max_ends=2,
    )


def interfaces(space: Space, depth: int, count: int) -> list[Interface]:
    """Return interfaces that random walks by the rules alone pass, each once."""
    moves, random = Moves(space, depth, "none"), Random(0)
    found: dict[int, Interface] = {}
    state = moves.root
    while len(found) < count:
        children = moves.candidates(state, random.choice(("reduce", *KINDS)))
        if children:
            state = random.choice(children)
            found.setdefault(state.digest, state)
        elif random.random() < 0.1:
            state = moves.root
    return list(found.values())


def distances(space: Space, depth: int, count: int) -> dict[str, float]:
    states, synthesis = interfaces(space, depth, count), Synthesis(space, depth)
    synthesis.distance(states.pop())  # so that the bound is there
    rates = {}
    for name in ("cold", "warm"):
        start = time.process_time()
        for state in states:
            synthesis.distance(state)
        rates[f"{name} distances per s"] = len(states) / (time.process_time() - start)
    return rates


def expansions(space: Space, depth: int, seconds: float) -> float:
    """Return interfaces per second of which all valid children are built, breadth first."""
    synthesis = Synthesis(space, depth)
    frontier, done, start = synthesis.roots(), 0, time.process_time()
    while frontier and time.process_time() - start < seconds:
        frontier.extend(synthesis.steps(frontier.pop(0)))
        done += 1
    return done / (time.process_time() - start)


class _Forgetful(Moves):
    """Moves that learn nothing from walks before, so that each is the first."""

    def bury(self, state: Interface) -> None:
        """Do nothing."""

    def remember(self, tried: object, ended: object) -> None:
        """Do nothing."""


def cold_walks(space: Space, depth: int, seconds: float) -> dict[str, float]:
    """Return the part of walks that end at an operator, guided and not, and walks per second."""
    measured: dict[str, float] = {}
    for guidance in ("exact", "none"):
        moves, random = _Forgetful(space, depth, guidance), Random(1)
        walks = ended = 0
        start = time.process_time()
        while time.process_time() - start < seconds:
            ended += moves.walk(moves.root, random) is not None
            walks += 1
        name = "guided" if guidance == "exact" else "unguided"
        measured[f"{name} walks"] = walks
        measured[f"{name} walks that ended"] = ended
        measured[f"{name} success"] = ended / walks
    return measured


def operators(space: Space, depth: int, seconds: float) -> tuple[int, float]:
    """Return how many distinct operators random walks end at, and per second."""
    moves, random = Moves(space, depth), Random(2)
    start, found = time.process_time(), set[int]()
    while time.process_time() - start < seconds:
        walk = moves.walk(moves.root, random, backtracks=4)
        if walk is not None:
            found.add(walk.operator.digest)
    return len(found), len(found) / (time.process_time() - start)


def proposals(space: Space, depth: int, seconds: float) -> dict[str, float]:
    """Return how many distinct operators each searcher proposes per second where all are worth the same."""
    rates = {}
    for kind in (TreeSearch, RandomSearch, BeamSearch):
        searcher = kind(space, depth, lambda operator: 0.5, seed=3)
        start, count = time.process_time(), 0
        while time.process_time() - start < seconds and searcher.propose() is not None:
            searcher.learn(0.5)
            count += 1
        rates[kind.__name__] = count / (time.process_time() - start)
    return rates


def measure(seconds: float) -> dict[str, float]:
    small, large = convolution_1d(), convolution_2d()
    rows: dict[str, float] = {}
    rows.update((f"2-D, depth 12: {name}", rate) for name, rate in distances(large, 12, 1000).items())
    rows["1-D, depth 7: expansions per s"] = expansions(small, 7, seconds)
    rows.update((f"1-D, depth 7: {name}", value) for name, value in cold_walks(small, 7, seconds).items())
    for name, space, depth in (("1-D, depth 7", small, 7), ("2-D, depth 12", large, 12)):
        found, rate = operators(space, depth, seconds)
        rows[f"{name}: distinct operators"] = found
        rows[f"{name}: distinct operators per s"] = rate
    rows.update((f"2-D, depth 12: {kind}, per s", rate) for kind, rate in proposals(large, 12, seconds).items())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each timed part that does not end by itself")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error(f"--seconds {arguments.seconds} must be above 0")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    rows = measure(arguments.seconds)
    if arguments.json:
        print(json.dumps({"machine": machine, "seconds": arguments.seconds, **rows}, indent=2))
        return
    print(f"{machine}; one process, {arguments.seconds:g} s a part\n")
    print("| what | measured |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.4g} |")


if __name__ == "__main__":
    main()
