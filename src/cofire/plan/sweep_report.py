"""What a co-design sweep says: sentences about the front, and the page with its figures.

Each member of the front is described by what it trades against the knee. Left out: any judgement of quality; a page
says that parameters are not quality.
"""

from __future__ import annotations

from cofire.plan.design_space import MEASURES, Axis, Measure
from cofire.plan.layouts import describe
from cofire.plan.page.figures import (
    Cell,
    DesignPoint,
    Fact,
    Metric,
    ParetoPlot,
    PlanPage,
    Section,
    SortableTable,
    Value,
)
from cofire.plan.sweep import Design, DesignFigures, SweepResult
from cofire.plan.sweep_effects import AxisEffect, axis_effects
from cofire.spec.units import format_count, format_quantity

# Heads of columns for what is varied most often; any other path is written in full words.
_SHORT = {
    "num_routed_experts": "experts",
    "expert_intermediate_size": "width",
    "num_experts_per_token": "top-k",
    "num_key_value_heads": "kv heads",
    "kv_lora_rank": "kv rank",
    "topology": "shape",
    "bandwidth_bytes_per_s": "port B/s",
}
_SAME = 0.005  # a difference below half a percent is none
_SHORTENED = 1e6  # numbers from here on are written with a prefix
_REASONS = 6  # examples of refusals
_ROWS = 500  # designs of the page's table


def changed_columns(result: SweepResult) -> tuple[list[Axis], list[Axis]]:
    """Return the axes along which the shown front differs, and those along which it does not."""
    shown = [result.designs[place] for place in result.shown]
    differing = [axis for axis in result.spec.axes if len({axis_value(axis, design) for design in shown}) > 1]
    return differing, [axis for axis in result.spec.axes if axis not in differing]


def axis_title(axis: Axis) -> str:
    """Return an axis as the head of a column, for example ``experts/width``."""
    return "/".join(map(_short_path, axis.paths))


def axis_value(axis: Axis, design: Design) -> str:
    """Return what a design takes on an axis, for example ``256/2048``."""
    changed = dict(design.changed)
    return "/".join(short_value(changed[path]) for path in axis.paths)


def _short_path(path: str) -> str:
    last = path.rsplit(".", 1)[-1]
    return _SHORT.get(last, last.removeprefix("num_").replace("_", " "))


