"""``cofire`` and ``cofire spec`` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cofire import __version__
from cofire.cli import main as cli
from cofire.cli.main import main
from cofire.cli.options import complete_cluster, complete_kind, complete_model, complete_preset, complete_run
from cofire.errors import TrainError
from cofire.spec import load, preset_names


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# -- the whole command -------------------------------------------------------------------------------


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"cofire {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["spec", "-h"], ["spec", "show", "--help"], ["plan", "--help"]])
def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "Usage: cofire" in out


@pytest.mark.parametrize(
    "words", [["nonsense"], ["spec", "show"], ["spec", "show", "tiny", "--nonsense"], ["spec", "lst"]]
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "Usage: cofire" in err


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "spec", "show", "smal")
    assert (code, out) == (2, "")
    assert err == "cofire: 'smal' is neither a preset nor a .toml or .json file; nearest: small\n"


def app_that(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def build() -> Any:
        def app(**_: Any) -> None:
            raise error

        return app

    monkeypatch.setattr(cli, "build_app", build)


def test_an_error_of_many_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app_that(monkeypatch, TrainError("no\nspace"))
    assert run(capsys) == (2, "", "cofire: no space\n")


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    app_that(monkeypatch, KeyboardInterrupt())
    assert run(capsys)[0] == 130


def test_a_fault_of_ours_is_exit_code_1_with_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    app_that(monkeypatch, ZeroDivisionError("one by none"))
    code, out, err = run(capsys)
    assert (code, out) == (1, "")
    assert err.startswith("cofire: this is a fault in cofire: ZeroDivisionError: one by none; traceback in ")
    (file,) = tmp_path.iterdir()
    assert str(file) in err
    assert "Traceback (most recent call last)" in file.read_text()


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, cofire.cli.main as m; code = m.main(['--help']);"
        "sys.exit(code or [n for n in ('torch', 'numpy', 'transformers') if n in sys.modules] or None)"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    print(f"cofire --help: {min(times):.2f} s")  # a time is reported, not judged: machines differ


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "cofire", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"cofire {__version__}\n")


def test_a_closed_pipe_is_no_fault_of_ours() -> None:
    command = f"{sys.executable} -m cofire spec schema run | head -c 10 > /dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "fault" not in done.stderr
    assert "Traceback" not in done.stderr


def test_completion_of_bash_offers_presets() -> None:
    environment = {
        **os.environ,
        "_COFIRE_COMPLETE": "complete_bash",
        "COMP_WORDS": "cofire spec show deepseek-v",
        "COMP_CWORD": "3",
    }
    code = "import sys; from cofire.cli.main import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"]


def test_completions_offer_what_fits_the_argument() -> None:
    assert complete_model("sm") == ["small"]
    assert set(complete_run("")) == {*preset_names("run"), *preset_names("model")}
    assert complete_cluster("h100") == ["h100-2048", "h100-8"]
    assert complete_cluster("this") == ["this-machine"]
    assert complete_preset("") == preset_names()
    assert complete_kind("m") == ["model"]


# -- cofire spec -------------------------------------------------------------------------------------


def test_list_names_every_preset_once(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "spec", "list")
    assert [row["name"] for row in rows] == preset_names()
    assert next(row for row in rows if row["name"] == "deepseek-v3")["total"] == 671_026_419_200
    _, out, _ = run(capsys, "spec", "list")
    assert all(name in out for name in preset_names())


def test_list_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["name"] for row in run_json(capsys, "spec", "list", "cluster")] == preset_names("cluster")
    assert run(capsys, "spec", "list", "modle")[2] == (
        "cofire: kind = 'modle' is not one of model, cluster, parallel, run, workload, operator, search, "
        "kernel, kernels; nearest: model\n"
    )


def test_show_of_deepseek_v3_has_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "spec", "show", "deepseek-v3")
    assert shown["parameters"]["total"] == 671_026_419_200
    assert shown["parameters"]["activated_head_only"] == 36_625_618_432
    assert shown["parameters"]["activated_with_both_embeddings"] == 37_552_297_472
    assert shown["kv_bytes_per_token"] == 70_272
    assert shown["spec"] == load("deepseek-v3").model_dump(mode="json")
    assert "671,026,419,200" in run(capsys, "spec", "show", "deepseek-v3")[1]


def test_show_applies_overrides_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "spec", "show", "small", "--set", "num_layers=2", "--set", "mtp=none")
    assert (shown["spec"]["num_layers"], shown["spec"]["mtp"]) == (2, None)
    assert shown["parameters"]["mtp"]["total"] == 0


@pytest.mark.parametrize("name", ["deepseek-v3", "demo", "h800-2048", "qwen2.5-72b"])
@pytest.mark.parametrize("option", [["--toml"], []])
def test_what_show_prints_is_a_file_that_loads_as_the_same_spec(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, option: list[str]
) -> None:
    _, out, _ = run(capsys, "spec", "show", name, *option)
    path = tmp_path / "copy.toml"
    path.write_text(out)
    assert load(path) == load(name)


def test_show_takes_one_form_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "spec", "show", "tiny", "--json", "--toml")
    assert code == 2
    assert "exclude each other" in err


def test_a_cluster_has_no_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(run_json(capsys, "spec", "show", "h100-8")) == {"spec"}


def test_validate_tells_good_from_bad(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('base = "small"\nnum_layers = 3\n')
    assert run(capsys, "spec", "validate", str(path)) == (0, f"{path}: valid model spec\n", "")
    assert run_json(capsys, "spec", "validate", str(path))["valid"] is True
    path.write_text('base = "small"\nnum_layer = 3\n')
    assert run(capsys, "spec", "validate", str(path)) == (
        2,
        "",
        f"cofire: {path}: unknown key 'num_layer'; nearest: num_layers\n",
    )


def test_diff_shows_what_differs_and_what_an_override_changes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("spec", "diff", "small", "small", "--set", "num_layers=7")
    assert run_json(capsys, *words) == [{"path": "num_layers", "left": 6, "right": 7}]
    _, out, _ = run(capsys, *words)
    assert "num_layers" in out
    assert run(capsys, "spec", "diff", "small", "small")[1] == "no field differs\n"


def test_schema_is_json_with_and_without_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "spec", "schema", "run") == json.loads(run(capsys, "spec", "schema", "run")[1])
