"""How far a search by sampling is, as its commands say it: a line that moves, a document, and a line at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cofire.cli.output import console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from cofire.search.discovery import Discovery


@contextlib.contextmanager
def progress(noun: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield what draws a line on standard error, where somebody looks at it.

    Args:
        noun: What is counted.
        total: How many there are.
    """
    if not sys.stderr.isatty():
        yield lambda done, text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(noun), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    words = TextColumn("{task.fields[said]}")
    with Progress(*columns, words, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(noun, total=total, said="")
        yield lambda done, text: bar.update(task, completed=done, said=text)


def so_far_text(found: Discovery[Any, Any]) -> str:
    """Return the best reward so far, and how many evaluations failed where some did."""
    best = f"best {found.best[0].reward:.4g}" if found.best else "none yet"
    failed = sum(found.failed.values())
    return f"{best}, {failed} refused" if failed else best


def search_document(found: Discovery[Any, Any]) -> dict[str, Any]:
    """Return what a command says of a search, ready for JSON; the results are left to it."""
    return {
        "search": found.spec.name,
        "sampling": found.spec.sampling.model_dump(mode="json"),
        "label": found.label,
        "evaluated": found.evaluated,
        "resumed": found.resumed,
        "failed": found.failed,
        "spent": found.spent,
    }


def print_evaluated(shown: Console, found: Discovery[Any, Any], took_s: float, noun: str) -> None:
    """Print how much was evaluated and refused, and how fast.

    Args:
        shown: Where it is printed.
        found: How far the search is.
        took_s: Seconds of this run.
        noun: What was evaluated, in the plural.
    """
    sampling = found.spec.sampling
    rate = (found.evaluated - found.resumed) / max(took_s, 1e-9)
    before = f", {found.resumed} of them before" if found.resumed else ""
    reasons = ", ".join(f"{number} by {name}" for name, number in sorted(found.failed.items()))
    refused = f"{sum(found.failed.values())} of them refused" + (f" ({reasons})" if reasons else "")
    shown.print(
        f"{found.spec.name}: {found.evaluated} {noun} evaluated{before}, {refused}; "
        f"{rate:.3g} per second with {sampling.workers} process(es).",
        soft_wrap=True,
        markup=False,
    )
    if found.spent:
        shown.print(f"No other {noun.removesuffix('s')} was found within the budget of {sampling.budget}.")
