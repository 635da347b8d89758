"""``cofire claims``: list and run the experiments that check what the papers say.

They are programs in the repository's ``claims/`` folder, one per claim, and are not part of an installed wheel.
"""

from __future__ import annotations

import ast
import difflib
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import print_json
from cofire.errors import SpecError


def register(app: typer.Typer) -> None:
    """Add ``cofire claims ...``."""
    claims = typer.Typer(no_args_is_help=True, help="List and run the experiments that check what the papers say.")
    claims.command("list")(list_claims)
    claims.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run_claim)
    app.add_typer(claims, name="claims")


def list_claims(as_json: JsonOption = False) -> None:
    """List the experiments."""
    rows = [{"name": name, "claim": _claim(path), "path": str(path)} for name, path in _programs().items()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        sys.stdout.write(f"{row['name']}  {row['claim']}\n")


def run_claim(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A name that cofire claims list shows.")],
) -> None:
    """Run one experiment; what follows its name is passed on, for example --steps 100."""
    programs = _programs()
    if name not in programs:
        near = difflib.get_close_matches(name, programs, n=1, cutoff=0.3)
        raise SpecError(
            f"claim = {name!r} is not one of {', '.join(programs)}{f'; nearest: {near[0]}' if near else ''}"
        )
    finished = subprocess.run([sys.executable, str(programs[name]), *context.args], check=False)
    raise typer.Exit(finished.returncode)


def _programs() -> dict[str, Path]:
    folder = Path(__file__).resolve().parents[3] / "claims"
    programs = {path.stem: path for path in sorted(folder.glob("*.py"))}
    if not programs:
        raise SpecError(f"{folder} has no experiments; they come with the repository: clone it and pip install -e .")
    return programs


def _claim(path: Path) -> str:
    """Return the first line of a program's docstring, without running it."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]
