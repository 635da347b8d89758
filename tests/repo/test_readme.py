"""Every snippet of the README runs, in order, in a folder that looks like a fresh clone.

A block of ``bash`` or ``python`` must end without an error. A block of ``console`` holds commands after ``$`` and
what they print; a line ``...`` there stands for any number of lines. A block that cannot run in a test has a
comment right before it that says why: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import source_tree

README = source_tree.ROOT / "README.md"
RUNNABLE = ("bash", "console", "python")
BLOCKS = [fence for fence in source_tree.fences(README) if fence.language in RUNNABLE]
RUN = [fence for fence in BLOCKS if not fence.comment.startswith("not run:")]
_OUTPUT_GAP = "..."


def matches(expected: str, actual: str) -> bool:
    """Whether ``actual`` has the expected lines; blanks at the end of a line do not count."""
    parts = [re.escape(line.rstrip()) for line in expected.rstrip().splitlines()]
    pattern = "\n".join(r"(?:.*\n)*?.*" if part == re.escape(_OUTPUT_GAP) else part for part in parts)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in actual.rstrip().splitlines())) is not None


def console_steps(text: str) -> list[tuple[str, str]]:
    """Return ``(command, expected output)`` of a console block; ``> `` continues a command."""
    steps: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], ""))
        elif line.startswith("> ") and steps and not steps[-1][1]:
            steps[-1] = (f"{steps[-1][0]}\n{line[2:]}", "")
        else:
            assert steps, f"output before a command: {line!r}"
            steps[-1] = (steps[-1][0], f"{steps[-1][1]}{line}\n")
    return steps


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "120", "NO_COLOR": "1"}
    program = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def run_block(fence: source_tree.Fence, folder: Path) -> None:
    if fence.language == "console":
        steps = console_steps(fence.text)
    elif fence.language == "python":
        (folder / "snippet.py").write_text(fence.text, "utf-8")
        steps = [("python snippet.py", "")]
    else:
        steps = [(fence.text, "")]
    for command, expected in steps:
        done = shell(command, folder)
        assert done.returncode == 0, f"{fence}: {command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        if expected:
            assert matches(expected, done.stdout), f"{fence}: {command} printed\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_snippets_run_in_order(tmp_path):
    for name in ("README.md", "src", "docs", "examples", "claims", "benchmarks"):
        (tmp_path / name).symlink_to(source_tree.ROOT / name)
    assert RUN
    for fence in RUN:
        run_block(fence, tmp_path)


def test_block_that_is_not_run_says_why():
    for fence in BLOCKS:
        if fence not in RUN:
            reason = fence.comment.removeprefix("not run:").strip()
            assert len(reason.split()) >= 3, f"{fence} gives no reason"


def test_targets_of_make_exist():
    makefile = (source_tree.ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    called = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", README.read_text("utf-8"), re.MULTILINE))
    names = {name for pair in called for name in pair if name}
    assert {"demo", "test"} <= names <= targets


def test_tests_are_started_as_ci_starts_them():
    assert "`make test`" in README.read_text("utf-8")
    script = (source_tree.ROOT / ".ci" / "run").read_text("utf-8")
    assert [line for line in script.splitlines() if "make" in line] == ["make test"]


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n...\nd\n", "a\nb\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_expected_output_is_compared_line_by_line(expected, actual, same):
    assert matches(expected, actual) is same


def test_console_block_is_read_as_commands_and_outputs():
    assert console_steps("$ one \\\n> two\nout\n$ three\n") == [("one \\\ntwo", "out\n"), ("three", "")]
