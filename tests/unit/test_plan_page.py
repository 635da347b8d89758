"""The page of a plan: what it says, what it must not run, and where its marks lie.

Geometry is read back from the page's own SVG with Python's XML and HTML parsers and compared with the numbers that
were put in. The last test lets a browser draw the page, where there is one.
"""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofire.errors import PlanError, SpecError
from cofire.plan.page import render_page, write_page
from cofire.plan.page.figures import (
    Comparison,
    DesignPoint,
    ErrorTable,
    Fact,
    Formula,
    FormulaList,
    GroupedTopology,
    LayeredTopology,
    MemoryBar,
    MemoryStack,
    Metric,
    ParetoPlot,
    PlanPage,
    Roof,
    Roofline,
    RoofPoint,
    Section,
    Sensitivity,
    SensitivityRow,
    SortableTable,
    StepBreakdown,
    StepPart,
    SwitchLayer,
    TimeLine,
    TimeSpan,
    TorusTopology,
    Value,
)
from cofire.plan.page.scale import Scale, fit, shown
from cofire.plan.page.scatter import MAX_POINTS, drawn_points, front, metric_scale, roofline_bounds
from cofire.plan.page.timeline import MAX_SPANS, marks
from cofire.plan.pipeline import make_schedule
from cofire.plan.timeline import ChunkTimes, simulate
from cofire.spec.figure import Figure

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = '</script><script>document.title="owned"</script>"\'&'


def seconds(value: float, spread: float = 0.1, label: str = "assumed") -> Value:
    return Value(value, "s", label, "modelled", value * (1 - spread), value * (1 + spread))  # type: ignore[arg-type]


MEMORY = MemoryStack(
    "Memory",
    (
        MemoryBar("rank 0", (("weights", 14e9), ("gradients", 10e9), ("activations", 22e9))),
        MemoryBar("rank 1", (("weights", 14e9), ("optimiser", 9e9), ("activations", 61e9))),
    ),
    80e9,
    "H800",
)
STEP = StepBreakdown(
    "Step",
    (
        StepPart("matmul", seconds(8.2, label="measured")),
        StepPart("all-to-all", seconds(0.5), hidden_s=4.0),
        StepPart("bubble", seconds(1.7, label="calibrated")),
    ),
    seconds(10.4),
)
ROOFLINE = Roofline(
    "Roofline",
    (
        Roof("FP8 peak", Value(1979e12, "FLOP/s", "assumed"), "compute"),
        Roof("HBM", Value(3.35e12, "B/s", "assumed"), "memory"),
        Roof("IB", Value(50e9, "B/s", "measured"), "network"),
    ),
    (
        RoofPoint("expert GEMM", 1800.0, Value(1400e12, "FLOP/s", "measured")),
        RoofPoint("norm", 0.5, Value(1.5e12, "FLOP/s", "assumed")),
        RoofPoint("dispatch", 6144.0, Value(240e12, "FLOP/s", "assumed"), "network"),
    ),
)
TREE = LayeredTopology("Tree", (SwitchLayer("spine", 16, "400 Gb/s"), SwitchLayer("leaf", 32)), 8, 256, 8, 8)
TORNADO = Sensitivity(
    "Tornado",
    seconds(10.0),
    (
        SensitivityRow("small", "1", "2", 9.9, 10.1),
        SensitivityRow("large", "3", "4", 13.0, 8.0, "measured", "a run"),
        SensitivityRow("one side", "5", "6", 11.0, 10.5),
    ),
)
PARETO = ParetoPlot(
    "Designs",
    (Metric("cost", "$", log=True), Metric("size", better="higher"), Metric("TPOT", "s")),
    tuple(
        DesignPoint(f"design {i}", (1e5 + 1e4 * i, 1e9 * (i % 5 + 1), 0.01 + 0.001 * i), (("experts", f"{i}"),), i < 5)
        for i in range(20)
    ),
)