def short_value(text: str) -> str:
    """Return a large number with a prefix, any other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return short_number(number, 4) if abs(number) >= _SHORTENED else text


def short_number(value: float, digits: int = 3) -> str:
    """Return a number with a prefix and no space, for example ``318k``."""
    return format_quantity(value, digits=digits).replace(" ", "")


def describe_change(design: Design) -> str:
    """Return what a design changes in one line."""
    return ", ".join(f"{_short_path(path)} {short_value(value)}" for path, value in design.changed) or "as given"


def trade(result: SweepResult, design: Design) -> str:
    """Return a sentence on what a design gives and takes against the knee; of the knee itself, where it stands."""
    front = [result.designs[place] for place in result.front]
    other = result.designs[result.knee]
    titles = [(MEASURES[one.measure].title, one.better) for one in result.spec.objectives]
    best = [
        ("fewest " if better == "lower" and "parameters" in title else "least " if better == "lower" else "most ")
        + title
        for one, (title, better) in zip(result.spec.objectives, titles, strict=True)
        if one.sign * _known(design, one.measure) == min(one.sign * _known(member, one.measure) for member in front)
    ]
    if design.index == other.index:
        tail = f", with the {' and '.join(best)}" if best else ""
        return f"the knee: closest to the best of all objectives at once{tail}"
    gains, losses = [], []
    for one in result.spec.objectives:
        ratio = _known(design, one.measure) / _known(other, one.measure) - 1
        if abs(ratio) < _SAME:
            continue
        better = (ratio < 0) == (one.better == "lower")
        (gains if better else losses).append(f"{_percent(ratio)} {MEASURES[one.measure].title}")
    text = "against the knee: " + "; ".join(
        part for part in (", ".join(gains), f"for {', '.join(losses)}" if losses else "") if part
    )
    return (f"{' and '.join(best)}; " if best else "") + (text if gains or losses else "as the knee in every objective")


def _percent(ratio: float) -> str:
    return f"{1 + ratio:.1f} times the" if ratio >= 1 else f"{ratio:+.0%}"


def _known(design: Design, measure: str) -> float:
    value = design.value(measure)
    assert value is not None  # of the front
    return value


def reasons(result: SweepResult) -> list[tuple[str, int, str]]:
    """Return each kind of refusal with its number and an example."""
    rows = []
    for kind, count in result.refused.items():
        example = next(design for design in result.designs if design.refusal == kind)
        rows.append((kind, count, example.reason))
    return rows


def remarks(result: SweepResult) -> list[str]:
    """Return what a reader must know of the numbers."""
    spec = result.spec
    said = [
        "Parameters are not quality: nothing here predicts a loss. Sizes are directions that the objectives choose.",
        "Every figure is modelled; prices of training use the layout that a search in three passes found.",
        f"TPOT is that of {spec.serving.sequences_per_device:g} sequences of {spec.serving.context_length} tokens on "
        f"each of {spec.serving.num_devices} devices, or of more where these do not hold them; throughput is the most "
        f"of any batch under {spec.tpot_limit_s * 1e3:g} ms.",
    ]
    if any(path.startswith("cluster.network") for axis in spec.axes for path in axis.paths):
        said.append(
            "The rent is that of the cluster as given; a design's network changes it by the difference of the "
            f"networks' prices over {spec.network_years:g} years. Prices of parts are fitted, and assumed to grow "
            "with the speed of the ports; NICs are not in them."
        )
    differing, same = changed_columns(result)
    if same and differing:
        knee = result.designs[result.knee]
        fields = ", ".join(f"{axis.name} = {axis_value(axis, knee)}" for axis in same)
        said.append(f"All of the shown front has {fields}.")
    if len(result.designs) < spec.grid_size:
        said.append(f"{len(result.designs):,} of {spec.grid_size:,} designs of the grid, drawn with seed {spec.seed}.")
    return said


def sweep_page(result: SweepResult) -> PlanPage:
    """Return the page of a sweep: the front, all designs, what was varied and what was refused."""
    spec, knee = result.spec, result.designs[result.knee]
    able = [design for design in result.designs if design.figures is not None]
    front = {result.designs[place].index for place in result.front}
    sections = [
        Section("Designs by two objectives", (_plot(result, able, front),)),
        Section(
            "The front",
            (_front_table(result), _trade_table(result)),
            (f"{knee.name} is {trade(result, knee)}.",),
        ),
        Section("What each axis moves", (_effects_table(result),)),
        Section("All designs", (_all_table(result, able, front),)),
        Section("What was varied", (_varied_table(result),)),
    ]
    if result.refused:
        rows = tuple((kind, Value(count), reason) for kind, count, reason in reasons(result))
        sections.append(Section("What was refused", (SortableTable("Refusals", ("by", "designs", "example"), rows),)))
    verdict = (
        f"{len(front)} of {len(able)} designs are beaten by no other",
        f"A fair compromise: {describe_change(knee)}. {_figures_text(knee)}.",
    )
    facts = (
        Fact("designs estimated", Value(len(able))),
        Fact("refused", Value(sum(result.refused.values()))),
        Fact("on the front", Value(len(front))),
        Fact("objectives", str(len(spec.objectives)), ", ".join(_objective_texts(result))),
    )
    title, cluster = f"{spec.model} on {spec.cluster}", "co-design sweep"
    return PlanPage(title, cluster, verdict, facts, tuple(sections), tuple(remarks(result)))


def _objective_texts(result: SweepResult) -> list[str]:
    ways = {"lower": "least", "higher": "most"}
    return [f"{ways[one.better]} {MEASURES[one.measure].title}" for one in result.spec.objectives]


def _figures_text(design: Design) -> str:
    figures = design.figures
    assert figures is not None
    price = (
        "" if figures.usd_per_trillion_tokens is None else f"${figures.usd_per_trillion_tokens:,.0f} per 1e12 tokens, "
    )
    return (
        f"{format_count(figures.total_parameters)} parameters, {format_count(figures.activated_parameters)} activated, "
        f"{price}TPOT {figures.tpot_s * 1e3:.1f} ms; trains with {describe(figures.layout)}"
    )


def _plotted(result: SweepResult, able: list[Design]) -> list[tuple[Measure, str]]:
    """Return what is drawn: the objectives, then cache, throughput and network where every design has them."""
    ways = {one.measure: one.better for one in result.spec.objectives}
    asked = sorted(ways, key=lambda name: {"usd": 0, "tpot": 1, "total": 2}.get(name, 3))
    names = [*asked, *(name for name in ("kv", "throughput", "network") if name not in ways)]
    full = [name for name in names if all(design.value(name) is not None for design in able)]
    return [(MEASURES[name], ways.get(MEASURES[name].name, MEASURES[name].better)) for name in full]


def _plot(result: SweepResult, able: list[Design], front: set[int]) -> ParetoPlot:
    measures = _plotted(result, able)
    metrics = []
    for measure, better in measures:
        values = [_known(design, measure.name) for design in able]
        wide = min(values) > 0 and max(values) > 5 * min(values)
        metrics.append(Metric(measure.title, measure.unit, "lower" if better == "lower" else "higher", wide))
    points = tuple(
        DesignPoint(
            design.name,
            tuple(_known(design, measure.name) for measure, _ in measures),
            tuple((path, short_value(value)) for path, value in design.changed),
            design.index in front,
        )
        for design in able
    )
    caption = "The front is that of all objectives together, so that in two of them some of it looks beaten."
    return ParetoPlot("Designs", tuple(metrics), points, 0, min(1, len(metrics) - 1), caption, "assumed")


_HEAD = ("total", "activated", "KV per token", "$ per 1e12 tokens", "TPOT", "tokens/s per device", "network per device")


def _cells(figures: DesignFigures) -> tuple[Cell, ...]:
    def priced(value: float | None, unit: str) -> Cell:
        return "none" if value is None else Value(value, unit)

    return (
        Value(figures.total_parameters),
        Value(figures.activated_parameters),
        Value(figures.kv_bytes_per_token, "B"),
        priced(figures.usd_per_trillion_tokens, "$"),
        Value(figures.tpot_s, "s"),
        priced(figures.decode_tokens_per_s_per_device, ""),
        priced(figures.network_usd_per_device, "$"),
    )


def _front_table(result: SweepResult) -> SortableTable:
    differing, _ = changed_columns(result)
    known = {one.index: one for one in result.intervals}
    beaten = dict(zip(result.front, result.num_beaten, strict=True))
    rows, chosen = [], None
    for number, place in enumerate(by_price(result)):
        design = result.designs[place]
        figures = design.figures
        assert figures is not None
        chosen = number if place == result.knee else chosen
        cells, one = list(_cells(figures)), known.get(design.index)
        if one is not None:
            cells[3] = Value(one.value, "$", one.label, "modelled", one.low, one.high)
        cells.insert(4, "" if one is None else f"{short_number(one.low)}-{short_number(one.high)}")
        words = (figures.binds, figures.decode_binds)
        values = (axis_value(axis, design) for axis in differing)
        rows.append((design.name, *values, *cells, Value(beaten[place]), *words))
    tail = ("beats", "training bound by", "decoding bound by")
    head = ("design", *map(axis_title, differing), *_HEAD[:4], "interval", *_HEAD[4:], *tail)
    caption = f"{len(rows)} of {len(result.front)} members, chosen to show the range. The interval keeps the layout."
    return SortableTable("Members of the front", head, tuple(rows), caption, chosen)


def _trade_table(result: SweepResult) -> SortableTable:
    rows = []
    for place in by_price(result):
        design = result.designs[place]
        assert design.figures is not None
        rows.append((design.name, trade(result, design), describe(design.figures.layout)))
    chosen = by_price(result).index(result.knee)
    return SortableTable("What each trades", ("design", "what it trades", "trained with"), tuple(rows), chosen=chosen)


def by_price(result: SweepResult) -> list[int]:
    """Return the shown members' places, the cheapest first; without prices the best by the first objective."""
    first = result.spec.objectives[0]

    def key(place: int) -> tuple[float, int]:
        design = result.designs[place]
        price = design.value("usd")
        return (first.sign * _known(design, first.measure) if price is None else price, design.index)

    return sorted(result.shown, key=key)


