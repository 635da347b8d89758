"""A plan's page against the plan: what adds up, what is drawn, and that each number is the planner's."""

from __future__ import annotations

import itertools
import math
from functools import cache
from xml.etree import ElementTree

import pytest

from cofire.network.builders import build_network
from cofire.plan import Plan, estimate
from cofire.plan.flops import training_flops_per_token
from cofire.plan.page import render_page
from cofire.plan.page.figures import (
    ErrorTable,
    FormulaList,
    GroupedTopology,
    Item,
    LayeredTopology,
    MemoryStack,
    PlanPage,
    Roof,
    Roofline,
    RoofPoint,
    Section,
    Sensitivity,
    SortableTable,
    StepBreakdown,
    TimeLine,
    TorusTopology,
    Value,
)
from cofire.plan.page.svg import text_width
from cofire.plan.pipeline import make_schedule
from cofire.plan.plan_figures import draw_network, hidden_s, kernel_sums, network_nodes
from cofire.plan.plan_page import plan_page
from cofire.plan.published import predictions
from cofire.plan.step import StepEstimate, StepModel
from cofire.plan.timeline import simulate
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, RunSpec, WorkloadSpec, load_as

V3_LAYOUT = ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8")
LAYOUTS = {
    "deepseek-v3": ("h800-2048", V3_LAYOUT),
    "deepseekmoe-16b": ("fire-flyer-2", ParallelSpec(pp=10, dp=1000, ep=8)),
    "qwen2.5-72b": (
        "gb200-nvl72",
        ParallelSpec(pp=4, dp=72, tp=2, schedule="interleaved", stages_per_rank=2, precision="fp8"),
    ),
    "small": ("h100-8", ParallelSpec(dp=8)),
}


@cache
def planned(model: str) -> Plan:
    cluster, layout = LAYOUTS[model]
    batch = 16 * layout.dp if layout.pp < 16 else 15360
    work = WorkloadSpec(sequence_length=1024, context_length=1024, global_batch_size=batch, moments="bf16")
    return estimate(load_as(ModelSpec, model), load_as(ClusterSpec, cluster), layout, work)


@cache
def paged(model: str) -> PlanPage:
    return plan_page(planned(model))


def items(page: PlanPage) -> list[Item]:
    return [item for section in page.sections for item in section.items]


def only(page: PlanPage, kind: type) -> Item:
    (found,) = [item for item in items(page) if isinstance(item, kind)]
    return found


def table(page: PlanPage, title: str) -> SortableTable:
    return next(item for item in items(page) if isinstance(item, SortableTable) and item.title == title)


@pytest.mark.parametrize("model", sorted(LAYOUTS))
def test_the_page_of_a_plan_is_drawn_whole(model: str) -> None:
    text = render_page(paged(model))
    assert text.isascii()
    for title in ("Where the time goes", "Where the memory goes", "What is known", "Layouts", "Formulas", "published"):
        assert title in text
    assert "nan" not in text.split("<script")[0]


@pytest.mark.parametrize("model", sorted(LAYOUTS))
def test_parts_of_the_step_add_up_to_it_and_lie_in_their_intervals(model: str) -> None:
    step, training = only(paged(model), StepBreakdown), planned(model).training
    assert isinstance(step, StepBreakdown)
    assert training is not None
    assert math.fsum(part.time.value for part in step.parts) == pytest.approx(training.estimate.step_s, rel=1e-9)
    assert (step.total.low, step.total.high) == (training.step.low, training.step.high)
    for part in step.parts:
        assert part.time.low is not None
        assert part.time.high is not None
        assert 0 <= part.time.low <= part.time.value <= part.time.high


