"""``cofire spec``: list, show, check, compare and describe specs."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add ``cofire spec ...``."""
    spec = typer.Typer(no_args_is_help=True, help="List, show, check and compare specs of models, clusters and runs.")
    spec.command("list")(list_presets)
    app.add_typer(spec, name="spec")


def list_presets() -> None:
    """List the presets."""
