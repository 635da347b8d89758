"""A training plan as an engineer's note: verdict, where the step goes, what it holds, what else there is, how sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cofire.plan.device_memory import ROLES
from cofire.plan.layouts import Neighbour, describe
from cofire.plan.step import StepEstimate
from cofire.plan.training import TrainingPlan
from cofire.plan.uncertainty import Interval
from cofire.spec.hardware import ClusterSpec
from cofire.spec.units import format_duration, format_quantity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BAR_WIDTH = 32
_SENSITIVITIES = 6


def training_note(plan: TrainingPlan, cluster: ClusterSpec, explain: bool = False) -> list[RenderableType]:
    """Return the parts of the note, to be printed by a rich console."""
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(f"Training on {cluster.name}: {cluster.num_devices:,} x {cluster.device.name}", style="bold"),
        Text("\n".join(verdict(plan, cluster))),
        _answers(plan),
        _parts(plan),
        _memory(plan, cluster),
    ]
    if plan.ranking is not None and len(plan.ranking.best) > 1:
        parts.append(ranking_table(plan))
    parts += [_neighbours(plan), _sensitivities(plan)]
    if explain:
        parts.append(_formulas(plan))
    return parts


def verdict(plan: TrainingPlan, cluster: ClusterSpec) -> list[str]:
    """Return what a reader should take away, in sentences."""
    step = plan.estimate
    lines = [f"Layout: {describe(step.layout)}."]
    if plan.ranking is not None:
        lines[0] += (
            f" The fastest of {plan.ranking.num_considered:,} that were tried, "
            f"{plan.ranking.num_fitting:,} of which fit."
        )
    return lines + step_verdict(step, plan.neighbours, cluster)


def step_verdict(step: StepEstimate, near: Sequence[Neighbour], cluster: ClusterSpec) -> list[str]:
    """Return what binds a step, whether it fits, and which step beyond the search would be faster."""
    share = step.peak_memory_bytes / cluster.device.memory_bytes
    fits = "" if step.fits else " It does NOT fit."
    lines = [
        f"What binds: {step.binds}, {step.part_s(step.binds) / step.step_s:.0%} of a step of "
        f"{format_duration(step.step_s)}. Memory is {share:.0%} full on rank {step.peak_memory_rank}.{fits}"
    ]
    faster = [one for one in near if one.step_ratio is not None and one.step_ratio < 1.0]
    if faster:
        best = min(faster, key=lambda one: one.step_ratio or 1.0)
        lines.append(f"Beyond what was tried, {best.change} would be {1 - (best.step_ratio or 1.0):.1%} faster.")
    return lines


def interval_text(value: Interval, unit: str) -> str:
    """Return an interval as ``18.81 s  [17.61, 21.83]``."""
    if unit == "$":
        return f"${value.value:,.0f}  [{value.low:,.0f}, {value.high:,.0f}]"
    return f"{value.value:.4g} {unit}  [{value.low:.4g}, {value.high:.4g}]"


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table in the note's look; the first and last columns are flushed left."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold cyan", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        side = "left" if index in (0, len(columns) - 1) else "right"
        table.add_column(column, justify=side, no_wrap=index < len(columns) - 1)
    return table


def _answers(plan: TrainingPlan) -> Table:
    step = plan.estimate
    table = new_table("A step", "", "modelled", "known as", "")
    batch = f"{step.num_micro_batches} micro-batches of {step.layout.micro_batch_size} x {step.layout.dp} pipelines"
    table.add_row("time", interval_text(plan.step, "s"), plan.step.label, "")
    table.add_row("tokens", f"{step.tokens_per_step:,}", "", batch)
    table.add_row("rate", format_quantity(step.tokens_per_s, "token/s"), plan.step.label, "")
    table.add_row("MFU", f"{step.mfu:.1%}", plan.step.label, "causal FLOP of the main model over the 16-bit peak")
    hours = f"{step.device_hours_per_trillion_tokens:,.0f}"
    table.add_row("device hours per 1e12 tokens", hours, plan.step.label, "")
    if plan.usd is not None:
        table.add_row("cost of 1e12 tokens", interval_text(plan.usd, "$"), plan.usd.label, "rent of the devices")
    return table


def _parts(plan: TrainingPlan) -> Table:
    step = plan.estimate
    table = new_table("Where the time goes, on the rank that works longest", "part", "time", "share", "")
    for part in sorted(step.parts, key=lambda one: -one.time_s):
        if part.time_s > 0:
            share = part.time_s / step.step_s
            table.add_row(part.name, format_duration(part.time_s), f"{share:.1%}", "#" * round(share * _BAR_WIDTH))
    return table


def _memory(plan: TrainingPlan, cluster: ClusterSpec) -> Table:
    step, room = plan.estimate, cluster.device.memory_bytes
    fullest = step.memory[step.peak_memory_rank]
    title = f"Memory of rank {fullest.rank}, the fullest of {len(step.memory)}"
    table = new_table(title, "role", "bytes", "of the device", "")
    for role in ROLES:
        size = getattr(fullest, role)
        table.add_row(role, format_quantity(size, "B"), f"{size / room:.1%}", "#" * round(size / room * _BAR_WIDTH))
    table.add_section()
    table.add_row("all", format_quantity(fullest.total, "B"), f"{fullest.total / room:.1%}", "modelled")
    return table


def ranking_table(plan: TrainingPlan) -> Table:
    """Return the best layouts as a table."""
    assert plan.ranking is not None
    table = new_table("The best layouts", "layout", "step", "MFU", "memory", "binds")
    for step in plan.ranking.best:
        memory = format_quantity(step.peak_memory_bytes, "B", 3)
        table.add_row(describe(step.layout), f"{step.step_s:.4g} s", f"{step.mfu:.1%}", memory, step.binds)
    return table


def _neighbours(plan: TrainingPlan) -> Table:
    table = new_table("Why this one: one step away", "change", "step", "why")
    for near in plan.neighbours:
        if near.step_ratio is None:
            table.add_row(near.change, "-", near.reason)
        else:
            grew = "more" if near.step_ratio >= 1 else "less"
            table.add_row(near.change, f"{near.step_ratio - 1:+.1%}", f"{grew} {near.part}")
    return table


def _sensitivities(plan: TrainingPlan) -> Table:
    table = new_table("What the result hangs on", "figure", "value", "step at low", "at high", "known as", "from")
    for row in plan.step.sensitivities[:_SENSITIVITIES]:
        span = f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]"
        path = row.path.removeprefix("cluster.")
        table.add_row(path, span, f"{row.at_low:.4g} s", f"{row.at_high:.4g} s", row.label, row.source)
    return table


def _formulas(plan: TrainingPlan) -> Table:
    table = new_table("Formulas, with the numbers in", "", "formula", "numbers", "result")
    for column in table.columns:
        column.justify, column.no_wrap = "left", False
    for row in plan.formulas:
        table.add_row(row.name, row.formula, row.numbers, row.result)
    return table
