"""How long a pipeline schedule takes: an event simulation, and the papers' formulas beside it.

A chunk starts when its rank is free and what it needs has arrived: F the stage before's F, B and I the stage after's
B or I and their own F, W its own I. The formulas of the bubble (DeepSeek-V3 report, table 2) hold where the
input-gradient part takes as long as the forward pass and the weight-gradient part no longer; elsewhere the simulation
counts. ``cofire.plan.pipeline_cost`` has the same numbers without the spans, fast enough for a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cofire.errors import PlanError
from cofire.plan.pipeline import SCHEDULES, Chunk, Schedule, Slot, make_schedule
from cofire.sim.trace import TraceSpan, span_events
from cofire.spec.workload import PipelineSpec

PerStage = float | Sequence[float]
"""Seconds: one number for every stage, or one for each."""


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one chunk, of every stage or for each stage of the model from first to last.

    Stages need not be equal: the first has the embedding, the last the head and the loss. DualPipe's two copies of a
    stage take the same time.

    Attributes:
        forward_s: F.
        backward_s: B, the whole backward pass.
        weight_s: W, the weight-gradient part of it.
        overlapped_s: F&B, a forward and a backward chunk of one stage that overlap; none: one after the other. Where
            their stages differ, they hide as much of each other as the stage that hides less.
        transfer_s: From one rank to another, beside the computation.
    """

    forward_s: PerStage
    backward_s: PerStage
    weight_s: PerStage = 0.0
    overlapped_s: PerStage | None = None
    transfer_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "weight_s", "overlapped_s"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                object.__setattr__(self, name, tuple(map(float, value)))  # frozen and hashable
        lengths = {len(value) for value in self._per_stage() if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise PlanError(
                f"times for {' and '.join(map(str, sorted(lengths)))} stages do not go together; "
                f"nearest: {max(lengths)} for each"
            )
        for stage in range(max(lengths, default=1)):
            forward, backward, weight = (_at(v, stage) for v in (self.forward_s, self.backward_s, self.weight_s))
            if not 0 <= weight <= backward or forward < 0 or self.transfer_s < 0:
                raise PlanError(
                    f"times of a chunk must not be negative, nor weight_s = {weight:g} above backward_s = "
                    f"{backward:g}, which it is part of"
                )

    def _per_stage(self) -> tuple[PerStage | None, ...]:
        return self.forward_s, self.backward_s, self.weight_s, self.overlapped_s

    @property
    def num_stages(self) -> int | None:
        """How many stages the times are for; none: any number of equal ones."""
        return next((len(value) for value in self._per_stage() if isinstance(value, tuple)), None)

    def pair_s(self, forward_stage: int = 0, backward_stage: int = 0) -> float:
        """Return the time of an overlapped pair."""
        both = _at(self.forward_s, forward_stage) + _at(self.backward_s, backward_stage)
        if self.overlapped_s is None:
            return both
        if forward_stage == backward_stage or self.num_stages is None:
            return _at(self.overlapped_s, forward_stage)
        return both - min(self._hidden_s(forward_stage), self._hidden_s(backward_stage))

    def _hidden_s(self, stage: int) -> float:
        assert self.overlapped_s is not None
        return _at(self.forward_s, stage) + _at(self.backward_s, stage) - _at(self.overlapped_s, stage)

    def of(self, slot: Slot) -> float:
        """Seconds of a slot."""
        part, stage = slot[0].part, slot[0].stage
        if len(slot) == 2:
            return self.pair_s(stage, slot[1].stage)
        if part == "F":
            return _at(self.forward_s, stage)
        if part == "W":
            return _at(self.weight_s, stage)
        return _at(self.backward_s, stage) - (_at(self.weight_s, stage) if part == "I" else 0.0)

    def mean(self) -> ChunkTimes:
        """Return the times of equal stages with the same sums."""

        def middle(value: PerStage) -> float:
            return value if isinstance(value, int | float) else math.fsum(value) / len(value)

        overlapped = None if self.overlapped_s is None else middle(self.overlapped_s)
        return ChunkTimes(
            middle(self.forward_s), middle(self.backward_s), middle(self.weight_s), overlapped, self.transfer_s
        )


def _at(value: PerStage, stage: int) -> float:
    return value if isinstance(value, int | float) else value[stage]


def check_stages(name: str, num_stages: int, times: ChunkTimes) -> None:
    """Check that times by stage are as many as a schedule's stages.

    Raises:
        PlanError: They are not.
    """
    if times.num_stages not in (None, num_stages):
        raise PlanError(f"{name}: times for {times.num_stages} stages, but it has {num_stages}; nearest: {num_stages}")


@dataclass(frozen=True)
class Span:
    """A slot on a rank, from ``start_s`` to ``end_s``."""

    rank: int
    slot: Slot
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        makespan_s: From the first start to the last end.
        bubble_s: Idle time of each rank within the makespan.
        peak_activations: Most chunks of each rank between the start of F and the end of B or I.
        peak_weight_gradients: Most chunks of each rank between I and W.
        spans: Every slot, by rank and start.
    """

    makespan_s: float
    bubble_s: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_weight_gradients: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def bubble_fraction(self) -> float:
        """The largest share of the makespan that a rank is idle."""
        return max(self.bubble_s) / self.makespan_s if self.makespan_s else 0.0


def simulate(schedule: Schedule, times: ChunkTimes) -> Timeline:
    """Run a schedule.

    Raises:
        PlanError: It deadlocks: a chunk waits for one that never comes; or the times are for other stages.
    """
    check_stages(schedule.name, len(schedule.ranks[0]), times)
    done: dict[Chunk, float] = {}
    place, free = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
    spans: list[list[Span]] = [[] for _ in schedule.slots]
    ready = list(range(schedule.num_ranks))
    waiting: dict[Chunk, list[int]] = {}
    while ready:
        rank = ready.pop()
        order = schedule.slots[rank]
        while place[rank] < len(order):
            slot = order[place[rank]]
            needs = slot_needs(schedule, slot, rank)
            missing = next((chunk for chunk, _ in needs if chunk not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([free[rank], *(done[chunk] + moved * times.transfer_s for chunk, moved in needs)])
            free[rank] = start + times.of(slot)
            spans[rank].append(Span(rank, slot, start, free[rank]))
            place[rank] += 1
            for chunk in slot_results(slot):
                done[chunk] = free[rank]
                ready += waiting.pop(chunk, [])
    stuck = next((r for r, order in enumerate(schedule.slots) if place[r] < len(order)), None)
    if stuck is not None:
        raise PlanError(f"{schedule.name}: rank {stuck} waits for ever at {schedule.slots[stuck][place[stuck]]}")
    makespan = max(free, default=0.0)
    return Timeline(
        makespan_s=makespan,
        bubble_s=tuple(makespan - math.fsum(s.end_s - s.start_s for s in row) for row in spans),
        peak_activations=tuple(peak_held(row, opens="F", closes="BI") for row in schedule.slots),
        peak_weight_gradients=tuple(peak_held(row, opens="I", closes="W") for row in schedule.slots),
        spans=tuple(span for row in spans for span in row),
    )


def slot_results(slot: Slot) -> list[Chunk]:
    """Return what others wait for: the gradient of the input comes from I as well as from B."""
    return [chunk._replace(part="B") if chunk.part == "I" else chunk for chunk in slot]


def slot_needs(schedule: Schedule, slot: Slot, rank: int) -> list[tuple[Chunk, bool]]:
    """Return the results that a slot waits for, and whether each comes from another rank."""
    needs: list[tuple[Chunk, bool]] = []
    for chunk in slot_results(slot):
        if chunk.part == "W":
            needs.append((chunk._replace(part="B"), False))
            continue
        ranks, forward = schedule.ranks[chunk.way], chunk.part == "F"
        if not forward:
            needs.append((chunk._replace(part="F"), False))
        near = chunk.stage + (-1 if forward else 1)
        if 0 <= near < len(ranks):
            needs.append((chunk._replace(stage=near), ranks[near] != rank))
    return needs


def peak_held(order: Sequence[Slot], opens: str, closes: str) -> int:
    """Return the most chunks between a part in ``opens`` and one in ``closes``, in a rank's order."""
    held = peak = 0
    for slot in order:
        held += sum(chunk.part in opens for chunk in slot)
        peak = max(peak, held)
        held -= sum(chunk.part in closes for chunk in slot)
    return peak


def bubble_formula_s(schedule: Schedule, times: ChunkTimes) -> float:
    """Return the bubble per rank by the papers' formula (DeepSeek-V3 report, table 2; arXiv 2104.04473, 2.2).

    Without transfers and with equal stages it is exact for ``1f1b`` and ``interleaved``; for the others where
    ``backward_s - weight_s`` equals ``forward_s`` and ``weight_s`` is not above it, with at least P micro-batches for
    ``zb1p``. For ``zbv`` it is where all three are equal and at least 2P - 1 micro-batches run: a rank then never idles
    between its first and its last chunk, and the ranks begin one forward chunk after the other. Stages that differ are
    taken at their mean.
    """
    equal = times.mean()
    f, b, w = (_at(value, 0) for value in (equal.forward_s, equal.backward_s, equal.weight_s))
    p = schedule.num_ranks
    if schedule.name in ("1f1b", "interleaved"):
        return (p - 1) * (f + b)
    if schedule.name in ("zb1p", "zbv"):
        return (p - 1) * (f + b - 2 * w)
    half = p if schedule.name == "dualpipev" else p // 2
    return (half - 1) * (equal.pair_s() + b - 3 * w)


@dataclass(frozen=True)
class ScheduleCost:
    """One row of a comparison; times are of a step, activations of a rank's whole share of the layers.

    Attributes:
        name: Of the schedule.
        stages_per_rank: Whose weights a rank holds.
        makespan_s: Simulated.
        bubble_s: Of the rank that idles longest, simulated.
        formula_s: The papers' bubble.
        formula_gap_s: By how much the simulated bubble is above it.
        peak_activations: Of the rank that holds most, in micro-batches.
        unfit: Why the schedule cannot run with these numbers; then the rest is zero.
    """

    name: str
    stages_per_rank: int = 0
    makespan_s: float = 0.0
    bubble_s: float = 0.0
    formula_s: float = 0.0
    formula_gap_s: float = 0.0
    peak_activations: float = 0.0
    unfit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def share_times(schedule: Schedule, times: ChunkTimes) -> ChunkTimes:
    """Return the times of the schedule's chunks where ``times`` are those of a rank's whole share of the layers.

    Raises:
        PlanError: The times are by stage; then they are of chunks already.
    """
    if times.num_stages is not None:
        raise PlanError(f"times for {times.num_stages} stages are of chunks already; nearest: one time for all stages")
    parts = schedule.chunks_per_pass
    return replace(
        times,
        forward_s=_at(times.forward_s, 0) / parts,
        backward_s=_at(times.backward_s, 0) / parts,
        weight_s=_at(times.weight_s, 0) / parts,
        overlapped_s=None if times.overlapped_s is None else _at(times.overlapped_s, 0) / parts,
    )


def chunk_times(pipeline: PipelineSpec) -> ChunkTimes:
    """Return the times of a micro-batch through a rank's whole share of the layers."""
    return ChunkTimes(
        pipeline.forward_s, pipeline.backward_s, pipeline.weight_s, pipeline.overlapped_s, pipeline.transfer_s
    )


def run_schedule(name: str, pipeline: PipelineSpec) -> tuple[Schedule, ChunkTimes, Timeline]:
    """Make a schedule with a pipeline's numbers and simulate it; also return its chunks' times.

    Raises:
        PlanError: The schedule is unknown, or cannot run with these numbers.
    """
    schedule = _scheduled(name, pipeline)
    times = share_times(schedule, chunk_times(pipeline))
    return schedule, times, simulate(schedule, times)


def compare_schedules(pipeline: PipelineSpec) -> list[ScheduleCost]:
    """Run every schedule with the same work per rank.

    Raises:
        PlanError: The times contradict each other.
    """
    whole, rows = chunk_times(pipeline), []
    for name in SCHEDULES:
        try:
            schedule = _scheduled(name, pipeline)
        except PlanError as error:
            rows.append(ScheduleCost(name, unfit=str(error)))
            continue
        times = share_times(schedule, whole)
        timeline, formula = simulate(schedule, times), bubble_formula_s(schedule, times)
        gap = max(timeline.bubble_s) - formula
        rows.append(
            ScheduleCost(
                name=name,
                stages_per_rank=schedule.stages_per_rank,
                makespan_s=timeline.makespan_s,
                bubble_s=max(timeline.bubble_s),
                formula_s=formula,
                formula_gap_s=gap if abs(gap) > 1e-9 * timeline.makespan_s else 0.0,
                peak_activations=max(timeline.peak_activations) / schedule.chunks_per_pass,
            )
        )
    return rows


def _scheduled(name: str, pipeline: PipelineSpec) -> Schedule:
    return make_schedule(name, pipeline.num_ranks, pipeline.num_micro_batches, pipeline.stages_per_rank)


def draw(timeline: Timeline, width: int = 100) -> list[str]:
    """Return a line per rank: F, B, I and W where it computes, & where two chunks overlap, a dot where it idles."""
    rows = [["."] * width for _ in timeline.bubble_s]
    for span in timeline.spans:
        letter = "&" if len(span.slot) == 2 else span.slot[0].part
        begin, end = (round(at / timeline.makespan_s * width) for at in (span.start_s, span.end_s))
        rows[span.rank][begin:end] = letter * (end - begin)
    return ["".join(row) for row in rows]


def trace_events(timeline: Timeline) -> list[dict[str, Any]]:
    """Return the timeline as events of the Chrome trace format, which Perfetto opens; one thread per rank."""
    spans = [
        TraceSpan(
            track=span.rank,
            name=" & ".join(f"{chunk.part}{chunk.micro_batch}" for chunk in span.slot),
            start_s=span.start_s,
            end_s=span.end_s,
            category="".join(chunk.part for chunk in span.slot),
            details={"stages": [chunk.stage for chunk in span.slot], "ways": [chunk.way for chunk in span.slot]},
        )
        for span in timeline.spans
    ]
    return span_events(spans, {rank: f"rank {rank}" for rank in range(len(timeline.bubble_s))})
