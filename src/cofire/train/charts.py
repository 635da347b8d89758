"""The figures of a training report, as values: which curves, over which steps, with which reference lines.

Pure: a :class:`~cofire.train.run_record.RunRecord` goes in, :class:`Chart` and :class:`HeatMap` values come out.
``plots.py`` draws them as PNG files and ``report.py`` as figures that answer to the mouse, so both show the same.

A quantity that the run did not record has no chart. Curves are thinned to at most 1,000 points by averaging
neighbours; the run's ``metrics.jsonl`` keeps every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cofire.train.load_floor import sampling_floor
from cofire.train.run_record import Event, RunRecord, number, numbers

Value = float | None
Role = Literal["main", "layer", "faint", "points"]

_POINTS_MAX = 1000
_LAYER_CURVES_MAX = 8
_HEAT_COLUMNS_MAX = 100
_HEAT_CELLS_MAX = 300_000
_LOG_SPAN = 20.0
_TENSORS = {"input": "blue", "weight": "green", "gradient": "orange"}


@dataclass(frozen=True)
class Curve:
    """One curve. ``colour`` is a name that both renderers know; None in ``values`` is a gap."""

    label: str
    steps: tuple[float, ...]
    values: tuple[Value, ...]
    colour: str = "blue"
    role: Role = "main"


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """Curves over optimiser steps."""

    key: str
    section: str
    title: str
    unit: str
    caption: str
    curves: tuple[Curve, ...]
    levels: tuple[Level, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Expert load over time: ``loads[layer][time][expert]``, 1.0 is an even share."""

    key: str
    section: str
    title: str
    caption: str
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    loads: tuple[tuple[tuple[float, ...], ...], ...]


Figure = Chart | HeatMap


def figures(record: RunRecord) -> list[Figure]:
    """Return the figures of a run in reading order; what was not recorded is left out."""
    made = [
        _loss(record),
        _bits_per_byte(record),
        _batch_violation(record),
        _global_violation(record),
        _expert_load(record),
        _mtp_loss(record),
        _tokens_per_second(record),
        _mfu(record),
        _learning_rate(record),
        _grad_norm(record),
        _signal_to_noise(record),
        _underflow(record),
        _tile_sizes(record),
    ]
    return [figure for figure in made if figure is not None]


def layer_labels(record: RunRecord, rows: int) -> list[str]:
    """Return the names of the rows of ``max_violation`` and ``expert_load``: main layers, then MTP modules."""
    model = record.run.model
    main = [f"layer {model.num_dense_layers + row}" for row in range(model.num_moe_layers)]
    extra = [f"MTP {depth}" for depth in range(1, max(0, rows - len(main)) + 1)]
    return [*main, *extra][:rows]


# -- loss --------------------------------------------------------------------------------------------


def _loss(record: RunRecord) -> Chart | None:
    curves = [
        *_raw_and_mean(record.steps, _training_loss, "training", "blue"),
        *_points(record.validations, "loss", "validation", "orange"),
        *_points(record.validations, "ema_loss", "validation, averaged weights", "green"),
    ]
    entropy = number(record.start, "unigram_entropy_nats")
    levels = () if entropy is None else (Level("unigram entropy", entropy),)
    text = "Next-token loss. Below the unigram entropy the model uses context, not only how frequent a token is."
    return _chart("loss", "Loss", "Loss", "nats per token", text, curves, levels)


def _training_loss(event: Event) -> Value:
    main = number(event, "main_loss")
    return number(event, "loss") if main is None else main


def _bits_per_byte(record: RunRecord) -> Chart | None:
    text = "Validation loss per byte of text, which does not depend on the tokenizer."
    bytes_per_token, entropy = number(record.start, "bytes_per_token"), number(record.start, "unigram_entropy_nats")
    levels = ()
    if bytes_per_token and entropy is not None:
        levels = (Level("unigram entropy", entropy / math.log(2) / bytes_per_token),)
    curves = _points(record.validations, "bits_per_byte", "validation", "orange")
    return _chart("bits_per_byte", "Loss", "Bits per byte", "bits per byte", text, curves, levels)


