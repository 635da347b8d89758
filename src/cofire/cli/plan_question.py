"""What the words of a planning command ask about: a model or a run, a cluster, a workload, parts of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from cofire.spec import ClusterSpec, ModelSpec, RunSpec, WorkloadSpec

_PREFIXES = ("workload.", "cluster.", "parallel.")


class Question(NamedTuple):
    """``parallel`` holds the fields of a layout that are fixed; the rest may be searched."""

    spec: ModelSpec | RunSpec
    cluster: ClusterSpec | None
    workload: WorkloadSpec
    parallel: dict[str, Any]

    @property
    def model(self) -> ModelSpec:
        """The model, or that of the run."""
        from cofire.spec import RunSpec

        return self.spec.model if isinstance(self.spec, RunSpec) else self.spec


def read_question(source: str, cluster: str | None, overrides: list[str] | tuple[str, ...]) -> Question:
    """Load what a command names, with each override where it belongs.

    Raises:
        SpecError: A spec cannot be read or breaks a rule.
        PlanError: An override changes a cluster or a layout, but no cluster is given.
    """
    from cofire.errors import PlanError, SpecError
    from cofire.plan import default_workload, run_workload
    from cofire.spec import ClusterSpec, ModelSpec, RunSpec, WorkloadSpec, load, load_as, parse
    from cofire.spec.io import override

    own = [item for item in overrides if not item.startswith(_PREFIXES)]
    spec = load(spec_source(source), own)
    if not isinstance(spec, ModelSpec | RunSpec):
        kind = getattr(spec, "kind", type(spec).__name__)
        hint = "; give it as --cluster" if kind == "cluster" else ""
        raise SpecError(f"{source} is a {kind} spec, but a plan needs a model or a run{hint}")
    workload = default_workload(spec) if isinstance(spec, ModelSpec) else run_workload(spec)
    table: dict[str, Any] = {"workload": workload.model_dump(mode="json"), "parallel": {}}
    for item in overrides:
        if item.startswith(("workload.", "parallel.")):
            override(table, item)
    changes = [item for item in overrides if item.startswith(("cluster.", "parallel."))]
    if changes and cluster is None:
        what = "changes a cluster" if changes[0].startswith("cluster.") else "lays a model over devices"
        raise PlanError(f"--set {changes[0]} {what}, but none is given; add --cluster h800-2048")
    _check_layout_fields(table["parallel"])
    moved = [item.removeprefix("cluster.") for item in changes if item.startswith("cluster.")]
    machine = None if cluster is None else load_as(ClusterSpec, cluster, moved)
    return Question(spec, machine, parse(WorkloadSpec, table["workload"], "workload"), table["parallel"])


def _check_layout_fields(table: dict[str, Any]) -> None:
    """Check names and values one by one; rules between fields wait until the search has filled the layout."""
    from cofire.spec import ParallelSpec, parse

    for name, value in table.items():
        alone = {name: value}
        if name == "ep":
            alone["dp"] = value
        if name == "stages_per_rank":
            alone["schedule"] = "interleaved"
        parse(ParallelSpec, alone, "parallel")


def spec_source(source: str) -> str:
    """Return the spec file of a run's folder (``run.toml``) or a checkpoint's (``model.toml``), else the source."""
    for name in ("run.toml", "model.toml"):
        if (Path(source) / name).is_file():
            return str(Path(source) / name)
    return source


def check_suffix(path: Path | None, suffix: str, option: str) -> None:
    """Refuse a file whose name does not end as its content does."""
    if path is not None and path.suffix != suffix:
        raise typer.BadParameter(f"{str(path)!r} must end in {suffix}", param_hint=option)
