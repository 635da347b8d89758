"""``cofire plan``: what a model or a training run costs, what a cluster allows at best, and pipeline schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cofire.cli.calibrate import calibrate
from cofire.cli.experts import experts
from cofire.cli.layouts import layouts
from cofire.cli.options import JsonOption, SetOption, complete_cluster, complete_run, complete_schedule
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix, read_question
from cofire.cli.serving import serving
from cofire.cli.sweep import sweep

if TYPE_CHECKING:
    from cofire.plan import ChunkTimes, Plan, Schedule, ScheduleCost, Timeline
    from cofire.spec import PipelineSpec


class _PlanGroup(TyperGroup):
    """``cofire plan small`` is ``cofire plan model small``: what names no command names a model."""

    default_command = "model"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        source = self.commands[self.default_command].params[0]
        return [*super().shell_complete(ctx, incomplete), *source.shell_complete(ctx, incomplete)]


def register(app: typer.Typer) -> None:
    """Add ``cofire plan ...``."""
    group = typer.Typer(
        cls=_PlanGroup,
        no_args_is_help=True,
        help="What a model costs, how a cluster trains and serves it, and what binds. A model's name alone stands for "
        "model NAME.",
    )
    group.command("model")(plan)
    group.command("layouts")(layouts)
    group.command("sweep")(sweep)
    group.command("serving")(serving)
    group.command("experts")(experts)
    group.command("pipeline")(pipeline)
    group.command("calibrate")(calibrate)
    app.add_typer(group, name="plan")


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            help="A preset, a file, or the folder of a run: a model, or a training run.",
            autocompletion=complete_run,
        ),
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Bound the plan by this cluster's devices.", autocompletion=complete_cluster
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also print the formulas, with the numbers in.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the plan to this .json file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the plan as one self-contained HTML page.")] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Estimate parameters, cache, operations and memory of a model; with a cluster, how it trains there.

    Paths under workload. (sequence_length, global_batch_size, micro_batch_size, recipe, moments, recompute, ema,
    context_length, batch_size, weight_format, cache_bytes_per_number, expert_load_skew) set what is asked; paths under
    cluster. change the cluster; paths under parallel. (pp, dp, ep, tp, schedule, recompute, precision ...) fix parts of
    the layout, and the rest is searched; all others change the model or the run.
    """
    check_suffix(out, ".json", "--out")
    check_suffix(html, ".html", "--html")
    result = make_plan(source, cluster, overrides or ())
    if out is not None:
        result.save(out)
    if html is not None:
        from cofire.plan.page import write_page
        from cofire.plan.plan_page import plan_page

        write_page(html, plan_page(result))
    if as_json:
        print_json(result.to_dict())
        return
    from cofire.plan import note

    console().print(note(result, explain))


def make_plan(source: str, cluster: str | None, overrides: list[str] | tuple[str, ...]) -> Plan:
    """Load what the command names, with each override where it belongs, and estimate it.

    Raises:
        SpecError: A spec cannot be read or breaks a rule.
        PlanError: The planner cannot answer.
    """
    from cofire.plan import estimate

    asked = read_question(source, cluster, overrides)
    return estimate(asked.spec, asked.cluster, asked.parallel or None, asked.workload)


