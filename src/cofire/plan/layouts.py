"""Which layout to train with: enumerate degrees, schedules and recomputation, drop what does not fit, rank the rest.

Every layout of a cluster uses all of its devices. Ranking is by tokens per second, or by dollars per trillion tokens
where clusters are compared; on one cluster the two agree. The winner is explained by its neighbours: what one step
along each axis would change, or why it cannot be taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

from cofire.errors import PlanError, SpecError
from cofire.plan.device_memory import RankMemory
from cofire.plan.pipeline_cost import schedule_costs
from cofire.plan.step import PartName, PreparedStep, StepEstimate, StepModel, check_degrees
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import parse
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec, RecomputeName, ScheduleName
from cofire.spec.spec_type import Positive, Spec, nearest_divisor
from cofire.spec.units import format_quantity
from cofire.spec.workload import WorkloadSpec

AXES = (
    "pp",
    "dp",
    "ep",
    "tp",
    "micro_batch_size",
    "schedule",
    "stages_per_rank",
    "recompute",
    "precision",
    "zero_stage",
)
_SEQUENCES_PER_DEVICE = 8  # of an optimiser step where none is given: DeepSeek-V3's 7.5, rounded to a power of two
_CHUNK = 256  # layouts per task of a worker


class SearchSpec(Spec):
    """What a search varies; a field of a layout that is not listed here keeps its default.

    Without ``pp`` all divisors of the number of devices up to ``pp_max`` are tried.
    """

    pp: tuple[Positive, ...] | None = None
    pp_max: Positive = 32
    tp: tuple[Positive, ...] = (1, 2, 4, 8)
    ep: tuple[Positive, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    micro_batch_size: tuple[Positive, ...] = (1, 2, 4)
    schedule: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")
    stages_per_rank: tuple[Positive, ...] = (2, 4)
    recompute: tuple[RecomputeName, ...] = ("none", "selective", "full")
    precision: tuple[str, ...] = ("bf16", "fp8")
    zero_stage: tuple[int, ...] = (1, 3)


# What a plan looks through by itself: a second or two where all of SearchSpec takes a minute or two.
QUICK = SearchSpec(
    pp_max=16,
    ep=(1, 8, 16, 32, 64, 128),
    micro_batch_size=(1,),
    schedule=("1f1b", "dualpipe"),
    recompute=("none", "selective"),
    zero_stage=(1,),
)


class LayoutRanking(Spec):
    """What a search found: the best layouts, and how many could not be taken for which reason."""

    best: tuple[StepEstimate, ...]
    num_considered: int
    num_fitting: int
    refused: dict[str, int]
    smallest_memory_bytes: float | None = None


class Neighbour(Spec):
    """A layout one step away from another along one axis.

    ``change`` names the step. Where the layout runs and fits, ``step_ratio`` is its time over the other's per token and
    ``part`` what grew most; else ``reason`` says why it cannot be taken.
    """

    change: str
    step_ratio: float | None = None
    part: PartName | None = None
    reason: str = ""


def default_batch(cluster: ClusterSpec) -> int:
    """Sequences of an optimiser step where nobody says: eight per device."""
    return _SEQUENCES_PER_DEVICE * cluster.num_devices


def with_batch(workload: WorkloadSpec, cluster: ClusterSpec) -> WorkloadSpec:
    """Return the workload with a batch, its own or the default, so that all layouts train the same step."""
    if workload.global_batch_size is not None:
        return workload
    return workload.model_copy(update={"global_batch_size": default_batch(cluster)})


def enumerate_layouts(
    model: ModelSpec, cluster: ClusterSpec, search: SearchSpec, fixed: dict[str, Any] | None = None
) -> Iterator[ParallelSpec]:
    """Yield the layouts of a search that use the whole cluster; fields in ``fixed`` have that value alone."""
    fixed = fixed or {}

    def choices(name: str) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else tuple(getattr(search, name))

    depths = search.pp or tuple(n for n in range(1, search.pp_max + 1) if cluster.num_devices % n == 0)
    others = {name: value for name, value in fixed.items() if name not in AXES}
    has_fp8 = "fp8" in cluster.device.peak_flops_per_s
    precisions = [p for p in choices("precision") if p != "fp8" or has_fp8 or "precision" in fixed]
    for pp, tp in product((fixed["pp"],) if "pp" in fixed else depths, choices("tp")):
        if cluster.num_devices % (pp * tp) or ("tp" not in fixed and tp > cluster.scale_up_size):
            continue
        dp = cluster.num_devices // (pp * tp)
        if "dp" in fixed and fixed["dp"] != dp:
            continue
        expert_degrees = [ep for ep in choices("ep") if dp * tp % ep == 0 and (model.moe is not None or ep == 1)]
        schedules = choices("schedule") if pp > 1 or "schedule" in fixed else ("1f1b",)
        for ep, schedule in product(expert_degrees, schedules):
            turns = choices("stages_per_rank") if schedule == "interleaved" else (1,)
            axes = (turns, choices("micro_batch_size"), choices("recompute"), precisions, choices("zero_stage"))
            for stages, micro_batch, recompute, precision, zero in product(*axes):
                yield ParallelSpec.model_construct(
                    **{
                        **_DEFAULTS,
                        **others,
                        "pp": pp,
                        "dp": dp,
                        "ep": ep,
                        "tp": tp,
                        "micro_batch_size": micro_batch,
                        "schedule": schedule,
                        "stages_per_rank": stages,
                        "recompute": recompute,
                        "precision": precision,
                        "zero_stage": zero,
                    }
                )


# Layouts are made by the thousand and from values that are valid one by one: built without validation.
_DEFAULTS = ParallelSpec().model_dump()


def rank_layouts(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    search: SearchSpec | None = None,
    fixed: dict[str, Any] | None = None,
    limit: int = 10,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> LayoutRanking:
    """Estimate every layout of a search and return the best ones.

    Args:
        model: The model.
        cluster: All of its devices train.
        workload: Sequence length and batch; without a batch, :func:`default_batch`.
        search: What is varied; none: everything of :class:`SearchSpec`.
        fixed: Fields of the layout that keep one value.
        limit: How many to return.
        workers: Processes.
        progress: Called with the number of layouts that were estimated since the last call.

    Raises:
        PlanError: No layout of the search can be taken; the message says what comes closest.
    """
    _check_fixed(model, cluster, fixed or {})
    workload = with_batch(workload, cluster)
    layouts = list(enumerate_layouts(model, cluster, search or SearchSpec(), fixed))
    chunks = [layouts[i : i + _CHUNK] for i in range(0, len(layouts), _CHUNK)]
    found: list[StepEstimate] = []
    refused: Counter[str] = Counter()
    smallest: tuple[float, ParallelSpec | None] = (float("inf"), None)
    fitting = 0
    for chunk, result in zip(chunks, _run_chunks(model, cluster, workload, chunks, limit, workers), strict=True):
        best, reasons, memory, number = result
        found = sorted([*found, *best], key=lambda step: -step.tokens_per_s)[:limit]
        refused += reasons
        fitting += number
        smallest = min(smallest, memory, key=lambda pair: pair[0])
        if progress is not None:
            progress(len(chunk))
    if not found:
        raise PlanError(_nothing(model, cluster, workload, len(layouts), refused, smallest))
    return LayoutRanking(
        best=tuple(found),
        num_considered=len(layouts),
        num_fitting=fitting,
        refused=dict(refused.most_common()),
        smallest_memory_bytes=None if smallest[1] is None else smallest[0],
    )


_Result = tuple[list[StepEstimate], Counter[str], tuple[float, ParallelSpec | None], int]


def _run_chunks(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    chunks: list[list[ParallelSpec]],
    limit: int,
    workers: int,
) -> Iterable[_Result]:
    if workers <= 1 or len(chunks) < 2:
        steps = StepModel(model, cluster, workload)
        return (_estimate_all(steps, chunk, limit) for chunk in chunks)
    return _in_processes(model, cluster, workload, chunks, limit, workers)


def _in_processes(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    chunks: list[list[ParallelSpec]],
    limit: int,
    workers: int,
) -> Iterator[_Result]:
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(model, cluster, workload)) as pool:
        yield from pool.map(_work, chunks, [limit] * len(chunks))


_worker: dict[str, StepModel] = {}  # of a worker process: the one thing that outlives its calls


def _start_worker(model: ModelSpec, cluster: ClusterSpec, workload: WorkloadSpec) -> None:
    _worker["steps"] = StepModel(model, cluster, workload)


def _work(chunk: list[ParallelSpec], limit: int) -> _Result:
    return _estimate_all(_worker["steps"], chunk, limit)


def _estimate_all(steps: StepModel, layouts: list[ParallelSpec], limit: int) -> _Result:
    """Estimate layouts: memory first, then each schedule once for all of its layouts that fit."""
    reasons: Counter[str] = Counter()
    smallest: tuple[float, ParallelSpec | None] = (float("inf"), None)
    groups: dict[tuple[object, ...], list[tuple[int, PreparedStep, tuple[RankMemory, ...]]]] = {}
    room = steps.cluster.device.memory_bytes
    for place, layout in enumerate(layouts):
        try:
            ready = steps.prepare(layout)
            memory = steps.memory(ready)
            need = max(row.total for row in memory)
        except PlanError as error:
            reasons[_kind(str(error))] += 1
            continue
        if need < smallest[0]:
            smallest = (need, layout)
        if need > room:
            reasons["does not fit in memory"] += 1
            continue
        groups.setdefault((*ready.pipeline, ready.stages_per_rank), []).append((place, ready, memory))
    # Of layouts that are as fast, the one that was enumerated first comes first: the simpler one.
    best: list[tuple[float, int, StepEstimate]] = []
    fitting = 0
    for group in groups.values():
        first = group[0][1]
        costs = schedule_costs(*first.pipeline, [ready.times for _, ready, _ in group], first.stages_per_rank)
        for (place, ready, memory), cost in zip(group, costs, strict=True):
            step = steps.finish(ready, cost, memory)
            best.append((-step.tokens_per_s, place, step))
        fitting += len(group)
        best = sorted(best, key=lambda row: row[:2])[:limit]
    return [step for _, _, step in best], reasons, smallest, fitting


def _kind(message: str) -> str:
    """Put a refusal into a class that can be counted."""
    for words, kind in (
        ("pipeline stages are more", "more stages than layers"),
        ("must divide the", "a degree does not divide the model"),
        ("must be a multiple of dp", "the batch does not divide"),
        ("micro-batches", "too few micro-batches for the schedule"),
        ("has no peak", "no such number format"),
        ("has no network", "no network between nodes"),
    ):
        if words in message:
            return kind
    return message


def _check_fixed(model: ModelSpec, cluster: ClusterSpec, fixed: dict[str, Any]) -> None:
    """Refuse degrees that no layout of the whole cluster can have, before any is tried."""
    check_degrees(model, fixed.get("tp", 1), fixed.get("ep", 1))
    devices, axes = cluster.num_devices, [axis for axis in ("pp", "dp", "tp") if axis in fixed]
    degree = math.prod(fixed[axis] for axis in axes)
    if devices % degree or (len(axes) == 3 and degree != devices):
        rule = "be" if len(axes) == 3 else "divide"
        near = "" if len(axes) == 3 else f"; nearest: {nearest_divisor(devices, degree)}"
        raise PlanError(f"{' x '.join(axes)} = {degree} must {rule} the {devices} devices of {cluster.name}{near}")
    stage = devices // fixed.get("pp", 1)
    if stage % fixed.get("ep", 1):
        near = nearest_divisor(stage, fixed["ep"])
        raise PlanError(f"ep = {fixed['ep']} must divide the {stage} devices of a stage; nearest: {near}")


def _nothing(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    number: int,
    refused: Counter[str],
    smallest: tuple[float, ParallelSpec | None],
) -> str:
    start = f"none of {number} layouts of {model.name} on {cluster.name} can be taken"
    if smallest[1] is None:
        reasons = "; ".join(f"{kind}: {count}" for kind, count in refused.most_common(3))
        if "the batch does not divide" in refused:
            batch = max(1, round((workload.global_batch_size or 0) / cluster.num_devices)) * cluster.num_devices
            reasons += f"; try workload.global_batch_size = {batch}"
        return f"{start}: {reasons or 'no product of degrees gives its ' + str(cluster.num_devices) + ' devices'}"
    have = cluster.device.memory_bytes
    more = -(-cluster.num_nodes * smallest[0] // have)
    return (
        f"{start}: the smallest, {describe(smallest[1])}, needs {format_quantity(smallest[0], 'B')} of the "
        f"{format_quantity(have, 'B')} on a device; try cluster.num_nodes = {more:.0f}, recompute = full, or "
        "fewer axes that are fixed"
    )


def describe(layout: ParallelSpec) -> str:
    """Return a layout in a few words, for example ``pp 16, dp 128, ep 64, tp 1, dualpipe, selective, fp8``."""
    words = [f"{axis} {getattr(layout, axis)}" for axis in ("pp", "dp", "ep", "tp")]
    if layout.micro_batch_size > 1:
        words.append(f"micro-batch {layout.micro_batch_size}")
    if layout.pp > 1:
        stages = f" x {layout.stages_per_rank}" if layout.schedule == "interleaved" else ""
        words.append(layout.schedule + stages)
    if layout.recompute != "none":
        words.append(f"{layout.recompute} recomputation")
    if layout.zero_stage != 1:
        words.append(f"ZeRO {layout.zero_stage}")
    return ", ".join([*words, layout.precision])


def neighbours(steps: StepModel, chosen: StepEstimate) -> list[Neighbour]:
    """Return what one step along each axis would change."""
    return [_neighbour(steps, chosen, change, layout) for change, layout in _steps_away(steps, chosen.layout)]


def _steps_away(steps: StepModel, layout: ParallelSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of one axis; ``dp`` takes up what the other degrees leave."""
    now = layout.model_dump()
    for axis in ("pp", "tp"):
        for factor in (0.5, 2):
            degree, dp = getattr(layout, axis) * factor, layout.dp / factor
            if min(degree, dp) >= 1 and degree == int(degree) and dp == int(dp):
                yield f"{axis} {int(degree)}", {**now, axis: int(degree), "dp": int(dp)}
    for axis, word in (("ep", "ep"), ("micro_batch_size", "micro-batch")):
        if axis == "ep" and steps.model.moe is None:
            continue
        degree = getattr(layout, axis)
        for other in {max(1, degree // 2), 2 * degree} - {degree}:
            yield f"{word} {other}", {**now, axis: other}
    yield from _other_names(layout, now)


def _other_names(layout: ParallelSpec, now: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in SearchSpec().schedule if layout.pp > 1 else ():
        if name != layout.schedule:
            yield name, {**now, "schedule": name, "stages_per_rank": 2 if name == "interleaved" else 1}
    for name in SearchSpec().recompute:
        if name != layout.recompute:
            yield ("no" if name == "none" else name) + " recomputation", {**now, "recompute": name}
    for name in SearchSpec().precision:
        if name != layout.precision:
            yield name, {**now, "precision": name}


def _neighbour(steps: StepModel, chosen: StepEstimate, change: str, table: dict[str, Any]) -> Neighbour:
    try:
        other = steps.estimate(parse(ParallelSpec, table, "layout"))
    except (PlanError, SpecError) as error:
        return Neighbour(change=change, reason=str(error).removeprefix("layout: "))
    if not other.fits:
        need = format_quantity(other.peak_memory_bytes, "B", 3)
        have = format_quantity(steps.cluster.device.memory_bytes, "B", 3)
        return Neighbour(change=change, reason=f"does not fit: {need} of {have} on rank {other.peak_memory_rank}")
    ratio = chosen.tokens_per_s / other.tokens_per_s
    scale = chosen.tokens_per_step / other.tokens_per_step
    grew: dict[PartName, float] = {}
    for part in other.parts:
        grew[part.name] = part.time_s * scale - chosen.part_s(part.name)
    most = sorted(grew, key=lambda name: grew[name])[-1 if ratio >= 1 else 0]
    return Neighbour(change=change, step_ratio=ratio, part=most)