def test_a_part_is_as_uncertain_as_moving_every_figure_of_the_cluster_says() -> None:
    plan = planned("small")
    assert plan.training is not None
    assert plan.cluster is not None
    layout, work, device = plan.training.estimate.layout, plan.training.workload, plan.cluster.device
    ends = []
    for value in (device.attention_efficiency.low, device.attention_efficiency.high):
        moved = device.model_copy(update={"attention_efficiency": device.attention_efficiency.at(value)})
        cluster = plan.cluster.model_copy(update={"device": moved})
        ends.append(StepModel(plan.model, cluster, work).estimate(layout).part_s("attention"))
    step = only(paged("small"), StepBreakdown)
    assert isinstance(step, StepBreakdown)
    attention = next(part.time for part in step.parts if part.name == "attention")
    # Other figures (memory, launches) move attention too, so that the whole interval is wider than this one's.
    assert attention.low is not None
    assert attention.high is not None
    assert attention.low <= min(ends) < attention.value < max(ends) <= attention.high


def test_dualpipe_hides_what_one_pipeline_would_expose() -> None:
    training, cluster = planned("deepseek-v3").training, planned("deepseek-v3").cluster
    assert training is not None
    assert cluster is not None
    steps = StepModel(load_as(ModelSpec, "deepseek-v3"), cluster, training.workload)
    dual = training.estimate
    one_way = steps.estimate(dual.layout.model_copy(update={"schedule": "1f1b"}))
    hidden = hidden_s(dual, steps)["expert network"]
    assert hidden > 0
    assert hidden_s(one_way, steps)["expert network"] == pytest.approx(0.0, abs=1e-6)

    def passes(step: StepEstimate) -> float:
        """Micro-batches times layers of experts, on the rank that idles least in the whole schedule."""
        ready = steps.prepare(step.layout)
        schedule = make_schedule(step.layout.schedule, step.layout.pp, ready.micro_batches)
        bubbles = simulate(schedule, ready.times).bubble_s
        rank = bubbles.index(min(bubbles))
        forwards = [chunk for slot in schedule.slots[rank] for chunk in slot if chunk.part == "F"]
        return sum(ready.stages[chunk.stage].count("moe") for chunk in forwards)

    sent = (hidden + dual.part_s("expert network")) / passes(dual)
    assert sent == pytest.approx(one_way.part_s("expert network") / passes(one_way), rel=1e-6)


@pytest.mark.parametrize("model", sorted(LAYOUTS))
def test_memory_bars_are_the_ranks_of_the_estimate(model: str) -> None:
    stack, plan = only(paged(model), MemoryStack), planned(model)
    assert isinstance(stack, MemoryStack)
    assert plan.training is not None
    assert plan.cluster is not None
    step = plan.training.estimate
    assert [bar.total_bytes for bar in stack.bars] == pytest.approx([row.total for row in step.memory])
    assert max(bar.total_bytes for bar in stack.bars) == pytest.approx(step.peak_memory_bytes)
    assert stack.capacity_bytes == plan.cluster.device.memory_bytes


def test_the_drawn_schedule_is_a_piece_of_the_planned_one() -> None:
    for model in ("deepseek-v3", "qwen2.5-72b"):
        line, training = only(paged(model), TimeLine), planned(model).training
        assert isinstance(line, TimeLine)
        assert training is not None
        step = training.estimate
        assert line.num_ranks == step.layout.pp
        drawn = 1 + max(chunk[2] for span in line.spans for chunk in span.chunks)
        ways = 2 if step.layout.schedule == "dualpipe" else 1
        assert line.makespan_s <= step.pipeline_s * (1 + 1e-9)
        assert f"{ways * drawn} of {step.num_micro_batches} micro-batches" in line.caption
        for rank in range(line.num_ranks):
            row = sorted((span.start_s, span.end_s) for span in line.spans if span.rank == rank)
            assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(row))
    assert not [item for item in items(paged("small")) if isinstance(item, TimeLine)]


