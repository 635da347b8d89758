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
import math
import statistics
import sys
from dataclasses import asdict, dataclass

import arms
from arms import ArmRun, spread

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
        *arms.schedule_overrides(options.steps),
        *options.set,
    ]
    if load_as(RunSpec, "demo", [f"model={options.model}"]).model.moe is None:
        raise TrainError(f"--model {options.model} has no experts to balance; take one with a moe table, such as small")
    return load_as(RunSpec, "demo", overrides)


def measure(run: ArmRun) -> Measured:
    """Read what a finished run ended with."""
    from cofire.train.run_record import number, numbers, read_run

    record = read_run(run.folder)
    layers = record.run.model.num_moe_layers
    last, recent = record.validations[-1], record.steps[-RECENT_STEPS:]
    batch = [value for event in recent for value in numbers(event, "max_violation")[:layers] if value is not None]
    whole = [value for value in numbers(last, "max_violation_global")[:layers] if value is not None]
    speeds = [speed for speed in (number(event, "tokens_per_s") for event in record.steps) if speed]
    return Measured(
        arm=run.arm,
        seed=run.seed,
        validation_loss=arms.last_loss(record),
        max_violation_global=statistics.fmean(whole),
        max_violation_batch=statistics.fmean(batch),
        tokens_per_s=statistics.median(speeds),
    )


def all_runs(options: argparse.Namespace) -> list[ArmRun]:
    """Return every arm with every seed."""
    return [
        ArmRun(arm, seed, options.out / f"{arm}-seed{seed}", run_spec(options, arm, seed))
        for seed in options.seeds
        for arm in ARMS
    ]


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
            spread(loss, 4),
            f"{math.exp(statistics.fmean(loss)):.2f}",
            spread([row.max_violation_global for row in rows], 3),
            spread([row.max_violation_batch for row in rows], 3),
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
                f"{spread(load, 3)}), lower validation loss in {sum(d > 0 for d in loss)} of {len(loss)} "
                f"(by {spread(loss, 4)})."
            )
    return "\n".join(sentences)


def plot(runs: list[ArmRun], floor: float):
    """Draw MaxVio per step and validation loss over steps, one line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from cofire.train.run_record import numbers, read_run

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    load, loss = figure.subplots(1, 2)
    window = max(1, min(RECENT_STEPS, read_run(runs[0].folder).last_step // 10))
    for run in runs:
        record = read_run(run.folder)
        layers = record.run.model.num_moe_layers
        violations = [
            statistics.fmean(v for v in numbers(event, "max_violation")[:layers] if v is not None)
            for event in record.steps
        ]
        look = {"color": COLOURS[run.arm], "linewidth": 1.5, "label": run.arm if run.seed == runs[0].seed else None}
        load.plot([event["step"] for event in record.steps], arms.running_mean(violations, window), **look)
        points = [(event["step"], event["loss"]) for event in record.validations]
        loss.plot(*zip(*points, strict=True), marker="o", markersize=3, **look)
    load.axhline(floor, color="#8a3b12", linestyle="--", label="even routing (simulated)")
    load.set(yscale="log", xlabel="step", title=f"MaxVio per step, mean of {window} steps and all layers")
    loss.set(xlabel="step", title="Validation loss, nats per token")
    arms.style(load)
    arms.style(loss)
    return figure


def write_results(options: argparse.Namespace, runs: list[ArmRun]) -> str:
    """Write results.json, results.md and results.png, and return the Markdown."""
    from cofire.train.load_floor import sampling_floor
    from cofire.train.run_record import number, read_run

    results = [measure(run) for run in runs]
    record = read_run(runs[0].folder)
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
        f"Command: `{command}`. Machine: {arms.machine(runs[0])}; {options.jobs} run(s) at a time.",
        "",
        "![MaxVio per step and validation loss](results.png)",
        "",
    ]
    markdown = "\n".join(text)
    value = {
        "claim": "loss_free_balancing",
        "label": "measured",
        "command": command,
        "machine": arms.machine(runs[0]),
        "steps": run.steps,
        "tokens_per_step": run.tokens_per_step,
        "floor_validation_set": floors[0],
        "floor_step": floors[1],
        "runs": [asdict(result) for result in results],
    }
    arms.write_files(options.out, value, markdown, plot(runs, floors[1]))
    return markdown


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loss_free_balancing", description=str(__doc__).partition("\n")[0])
    arms.add_options(parser, "loss_free_balancing", steps=300)
    return arms.parse_options(parser, words)


def main(words: list[str]) -> int:
    from cofire.errors import CofireError

    options = parse(words)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        runs = all_runs(options)
        arms.train_all(runs, options.jobs, lambda line: print(line, file=sys.stderr, flush=True))
        print(write_results(options, runs))
    except CofireError as error:
        print(f"loss_free_balancing: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
