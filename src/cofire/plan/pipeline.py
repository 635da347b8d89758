"""Pipeline schedules as data: which chunk each rank runs, in which order.

A model is cut into stages; a *chunk* is one micro-batch on one stage. A schedule says where stages lie and gives each
rank a list of slots; a slot holds one chunk, or a forward and a backward chunk that overlap. It says nothing of time:
``cofire.plan.timeline`` runs it with given times, and a trainer can run it for real.

    1f1b          one forward, one backward (PipeDream-Flush)
    interleaved   several stages per rank, smaller chunks, smaller bubble (arXiv 2104.04473)
    zb1p          1F1B with the backward pass split in two; weight gradients fill the gaps (ZB-H1, arXiv 2401.10241)
    zbv           two stages per rank, there and back; no gaps between equal F, I and W (ZB-V, arXiv 2401.10241, 6)
    dualpipe      both ends feed the pipeline; forward and backward chunks overlap (DeepSeek-V3 report, section 3.2.1)
    dualpipev     the same folded: half as many ranks, each with a stage of both halves, no copy of the weights

Left out: schedules found by an integer program or by a search for given times; V-Half and V-Min of arXiv 2405.15362,
which hold fewer activations than ZB-V.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cofire.errors import PlanError

Part = Literal["F", "B", "I", "W"]


class Chunk(NamedTuple):
    """A micro-batch on a stage.

    Attributes:
        part: F forward, B whole backward, I its input-gradient part, W its weight-gradient part.
        way: Which copy of the pipeline; DualPipe has two, in opposite directions.
        stage: Counted along the way.
        micro_batch: Counted along the way.
    """

    part: Part
    way: int
    stage: int
    micro_batch: int


Slot = tuple[Chunk, ...]


@dataclass(frozen=True)
class Schedule:
    """What each rank runs, in order.

    Attributes:
        name: As in :func:`make_schedule`.
        ranks: For each way, the rank of each stage.
        slots: For each rank, its slots.
    """

    name: str
    ranks: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[Slot, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.slots)

    @property
    def stages_per_rank(self) -> int:
        """Stages whose weights a rank holds, copies counted."""
        return sum(map(len, self.ranks)) // self.num_ranks

    @property
    def chunks_per_pass(self) -> int:
        """Chunks of a rank in which one micro-batch passes through it once."""
        return len(self.ranks[0]) // self.num_ranks


def make_schedule(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """Return a schedule.

    Args:
        name: One of :data:`SCHEDULES`.
        num_ranks: Pipeline ranks.
        num_micro_batches: Of an optimiser step.
        stages_per_rank: For ``interleaved``; the others have their own number.

    Raises:
        PlanError: The name is unknown or the numbers break the schedule's rule.
    """
    check_numbers(name, num_ranks, num_micro_batches, stages_per_rank)
    return SCHEDULES[name](num_ranks, num_micro_batches, stages_per_rank)


def check_numbers(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int = 2) -> None:
    """Check a schedule's name and numbers without making it; arguments as of :func:`make_schedule`.

    Raises:
        PlanError: The name is unknown or the numbers break the schedule's rule.
    """
    if name not in SCHEDULES:
        raise PlanError(f"schedule {name!r} is not known; known are {', '.join(SCHEDULES)}")
    if num_ranks < 1 or num_micro_batches < 1 or stages_per_rank < 1:
        raise PlanError(
            f"{name}: {num_ranks} ranks, {num_micro_batches} micro-batches and {stages_per_rank} stages per rank "
            "must all be at least 1"
        )
    if name == "interleaved" and num_micro_batches % num_ranks:
        near = max(1, round(num_micro_batches / num_ranks)) * num_ranks
        raise PlanError(
            f"interleaved: {num_micro_batches} micro-batches must be a multiple of the {num_ranks} ranks; "
            f"nearest: {near}"
        )
    if name == "dualpipe" and (num_ranks % 2 or num_micro_batches % 2 or num_micro_batches < 2 * num_ranks):
        ranks = num_ranks + num_ranks % 2
        raise PlanError(
            f"dualpipe: {num_ranks} ranks and {num_micro_batches} micro-batches must be even, with at least two "
            f"micro-batches per rank; nearest: {ranks} ranks, "
            f"{max(2 * ranks, num_micro_batches + num_micro_batches % 2)} micro-batches"
        )
    if name == "dualpipev" and num_micro_batches < 2 * num_ranks:
        raise PlanError(
            f"dualpipev: {num_micro_batches} micro-batches must be at least twice the {num_ranks} ranks; "
            f"nearest: {2 * num_ranks}"
        )


def count_stages(name: str, num_ranks: int, stages_per_rank: int = 2) -> int:
    """Return into how many stages a schedule cuts the model: the length of times that differ by stage.

    Args:
        name: One of :data:`SCHEDULES`.
        num_ranks: Pipeline ranks.
        stages_per_rank: For ``interleaved``.
    """
    return num_ranks * {"interleaved": stages_per_rank, "zbv": 2, "dualpipev": 2}.get(name, 1)


def _one_f_one_b(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """Warm up with as many forwards as stages follow, then alternate."""
    slots = []
    for rank in range(num_ranks):
        warm = min(num_ranks - 1 - rank, num_micro_batches)
        order = [Chunk("F", 0, rank, m) for m in range(warm)]
        for m in range(num_micro_batches - warm):
            order += [Chunk("F", 0, rank, warm + m), Chunk("B", 0, rank, m)]
        order += [Chunk("B", 0, rank, m) for m in range(num_micro_batches - warm, num_micro_batches)]
        slots.append(_alone(order))
    return Schedule("1f1b", (tuple(range(num_ranks)),), tuple(slots))


def _interleaved(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """Rank r holds stages r, r + P, r + 2P ...; micro-batches go through in groups of P (arXiv 2104.04473, 2.2)."""
    total = num_micro_batches * stages_per_rank

    def chunk(part: Part, rank: int, i: int) -> Chunk:
        group, within = divmod(i, num_ranks * stages_per_rank)
        turn, member = divmod(within, num_ranks)
        turn = turn if part == "F" else stages_per_rank - 1 - turn
        return Chunk(part, 0, turn * num_ranks + rank, group * num_ranks + member)

    slots = []
    for rank in range(num_ranks):
        warm = min(total, 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks)
        order = [chunk("F", rank, i) for i in range(warm)]
        for i in range(total - warm):
            order += [chunk("F", rank, warm + i), chunk("B", rank, i)]
        order += [chunk("B", rank, i) for i in range(total - warm, total)]
        slots.append(_alone(order))
    stages = tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank))
    return Schedule("interleaved", (stages,), tuple(slots))


def _zb1p(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """ZB-H1: 1F1B's order of F and I; rank r holds back r weight gradients and fills its idle end with them."""
    slots = []
    for rank in range(num_ranks):
        warm = min(num_ranks - 1 - rank, num_micro_batches)
        order = [Chunk("F", 0, rank, m) for m in range(warm)]
        written = 0
        for m in range(num_micro_batches):
            if warm + m < num_micro_batches:
                order.append(Chunk("F", 0, rank, warm + m))
            order.append(Chunk("I", 0, rank, m))
            if m >= rank:
                order.append(Chunk("W", 0, rank, written))
                written += 1
        order += [Chunk("W", 0, rank, m) for m in range(written, num_micro_batches)]
        slots.append(_alone(order))
    return Schedule("zb1p", (tuple(range(num_ranks)),), tuple(slots))