def timeline(name: str = "dualpipe", ranks: int = 4, micro_batches: int = 10) -> TimeLine:
    times = ChunkTimes(forward_s=0.07, backward_s=0.14, weight_s=0.06, overlapped_s=0.18)
    spans = simulate(make_schedule(name, ranks, micro_batches), times).spans
    return TimeLine(
        "Schedule",
        tuple(
            TimeSpan(span.rank, tuple((c.part, c.stage, c.micro_batch) for c in span.slot), span.start_s, span.end_s)
            for span in spans
        ),
    )


LAYOUTS = SortableTable(
    "Layouts", ("layout", "time"), (("pp4", seconds(9.0)), ("pp8", seconds(12.0)), ("pp2", seconds(10.0))), chosen=0
)
FORMULAS = FormulaList("Formulas", (Formula("tokens", "b x s", "8 x 4,096", Value(32768.0)),))
ERRORS = ErrorTable(
    "Errors",
    (
        Comparison("fitted one", seconds(1.42), seconds(1.42), fitted=True),
        Comparison("175B", seconds(18.0), seconds(18.13)),
        Comparison("1T", seconds(98.0), seconds(94.42)),
    ),
)
ITEMS = (
    MEMORY,
    STEP,
    timeline(),
    ROOFLINE,
    TREE,
    LayeredTopology("Zones", (SwitchLayer("leaf", 2),), 2, 5, 8, 1, plane_name="zone", split_hosts=True),
    GroupedTopology("Dragonfly", 33, 8, 4, "100 Gb/s"),
    TorusTopology("Torus", (4, 4, 4), "50 GB/s"),
    TorusTopology("Ring", (3,)),
    TORNADO,
    PARETO,
    LAYOUTS,
    FORMULAS,
    ERRORS,
)


def page_of(*items, **fields) -> PlanPage:
    sections = tuple(Section(f"Section {i}", (item,)) for i, item in enumerate(items))
    return PlanPage("v3 on h800", sections=sections, **fields)


WHOLE = page_of(
    *ITEMS,
    subtitle="2,048 GPUs",
    verdict=("It takes 10.4 s a step.", "Matrix multiplications bind."),
    facts=(Fact("Step", seconds(10.4)), Fact("Binds", "compute")),
    remarks=("List prices.",),
)


def drawings(text: str) -> list[ElementTree.Element]:
    """Return the figures' SVG elements; an error where one of them is no well-formed XML."""
    return [ElementTree.fromstring(found) for found in re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL)]


def with_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [mark for mark in svg.iter() if name in mark.get("class", "").split()]


class Balance(HTMLParser):
    """Keeps the open elements; an end without its start is an error."""

    VOID = frozenset({"meta", "br", "link", "input", "img", "hr"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        assert not any(name.startswith("on") for name in names)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text: str) -> Balance:
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


# -- the page as a whole ----------------------------------------------------------------------------


def test_page_is_well_formed_and_holds_every_figure():
    text = render_page(WHOLE)
    parsed(text)
    assert text.isascii()
    assert len(re.findall(r'<figure id="figure-\d+"', text)) == len(ITEMS)
    # The designs have two drawings; three items are tables.
    assert len(drawings(text)) == len(ITEMS) - 3 + 1
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL).lower()


def test_page_refers_to_nothing_outside_itself():
    text = render_page(WHOLE)
    for found in re.findall(r"https?://[^\"' ]*", text):
        assert found == "http://www.w3.org/2000/svg"
    assert re.findall(r"(?:src|href)=", text) == []
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#hatch"}


def test_equal_pages_give_equal_bytes():
    assert render_page(WHOLE) == render_page(dataclasses.replace(WHOLE))


def test_absent_figures_and_empty_sections_are_left_out():
    text = render_page(PlanPage("empty", sections=(Section("Nothing here"),)))
    parsed(text)
    assert "Nothing here" not in text
    assert "<figure" not in text


def test_item_that_is_shown_twice_has_two_names():
    text = render_page(page_of(PARETO, PARETO))
    assert re.findall(r'<figure id="([^"]*)"', text) == ["figure-0", "figure-1"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))  # type: ignore[union-attr]
    assert data["figure-0"] == data["figure-1"]


