"""Figures of the plan's page that are points: the roofline, and the designs by two of their metrics.

The roofline follows Williams, Waterman and Patterson (CACM 2009): an operation reaches no more than the smaller of the
compute peak and its intensity times a bandwidth. Left out: cache levels; a roof is a memory, a network or a format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

from cofire.plan.page.figures import DesignPoint, Metric, ParetoPlot, Roof, Roofline
from cofire.plan.page.scale import Scale, fit, shown, shown_value
from cofire.plan.page.svg import (
    WIDTH,
    clipped,
    drawing,
    known,
    line,
    number,
    table,
    tag,
    text,
    text_width,
    tipped,
    words,
)

MAX_POINTS = 700
MAX_ROWS = 100

# Left, top, right and bottom of what another label must not cover.
_Area: TypeAlias = tuple[float, float, float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, WIDTH - 20, 16.0, 372.0
_HEIGHT = 420.0


def roofline_bounds(roofline: Roofline) -> tuple[float, float, float, float]:
    """Return the least and largest intensity and the least and largest rate of the drawing."""
    peak = max(roof.rate.value for roof in roofline.roofs if roof.kind == "compute")
    ridges = [peak / roof.rate.value for roof in roofline.roofs if roof.kind != "compute"]
    points = [point.intensity_flop_per_byte for point in roofline.points]
    rates = [point.rate.value for point in roofline.points]
    # A slope is seen from a tenth of its ridge on.
    slopes = [ridge / 10 for ridge in ridges]
    x = fit([*points, *ridges, *slopes, *([] if points or ridges else [1.0, 1000.0])], log=True, pad=0.12)
    # At least a decade and a half, or a slope looks like a wall.
    y = fit([peak, peak / 30, *rates], log=True, pad=0.1)
    return (*x, *y)


def draw_roofline(roofline: Roofline) -> str:
    """Draw roofs and operations, both axes logarithmic."""
    x_low, x_high, y_low, y_high = roofline_bounds(roofline)
    x, y = Scale(x_low, x_high, _LEFT, _RIGHT, log=True), Scale(y_low, y_high, _BOTTOM, _TOP, log=True)
    body = [_axes(_ticks(x, "FLOP/B"), _ticks(y, "FLOP/s"), "FLOP per byte moved", "FLOP per second")]
    peak = max(roof.rate.value for roof in roofline.roofs if roof.kind == "compute")
    taken: list[_Area] = []
    for roof in sorted(roofline.roofs, key=lambda roof: (roof.kind, -roof.rate.value)):
        compute = roof.kind == "compute"
        body.append(_level(roof, roofline, x, y, taken) if compute else _slope(roof, peak, x, y, taken))
    places = [(x.at(p.intensity_flop_per_byte), y.at(p.rate.value)) for p in roofline.points]
    taken += [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    for point, (px, py) in zip(roofline.points, places, strict=True):
        bound = _bound(point.intensity_flop_per_byte, roofline, point.over)
        tip = f"{point.name}\n{shown_value(point.rate)} at {shown(point.intensity_flop_per_byte, 'FLOP/B')} of "
        tip += f"{point.over}\n{shown(point.rate.value / bound, '%')} of its roof\n{known(point.rate)}"
        series = "c0" if point.over == "memory" else "c1"
        if point.over == "memory":
            body.append(tag("circle", cx=px, cy=py, r=5.0, class_=f"mark {series}", **tipped(tip.strip())))
        else:
            d = f"M{number(px)} {number(py - 6.5)}l6 6.5l-6 6.5l-6-6.5z"
            body.append(tag("path", d=d, class_=f"mark {series}", **tipped(tip.strip())))
        body.append(_placed(point.name, px, py, taken))
    about = f"{len(roofline.points)} operations under {len(roofline.roofs)} roofs"
    return _roofline_legend(roofline) + drawing(roofline.title, about, _HEIGHT, "".join(body))


def _bound(intensity: float, roofline: Roofline, over: str) -> float:
    """Return the rate that the highest compute roof and the fastest link of the kind allow."""
    peak = max(roof.rate.value for roof in roofline.roofs if roof.kind == "compute")
    links = [roof.rate.value for roof in roofline.roofs if roof.kind == over]
    return min(peak, max(links) * intensity) if links else peak


def _level(roof: Roof, roofline: Roofline, x: Scale, y: Scale, taken: list[_Area]) -> str:
    """Draw a compute roof from where the fastest link meets it."""
    links = [other.rate.value for other in roofline.roofs if other.kind != "compute"]
    begin = min(max(roof.rate.value / max(links), x.low), x.high) if links else x.low
    py = y.at(roof.rate.value)
    if py > _BOTTOM:
        return ""
    label = f"{roof.name}: {shown_value(roof.rate)}"
    width = text_width(label, 11)
    left = _RIGHT - width - 4
    hit = [x.at(p.intensity_flop_per_byte) for p in roofline.points if -7 < py - y.at(p.rate.value) < 24]
    if any(left - 8 < px < _RIGHT + 8 for px in hit):  # at the other end, if no operation lies there
        # Right of where the slope is above the label.
        rise = (y.at(y.low) - y.at(math.e * y.low)) / (x.at(math.e * x.low) - x.at(x.low))
        other = x.at(begin) + 8 + 17 / rise
        left = left if any(other - 8 < px < other + width + 8 for px in hit) else other
    taken += [(left, py - 17, left + width + 4, py), (x.at(begin), py - 1, _RIGHT, py + 1)]
    mark = tag("line", x1=x.at(begin), x2=_RIGHT, y1=py, y2=py, class_="roof", **tipped(_roof_tip(roof)))
    return mark + words(left, py - 5, label, "soft small")


def _slope(roof: Roof, peak: float, x: Scale, y: Scale, taken: list[_Area]) -> str:
    """Draw a bandwidth roof up to the highest compute roof, with its name along its lower end."""
    rate = roof.rate.value
    begin, end = max(x.low, y.low / rate), min(x.high, peak / rate)
    if begin >= end:
        return ""
    x1, y1, x2, y2 = x.at(begin), y.at(begin * rate), x.at(end), y.at(end * rate)
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    style = "roof" if roof.kind == "memory" else "roof network"
    mark = tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style, **tipped(_roof_tip(roof)))
    length = max(math.hypot(x2 - x1, y2 - y1), 1.0)
    across, down = (x2 - x1) / length, (y2 - y1) / length
    label = clipped(f"{roof.name}: {shown_value(roof.rate)}", length - 24, 11)
    lx, ly = x1 + across * 12, y1 + down * 12
    # Squares along the line, and beside it along the name, keep the names of operations off both.
    for at in range(0, int(length), 6):
        px, py = x1 + across * at, y1 + down * at
        taken.append((px - 2, py - 2, px + 2, py + 2))
        if 12 <= at <= 12 + text_width(label, 11):
            taken.append((px + down * 10 - 5, py - across * 10 - 5, px + down * 10 + 5, py - across * 10 + 5))
    turn = f"rotate({number(angle)} {number(lx)} {number(ly)})"
    return mark + tag("text", text(label), x=lx, y=ly - 6, class_="soft small", transform=turn)


def _roof_tip(roof: Roof) -> str:
    return f"{roof.name}\n{shown_value(roof.rate)}\n{known(roof.rate)}".strip()


def _placed(name: str, px: float, py: float, taken: list[_Area]) -> str:
    """Return a label where it hides no other; where there is no such place, none: the tip has the name."""
    name = clipped(name, 190, 11)
    width = text_width(name, 11)
    for dx, dy, anchor in (
        (9, 4, None),
        (-9, 4, "end"),
        (0, 18, "middle"),
        (0, -10, "middle"),
        (8, 17, None),
        (-8, 17, "end"),
        (8, -9, None),
        (-8, -9, "end"),
    ):
        left = px + dx - (width if anchor == "end" else width / 2 if anchor == "middle" else 0)
        box = (left, py + dy - 10, left + width, py + dy + 3)
        inside = box[0] >= _LEFT and box[2] <= _RIGHT and box[1] >= _TOP - 8 and box[3] <= _BOTTOM
        if inside and not any(_touch(box, other) for other in taken):
            taken.append(box)
            return words(px + dx, py + dy, name, "small", anchor)
    return ""


def _touch(a: _Area, b: _Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _roofline_legend(roofline: Roofline) -> str:
    names = {"memory": "bytes over memory", "network": "bytes over the network"}
    over = sorted({point.over for point in roofline.points})
    keys = "".join(
        f'<span><i class="swatch {"dot c0" if kind == "memory" else "diamond c1"}"></i>{names[kind]}</span>'
        for kind in over
    )
    return f'<div class="legend">{keys}</div>'


def roofline_table(roofline: Roofline) -> str:
    """Return the numbers of :func:`draw_roofline`."""
    rows = [
        [
            p.name,
            shown(p.intensity_flop_per_byte, "FLOP/B"),
            p.over,
            shown_value(p.rate),
            shown(p.rate.value / _bound(p.intensity_flop_per_byte, roofline, p.over), "%"),
            ", ".join(mark for mark in (p.rate.basis, p.rate.label) if mark),
        ]
        for p in roofline.points
    ]
    rows += [[r.name, "", r.kind, shown_value(r.rate), "roof", r.rate.label or ""] for r in roofline.roofs]
    return table(["operation", "intensity", "bytes over", "rate", "of its roof", "known as"], rows)


def front(points: Iterable[tuple[float, float]], x: Metric, y: Metric) -> list[int]:
    """Return which points no other is as good as in both metrics, from the best ``x`` on."""
    x_sign, y_sign = (1 if metric.better == "lower" else -1 for metric in (x, y))
    known_points = list(points)
    order = sorted(range(len(known_points)), key=lambda i: (x_sign * known_points[i][0], y_sign * known_points[i][1]))
    best, chosen = math.inf, []
    for index in order:
        if y_sign * known_points[index][1] < best:
            best = y_sign * known_points[index][1]
            chosen.append(index)
    return chosen


def drawn_points(pareto: ParetoPlot) -> list[DesignPoint]:
    """Return the points to draw: the front, and of the others as many, evenly, as a page holds."""
    points = list(pareto.points)
    if len(points) <= MAX_POINTS:
        return points
    best = [index for index, point in enumerate(points) if point.front]
    others = [index for index, point in enumerate(points) if not point.front]
    kept = _thinned(best, MAX_POINTS) + _thinned(others, max(MAX_POINTS - len(best), 0))
    return [points[index] for index in sorted(kept)]


def _thinned(indices: list[int], most: int) -> list[int]:
    """Return at most so many, evenly."""
    if len(indices) <= most:
        return indices
    return [indices[i * len(indices) // most] for i in range(most)]


def metric_scale(metric: Metric, values: Iterable[float]) -> Scale:
    """Return the axis of a metric, from 0 to 1."""
    low, high = fit(values, log=metric.log)
    return Scale(low, high, 0.0, 1.0, metric.log)


def draw_pareto(pareto: ParetoPlot) -> tuple[str, dict[str, object]]:
    """Draw the designs by the first choice of metrics, and all metrics as parallel lines below.

    Returns:
        The HTML, and what the script needs to draw another choice: places and ticks between 0 and 1.
    """
    points = drawn_points(pareto)
    scales = [metric_scale(metric, [p.values[i] for p in points]) for i, metric in enumerate(pareto.metrics)]
    ticks = [
        [(round(s.at(t), 4), shown(t, m.unit)) for t in s.ticks(6)] for s, m in zip(scales, pareto.metrics, strict=True)
    ]
    places = [[round(s.at(v), 4) for s, v in zip(scales, point.values, strict=True)] for point in points]
    x, y = pareto.x, pareto.y
    body = _axes(_spread(ticks[x], _LEFT, _RIGHT), _spread(ticks[y], _BOTTOM, _TOP), "", "")
    names = [_metric_name(metric) for metric in pareto.metrics]
    titles = words((_LEFT + _RIGHT) / 2, _BOTTOM + 36, names[x], "soft", "middle")
    titles += words(_LEFT, 8, names[y], "soft")
    on_front = front([(p.values[x], p.values[y]) for p in points], pareto.metrics[x], pareto.metrics[y])
    path = "L".join(f"{number(_px(places[i][x]))} {number(_py(places[i][y]))}" for i in on_front)
    dots = "".join(
        tag("circle", cx=_px(place[x]), cy=_py(place[y]), r=4.0, **_design(point, i, i in on_front))
        for i, (point, place) in enumerate(zip(points, places, strict=True))
    )
    svg = tag("g", body + titles, class_="axes") + tag("path", d=f"M{path}", class_="front") + tag("g", dots)
    choice = "".join(
        _choice(axis, [metric.name for metric in pareto.metrics], chosen) for axis, chosen in (("x", x), ("y", y))
    )
    keys = '<span><i class="swatch dot front"></i>not beaten in all metrics</span>'
    keys += '<span><i class="swatch dot other"></i>beaten by another design</span>'
    keys += '<span><i class="swatch front dash"></i>front in these two metrics</span>'
    about = f"{len(points)} designs by {names[x]} and {names[y]}"
    parts = tag("div", tag("span", choice, class_="choices") + keys, class_="legend")
    parts += tag("div", drawing(pareto.title, about, _HEIGHT, svg), class_="scatter")
    parts += _parallel(pareto, points, places, ticks)
    data: dict[str, object] = {
        "x": x,
        "y": y,
        "box": [_LEFT, _RIGHT, _TOP, _BOTTOM],
        "names": names,
        "ticks": ticks,
        "places": places,
        "better": [-1 if metric.better == "higher" else 1 for metric in pareto.metrics],
        "tips": [_design_tip(point, pareto.metrics) for point in points],
    }
    return parts, data


def _metric_name(metric: Metric) -> str:
    return f"{metric.name}, {metric.better} is better" + (", logarithmic" if metric.log else "")


def _design(point: DesignPoint, index: int, best: bool = False) -> dict[str, object]:
    """Return what a mark of a design has beside its place; those of the front take the keyboard's focus."""
    series = "design" + " front" * point.front + " best" * best
    return {"class_": series, "data_i": index, "tabindex": 0 if point.front or best else None}


