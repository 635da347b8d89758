"""Spans of time as a trace in the Chrome trace format, which Perfetto and chrome://tracing open.

A span lies on a track; tracks are the format's threads, grouped in processes. Times are seconds here and microseconds
in the file. Left out: counters, flows between spans and anything that is not a complete event.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cofire.spec.io import write_text


@dataclass(frozen=True)
class TraceSpan:
    """What one track did, from ``start_s`` to ``end_s``.

    Attributes:
        track: Index of the track.
        name: Printed on the span.
        start_s: Seconds.
        end_s: Seconds.
        category: The viewer filters by it.
        details: Shown for a chosen span; plain values.
        process: The group that the track belongs to.
    """

    track: int
    name: str
    start_s: float
    end_s: float
    category: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    process: int = 0


def span_events(spans: Iterable[TraceSpan], track_names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return spans as events, the names of their tracks first.

    Args:
        spans: In any order.
        track_names: Of the tracks of process 0.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": track, "args": {"name": name}}
        for track, name in track_names.items()
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.category,
            "pid": span.process,
            "tid": span.track,
            "ts": span.start_s * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": dict(span.details),
        }
        for span in spans
    ]
    return events


def write_trace(path: str | os.PathLike[str], events: list[dict[str, Any]]) -> None:
    """Write events to a file, whole or not at all.

    Raises:
        SpecError: The file cannot be written.
    """
    write_text(path, json.dumps({"traceEvents": events}))
