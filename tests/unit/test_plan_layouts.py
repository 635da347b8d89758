"""A search over layouts against estimates one by one: order, ties, processes, fixed axes and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import lru_cache

import pytest

from cofire.errors import PlanError
from cofire.plan.layouts import (
    SearchSpec,
    default_batch,
    describe,
    enumerate_layouts,
    neighbours,
    rank_layouts,
    with_batch,
)
from cofire.plan.step import StepEstimate, StepModel
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

SMALL = load_as(ModelSpec, "small")
NODE = load_as(ClusterSpec, "h100-8")
V3 = load_as(ModelSpec, "deepseek-v3")
H800 = load_as(ClusterSpec, "h800-2048")
WORK = WorkloadSpec(sequence_length=1024, global_batch_size=64)
# Every axis has a choice, some refused: a batch that does not divide, more stages than layers.
SPACE = SearchSpec(
    pp_max=8,
    tp=(1, 2),
    ep=(1, 8),
    micro_batch_size=(1, 16),
    schedule=("1f1b", "interleaved", "dualpipe"),
    recompute=("none", "full"),
    precision=("bf16",),
)


@lru_cache(maxsize=2)
def one_by_one(memory_bytes: float = NODE.device.memory_bytes) -> tuple[list[StepEstimate], Counter[str], int]:
    """Every layout estimated alone by a model of its own: those that fit in order, refusals, those too large."""
    cluster = NODE.model_copy(update={"device": NODE.device.model_copy(update={"memory_bytes": memory_bytes})})
    found, refused, large = [], Counter[str](), 0
    for layout in enumerate_layouts(SMALL, cluster, SPACE):
        try:
            step = StepModel(SMALL, cluster, WORK).estimate(layout)
        except PlanError as error:
            refused[str(error)] += 1
            continue
        large += not step.fits
        if step.fits:
            found.append(step)
    return sorted(found, key=lambda step: -step.tokens_per_s), refused, large


def rates(steps: tuple[StepEstimate, ...] | list[StepEstimate]) -> list[float]:
    return [step.tokens_per_s for step in steps]


def test_ranking_is_that_of_estimates_one_by_one() -> None:
    expected, refused, large = one_by_one()
    ranking = rank_layouts(SMALL, NODE, WORK, SPACE, limit=10_000)
    assert rates(ranking.best) == pytest.approx(rates(expected), rel=1e-12)
    assert {describe(step.layout) for step in ranking.best} == {describe(step.layout) for step in expected}
    assert {step.layout: step.peak_memory_bytes for step in ranking.best} == {
        step.layout: step.peak_memory_bytes for step in expected
    }
    assert ranking.num_considered == len(list(enumerate_layouts(SMALL, NODE, SPACE)))
    assert ranking.num_fitting == len(expected)
    assert sum(ranking.refused.values()) == sum(refused.values()) + large
    assert ranking.num_considered == ranking.num_fitting + sum(ranking.refused.values())
    assert refused, "the space should hold layouts that cannot run"


def test_memory_limit_drops_the_layouts_that_exceed_it_and_no_others() -> None:
    sizes = sorted(step.peak_memory_bytes for step in one_by_one()[0])
    limit = sizes[len(sizes) // 2]
    cluster = NODE.model_copy(update={"device": NODE.device.model_copy(update={"memory_bytes": limit})})
    ranking = rank_layouts(SMALL, cluster, WORK, SPACE, limit=10_000)
    assert sorted(step.peak_memory_bytes for step in ranking.best) == [size for size in sizes if size <= limit]
    assert ranking.refused["does not fit in memory"] == sum(size > limit for size in sizes)
    assert ranking.smallest_memory_bytes == sizes[0]


def test_two_processes_rank_as_one_does() -> None:
    # More layouts than one task of a worker has.
    space = SearchSpec(pp_max=8, tp=(1, 2), ep=(1, 2, 4, 8), precision=("bf16",), recompute=("none", "full"))
    seen: list[int] = []
    one = rank_layouts(SMALL, NODE, WORK, space, limit=40)
    two = rank_layouts(SMALL, NODE, WORK, space, limit=40, workers=2, progress=seen.append)
    assert one == two
    assert len(seen) > 1
    assert sum(seen) == one.num_considered


def test_layouts_as_fast_as_each_other_keep_the_order_in_which_they_are_tried() -> None:
    order = {layout: place for place, layout in enumerate(enumerate_layouts(SMALL, NODE, SPACE))}
    best = rank_layouts(SMALL, NODE, WORK, SPACE, limit=10_000).best
    assert rates(best) == sorted(rates(best), reverse=True)
    ties = 0
    for first, second in itertools.pairwise(best):
        if first.tokens_per_s == second.tokens_per_s:
            ties += 1
            assert order[first.layout] < order[second.layout]
    assert ties, "the space should hold ties"
    for limit in (1, 2, 5):
        assert rank_layouts(SMALL, NODE, WORK, SPACE, limit=limit).best == best[:limit]


def test_fixed_axes_stay_fixed_and_degrees_use_the_whole_cluster() -> None:
    fixed = {"pp": 2, "ep": 4, "schedule": "zb1p", "recompute": "full", "sequence_parallel": False}
    found = list(enumerate_layouts(SMALL, NODE, SPACE, fixed))
    assert {layout.tp for layout in found} == {1, 2}
    for layout in found:
        assert {name: getattr(layout, name) for name in fixed} == fixed
        assert layout.num_devices == NODE.num_devices
    for step in rank_layouts(SMALL, NODE, WORK, SPACE, fixed).best:
        assert {name: getattr(step.layout, name) for name in fixed} == fixed
    assert all(layout.dp == 4 for layout in enumerate_layouts(SMALL, NODE, SPACE, {"dp": 4}))


def test_every_layout_of_a_search_is_valid_and_none_comes_twice() -> None:
    for model, cluster, fixed in ((SMALL, NODE, {}), (V3, H800, {"tp": 1}), (V3, H800, {"micro_batch_size": 1})):
        found = list(enumerate_layouts(model, cluster, SearchSpec(), fixed))
        assert len(set(found)) == len(found)
        for layout in found[::97]:
            # They are built without validation.
            assert ParallelSpec.model_validate(layout.model_dump()) == layout
    dense = load_as(ModelSpec, "qwen2.5-72b")
    assert {layout.ep for layout in enumerate_layouts(dense, NODE, SPACE)} == {1}


def test_a_search_in_which_nothing_fits_says_what_comes_closest() -> None:
    with pytest.raises(PlanError) as caught:
        rank_layouts(V3, NODE, WORK, SearchSpec(micro_batch_size=(1,)), {"schedule": "1f1b"})
    text = str(caught.value)
    assert "\n" not in text
    assert "none of " in text
    assert "85.5 GB on a device; try cluster.num_nodes = " in text
    nodes = int(text.partition("cluster.num_nodes = ")[2].split()[0].rstrip(","))
    assert 2 <= nodes < 64


def test_a_batch_that_divides_by_no_layout_names_one_that_would() -> None:
    odd = WORK.model_copy(update={"global_batch_size": 63})
    with pytest.raises(PlanError, match=r"the batch does not divide: \d+.*; try workload.global_batch_size = 64"):
        rank_layouts(SMALL, NODE, odd, SearchSpec(pp=(1,), tp=(1,)))


def test_a_batch_that_nobody_gave_is_eight_sequences_per_device() -> None:
    assert default_batch(H800) == 8 * 2048
    assert with_batch(WorkloadSpec(), NODE).global_batch_size == 64
    assert with_batch(WORK, H800) is WORK


def test_ratios_of_neighbours_are_those_of_estimates_made_anew() -> None:
    layout = ParallelSpec(dp=8, ep=2, micro_batch_size=2)
    chosen = StepModel(SMALL, NODE, WORK).estimate(layout)
    near = {row.change: row for row in neighbours(StepModel(SMALL, NODE, WORK), chosen)}
    moved = {
        "pp 2": {"pp": 2, "dp": 4},
        "tp 2": {"tp": 2, "dp": 4},
        "ep 1": {"ep": 1},
        "ep 4": {"ep": 4},
        "micro-batch 1": {"micro_batch_size": 1},
        "micro-batch 4": {"micro_batch_size": 4},
        "selective recomputation": {"recompute": "selective"},
        "full recomputation": {"recompute": "full"},
        "fp8": {"precision": "fp8"},
    }
    assert set(near) == set(moved)
    for change, fields in moved.items():
        other = StepModel(SMALL, NODE, WORK).estimate(layout.model_copy(update=fields))
        row = near[change]
        assert row.step_ratio == pytest.approx(other.step_s / chosen.step_s, rel=1e-12), change
        grew = {part.name: part.time_s - chosen.part_s(part.name) for part in other.parts}
        extreme = max(grew.values()) if other.step_s >= chosen.step_s else min(grew.values())
        assert row.part is not None
        assert grew[row.part] == extreme


def test_no_neighbour_within_the_space_is_faster_than_the_winner() -> None:
    space = SearchSpec(precision=("bf16",), zero_stage=(1,))
    chosen = rank_layouts(SMALL, NODE, WORK, space, workers=1).best[0]
    for row in neighbours(StepModel(SMALL, NODE, WORK), chosen):
        inside = row.change != "fp8" and row.change not in ("micro-batch 8", "ep 256")
        if inside and row.step_ratio is not None:
            assert row.step_ratio >= 1 - 1e-12, row.change


def test_a_neighbour_that_does_not_fit_says_how_much_is_missing() -> None:
    layout = ParallelSpec(
        pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8", micro_batch_size=1
    )
    steps = StepModel(V3, H800, with_batch(WorkloadSpec(), H800))
    near = {row.change: row for row in neighbours(steps, steps.estimate(layout))}
    row = near["no recomputation"]
    other = steps.estimate(layout.model_copy(update={"recompute": "none"}))
    assert row.step_ratio is None
    assert not other.fits
    assert row.reason.startswith(f"does not fit: {other.peak_memory_bytes / 1e9:.3g} GB of 85.5 GB on rank")
    assert near["ep 32"].step_ratio is not None


def test_a_layout_is_described_by_what_differs_from_the_default() -> None:
    plain = ParallelSpec(pp=1, dp=8)
    assert describe(plain) == "pp 1, dp 8, ep 1, tp 1, bf16"
    full = ParallelSpec(
        pp=2, dp=4, ep=2, micro_batch_size=2, schedule="interleaved", stages_per_rank=4, recompute="full", zero_stage=3
    )
    assert describe(full) == "pp 2, dp 4, ep 2, tp 1, micro-batch 2, interleaved x 4, full recomputation, ZeRO 3, bf16"