# -- experts -----------------------------------------------------------------------------------------


def _batch_violation(record: RunRecord) -> Chart | None:
    rows = [(event["step"], numbers(event, "max_violation")) for event in record.steps]
    floor = _floor_levels(record, record.run.tokens_per_step)
    text = (
        "(Highest load - mean) / mean of one step's tokens, per layer, running mean. "
        "The floor is what perfectly even routing shows at this batch size (simulated)."
    )
    curves = _layer_curves(record, rows, smooth=True)
    return _chart("max_violation", "Experts", "MaxVio per training step", "MaxVio", text, curves, floor, log=True)


def _global_violation(record: RunRecord) -> Chart | None:
    rows = [(event["step"], numbers(event, "max_violation_global")) for event in record.validations]
    tokens = record.run.validation_sequences * record.run.data.sequence_length
    held_out = number(record.start, "validation_tokens")
    tokens = tokens if held_out is None else min(tokens, int(held_out))
    text = "The same over the whole validation set; the floor is that of its number of tokens (simulated)."
    curves = _layer_curves(record, rows, smooth=False)
    floor = _floor_levels(record, tokens)
    title = "MaxVio over the validation set"
    return _chart("max_violation_global", "Experts", title, "MaxVio", text, curves, floor, log=True)


def _floor_levels(record: RunRecord, num_tokens: int) -> tuple[Level, ...]:
    moe = record.run.model.moe
    if moe is None or num_tokens < 1:
        return ()
    return (Level(f"floor at {num_tokens:,} tokens", sampling_floor(moe, num_tokens)),)


def _layer_curves(record: RunRecord, rows: Sequence[tuple[int, list[Value]]], smooth: bool) -> list[Curve]:
    """One curve per layer, or the highest and lowest where there are too many, and the main layers' mean."""
    rows = [(step, values) for step, values in rows if values]
    if not rows:
        return []
    steps = [step for step, _ in rows]
    width = min(len(values) for _, values in rows)
    labels = layer_labels(record, width)
    columns = {label: [values[row] for _, values in rows] for row, label in enumerate(labels)}
    main = sum(label.startswith("layer") for label in labels) or width
    mean = [_mean(values[:main]) for _, values in rows]
    if width > _LAYER_CURVES_MAX:
        known = [[v for v in values[:width] if v is not None] for _, values in rows]
        highest, lowest = [max(v, default=None) for v in known], [min(v, default=None) for v in known]
        drawn = [("highest layer", highest, "ramp7"), ("lowest layer", lowest, "ramp1")]
    else:
        drawn = [
            (label, column, "magenta" if label.startswith("MTP") else f"ramp{1 + 6 * row // max(1, main - 1)}")
            for row, (label, column) in enumerate(columns.items())
        ]
    curves = [_curve(label, steps, _running_mean(v) if smooth else v, colour, "layer") for label, v, colour in drawn]
    return [*curves, _curve("mean", steps, _running_mean(mean) if smooth else mean, "ink", "main")]


