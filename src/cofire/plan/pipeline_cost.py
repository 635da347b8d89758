"""What a pipeline schedule costs, fast enough for a search over layouts: makespan, bubbles, peaks, exposed transfers.

The numbers are those of ``cofire.plan.timeline.simulate``. In its middle a schedule repeats a period: each rank runs
the same slots for the next micro-batches. So a schedule of any length is a head, a number of periods and a tail. They
are compiled once per name and number of ranks into layers of slots that wait only for earlier layers, and numpy runs a
layer for many chunk times at once. End times are (max, +)-linear in those that they wait for: as soon as all those
within reach lie later than q periods before by one and the same span, they will so q periods on, and the rest of the
middle is a multiplication. q is above one where transfers bind. Where no such q shows, the middle is run to its end.

Left out: the spans; :func:`cofire.plan.timeline.simulate` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError
from cofire.plan.pipeline import Chunk, Schedule, Slot, check_numbers, count_stages, make_schedule
from cofire.plan.timeline import ChunkTimes, check_stages, peak_held, slot_needs, slot_results

_SAME = 1e-13  # spans that differ by less, of the time so far, are the same: 512 periods later it is still 1e-10
_AT_ONCE = 64  # times; more only cost memory
_At = tuple[int, int]  # rank and index of a slot


@dataclass(frozen=True)
class PipelineCost:
    """A schedule's cost with given chunk times.

    Attributes:
        makespan_s: From the first start to the last end.
        bubble_s: Idle time of each rank within the makespan.
        peak_activations: Most chunks of each rank between the start of F and the end of B or I.
        peak_weight_gradients: Most chunks of each rank between I and W.
        exposed_transfer_s: By how much transfers lengthen the makespan.
        simulated_micro_batches: How many were run; the others repeat them.
    """

    makespan_s: float
    bubble_s: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_weight_gradients: tuple[int, ...]
    exposed_transfer_s: float
    simulated_micro_batches: int

    @property
    def bubble_s_max(self) -> float:
        """Of the rank that idles longest."""
        return max(self.bubble_s)

    @property
    def bubble_fraction(self) -> float:
        """The largest share of the makespan that a rank is idle."""
        return self.bubble_s_max / self.makespan_s if self.makespan_s else 0.0


def schedule_cost(
    name: str, num_ranks: int, num_micro_batches: int, times: ChunkTimes, stages_per_rank: int = 2
) -> PipelineCost:
    """Return what a schedule costs; see :func:`schedule_costs`, which is faster for many times at once."""
    return schedule_costs(name, num_ranks, num_micro_batches, [times], stages_per_rank)[0]


def schedule_costs(
    name: str, num_ranks: int, num_micro_batches: int, times: Sequence[ChunkTimes], stages_per_rank: int = 2
) -> list[PipelineCost]:
    """Return what a schedule costs with each of several chunk times.

    Args:
        name: One of :data:`cofire.plan.pipeline.SCHEDULES`.
        num_ranks: Pipeline ranks.
        num_micro_batches: Of an optimiser step.
        times: Of one chunk, not of a rank's whole share; by stage, as many as
            :func:`cofire.plan.pipeline.count_stages` says.
        stages_per_rank: For ``interleaved``.

    Raises:
        PlanError: The name is unknown, the numbers break the schedule's rule, or the times are for other stages.
    """
    check_numbers(name, num_ranks, num_micro_batches, stages_per_rank)
    for each in times:
        check_stages(name, count_stages(name, num_ranks, stages_per_rank), each)
    step = _micro_batches_per_period(name, num_ranks)
    found: dict[int, PipelineCost] = {}
    for periods in (num_ranks + 4, 4 * num_ranks + 8, None):
        open_ones = [i for i in range(len(times)) if i not in found]
        if not open_ones:
            break
        program = None if periods is None else _program(name, num_ranks, stages_per_rank, step, periods)
        if program is None or num_micro_batches < program.shortest:
            program = _whole(name, num_ranks, num_micro_batches, stages_per_rank)
        for start in range(0, len(open_ones), _AT_ONCE):
            some = open_ones[start : start + _AT_ONCE]
            costs = _run(program, num_micro_batches, [times[i] for i in some])
            found |= {i: cost for i, cost in zip(some, costs, strict=True) if cost is not None}
    return [found[i] for i in range(len(times))]


def _micro_batches_per_period(name: str, num_ranks: int) -> int:
    return {"interleaved": num_ranks, "dualpipe": 2}.get(name, 1)


# -- a schedule as arrays ----------------------------------------------------------------------------


class _Layer(NamedTuple):
    """Slots from ``first`` to ``last`` of a part: what they wait for, [waits, slots], and what of it is transferred."""

    first: int
    last: int
    waits: NDArray[np.intp]
    moved: NDArray[np.float64]


@dataclass(frozen=True)
class _Part:
    """Slots in layers. Row 0 of a part's ends is time zero, rows 1 to ``num_given`` are given, then come its slots."""

    num_given: int
    layers: tuple[_Layer, ...]
    keys: NDArray[np.intp]  # of each slot, into the program's samples
    row: dict[_At, int]

    @property
    def num_rows(self) -> int:
        """Rows of the ends."""
        return 1 + self.num_given + len(self.keys)


