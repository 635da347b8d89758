"""How a cluster trains a model: a layout, given or found, its step with an interval, and why it is that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cofire.plan.formulas import Formula, formulas
from cofire.plan.layouts import (
    QUICK,
    LayoutRanking,
    Neighbour,
    SearchSpec,
    neighbours,
    rank_layouts,
    with_batch,
)
from cofire.plan.step import StepEstimate, StepModel
from cofire.plan.uncertainty import Interval, interval
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec


class TrainingPlan(Spec):
    """A layout's step on a cluster and what it rests on.

    ``workload`` has the batch that was planned. ``source`` says whether the layout was given or is the best of
    ``ranking``. ``step`` and ``usd`` are the step's seconds and the dollars per trillion tokens with their intervals.
    ``neighbours`` explain the choice, ``formulas`` the figures.
    """

    workload: WorkloadSpec
    source: Literal["given", "searched"]
    estimate: StepEstimate
    step: Interval
    usd: Interval | None
    ranking: LayoutRanking | None
    neighbours: tuple[Neighbour, ...]
    formulas: tuple[Formula, ...]


def plan_training(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    parallel: ParallelSpec | dict[str, Any] | None = None,
    search: SearchSpec = QUICK,
    limit: int = 8,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> TrainingPlan:
    """Plan the training of a model on all devices of a cluster.

    Args:
        model: The model.
        cluster: The cluster.
        workload: Sequence length and batch.
        parallel: A layout, or the fields of one that are fixed; what they leave open is searched.
        search: What is varied.
        limit: Layouts that the ranking keeps.
        workers: Processes of the search.
        progress: See :func:`cofire.plan.layouts.rank_layouts`.

    Raises:
        PlanError: The layout cannot run, or none can.
    """
    workload = with_batch(workload, cluster)
    steps = StepModel(model, cluster, workload)
    ranking = None
    if isinstance(parallel, ParallelSpec):
        chosen = steps.estimate(parallel)
    else:
        ranking = rank_layouts(model, cluster, workload, search, parallel, limit, workers, progress)
        chosen = ranking.best[0]
    return TrainingPlan(
        workload=workload,
        source="given" if ranking is None else "searched",
        estimate=chosen,
        step=_interval(model, cluster, workload, chosen.layout, lambda step: step.step_s),
        usd=None
        if chosen.usd_per_trillion_tokens is None
        else _interval(model, cluster, workload, chosen.layout, lambda step: step.usd_per_trillion_tokens or 0.0),
        ranking=ranking,
        neighbours=tuple(neighbours(steps, chosen)),
        formulas=tuple(formulas(steps, chosen)),
    )


def _interval(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    layout: ParallelSpec,
    result: Callable[[StepEstimate], float],
) -> Interval:
    def evaluate(specs: dict[str, Spec]) -> float:
        machine, work = specs["cluster"], specs["workload"]
        assert isinstance(machine, ClusterSpec)
        assert isinstance(work, WorkloadSpec)
        return result(StepModel(model, machine, work).estimate(layout))

    return interval({"cluster": cluster, "workload": workload}, evaluate)
