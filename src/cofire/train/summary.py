"""A run in one sentence and two tables: the numbers that matter, and the plan beside the measurement.

Pure functions over a :class:`~cofire.train.run_record.RunRecord`. Every row says whether it was *measured* here or
*modelled* by ``cofire.plan``; a number that the run does not know is left out, never guessed.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from cofire.spec.units import format_count, format_duration, format_quantity
from cofire.train.load_floor import sampling_floor
from cofire.train.run_record import Event, RunRecord, number, numbers

_RECENT_STEPS = 100


@dataclass(frozen=True)
class Summary:
    """Final numbers of a run; None where the run did not record one.

    Losses are in nats per token. ``max_violation`` is the mean over the main model's layers, over the validation
    set where it was recorded and else over the last 100 steps; ``max_violation_floor`` is what even routing
    shows there.
    ``tokens_per_s`` and ``step_time_s`` are medians over steps.
    """

    name: str
    model: str
    state: str
    last_step: int
    planned_steps: int
    tokens: int
    training_loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    unigram_entropy: float | None
    max_violation: float | None
    max_violation_floor: float | None
    max_violation_scope: str
    ema_loss: float | None
    tokens_per_s: float | None
    step_time_s: float | None
    mfu: float | None
    time_s: float | None
    parameters_total: float | None
    parameters_activated: float | None


def summarise(record: RunRecord) -> Summary:
    """Return the final numbers of a run, finished or not."""
    recent = record.steps[-_RECENT_STEPS:]
    final = record.validations[-1] if record.validations else None
    violation, floor, scope = _violation(record, recent, final)
    speeds = [speed for speed in (number(event, "tokens_per_s") for event in record.steps) if speed]
    speed = statistics.median(speeds) if speeds else None
    tokens_per_step = record.run.tokens_per_step
    losses = [loss for loss in (_training_loss(event) for event in recent[-20:]) if loss is not None]
    return Summary(
        name=record.run.name,
        model=record.run.model.name,
        state=_state(record),
        last_step=record.last_step,
        planned_steps=record.run.steps,
        tokens=_tokens(record),
        training_loss=statistics.fmean(losses) if losses else None,
        validation_loss=number(final, "loss"),
        bits_per_byte=number(final, "bits_per_byte"),
        unigram_entropy=number(record.start, "unigram_entropy_nats"),
        max_violation=violation,
        max_violation_floor=floor,
        max_violation_scope=scope,
        ema_loss=number(final, "ema_loss"),
        tokens_per_s=speed,
        step_time_s=tokens_per_step / speed if speed else None,
        mfu=_median(number(event, "mfu") for event in record.steps),
        time_s=number(record.end, "time_s") or (number(record.steps[-1], "time_s") if record.steps else None),
        parameters_total=number(record.start, "parameters_total"),
        parameters_activated=number(record.start, "parameters_activated"),
    )


def headline(summary: Summary) -> str:
    """Return what was trained and how well, in one sentence or two."""
    size = "" if summary.parameters_total is None else f" ({_size(summary)})"
    what = f"{summary.model}{size}: {summary.state}, {format_count(summary.tokens)} tokens"
    if summary.validation_loss is None:
        loss = None if summary.training_loss is None else f"training loss {summary.training_loss:.3f} nats per token"
        return f"{what}; {loss or 'no loss recorded yet'}, not validated yet."
    parts = [f"validation loss {summary.validation_loss:.3f} nats per token"]
    if summary.bits_per_byte is not None:
        parts.append(f"{summary.bits_per_byte:.3f} bits per byte")
    if summary.unigram_entropy:
        parts.append(_against_entropy(summary.validation_loss, summary.unigram_entropy))
    if summary.max_violation is not None:
        parts.append(f"MaxVio {summary.max_violation:.2f}")
    if summary.tokens_per_s is not None:
        parts.append(f"{summary.tokens_per_s:,.0f} tokens/s")
    return f"{what}; {', '.join(parts)}."


def plan_rows(record: RunRecord, summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return (quantity, plan, measured, remark) for what a plan foresaw and a run measured."""
    plan, run = record.plan or {}, record.run
    rows = [
        ("Parameters", _count(_planned_parameters(plan)), _count(summary.parameters_total), "MTP modules included"),
        ("Activated parameters", _count(_find(plan, _ACTIVATED)), _count(summary.parameters_activated), "per token"),
        ("Training FLOP per token", _quantity(_find(plan, _FLOPS), "FLOP"), "", "modelled"),
        _step_time_row(record, summary),
        ("Tokens per second", _count(_peak_rate(record)), _count(summary.tokens_per_s), "plan: at the matrix peak"),
        ("MFU", "100%" if summary.mfu else "", "" if summary.mfu is None else f"{summary.mfu:.1%}", "median of steps"),
        (
            "Peak memory",
            _quantity(_find(plan, _MEMORY), "B"),
            _quantity(number(record.end, "peak_memory_bytes"), "B"),
            "plan: tensors; measured: the whole process",
        ),
        ("Tokens", _count(run.training_tokens), _count(summary.tokens), "trained on"),
    ]
    return [row for row in rows if row[1] or row[2]]


