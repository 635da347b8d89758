"""Loss-free balancing keeps expert load even at no cost in loss; an auxiliary loss does it worse.

The claim is table 2 of Loss-Free Balancing (arXiv 2408.15664): a 1B model reaches perplexity 9.50 and MaxVio 0.04
with a bias per expert that is moved by the sign of its load error after each step, against 9.56 and 0.72 with an
auxiliary loss of weight 0.001.

Here: one model from one preset on the same tokens, several seeds, arms that differ in ``moe.balance`` only:

    loss-free       bias_rule = sign, u = 0.001, no balance loss: the paper's choice
    loss-free-fast  the same with u = 0.01, which the paper calls too fast for 40,000 steps
    auxiliary-loss  no bias, expert-level loss of weight 0.001, as the paper's baseline
    none            neither

The second arm is there because a bias moves by at most u in a step: in 300 steps u = 0.001 moves it by 0.3 at most,
which cannot undo what a router with sigmoid scores has come to prefer by then.

Every arm and seed is a run folder under ``--out``; finished ones are skipped and interrupted ones go on. Written:
``results.json``, ``results.md`` and ``results.png``. The scale is about 1/50 of the paper's in parameters and 1/80,000
in tokens, so the order of the arms can be compared and the values cannot.

Left out: the paper's sweeps over update rates and rules (tables 3 and 4).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ARMS = {
    "loss-free": ("bias_rule=sign", "bias_update_rate=0.001", "expert_loss_weight=0.0"),
    "loss-free-fast": ("bias_rule=sign", "bias_update_rate=0.01", "expert_loss_weight=0.0"),
    "auxiliary-loss": ("bias_rule=none", "expert_loss_weight=0.001"),
    "none": ("bias_rule=none", "expert_loss_weight=0.0"),
}
COLOURS = {"loss-free": "#2a78d6", "loss-free-fast": "#158a4f", "auxiliary-loss": "#e0622b", "none": "#5d6068"}
PAPER = {"loss-free": "9.50 / 0.04", "loss-free-fast": "-", "auxiliary-loss": "9.56 / 0.72", "none": "-"}
RECENT_STEPS = 100


@dataclass(frozen=True)
class Measured:
    """What one run ended with. Losses in nats per token; MaxVio is the mean over the main model's MoE layers."""

    arm: str
    seed: int
    validation_loss: float
    max_violation_global: float
    max_violation_batch: float
    tokens_per_s: float


def run_spec(options: argparse.Namespace, arm: str, seed: int):
    """Return the run of one arm and seed."""
    from cofire.errors import TrainError
    from cofire.spec import RunSpec, load_as

    balance = ["sequence_loss_weight=0.0", "device_loss_weight=0.0", *ARMS[arm]]
    overrides = [
        f"name={arm}-seed{seed}",
        f"model={options.model}",
        *(f"model.moe.balance.{item}" for item in balance),
        f"seed={seed}",
        f"steps={options.steps}",
        f"schedule.warmup_steps={max(1, options.steps // 10)}",
        f"validate_every_steps={max(1, options.steps // 10)}",
        f"checkpoint.every_steps={max(25, options.steps // 4)}",
        "checkpoint.keep=1",
        *options.set,
    ]
    if load_as(RunSpec, "demo", [f"model={options.model}"]).model.moe is None:
        raise TrainError(f"--model {options.model} has no experts to balance; take one with a moe table, such as small")
    return load_as(RunSpec, "demo", overrides)


