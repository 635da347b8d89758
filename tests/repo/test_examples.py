"""The examples run as a reader would run them, with tiny settings, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES_MAX = 60


def run_example(name: str, *words: str, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_fits_on_a_page(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= LINES_MAX
    assert lines[0].startswith('"""')


def test_plan_example_prints_the_papers_figures(tmp_path):
    output = run_example("01_plan.py", cwd=tmp_path)
    row = next(line for line in output.splitlines() if line.startswith("deepseek-v3")).split()
    # arXiv 2505.09343: 70.272 KB of cache per token (table 1), 250 GFLOP per token (table 2); 671B, 37B activated.
    assert row == ["deepseek-v3", "671.0B", "36.6B", "70.27", "kB", "250.5", "GFLOP"]


def test_search_example_counts_samples_and_prints_code(tmp_path):
    output = run_example("03_search.py", "7", "30", cwd=tmp_path)
    assert "exact   19 operators, 16 functions" in output
    assert "compat  11 operators, 11 functions" in output
    assert "import torch" in output
    assert "cofire" not in output.partition("import torch")[2]


def test_train_example_trains_reports_and_goes_on(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(6000)), "utf-8")
    words = [
        f"data.paths=['{corpus}']",
        f"data.cache='{tmp_path / 'cache'}'",
        "data.sequence_length=32",
        "batch_size=2",
        "micro_batch_size=2",
        "validation_sequences=4",
        "validate_every_steps=4",
        "checkpoint.every_steps=4",
    ]
    out = str(tmp_path / "run")
    first = run_example("04_train.py", out, "8", *words, cwd=tmp_path)
    assert "trained for 8 steps" in first
    assert (tmp_path / "run" / "report.html").is_file()
    again = run_example("04_train.py", out, "8", *words, cwd=tmp_path)
    assert "trained for 8 steps" in again
