"""The claim programs: what they conclude from given runs, and one real run of each with tiny settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cofire.errors import TrainError
from cofire.spec import dump

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "claims" / "loss_free_balancing.py"


sys.path.insert(0, str(PROGRAM.parent))
import arms  # noqa: E402
import fp8_training  # noqa: E402
import loss_free_balancing as claim  # noqa: E402
from arms import ArmRun  # noqa: E402


def write_finished(out: Path, options, losses: dict[str, float], violations: dict[str, float]) -> list:
    """Write the files of a finished run for every arm and seed, with the given ends."""
    runs = []
    for seed in options.seeds:
        for arm in claim.ARMS:
            run, folder = claim.run_spec(options, arm, seed), out / f"{arm}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "run.toml").write_text(dump(run), "utf-8")
            layers = run.model.num_moe_layers
            violation = [violations[arm]] * layers
            events = [{"event": "start", "step": 0, "validation_tokens": 10**6}]
            for step in range(1, run.steps + 1):
                # The MTP module's row is no part of the claim: its MaxVio must not count.
                row = {"max_violation": [*violation, 99.0], "tokens_per_s": 100.0, "main_loss": 3.0}
                events.append({"event": "step", "step": step, **row})
            ends = {"loss": losses[arm] + 0.01 * seed, "max_violation_global": violation}
            events.append({"event": "validation", "step": run.steps, **ends})
            events.append({"event": "end", "step": run.steps, "reason": "finished"})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
            runs.append(ArmRun(arm, seed, folder, run))
    return runs


LOSSES = {"loss-free": 2.50, "loss-free-fast": 2.51, "auxiliary-loss": 2.52, "none": 2.49}
VIOLATIONS = {"loss-free": 0.1, "loss-free-fast": 0.06, "auxiliary-loss": 0.9, "none": 1.9}


def test_arms_differ_in_balance_only():
    options = claim.parse(["--model", "tiny", "--steps", "10"])
    runs = {arm: claim.run_spec(options, arm, 0) for arm in claim.ARMS}
    first = runs["loss-free"]
    balance = first.model.moe.balance
    assert (balance.bias_rule, balance.bias_update_rate, balance.sequence_loss_weight) == ("sign", 1e-3, 0.0)
    assert runs["auxiliary-loss"].model.moe.balance.expert_loss_weight == 1e-3
    for run in runs.values():
        moe = run.model.moe.model_copy(update={"balance": balance})
        model = run.model.model_copy(update={"moe": moe})
        assert run.model_copy(update={"model": model, "name": first.name}) == first


def test_finished_runs_become_table_plot_and_json(tmp_path):
    options = claim.parse(["--model", "tiny", "--steps", "20", "--seeds", "0,1,2", "--out", str(tmp_path)])
    markdown = claim.write_results(options, write_finished(tmp_path, options, LOSSES, VIOLATIONS))
    rows = {line.split(" | ")[0].strip("| "): line for line in markdown.splitlines() if line.startswith("| ")}
    assert "| 2.5100 +- 0.0100 | 12.30 | 0.100 +- 0.000 | 0.100 +- 0.000 | 9.50 / 0.04 |" in rows["loss-free"]
    assert "| 0.900 +- 0.000 | 0.900 +- 0.000 | 9.56 / 0.72 |" in rows["auxiliary-loss"]
    assert "*Measured.*" in markdown
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 12
    assert results["runs"][0]["max_violation_batch"] == pytest.approx(0.1)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.md").read_text() == markdown


def test_verdict_says_where_the_claim_does_not_hold(tmp_path):
    options = claim.parse(["--model", "tiny", "--steps", "5", "--seeds", "0,1", "--out", str(tmp_path)])
    runs = write_finished(tmp_path, options, LOSSES, {**VIOLATIONS, "auxiliary-loss": 0.05})
    text = claim.verdict([claim.measure(run) for run in runs])
    first, second = text.splitlines()[:2]
    assert first.startswith("- loss-free against auxiliary-loss: lower MaxVio in 0 of 2 seeds (by -0.050 +- 0.000)")
    assert "lower validation loss in 2 of 2 (by 0.0200 +- 0.0000)" in first
    assert second.startswith("- loss-free against none: lower MaxVio in 2 of 2 seeds (by 1.800 +- 0.000)")
    assert "lower validation loss in 0 of 2 (by -0.0100 +- 0.0000)" in second


def test_finished_run_is_skipped_and_an_unfinished_one_is_not(tmp_path):
    options = claim.parse(["--model", "tiny", "--steps", "5", "--seeds", "0", "--out", str(tmp_path)])
    runs = write_finished(tmp_path, options, LOSSES, VIOLATIONS)
    said: list[str] = []
    assert claim.all_runs(options) == runs
    arms.train_all(runs, 1, said.append)
    assert said == ["4 runs of 5 steps, 4 finished before"]
    folder = runs[0].folder
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:4]))
    assert not arms.is_finished(folder, runs[0].spec)


def test_folder_of_another_run_is_refused(tmp_path):
    options = claim.parse(["--model", "tiny", "--steps", "5", "--seeds", "0", "--out", str(tmp_path)])
    runs = write_finished(tmp_path, options, LOSSES, VIOLATIONS)
    longer = claim.parse(["--model", "tiny", "--steps", "6", "--seeds", "0", "--out", str(tmp_path)])
    with pytest.raises(TrainError, match="holds a run with other settings"):
        arms.is_finished(runs[0].folder, claim.all_runs(longer)[0].spec)


def test_dense_model_is_one_line(tmp_path):
    words = ["--model", "llama3.1-405b", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has no experts to balance" in done.stderr


def write_fp8_runs(options, losses: dict[str, float]) -> list[ArmRun]:
    """Write the files of a finished run for every arm and seed; a step's loss falls to its arm's."""
    runs = fp8_training.all_runs(options)
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "run.toml").write_text(dump(run.spec), "utf-8")
        end, last = losses[run.arm] + 0.1 * run.seed, run.spec.steps
        events = [{"event": "start", "step": 0}]
        events += [{"event": "step", "step": i, "main_loss": end, "tokens_per_s": 10.0} for i in range(1, last + 1)]
        events.append({"event": "validation", "step": last, "loss": end + 0.5})
        events.append({"event": "end", "step": last, "reason": "finished"})
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return runs


def test_fp8_is_compared_with_its_baseline_seed_by_seed(tmp_path):
    words = ["--model", "tiny", "--steps", "5", "--seeds", "0,1", "--out", str(tmp_path)]
    options = fp8_training.parse([*words, "--arms", "fp32,fp8,fp8-blocks"])
    runs = write_fp8_runs(options, {"fp32": 4.0, "fp8": 4.004, "fp8-blocks": 4.1})
    markdown = fp8_training.write_results(options, runs)
    assert "- fp8 against fp32: training loss +0.10 % (seeds +0.10, +0.10); the goal of 0.25 % is met." in markdown
    assert "- fp8-blocks against fp32: training loss +2.47 %" in markdown
    assert "- fp8-blocks against fp8: 2.37 +- 0.04 %, worse in 2 of 2 seeds." in markdown
    assert "| fp32 | 4.0500 +- 0.0707 | 4.5500 +- 0.0707 | - | - | 10 |" in markdown
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_arms_of_fp8_differ_in_precision_only():
    runs = fp8_training.all_runs(fp8_training.parse(["--model", "tiny", "--arms", ",".join(fp8_training.ARMS)]))
    first = runs[0].spec
    assert {run.spec.precision.moment_format for run in runs} == {"bf16"}
    assert len({run.spec.precision.model_dump_json() for run in runs}) == len(fp8_training.ARMS)
    for run in runs:
        same = {"precision": first.precision, "name": first.name, "seed": first.seed}
        assert run.spec.model_copy(update=same) == first


@pytest.mark.slow
def test_experiment_runs_from_nothing_to_a_table(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(6000)), "utf-8")
    sets = [
        f"data.paths=['{corpus}']",
        f"data.cache='{tmp_path / 'cache'}'",
        "data.sequence_length=32",
        "batch_size=2",
        "micro_batch_size=2",
        "validation_sequences=4",
    ]
    words = ["--model", "tiny", "--steps", "4", "--seeds", "0", "--out", str(tmp_path / "out")]
    words += [word for item in sets for word in ("--set", item)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(PROGRAM), *words]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| loss-free |" in done.stdout
    again = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "4 runs of 4 steps, 4 finished before" in again.stderr
    assert again.stdout == done.stdout