def train_one(run, folder: Path, num_threads: int) -> None:
    """Train one run in this process, from its last checkpoint if it has one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # before torch is imported
    import torch

    from cofire.train import fit

    torch.set_num_threads(num_threads)
    fit(run, folder, resume=folder.exists())


def is_finished(folder: Path, run) -> bool:
    """Whether a folder holds this very run, trained and validated to its last step.

    Raises:
        CofireError: The folder holds another run.
    """
    from cofire.errors import TrainError
    from cofire.train.run_record import read_run

    if not (folder / "metrics.jsonl").is_file():
        return False
    record = read_run(folder)
    if record.run != run:
        raise TrainError(f"{folder} holds a run with other settings; name another --out or remove it")
    return bool(record.end and record.validations and record.validations[-1]["step"] == run.steps)


def measure(folder: Path, arm: str, seed: int) -> Measured:
    """Read what a finished run ended with."""
    from cofire.train.run_record import number, numbers, read_run

    record = read_run(folder)
    layers = record.run.model.num_moe_layers
    last, recent = record.validations[-1], record.steps[-RECENT_STEPS:]
    batch = [value for event in recent for value in numbers(event, "max_violation")[:layers] if value is not None]
    whole = [value for value in numbers(last, "max_violation_global")[:layers] if value is not None]
    speeds = [speed for speed in (number(event, "tokens_per_s") for event in record.steps) if speed]
    return Measured(
        arm=arm,
        seed=seed,
        validation_loss=number(last, "loss") or math.nan,
        max_violation_global=statistics.fmean(whole),
        max_violation_batch=statistics.fmean(batch),
        tokens_per_s=statistics.median(speeds),
    )


def train_all(options: argparse.Namespace, say: Callable[[str], None]) -> list[tuple[str, int, Path]]:
    """Train what is not finished yet and return (arm, seed, folder) of every run."""
    runs = [(arm, seed, options.out / f"{arm}-seed{seed}") for seed in options.seeds for arm in ARMS]
    specs = {folder: run_spec(options, arm, seed) for arm, seed, folder in runs}
    waiting = [folder for _, _, folder in runs if not is_finished(folder, specs[folder])]
    say(f"{len(runs)} runs of {options.steps} steps, {len(runs) - len(waiting)} finished before")
    if not waiting:
        return runs
    # The first run also makes the tokenizer and token files; the others find them.
    started, num_threads = time.perf_counter(), max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(train_one, specs[folder], folder, num_threads): folder for folder in waiting}
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            left = (time.perf_counter() - started) / done * (len(waiting) - done)
            say(f"[{done}/{len(waiting)}] {jobs[job].name} done, about {left / 60:.0f} min left")
    return runs


def table(results: list[Measured], floors: tuple[float, float]) -> list[str]:
    """Return the Markdown table: mean and standard deviation over seeds."""
    lines = [
        "| arm | validation loss | perplexity | MaxVio, validation set | MaxVio of last steps | paper: ppl / MaxVio |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [result for result in results if result.arm == arm]
        loss = [row.validation_loss for row in rows]
        cells = [
            _spread(loss, 4),
            f"{math.exp(statistics.fmean(loss)):.2f}",
            _spread([row.max_violation_global for row in rows], 3),
            _spread([row.max_violation_batch for row in rows], 3),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} | {PAPER[arm]} |")
    return [*lines, f"| even routing (simulated) | - | - | {floors[0]:.3f} | {floors[1]:.3f} | - |"]


def verdict(results: list[Measured]) -> str:
    """Say what is seen: paired differences over seeds, negative where loss-free balancing is the worse."""

    def differences(arm: str, other: str, key: str) -> list[float]:
        ours = {row.seed: getattr(row, key) for row in results if row.arm == arm}
        return [getattr(row, key) - ours[row.seed] for row in results if row.arm == other]

    sentences = []
    for arm in ("loss-free", "loss-free-fast"):
        for other in ("auxiliary-loss", "none"):
            load = differences(arm, other, "max_violation_global")
            loss = differences(arm, other, "validation_loss")
            sentences.append(
                f"- {arm} against {other}: lower MaxVio in {sum(d > 0 for d in load)} of {len(load)} seeds (by "
                f"{_spread(load, 3)}), lower validation loss in {sum(d > 0 for d in loss)} of {len(loss)} "
                f"(by {_spread(loss, 4)})."
            )
    return "\n".join(sentences)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(runs: list[tuple[str, int, Path]], floor: float, path: Path) -> None:
    """Draw MaxVio per step and validation loss over steps, one line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from cofire.train.atomic import replace_file
    from cofire.train.run_record import numbers, read_run

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    load, loss = figure.subplots(1, 2)
    window = max(1, min(RECENT_STEPS, read_run(runs[0][2]).last_step // 10))
    for arm, seed, folder in runs:
        record = read_run(folder)
        layers = record.run.model.num_moe_layers
        violations = [
            statistics.fmean(v for v in numbers(event, "max_violation")[:layers] if v is not None)
            for event in record.steps
        ]
        label = arm if seed == runs[0][1] else None
        smooth = [statistics.fmean(violations[max(0, i + 1 - window) : i + 1]) for i in range(len(violations))]
        load.plot([event["step"] for event in record.steps], smooth, color=COLOURS[arm], linewidth=1.5, label=label)
        points = [(event["step"], event["loss"]) for event in record.validations]
        loss.plot(*zip(*points, strict=True), color=COLOURS[arm], linewidth=1.5, marker="o", markersize=3, label=label)
    load.axhline(floor, color="#8a3b12", linestyle="--", label="even routing (simulated)")
    load.set(yscale="log", xlabel="step", title=f"MaxVio per step, mean of {window} steps and all layers")
    loss.set(xlabel="step", title="Validation loss, nats per token")
    for axes in (load, loss):
        axes.grid(True, color="#e6e6e3")
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.legend(frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=144)


def machine() -> str:
    """Return the processor's name, its cores, and the version of torch."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {version('torch')}"


def write_results(options: argparse.Namespace, runs: list[tuple[str, int, Path]]) -> str:
    """Write results.json, results.md and results.png, and return the Markdown."""
    from cofire.train.atomic import replace_file
    from cofire.train.load_floor import sampling_floor
    from cofire.train.run_record import number, read_run

    results = [measure(folder, arm, seed) for arm, seed, folder in runs]
    record = read_run(runs[0][2])
    run, moe = record.run, record.run.model.moe
    assert moe is not None, "run_spec refuses a model without experts"
    held_out = number(record.start, "validation_tokens") or math.inf
    validated = int(min(run.validation_sequences * run.data.sequence_length, held_out))
    floors = sampling_floor(moe, validated), sampling_floor(moe, run.tokens_per_step)
    recent = min(RECENT_STEPS, run.steps)
    command = f"python claims/loss_free_balancing.py {' '.join(options.words)}".strip()
    text = [
        "# Loss-free balancing against an auxiliary loss and against nothing",
        "",
        f"*Measured.* `{run.model.name}`, {run.steps} steps of {run.tokens_per_step:,} tokens "
        f"({run.steps * run.tokens_per_step:,} tokens), seeds {', '.join(map(str, options.seeds))}; mean +- standard "
        f"deviation over seeds. MaxVio is the mean over the main model's MoE layers; last steps: the mean of {recent}.",
        "",
        *table(results, floors),
        "",
        verdict(results),
        "",
        "The paper's figures (arXiv 2408.15664, table 2) are of a 1B model after 100B tokens. What can be compared is "
        "the order of the arms, not the values.",
        "",
        f"Command: `{command}`. Machine: {machine()}; {options.jobs} run(s) at a time.",
        "",
        "![MaxVio per step and validation loss](results.png)",
        "",
    ]
    markdown = "\n".join(text)
    value = {
        "claim": "loss_free_balancing",
        "label": "measured",
        "command": command,
        "machine": machine(),
        "steps": run.steps,
        "tokens_per_step": run.tokens_per_step,
        "floor_validation_set": floors[0],
        "floor_step": floors[1],
        "runs": [asdict(result) for result in results],
    }
    plot(runs, floors[1], options.out / "results.png")
    for name, content in (("results.json", json.dumps(value, indent=2) + "\n"), ("results.md", markdown)):
        with replace_file(options.out / name) as file:
            file.write(content.encode())
    return markdown


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loss_free_balancing", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--model", default="small", help="a preset or a model's file")
    parser.add_argument("--out", type=Path, default=Path("runs/claims/loss_free_balancing"))
    # On two cores, two runs with a thread each train 1.26 times the tokens of one run with two threads.
    jobs = min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; the cores are shared between them")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of every run"
    )
    options = parser.parse_args(words)
    if options.steps < 1 or options.jobs < 1:
        parser.error(f"--steps {options.steps} and --jobs {options.jobs} must be at least 1")
    options.words = words
    return options


def main(words: list[str]) -> int:
    from cofire.errors import CofireError

    options = parse(words)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        runs = train_all(options, lambda line: print(line, file=sys.stderr, flush=True))
        print(write_results(options, runs))
    except CofireError as error:
        print(f"loss_free_balancing: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
