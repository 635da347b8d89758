"""``cofire search`` as a user types it: counts, samples that survive a crash, walks by script, and operators shown."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofire.cli.main import build_app, main
from cofire.cli.options import complete_operator, complete_search
from cofire.cli.search_explore import complete_source
from cofire.search import Operator, enumerate_operators
from cofire.search.cost import costs
from cofire.search.from_spec import space_of, total_multiply_adds
from cofire.search.operator_io import from_spec
from cofire.search.rewards import REWARDS
from cofire.spec import OperatorSpec, SearchSpec, load_as, preset_names

# Thousands of operators, some hundred a second: it can be killed at leisure.
LONG = ["conv2d", "--set", "depth=9", "--set", "sampling.save_every=5", "--set", "sampling.keep=5"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["search", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def operators(depth: int) -> list[Any]:
    return enumerate_operators(space_of(load_as(SearchSpec, "conv1d")), depth)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if not name.endswith(".partial")}


# -- enumerate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "counts"), [("exact", [0, 1, 2, 4, 8, 11, 19]), ("compat", [0, 0, 1, 2, 7, 9, 11])]
)
def test_a_space_is_counted_depth_by_depth(capsys, guidance, counts):
    found = run_json(capsys, "enumerate", "conv1d", "--set", f"guidance={guidance}")
    assert [row["operators"] for row in found["depths"]] == counts
    assert [row["depth"] for row in found["depths"]] == list(range(1, 8))
    assert len(found["operators"]) == counts[-1]
    assert found["functions"] is None


def test_enumerated_operators_come_with_what_they_cost(capsys):
    found = run_json(capsys, "enumerate", "conv1d", "--depth", "5")
    known = {f"{operator.digest:032x}": operator for operator in operators(5)}
    assert {row["digest"] for row in found["operators"]} == set(known)
    for row in found["operators"]:
        operator = known[row["digest"]]
        assert row["formula"] == str(operator)
        assert row["multiply_adds"] == total_multiply_adds(operator)
    numbers = [row["multiply_adds"] for row in found["operators"]]
    assert numbers == sorted(numbers)


def test_operators_of_one_function_are_folded_and_counted(capsys):
    found = run_json(capsys, "enumerate", "conv1d", "--depth", "8", "--distinct")
    assert found["depths"][-1]["operators"] == 30
    assert found["functions"] == len(found["operators"]) == 25
    folded = [digest for row in found["operators"] for digest in (row["digest"], *row["same_function"])]
    assert sorted(folded) == sorted(f"{operator.digest:032x}" for operator in operators(8))
    code, out, _ = run(capsys, "enumerate", "conv1d", "--distinct", "--top", "3")
    assert code == 0
    assert "19 operators are 16 functions: 3 fell together with another." in out
    assert "3 of 16 with the fewest multiply-adds (modelled)" in out


@pytest.mark.parametrize("command", ["enumerate", "sample", "explore"])
@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("depth=1", "no operator within depth = 1; one exists with depth = 2"),
        ("allowance.K=1", "one exists with allowance.K = 2"),
        ("input=['M','K/M']", "input.1 = K/M is no size"),
        ("limits.low_rank=[9,3]", "turn it round: [3, 9]"),
    ],
)
def test_what_has_no_solution_is_one_line_and_exit_code_2(capsys, command, override, text):
    code, out, err = run(capsys, command, "matmul", "--set", override)
    assert (code, out) == (2, "")
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1
    assert text in err


def test_a_spec_of_another_kind_is_refused(capsys):
    assert "small is a model spec, but a search spec is needed here" in run(capsys, "enumerate", "small")[2]
    assert "small is a model spec, but a search or an operator is needed here" in run(capsys, "explore", "small")[2]
    assert "conv1d is a search spec, but a operator spec is needed" in run(capsys, "show", "conv1d")[2]


# -- sample ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["mcts", "random", "beam"])
def test_every_algorithm_finds_the_best_of_a_small_space(capsys, algorithm):
    found = run_json(
        capsys, "sample", "conv1d", "--set", f"sampling.algorithm={algorithm}", "--set", "sampling.keep=30"
    )
    wanted = {f"{one.digest:032x}": 1 - total_multiply_adds(one) / 3145728 for one in operators(7)}
    rewards = {row["digest"]: row["reward"] for row in found["operators"]}
    # Random walks give up after a thousand known operators in a row, before they have met the rarest.
    assert len(rewards) == len(wanted) if algorithm != "random" else len(rewards) > len(wanted) // 2
    assert rewards == pytest.approx({digest: wanted[digest] for digest in rewards})
    assert list(rewards.values()) == sorted(rewards.values(), reverse=True)
    assert max(rewards.values()) == pytest.approx(max(wanted.values()))
    assert (found["evaluated"], found["failed"], found["spent"]) == (len(rewards), {}, True)
    assert found["label"] == "modelled"


def test_several_processes_find_the_same_as_one(capsys):
    words = ["sample", "conv1d", "--set", "sampling.keep=30", "--set", "sampling.reward=capacity"]
    one, two = run_json(capsys, *words), run_json(capsys, *words, "--set", "sampling.workers=2")
    key = lambda rows: sorted((row["digest"], row["reward"]) for row in rows["operators"])  # noqa: E731
    assert key(one) == key(two)
    assert len(one["operators"]) == 19


def test_operators_outside_the_window_are_counted_and_not_kept(capsys):
    words = ["sample", "conv1d", "--set", "window.max_ratio=0.34", "--set", "sampling.keep=30"]
    found = run_json(capsys, *words)
    inside = [one for one in operators(7) if total_multiply_adds(one) <= 0.34 * 3145728]
    assert len(found["operators"]) == len(inside)
    assert found["failed"] == {"max_multiply_adds": 19 - len(inside)}
    code, out, err = run(capsys, "sample", "conv1d", "--set", "window.max_ratio=0.1")
    assert (code, "most are refused by max_multiply_adds, so widen that first" in err) == (0, True)
    assert "19 operators evaluated, 19 of them refused (19 by max_multiply_adds);" in out
    found = run_json(capsys, "sample", "conv1d", "--set", "window.max_parameters=4096", "--set", "sampling.keep=30")
    assert {row["parameters"] for row in found["operators"]} == {4096}
    assert set(found["failed"]) == {"max_parameters"}


def test_what_is_written_is_what_was_found(capsys, tmp_path):
    found = run_json(capsys, "sample", "conv1d", "--set", "sampling.keep=3", "--out", str(tmp_path / "run"))
    names = sorted(path.name for path in (tmp_path / "run" / "operators").iterdir())
    assert names == [f"{rank:02}-{row['digest'][:12]}.toml" for rank, row in enumerate(found["operators"], 1)]
    for name, row in zip(names, found["operators"], strict=True):
        operator = from_spec(load_as(OperatorSpec, tmp_path / "run" / "operators" / name))
        assert f"{operator.digest:032x}" == row["digest"]
        assert 1 - total_multiply_adds(operator) / 3145728 == pytest.approx(row["reward"])


def test_a_raised_budget_goes_on_as_if_it_had_been_there(capsys, tmp_path):
    run(capsys, "sample", *LONG, "--out", str(tmp_path / "a"), "--set", "sampling.budget=17")
    assert len(files(tmp_path / "a")) == 7
    again = run_json(capsys, "sample", *LONG, "--out", str(tmp_path / "a"), "--set", "sampling.budget=30")
    assert (again["evaluated"], again["resumed"]) == (30, 17)
    run(capsys, "sample", *LONG, "--out", str(tmp_path / "b"), "--set", "sampling.budget=30")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_state_of_another_search_is_refused(capsys, tmp_path):
    words = ["sample", "conv1d", "--out", str(tmp_path)]
    assert run(capsys, *words)[0] == 0
    before = files(tmp_path)
    for change in ("sampling.seed=3", "allowance.k=1", "window.max_ratio=0.9"):
        code, out, err = run(capsys, *words, "--set", change)
        assert (code, out) == (2, "")
        assert f"holds a search with another {change.partition('=')[0]}: " in err
        assert "take another folder" in err
    assert "allowance.k=2" in run(capsys, *words, "--set", "allowance.k=1")[2]
    assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', '{"version": 1, "searcher": {}}'])
def test_a_broken_state_is_one_line(capsys, tmp_path, text):
    words = ["sample", "conv1d", "--out", str(tmp_path)]
    assert run(capsys, *words)[0] == 0
    (tmp_path / "state.json").write_text(text)
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)


def sampling(folder: Path, *changes: str) -> list[str]:
    words = [word for change in changes for word in ("--set", change)]
    return ["search", "sample", *LONG, *words, "--out", str(folder)]


def evaluated(folder: Path) -> int:
    path = folder / "state.json"
    return json.loads(path.read_text())["evaluated"] if path.exists() else 0


def stop_after(folder: Path, count: int, number: signal.Signals, *changes: str) -> tuple[int, str]:
    """Start a search, send it a signal once so many evaluations are saved, and return its exit code and last words."""
    program = [sys.executable, "-m", "cofire", *sampling(folder, "sampling.budget=5000", *changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while evaluated(folder) < count and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        # Returns when no process is left that holds the pipe, those that compute rewards included.
        _, err = process.communicate(timeout=60)
    assert count <= evaluated(folder) < 5000
    return process.returncode, err


def assert_goes_on(killed: Path, whole: Path, *changes: str) -> None:
    """Give a stopped search some more evaluations, and compare it with one that was never stopped."""
    budget = f"sampling.budget={evaluated(killed) + 12}"
    for folder in (killed, whole):
        assert main(sampling(folder, budget, *changes)) == 0
    assert files(killed) == files(whole)


def test_a_killed_search_goes_on_as_if_nothing_had_been(tmp_path):
    code, _ = stop_after(tmp_path / "killed", 10, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert evaluated(tmp_path / "killed") % 5 == 0
    assert_goes_on(tmp_path / "killed", tmp_path / "whole")


def test_an_interrupted_search_saves_all_it_has_and_goes_on(tmp_path):
    code, err = stop_after(tmp_path / "killed", 10, signal.SIGINT)
    assert code == 130, err
    assert "the same command goes on with it" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "killed" / "operators").iterdir())) == 5
    assert_goes_on(tmp_path / "killed", tmp_path / "whole")


def test_a_search_in_several_processes_goes_on_after_it_was_killed(tmp_path):
    code, _ = stop_after(tmp_path / "killed", 10, signal.SIGKILL, "sampling.workers=2")
    assert code == -signal.SIGKILL
    assert_goes_on(tmp_path / "killed", tmp_path / "whole", "sampling.workers=2")


class Dies:
    """A reward whose process is killed."""

    def __call__(self, operator: Operator) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0


def test_a_reward_whose_process_dies_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(REWARDS, "dies", lambda spec, baseline: Dies())
    words = ["conv1d", "--set", "sampling.reward=dies", "--set", "sampling.workers=2"]
    code, out, err = run(capsys, "sample", *words, "--out", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a process that computed a reward was killed" in err
    assert evaluated(tmp_path) == 0


# -- explore -----------------------------------------------------------------------------------------


def explore(*lines: str, source: str = "matmul", words: tuple[str, ...] = ()) -> Any:
    result = CliRunner().invoke(build_app(), ["search", "explore", source, *words], input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    return result


def walked(*lines: str, source: str = "matmul", words: tuple[str, ...] = ()) -> Any:
    return json.loads(explore(*lines, source=source, words=(*words, "--json")).stdout)


def test_a_walk_by_numbers_ends_at_the_matrix_product(tmp_path):
    path = tmp_path / "m.toml"
    found = walked("1", "1", "1", "1", "finish", f"save {path}")
    (product,) = enumerate_operators(space_of(load_as(SearchSpec, "matmul")), 2)
    assert found["operator"]["digest"] == f"{product.digest:032x}"
    assert from_spec(load_as(OperatorSpec, path)) == product
    assert [step.partition(" ")[0] for step in found["steps"]] == ["reduce", "contract"]
    assert found["distance"] == 0


def test_back_undoes_an_end_a_menu_and_a_step():
    assert walked("back") == walked()
    assert walked("1", "back") == walked()
    assert walked("1", "1", "back") == walked()
    assert walked("1", "1", "1", "1", "finish", "back") == walked("1", "1", "1", "1")
    assert walked("random", "back", "1", "1", "back", "back") == walked()
    assert walked()["steps"] == []
    assert walked("1", "1")["steps"] == ["reduce r0 in [0, K)"]


def test_a_walk_shows_where_it_is():
    out = explore("1", "1").stdout
    assert "y[i0, i1] = x{i0, i1}" in out
    assert "y[i0, i1] = sum(r0) x{i0, i1, r0}" in out
    assert "steps 1 of 4; shape distance to the input's (K): 1" in out
    for words in ("output dim 1", "reduction", "contract"):
        assert words in out


def test_moves_of_a_walk_are_those_that_can_end():
    found = walked(source="conv1d", words=("--set", "depth=3"))
    # Ci must be summed over, alone or with the window: [0, k) alone leads nowhere within three steps.
    assert found["moves"]["reduce"]
    for k, _ in enumerate(found["moves"]["reduce"], 1):
        below = walked("1", str(k), "random", source="conv1d", words=("--set", "depth=3"))
        assert below["operator"] is not None


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["9"], "no move 9; numbers are 1 to 1"),
        (["0"], "no move 0; numbers are 1 to 1"),
        (["fly"], "'fly' is no command; a number or a kind, back, random"),
        (["help"], "save FILE.toml"),
        (["finish"], "the interface is not the input yet"),
        (["back"], "this is where the walk begins"),
        (["save x.toml"], "the walk has not ended; finish or random makes an operator"),
        (["random", "save x.txt"], "a spec's file ends in .toml or .json"),
        (["random", "html x.txt"], "'x.txt' must end in .html"),
        (["random", "1"], "the walk has ended; back undoes the end"),
    ],
)
def test_a_wrong_command_is_answered_and_the_walk_goes_on(lines, text):
    out = explore(*lines, "help", "quit", "nonsense").stdout
    assert text in out
    assert "nonsense" not in out


def test_a_random_end_is_an_operator_of_the_space(tmp_path):
    path = tmp_path / "r.toml"
    found = walked("random", f"save {path}", source="conv1d")
    assert found["operator"]["formula"] in {str(operator) for operator in operators(7)}
    assert f"{from_spec(load_as(OperatorSpec, path)).digest:032x}" == found["operator"]["digest"]


def test_compat_is_refused_where_it_has_no_meaning(capsys):
    for command in ("explore", "sample"):
        code, _, err = run(capsys, command, "conv1d", "--set", "guidance=compat")
        assert (code, "guidance = 'compat' is for enumeration" in err) == (2, True)


def test_an_operator_is_shown_where_one_is_explored(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("quit\n"))
    assert run(capsys, "explore", "operator_1") == run(capsys, "show", "operator_1")


# -- show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names("operator"))
def test_an_operator_is_shown_with_what_it_costs(capsys, name):
    operator = from_spec(load_as(OperatorSpec, name))
    found = run_json(capsys, "show", name)
    assert found["formula"] == str(operator)
    assert found["graphviz"] == operator.graphviz()
    for row, known in zip(found["costs"], costs(operator), strict=True):
        assert row["multiply_adds"] == known.multiply_adds == sum(stage["multiply_adds"] for stage in row["stages"])
        assert row["parameters"] == known.parameters
        assert row["naive_multiply_adds"] == known.naive_multiply_adds
    code, out, err = run(capsys, "show", name)
    assert (code, err) == (0, "")
    assert str(operator) in out
    assert operator.graphviz() in out


def test_code_runs_without_cofire(capsys, tmp_path):
    sizes = "mappings=[{N=2,Ci=4,Co=5,H=7,k=3}]"
    code, out, _ = run(capsys, "show", "dense_conv1d", "--code", "--set", sizes)
    assert code == 0
    (tmp_path / "layer.py").write_text(out)
    (tmp_path / "use.py").write_text(
        "import sys; sys.modules['cofire'] = None\n"
        "import inspect, torch, layer\n"
        "kinds = [v for v in vars(layer).values() if inspect.isclass(v) and issubclass(v, torch.nn.Module)]\n"
        "(kind,) = [v for v in kinds if v.__module__ == 'layer']\n"
        "made = kind(); x = torch.randn(2, 4, 7); (w,) = made.parameters()\n"
        "exact = torch.nn.functional.conv1d(x, w.permute(2, 0, 1), padding=1)\n"
        "print(float((made(x) - exact).abs().max()))"
    )
    # Torch loads the collectives of an installed Cofire by itself.
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    assert run_json(capsys, "show", "dense_conv1d", "--code", "--set", sizes)["code"] == out


def test_the_page_of_an_operator_is_written(capsys, tmp_path):
    path = tmp_path / "o.html"
    assert run(capsys, "show", "operator_2", "--html", str(path))[0] == 0
    assert "<svg" in path.read_text()
    walk = tmp_path / "walk.html"
    explore("random", f"html {walk}")
    assert "<svg" in walk.read_text()
    code, _, err = run(capsys, "show", "operator_2", "--html", str(tmp_path / "o.txt"))
    assert (code, "Invalid value for --html" in err) == (2, True)


def test_only_code_and_pages_need_torch(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from cofire.cli.main import main; sys.exit(main(sys.argv[1:]))"

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "search", *words]
        return subprocess.run(command, input="random\n", capture_output=True, text=True, check=False, cwd=tmp_path)

    for words in (["sample", "matmul"], ["explore", "operator_1"]):
        done = call(*words)
        assert done.returncode == 0, done.stderr
    done = call("show", "operator_1", "--code")
    assert done.returncode == 2
    assert "needs torch: pip install 'cofire[train]'" in done.stderr


def test_shells_are_offered_presets_of_the_right_kind():
    assert complete_search("co") == ["conv1d", "conv2d"]
    assert complete_operator("operator_") == ["operator_1", "operator_2"]
    assert complete_source("g") == ["gpt2_qkv", "gpt2_projection"]


def test_a_kind_may_be_called_by_its_name():
    assert walked("reduce", "1", "contract", "1") == walked("1", "1", "1", "1")
