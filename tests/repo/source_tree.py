"""The repository as the tests in this folder see it: its files, its Markdown and its command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cofire"
FOLDERS = ("src", "tests", "claims", "benchmarks", "examples", "docs", "csrc", ".ci")


def files(*suffixes: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """Return the repository's files with these suffixes, sorted; generated ones are left out."""
    found = [path for path in ROOT.iterdir() if path.suffix in suffixes and path.is_file()]
    for folder in folders:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name(path: Path) -> str:
    """Return a file's name as the repository writes it."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Fence:
    """One fenced block of a Markdown file; ``comment`` is the HTML comment right before it, if there is one."""

    path: Path
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{name(self.path)}:{self.line}"


_FENCE = re.compile(
    r"(?:^<!--(?P<comment>(?:(?!-->).)*)-->\n\n?)?^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def fences(path: Path) -> list[Fence]:
    """Return the fenced blocks of a Markdown file."""
    text = path.read_text("utf-8")
    return [
        Fence(
            path,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["text"],
            (match["comment"] or "").strip(),
        )
        for match in _FENCE.finditer(text)
    ]


def table_rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of every row of Markdown's tables, header rows and rulers left out."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        following = lines[index + 1] if index + 1 < len(lines) else ""
        if line.startswith("|") and not _is_ruler(line) and not _is_ruler(following):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def _is_ruler(line: str) -> bool:
    return line.startswith("|") and set(line) <= set("|-: ")


def commands() -> dict[str, Any]:
    """Return every command of ``cofire`` under the words that call it, groups included.

    A command has ``help`` and ``params``, a group ``commands`` too: click's objects, or those of a typer that has
    its own click inside, which is why no type is named here.
    """
    from cofire.cli.main import build_app

    found: dict[str, Any] = {}

    def walk(words: str, command: Any) -> None:
        found[words] = command
        for child in sorted(getattr(command, "commands", ())):
            walk(f"{words} {child}", command.commands[child])

    walk("cofire", typer.main.get_command(build_app()))
    return found