def _expert_load(record: RunRecord) -> HeatMap | None:
    moe = record.run.model.moe
    events = [event for event in record.steps if event.get("expert_load")]
    if moe is None or not events:
        return None
    num_layers = min(len(event["expert_load"]) for event in events)
    experts = moe.num_routed_experts
    columns = max(1, min(_HEAT_COLUMNS_MAX, _HEAT_CELLS_MAX // max(1, num_layers * experts)))
    if len(events) > columns:
        events = [events[round(i * (len(events) - 1) / max(1, columns - 1))] for i in range(columns)]
    loads = tuple(
        tuple(tuple(_relative_load(event["expert_load"][layer], experts)) for event in events)
        for layer in range(num_layers)
    )
    text = "Each row is an expert, each column a step; 1 is an even share, red gets more than it, blue less."
    labels = tuple(layer_labels(record, num_layers))
    steps = tuple(event["step"] for event in events)
    return HeatMap("expert_load", "Experts", "Expert load over time", text, labels, steps, loads)


def _relative_load(fractions: Sequence[Value], experts: int) -> list[float]:
    """Scale fractions that sum to one so that an even share is one; cut or pad to the number of experts."""
    known = [fraction or 0.0 for fraction in fractions][:experts]
    return [round(fraction * experts, 3) for fraction in [*known, *[0.0] * (experts - len(known))]]


def _mtp_loss(record: RunRecord) -> Chart | None:
    depth = max((len(event.get("mtp_losses") or ()) for event in record.steps), default=0)
    curves = list(_raw_and_mean(record.steps, _training_loss, "next token", "blue")[-1:]) if depth else []
    for k in range(depth):
        label = f"{k + 2} tokens ahead"
        colour = ("magenta", "violet", "green")[k % 3]
        curves += _raw_and_mean(record.steps, lambda event, k=k: _item(numbers(event, "mtp_losses"), k), label, colour)
    text = "Loss of the multi-token-prediction modules beside the main model's, running mean."
    drawn = [curve for curve in curves if curve.role == "main"]
    return _chart("mtp_loss", "Multi-token prediction", "Loss by distance", "nats per token", text, drawn)


# -- speed and optimiser -----------------------------------------------------------------------------


def _tokens_per_second(record: RunRecord) -> Chart | None:
    curves = _raw_and_mean(record.steps, lambda event: number(event, "tokens_per_s"), "training", "green")
    text = "Training throughput; dips are validation, checkpoints or other work on the machine."
    return _chart("tokens_per_s", "Speed", "Tokens per second", "tokens/s", text, curves)


def _mfu(record: RunRecord) -> Chart | None:
    curves = _raw_and_mean(record.steps, lambda event: _percent(number(event, "mfu")), "training", "green")
    text = "Floating-point operations the model needs, per second, over the measured peak of a large matrix product."
    return _chart("mfu", "Speed", "Fraction of the matrix peak (MFU)", "%", text, curves)


def _learning_rate(record: RunRecord) -> Chart | None:
    steps = [event["step"] for event in record.steps]
    curve = _curve("learning rate", steps, [number(event, "learning_rate") for event in record.steps], "violet")
    text = f"Schedule: {record.run.schedule.kind}, {record.run.schedule.warmup_steps} steps of warm-up."
    return _chart("learning_rate", "Optimiser", "Learning rate", "", text, [curve])


def _grad_norm(record: RunRecord) -> Chart | None:
    curves = _raw_and_mean(record.steps, lambda event: number(event, "grad_norm"), "before clipping", "violet")
    known = [value for curve in curves for value in curve.values if value]
    clip = record.run.optimizer.clip_norm
    log = bool(known) and max(known) > _LOG_SPAN * min(known)
    levels = (Level("clipped at", clip),) if known and max(known) >= clip / 2 else ()
    text = "Global norm of the gradient before clipping."
    return _chart("grad_norm", "Optimiser", "Gradient norm", "", text, curves, levels, log=log)


# -- precision ---------------------------------------------------------------------------------------


def _signal_to_noise(record: RunRecord) -> Chart | None:
    text = (
        "What FP8 leaves of the operands of linear layers and experts: the layer with the most noise, and the median "
        "layer. Values spread evenly over their tiles have about 32 dB."
    )
    return _health_chart(record, "precision_snr", "Signal over noise in FP8", "dB", text, "snr_db", min, "lowest")


def _underflow(record: RunRecord) -> Chart | None:
    text = "Values that are not zero and became zero: the layer with the most, and the median layer."
    return _health_chart(record, "precision_underflow", "Underflow in FP8", "%", text, "underflow", max, "highest")


def _health_chart(
    record: RunRecord, key: str, title: str, unit: str, text: str, field: str, worst: Callable[..., float], word: str
) -> Chart | None:
    """Draw a figure of the quantised tensors by kind: the worst layer's and the median."""
    steps, curves = [event["step"] for event in record.precisions], []
    factor = 100.0 if unit == "%" else 1.0
    for kind, colour in _TENSORS.items():
        rows = [
            sorted(factor * row[field] for row in event["tensors"] if row["tensor"] == kind and row[field] is not None)
            for event in record.precisions
        ]
        extremes = [worst(values) if values else None for values in rows]
        medians = [values[len(values) // 2] if values else None for values in rows]
        curves.append(_curve(f"{kind}, {word}", steps, extremes, colour, "points"))
        curves.append(_curve(f"{kind}, median", steps, medians, colour, "faint"))
    return _chart(key, "Precision", title, unit, text, curves)


def _tile_sizes(record: RunRecord) -> Chart | None:
    steps, curves = [event["step"] for event in record.precisions], []
    for kind, colour in _TENSORS.items():
        counts = [_tile_exponents(event, kind) for event in record.precisions]
        for share, word in ((0.01, "1 %"), (0.5, "median"), (0.99, "99 %")):
            values = [_quantile(count, share) for count in counts]
            curves.append(_curve(f"{kind}, {word}", steps, values, colour, "points" if share == 0.5 else "faint"))
    text = "Largest magnitudes of tiles of 1 x 128 over all layers, as powers of two: 1 %, half and 99 % are below."
    return _chart("precision_amax", "Precision", "Largest magnitudes of tiles", "log2", text, curves)


def _tile_exponents(event: Event, kind: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for row in event["tensors"]:
        if row["tensor"] == kind:
            for exponent, count in row["amax"].items():
                counts[int(exponent)] = counts.get(int(exponent), 0) + count
    return counts


def _quantile(counts: dict[int, int], share: float) -> Value:
    """Return the lowest exponent that this share of the tiles does not exceed."""
    seen, total = 0, sum(counts.values())
    for exponent in sorted(counts):
        seen += counts[exponent]
        if seen >= share * total:
            return float(exponent)
    return None


# -- building ----------------------------------------------------------------------------------------


def _chart(
    key: str,
    section: str,
    title: str,
    unit: str,
    caption: str,
    curves: Sequence[Curve],
    levels: tuple[Level, ...] = (),
    log: bool = False,
) -> Chart | None:
    """Make a chart of the curves that hold a value, or None where none does."""
    drawn = tuple(curve for curve in curves if any(value is not None for value in curve.values))
    positive = all(value > 0 for curve in drawn for value in curve.values if value is not None)
    return Chart(key, section, title, unit, caption, drawn, levels, log and positive) if drawn else None


def _raw_and_mean(events: Sequence[Event], read, label: str, colour: str) -> list[Curve]:
    """Return every step's value, faint, and the running mean over it."""
    steps, values = [event["step"] for event in events], [read(event) for event in events]
    window = _window(len(values))
    if window == 1:
        return [_curve(label, steps, values, colour)]
    mean = _curve(f"{label}, mean of {window} steps", steps, _running_mean(values), colour)
    return [_curve(f"{label}, each step", steps, values, colour, "faint"), mean]


def _points(events: Sequence[Event], key: str, label: str, colour: str) -> list[Curve]:
    steps, values = [event["step"] for event in events], [number(event, key) for event in events]
    return [_curve(label, steps, values, colour, "points")]


def _curve(label: str, steps: Sequence[int], values: Sequence[Value], colour: str, role: Role = "main") -> Curve:
    size = -(-len(steps) // _POINTS_MAX) or 1
    blocks = range(0, len(steps), size)
    thin_steps = tuple(sum(steps[i : i + size]) / len(steps[i : i + size]) for i in blocks)
    return Curve(label, thin_steps, tuple(_mean(values[i : i + size]) for i in blocks), colour, role)


def _window(count: int) -> int:
    return max(1, min(100, count // 20))


def _running_mean(values: Sequence[Value]) -> list[Value]:
    """Mean over a window of ``count / 20`` values (at most 100, as in the paper), centred so that it does not lag.

    It shrinks towards the start, where values change fast; at the end it takes what there is on its right.
    """
    half, last = _window(len(values)) // 2, len(values) - 1
    return [_mean(values[max(0, i - half) : min(i + min(half, i), last) + 1]) for i in range(len(values))]


def _mean(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _item(values: Sequence[Value], place: int) -> Value:
    return values[place] if place < len(values) else None


def _percent(value: Value) -> Value:
    return None if value is None else 100.0 * value