def _all_table(result: SweepResult, able: list[Design], front: set[int]) -> SortableTable:
    axes, rows = result.spec.axes, []
    for design in sorted(able, key=lambda design: design.index not in front)[:_ROWS]:
        figures = design.figures
        assert figures is not None
        layout = figures.layout
        words = (f"{layout.pp}/{layout.tp}/{layout.ep}", figures.binds, "front" if design.index in front else "beaten")
        rows.append((design.name, *(axis_value(axis, design) for axis in axes), *_cells(figures), *words))
    head = ("design", *map(axis_title, axes), *_HEAD, "pp/tp/ep", "bound by", "")
    caption = "" if len(able) <= _ROWS else f"{_ROWS} of {len(able):,}; the file of the sweep has all."
    return SortableTable("Designs", head, tuple(rows), caption)


def _effects_table(result: SweepResult) -> SortableTable:
    titles = [MEASURES[one.measure].title for one in result.spec.objectives]
    rows = tuple(
        (*effect_words(result, one), Value(one.num_pairs), *(f"x {ratio:.3f}" for ratio in one.ratios.values()))
        for one in axis_effects(result)
    )
    caption = "Geometric mean over pairs of designs that differ in this axis alone, against the knee's value."
    return SortableTable("Effects", ("axis", "from", "to", "pairs", *titles), rows, caption)


def effect_words(result: SweepResult, effect: AxisEffect) -> tuple[str, str, str]:
    """Return an effect's axis, reference and value in short."""
    axis = next(axis for axis in result.spec.axes if axis.name == effect.axis)
    reference, value = ("/".join(map(short_value, value)) for value in (effect.reference, effect.value))
    return axis_title(axis), reference, value


def _varied_table(result: SweepResult) -> SortableTable:
    rows = tuple((axis.name, ", ".join("/".join(value) for value in axis.values)) for axis in result.spec.axes)
    return SortableTable("Axes", ("path", "values"), rows, f"The grid has {result.spec.grid_size:,} designs.")
