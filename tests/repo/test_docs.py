"""The documentation points at things that exist: links, files, tests, commands and options."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import source_tree

DOCUMENTS = source_tree.files(".md")
DOCS = source_tree.ROOT / "docs"
STATUSES = {"done", "part", "planned"}
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", path.read_text("utf-8")))


def anchors(path: Path) -> set[str]:
    """Return the anchors that a Markdown file's headings get on a forge."""
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=source_tree.name)
def test_relative_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{source_tree.name(path)}: {link} leads nowhere"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{source_tree.name(path)}: {link} names no heading"


def paper_rows() -> list[list[str]]:
    rows = source_tree.table_rows((DOCS / "papers.md").read_text("utf-8"))
    return [row for row in rows if len(row) == 4]


def code_spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def defined_names(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)}


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row[0][:40])
def test_row_of_the_papers_names_files_and_tests_that_exist(row):
    section, places, tests, status = row
    assert status in STATUSES, f"{section}: {status}"
    assert status == "planned" or (code_spans(places) and code_spans(tests)), f"{section}: no file or no test"
    for span in code_spans(places) + code_spans(tests):
        file, _, name = span.partition("::")
        path = next((p for p in (source_tree.SOURCE / file, source_tree.ROOT / file) if p.is_file()), None)
        assert path is not None, f"{section}: {file} does not exist"
        if name:
            assert name in defined_names(path), f"{section}: {file} defines no {name}"
    for span in code_spans(tests):
        assert span.startswith(("tests/", "claims/", "benchmarks/")), f"{section}: {span} is no test"


def test_papers_are_listed_at_all():
    assert len(paper_rows()) > 30


def test_terms_of_the_glossary_are_unique_and_sorted():
    terms = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    lowered = [term.lower() for term in terms]
    assert len(lowered) > 30
    assert lowered == sorted(set(lowered))


def test_decisions_are_numbered_one_by_one():
    names = sorted(path.name for path in (DOCS / "adr").glob("*.md"))
    numbers = [int(name[:4]) for name in names]
    assert numbers == list(range(1, len(names) + 1))
    for path in (DOCS / "adr").glob("*.md"):
        first = path.read_text("utf-8").splitlines()[0]
        assert first.startswith(f"# {int(path.name[:4])}. "), path.name


def cofire_calls() -> list[tuple[str, str]]:
    """Return ``(where, command line)`` for every call of ``cofire`` in a fenced block of any document."""
    calls = []
    for path in DOCUMENTS:
        for fence in source_tree.fences(path):
            text = fence.text.replace("\\\n", " ")
            lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
            calls += [(str(fence), line) for line in lines if line.startswith("cofire ")]
    return calls


def test_commands_in_the_documents_exist_with_these_options():
    commands = source_tree.commands()
    assert cofire_calls()
    for where, line in cofire_calls():
        # Up to a pipe, a redirection or a shell's other punctuation.
        words = shlex.split(re.split(r"\s[|&>;#]", line)[0])
        name = "cofire"
        for word in words[1:]:
            if f"{name} {word}" not in commands:
                break
            name = f"{name} {word}"
        if name == "cofire claims run":
            continue
        default = getattr(commands[name], "default_command", None)
        if default is not None and not {"-h", "--help"} & set(words):
            name = f"{name} {default}"
        known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert name != "cofire" or used, f"{where}: {line}: no such command"
        assert used <= known, f"{where}: {line}: {sorted(used - known)}"