@pytest.mark.parametrize("model", sorted(LAYOUTS))
def test_kernels_lie_below_their_roofs(model: str) -> None:
    roofline = only(paged(model), Roofline)
    assert isinstance(roofline, Roofline)
    peak = max(roof.rate.value for roof in roofline.roofs if roof.kind == "compute")
    for point in roofline.points:
        wire = next(roof.rate.value for roof in roofline.roofs if roof.kind == point.over)
        assert 0 < point.rate.value < min(peak, wire * point.intensity_flop_per_byte)


def test_kernels_of_a_dense_model_compute_the_papers_operations() -> None:
    plan = planned("qwen2.5-72b")
    assert plan.training is not None
    assert plan.cluster is not None
    steps = StepModel(plan.model, plan.cluster, plan.training.workload)
    layout = plan.training.estimate.layout
    sums = kernel_sums(plan.training.estimate, steps)
    length = plan.training.workload.sequence_length
    exact = training_flops_per_token(plan.model, length)
    matrices = layout.tp * sum(each.flops for each in sums if each.work == "matrix") / length / layout.micro_batch_size
    core = layout.tp * sum(each.flops for each in sums if each.work == "attention") / length / layout.micro_batch_size
    assert matrices == pytest.approx(exact.matrices, rel=2e-4)  # biases and norms are counted as parameters
    assert core == pytest.approx(exact.attention * 3.5 / 3, rel=1e-9)  # a flash kernel's backward forms scores anew


def test_tornados_hold_every_figure_by_its_effect() -> None:
    training = planned("deepseek-v3").training
    assert training is not None
    assert training.usd is not None
    step, usd = (item for item in items(paged("deepseek-v3")) if isinstance(item, Sensitivity))
    assert step.result.value == training.step.value
    assert usd.result.value == training.usd.value
    assert {"expert load skew", "device attention efficiency"} <= {row.name for row in step.rows}
    assert "device hour" in {row.name for row in usd.rows} - {row.name for row in step.rows}
    for row in step.rows:
        assert row.result_at_low != row.result_at_high


@pytest.mark.parametrize(
    ("cluster", "overrides"),
    [
        ("h800-2048", []),
        ("gb200-nvl72", []),
        ("fire-flyer-2", ["num_nodes=80"]),
        ("h200-1024-roce", []),
        ("h100-2048", ["num_nodes=64", "network.topology=dragonfly"]),
        ("h100-2048", ["num_nodes=64", "network.topology=slim_fly"]),
        ("h100-2048", ["num_nodes=64", "network.topology=torus"]),
        ("h100-2048", ["num_nodes=16", "network.topology=fully_connected"]),
        ("h100-2048", ["num_nodes=64", "network.topology=fat_tree3"]),
    ],
)
def test_a_drawn_network_has_the_switches_of_the_built_one(cluster: str, overrides: list[str]) -> None:
    spec = load_as(ClusterSpec, cluster, overrides)
    nodes = network_nodes(spec)
    drawn, built = draw_network(spec, nodes), build_network(spec, nodes)
    if isinstance(drawn, LayeredTopology):
        joining = 2 if drawn.split_hosts else 0
        switches = joining + drawn.num_planes * sum(layer.count_per_plane for layer in drawn.layers)
    elif isinstance(drawn, GroupedTopology):
        switches = drawn.num_groups * drawn.routers_per_group
    else:
        assert isinstance(drawn, TorusTopology)
        switches = math.prod(drawn.sizes)
    inside = (nodes or spec.num_nodes) if spec.scale_up is not None else 0  # one for the fast links of each node
    assert switches == built.num_switches - inside


def test_a_searched_plan_marks_the_layout_it_took() -> None:
    plan = estimate(load_as(ModelSpec, "small"), load_as(ClusterSpec, "h100-8"))
    assert plan.training is not None
    assert plan.training.ranking is not None
    ranked = table(plan_page(plan), "The best layouts")
    steps = [row[1].value for row in ranked.rows if isinstance(row[1], Value)]
    assert ranked.chosen == 0
    assert steps[0] == pytest.approx(plan.training.estimate.step_s)
    assert len(steps) == len(plan.training.ranking.best)