def _design_tip(point: DesignPoint, metrics: tuple[Metric, ...]) -> str:
    values = [f"{metric.name}: {shown(v, metric.unit)}" for metric, v in zip(metrics, point.values, strict=True)]
    return "\n".join([point.name, *(f"{field} = {value}" for field, value in point.changed), *values])


def _choice(axis: str, names: list[str], chosen: int) -> str:
    options = "".join(
        tag("option", text(name), value=index, selected="selected" if index == chosen else None)
        for index, name in enumerate(names)
    )
    return tag("label", f"{axis}: " + tag("select", options, data_axis=axis))


def _px(place: float) -> float:
    return _LEFT + place * (_RIGHT - _LEFT)


def _py(place: float) -> float:
    return _BOTTOM + place * (_TOP - _BOTTOM)


def _parallel(
    pareto: ParetoPlot, points: list[DesignPoint], places: list[list[float]], ticks: list[list[tuple[float, str]]]
) -> str:
    """Draw each design as a line over all metrics, better at the top."""
    if len(pareto.metrics) < 3:
        return ""
    count = len(pareto.metrics)
    top, bottom = 34.0, 250.0
    columns = [90 + i * (WIDTH - 180) / (count - 1) for i in range(count)]

    def at(metric: int, place: float) -> float:
        up = place if pareto.metrics[metric].better == "higher" else 1 - place
        return bottom + up * (top - bottom)

    body = []
    # The front last, so that it lies on top; the more lines it has, the fainter they are.
    for index in sorted(range(len(points)), key=lambda i: points[i].front):
        place = " ".join(f"{number(columns[m])},{number(at(m, places[index][m]))}" for m in range(count))
        body.append(tag("polyline", points=place, **{**_design(points[index], index), "tabindex": None}))
    faint = min(0.75, max(0.12, 20 / max(sum(point.front for point in points), 1)))
    body = [tag("g", "".join(body), style=f"--front: {faint:.2f}")]
    for index, (metric, column) in enumerate(zip(pareto.metrics, columns, strict=True)):
        body.append(line(column, top, column, bottom, "axis"))
        body.append(words(column, 16, clipped(metric.name, (WIDTH - 180) / (count - 1) - 8), "soft", "middle"))
        for place, label in ticks[index]:
            body.append(words(column - 6, at(index, place) + 4, label, "tick", "end"))
    about = f"{len(points)} designs over {count} metrics, better at the top"
    caption = tag("p", "All metrics at once, better at the top; a line is a design.", class_="soft")
    return caption + tag("div", drawing(pareto.title, about, bottom + 14, "".join(body)), class_="parallel")