def test_every_text_is_shown_and_never_run():
    items = (
        MemoryStack(EVIL, (MemoryBar(EVIL, ((EVIL, 1e9),)),), 2e9, EVIL, EVIL),
        StepBreakdown(EVIL, (StepPart(EVIL, Value(1.0, "s", source=EVIL), 0.5, EVIL),), Value(1.0, "s"), EVIL),
        TimeLine(EVIL, (TimeSpan(0, ((EVIL, 0, 0),), 0.0, 1.0),), EVIL),
        Roofline(EVIL, (Roof(EVIL, Value(1e12), "compute"),), (RoofPoint(EVIL, 1.0, Value(1e11)),), EVIL),
        LayeredTopology(EVIL, (SwitchLayer(EVIL, 2, EVIL),), 2, 2, 2, 2, EVIL, EVIL, EVIL, caption=EVIL),
        GroupedTopology(EVIL, 3, 2, 2, EVIL, EVIL, EVIL),
        TorusTopology(EVIL, (2, 2), EVIL, EVIL),
        Sensitivity(EVIL, Value(1.0, EVIL), (SensitivityRow(EVIL, EVIL, EVIL, 1.0, 2.0, source=EVIL),), EVIL),
        ParetoPlot(
            EVIL,
            (Metric(EVIL, EVIL), Metric(EVIL), Metric(EVIL)),
            (DesignPoint(EVIL, (1.0, 2.0, 3.0), ((EVIL, EVIL),), True),),
            caption=EVIL,
        ),
        SortableTable(EVIL, (EVIL,), ((EVIL,),), EVIL),
        FormulaList(EVIL, (Formula(EVIL, EVIL, EVIL, Value(1.0, EVIL)),), EVIL),
        ErrorTable(EVIL, (Comparison(EVIL, Value(1.0, EVIL), Value(1.0, EVIL)),), EVIL),
    )
    page = PlanPage(EVIL, EVIL, (EVIL, EVIL), (Fact(EVIL, EVIL, EVIL),), (Section(EVIL, items, (EVIL,)),), (EVIL,))
    text = render_page(page)
    assert parsed(text).scripts == 2
    assert "<script>document" not in text
    assert "<" not in re.search(r'id="data">(.*?)</script>\n<script>\n//', text, re.DOTALL).group(1)  # type: ignore[union-attr]
    assert len(drawings(text)) == 10


def test_control_characters_do_not_break_a_drawing():
    stack = MemoryStack("a\x00b\x1b", (MemoryBar("c\x08", (("weights", 1.0),)),), 2.0)
    (svg,) = drawings(render_page(page_of(stack)))
    assert svg[0].text == "a b "


def test_largest_figures_keep_the_page_under_a_megabyte():
    metrics = (Metric("cost", "$"), Metric("size"), Metric("TPOT", "s"), Metric("time", "s"), Metric("more"))
    changed = (("model.moe.num_routed_experts", "256"), ("cluster.network.planes", "8"))
    points = tuple(
        DesignPoint(f"design {i}", tuple(1.0 + (i * k) % 997 for k in (1, 3, 7, 11, 13)), changed, i % 3 == 0)
        for i in range(5000)
    )
    schedule = timeline("1f1b", 16, 640)
    assert len(schedule.spans) > 20_000
    text = render_page(page_of(*ITEMS, schedule, ParetoPlot("Sweep", metrics, points)))
    assert len(text) < 1_000_000


