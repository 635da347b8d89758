"""``cofire plan layouts``: every layout of a model on a cluster, ranked, and why the first is first."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from cofire.cli.options import JsonOption, SetOption, complete_cluster, complete_model
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix, read_question

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cofire.cli.plan_question import Question
    from cofire.plan.formulas import Formula
    from cofire.plan.layouts import LayoutRanking, Neighbour, SearchSpec
    from cofire.spec import ClusterSpec, WorkloadSpec

_PREFIX = "search."
_BAR_WIDTH = 24
_PARTS = 6


def layouts(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset or a file of a model.", autocompletion=complete_model)
    ],
    cluster: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The cluster that trains.", autocompletion=complete_cluster)
    ],
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores unless said.")] = None,
    objective: Annotated[
        Literal["step", "cost"],
        typer.Option(help="Rank by step time, or by dollars per trillion tokens: on one cluster the same order."),
    ] = "step",
    explain: Annotated[bool, typer.Option("--explain", help="Also print the formulas, with the numbers in.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Also write the ranking to this file.")] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Search all layouts that train a model on a whole cluster, and rank those that fit.

    Paths to set: parallel. (pp, dp, ep, tp, schedule, recompute, precision ...) fix an axis; search. changes what is
    tried on one, for example search.tp=[1,8] (also pp_max); workload., cluster. and those of the model as in cofire
    plan model.
    """
    check_suffix(out, ".json", "--out")
    question, search = _read(source, cluster, overrides or ())
    machine = question.cluster
    assert machine is not None
    if objective == "cost" and machine.device_hour_usd is None:
        from cofire.errors import PlanError

        raise PlanError(f"{machine.name} has no price to rank by; set cluster.device_hour_usd=2.0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = _search(question, search, top, workers or cores)
    if out is not None or as_json:
        document = _document(question, search, objective, found)
        if out is not None:
            _write(out, document)
        if as_json:
            print_json(document)
            return
    shown = console()
    for part in _note(question, machine, found, explain):
        shown.print(part)
        shown.print()
    number, took_s = found.ranking.num_considered, found.took_s
    rate = f"{number / took_s:,.0f} per second with {found.workers} process(es)"
    shown.print(f"{number:,} layouts in {took_s:.1f} s: {rate}.")


class _Found(NamedTuple):
    """A ranking, what explains its first layout, and how long the search took."""

    ranking: LayoutRanking
    neighbours: list[Neighbour]
    formulas: list[Formula]
    workload: WorkloadSpec
    took_s: float
    workers: int


def _search(question: Question, search: SearchSpec, top: int, workers: int) -> _Found:
    from cofire.plan.formulas import formulas
    from cofire.plan.layouts import neighbours, rank_layouts, with_batch
    from cofire.plan.step import StepModel

    model, cluster = question.model, question.cluster
    assert cluster is not None
    workload = with_batch(question.workload, cluster)
    start = time.monotonic()
    with _progress(question, search) as advance:
        ranking = rank_layouts(model, cluster, workload, search, question.parallel, top, workers, progress=advance)
    took_s = time.monotonic() - start
    steps, first = StepModel(model, cluster, workload), ranking.best[0]
    return _Found(ranking, neighbours(steps, first), formulas(steps, first), workload, took_s, workers)


def _document(question: Question, search: SearchSpec, objective: str, found: _Found) -> dict[str, Any]:
    assert question.cluster is not None
    return {
        "model": question.model.name,
        "cluster": question.cluster.name,
        "workload": found.workload.model_dump(mode="json"),
        "search": search.model_dump(mode="json"),
        "fixed": question.parallel,
        "objective": objective,
        "timing": {
            "took_s": found.took_s,
            "layouts_per_s": found.ranking.num_considered / found.took_s,
            "workers": found.workers,
        },
        "ranking": found.ranking.model_dump(mode="json"),
        "neighbours": [row.model_dump(mode="json") for row in found.neighbours],
        "formulas": [row.model_dump(mode="json") for row in found.formulas],
    }


def _read(source: str, cluster: str, overrides: list[str] | tuple[str, ...]) -> tuple[Question, SearchSpec]:
    """Load what the command names; check what a search varies value by value, as a layout's field is checked."""
    from cofire.errors import PlanError, SpecError
    from cofire.plan.layouts import AXES, SearchSpec
    from cofire.spec import ParallelSpec, parse
    from cofire.spec.io import override

    table: dict[str, Any] = {}
    for item in overrides:
        if item.startswith(_PREFIX):
            override(table, item.removeprefix(_PREFIX))
    search = parse(SearchSpec, table, "search")
    question = read_question(source, cluster, [item for item in overrides if not item.startswith(_PREFIX)])
    for name in table:
        if name in question.parallel:
            raise PlanError(
                f"search.{name} and parallel.{name} exclude each other: one varies it, one fixes it; leave one out"
            )
        if name not in AXES:
            continue
        values = getattr(search, name)
        if not values:
            raise SpecError(f"search.{name} = [] leaves nothing to try; take the default, or one value or more")
        for value in values:
            alone = {"ep": {"dp": value}, "stages_per_rank": {"schedule": "interleaved"}}.get(name, {})
            parse(ParallelSpec, {name: value, **alone}, "search")
    return question, search


@contextlib.contextmanager
def _progress(question: Question, search: SearchSpec) -> Iterator[Callable[[int], None] | None]:
    """A bar on standard error while the search runs, where somebody looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cofire.plan.layouts import enumerate_layouts

    assert question.cluster is not None
    number = sum(1 for _ in enumerate_layouts(question.model, question.cluster, search, question.parallel))
    columns = (TextColumn("layouts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("layouts", total=number)
        yield lambda done: bar.advance(task, done)


def _write(path: Path, document: dict[str, Any]) -> None:
    import json

    from cofire.spec.io import write_text

    write_text(path, json.dumps(document, indent=2, allow_nan=False))


# -- the note --------------------------------------------------------------------------------------


def _note(question: Question, cluster: ClusterSpec, found: _Found, explain: bool) -> list[RenderableType]:
    from rich.text import Text

    ranking = found.ranking
    title = f"Layouts of {question.model.name} on {cluster.name}: {cluster.num_devices:,} x {cluster.device.name}"
    parts: list[RenderableType] = [
        Text(title, style="bold"),
        Text("\n".join(_verdict(ranking, found.neighbours, cluster))),
        _best(ranking),
        _parts(ranking),
        _neighbours(found.neighbours),
    ]
    if ranking.refused:
        parts.append(_refused(ranking))
    if explain:
        parts.append(_formulas(found.formulas))
    return parts


def _verdict(ranking: LayoutRanking, near: list[Neighbour], cluster: ClusterSpec) -> list[str]:
    from cofire.plan.layouts import describe
    from cofire.plan.training_note import step_verdict

    first = ranking.best[0]
    return [f"{describe(first.layout)}.", *step_verdict(first, near, cluster)]


def _best(ranking: LayoutRanking) -> Table:
    from cofire.plan.layouts import describe
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_quantity

    title = f"The best of {ranking.num_considered:,} layouts, {ranking.num_fitting:,} of which fit (modelled)"
    table = new_table(title, "layout", "step", "MFU", "memory", "$ per 1e12 tokens", "binds")
    for step in ranking.best:
        price = step.usd_per_trillion_tokens
        table.add_row(
            describe(step.layout),
            f"{step.step_s:.4g} s",
            f"{step.mfu:.1%}",
            format_quantity(step.peak_memory_bytes, "B", 3),
            "-" if price is None else f"{price:,.0f}",
            step.binds,
        )
    table.columns[0].no_wrap = False
    return table


def _parts(ranking: LayoutRanking) -> Table:
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_duration

    first = ranking.best[0]
    table = new_table("Where the first one's time goes", "part", "time", "share", "")
    for part in sorted(first.parts, key=lambda one: -one.time_s)[:_PARTS]:
        if part.time_s > 0:
            share = part.time_s / first.step_s
            table.add_row(part.name, format_duration(part.time_s), f"{share:.1%}", "#" * round(share * _BAR_WIDTH))
    return table


def _neighbours(near: list[Neighbour]) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("Why the first one: one step away from it", "change", "step", "why")
    for row in near:
        if row.step_ratio is None:
            table.add_row(row.change, "-", row.reason)
        else:
            table.add_row(
                row.change, f"{row.step_ratio - 1:+.1%}", f"{'more' if row.step_ratio >= 1 else 'less'} {row.part}"
            )
    return table


def _refused(ranking: LayoutRanking) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("Not taken", "why", "layouts", "")
    for reason, number in ranking.refused.items():
        share = number / ranking.num_considered
        table.add_row(reason, f"{number:,}", "#" * round(share * _BAR_WIDTH))
    table.columns[0].no_wrap = False
    return table


def _formulas(rows: list[Formula]) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("Formulas, with the numbers in", "", "formula", "numbers", "result")
    for column in table.columns:
        column.justify, column.no_wrap = "left", False
    for row in rows:
        table.add_row(row.name, row.formula, row.numbers, row.result)
    return table
