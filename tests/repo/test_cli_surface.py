"""The command line is frozen: a command or an option changes only together with ``tests/golden/cli_surface.txt``.

After a change that is meant, and documented, write the file anew:

    python tests/repo/test_cli_surface.py > tests/golden/cli_surface.txt
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import source_tree

from cofire.cli.main import main

GOLDEN = source_tree.ROOT / "tests" / "golden" / "cli_surface.txt"
# A claim's program takes its own arguments and says itself where it writes its JSON.
WITHOUT_JSON = {"cofire claims run"}

COMMANDS = source_tree.commands()
LEAVES = {words: command for words, command in COMMANDS.items() if not hasattr(command, "commands")}


def surface() -> str:
    """Return one line a command and one a parameter, in the order of ``--help``."""
    lines: list[str] = []
    for words, command in COMMANDS.items():
        lines.append(words)
        lines += [f"    {_parameter(parameter)}" for parameter in command.params]
    return "\n".join(lines) + "\n"


def _parameter(parameter: Any) -> str:
    many = " ..." if parameter.multiple or parameter.nargs != 1 else ""
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name.upper()).removesuffix("...")
        return (name if parameter.required else f"[{name}]") + many
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names + ("" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}") + many


def test_surface_is_the_committed_one():
    assert surface() == GOLDEN.read_text("utf-8"), "see this module's docstring"


@pytest.mark.parametrize("words", sorted(LEAVES))
def test_command_prints_json_on_request(words):
    if words in WITHOUT_JSON:
        pytest.skip("its program has its own options")
    assert any("--json" in parameter.opts for parameter in LEAVES[words].params)


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_command_and_its_parameters_have_help(words):
    command = COMMANDS[words]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{words}: {parameter.name} has no help"


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_help_is_printed_and_exits_0(words, capsys):
    assert main([*words.split()[1:], "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_unknown_option_exits_2(capsys):
    assert main(["plan", "small", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


if __name__ == "__main__":
    sys.stdout.write(surface())
