"""Speed and balance of expert placement against the public load balancer, in one process.

``--peer PATH`` is the public script (one file, which needs PyTorch); it is loaded from where it lies and is no part of
Cofire. Both sides get the same loads and return the same three tables. Sides take turns within each repeat, so that a
slow moment of the machine hits both. Before anything is timed, our greedy plan must be the peer's, slot by slot, and
no layer of our plan may be less even than the peer's. Figures are medians with the interquartile range, of processor
time: both sides use one thread, and what else runs on the machine weighs less.

    h800-32     58 layers x 256 experts, 288 replicas, 8 groups, 4 nodes, 32 devices (hierarchical)
    h800-320    58 layers x 256 experts, 320 replicas, 40 nodes, 320 devices (global: 8 groups, 40 nodes)
    global-32   58 layers x 256 experts, 288 replicas, 32 devices (global)
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cofire.plan.expert_placement import Placement, count_moves, evaluate_placement, place_experts, update_placement

# Replicas, groups, nodes, devices.
CASES = {"h800-32": (288, 8, 4, 32), "h800-320": (320, 8, 40, 320), "global-32": (288, 1, 1, 32)}


def load_peer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rebalance_experts


def time_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return seconds


def show_row(case: str, side: str, seconds: list[float], peer_s: float | None, imbalance: np.ndarray) -> None:
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    ratio = f"{peer_s / statistics.median(seconds):.1f}" if peer_s else "-"
    even = f"{imbalance.mean():.4f} | {imbalance.max():.4f}"
    print(f"| {case} | {side} | {middle:.2f} | {low:.2f} to {high:.2f} | {ratio} | {even} |")


def device_imbalance(plan: np.ndarray, load: np.ndarray, devices: int, like: Placement) -> np.ndarray:
    count = np.stack([np.bincount(row, minlength=load.shape[1]) for row in plan])
    held = np.take_along_axis(load / count, plan, 1).reshape(len(plan), devices, -1).sum(2)
    assert held.shape == like.device_load.shape
    return held.max(1) / held.mean(1)


def bench_case(case: str, load: np.ndarray, peer: Any, repeats: int) -> None:
    replicas, groups, nodes, devices = CASES[case]
    best = place_experts(load, replicas, devices, nodes, groups)
    sides: dict[str, Callable[[], Any]] = {
        "cofire": lambda: place_experts(load, replicas, devices, nodes, groups),
        "cofire, greedy only": lambda: place_experts(load, replicas, devices, nodes, groups, refine=False),
        "cofire, distinct": lambda: place_experts(load, replicas, devices, nodes, groups, distinct=True),
    }
    if peer is not None:
        import torch

        torch.set_num_threads(1)
        tensor = torch.tensor(load)
        sides["public script"] = lambda: peer(tensor, replicas, groups, nodes, devices)
        plan = sides["public script"]()[0].numpy()
        greedy = sides["cofire, greedy only"]()
        assert (plan == greedy.physical_to_logical).all(), f"{case}: the greedy plans differ"
        assert (best.imbalance <= device_imbalance(plan, load, devices, best) * (1 + 1e-9)).all()
    seconds = time_turns(sides, repeats)
    peer_s = statistics.median(seconds["public script"]) if peer is not None else None
    for side in sides:
        if side == "public script":
            even = device_imbalance(plan, load, devices, best)
        else:
            even = sides[side]().imbalance
        show_row(case, side, seconds[side], peer_s, even)


def bench_update(case: str, load: np.ndarray, new: np.ndarray, repeats: int) -> None:
    replicas, groups, nodes, devices = CASES[case]
    placement = place_experts(load, replicas, devices, nodes, groups)
    fresh = place_experts(new, replicas, devices, nodes, groups)
    seconds = time_turns({"update": lambda: update_placement(placement, new)}, repeats)["update"]
    updated = update_placement(placement, new)
    moved = count_moves(placement.physical_to_logical, fresh.physical_to_logical, devices)
    stale = evaluate_placement(placement, new).imbalance.mean()
    means = f"{stale:.4f} | {updated.imbalance.mean():.4f} | {fresh.imbalance.mean():.4f}"
    print(f"| {case} | {1e3 * statistics.median(seconds):.0f} | {means} | {updated.moves} | {moved} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="the public script, eplb.py")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--case", choices=[*CASES], action="append", help="only these; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    peer = load_peer(arguments.peer) if arguments.peer else None
    rng = np.random.default_rng(arguments.seed)
    load = rng.lognormal(0, 1, (58, 256)) * 1000
    new = load * rng.lognormal(0, 0.2, load.shape)
    print("| case | side | ms, median | ms, quartiles | times the public script | max/mean, mean of layers | worst |")
    print("|---|---|---|---|---|---|---|")
    cases = arguments.case or list(CASES)
    for case in cases:
        bench_case(case, load, peer, arguments.repeats)
    print("\n| case | update ms | max/mean, kept | updated | planned anew | moves | moves anew |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        bench_update(case, load, new, min(arguments.repeats, 3))


if __name__ == "__main__":
    main()
