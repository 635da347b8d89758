"""The fast cost of a schedule: against the simulation of every slot, and a longest path by repeated sweeps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.plan.pipeline import SCHEDULES, Chunk, Schedule, count_stages, make_schedule
from cofire.plan.pipeline_cost import schedule_cost, schedule_costs
from cofire.plan.timeline import ChunkTimes, simulate

seconds = st.floats(0.1, 3)


@st.composite
def cases(draw: st.DrawFn, most: int = 120) -> tuple[str, int, int, int, ChunkTimes]:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks, parts = draw(st.integers(1, 6)) * (2 if name == "dualpipe" else 1), draw(st.integers(1, 3))
    micro = {
        "interleaved": ranks * draw(st.integers(1, max(1, most // 6))),
        "dualpipe": 2 * ranks + 2 * draw(st.integers(0, most // 2)),
        "dualpipev": 2 * ranks + draw(st.integers(0, most)),
    }.get(name, draw(st.integers(1, most)))
    stages = count_stages(name, ranks, parts)
    per_stage = draw(st.booleans())

    def each(strategy: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(st.lists(strategy, min_size=stages, max_size=stages))) if per_stage else (draw(strategy),)

    forward, inputs, weight, hidden = each(seconds), each(seconds), each(st.floats(0, 2)), each(st.floats(0, 1))
    backward = tuple(i + w for i, w in zip(inputs, weight, strict=True))
    pair = tuple(f + b - h * min(f, b) for f, b, h in zip(forward, backward, hidden, strict=True))
    values = (forward, backward, weight, pair) if per_stage else (forward[0], backward[0], weight[0], pair[0])
    transfer_s = draw(st.sampled_from([0.0, 0.05, 0.4, 3.0]))
    return name, ranks, micro, parts, ChunkTimes(*values, transfer_s)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_fast_cost_is_that_of_every_slot_simulated(case: tuple[str, int, int, int, ChunkTimes]) -> None:
    name, ranks, micro, parts, times = case
    cost = schedule_cost(name, ranks, micro, times, parts)
    whole = simulate(make_schedule(name, ranks, micro, parts), times)
    assert cost.makespan_s == pytest.approx(whole.makespan_s, rel=1e-9)
    assert cost.bubble_s == pytest.approx(whole.bubble_s, rel=1e-9, abs=1e-9 * whole.makespan_s)
    assert cost.peak_activations == whole.peak_activations
    assert cost.peak_weight_gradients == whole.peak_weight_gradients


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_long_run_is_repeated_rather_than_run_and_still_exact(name: str) -> None:
    for transfer_s in (0.0, 0.3):
        times = ChunkTimes(1.1, 2.3, 0.9, 2.9, transfer_s)
        cost = schedule_cost(name, 4, 480, times)
        assert cost.simulated_micro_batches < 60
        assert cost.makespan_s == pytest.approx(simulate(make_schedule(name, 4, 480), times).makespan_s, rel=1e-12)


def test_a_near_tie_that_flips_late_is_not_missed() -> None:
    """The last stage is slower by a millionth: the pace is its own although the first periods do not show it."""
    times = ChunkTimes((1, 1, 1, 1 + 1e-6), (2, 2, 2, 2))
    whole = simulate(make_schedule("1f1b", 4, 500), times)
    assert schedule_cost("1f1b", 4, 500, times).makespan_s == pytest.approx(whole.makespan_s, rel=1e-12)


def longest_path(schedule: Schedule, times: ChunkTimes) -> float:
    """Raise every end until none is too early: slow, and without an order of events."""
    ends: dict[Chunk, float] = dict.fromkeys((c for order in schedule.slots for slot in order for c in slot), 0.0)

    def backward(chunk: Chunk) -> Chunk:
        return chunk._replace(part="I") if chunk._replace(part="I") in ends else chunk._replace(part="B")

    def ready(chunk: Chunk, rank: int) -> float:
        if chunk.part == "W":
            return ends[chunk._replace(part="I")]
        forward = chunk.part == "F"
        other = chunk._replace(stage=chunk.stage + (-1 if forward else 1))
        ranks = schedule.ranks[chunk.way]
        own = 0.0 if forward else ends[chunk._replace(part="F")]
        if not 0 <= other.stage < len(ranks):
            return own
        far = times.transfer_s if ranks[other.stage] != rank else 0.0
        return max(own, ends[other if forward else backward(other)] + far)

    changed = True
    while changed:
        changed = False
        for rank, order in enumerate(schedule.slots):
            free = 0.0
            for slot in order:
                free = max([free, *(ready(chunk, rank) for chunk in slot)]) + times.of(slot)
                if free > ends[slot[0]]:
                    changed = True
                    ends.update(dict.fromkeys(slot, free))
    return max(ends.values())


@settings(max_examples=40, deadline=None)
@given(cases(most=15))
def test_the_simulation_is_the_longest_path_through_what_waits_for_what(
    case: tuple[str, int, int, int, ChunkTimes],
) -> None:
    name, ranks, micro, parts, times = case
    schedule = make_schedule(name, ranks, micro, parts)
    assert simulate(schedule, times).makespan_s == pytest.approx(longest_path(schedule, times), rel=1e-12)


def test_many_times_at_once_cost_what_each_costs_alone() -> None:
    times = [ChunkTimes(1 + i / 7, 2, 0.5, None, i % 3 / 10) for i in range(70)]
    for each, cost in zip(times, schedule_costs("zbv", 4, 100, times), strict=True):
        alone = schedule_cost("zbv", 4, 100, each)
        assert cost.makespan_s == pytest.approx(alone.makespan_s, rel=1e-12)
        assert cost.exposed_transfer_s == pytest.approx(alone.exposed_transfer_s, abs=1e-9)
        assert cost.bubble_s == pytest.approx(alone.bubble_s, abs=1e-9)


def test_exposed_transfers_are_what_the_step_would_be_shorter_without_them() -> None:
    for name in sorted(SCHEDULES):
        times, still = ChunkTimes(1, 2, 1, None, 0.2), ChunkTimes(1, 2, 1)
        cost = schedule_cost(name, 4, 40, times)
        assert cost.exposed_transfer_s == pytest.approx(
            cost.makespan_s - simulate(make_schedule(name, 4, 40), still).makespan_s
        )
        assert cost.exposed_transfer_s > 0
        assert schedule_cost(name, 4, 40, still).exposed_transfer_s == 0


def test_numbers_that_a_schedule_cannot_take_are_refused_as_by_making_it() -> None:
    with pytest.raises(PlanError, match="nearest: 4 ranks, 500 micro-batches"):
        schedule_cost("dualpipe", 3, 500, ChunkTimes(1, 2))
    with pytest.raises(PlanError, match="multiple of the 4 ranks; nearest: 500"):
        schedule_cost("interleaved", 4, 501, ChunkTimes(1, 2))
    with pytest.raises(PlanError, match="even"):
        schedule_cost("dualpipe", 4, 501, ChunkTimes(1, 2))
    with pytest.raises(PlanError, match="known are 1f1b"):
        schedule_cost("gpipe", 4, 8, ChunkTimes(1, 2))
    with pytest.raises(PlanError, match="it has 8; nearest: 8"):
        schedule_cost("zbv", 4, 80, ChunkTimes((1, 1, 1, 1), 2))
