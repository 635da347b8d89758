"""Options that a command takes as a group, so that its own arguments stay few.

A row per option: the keyword under which the command gets it, its type and its default. Options of a group reach the
command in ``**group``; those that were not given are left out, so that what lies behind them keeps its own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

CommandT = TypeVar("CommandT", bound=Callable[..., None])


def option_group(options: Mapping[str, Any]) -> Callable[[CommandT], CommandT]:
    """Return a decorator that gives a command the options of a group in its ``**group``.

    Args:
        options: The annotation of each keyword, for example ``Annotated[int | None, typer.Option("--tp")]``. All
            default to none.
    """

    def decorate(command: CommandT) -> CommandT:
        own = inspect.signature(command, eval_str=True)
        kept = [row for row in own.parameters.values() if row.kind is not inspect.Parameter.VAR_KEYWORD]
        # Usage shows options in this order: those of the group, then the command's own.
        first = [row for row in kept if row.default is inspect.Parameter.empty]
        group = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        rest = [row for row in kept if row.default is not inspect.Parameter.empty]
        command.__signature__ = own.replace(parameters=[*first, *group, *rest])  # type: ignore[attr-defined]
        return command

    return decorate


def given(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group that were given."""
    return {name: value for name, value in group.items() if value is not None}
