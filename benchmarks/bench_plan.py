"""The prediction of a training step against the step itself, on the machine at hand.

Calibrates (or takes what was calibrated), predicts step time and peak memory of a run, trains it in a process of its
own for a few steps, and prints both with their ratio. Step times are those of metrics.jsonl after the first ten steps:
median and interquartile range; peak memory is the process's largest resident size. With --interleave the machine is
calibrated once before and once after the run and both predictions are printed, so that a machine whose load changes
shows itself.

    .venv/bin/python benchmarks/bench_plan.py
    .venv/bin/python benchmarks/bench_plan.py --recipe bf16 --steps 20 --interleave
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cofire.plan.machine import MachinePrediction, load_machine, machine_file, predict_training_step, save_machine
from cofire.spec import ClusterSpec, RunSpec, load_as
from cofire.spec.io import save
from cofire.spec.units import format_quantity

_WARM_STEPS = 10
# Another process than ours, so that its peak memory is the run's alone.
_TRAIN = """
import sys, cofire
from cofire.spec import RunSpec, load_as
cofire.fit(load_as(RunSpec, sys.argv[1]), sys.argv[2])
"""


def calibrated(again: bool) -> ClusterSpec:
    if machine_file().exists() and not again:
        return load_machine()
    from cofire.train.calibration import calibrate

    start = time.perf_counter()
    last = start

    def report(what: str, part: float) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"  {part:4.0%}  {what}", file=sys.stderr)

    cluster = calibrate(report, again)
    save_machine(cluster)
    print(f"calibrated in {time.perf_counter() - start:.0f} s: {machine_file()}")
    return cluster


def train(run: RunSpec, folder: Path) -> dict[str, Any]:
    """Train in a process of its own; return step seconds after the warm ones, the recipe and the peak memory."""
    save(run, folder / "run.toml")
    out = folder / "run"
    command = [sys.executable, "-c", _TRAIN, str(folder / "run.toml"), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    seconds = [run.tokens_per_step / event["tokens_per_s"] for event in steps]
    end = next(event for event in events if event["event"] == "end")
    start = next(event for event in events if event["event"] == "start")
    return {"seconds": seconds[_WARM_STEPS:], "recipe": start["dtype"], "peak_memory_bytes": end["peak_memory_bytes"]}


def settings(arguments: argparse.Namespace) -> RunSpec:
    overrides = [f"steps={arguments.steps}", f"precision.recipe={arguments.recipe}", "device=cpu"]
    overrides += [f"checkpoint.every_steps={arguments.steps}", f"validate_every_steps={arguments.steps}"]
    return load_as(RunSpec, arguments.run, [*overrides, "validation_sequences=8", *arguments.set])


def print_parts(found: MachinePrediction) -> None:
    for part in found.parts:
        times = (part.products_s, part.passes_s, part.calls_s)
        print(f"  {part.part:<16} " + "  ".join(f"{1e3 * t:8.1f} ms" for t in (*times, part.total_s)))
    print("  memory: " + ", ".join(f"{name} {format_quantity(size, 'B')}" for name, size in found.memory.items()))


def print_row(what: str, predicted: str, measured: str, ratio: float) -> None:
    verdict = "within 15 %" if abs(ratio - 1) <= 0.15 else "not within 15 %"
    print(f"| {what} | {predicted} | {measured} | {ratio:.2f} | {verdict} |")


def compare(found: MachinePrediction, measured: dict[str, Any]) -> None:
    median = statistics.median(measured["seconds"])
    low, _, high = statistics.quantiles(measured["seconds"], n=4)
    step, memory = found.step_s, found.peak_memory_bytes
    print("| what | predicted (modelled) | measured | predicted / measured | |")
    print("|---|---|---|---|---|")
    print_row(
        "step",
        f"{step.value:.3f} s ({step.low:.3f} to {step.high:.3f})",
        f"{median:.3f} s ({low:.3f} to {high:.3f}, {len(measured['seconds'])} steps)",
        step.value / median,
    )
    sizes = [format_quantity(x, "B") for x in (memory.value, memory.low, memory.high, measured["peak_memory_bytes"])]
    ratio = memory.value / measured["peak_memory_bytes"]
    print_row("peak memory", f"{sizes[0]} ({sizes[1]} to {sizes[2]})", sizes[3], ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo", help="a run's preset or file")
    parser.add_argument("--recipe", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--known", action="store_true", help="take an earlier calibration")
    parser.add_argument("--interleave", action="store_true", help="calibrate after the run as well")
    arguments = parser.parse_args()
    if arguments.steps < _WARM_STEPS + 4:
        parser.error(
            f"--steps {arguments.steps} must be at least {_WARM_STEPS + 4}: the first {_WARM_STEPS} are warm-up"
        )
    run = settings(arguments)
    threads, processor = os.environ.get("OMP_NUM_THREADS", "all"), platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()}")
    found = predict_training_step(run, calibrated(again=not arguments.known))
    print(f"{run.model.name}, {run.tokens_per_step} tokens a step, {found.recipe}, {found.flops / 1e9:.1f} GFLOP:")
    print("  part              products     passes       calls        total")
    print_parts(found)
    with tempfile.TemporaryDirectory() as folder:
        measured = train(run, Path(folder))
    if measured["recipe"] != found.recipe:
        print(f"the run chose {measured['recipe']}, the prediction {found.recipe}")
    compare(found, measured)
    print(f"load {os.getloadavg()}")
    if arguments.interleave:
        print("calibrated again after the run:")
        compare(predict_training_step(run, calibrated(again=True)), measured)


if __name__ == "__main__":
    main()
