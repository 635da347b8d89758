"""``cofire search kernels`` as a user types it: kernels within the window, survived crashes, and kernels shown."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cofire.cli.main import main
from cofire.cli.options import complete_kernel, complete_kernels
from cofire.search.canvas import Extent, Kernel
from cofire.search.canvas.from_spec import kernel_of, space_of
from cofire.search.canvas.lowering import lower, write_source
from cofire.search.canvas.page import render_page
from cofire.search.canvas.receptive import receptive_size
from cofire.search.canvas.search import KernelRandomSearch
from cofire.spec import KernelSpec, KernelsSpec, load_as, parse

PLACES = (Extent(16, 8, 8), Extent(32, 4, 4))
DENSE = sum(9 * c**2 * h * w for c, h, w in PLACES)
SMALL = ["small_kernels", "--set", "sampling.budget=12", "--set", "sampling.keep=5", "--set", "sampling.save_every=4"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["search", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if not name.endswith(".partial")}


def kernel_in(row: dict[str, Any]) -> Kernel:
    return kernel_of(parse(KernelSpec, row["spec"]))


def python(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *words]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)


# -- kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["mcts", "random"])
def test_kernels_found_are_within_the_window_and_said_truly(capsys, algorithm):
    found = run_json(capsys, "kernels", *SMALL, "--set", f"sampling.algorithm={algorithm}")
    assert (found["evaluated"], found["failed"], found["spent"], found["label"]) == (12, {}, False, "modelled")
    rows = found["kernels"]
    assert len(rows) == len({row["digest"] for row in rows}) == 5
    assert [row["reward"] for row in rows] == sorted((row["reward"] for row in rows), reverse=True)
    for row in rows:
        kernel = kernel_in(row)
        assert row["digest"] == f"{kernel.digest:032x}"
        assert row["text"] == str(kernel)
        assert 3 <= row["primitives"] == kernel.graph.num_primitives <= 8
        layers = [lower(kernel, extent) for extent in PLACES]
        assert row["parameters"] == sum(weight.numel() for layer in layers for weight in layer.parameters())
        counts = [kernel.multiply_adds(extent) for extent in PLACES]
        assert all(0.05 <= n / (9 * c**2 * h * w) <= 1 for n, (c, h, w) in zip(counts, PLACES, strict=True))
        assert row["multiply_adds"] == sum(counts)
        assert row["dense_ratio"] == pytest.approx(sum(counts) / DENSE)
        assert row["reward"] == pytest.approx(1 - sum(counts) / DENSE)
        assert 9 <= row["receptive_size"] == receptive_size(kernel, 21, 21)


def test_refusals_are_those_that_the_searcher_counted(capsys):
    spec = load_as(KernelsSpec, "small_kernels")
    searcher = KernelRandomSearch(space_of(spec), lambda kernel: 0.0, seed=5)
    for _ in range(12):
        searcher.step()
    found = run_json(capsys, "kernels", *SMALL, "--set", "sampling.algorithm=random", "--set", "sampling.seed=5")
    assert found["refused"] == {name: count for name, count in searcher.refused.items() if count}
    assert list(found["refused"].values()) == sorted(found["refused"].values(), reverse=True)
    assert {"multiply_adds", "receptive"} & set(found["refused"])


def test_without_a_reward_the_first_kernels_are_kept_in_order(capsys):
    words = ["kernels", *SMALL, "--set", "sampling.algorithm=random", "--set", "sampling.reward=none"]
    first = run_json(capsys, *words)["kernels"]
    assert [row["evaluation"] for row in first] == [0, 1, 2, 3, 4]
    assert {row["reward"] for row in first} == {0.0}
    every = run_json(capsys, *words[:-2], "--set", "sampling.keep=12")["kernels"]
    assert [row["digest"] for row in first] == [
        row["digest"] for row in sorted(every, key=lambda row: row["evaluation"])[:5]
    ]


def test_the_table_says_what_the_document_says(capsys):
    found = run_json(capsys, "kernels", *SMALL)
    code, out, err = run(capsys, "kernels", *SMALL)
    assert (code, err) == (0, "")
    assert "small_kernels: 12 kernels evaluated, 0 of them refused;" in out
    assert "5 kernels, the best by multiply_adds (modelled, mcts, seed 0)" in out
    most = ", ".join(f"{count} by {name}" for name, count in list(found["refused"].items())[:5])
    assert f"On the way {sum(found['refused'].values())} were turned down; most {most}." in out
    for row in found["kernels"]:
        (line,) = (line for line in out.splitlines() if row["digest"][:12] in line)
        assert f" {row['reward']:.4g} " in line
        assert f" {row['receptive_size']}/441 " in line
        assert f" {row['dense_ratio']:.1%} " in line


def test_every_process_finds_the_same_kernels():
    program = "import sys; from cofire.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["search", "kernels", *SMALL, "--json"]
    documents = []
    for seed in ("1", "2"):
        done = python(program, *words, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        documents.append({**json.loads(done.stdout), "took_s": None})
    assert documents[0] == documents[1]


def test_several_processes_find_the_same_at_random_as_one(capsys):
    words = ["kernels", *SMALL, "--set", "sampling.algorithm=random"]
    one, two = run_json(capsys, *words), run_json(capsys, *words, "--set", "sampling.workers=2")
    assert one["kernels"] == two["kernels"]


def test_what_is_written_is_what_was_found_and_runs_without_cofire(capsys, tmp_path):
    found = run_json(capsys, "kernels", *SMALL, "--out", str(tmp_path / "run"))
    folder = tmp_path / "run" / "kernels"
    stems = [f"{rank:02}-{row['digest'][:12]}" for rank, row in enumerate(found["kernels"], 1)]
    endings = (".json", *(f"-{'x'.join(map(str, place))}.py" for place in PLACES))
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{s}{end}" for s in stems for end in endings)
    for stem, row in zip(stems, found["kernels"], strict=True):
        spec = load_as(KernelSpec, folder / f"{stem}.json")
        kernel = kernel_of(spec)
        assert kernel == kernel_in(row)
        assert spec.places == PLACES
        for place, ending in zip(PLACES, endings[1:], strict=True):
            path = folder / f"{stem}{ending}"
            assert path.read_text() == write_source(kernel, place)
            assert "cofire" not in path.read_text()
            made, x = runpy.run_path(str(path))["CanvasKernel"](), torch.randn(2, *place)
            known = lower(kernel, place)
            known.load_state_dict(made.state_dict())
            torch.testing.assert_close(made(x), known(x), equal_nan=True)


def test_a_raised_budget_goes_on_as_if_it_had_been_there(capsys, tmp_path):
    run(capsys, "kernels", *SMALL, "--out", str(tmp_path / "a"), "--set", "sampling.budget=7")
    again = run_json(capsys, "kernels", *SMALL, "--out", str(tmp_path / "a"))
    assert (again["evaluated"], again["resumed"]) == (12, 7)
    whole = run_json(capsys, "kernels", *SMALL, "--out", str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert again["refused"] == whole["refused"]
    assert again["kernels"] == whole["kernels"]


def test_a_state_of_another_search_is_refused(capsys, tmp_path):
    words = ["kernels", *SMALL, "--out", str(tmp_path)]
    assert run(capsys, *words)[0] == 0
    before = files(tmp_path)
    for change in ("sampling.seed=3", "window.max_ratio=0.9", "limits.dims=6"):
        code, out, err = run(capsys, *words, "--set", change)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"holds a search with another {change.partition('=')[0]}: " in err
    code, _, err = run(capsys, "sample", "matmul", "--out", str(tmp_path))
    assert (code, "search.toml is a kernels spec, but a search spec is needed here" in err) == (2, True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', '{"version": 1, "searcher": {}}'])
def test_a_broken_state_is_one_line(capsys, tmp_path, text):
    words = ["kernels", *SMALL, "--set", "sampling.budget=1", "--out", str(tmp_path)]
    assert run(capsys, *words)[0] == 0
    (tmp_path / "state.json").write_text(text)
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--set", "places=[]"], "places = [] has no place to fill"),
        (["--set", "limits.kinds=['fold']"], "kinds leave no primitive with a weight; add one of fc"),
        (["--set", "window.min_ratio=3"], "min_ratio = 3.0 is above max_ratio = 1.0"),
        (["--out", "/dev/null/x"], "cannot make the folder '/dev/null/x': Not a directory"),
    ],
)
def test_what_has_no_kernel_is_one_line_and_exit_code_2(capsys, words, text):
    code, out, err = run(capsys, "kernels", "small_kernels", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_a_window_that_no_kernel_fits_is_named(capsys):
    limits = ["limits.kinds=['convolution','activation']", "limits.primitives=[3,3]", "limits.weighted=[1,1]"]
    words = [word for change in (*limits, "window.max_ratio=0.06") for word in ("--set", change)]
    code, out, err = run(capsys, "kernels", "small_kernels", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    wanted = (
        r"cofire: none of (\d+) kernels met is within the window; "
        r"multiply_adds refused \1: widen window.min_ratio or window.max_ratio\n"
    )
    found = re.fullmatch(wanted, err)
    assert found is not None
    assert int(found[1]) > 0


def evaluated(folder: Path) -> int:
    path = folder / "state.json"
    return json.loads(path.read_text())["evaluated"] if path.exists() else 0


def test_a_killed_search_goes_on_as_if_nothing_had_been(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["search", "kernels", "small_kernels", "--set", "sampling.save_every=3", "--set", "sampling.keep=4"]
    program = [sys.executable, "-m", "cofire", *words, "--set", "sampling.budget=5000", "--out", str(killed)]
    with subprocess.Popen(program, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 60
        while evaluated(killed) < 6 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = evaluated(killed)
    assert done >= 6
    assert done % 3 == 0
    for folder in (killed, whole):
        assert main([*words, "--set", f"sampling.budget={done + 4}", "--out", str(folder)]) == 0
    assert files(killed) == files(whole)


def test_only_what_is_written_needs_torch(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from cofire.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for words in (["kernels", *SMALL, "--set", "sampling.budget=2"], ["kernel", "large_kernel_attention"]):
        done = python(program, "search", *words)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    for words in (["kernels", *SMALL, "--out", str(folder)], ["kernel", "large_kernel_attention", "--code"]):
        done = python(program, "search", *words)
        assert done.returncode == 2
        assert "needs torch: pip install 'cofire[train]'" in done.stderr
    assert not folder.exists()


# -- kernel ------------------------------------------------------------------------------------------


def test_a_kernel_is_shown_with_what_it_costs_at_every_place(capsys):
    kernel = kernel_of(load_as(KernelSpec, "large_kernel_attention"))
    found = run_json(capsys, "kernel", "large_kernel_attention")
    assert found["text"] == str(kernel)
    assert found["graphviz"] == kernel.graph.graphviz()
    assert (found["receptive_size"], found["receptive_map"]) == (23**2, [31, 31])
    assert [row["place"] for row in found["costs"]] == [[64, 56, 56], [128, 28, 28], [256, 14, 14], [512, 7, 7]]
    for row in found["costs"]:
        c, h, w = row["place"]
        taps = 5**2 + 7**2 + c
        assert (row["parameters"], row["multiply_adds"]) == (taps * c, taps * c * h * w)
        assert row["dense_ratio"] == pytest.approx(taps / (9 * c))
    assert sum(node["multiply_adds"] for node in found["nodes"]) == found["costs"][0]["multiply_adds"]
    code, out, err = run(capsys, "kernel", "large_kernel_attention")
    assert (code, err) == (0, "")
    assert kernel.graph.graphviz() in out
    assert "Sees 529 of 961 places of a map of 31 x 31." in out


def test_shapes_of_a_shown_kernel_are_those_that_its_module_has(capsys):
    kernel, extent = kernel_of(load_as(KernelSpec, "large_kernel_attention")), Extent(5, 9, 8)
    found = run_json(capsys, "kernel", "large_kernel_attention", "--place", "5,9,8")
    weights = [list(weight.shape) for weight in lower(kernel, extent).parameters()]
    assert [node["weight"] for node in found["nodes"] if node["weight"]] == weights
    assert [node["sizes"] for node in found["nodes"]] == [[5, 9, 8]] * 6
    assert [node["inputs"] for node in found["nodes"]] == [[], [0], [1], [2], [0, 3], [4]]


def test_code_of_a_kernel_is_its_source_at_the_place(capsys):
    kernel = kernel_of(load_as(KernelSpec, "large_kernel_attention"))
    words = ["kernel", "large_kernel_attention", "--code"]
    assert run(capsys, *words) == (0, write_source(kernel, Extent(64, 56, 56)), "")
    assert run(capsys, *words, "--place", "6,9,8") == (0, write_source(kernel, Extent(6, 9, 8)), "")
    assert run_json(capsys, *words, "--place", "6,9,8")["code"] == write_source(kernel, Extent(6, 9, 8))


def test_the_page_of_a_kernel_is_written(capsys, tmp_path):
    path = tmp_path / "k.html"
    assert run(capsys, "kernel", "large_kernel_attention", "--place", "6,9,8", "--html", str(path))[0] == 0
    kernel = kernel_of(load_as(KernelSpec, "large_kernel_attention"))
    assert path.read_text() == render_page(kernel, (Extent(6, 9, 8),))
    code, _, err = run(capsys, "kernel", "large_kernel_attention", "--html", str(tmp_path / "k.txt"))
    assert (code, "Invalid value for --html" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["small_kernels"], "small_kernels is a kernels spec, but a kernel spec is needed here"),
        (["large_kernel_attention", "--place", "3,x,4"], "--place '3,x,4' must be three whole numbers from 1 up"),
        (["large_kernel_attention", "--place", "3,0,4"], "--place '3,0,4' must be three whole numbers from 1 up"),
        (["large_kernel_attention", "--set", "places=[]"], "names no place; give one, for example --place 64,56,56"),
        (["large_kernel_attention", "--set", "primitives=[]"], "a graph must begin with an input"),
        (["nothing.json"], "cannot read 'nothing.json'"),
    ],
)
def test_a_kernel_that_cannot_be_shown_is_one_line_and_exit_code_2(capsys, words, text):
    code, out, err = run(capsys, "kernel", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_shells_are_offered_presets_of_kernels():
    assert complete_kernels("") == ["resnet18_kernels", "small_kernels"]
    assert complete_kernel("large") == ["large_kernel_attention"]