def test_page_is_written_whole_or_refused_in_one_line(tmp_path):
    write_page(tmp_path / "plan.html", WHOLE)
    assert (tmp_path / "plan.html").read_text("ascii") == render_page(WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(SpecError, match="cannot write"):
        write_page(tmp_path / "missing" / "plan.html", WHOLE)


def test_every_number_carries_how_it_is_known():
    text = render_page(WHOLE)
    for item, marks_ in ((LAYOUTS, 3), (ERRORS, 6)):
        part = text.split(f"<h3>{item.title}")[1].split("</figure>")[0]
        assert part.count('class="badge modelled"') == part.count('class="badge assumed"') == marks_
    tile = text.split('class="tile"')[1].split("</div>")[0]
    assert "9.36 s to 11.4 s" in tile
    assert 'class="badge assumed"' in tile


def test_figure_of_a_spec_keeps_its_interval_label_and_source():
    figure = Figure(value=50e9, low=40e9, high=51e9, label="measured", source="a sweep")
    tile = render_page(page_of(facts=(Fact("IB", Value.of(figure, "B/s", "modelled")),)))
    assert "40 GB/s to 51 GB/s" in tile
    assert 'title="40 GB/s to 51 GB/s\nmodelled, measured\na sweep"' in tile
    assert '<span class="badge measured">' in tile.split('class="marks"')[1].split("</div>")[0]


# -- what the records refuse ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Value(math.nan), "must be finite"),
        (lambda: Value(3.0, low=4.0, high=5.0), "must lie between"),
        (lambda: MemoryBar("a", (("weights", -1.0),)), "must not be negative"),
        (lambda: MemoryStack("a", (), 1.0), "has no bars"),
        (lambda: TimeSpan(0, (("F", 0, 0),), 2.0, 1.0), "cannot be drawn"),
        (lambda: StepBreakdown("a", STEP.parts, seconds(11.0)), "the parts add up to 10.4 s, the total is 11 s"),
        (lambda: Roofline("a", (), ()), "needs a roof of kind compute"),
        (lambda: dataclasses.replace(PARETO, y=3), "must index 3 metrics"),
        (lambda: dataclasses.replace(PARETO, points=(DesignPoint("p", (1.0,)),)), "has 1 values for 3 metrics"),
        (lambda: dataclasses.replace(PARETO, points=(DesignPoint("p", (0.0, 1.0, 1.0)),)), "logarithmic axis"),
        (lambda: SortableTable("a", ("x", "y"), (("1",),)), "1 cells for 2 columns"),
        (lambda: Comparison("a", Value(1.0), Value(0.0)), "no relative error"),
        (lambda: TorusTopology("a", (4, 0)), "must be above 0"),
    ],
)
def test_record_that_cannot_be_drawn_is_refused_in_one_line(make, said):
    with pytest.raises(PlanError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


# -- geometry ---------------------------------------------------------------------------------------


def test_memory_bars_are_as_long_as_their_bytes():
    (svg,) = drawings(render_page(page_of(MEMORY)))
    bars = with_class(svg, "bar")
    level = float(with_class(svg, "level")[0].get("x1", ""))
    first = float(bars[0].get("x", ""))
    per_byte = (level - first) / MEMORY.capacity_bytes
    sizes = [size for bar in MEMORY.bars for _, size in bar.parts]
    for mark, size in zip(bars, sizes, strict=True):
        assert float(mark.get("width", "")) == pytest.approx(size * per_byte, abs=0.11)
    # Each starts where the one before ends.
    for bar in (bars[:3], bars[3:]):
        for left, right in itertools.pairwise(bar):
            assert float(left.get("x", "")) + float(left.get("width", "")) == pytest.approx(
                float(right.get("x", "")), abs=0.11
            )


def test_memory_above_capacity_is_said():
    (svg,) = drawings(render_page(page_of(MEMORY)))
    assert [mark.text for mark in with_class(svg, "bad")] == ["84 GB does not fit"]


def test_parts_of_a_step_follow_each_other_to_the_total():
    (svg,) = drawings(render_page(page_of(STEP)))
    *parts, total = with_class(svg, "bar")
    reached = float(total.get("x", ""))
    for part in parts:
        assert float(part.get("x", "")) == pytest.approx(reached, abs=0.2)
        reached += float(part.get("width", ""))
    assert reached == pytest.approx(float(total.get("x", "")) + float(total.get("width", "")), abs=0.3)
    # Only the assumed part is hatched, and what is hidden is as long as it says.
    assert len(with_class(svg, "hatch")) == 1
    per_second = float(total.get("width", "")) / 10.4
    assert float(with_class(svg, "hollow")[0].get("width", "")) == pytest.approx(4.0 * per_second, abs=0.2)


def test_tornado_puts_the_widest_swing_on_top_and_starts_at_the_plan():
    (svg,) = drawings(render_page(page_of(TORNADO)))
    assert [mark.text for mark in with_class(svg, "name")] == ["large", "one side", "small"]
    at = float(with_class(svg, "level")[0].get("x1", ""))
    for mark in with_class(svg, "bar"):
        left = float(mark.get("x", ""))
        assert at == pytest.approx(left, abs=0.11) or at == pytest.approx(left + float(mark.get("width", "")), abs=0.11)
    assert "3" in [mark.text for mark in svg.iter() if mark.text]
    large_low, large_high = with_class(svg, "bar")[:2]
    assert float(large_low.get("width", "")) / float(large_high.get("width", "")) == pytest.approx(1.5, rel=0.01)


def test_operations_lie_under_their_roof_and_inside_the_axes():
    x_low, x_high, y_low, y_high = roofline_bounds(ROOFLINE)
    for point in ROOFLINE.points:
        assert x_low < point.intensity_flop_per_byte < x_high
        assert y_low < point.rate.value < y_high
    (svg,) = drawings(render_page(page_of(ROOFLINE)))
    slope = next(mark for mark in with_class(svg, "roof") if "HBM" in mark.get("data-tip", ""))
    x1, y1, x2, y2 = (float(slope.get(name, "")) for name in ("x1", "y1", "x2", "y2"))
    level = next(mark for mark in with_class(svg, "roof") if "FP8" in mark.get("data-tip", ""))
    # The memory roof ends at the compute roof; the norm, at 0.5 FLOP/B and 90 % of it, lies just below the slope.
    assert (x2, y2) == pytest.approx((float(level.get("x1", "")), float(level.get("y1", ""))), abs=0.11)
    norm = next(mark for mark in with_class(svg, "mark") if "norm" in mark.get("data-tip", ""))
    x, y = float(norm.get("cx", "")), float(norm.get("cy", ""))
    on_line = y1 + (x - x1) / (x2 - x1) * (y2 - y1)
    assert on_line < y < on_line + 10
    assert "89.6 % of its roof" in norm.get("data-tip", "")


def test_designs_lie_inside_the_axes_and_where_the_script_puts_them():
    text = render_page(page_of(PARETO))
    scatter, parallel = drawings(text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))["figure-0"]  # type: ignore[union-attr]
    left, right, top, bottom = data["box"]
    for mark in with_class(scatter, "design"):
        place = data["places"][int(mark.get("data-i", ""))]
        assert all(0 < at < 1 for at in place)
        assert float(mark.get("cx", "")) == pytest.approx(left + place[0] * (right - left), abs=0.11)
        assert float(mark.get("cy", "")) == pytest.approx(bottom + place[1] * (top - bottom), abs=0.11)
    assert all(0 <= at <= 1 for ticks in data["ticks"] for at, _ in ticks)
    assert len(with_class(parallel, "design")) == len(PARETO.points)
    assert "experts = 7" in data["tips"][7]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    st.sampled_from(["lower", "higher"]),
    st.sampled_from(["lower", "higher"]),
)
def test_front_of_two_metrics_holds_just_what_nothing_beats(points, x_better, y_better):
    x, y = Metric("x", better=x_better), Metric("y", better=y_better)
    signs = (1 if x_better == "lower" else -1, 1 if y_better == "lower" else -1)
    signed = [(signs[0] * a, signs[1] * b) for a, b in points]

    def beaten(point):
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in signed)

    chosen = front(points, x, y)
    assert {signed[i] for i in chosen} == {point for point in signed if not beaten(point)}
    assert len(chosen) == len({signed[i] for i in chosen})


