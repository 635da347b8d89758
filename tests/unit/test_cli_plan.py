"""``cofire plan`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofire.cli.main import main
from cofire.plan import Plan, estimate
from cofire.spec import ClusterSpec, ModelSpec, RunSpec, load_as, save


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_is_the_plan_that_the_library_gives(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "deepseek-v3", "--cluster", "h800-2048")
    plan = estimate(load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048"))
    assert Plan.from_dict(shown) == plan
    assert shown["training_flops"]["main"] == 250_456_015_872


def test_the_note_names_model_memory_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "deepseek-v3", "--cluster", "h800-2048")
    assert code == 0
    for word in ("671,026,419,200", "70,272", "optimizer", "Bounds on h800-2048", "memory bandwidth"):
        assert word in out


def test_overrides_reach_model_workload_and_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        "num_layers=4",
        "workload.sequence_length=1024",
        "workload.batch_size=64",
        "cluster.num_nodes=2",
    ]
    words = [word for change in changes for word in ("--set", change)]
    shown = run_json(capsys, "small", "--cluster", "h100-8", *words)
    assert shown["model"]["num_layers"] == 4
    assert shown["workload"]["sequence_length"] == 1024
    assert shown["inference_memory"]["cache"] == 64 * 2048 * 4 * 112 * 2
    assert shown["bounds"]["training"]["num_devices"] == 16


def test_a_run_preset_is_planned_with_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "demo", "--set", "steps=10")
    assert shown["run_cost"]["tokens"] == 10 * load_as(RunSpec, "demo").tokens_per_step
    assert "the whole run" in run(capsys, "demo")[1]


@pytest.mark.parametrize(("name", "spec"), [("run.toml", "demo"), ("model.toml", "tiny")])
def test_the_folder_of_a_run_or_a_checkpoint_is_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, spec: str
) -> None:
    from cofire.spec import load

    save(load(spec), tmp_path / name)
    assert run_json(capsys, str(tmp_path)) == run_json(capsys, spec)


def test_out_writes_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    shown = run_json(capsys, "tiny", "--out", str(path))
    assert Plan.load(path).to_dict() == shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["smal"], "'smal' is neither a preset nor a .toml or .json file; nearest: small"),
        (["h100-8"], "h100-8 is a cluster spec, but a plan needs a model or a run; give it as --cluster"),
        (["tiny", "--cluster", "small"], "small is a model spec, but a cluster spec is needed here; presets: dgx-a100"),
        (["tiny", "--set", "cluster.num_nodes=2"], "changes a cluster, but none is given; add --cluster"),
        (["tiny", "--set", "workload.recipe=fp16"], "workload: recipe = 'fp16' is not one of fp32, bf16"),
        (["tiny", "--set", "workload.batch=3"], "workload: unknown key 'batch'; nearest: batch_size"),
        (["tiny", "--set", "workload.sequence_length=513"], "workload.sequence_length = 513 must be at most the 512"),
        (["tiny", "--set", "num_layers"], "is not of the form path=value"),
        (["tiny", "--out", "/nowhere/plan.json"], "cannot write '/nowhere/plan.json': No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1


def test_out_must_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "tiny", "--out", "plan.txt")
    assert code == 2
    assert "must end in .json" in err