def _zbv(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """ZB-V: rank r holds stages r and 2P - 1 - r, and at most 2P chunks' activations, as much as 1F1B.

    In equal steps of F, I and W, rank r runs the first stage's forwards until the first micro-batch is back, enters the
    pattern F I W F I W over both stages in turn, and ends in I's that the weight gradients follow.
    """
    stages = tuple(min(stage, 2 * num_ranks - 1 - stage) for stage in range(2 * num_ranks))
    # The pattern is that of a full pipeline; a shorter run is the same without the micro-batches that it lacks.
    full = max(num_micro_batches, 2 * num_ranks - 1)
    slots = []
    for rank in range(num_ranks):
        place, count = (rank, 2 * num_ranks - 1 - rank), Counter[tuple[Part, int]]()
        order = []
        for part, turn in _zbv_order(num_ranks, rank, full):
            micro_batch = count[part, turn]
            count[part, turn] += 1
            if micro_batch < num_micro_batches:
                order.append(Chunk(part, 0, place[turn], micro_batch))
        slots.append(_alone(order))
    return Schedule("zbv", (stages,), tuple(slots))


def _zbv_order(num_ranks: int, rank: int, num_micro_batches: int) -> list[tuple[Part, int]]:
    """Return the parts that a rank of ZB-V runs and on which of its two stages, for at least 2P - 1 micro-batches."""
    behind = num_ranks - rank  # ranks from here to the turn of the V, this one counted
    there: list[tuple[Part, int]] = [("F", 0), ("I", 0), ("W", 0)]
    back: list[tuple[Part, int]] = [("F", 1), ("I", 1), ("W", 1)]
    steady = num_micro_batches - (2 * num_ranks - 1 - rank)
    return [
        *[there[0]] * (2 * behind - 1),  # until the first micro-batch is back
        *[back[0], there[0]] * rank,
        *back * behind,  # gradients come back along the V
        *[*there, *back] * steady,
        *[*there[1:], *back] * (num_ranks - 1 - rank),  # no forward left to begin
        *[there[1], back[1]] * rank,
        *there[1:] * behind,
        *[back[2]] * rank,
        *[there[2]] * rank,
    ]


def _dualpipe(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """Half of the micro-batches enter at rank 0, half at the last; ranks of the second half mirror the first."""
    half, ways = num_ranks // 2, (tuple(range(num_ranks)), tuple(reversed(range(num_ranks))))
    slots = []
    for rank in range(num_ranks):
        near, mirrored = min(rank, num_ranks - 1 - rank), rank >= half
        phases = _dual_phases(half, near, num_micro_batches // 2)

        def place(direction: int, rank: int = rank, mirrored: bool = mirrored) -> tuple[int, int]:
            way = 1 - direction if mirrored else direction
            return way, ways[way].index(rank)

        slots.append(_numbered(phases, place))
    return Schedule("dualpipe", ways, tuple(slots))


def _dualpipev(num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """Rank r holds stages r and 2P - 1 - r of one way; what DualPipe's other direction is, is the way back."""
    way = tuple(min(stage, 2 * num_ranks - 1 - stage) for stage in range(2 * num_ranks))
    slots = []
    for rank in range(num_ranks):
        stages = (rank, 2 * num_ranks - 1 - rank)
        phases = _dual_phases(num_ranks, rank, num_micro_batches)
        slots.append(_numbered(phases, lambda direction, stages=stages: (0, stages[direction])))
    return Schedule("dualpipev", (way,), tuple(slots))


_Step = tuple[tuple[Part, int], ...]  # parts that run together, each with its direction, 0 or 1; W has none


def _dual_phases(half: int, near: int, per_direction: int) -> list[_Step]:
    """The eight phases of DualPipe for the rank that is ``near`` steps from its end, half - 1 in the middle."""
    inner = half - near - 1

    def alone(part: Part, direction: int = -1) -> _Step:
        return ((part, direction),)

    def pair(forward: int) -> _Step:
        return (("F", forward), ("B", 1 - forward))

    steady = [pair(0), pair(1)] * (per_direction - 2 * half + near + 1)
    if inner == 0:  # nothing to overlap with yet
        steady[:1] = [alone("F", 0), alone("B", 1)]
    last = [alone("B" if i <= near else "I", 1 - i % 2) for i in range(2 * (near + 1))]
    return [
        *[alone("F", 0)] * (2 * inner),  # 1
        *[alone("F", 0), alone("F", 1)] * (near + 1),  # 2
        *[alone("I", 1), alone("W"), alone("F", 1)] * inner,  # 3
        *steady,  # 4
        *[alone("B", 1), pair(1)] * inner,  # 5
        *last,  # 6
        *[alone("W"), alone("I", 0)] * inner,  # 7
        *[alone("W")] * (near + 1),  # 8
    ]


def _numbered(steps: list[_Step], place: Callable[[int], tuple[int, int]]) -> tuple[Slot, ...]:
    """Give each part its stage and its next micro-batch; weight gradients come first in, first out."""
    forward, backward, waiting = [0, 0], [0, 0], deque[tuple[int, int, int]]()
    slots: list[Slot] = []
    for step in steps:
        slot = []
        for part, direction in step:
            if part == "W":
                slot.append(Chunk("W", *waiting.popleft()))
                continue
            counter = forward if part == "F" else backward
            where = (*place(direction), counter[direction])
            counter[direction] += 1
            slot.append(Chunk(part, *where))
            if part == "I":
                waiting.append(where)
        slots.append(tuple(slot))
    return tuple(slots)


def _alone(order: list[Chunk]) -> tuple[Slot, ...]:
    return tuple((chunk,) for chunk in order)


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "1f1b": _one_f_one_b,
    "interleaved": _interleaved,
    "zb1p": _zb1p,
    "zbv": _zbv,
    "dualpipe": _dualpipe,
    "dualpipev": _dualpipev,
}
