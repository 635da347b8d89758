"""``cofire plan sweep`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from cofire.cli.main import main
from cofire.cli.sweep import make_spec, sweep
from cofire.plan.design_space import SweepSpec, parse_axis
from cofire.plan.sweep import SweepResult, run_sweep

SMALL = ("tiny", "--cluster", "h100-8", "--set", "parallel.pp=1", "--set", "parallel.tp=1", "--set", "sweep.workers=1")
VARY = ("--vary", "model.moe.num_routed_experts=8,16", "--vary", "model.moe.num_experts_per_token=2,6")


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command alone, with the errors of the whole command line."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("sweep")(sweep)
    monkeypatch.setattr("cofire.cli.main.build_app", lambda: app)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["sweep", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_is_the_sweep_that_the_library_gives(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, *SMALL, *VARY)
    axes = tuple(parse_axis(text) for text in VARY[1::2])
    spec = SweepSpec(model="tiny", cluster="h100-8", axes=axes, fixed={"pp": 1, "tp": 1})
    assert SweepResult.model_validate(shown) == run_sweep(spec)


def test_the_table_has_the_front_with_changed_fields_and_what_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *SMALL, *VARY)
    assert (code, err) == (0, "")
    for words in ("of 4 designs 3 can be trained", "experts  top-k", "is the knee", "Parameters are not quality"):
        assert words in out
    assert "refused by spec: 1, for example tiny: moe.num_experts_per_token = 6 must be at most the 4 experts" in out
    assert max(map(len, out[: out.index("the knee")].splitlines()[:-1])) <= 120


def test_settings_reach_model_cluster_workload_serving_and_the_sweep_itself() -> None:
    words = ["num_layers=2", "model.vocab_size=256", "cluster.num_nodes=2", "workload.sequence_length=128"]
    words += ["serving.num_devices=4", "parallel.ep=8", "sweep.tpot_limit_s=0.02", "sweep.workers=3"]
    spec, workers = make_spec("tiny", "h100-8", [], words, ["tpot"])
    assert workers == 3
    assert spec.changes == (
        "model.num_layers=2",
        "model.vocab_size=256",
        "cluster.num_nodes=2",
        "workload.sequence_length=128",
    )
    assert (spec.serving.num_devices, spec.serving.tp) == (4, 1)
    assert (spec.fixed, spec.tpot_limit_s) == ({"ep": 8}, 0.02)
    assert [one.measure for one in spec.objectives] == ["tpot"]


def test_out_is_appended_and_html_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, html = tmp_path / "sweep.jsonl", tmp_path / "sweep.html"
    words = (*SMALL, *VARY, "--out", str(out), "--html", str(html))
    first = run(capsys, *words)
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 4
    out.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # as a kill leaves it
    assert run(capsys, *words) == first
    assert out.read_text().splitlines() == lines
    assert "What was refused" in html.read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--vary", "model.moe.num_routed_expert=1,2"), "nearest: model.moe.num_routed_experts"),
        (("--vary", "modle.num_layers=1"), "must be model, cluster, or begin with"),
        (("--objective", "cost"), "is not one of total, activated, usd"),
        (("--set", "serving.num_device=4"), "nearest: serving.num_devices"),
        (("--set", "sweep.limit=4"), "unknown key 'limit'"),
        (("--set", "sweep.workers=0"), "must be a whole number from 1 on"),
        (("--set", "parallel.pq=4"), "pq"),
        (("--vary", "cluster=h100-9"), "all 1 designs are refused"),
        (("--vary", "model.moe.num_experts_per_token=90,91"), "all 2 designs are refused, 2 by spec"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    code, out, err = run(capsys, *SMALL[:7], *words)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1


def test_an_unknown_preset_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "deepseek-v4", "--cluster", "h800-2048")
    assert code == 2
    assert "nearest: deepseek-v" in err
    code, _, err = run(capsys, "h100-8", "--cluster", "h100-8")
    assert code == 2
    assert "a model spec is needed here" in err


def test_file_names_must_say_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in (("--html", "page.txt"), ("--out", "out.json")):
        code, _, err = run(capsys, *SMALL, option, name)
        assert code == 2
        assert "must end in" in err