# -- measurement -------------------------------------------------------------------------------------


def _state(record: RunRecord) -> str:
    last, planned = record.last_step, record.run.steps
    resumed = f", resumed {_times(len(record.resumed_steps))}" if record.resumed_steps else ""
    if record.end is None:
        return f"no end recorded (running or killed) at step {last:,} of {planned:,}{resumed}"
    if last < planned:
        return f"stopped at step {last:,} of {planned:,}{resumed}"
    return f"trained for {last:,} steps{resumed}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _tokens(record: RunRecord) -> int:
    counted = number(record.steps[-1], "tokens") if record.steps else None
    # A step's own tokens where the trainer writes those, the sum so far where it writes that.
    computed = record.last_step * record.run.tokens_per_step
    return computed if counted is None else max(int(counted), computed)


def _training_loss(event: Event) -> float | None:
    main = number(event, "main_loss")
    return number(event, "loss") if main is None else main


def _violation(
    record: RunRecord, recent: tuple[Event, ...], final: Event | None
) -> tuple[float | None, float | None, str]:
    moe, run = record.run.model.moe, record.run
    if moe is None:
        return None, None, ""
    layers = run.model.num_moe_layers
    whole = [value for value in numbers(final or {}, "max_violation_global")[:layers] if value is not None]
    if whole:
        held_out = number(record.start, "validation_tokens") or math.inf
        tokens = int(min(run.validation_sequences * run.data.sequence_length, held_out))
        return statistics.fmean(whole), sampling_floor(moe, tokens), "validation set"
    each = [value for event in recent for value in numbers(event, "max_violation")[:layers] if value is not None]
    if not each:
        return None, None, ""
    return statistics.fmean(each), sampling_floor(moe, run.tokens_per_step), f"per step, last {len(recent)} steps"


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _against_entropy(loss: float, entropy: float) -> str:
    share = loss / entropy - 1
    return f"{abs(share):.0%} {'below' if share < 0 else 'above'} the unigram entropy of {entropy:.2f}"


def _size(summary: Summary) -> str:
    total, activated = summary.parameters_total or 0.0, summary.parameters_activated
    if activated is None or activated == total:
        return f"{format_count(total)} parameters"
    return f"{format_count(total)} parameters, {format_count(activated)} activated per token"


# -- plan --------------------------------------------------------------------------------------------

_PARAMETERS = "parameters.total"
_MTP_PARAMETERS = "parameters.mtp.total"
_ACTIVATED = "parameters.activated_head_only"
_FLOPS = "training_flops.total"
_MEMORY = "training_memory.total"


def _find(plan: Event, path: str) -> float | None:
    """Return the number at a dotted path of a plan, None where there is none: an older plan may lack it."""
    here: Any = plan
    for key in path.split("."):
        here = here.get(key) if isinstance(here, dict) else None
    return float(here) if isinstance(here, int | float) and not isinstance(here, bool) else None


def _planned_parameters(plan: Event) -> float | None:
    total = _find(plan, _PARAMETERS)
    return None if total is None else total + (_find(plan, _MTP_PARAMETERS) or 0.0)


def _peak_rate(record: RunRecord) -> float | None:
    """Tokens per second if every operation ran at the measured matrix peak."""
    flops, peak = _find(record.plan or {}, _FLOPS), number(record.start, "matrix_peak_flops_per_s")
    return peak / flops if flops and peak else None


def _step_time_row(record: RunRecord, summary: Summary) -> tuple[str, str, str, str]:
    rate = _peak_rate(record)
    planned = "" if rate is None else format_duration(record.run.tokens_per_step / rate)
    measured = "" if summary.step_time_s is None else format_duration(summary.step_time_s)
    return ("Time per step", planned, measured, "plan: at the matrix peak; measured: median")


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else format_quantity(value, unit, digits=3)