def test_thinned_designs_keep_the_whole_front():
    points = tuple(DesignPoint(f"{i}", (1.0 + i, 2.0, 3.0), front=i % 50 == 0) for i in range(5000))
    drawn = drawn_points(dataclasses.replace(PARETO, points=points))
    assert len(drawn) == MAX_POINTS
    assert sum(point.front for point in drawn) == 100


def test_schedule_is_drawn_slot_by_slot():
    schedule = timeline()
    drawn = marks(schedule)
    assert [(m.rank, m.start_s, m.end_s) for m in drawn] == sorted((s.rank, s.start_s, s.end_s) for s in schedule.spans)
    (svg,) = drawings(render_page(page_of(schedule)))
    boxes = sum(mark.get("d", "").count("M") for mark in with_class(svg, "bar"))
    assert boxes == len(schedule.spans)


def test_merged_schedule_keeps_the_busy_time_of_every_part():
    schedule = timeline("1f1b", 16, 640)
    drawn = marks(schedule)
    assert MAX_SPANS / 3 < len(drawn) <= MAX_SPANS + schedule.num_ranks < len(schedule.spans)
    for rank in (0, 7, 15):
        for kind in ("F", "B"):
            exact = sum(s.end_s - s.start_s for s in schedule.spans if s.rank == rank and s.kind == kind)
            seen = sum(dict(m.shares).get(kind, 0.0) * (m.end_s - m.start_s) for m in drawn if m.rank == rank)
            assert seen == pytest.approx(exact)
    for left, right in itertools.pairwise(drawn):
        assert left.rank < right.rank or left.end_s <= right.start_s + 1e-9
    assert "neighbours are merged" in render_page(page_of(schedule))


