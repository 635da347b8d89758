"""``cofire plan``: what a model or a training run costs, and what a cluster allows at best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofire.cli.options import JsonOption, SetOption, complete_cluster, complete_run
from cofire.cli.output import console, print_json

if TYPE_CHECKING:
    from cofire.plan import Plan

_PREFIXES = ("workload.", "cluster.")


def register(app: typer.Typer) -> None:
    """Add ``cofire plan``."""
    app.command("plan")(plan)


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
    out: Annotated[Path | None, typer.Option(help="Also write the plan to this .json file.")] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Estimate parameters, cache, operations and memory of a model, without building it.

    Paths under workload. (sequence_length, micro_batch_size, recipe, moments, recompute, ema, context_length,
    batch_size, weight_format, cache_bytes_per_number) set what is asked; paths under cluster. change the cluster; all
    others change the model or the run.
    """
    if out is not None and out.suffix != ".json":
        raise typer.BadParameter(f"{str(out)!r} must end in .json", param_hint="--out")
    result = make_plan(source, cluster, overrides or ())
    if out is not None:
        result.save(out)
    if as_json:
        print_json(result.to_dict())
        return
    from cofire.plan import note

    console().print(note(result))


def make_plan(source: str, cluster: str | None, overrides: list[str] | tuple[str, ...]) -> Plan:
    """Load what the command names, with each override where it belongs, and estimate it.

    Raises:
        SpecError: A spec cannot be read or breaks a rule.
        PlanError: The planner cannot answer.
    """
    from cofire.errors import PlanError, SpecError
    from cofire.plan import default_workload, estimate, run_workload
    from cofire.spec import ClusterSpec, ModelSpec, RunSpec, WorkloadSpec, load, load_as, parse
    from cofire.spec.io import override

    own = [item for item in overrides if not item.startswith(_PREFIXES)]
    spec = load(spec_source(source), own)
    if not isinstance(spec, ModelSpec | RunSpec):
        raise SpecError(f"{source} is a cluster spec, but a plan needs a model or a run; give it as --cluster")
    workload = default_workload(spec) if isinstance(spec, ModelSpec) else run_workload(spec)
    table = {"workload": workload.model_dump(mode="json")}
    for item in overrides:
        if item.startswith("workload."):
            override(table, item)
    workload = parse(WorkloadSpec, table["workload"], "workload")
    changes = [item.removeprefix("cluster.") for item in overrides if item.startswith("cluster.")]
    if changes and cluster is None:
        raise PlanError(f"--set cluster.{changes[0]} changes a cluster, but none is given; add --cluster h800-2048")
    machine = None if cluster is None else load_as(ClusterSpec, cluster, changes)
    return estimate(spec, machine, workload=workload)


def spec_source(source: str) -> str:
    """Return the spec file of a run's folder (``run.toml``) or a checkpoint's (``model.toml``), else the source."""
    for name in ("run.toml", "model.toml"):
        if (Path(source) / name).is_file():
            return str(Path(source) / name)
    return source