@dataclass(frozen=True)
class _Program:
    """A schedule as head and middle (``before``) and tail (``after``).

    Attributes:
        longest: Micro-batches with all the periods of ``before``.
        periods: How many those are.
        step: Micro-batches per period.
        samples: A slot of each combination of parts and stages.
        kinds: For each sample, the first one with the same parts.
        counts: Slots of each sample on each rank at ``longest``, [ranks, samples].
        period_counts: Those of a period.
        before: The slots up to the end of the middle.
        reach: Rows of ``before`` that the tail waits for, with those of the same slots one period earlier and so on,
            [periods + 1, rows].
        after: The tail; what is given to it is ``reach``.
        last: Rows of the ranks' last slots, in ``after``.
        peaks: Activations and weight gradients by rank.
    """

    longest: int
    periods: int
    step: int
    samples: tuple[Slot, ...]
    kinds: NDArray[np.intp]
    counts: NDArray[np.float64]
    period_counts: NDArray[np.float64]
    before: _Part
    reach: NDArray[np.intp]
    after: _Part
    last: NDArray[np.intp]
    peaks: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def shortest(self) -> int:
        """The fewest micro-batches that it stands for: the pipeline has to fill up before a middle means anything."""
        return max(self.longest - self.step * self.periods, 2 * self.counts.shape[0])


class _Middle(NamedTuple):
    """Where the repeating slots of each rank end, how many make a period, and how many periods there are."""

    cuts: tuple[int, ...]
    size: int
    periods: int
    longest: int
    step: int


