"""What a run folder says about its run: the files that training leaves behind, read and checked.

A report, a table or a test takes a :class:`RunRecord` and never opens those files itself. Read are
``run.toml`` (the spec), ``metrics.jsonl`` (one JSON object a line), ``plan.json`` and ``samples.jsonl``;
the last two may be missing.

A process that is killed leaves at most its last line of ``metrics.jsonl`` half-written, so only that line may
be broken. Left out: TensorBoard's files and the checkpoints, which hold nothing that a report needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cofire.errors import SpecError, TrainError
from cofire.spec import RunSpec, load_as

Event = Mapping[str, Any]

_EVENTS = ("start", "step", "validation", "precision", "checkpoint", "resume", "end")
_NUMBERS = frozenset(
    [
        "step",
        "time_s",
        "loss",
        "main_loss",
        "balance_loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "mfu",
        "bits_per_byte",
        "seconds",
        "parameters_total",
        "parameters_activated",
        "matrix_peak_flops_per_s",
        "unigram_entropy_nats",
        "bytes_per_token",
        "train_tokens",
        "validation_tokens",
        "ema_loss",
        "peak_memory_bytes",
    ]
)
_LISTS = frozenset({"mtp_losses", "max_violation", "max_violation_global"})
_TABLES = frozenset({"expert_load"})
_HEALTH_KEYS = ("layer", "tensor", "underflow", "snr_db", "amax")


@dataclass(frozen=True)
class RunRecord:
    """The files of one run folder, parsed.

    ``steps``, ``validations`` and ``precisions`` have each step once, in order; what a resumed run did again counts
    once. ``notes`` are sentences about what was missing or tolerated.
    """

    folder: Path
    run: RunSpec
    run_text: str
    start: Event
    steps: tuple[Event, ...]
    validations: tuple[Event, ...]
    precisions: tuple[Event, ...]
    resumed_steps: tuple[int, ...]
    end: Event | None
    plan: Event | None
    samples: tuple[Event, ...]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The last step that was measured; 0 where none was."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def read_run(folder: Path | str) -> RunRecord:
    """Read a run folder.

    Args:
        folder: The folder that ``cofire train --out`` wrote, finished or not.

    Raises:
        TrainError: It is no run folder, or one of its files is broken.
    """
    folder = Path(folder)
    if not (folder / "run.toml").is_file() or not (folder / "metrics.jsonl").is_file():
        missing = "run.toml" if not (folder / "run.toml").is_file() else "metrics.jsonl"
        raise TrainError(f"{folder} is not a run folder: it has no {missing}; name the --out folder of cofire train")
    try:
        run = load_as(RunSpec, folder / "run.toml")
    except SpecError as error:
        raise TrainError(f"{error}; the report needs the run's own spec") from None
    notes: list[str] = []
    events = _cut_resumed(_read_events(folder / "metrics.jsonl", notes))
    ends = [event for event in events if event["event"] == "end"]
    finished = bool(events) and events[-1]["event"] == "end"
    samples = folder / "samples.jsonl"
    return RunRecord(
        folder=folder,
        run=run,
        run_text=(folder / "run.toml").read_text("utf-8"),
        start=_last(events, "start"),
        steps=_by_step(events, "step"),
        validations=_by_step(events, "validation"),
        precisions=_by_step(events, "precision"),
        resumed_steps=tuple(int(event.get("step", 0)) for event in events if event["event"] == "resume"),
        end=ends[-1] if finished else None,
        plan=_read_plan(folder / "plan.json", notes),
        samples=tuple(_read_lines(samples, notes)) if samples.is_file() else (),
        notes=tuple(notes),
    )


def number(event: Event | None, key: str) -> float | None:
    """Return a finite number of an event, or None where it is missing, null, infinite or not a number."""
    value = None if event is None else event.get(key)
    return float(value) if _is_number(value) and value is not None and math.isfinite(value) else None


def numbers(event: Event, key: str) -> list[float | None]:
    """Return a list of an event (empty where it is missing), with None for what is not finite."""
    return [float(v) if v is not None and math.isfinite(v) else None for v in event.get(key) or ()]


def _read_events(path: Path, notes: list[str]) -> list[Event]:
    events = _read_lines(path, notes)
    for place, event in enumerate(events, 1):
        name = event.get("event")
        if name not in _EVENTS:
            raise TrainError(f"{path}, line {place}: event = {name!r} is not one of {', '.join(_EVENTS)}")
        if name in ("step", "validation", "precision") and not isinstance(event.get("step"), int):
            raise TrainError(f"{path}, line {place}: step = {event.get('step')!r} is not a whole number")
        for key, value in event.items():
            if not _has_right_type(key, value):
                raise TrainError(f"{path}, line {place}: {key} = {str(value)[:40]!r} is not {_right_type(key)}")
        if name == "precision" and not _is_health(event.get("tensors")):
            raise TrainError(f"{path}, line {place}: tensors is not a list of objects with {', '.join(_HEALTH_KEYS)}")
    return events


def _read_lines(path: Path, notes: list[str]) -> list[Event]:
    """Return the objects of a JSONL file; a broken last line is dropped and noted."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    values: list[Event] = []
    for place, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"holds a {type(value).__name__}, not an object")
        except ValueError as error:
            if place == len(lines):
                notes.append(f"{path.name}: line {place}, the last one, is cut off and was left out")
                break
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise TrainError(
                f"{path}, line {place}: not a JSON object ({reason}); only the last line may be cut off, "
                f"so delete this line or resume from a checkpoint"
            ) from None
        values.append(value)
    return values


def _read_plan(path: Path, notes: list[str]) -> Event | None:
    if not path.is_file():
        notes.append("plan.json is missing, so nothing is compared with a plan")
        return None
    try:
        plan = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: not a JSON document: {error}; delete it to report without a plan") from None
    if not isinstance(plan, dict):
        raise TrainError(f"{path}: holds a {type(plan).__name__}, not a table; delete it to report without a plan")
    return plan


def _cut_resumed(events: list[Event]) -> list[Event]:
    """Drop what a run did after the step from which it was resumed: it did those steps again."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "resume":
            step = event.get("step", 0)
            kept = [old for old in kept if old["event"] in ("start", "resume") or old.get("step", 0) <= step]
        kept.append(event)
    return kept


def _by_step(events: list[Event], name: str) -> tuple[Event, ...]:
    found = {event["step"]: event for event in events if event["event"] == name}
    return tuple(found[step] for step in sorted(found))


def _last(events: list[Event], name: str) -> Event:
    return next((event for event in reversed(events) if event["event"] == name), {})


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_is_number(item) for item in value))


def _has_right_type(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        return _is_number(value)
    if key in _LISTS:
        return _is_list(value)
    if key in _TABLES:
        return value is None or (isinstance(value, list) and all(_is_list(row) for row in value))
    return True


def _is_health(tensors: Any) -> bool:
    """Return whether these are the rows that ``precision.health.summary`` makes."""
    return isinstance(tensors, list) and all(
        isinstance(row, dict)
        and all(key in row for key in _HEALTH_KEYS)
        and _is_number(row["underflow"])
        and (row["snr_db"] is None or _is_number(row["snr_db"]))
        and isinstance(row["amax"], dict)
        and all(key.lstrip("-").isdigit() and isinstance(count, int) for key, count in row["amax"].items())
        for row in tensors
    )


def _right_type(key: str) -> str:
    return "a number" if key in _NUMBERS else "a list of numbers" if key in _LISTS else "a list of lists of numbers"