def pareto_table(pareto: ParetoPlot) -> str:
    """Return the designs of the front, the best by the first metric shown on top, at most :data:`MAX_ROWS`."""
    sign = 1 if pareto.metrics[pareto.x].better == "lower" else -1
    best = sorted((p for p in pareto.points if p.front), key=lambda p: sign * p.values[pareto.x])
    rows = [
        [
            p.name,
            *(shown(v, m.unit) for v, m in zip(p.values, pareto.metrics, strict=True)),
            ", ".join(f"{field} = {value}" for field, value in p.changed),
        ]
        for p in best[:MAX_ROWS]
    ]
    return table(["design", *(metric.name for metric in pareto.metrics), "changes"], rows)


def pareto_note(pareto: ParetoPlot) -> str:
    """Return what is not drawn, or not listed; nothing where all is."""
    drawn, best = len(drawn_points(pareto)), sum(point.front for point in pareto.points)
    notes = []
    if drawn < len(pareto.points):
        kept = "the front whole" if best <= drawn else "evenly from the front"
        notes.append(f"{drawn:,} of {len(pareto.points):,} designs are drawn, {kept}.")
    if best > MAX_ROWS:
        notes.append(f"The table lists {MAX_ROWS} of the {best:,} that no other beats in all metrics.")
    return " ".join(notes)


def _ticks(scale: Scale, unit: str) -> list[tuple[float, str]]:
    return [(scale.at(tick), shown(tick, unit)) for tick in scale.ticks(8)]


def _spread(ticks: list[tuple[float, str]], start: float, end: float) -> list[tuple[float, str]]:
    return [(start + place * (end - start), label) for place, label in ticks]


def _axes(x: list[tuple[float, str]], y: list[tuple[float, str]], x_title: str, y_title: str) -> str:
    body = []
    for place, label in x:  # a label at the right edge stays inside the drawing
        middle = min(place, WIDTH - text_width(label, 12) / 2)
        body.append(line(place, _TOP, place, _BOTTOM, "grid") + words(middle, _BOTTOM + 16, label, "tick", "middle"))
    body += [
        line(_LEFT, place, _RIGHT, place, "grid") + words(_LEFT - 7, place + 4, label, "tick", "end")
        for place, label in y
    ]
    if x_title:
        body.append(words((_LEFT + _RIGHT) / 2, _BOTTOM + 36, x_title, "soft", "middle"))
    if y_title:
        body.append(words(_LEFT, 8, y_title, "soft"))
    return "".join(body)