def test_tree_says_all_counts_and_draws_first_and_last():
    text = render_page(page_of(TREE))
    (svg,) = drawings(text)
    said = [mark.text for mark in svg.iter() if mark.text]
    for words in (
        "16 x 8 = 128 switches",
        "32 x 8 = 256 switches",
        "2,048 GPUs in all",
        "4 of 8 planes drawn",
        "host 256",
    ):
        assert words in said
    tips = [mark.get("data-tip", "") for mark in svg.iter()]
    assert "leaf 32 of 32, plane 4" in tips
    assert len([tip for tip in tips if tip.startswith("NIC")]) == 3 * 8


def test_split_hosts_have_all_their_nics_in_one_zone():
    zones = LayeredTopology("Z", (SwitchLayer("leaf", 2),), 2, 4, 8, 2, plane_name="zone", split_hosts=True)
    (svg,) = drawings(render_page(page_of(zones)))
    tips = [mark.get("data-tip", "") for mark in svg.iter()]
    assert [tip[-6:] for tip in tips if tip.startswith("NIC")] == ["zone 1"] * 4 + ["zone 2"] * 2


@pytest.mark.parametrize("item", ITEMS[:-3], ids=lambda item: item.title)
def test_nothing_is_drawn_outside_its_drawing(item):
    for svg in drawings(render_page(page_of(item))):
        _, _, width, height = map(float, svg.get("viewBox", "").split())
        for mark in svg.iter():
            places = {name: float(mark.get(name, "nan")) for name in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy")}
            for name, place in places.items():
                if not math.isnan(place):
                    assert 0 <= place <= (width if "x" in name else height), (mark.tag, name, place)


# -- scales and words -------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1e-9, 1e18), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_axis_holds_all_its_values_and_has_ticks_inside(values, log, zero):
    low, high = fit(values, log=log, zero=zero)
    scale = Scale(low, high, 10.0, 500.0, log)
    assert all(10.0 <= scale.at(value) <= 500.0 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(9.9 <= scale.at(tick) <= 500.1 for tick in ticks)


def test_axis_of_one_value_and_of_negative_values_can_be_drawn():
    for values in ([0.0], [5.0], [-3.0, -3.0], [-2.0, 7.0]):
        scale = metric_scale(Metric("m"), values)
        assert all(0 < scale.at(value) < 1 for value in values)
        assert scale.ticks()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0147, "s", "14.7 ms"),
        (9.996e-4, "s", "1 ms"),
        (0.0, "s", "0 s"),
        (14.47, "s", "14.5 s"),
        (7200.0, "s", "2 h"),
        (4.9e6, "s", "56.7 days"),
        (65e9, "B", "65 GB"),
        (999.9e9, "B", "1 TB"),
        (1979e12, "FLOP/s", "1.98 PFLOP/s"),
        (5.576e6, "$", "$5.58 M"),
        (-346_000.0, "$", "-$346 K"),
        (0.1234, "%", "12.3 %"),
        (671e9, "", "671 B"),
        (2048.0, "", "2,048"),
        (180_000.0, "h", "180,000 h"),
    ],
)
def test_quantity_reads_as_an_engineer_writes_it(value, unit, text):
    assert shown(value, unit) == text


