"""What every command prints: JSON documents and rich text on standard output, notes on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """Return a rich console on standard output (or error) as it is now.

    Where the output is no terminal it is 120 columns wide, so that a table in a file or a pipe stays whole.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Console(file=stream, width=width, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document; not-a-number and infinity are refused, as JSON has neither."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def print_note(text: str) -> None:
    """Print one line for the user on standard error, where it does not disturb a result."""
    sys.stderr.write(f"cofire: {text}\n")
