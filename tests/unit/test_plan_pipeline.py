"""Pipeline schedules and their simulation: against the papers' formulas, published rows and invariants."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.cli.main import main
from cofire.errors import PlanError
from cofire.plan.pipeline import SCHEDULES, Schedule, count_stages, make_schedule
from cofire.plan.timeline import ChunkTimes, bubble_formula_s, share_times, simulate, trace_events


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks, stages = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    if name == "dualpipe":
        ranks = 2 * draw(st.integers(1, 4))
    micro = {
        "interleaved": ranks * draw(st.integers(1, 4)),
        "dualpipe": 2 * ranks + 2 * draw(st.integers(0, 5)),
        "dualpipev": 2 * ranks + draw(st.integers(0, 5)),
    }.get(name, draw(st.integers(1, 20)))
    return make_schedule(name, ranks, micro, stages)


times = st.builds(
    lambda f, i, w, share, transfer: ChunkTimes(f, i + w, w, max(f, i + w) + share * min(f, i + w), transfer),
    st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 2), st.floats(0, 1), st.sampled_from([0.0, 0.25]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_chunk_runs_once_on_its_own_rank_and_weight_gradients_are_complete(schedule: Schedule) -> None:
    seen = Counter(chunk for order in schedule.slots for slot in order for chunk in slot)
    assert set(seen.values()) == {1}
    forward = {chunk for chunk in seen if chunk.part == "F"}
    backward = {chunk._replace(part="F") for chunk in seen if chunk.part in "BI"}
    assert forward == backward
    assert sum(chunk.part in "BI" for chunk in seen) == len(forward)
    split = {chunk._replace(part="W") for chunk in seen if chunk.part == "I"}
    assert split == {chunk for chunk in seen if chunk.part == "W"}
    for rank, order in enumerate(schedule.slots):
        assert all(schedule.ranks[chunk.way][chunk.stage] == rank for slot in order for chunk in slot)


@settings(max_examples=60, deadline=None)
@given(schedules(), times)
def test_no_rank_does_two_things_at_once_and_nothing_starts_before_what_it_needs(
    schedule: Schedule, each: ChunkTimes
) -> None:
    timeline = simulate(schedule, each)
    ends = {chunk: span.end_s for span in timeline.spans for chunk in span.slot}
    starts = {chunk: (span.start_s, span.rank) for span in timeline.spans for chunk in span.slot}
    free = [0.0] * schedule.num_ranks
    for span in timeline.spans:
        assert span.start_s >= free[span.rank]
        free[span.rank] = span.end_s

    def end_of_backward(chunk) -> float:
        return ends.get(chunk._replace(part="B"), ends.get(chunk._replace(part="I"), float("nan")))

    for chunk, (start, rank) in starts.items():
        if chunk.part == "W":
            assert start >= end_of_backward(chunk)
            continue
        near = chunk.stage + (-1 if chunk.part == "F" else 1)
        stages = schedule.ranks[chunk.way]
        if 0 <= near < len(stages):
            other = chunk._replace(stage=near)
            end = ends[other] if chunk.part == "F" else end_of_backward(other)
            assert start >= end + (each.transfer_s if stages[near] != rank else 0)
        if chunk.part in "BI":
            assert start >= ends[chunk._replace(part="F")]
    assert timeline.makespan_s == max(free)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("each", [ChunkTimes(1, 2), ChunkTimes(1, 1), ChunkTimes(3, 1)])
def test_1f1b_and_interleaving_have_their_formulas_bubble(ranks: int, each: ChunkTimes) -> None:
    for name, stages in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3)):
        schedule = make_schedule(name, ranks, 3 * ranks, stages)
        assert simulate(schedule, each).bubble_s == pytest.approx([bubble_formula_s(schedule, each)] * ranks)


def test_interleaving_of_one_stage_is_1f1b_with_more_in_flight() -> None:
    one, other = make_schedule("interleaved", 4, 8, 1), make_schedule("1f1b", 4, 8)
    assert simulate(one, ChunkTimes(1, 2)).makespan_s == simulate(other, ChunkTimes(1, 2)).makespan_s


@pytest.mark.parametrize(
    ("ranks", "plain", "split", "dual"), [(4, 9, 3, 2), (8, 21, 7, 6), (16, 45, 15, 14), (32, 93, 31, 30)]
)
def test_the_bubble_table_of_deepseek_v3_is_simulated_and_computed(
    ranks: int, plain: int, split: int, dual: int
) -> None:
    """A.7: F, B, W, F&B = 1, 2, 1, 3."""
    each = ChunkTimes(1, 2, 1, 3)
    for name, bubble in (("1f1b", plain), ("zb1p", split), ("dualpipe", dual)):
        schedule = make_schedule(name, ranks, 3 * ranks)
        assert bubble_formula_s(schedule, each) == bubble
        assert max(simulate(schedule, each).bubble_s) == bubble, name


@pytest.mark.parametrize(
    ("name", "ranks", "micro", "each", "makespan", "bubble", "peak"),
    [
        ("dualpipe", 8, 20, ChunkTimes(1, 2, 1, 3), 66, 6, 9),
        ("dualpipe", 8, 32, ChunkTimes(1, 2, 1, 3), 102, 6, 9),
        ("dualpipe", 8, 16, ChunkTimes(1, 2, 1, 3), 54, 6, 9),
        ("dualpipe", 4, 10, ChunkTimes(1, 2, 1, 3), 32, 2, 5),
        ("dualpipe", 16, 64, ChunkTimes(1, 2, 1, 3), 206, 14, 17),
        ("dualpipe", 2, 8, ChunkTimes(1, 2, 1, 3), 24, 0, 3),
        ("dualpipe", 8, 20, ChunkTimes(1, 1.5, 0.5, 2.5), 57.5, 7.5, 9),
        ("dualpipe", 8, 20, ChunkTimes(1, 2, 0.5, 3), 69.5, 9.5, 9),
        ("dualpipe", 8, 20, ChunkTimes(1.5, 2, 1, 3.5), 79, 9, 9),
        ("dualpipev", 4, 10, ChunkTimes(1, 2, 1, 3), 66, 6, 9),
        ("1f1b", 8, 20, ChunkTimes(1, 2, 1, 3), 81, 21, 8),
    ],
)
def test_simulated_schedules_have_the_published_makespans(
    name: str, ranks: int, micro: int, each: ChunkTimes, makespan: float, bubble: float, peak: int
) -> None:
    timeline = simulate(make_schedule(name, ranks, micro), each)
    assert timeline.makespan_s == pytest.approx(makespan)
    assert max(timeline.bubble_s) == pytest.approx(bubble)
    assert max(timeline.peak_activations) == peak


def test_1f1b_holds_one_activation_less_on_each_rank() -> None:
    assert simulate(make_schedule("1f1b", 8, 20), ChunkTimes(1, 2)).peak_activations == (8, 7, 6, 5, 4, 3, 2, 1)


@pytest.mark.parametrize(
    ("name", "stages"), [("1f1b", 1), ("interleaved", 3), ("zb1p", 1), ("zbv", 2), ("dualpipe", 2), ("dualpipev", 2)]
)
def test_a_rank_holds_as_many_stages_as_the_schedule_copies(name: str, stages: int) -> None:
    schedule = make_schedule(name, 4, 12, 3)
    assert schedule.stages_per_rank == stages
    assert count_stages(name, 4, 3) == len(schedule.ranks[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 4, 8), "known are 1f1b"),
        (("interleaved", 4, 10), "nearest: 8"),
        (("dualpipe", 3, 8), "nearest: 4 ranks, 8 micro-batches"),
        (("dualpipe", 4, 6), "nearest: 4 ranks, 8 micro-batches"),
        (("dualpipev", 4, 7), "nearest: 8"),
        (("1f1b", 0, 7), "at least 1"),
    ],
)
def test_numbers_that_a_schedule_cannot_take_name_the_nearest_that_it_can(arguments: tuple, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_schedule(*arguments)


def test_a_schedule_that_waits_for_ever_is_an_error() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    reversed_slots = (schedule.slots[0][::-1], schedule.slots[1])
    with pytest.raises(PlanError, match="waits for ever"):
        simulate(Schedule("1f1b", schedule.ranks, reversed_slots), ChunkTimes(1, 2))


def test_a_comparison_gives_every_rank_the_same_work_and_says_what_does_not_fit(capsys) -> None:
    assert main(["plan", "pipeline", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(SCHEDULES)
    assert "nearest: 16" in rows.pop("interleaved")["unfit"]
    assert all(row["makespan_s"] - row["bubble_s"] == pytest.approx(20 * 3) for row in rows.values())
    assert rows["dualpipe"]["bubble_s"] == 6
    assert rows["dualpipe"]["formula_s"] == 6


def test_the_command_draws_a_schedule_and_writes_its_trace(capsys, tmp_path) -> None:
    words = ["plan", "pipeline", "1f1b", "--set", "num_ranks=2", "--set", "num_micro_batches=2"]
    assert main([*words, "--trace", str(tmp_path / "trace.json")]) == 0
    rows = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("rank")]
    assert [re.sub(r"(.)\1*", r"\1", row) for row in rows] == ["F.B.B", ".FBFB."]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gpipe"], "known are 1f1b"),
        (["--set", "num_rank=3"], "nearest: num_ranks"),
        (["--set", "weight_s=9"], "weight_s = 9"),
        (["dualpipe", "--set", "num_ranks=3"], "nearest: 4 ranks"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], line: str, capsys) -> None:
    assert main(["plan", "pipeline", *words]) == 2
    assert line in capsys.readouterr().err


def test_a_models_name_alone_is_the_command_model(capsys) -> None:
    outputs = []
    for words in (["plan", "tiny", "--json"], ["plan", "--json", "tiny"], ["plan", "model", "tiny", "--json"]):
        assert main(words) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_trace_has_every_slot_in_microseconds() -> None:
    timeline = simulate(make_schedule("dualpipe", 4, 10), ChunkTimes(1e-3, 2e-3, 1e-3, 3e-3))
    events = json.loads(json.dumps(trace_events(timeline)))
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline.spans)
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(timeline.makespan_s * 1e6)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {f"rank {r}" for r in range(4)}


# -- ZB-V ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_zbv_never_idles_between_its_first_and_last_chunk_where_f_i_and_w_are_equal(ranks: int) -> None:
    """Section 6 of arXiv 2401.10241; rank r begins r forward chunks late, so each waits P - 1 of them in all."""
    for micro in (2 * ranks - 1, 2 * ranks, 3 * ranks + 1):
        schedule, each = make_schedule("zbv", ranks, micro), ChunkTimes(1, 2, 1)
        timeline = simulate(schedule, each)
        for rank in range(ranks):
            own = [span for span in timeline.spans if span.rank == rank]
            assert own[0].start_s == rank
            assert own[-1].end_s - own[0].start_s == 6 * micro  # two stages of F, I and W
        assert timeline.bubble_s == (ranks - 1,) * ranks == (bubble_formula_s(schedule, each),) * ranks


@given(st.integers(1, 12), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_zbv_holds_no_more_activations_than_1f1b_for_any_number_of_micro_batches(ranks: int, micro: int) -> None:
    schedule = make_schedule("zbv", ranks, micro)
    peaks = simulate(schedule, ChunkTimes(1, 2, 1)).peak_activations
    assert max(peaks) / schedule.chunks_per_pass <= max(simulate(make_schedule("1f1b", ranks, micro), ChunkTimes(1, 2))
                                                        .peak_activations)  # fmt: skip
    assert {chunk.micro_batch for order in schedule.slots for (chunk,) in order} == set(range(micro))


# -- formulas -----------------------------------------------------------------------------------------


@given(st.sampled_from(["zb1p", "dualpipe", "dualpipev"]), st.integers(1, 4), st.floats(0.1, 2), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_split_backward_formulas_hold_where_i_equals_f_and_w_is_no_longer(
    name: str, half: int, forward_s: float, share: float
) -> None:
    each = ChunkTimes(forward_s, forward_s * (1 + share), forward_s * share)
    schedule = make_schedule(name, 2 * half, 4 * half + 2)
    assert max(simulate(schedule, each).bubble_s) == pytest.approx(bubble_formula_s(schedule, each), abs=1e-9)


def test_the_comparison_says_row_by_row_where_formula_and_simulation_disagree(capsys) -> None:
    assert main(["plan", "pipeline"]) == 0
    assert "its formula:" not in capsys.readouterr().out
    assert main(["plan", "pipeline", "--set", "weight_s=0.5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "its formula:" in line]
    dual = next(line for line in lines if line.startswith("dualpipe:"))
    assert dual == (
        "dualpipe: the bubble is 1 below its formula: backward_s - weight_s is 1.5, not forward_s = 1"
    )  # A.7: 9.5 simulated, 10.5 by formula
    assert not any(line.startswith("1f1b") for line in lines)


# -- stages that differ -------------------------------------------------------------------------------


def test_a_bottleneck_stage_sets_the_pace_of_1f1b() -> None:
    """Three equal stages and a head twice as long: M of the longest, and the others once on the way and back."""
    each = ChunkTimes((1, 1, 1, 2), (2, 2, 2, 4))
    timeline = simulate(make_schedule("1f1b", 4, 20), each)
    assert timeline.makespan_s == 20 * 6 + 3 * 3
    assert timeline.bubble_s == (69, 69, 69, 9)


def test_equal_times_by_stage_are_the_same_as_one_time() -> None:
    for name in ("1f1b", "zbv", "dualpipe", "dualpipev"):
        stages = count_stages(name, 4)
        schedule, one = make_schedule(name, 4, 10), ChunkTimes(1, 2.5, 0.7, 3, 0.1)
        many = ChunkTimes([1] * stages, [2.5] * stages, [0.7] * stages, [3] * stages, 0.1)
        assert simulate(schedule, many) == simulate(schedule, one)


def test_a_pair_of_unlike_stages_hides_what_the_lesser_can() -> None:
    each = ChunkTimes((1, 0.1), (2, 0.1), 0, (2, 0.1))
    assert each.pair_s(0, 0) == 2
    assert each.pair_s(1, 0) == pytest.approx(2.0)  # not below its longer half
    assert each.pair_s(0, 1) == pytest.approx(1.0)


def test_times_for_other_numbers_of_stages_are_refused_by_number() -> None:
    with pytest.raises(PlanError, match="times for 3 stages, but it has 4; nearest: 4"):
        simulate(make_schedule("1f1b", 4, 8), ChunkTimes((1, 1, 1), 2))
    with pytest.raises(PlanError, match="2 and 3 stages"):
        ChunkTimes((1, 1, 1), (2, 2))
    with pytest.raises(PlanError, match="weight_s = 3"):
        ChunkTimes((1, 1), (2, 4), 3)
    with pytest.raises(PlanError, match="of chunks already"):
        share_times(make_schedule("zbv", 2, 4), ChunkTimes((1, 1, 1, 1), 2))
