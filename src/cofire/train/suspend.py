"""Being asked to stop: a run finishes its step, saves, and ends with exit code 0 and a resumable state.

A scheduler that time-shares a cluster asks by a signal, by a file, or through the environment; the trainer
knows only the :class:`SuspendSignal` protocol and looks once per step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

SUSPEND_FILE_VARIABLE = "COFIRE_SUSPEND_FILE"


class SuspendSignal(Protocol):
    """Something that may ask a run to stop."""

    def requested(self) -> str | None:
        """Return who asks, for the log; none while nobody does."""
        ...


class SignalSuspend:
    """SIGTERM and SIGINT, while the ``with`` block runs. A second SIGINT interrupts at once."""

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._signals = signals
        self._received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalSuspend:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def requested(self) -> str | None:
        """See :class:`SuspendSignal`."""
        return self._received


class FileSuspend:
    """Asks once a file exists; by default the one that ``COFIRE_SUSPEND_FILE`` names, if it does."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        named = path or os.environ.get(SUSPEND_FILE_VARIABLE)
        self._path = Path(named) if named else None

    def requested(self) -> str | None:
        """See :class:`SuspendSignal`."""
        return f"file {self._path}" if self._path is not None and self._path.exists() else None


def first_request(signals: Sequence[SuspendSignal]) -> str | None:
    """Return the first request among several signals; none if there is none."""
    return next((who for who in (s.requested() for s in signals) if who), None)
