"""The ``cofire`` command: joins the stages and turns errors into exit codes.

Exit codes: 0 good; 2 the user's input (one line on standard error, or typer's usage text); 130 interrupted from
the keyboard; 1 a fault of ours, with the traceback in a file that the message names.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from cofire.errors import CofireError

# In the order that a user walks through them; each module has ``register(app)``.
_STAGES = ("spec", "plan", "network", "search", "train", "report", "generate", "serve", "bench", "claims")

# What an extra brings, by the module that a command misses first.
_EXTRAS = {
    **dict.fromkeys(("torch", "tokenizers", "safetensors", "fsspec", "pyarrow", "matplotlib", "tensorboard"), "train"),
    **dict.fromkeys(("fastapi", "uvicorn", "jinja2"), "serve"),
    "transformers": "interop",
}


def _show_version(value: bool) -> None:
    if value:
        from cofire import __version__

        sys.stdout.write(f"cofire {__version__}\n")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Design a mixture-of-experts language model and its cluster together, train it and run it."""


def build_app() -> typer.Typer:
    """Return the whole command line as one typer application."""
    app = typer.Typer(
        name="cofire",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for stage in _STAGES:
        importlib.import_module(f"cofire.cli.{stage}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``cofire``; none: those of this process.

    Returns:
        The exit code (see the module's text).
    """
    try:
        build_app()(args=None if arguments is None else list(arguments), prog_name="cofire")
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else int(request.code is not None)
    except CofireError as error:
        sys.stderr.write(f"cofire: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("cofire: interrupted\n")
        return 130
    except Exception as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in _EXTRAS:
            sys.stderr.write(f"cofire: this command needs {missing}: pip install 'cofire[{_EXTRAS[missing]}]'\n")
            return 2
        _report_fault(error)
        return 1
    return 0


def _report_fault(error: Exception) -> None:
    first = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="cofire-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        sys.stderr.write(f"{text}cofire: this is a fault in cofire: {summary}\n")
        return
    sys.stderr.write(f"cofire: this is a fault in cofire: {summary}; traceback in {path}\n")
