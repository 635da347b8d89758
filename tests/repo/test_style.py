"""The project's style, where a program can check it. What ruff checks is left to ruff.

The limits are a ratchet: ``tests/golden/style_exceptions.txt`` lists what is over a limit, each with its exact size.
Whoever makes one smaller lowers its number or takes the line away; the list is there to become empty.
"""

from __future__ import annotations

import ast

import source_tree

FILE_LINES_MAX = 650
FUNCTION_LINES_MAX = 60
ARGUMENTS_MAX = 10
# A helper lives where its noun lives.
NAMES_REFUSED = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
EXCEPTIONS = source_tree.ROOT / "tests" / "golden" / "style_exceptions.txt"

MODULES = source_tree.files(".py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(tree: ast.Module, lines: int, where: str) -> dict[str, int]:
    """Return what is over a limit in one module: a place and what is too large there, and how large it is."""
    over: dict[str, int] = {}
    if lines > FILE_LINES_MAX:
        over[f"{where} lines"] = lines
    for name, function in functions(tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES_MAX:
            over[f"{where}::{name} lines"] = length
        if arguments(function) > ARGUMENTS_MAX:
            over[f"{where}::{name} arguments"] = arguments(function)
    return over


def functions(node: ast.AST, prefix: str = "") -> list[tuple[str, Function]]:
    found: list[tuple[str, Function]] = []
    for child in ast.iter_child_nodes(node):
        inside = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((prefix + child.name, child))
        found += functions(child, inside)
    return found


def arguments(function: Function) -> int:
    """Return how many arguments a caller sees; ``self`` and ``cls`` do not count."""
    spec = function.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(spec.vararg) + bool(spec.kwarg)


def listed() -> dict[str, int]:
    rows = [line.rsplit(maxsplit=1) for line in EXCEPTIONS.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {key: int(number) for key, number in rows}


def test_sizes_are_within_the_limits_or_exactly_as_listed():
    over: dict[str, int] = {}
    for path in MODULES:
        text = path.read_text("utf-8")
        over |= measure(ast.parse(text), text.count("\n"), source_tree.name(path))
    assert over == listed()


def test_measure_sees_what_is_too_large():
    body = "\n".join("    pass" for _ in range(FUNCTION_LINES_MAX))
    names = ", ".join(f"a{i}" for i in range(ARGUMENTS_MAX))
    tree = ast.parse(f"class A:\n  def fits(self, {names}): pass\n\ndef long({names}, *, more):\n{body}\n")
    over = measure(tree, FILE_LINES_MAX + 1, "x.py")
    assert over == {"x.py lines": 651, "x.py::long lines": 61, "x.py::long arguments": 11}


def test_no_module_is_named_after_nothing():
    parts = {part for path in MODULES for part in (*path.relative_to(source_tree.ROOT).parts[:-1], path.stem)}
    assert not parts & NAMES_REFUSED


def test_every_module_says_what_it_is():
    for path in MODULES:
        text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        assert text, f"{source_tree.name(path)} has no docstring"
        first = text.splitlines()[0]
        assert first[-1] in ".:", f"{source_tree.name(path)}: the docstring's first line ends without a full stop"


def test_source_is_ascii():
    for path in source_tree.files(".py", ".toml", ".js", ".css", ".html", ".txt", ".cpp", ".h", ".sh"):
        assert path.read_bytes().isascii(), source_tree.name(path)


def test_every_text_file_ends_with_one_newline():
    for path in source_tree.files(".py", ".toml", ".md", ".js", ".css", ".txt"):
        data = path.read_bytes()
        assert not data or (data.endswith(b"\n") and not data.endswith(b"\n\n")), source_tree.name(path)


def test_names_of_tests_are_sentences():
    for path in MODULES:
        if not path.name.startswith("test_"):
            continue
        for name, _ in functions(ast.parse(path.read_text("utf-8"))):
            last = name.rpartition(".")[2]
            if last.startswith("test_"):
                assert last.count("_") >= 2, f"{source_tree.name(path)}::{name} does not say what it tests"
