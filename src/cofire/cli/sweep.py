"""``cofire plan sweep``: models and clusters varied together, and the designs that no other beats."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofire.cli.options import JsonOption, complete_cluster, complete_model
from cofire.cli.output import console, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cofire.plan.sweep import Progress, SweepResult, SweepSpec


def sweep(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset or a file of a model.", autocompletion=complete_model)
    ],
    cluster: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="A preset or a file of a cluster.", autocompletion=complete_cluster),
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH=VALUES", help="Values to try, for example cluster.network.num_planes=1,8. Repeat it."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set one field for all designs. Repeat it for more."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(metavar="MEASURE[:min|max]", help="What the front is drawn by; repeat it for more."),
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Give every cluster this many devices.")] = None,
    max_points: Annotated[
        int | None, typer.Option(min=1, help="Try a sample of the grid of at most this size.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the front to this .html file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Append each result to this .jsonl file, and go on where it ends.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Vary fields of a model and of a cluster together and draw the Pareto front.

    Each design is trained with its best layout and decoded. Paths of --vary begin with model., cluster. or workload.,
    or are model or cluster as a whole; a range is 1:8:x2; paths joined by a slash move together: a/b=1/2,3/4. Without
    --vary a sweep looks around the model and the network. Measures: total, activated, usd, tpot, kv, network,
    throughput, memory, step.

    Paths of --set: under cluster. and workload., under parallel. to fix part of the layout, under serving. for how
    tokens are decoded, sweep.tpot_limit_s, sweep.network_years, sweep.seed, sweep.workers; all others change the model.
    """
    for path, suffix, option in ((html, ".html", "--html"), (out, ".jsonl", "--out")):
        if path is not None and path.suffix != suffix:
            raise typer.BadParameter(f"{str(path)!r} must end in {suffix}", param_hint=option)
    from cofire.plan.sweep import run_sweep

    spec, workers = make_spec(model, cluster, vary or [], overrides or [], objective or [])
    spec = spec.model_copy(update={"budget": budget, "max_points": max_points})
    with _progress() as progress:
        result = run_sweep(spec, workers, None if out is None else str(out), progress)
    if html is not None:
        from cofire.plan.page import write_page
        from cofire.plan.sweep_report import sweep_page

        write_page(html, sweep_page(result))
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _print_result(console(), result)


