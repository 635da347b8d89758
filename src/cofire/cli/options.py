"""Options and shell completions that the commands share."""

from __future__ import annotations

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override one field of the spec, for example attention.num_heads=8. Repeat it for more.",
    ),
]


def complete_model(incomplete: str) -> list[str]:
    """Presets of models whose name starts with what was typed."""
    return _complete("model", incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Presets that can be trained: runs and models."""
    return [*_complete("run", incomplete), *_complete("model", incomplete)]


def complete_cluster(incomplete: str) -> list[str]:
    """Presets of clusters, and this machine, whose name starts with what was typed."""
    from cofire.spec.io import THIS_MACHINE

    return [*_complete("cluster", incomplete), *(name for name in (THIS_MACHINE,) if name.startswith(incomplete))]


def complete_preset(incomplete: str) -> list[str]:
    """All presets whose name starts with what was typed."""
    return _complete(None, incomplete)


def complete_search(incomplete: str) -> list[str]:
    """Presets of operator searches whose name starts with what was typed."""
    return _complete("search", incomplete)


def complete_operator(incomplete: str) -> list[str]:
    """Presets of operators whose name starts with what was typed."""
    return _complete("operator", incomplete)


def complete_kernels(incomplete: str) -> list[str]:
    """Presets of kernel searches whose name starts with what was typed."""
    return _complete("kernels", incomplete)


def complete_kernel(incomplete: str) -> list[str]:
    """Presets of kernels whose name starts with what was typed."""
    return _complete("kernel", incomplete)


def _complete(kind: str | None, incomplete: str) -> list[str]:
    from cofire.spec import preset_names

    return [name for name in preset_names(kind) if name.startswith(incomplete)]


def complete_schedule(incomplete: str) -> list[str]:
    """Pipeline schedules whose name starts with what was typed."""
    from cofire.plan import SCHEDULES

    return [name for name in SCHEDULES if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """Kinds of specs whose name starts with what was typed."""
    from cofire.spec.io import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]