@lru_cache(maxsize=256)
def _program(name: str, num_ranks: int, stages_per_rank: int, step: int, periods: int) -> _Program | None:
    """Compile a schedule with at least that many periods on each rank; none where it has no repeating middle."""
    wanted = max(2, periods // step) if step == num_ranks else periods
    micro = step * (2 * num_ranks // step + 2 + wanted)
    schedule = make_schedule(name, num_ranks, micro, stages_per_rank)
    longer = make_schedule(name, num_ranks, micro + step, stages_per_rank)
    shift = step // len(schedule.ranks)
    lengths = {len(b) - len(a) for a, b in zip(schedule.slots, longer.slots, strict=True)}
    if len(lengths) != 1:
        return None
    size = lengths.pop()
    cuts, spare = [], []
    for order, more in zip(schedule.slots, longer.slots, strict=True):
        cut = _agree(order, more)
        moved = [tuple(c._replace(micro_batch=c.micro_batch + shift) for c in slot) for slot in reversed(order)]
        cuts.append(cut)
        spare.append((cut - (len(order) - _agree(moved, more[::-1]))) // size)
    needs = _needs_by_place(schedule)
    _close(cuts, spare, needs, size)
    if min(spare) < 1:
        return None
    return _compile(schedule, needs, _Middle(tuple(cuts), size, min(spare), micro, step))


def _agree(one: Sequence[Slot], other: Sequence[Slot]) -> int:
    """Return how many first slots are equal."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _close(cuts: list[int], spare: list[int], needs: list[list[list[tuple[_At, bool]]]], size: int) -> None:
    """Move cuts back by periods until nothing before them waits for something after them."""
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(needs):
            while any(
                at[1] >= cuts[at[0]] for waits in order[max(0, cuts[rank] - size) : cuts[rank]] for at, _ in waits
            ):
                cuts[rank] -= size
                spare[rank] -= 1
                moved = True
                if cuts[rank] <= 0:
                    return


def _needs_by_place(schedule: Schedule) -> list[list[list[tuple[_At, bool]]]]:
    """For each slot of each rank: the slots that it waits for, the one before it included, and whether by transfer."""
    place: dict[Chunk, _At] = {}
    for rank, order in enumerate(schedule.slots):
        for index, slot in enumerate(order):
            place.update(dict.fromkeys(slot_results(slot), (rank, index)))
    table = []
    for rank, order in enumerate(schedule.slots):
        row = []
        for index, slot in enumerate(order):
            waits: list[tuple[_At, bool]] = [((rank, index - 1), False)] if index else []
            for chunk, moved in slot_needs(schedule, slot, rank):
                at = place[chunk]
                if at[0] != rank:
                    waits.append((at, moved))
                elif at[1] >= index:
                    raise PlanError(f"{schedule.name}: rank {rank} waits for ever at {slot}")
            row.append(waits)
        table.append(row)
    return table


@lru_cache(maxsize=256)
def _whole(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> _Program:
    """Compile a schedule as it is, without a repeating middle."""
    schedule = make_schedule(name, num_ranks, num_micro_batches, stages_per_rank)
    middle = _Middle((0,) * num_ranks, 0, 0, num_micro_batches, num_micro_batches)
    return _compile(schedule, _needs_by_place(schedule), middle)


def _compile(schedule: Schedule, needs: list[list[list[tuple[_At, bool]]]], middle: _Middle) -> _Program:
    """Cut a schedule in two, and lay out both parts."""
    cuts, size = middle.cuts, middle.size
    window = _window(needs, middle)
    periods = middle.periods
    if size:  # as far back as there are slots
        periods = min([periods, *(index // size for _, index in window)])
    samples: dict[tuple[tuple[str, int], ...], int] = {}
    keys = [
        [samples.setdefault(tuple((c.part, c.stage) for c in slot), len(samples)) for slot in order]
        for order in schedule.slots
    ]
    slot_of = {
        key: slot for order, row in zip(schedule.slots, keys, strict=True) for slot, key in zip(order, row, strict=True)
    }
    kinds: dict[str, int] = {}
    first = [kinds.setdefault("".join(c.part for c in slot_of[key]), key) for key in range(len(samples))]
    ranks = range(schedule.num_ranks)
    before = _part([(r, i) for r in ranks for i in range(cuts[r])], needs, keys, ())
    after = _part([(r, i) for r in ranks for i in range(cuts[r], len(needs[r]))], needs, keys, window)
    reach = [[before.row[r, i - k * size] for r, i in window] for k in range(periods + 1)]

    def count(bounds: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        rows = [np.bincount(keys[r][a:b], minlength=len(samples)) for r, (a, b) in enumerate(bounds)]
        return np.array(rows, dtype=np.float64)

    return _Program(
        longest=middle.longest,
        periods=periods,
        step=middle.step,
        samples=tuple(slot_of[key] for key in range(len(samples))),
        kinds=np.array(first),
        counts=count([(0, len(row)) for row in keys]),
        period_counts=count([(cut - size, cut) for cut in cuts]),
        before=before,
        reach=np.array(reach, dtype=np.intp).reshape(periods + 1, len(window)),
        after=after,
        last=np.array([after.row[r, len(needs[r]) - 1] for r in ranks]),
        peaks=(
            tuple(peak_held(order, opens="F", closes="BI") for order in schedule.slots),
            tuple(peak_held(order, opens="I", closes="W") for order in schedule.slots),
        ),
    )


def _window(needs: list[list[list[tuple[_At, bool]]]], middle: _Middle) -> tuple[_At, ...]:
    """Return the slots before the cuts that the tail, or one more period in front of it, waits for."""
    cuts = middle.cuts
    reach = [min(1, cut) for cut in cuts]
    for rank, order in enumerate(needs):
        for index in range(cuts[rank] - middle.size, len(order)):
            offset = middle.size if index < cuts[rank] else 0  # one more period waits as the last one does
            for (other, at), _ in order[index]:
                reach[other] = max(reach[other], cuts[other] - offset - at)
    return tuple((rank, index) for rank, cut in enumerate(cuts) for index in range(cut - reach[rank], cut))


def _part(
    places: list[_At],
    needs: list[list[list[tuple[_At, bool]]]],
    keys: list[list[int]],
    given: tuple[_At, ...],
) -> _Part:
    """Sort slots into layers, each as early as what it waits for allows."""
    row = {at: 1 + i for i, at in enumerate(given)}
    inside, waiters, open_waits = set(places), dict[_At, list[_At]](), dict[_At, int]()
    for at in places:
        waits = [other for other, _ in needs[at[0]][at[1]] if other in inside]
        open_waits[at] = len(waits)
        for other in waits:
            waiters.setdefault(other, []).append(at)
    layer = [at for at in places if not open_waits[at]]
    layers, order, base = [], [], 1 + len(given)
    while layer:
        width = max(1, *(len(needs[r][i]) for r, i in layer)) if layer else 1
        waits, moved = np.zeros((width, len(layer)), dtype=np.intp), np.zeros((width, len(layer)))
        for column, (r, i) in enumerate(layer):
            for line, (other, far) in enumerate(needs[r][i]):
                waits[line, column], moved[line, column] = row[other], far
        first = base + len(order)
        row.update({at: first + column for column, at in enumerate(layer)})
        order += layer
        layers.append(_Layer(first, first + len(layer), waits, moved))
        following = []
        for at in layer:
            for other in waiters.get(at, ()):
                open_waits[other] -= 1
                if not open_waits[other]:
                    following.append(other)
        layer = following
    if len(order) < len(places):
        rank, index = min(inside - set(order))
        raise PlanError(f"rank {rank} of the schedule waits for ever at its slot {index}")
    return _Part(len(given), tuple(layers), np.array([keys[r][i] for r, i in order], dtype=np.intp), row)


# -- running it ---------------------------------------------------------------------------------------


def _run(program: _Program, num_micro_batches: int, times: list[ChunkTimes]) -> list[PipelineCost | None]:
    """Run a program; none for times whose middle does not settle within it."""
    moving = [i for i, each in enumerate(times) if each.transfer_s]
    transfer = np.array([each.transfer_s for each in times] + [0.0] * len(moving))
    table = _durations(program, [*times, *(times[i] for i in moving)])
    extra = (num_micro_batches - program.longest) // program.step
    ends = _advance(program.before, table, transfer, np.zeros((0, len(transfer))))
    given, settled = _given(program, ends, extra)
    makespan = _advance(program.after, table, transfer, given)[program.last].max(axis=0)
    bubble = makespan - (program.counts + extra * program.period_counts) @ table
    costs: list[PipelineCost | None] = []
    for i, each in enumerate(times):
        still = len(times) + moving.index(i) if each.transfer_s else i
        if not settled[i] or not settled[still]:
            costs.append(None)
            continue
        costs.append(
            PipelineCost(
                makespan_s=float(makespan[i]),
                bubble_s=tuple(bubble[:, i].tolist()),
                peak_activations=program.peaks[0],
                peak_weight_gradients=program.peaks[1],
                exposed_transfer_s=float(makespan[i] - makespan[still]),
                simulated_micro_batches=min(num_micro_batches, program.longest),
            )
        )
    return costs


def _durations(program: _Program, times: list[ChunkTimes]) -> NDArray[np.float64]:
    """Return the seconds of each sample with each of the times, [samples, times]."""
    table = np.empty((len(program.samples), len(times)))
    kinds = sorted(set(program.kinds.tolist()))
    for column, each in enumerate(times):
        if each.num_stages is None:
            table[kinds, column] = [each.of(program.samples[kind]) for kind in kinds]
            table[:, column] = table[program.kinds, column]
        else:
            table[:, column] = [each.of(sample) for sample in program.samples]
    return table


def _given(program: _Program, ends: NDArray[np.float64], extra: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the ends that the tail waits for, ``extra`` periods on (or back, below zero), and for which times."""
    if extra <= 0:
        return ends[program.reach[-extra]], np.ones(ends.shape[1], dtype=bool)
    reached = ends[program.reach]
    later = reached[:1] - reached[1:]  # than 1, 2, ... periods before: [periods, rows, times]
    same = np.ptp(later, axis=1) <= _SAME * reached[0].max(axis=0)
    settled, cycle = same.any(axis=0), same.argmax(axis=0) + 1
    jumps = -(-extra // cycle)
    columns = np.arange(ends.shape[1])
    span = later[cycle - 1, :, columns].mean(axis=1)
    return (reached[jumps * cycle - extra, :, columns] + (jumps * span)[:, None]).T, settled


def _advance(
    part: _Part, table: NDArray[np.float64], transfer: NDArray[np.float64], given: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the ends of a part's rows, [rows, times]."""
    count, moving = table.shape[1], bool(transfer.any())
    ends = np.zeros((part.num_rows, count))
    ends[1 : 1 + part.num_given] = given
    took = table[part.keys]
    if count == 1:  # flat arrays are faster
        flat, took, delay = ends[:, 0], took[:, 0], float(transfer[0])
    else:
        flat, delay = ends, transfer
    base = 1 + part.num_given
    for first, last, waits, moved in part.layers:
        ready = flat.take(waits, axis=0)
        if moving:
            ready += moved * delay if count == 1 else moved[..., None] * delay
        np.add(np.maximum.reduce(ready, axis=0), took[first - base : last - base], out=flat[first:last])
    return ends