def make_spec(
    model: str, cluster: str, vary: list[str], overrides: list[str], objective: list[str]
) -> tuple[SweepSpec, int]:
    """Return the sweep that the options describe, and how many processes run it.

    Raises:
        SpecError: A value breaks a rule.
        PlanError: A path or a measure is unknown.
    """
    from cofire.plan.design_space import SweepSpec, parse_axis, parse_objective
    from cofire.spec.io import override, parse

    table: dict[str, object] = {"model": model, "cluster": cluster}
    settings: dict[str, object] = {}
    changes = []
    for item in overrides:
        kind, _, rest = item.partition(".")
        if kind in ("cluster", "model", "workload"):
            changes.append(item)
        elif kind == "serving":
            override(table, item)
        elif kind == "parallel":
            table.setdefault("fixed", {})
            override(table, f"fixed.{rest}")
        elif kind == "sweep":
            override(settings, rest)
        else:
            changes.append(f"model.{item}")
    workers = settings.pop("workers", os.cpu_count() or 1)
    if not isinstance(workers, int) or workers < 1:
        from cofire.errors import PlanError

        raise PlanError(f"sweep.workers = {workers!r} must be a whole number from 1 on; try {os.cpu_count() or 1}")
    table |= settings
    # What is decoded by default is an instance of 64 devices; a setting changes one field of it, not all.
    if "serving" in table:
        default = SweepSpec(model=model, cluster=cluster).serving.model_dump()
        table["serving"] = {**default, **table["serving"]}  # type: ignore[dict-item]
    table["changes"] = changes
    table["axes"] = [parse_axis(item).model_dump() for item in vary]
    table["objectives"] = [parse_objective(item).model_dump() for item in objective]
    return parse(SweepSpec, table, "sweep"), workers


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """Yield what draws a bar on a terminal; it starts with the first call, when the processes are there."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("designs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console(stderr=True), transient=True)
    task = bar.add_task("designs")

    def show(done: int, number: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=number)

    try:
        yield show
    finally:
        bar.stop()


def _print_result(out: Console, result: SweepResult) -> None:
    from cofire.plan.sweep_report import describe_change, reasons, remarks, trade

    able = sum(design.figures is not None for design in result.designs)
    knee = result.designs[result.knee]
    out.print(
        f"{result.spec.model} on {result.spec.cluster}: of {len(result.designs)} designs {able} can be trained and "
        f"served; {len(result.front)} of them no other beats.",
        soft_wrap=True,
        markup=False,
    )
    labels = ", ".join(sorted({one.label for one in result.intervals})) or "not known"
    some = "" if len(result.shown) == len(result.front) else f"{len(result.shown)} of {len(result.front)}, "
    out.print(f"The front ({some}modelled; $ per 1e12 tokens: {labels}; * the knee)", soft_wrap=True, markup=False)
    out.print(_front_table(result))
    parts = {_bound(result, place) for place in result.shown}
    bound = f"; training is bound by {parts.pop()} in all" if len(parts) == 1 else ""
    note = f"tok/s: decoded per device at the best batch; net $: switches and links per device{bound}"
    out.print(note, soft_wrap=True)
    out.print(f"{knee.name} ({describe_change(knee)}) is {trade(result, knee)}.", soft_wrap=True, markup=False)
    ends = _extremes(result)
    for place in ends:
        if place != result.knee:
            design = result.designs[place]
            out.print(f"{design.name}: {trade(result, design)}.", soft_wrap=True, markup=False)
    _print_effects(out, result)
    for kind, count, reason in reasons(result):
        out.print(f"refused by {kind}: {count}, for example {reason}", soft_wrap=True, markup=False)
    for remark in remarks(result):
        out.print(f"- {remark}", soft_wrap=True, markup=False)


def _print_effects(out: Console, result: SweepResult) -> None:
    from rich.table import Table

    from cofire.plan.design_space import MEASURES
    from cofire.plan.sweep_effects import axis_effects
    from cofire.plan.sweep_report import effect_words

    effects = axis_effects(result)
    if not effects:
        return
    out.print("What each axis moves (mean ratio over pairs of designs that differ in it alone)", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("axis", "from", "to"):
        table.add_column(heading, overflow="fold")
    for heading in ("pairs", *(MEASURES[one.measure].title for one in result.spec.objectives)):
        table.add_column(heading, justify="right")
    for one in effects:
        table.add_row(
            *effect_words(result, one), str(one.num_pairs), *(f"x{ratio:.3f}" for ratio in one.ratios.values())
        )
    out.print(table)


def _extremes(result: SweepResult) -> list[int]:
    """Return the shown members that are best in an objective, in the order of the objectives."""
    from cofire.plan.sweep import costs_of

    costs = costs_of([result.designs[place] for place in result.shown], result.spec.objectives)
    return list(dict.fromkeys(result.shown[int(place)] for place in costs.argmin(axis=0)))


def _front_table(result: SweepResult) -> Table:
    from rich.table import Table

    from cofire.plan.sweep_report import axis_title, axis_value, by_price, changed_columns, short_number
    from cofire.spec.units import format_count

    axes, _ = changed_columns(result)
    known = {one.index: one for one in result.intervals}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for axis in axes:
        table.add_column(axis_title(axis), justify="right", overflow="fold")
    for heading in ("total", "active", "$", "interval", "TPOT", "tok/s", "net $"):
        table.add_column(heading, justify="right", no_wrap=True)
    parts = {_bound(result, place) for place in result.shown}
    if len(parts) > 1:
        table.add_column("bound by", overflow="fold")
    for place in by_price(result):
        design = result.designs[place]
        figures, one = design.figures, known.get(design.index)
        assert figures is not None
        table.add_row(
            design.name + "*" * (place == result.knee),
            *(axis_value(axis, design) for axis in axes),
            format_count(figures.total_parameters),
            format_count(figures.activated_parameters),
            _short(figures.usd_per_trillion_tokens),
            "-" if one is None else f"{short_number(one.low)}-{short_number(one.high)}",
            f"{figures.tpot_s * 1e3:.3g}ms",
            _short(figures.decode_tokens_per_s_per_device),
            _short(figures.network_usd_per_device),
            *([figures.binds] if len(parts) > 1 else []),
        )
    return table


def _bound(result: SweepResult, place: int) -> str:
    figures = result.designs[place].figures
    return "" if figures is None else figures.binds


def _short(value: float | None) -> str:
    from cofire.plan.sweep_report import short_number

    return "-" if value is None else short_number(value)
