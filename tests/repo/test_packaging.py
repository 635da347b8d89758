"""``pip install .`` without extras: specs and plans work with the base dependencies alone.

No network here: an import hook refuses every installed distribution that a bare install would not bring.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import source_tree

PROJECT = tomllib.loads((source_tree.ROOT / "pyproject.toml").read_text("utf-8"))["project"]

_HOOK = """
import sys

class Refuse:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} does not come with a bare install", name=name)

sys.meta_path.insert(0, Refuse(frozenset(sys.argv[1].split(","))))
from cofire.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bare_install() -> set[str]:
    """Return the distributions that the base dependencies bring, by following their requirements."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [Requirement(text) for text in PROJECT["dependencies"]]
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in found:
            continue
        found.add(name)
        waiting += [Requirement(text) for text in metadata.requires(requirement.name) or []]
    return found


def refused_modules() -> set[str]:
    allowed = bare_install() | {"cofire"}
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonical(owner) for owner in owners} & allowed
    }


def run_bare(*words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", _HOOK, ",".join(sorted(refused_modules())), *words]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_the_hook_refuses_what_only_extras_bring():
    refused = refused_modules()
    assert {"torch", "transformers", "tokenizers", "fastapi", "fsspec", "pytest"} <= refused
    assert not refused & {"pydantic", "typer", "rich", "tomli_w", "numpy", "cofire"}


def test_spec_show_works_after_a_bare_install():
    done = run_bare("spec", "show", "deepseek-v3", "--json")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    # DeepSeek-V3's total and its activated parameters with the output head only.
    assert "671026419200" in text
    assert "36625618432" in text
    json.loads(text)


def test_plan_works_after_a_bare_install():
    done = run_bare("plan", "deepseek-v3", "--cluster", "h800-2048", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kv_cache"]["bytes_per_token"] == 70272


@pytest.mark.parametrize("words", [("spec", "list"), ("spec", "diff", "deepseek-v2", "deepseek-v3"), ("plan", "small")])
def test_printed_forms_work_after_a_bare_install(words):
    done = run_bare(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_train_after_a_bare_install_names_the_extra():
    done = run_bare("train", "tiny")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cofire[train]" in done.stderr


def test_every_extra_is_part_of_dev():
    extras = PROJECT["optional-dependencies"]
    assert "cofire[all]" in extras["dev"]
    assert extras["all"] == [f"cofire[{','.join(name for name in extras if name not in ('all', 'dev'))}]"]


def test_constraints_pin_every_direct_dependency():
    pinned = {
        canonical(line.partition("==")[0]) for line in (source_tree.ROOT / "constraints.txt").open() if "==" in line
    }
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    names = {canonical(re.split(r"[\[<>=!~; ]", text, maxsplit=1)[0]) for text in texts} - {"cofire"}
    assert names <= pinned
