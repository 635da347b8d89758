"""The exception tree that ``cofire.errors`` draws is the tree that Python sees."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import cofire
from cofire import errors

_ROW = re.compile(r"^(?P<indent> *)(?:\+-- )?(?P<name>[A-Z]\w*Error)(?: {2,}(?P<text>\S.*))?$")


def drawn() -> dict[str, tuple[str | None, str]]:
    """Return class name -> (parent's name, description) as the docstring draws it."""
    rows: dict[str, tuple[str | None, str]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _ROW.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) + (4 if "+--" in line else 0)
        path = [step for step in path if step[0] < depth]
        rows[match["name"]] = (path[-1][1] if path else None, match["text"] or "")
        path.append((depth, match["name"]))
    return rows


def import_everything() -> None:
    for module in pkgutil.walk_packages(cofire.__path__, "cofire."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_drawn_tree_is_the_real_tree():
    import_everything()
    real = {
        cls.__name__: None if cls is errors.CofireError else cls.__bases__[0].__name__
        for cls in subclasses(errors.CofireError)
        if cls.__module__.startswith("cofire")
    }
    assert real == {name: parent for name, (parent, _) in drawn().items()}


def test_every_error_lives_in_one_module():
    import_everything()
    homes = {cls.__module__ for cls in subclasses(errors.CofireError) if cls.__module__.startswith("cofire")}
    assert homes == {"cofire.errors"}


def test_every_drawn_error_says_when_it_is_raised():
    for name, (parent, text) in drawn().items():
        assert inspect.getdoc(getattr(errors, name))
        assert text or parent is None, f"{name} has no words in the tree"


def test_errors_are_public():
    assert set(drawn()) <= set(cofire.__all__)


def test_a_users_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "cofire", "spec", "show", "deepsek-v3"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "deepsek-v3" in done.stderr
    assert "deepseek-v3" in done.stderr
