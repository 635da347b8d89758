"""Runs of one experiment: arms that differ in some settings, each trained with several seeds.

Every arm and seed is a run folder; finished ones are skipped and interrupted ones go on. The programs beside it say
what their arms are and what they conclude.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ArmRun:
    """One run: its arm, seed, folder and spec."""

    arm: str
    seed: int
    folder: Path
    spec: Any


def add_options(parser: argparse.ArgumentParser, name: str, steps: int) -> None:
    """Add what every experiment can be told."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--model", default="small", help="a preset or a model's file")
    parser.add_argument("--out", type=Path, default=Path("runs/claims") / name)
    # On two cores, two runs with a thread each train 1.26 times the tokens of one run with two threads.
    jobs = min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; the cores are shared between them")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of every run"
    )


def parse_options(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse words and check what :func:`add_options` added."""
    options = parser.parse_args(words)
    if options.steps < 1 or options.jobs < 1:
        parser.error(f"--steps {options.steps} and --jobs {options.jobs} must be at least 1")
    options.words = words
    return options


def schedule_overrides(steps: int) -> list[str]:
    """Return how runs of so many steps warm up, validate and keep checkpoints."""
    return [
        f"steps={steps}",
        f"schedule.warmup_steps={max(1, steps // 10)}",
        f"validate_every_steps={max(1, steps // 10)}",
        f"checkpoint.every_steps={max(25, steps // 4)}",
        "checkpoint.keep=1",
    ]


def train_one(spec: Any, folder: Path, num_threads: int) -> None:
    """Train one run in this process, from its last checkpoint if it has one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # before torch is imported
    import torch

    from cofire.train import fit

    torch.set_num_threads(num_threads)
    fit(spec, folder, resume=folder.exists())


def is_finished(folder: Path, spec: Any) -> bool:
    """Whether a folder holds this very run, trained and validated to its last step.

    Raises:
        CofireError: The folder holds another run.
    """
    from cofire.errors import TrainError
    from cofire.train.run_record import read_run

    if not (folder / "metrics.jsonl").is_file():
        return False
    record = read_run(folder)
    if record.run != spec:
        raise TrainError(f"{folder} holds a run with other settings; name another --out or remove it")
    return bool(record.end and record.validations and record.validations[-1]["step"] == spec.steps)


def train_all(runs: list[ArmRun], jobs: int, say: Callable[[str], None]) -> None:
    """Train what is not finished yet, some at a time."""
    waiting = [run for run in runs if not is_finished(run.folder, run.spec)]
    say(f"{len(runs)} runs of {runs[0].spec.steps} steps, {len(runs) - len(waiting)} finished before")
    if not waiting:
        return
    # The first run also makes the tokenizer and token files; the others find them.
    started, num_threads = time.perf_counter(), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        going = {pool.submit(train_one, run.spec, run.folder, num_threads): run for run in waiting}
        for done, job in enumerate(as_completed(going), 1):
            job.result()
            left = (time.perf_counter() - started) / done * (len(waiting) - done)
            say(f"[{done}/{len(waiting)}] {going[job].folder.name} done, about {left / 60:.0f} min left")


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def machine(run: ArmRun) -> str:
    """Return on what a run was trained: its GPU if it had one, processor, threads and version of torch."""
    from cofire.train.run_record import read_run

    start = read_run(run.folder).start
    about = start.get("machine") or {}
    device = about.get("gpu", start.get("device"))
    gpu = "" if device in ("cpu", None) else f"{device}, "
    return f"{gpu}{about.get('processor')}, {about.get('threads')} thread(s) a run, torch {about.get('torch')}"


def style(axes: Any) -> None:
    """Give axes the look of the project's plots."""
    axes.grid(True, color="#e6e6e3")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False)


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and those before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def write_files(out: Path, value: dict[str, Any], markdown: str, figure: Any) -> None:
    """Write results.json, results.md and results.png, each whole or not at all."""
    from cofire.train.atomic import replace_file

    with replace_file(out / "results.png") as file:
        figure.savefig(file, format="png", dpi=144)
    for name, content in (("results.json", json.dumps(value, indent=2) + "\n"), ("results.md", markdown)):
        with replace_file(out / name) as file:
            file.write(content.encode())


def last_loss(record: Any) -> float:
    """Return the loss of a run's last validation."""
    from cofire.train.run_record import number

    loss = number(record.validations[-1], "loss")
    return math.nan if loss is None else loss
