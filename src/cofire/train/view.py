"""What a person sees while a run goes on: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cofire.spec.units import format_duration

# A space and the eight lower blocks of Unicode, U+2581 to U+2588.
_BLOCKS = " " + "".join(chr(0x2581 + height) for height in range(8))
_LINE_EVERY = 10


@dataclass
class Progress:
    """The numbers of the last step."""

    step: int = 0
    steps: int = 1
    main_loss: float = float("nan")
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    seconds_left: float = 0.0
    max_violation: list[float] = field(default_factory=list)
    expert_load: list[list[float]] = field(default_factory=list)


class View(Protocol):
    """Shows a run."""

    def note(self, text: str) -> None:
        """Show one line that stays."""
        ...

    def show(self, progress: Progress) -> None:
        """Show the state after a step."""
        ...

    def close(self) -> None:
        """Leave the screen as a shell expects it."""
        ...


class SilentView:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """See :class:`View`."""

    def show(self, progress: Progress) -> None:
        """See :class:`View`."""

    def close(self) -> None:
        """See :class:`View`."""


class LineView:
    """Prints a line every ten steps, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """See :class:`View`."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """See :class:`View`."""
        if progress.step % _LINE_EVERY == 0 or progress.step in (1, progress.steps):
            self.note(one_line(progress))

    def close(self) -> None:
        """See :class:`View`."""


class LiveView:
    """A panel that is redrawn in place: progress, loss, speed, MaxVio and expert load per layer."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def note(self, text: str) -> None:
        """See :class:`View`."""
        self._live.console.print(text, markup=False)

    def show(self, progress: Progress) -> None:
        """See :class:`View`."""
        self._live.update(panel(progress))

    def close(self) -> None:
        """See :class:`View`."""
        self._live.stop()


def make_view(quiet: bool = False) -> View:
    """Return the view that fits where standard error goes."""
    if quiet:
        return SilentView()
    console = Console(stderr=True, highlight=False)
    return LiveView(console) if sys.stderr.isatty() else LineView(console)


def one_line(progress: Progress) -> str:
    """Return the state of a run as one line of text."""
    parts = [f"step {progress.step}/{progress.steps}", f"loss {progress.main_loss:.4f}"]
    if progress.validation_loss is not None:
        parts.append(f"validation {progress.validation_loss:.4f} ({progress.bits_per_byte:.3f} bits/byte)")
    parts += [f"{progress.tokens_per_s:,.0f} tokens/s", f"MFU {progress.mfu:.1%}"]
    if progress.max_violation:
        parts.append(f"MaxVio {statistics.fmean(progress.max_violation):.2f}")
    if progress.step < progress.steps:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def panel(progress: Progress) -> RenderableType:
    """Return the panel of :class:`LiveView`."""
    bar = ProgressBar(total=progress.steps, completed=progress.step, width=60)
    loads = Table.grid(padding=(0, 2))
    for layer, (violation, load) in enumerate(zip(progress.max_violation, progress.expert_load, strict=False)):
        loads.add_row(f"experts of layer {layer}", Text(load_strip(load)), f"MaxVio {violation:.2f}")
    return Panel(Group(Text(one_line(progress)), bar, loads), title="cofire train", title_align="left")


def load_strip(load: Sequence[float]) -> str:
    """Draw one character per expert; half height is an even share."""
    even = 1.0 / max(1, len(load))
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, round(share / even * top / 2))] for share in load)