# Everything that the script does, once; what it leads to is read from the page afterwards.
ACT = """<script>
      window.addEventListener("error", (event) => document.body.append("FA" + "ULT " + event.message));
      const seen = {}, at = (id) => document.getElementById("figure-" + id);
      const tip = () => document.querySelector(".tip").textContent;
      const hover = (mark, clientX, clientY) =>
        mark.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
      hover(at(0).querySelector("rect.bar"), 100, 100);
      seen.memory = tip();
      at(0).querySelector("button[data-series=c0]").click();
      seen.hidden = at(0).querySelectorAll("svg .off").length;
      const line = at(2).querySelector(".timeline svg"), box = line.getBoundingClientRect(), zoom = box.width / 1120;
      hover(line, box.left + 66 * zoom, box.top + 12 * zoom);
      seen.span = tip();
      seen.row = [];
      for (let x = 70; x < 1112; x += 20) {
        hover(line, box.left + x * zoom, box.top + (6 + 2.5 * 24) * zoom);
        seen.row.push(tip().split("\\n").slice(0, -1));
      }
      const head = at(11).querySelectorAll("th button")[1];
      head.click();
      seen.up = [...at(11).querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
      head.click();
      seen.down = [...at(11).querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
      const x = at(10).querySelector("select[data-axis=x]");
      seen.before = at(10).querySelector("path.front").getAttribute("d");
      x.value = "2";
      x.dispatchEvent(new Event("change"));
      seen.axis = at(10).querySelector(".scatter .axes").textContent;
      seen.place = at(10).querySelector("circle[data-i='3']").getAttribute("cx");
      x.value = "0";
      x.dispatchEvent(new Event("change"));
      seen.after = at(10).querySelector("path.front").getAttribute("d");
      at(10).querySelector("circle[data-i='3']").focus();
      seen.design = tip();
      seen.lit = at(10).querySelectorAll(".lit").length;
      document.body.append("SE" + "EN" + JSON.stringify(seen) + "EN" + "D");
    </script></body>"""


def told(schedule: TimeLine, rank: int, share: float) -> list[str]:
    """Return what is under the mouse on a rank, at a share of the makespan; of idle time nothing is said but that."""
    at_s = share * schedule.makespan_s
    for span in schedule.spans:
        if span.rank == rank and span.start_s <= at_s < span.end_s:
            chunks = [f"{part} of stage {stage}, micro-batch {batch}" for part, stage, batch in span.chunks]
            return [f"rank {rank}", *chunks]
    return []


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_browser_shows_values_hides_series_sorts_and_changes_axes(tmp_path):
    copy = tmp_path / "act.html"
    text = render_page(WHOLE)
    copy.write_text(text.replace("</body>", ACT), "ascii")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--disable-background-networking", "--no-first-run", "--disable-component-update", "--disable-sync"]
    command = [str(BROWSER), *flags, "--window-size=1300,900", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "FAULT" not in dom
    seen = json.loads(re.search(r"SEEN(\{.*?\})END", dom, re.DOTALL).group(1).replace("&amp;", "&"))  # type: ignore[union-attr]
    assert seen["memory"] == "rank 0: weights\n14 GB, 30.4 %"
    assert seen["hidden"] == 2
    first = next(span for span in timeline().spans if span.rank == 0)
    assert seen["span"].startswith(f"rank 0\nF of stage {first.chunks[0][1]}, micro-batch 0\n0 to 0.07 s (0.07 s)")
    assert seen["row"] == [told(timeline(), 2, (x - 64) / (1112 - 64)) for x in range(70, 1112, 20)]
    assert seen["up"] == ["pp4", "pp2", "pp8"]
    assert seen["down"] == ["pp8", "pp2", "pp4"]
    assert "TPOT, lower is better" in seen["axis"]
    scale = metric_scale(PARETO.metrics[2], [point.values[2] for point in PARETO.points])
    assert float(seen["place"]) == pytest.approx(92 + scale.at(PARETO.points[3].values[2]) * 1008, abs=0.2)
    # Back at the first choice the script's front is the one that the plan drew.
    numbers = [[float(n) for n in re.findall(r"[\d.]+", seen[name])] for name in ("before", "after")]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.11)
    assert seen["design"].startswith("design 3\nexperts = 3\ncost: $130 K")
    assert seen["lit"] == 2
