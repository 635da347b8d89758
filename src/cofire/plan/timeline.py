"""How long a pipeline schedule takes: an event simulation, and the papers' formulas beside it.

A chunk starts when its rank is free and what it needs has arrived: F the stage before's F, B and I the stage after's
B or I and their own F, W its own I. The formulas of the bubble (DeepSeek-V3 report, table 2) hold where the
input-gradient part takes as long as the forward pass; elsewhere the simulation counts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cofire.errors import PlanError
from cofire.plan.pipeline import SCHEDULES, Chunk, Schedule, Slot, make_schedule
from cofire.spec.workload import PipelineSpec


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one chunk.

    Attributes:
        forward_s: F.
        backward_s: B, the whole backward pass.
        weight_s: W, the weight-gradient part of it.
        overlapped_s: F&B, a forward and a backward chunk that overlap; none: one after the other.
        transfer_s: From one rank to another, beside the computation.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    overlapped_s: float | None = None
    transfer_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight_s <= self.backward_s or self.forward_s < 0 or self.transfer_s < 0:
            raise PlanError(
                f"times of a chunk must not be negative, nor weight_s = {self.weight_s:g} above backward_s = "
                f"{self.backward_s:g}, which it is part of"
            )

    @property
    def pair_s(self) -> float:
        """Of an overlapped pair."""
        return self.forward_s + self.backward_s if self.overlapped_s is None else self.overlapped_s

    def of(self, slot: Slot) -> float:
        """Seconds of a slot."""
        if len(slot) == 2:
            return self.pair_s
        parts = {
            "F": self.forward_s,
            "B": self.backward_s,
            "I": self.backward_s - self.weight_s,
            "W": self.weight_s,
        }
        return parts[slot[0].part]


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
        PlanError: It deadlocks: a chunk waits for one that never comes.
    """
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
            needs = [need for chunk in slot for need in _needs(schedule, chunk, rank, times.transfer_s)]
            missing = next((chunk for chunk, _ in needs if chunk not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([free[rank], *(done[chunk] + delay for chunk, delay in needs)])
            free[rank] = start + times.of(slot)
            spans[rank].append(Span(rank, slot, start, free[rank]))
            place[rank] += 1
            for chunk in map(_result, slot):
                done[chunk] = free[rank]
                ready += waiting.pop(chunk, [])
    stuck = next((r for r, order in enumerate(schedule.slots) if place[r] < len(order)), None)
    if stuck is not None:
        raise PlanError(f"{schedule.name}: rank {stuck} waits for ever at {schedule.slots[stuck][place[stuck]]}")
    makespan = max(free, default=0.0)
    return Timeline(
        makespan_s=makespan,
        bubble_s=tuple(makespan - math.fsum(s.end_s - s.start_s for s in row) for row in spans),
        peak_activations=tuple(_peak(row, opens="F", closes="BI") for row in schedule.slots),
        peak_weight_gradients=tuple(_peak(row, opens="I", closes="W") for row in schedule.slots),
        spans=tuple(span for row in spans for span in row),
    )


def _result(chunk: Chunk) -> Chunk:
    """What others wait for: the gradient of the input comes from I as well as from B."""
    return chunk._replace(part="B") if chunk.part == "I" else chunk


def _needs(schedule: Schedule, chunk: Chunk, rank: int, transfer_s: float) -> list[tuple[Chunk, float]]:
    """Return the results that a chunk waits for, and how long each is on its way."""
    if chunk.part == "W":
        return [(chunk._replace(part="B"), 0.0)]
    ranks, forward = schedule.ranks[chunk.way], chunk.part == "F"
    needs = [] if forward else [(chunk._replace(part="F"), 0.0)]
    near = chunk.stage + (-1 if forward else 1)
    if 0 <= near < len(ranks):
        delay = 0.0 if ranks[near] == rank else transfer_s
        needs.append((_result(chunk)._replace(stage=near), delay))
    return needs


def _peak(order: tuple[Slot, ...], opens: str, closes: str) -> int:
    held = peak = 0
    for slot in order:
        held += sum(chunk.part in opens for chunk in slot)
        peak = max(peak, held)
        held -= sum(chunk.part in closes for chunk in slot)
    return peak


def bubble_formula_s(schedule: Schedule, times: ChunkTimes) -> float:
    """Return the bubble per rank by the papers' formula (DeepSeek-V3 report, table 2; arXiv 2104.04473, 2.2).

    Without transfers it is exact for ``1f1b`` and ``interleaved``; for the others it is where
    ``backward_s - weight_s`` equals ``forward_s``.
    """
    p, f, b, w = schedule.num_ranks, times.forward_s, times.backward_s, times.weight_s
    if schedule.name in ("1f1b", "interleaved"):
        return (p - 1) * (f + b)
    if schedule.name == "zb1p":
        return (p - 1) * (f + b - 2 * w)
    half = p if schedule.name == "dualpipev" else p // 2
    return (half - 1) * (times.pair_s + b - 3 * w)


@dataclass(frozen=True)
class ScheduleCost:
    """One row of a comparison; times are of a step, activations of a rank's whole share of the layers.

    Attributes:
        name: Of the schedule.
        stages_per_rank: Whose weights a rank holds.
        makespan_s: Simulated.
        bubble_s: Of the rank that idles longest, simulated.
        formula_s: The papers' bubble.
        peak_activations: Of the rank that holds most, in micro-batches.
        unfit: Why the schedule cannot run with these numbers; then the rest is zero.
    """

    name: str
    stages_per_rank: int = 0
    makespan_s: float = 0.0
    bubble_s: float = 0.0
    formula_s: float = 0.0
    peak_activations: float = 0.0
    unfit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def share_times(schedule: Schedule, times: ChunkTimes) -> ChunkTimes:
    """Return the times of the schedule's chunks where ``times`` are those of a rank's whole share of the layers."""
    parts = schedule.chunks_per_pass
    return replace(
        times,
        forward_s=times.forward_s / parts,
        backward_s=times.backward_s / parts,
        weight_s=times.weight_s / parts,
        overlapped_s=None if times.overlapped_s is None else times.overlapped_s / parts,
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
        timeline = simulate(schedule, times)
        rows.append(
            ScheduleCost(
                name=name,
                stages_per_rank=schedule.stages_per_rank,
                makespan_s=timeline.makespan_s,
                bubble_s=max(timeline.bubble_s),
                formula_s=bubble_formula_s(schedule, times),
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


def trace_events(timeline: Timeline) -> list[dict[str, object]]:
    """Return the timeline as events of the Chrome trace format, which Perfetto opens; one thread per rank."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(timeline.bubble_s))
    ]
    for span in timeline.spans:
        name = " & ".join(f"{chunk.part}{chunk.micro_batch}" for chunk in span.slot)
        stages = [chunk.stage for chunk in span.slot]
        events.append(
            {
                "ph": "X",
                "name": name,
                "cat": "".join(chunk.part for chunk in span.slot),
                "pid": 0,
                "tid": span.rank,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "args": {"stages": stages, "ways": [chunk.way for chunk in span.slot]},
            }
        )
    return events