def pipeline(
    schedule: Annotated[
        str | None,
        typer.Argument(help="Draw this schedule; none compares all.", autocompletion=complete_schedule),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="With a schedule: write a trace for Perfetto here.")] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Simulate pipeline schedules: makespan, bubble and activations, beside the papers' formulas.

    Paths to set: num_ranks, num_micro_batches, stages_per_rank (of interleaved), and the times of a micro-batch through
    a rank's layers: forward_s, backward_s, weight_s (part of it), overlapped_s, transfer_s. Any unit of time will do.
    """
    from cofire.plan import compare_schedules, run_schedule
    from cofire.spec import PipelineSpec, parse
    from cofire.spec.io import override

    table: dict[str, Any] = {}
    for item in overrides or ():
        override(table, item)
    settings = parse(PipelineSpec, table, "pipeline")
    if schedule is None:
        if trace is not None:
            raise typer.BadParameter("needs one schedule, for example dualpipe", param_hint="--trace")
        rows = compare_schedules(settings)
        if as_json:
            print_json([row.to_dict() for row in rows])
        else:
            _print_comparison(rows, settings)
        return
    made, times, timeline = run_schedule(schedule, settings)
    if trace is not None:
        _write_trace(trace, timeline)
    _print_timeline(made, times, timeline, as_json)


def _print_comparison(rows: list[ScheduleCost], settings: PipelineSpec) -> None:
    from rich.table import Table

    title = f"{settings.num_ranks} ranks, {settings.num_micro_batches} micro-batches (simulated)"
    table = Table(title=title, title_justify="left")
    for column in ("schedule", "stages per rank", "makespan", "bubble", "share", "formula", "activations"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in (row for row in rows if not row.unfit):
        times = [f"{value:.4g}" for value in (row.makespan_s, row.bubble_s)]
        rest = [f"{row.bubble_s / row.makespan_s:.1%}", f"{row.formula_s:.4g}", f"{row.peak_activations:.4g}"]
        table.add_row(row.name, str(row.stages_per_rank), *times, *rest)
    out = console()
    out.print(table)
    for row in (row for row in rows if row.unfit):
        out.print(f"left out: {row.unfit}", markup=False, soft_wrap=True)
    for row in (row for row in rows if row.formula_gap_s):
        out.print(_disagreement(row, settings), markup=False, highlight=False, soft_wrap=True)


def _disagreement(row: ScheduleCost, settings: PipelineSpec) -> str:
    """Say by how much a row's simulated bubble is off its formula, and which premise of the formula fails."""
    forward_s, weight_s = settings.forward_s, settings.weight_s
    input_s = settings.backward_s - weight_s
    fewest = {"zb1p": settings.num_ranks, "zbv": 2 * settings.num_ranks - 1}.get(row.name, 1)
    reasons = []
    if settings.transfer_s:
        reasons.append(f"transfer_s is {settings.transfer_s:g}, not 0")
    if row.name not in ("1f1b", "interleaved"):
        if input_s != forward_s:
            reasons.append(f"backward_s - weight_s is {input_s:.4g}, not forward_s = {forward_s:g}")
        if weight_s > forward_s or (row.name == "zbv" and weight_s < forward_s):
            rule = "not" if row.name == "zbv" else "above"
            reasons.append(f"weight_s is {weight_s:g}, {rule} forward_s = {forward_s:g}")
    if settings.num_micro_batches < fewest:
        reasons.append(f"{settings.num_micro_batches} micro-batches are fewer than {fewest}")
    gap = f"{abs(row.formula_gap_s):.4g} {'above' if row.formula_gap_s > 0 else 'below'}"
    return f"{row.name}: the bubble is {gap} its formula: {'; '.join(reasons) or 'as simulated'}"


def _print_timeline(schedule: Schedule, times: ChunkTimes, timeline: Timeline, as_json: bool) -> None:
    from cofire.plan.timeline import bubble_formula_s, draw

    formula = bubble_formula_s(schedule, times)
    if as_json:
        print_json(
            {
                "name": schedule.name,
                "makespan_s": timeline.makespan_s,
                "bubble_s": timeline.bubble_s,
                "formula_s": formula,
                "peak_activations": timeline.peak_activations,
                "peak_weight_gradients": timeline.peak_weight_gradients,
                "slots": schedule.slots,
            }
        )
        return
    out = console()
    for rank, row in enumerate(draw(timeline, max(20, out.width - 12))):
        out.print(f"rank {rank:<4}  {row}", markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"makespan {timeline.makespan_s:.4g}, bubble {max(timeline.bubble_s):.4g} ({timeline.bubble_fraction:.1%}), "
        f"formula {formula:.4g}; at most {max(timeline.peak_activations)} chunks' activations and "
        f"{max(timeline.peak_weight_gradients)} weight gradients wait on a rank (simulated)",
        soft_wrap=True,
    )


def _write_trace(path: Path, timeline: Timeline) -> None:
    from cofire.plan import trace_events
    from cofire.sim.trace import write_trace

    write_trace(path, trace_events(timeline))
