"""How long the planner takes for what it promises: one estimate, ten thousand layouts, and two sizes of network.

    estimate     DeepSeek-V3 on 2,048 H800 with the published layout, a new model each time; goal 50 ms. The first of a
                 process, which also compiles the schedule, is measured in processes of its own.
    layouts      a search over the same with all schedules, and two processes; goal 60 s for 10,000 layouts
    all-to-all   2,048 devices on eight planes, 1 MB a pair: graph, routes and flow simulation; goal 10 s
    endpoints    a three-layer fat tree of 100,000 endpoints: counts, price, loads and collectives by formula; goal 1 s

Figures are wall time: median and quartiles; the machine may be busy with other work, so its load is printed.

    .venv/bin/python benchmarks/bench_planner.py
    .venv/bin/python benchmarks/bench_planner.py --case estimate --case endpoints --repeats 21
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from cofire.network.analytical import analyse
from cofire.network.builders import build_network
from cofire.network.collective_time import Group, Wire, collective_time_s
from cofire.network.cost import network_cost
from cofire.network.flowsim import simulate_flows
from cofire.network.patterns import all_to_all
from cofire.network.shapes import FatTree
from cofire.plan.layouts import SearchSpec, enumerate_layouts, rank_layouts
from cofire.plan.step import StepModel
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

LAYOUT = ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8")
WORK = WorkloadSpec(sequence_length=4096, global_batch_size=15360, moments="bf16")
# The first estimate of a process: it prints seconds with and without the imports.
_FIRST = """
import time
start = time.perf_counter()
from bench_planner import one_estimate, questions
asked = questions()
ready = time.perf_counter()
one_estimate(*asked)
end = time.perf_counter()
print(end - ready, end - start)
"""


def questions() -> tuple[ModelSpec, ClusterSpec]:
    return load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048")


def one_estimate(model: ModelSpec, cluster: ClusterSpec) -> float:
    return StepModel(model, cluster, WORK).estimate(LAYOUT).step_s


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def show_row(what: str, times: list[float], goal_s: float | None, remark: str) -> None:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    spread = f"{seconds_text(low)} to {seconds_text(high)}" if len(times) > 1 else "one run"
    verdict = "" if goal_s is None else f"{seconds_text(goal_s)}, {'kept' if median <= goal_s else 'missed'}"
    print(f"| {what} | {seconds_text(median)} | {spread} | {len(times)} | {verdict} | {remark} |", flush=True)


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def bench_estimate(repeats: int) -> None:
    model, cluster = questions()
    command, folder = [sys.executable, "-c", _FIRST], os.path.dirname(os.path.abspath(__file__))
    lines = [
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
        for _ in range(min(repeats, 5))
    ]
    first, whole = ([float(line.split()[column]) for line in lines] for column in (0, 1))
    show_row("first estimate of a process", first, 0.05, "schedule compiled")
    show_row("the same with imports and presets", whole, None, "")
    one_estimate(model, cluster)
    show_row(
        "further estimate", seconds_of(lambda: one_estimate(model, cluster), 5 * repeats), 0.05, "a new model each"
    )


def bench_layouts(workers: int) -> None:
    model, cluster = questions()
    search = SearchSpec(micro_batch_size=(1, 2), stages_per_rank=(2,), zero_stage=(1,))
    number = sum(1 for _ in enumerate_layouts(model, cluster, search))
    start = time.perf_counter()
    ranking = rank_layouts(model, cluster, WORK, search, workers=workers)
    taken = time.perf_counter() - start
    fits = f"{number:,} layouts, {ranking.num_fitting:,} fit, {workers} processes, {seconds_text(taken)} in all"
    show_row("10,000 layouts", [taken * 1e4 / number], 60.0, fits)


def bench_all_to_all(repeats: int) -> None:
    cluster = load_as(ClusterSpec, "h800-2048")
    sent: list[float] = []

    def run() -> None:
        network = build_network(cluster)
        pattern = all_to_all(network, 1e6)
        sent.append(simulate_flows(network, pattern.routes, pattern.flows).makespan_s)

    times = seconds_of(run, repeats)
    show_row(
        "all-to-all of 2,048 devices", times, 10.0, f"simulated: {seconds_text(sent[0])}, graph and routes included"
    )


def bench_endpoints(repeats: int) -> None:
    found: list[str] = []

    def run() -> None:
        tree = FatTree(100_000, switch_ports=128, layers=3, ports_per_node=8)
        facts, cost = analyse(tree), network_cost(tree.counts())
        group = Group(12_500, 8, Wire(3.3e-6, 160e9), Wire(3.7e-6, 42.5e9))
        reduce_s = collective_time_s("all_reduce", 1e9, group, "ring")
        found[:] = [f"{facts.switches:,} switches, ${cost.total / 1e6:,.0f} M, all-reduce of 1 GB {reduce_s:.2f} s"]

    times = seconds_of(run, 5 * repeats)
    show_row("100,000 endpoints by formula", times, 1.0, found[0])


def main() -> None:
    cases = ("estimate", "layouts", "all-to-all", "endpoints")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=cases, help="which; none: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of the search")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats {arguments.repeats} must be at least 2, or there is no spread")
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()}")
    print("| what | median | quartiles | n | goal | remark |")
    print("|---|---|---|---|---|---|")
    chosen = arguments.case or cases
    if "estimate" in chosen:
        bench_estimate(arguments.repeats)
    if "layouts" in chosen:
        bench_layouts(arguments.workers)
    if "all-to-all" in chosen:
        bench_all_to_all(arguments.repeats)
    if "endpoints" in chosen:
        bench_endpoints(arguments.repeats)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