def test_formulas_and_evidence_come_as_the_planner_has_them() -> None:
    page, training = paged("deepseek-v3"), planned("deepseek-v3").training
    assert training is not None
    listed = only(page, FormulaList)
    assert isinstance(listed, FormulaList)
    assert [row.name for row in listed.formulas] == [row.name for row in training.formulas]
    errors = only(page, ErrorTable)
    assert isinstance(errors, ErrorTable)
    assert [row.error for row in errors.rows] == pytest.approx([each.error for each in predictions()])
    assert sum(row.fitted for row in errors.rows) == 2


def test_the_headline_says_when_a_layout_does_not_fit() -> None:
    layout = ParallelSpec(dp=8, zero_stage=0)
    plan = estimate(load_as(ModelSpec, "qwen2.5-72b"), load_as(ClusterSpec, "h100-8"), layout)
    page = plan_page(plan)
    assert "does not fit" in page.verdict[0]
    assert "does not fit" in render_page(page)


def test_a_plan_without_a_layout_says_why_on_its_page() -> None:
    plan = estimate(load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h100-8"))
    assert plan.training is None
    page = plan_page(plan)
    assert page.verdict[1].lower() == f"{plan.training_refused}.".lower()
    assert plan.bounds is not None
    assert any(f"needs {plan.bounds.decode.num_devices} devices" in remark for remark in page.remarks)
    assert "Parameters" in render_page(page)


def test_without_a_cluster_the_page_is_about_the_model() -> None:
    for source in (load_as(ModelSpec, "deepseek-v3"), load_as(RunSpec, "demo")):
        plan = estimate(source)
        page = plan_page(plan)
        stack = next(item for item in items(page) if isinstance(item, MemoryStack))
        totals = {plan.training_memory.total, plan.training_memory_other.total}
        assert {bar.total_bytes for bar in stack.bars} == totals
        assert stack.capacity_bytes is None
        parameters = table(page, "Parameters")
        total = next(row[1] for row in parameters.rows if row[0] == "all")
        assert isinstance(total, Value)
        assert total.value == plan.parameters.total
        text = render_page(page)
        assert "capacity" not in text.split("<script")[0].split("</style>")[1]
        assert "does not fit" not in text


def test_equal_plans_give_equal_pages() -> None:
    plan = planned("small")
    assert render_page(plan_page(plan)) == render_page(plan_page(Plan.from_dict(plan.to_dict())))


CROWDED = Roofline(
    "FP8 kernels at the level of the BF16 roof",
    (
        Roof("fp8 peak", Value(5e15, "FLOP/s"), "compute"),
        Roof("bf16 peak", Value(2.5e15, "FLOP/s"), "compute"),
        Roof("memory", Value(8e12, "B/s"), "memory"),
    ),
    tuple(RoofPoint(f"product {i}", 1700.0 + 100 * i, Value(2.65e15, "FLOP/s")) for i in range(4)),
)


@pytest.mark.parametrize("model", ["crowded", *sorted(LAYOUTS)])
def test_names_of_roofs_keep_off_the_kernels(model: str) -> None:
    page = PlanPage("crowded", sections=(Section("Kernels", (CROWDED,)),)) if model == "crowded" else paged(model)
    text = render_page(page)
    (drawn,) = [part for part in text.split("<svg")[1:] if "operations under" in part]
    figure = ElementTree.fromstring(f"<svg{drawn.split('</svg>')[0]}</svg>")
    points = [(float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in figure.iter("circle")]
    names = [each for each in figure.iter("text") if " peak: " in (each.text or "")]
    assert points
    assert names
    for name in names:
        x, y = float(name.get("x", "")), float(name.get("y", ""))
        width = text_width(name.text or "", 11)
        assert name.get("text-anchor") is None  # so that x is where it begins
        assert not [p for p in points if x - 5 < p[0] < x + width + 5 and y - 9 - 5 < p[1] < y + 5]
