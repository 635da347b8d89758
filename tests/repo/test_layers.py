"""The layers are checked by import-linter in ``make lint``; these tests check that the contracts bite.

And what import-linter cannot see, because commands import lazily: the command line starts without torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import source_tree

# Above every layer: doubles for tests, which may use all of them.
OUTSIDE = {"cofire.testing", "cofire.__main__"}


def contracts() -> list[dict]:
    table = tomllib.loads((source_tree.ROOT / "pyproject.toml").read_text("utf-8"))
    return table["tool"]["importlinter"]["contracts"]


def layers() -> list[set[str]]:
    (contract,) = [contract for contract in contracts() if contract["type"] == "layers"]
    return [{name.strip(" ()") for name in row.split("|")} for row in contract["layers"]]


def test_make_lint_checks_the_contracts():
    lint = (source_tree.ROOT / "Makefile").read_text("utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    assert "lint-imports" in lint


def test_every_part_has_a_layer():
    parts = {
        f"cofire.{path.stem}"
        for path in source_tree.SOURCE.iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert parts - OUTSIDE <= set().union(*layers())


def lint_with(tmp_path: Path, module: str, line: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter on a copy of the package in which one module has one more line."""
    shutil.copytree(source_tree.SOURCE, tmp_path / "src" / "cofire", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source_tree.ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "cofire" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    # The linter must read the copy in the working folder and not the installed package, which an editable install finds
    # before any folder.
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')];"
        "sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "--config", str(tmp_path / "pyproject.toml"), "--no-cache"],
        cwd=tmp_path / "src",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("spec/units.py", "import cofire.model.norm", "cofire.spec.units -> cofire.model.norm"),
        ("train/schedule.py", "import cofire.serve.sampling", "cofire.train.schedule -> cofire.serve.sampling"),
        ("plan/flops.py", "import torch", "cofire.plan.flops -> torch"),
        ("plan/flops.py", "import cofire.model.norm", "cofire.plan.flops -> cofire.model.norm"),
    ],
)
def test_planted_violation_is_found(tmp_path, module, line, reason):
    done = lint_with(tmp_path, module, line)
    assert done.returncode == 1, done.stderr
    assert reason in done.stdout.replace("\n", " ")


def test_tree_without_a_planted_violation_passes(tmp_path):
    done = lint_with(tmp_path, "spec/units.py", "# nothing")
    assert done.returncode == 0, done.stdout


def test_command_line_starts_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
        "from cofire.cli.main import main; sys.exit(main(['train', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
