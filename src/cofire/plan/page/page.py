"""The page of a plan: one HTML file that opens from disk, needs no network and follows the reader's colour scheme.

``render_page`` turns a :class:`~cofire.plan.page.figures.PlanPage` into text. The figures are SVG in the page itself,
so that they print and can be read without a script; ``page.js`` adds the values under the mouse, curves that a click
on the legend hides, sorted tables and the choice of axes. Under each figure its numbers are a table. Equal pages give
equal bytes. Left out: comparing plans, and zooming.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import Any

from cofire.errors import PlanError
from cofire.plan.page.bars import (
    MAX_BARS,
    draw_memory,
    draw_sensitivity,
    draw_step,
    memory_table,
    sensitivity_table,
    step_table,
)
from cofire.plan.page.figures import (
    Cell,
    ErrorTable,
    Fact,
    FormulaList,
    GroupedTopology,
    Item,
    LayeredTopology,
    MemoryStack,
    ParetoPlot,
    PlanPage,
    Roofline,
    Section,
    Sensitivity,
    SortableTable,
    StepBreakdown,
    TimeLine,
    TorusTopology,
    Value,
)
from cofire.plan.page.scale import interval, shown_value
from cofire.plan.page.scatter import draw_pareto, draw_roofline, pareto_note, pareto_table, roofline_table
from cofire.plan.page.svg import badges, known, tag, text
from cofire.plan.page.timeline import draw_timeline, timeline_note, timeline_table
from cofire.plan.page.topology import (
    draw_grouped,
    draw_layered,
    draw_torus,
    grouped_table,
    layered_table,
    torus_table,
)
from cofire.spec.io import write_text

# Figures that are a drawing and nothing else: what draws them, and what lists their numbers.
_PLAIN: dict[type, tuple[Callable[[Any], str], Callable[[Any], str]]] = {
    MemoryStack: (draw_memory, memory_table),
    StepBreakdown: (draw_step, step_table),
    Sensitivity: (draw_sensitivity, sensitivity_table),
    Roofline: (draw_roofline, roofline_table),
    LayeredTopology: (draw_layered, layered_table),
    GroupedTopology: (draw_grouped, grouped_table),
    TorusTopology: (draw_torus, torus_table),
}

_HATCH = (
    '<svg width="0" height="0" class="defs" aria-hidden="true"><defs><pattern id="hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="2.2" height="6" class="hatchline"/>'
    "</pattern></defs></svg>"
)


def write_page(path: str | os.PathLike[str], page: PlanPage) -> None:
    """Write a page to a file, whole or not at all.

    Raises:
        SpecError: The file cannot be written.
    """
    write_text(path, render_page(page))


def render_page(page: PlanPage) -> str:
    """Return a page as HTML text in ASCII.

    Args:
        page: What it shows; sections without any item or sentence are left out.
    """
    data: dict[str, object] = {}
    keys = (f"figure-{index}" for index in itertools.count())
    sections = "\n".join(_section(section, keys, data) for section in page.sections if section.items or section.text)
    headline, further = (page.verdict[0], page.verdict[1:]) if page.verdict else (page.title, ())
    subtitle = f" - {text(page.subtitle)}" if page.subtitle else ""
    document = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(page.title)}: plan</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
{_HATCH}
<main>
<p class="eyebrow">Plan of {text(page.title)}{subtitle}</p>
<h1>{text(headline)}</h1>
{"".join(tag("p", text(sentence), class_="verdict") for sentence in further)}
{_tiles(page.facts)}
{_key(page)}
{sections}
{_remarks(page.remarks)}
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _tiles(facts: Iterable[Fact]) -> str:
    tiles = list(map(_tile, facts))
    # Rows of at most six, as even as they can be.
    rows = -(-len(tiles) // 6)
    return tag("div", "".join(tiles), class_="tiles", style=f"--columns: {-(-len(tiles) // rows)}") if tiles else ""


def _tile(fact: Fact) -> str:
    if isinstance(fact.value, str):
        shown, marks, remark = fact.value, "", fact.remark
    else:
        shown, marks = shown_value(fact.value), badges(fact.value.label, fact.value.basis)
        remark = "; ".join(part for part in (interval(fact.value), fact.remark) if part)
    tip = known(fact.value) if isinstance(fact.value, Value) else ""
    body = tag("span", text(fact.name)) + tag("b", text(shown)) + tag("span", text(remark))
    return tag("div", body + tag("span", marks, class_="marks"), class_="tile", title=tip or None)


def _key(page: PlanPage) -> str:
    """Say what the marks mean, where a number has one."""
    if not page.facts and not page.sections:
        return ""
    said = (
        ("measured", "read off the hardware"),
        ("calibrated", "fitted to a measured run"),
        ("assumed", "from a data sheet or a rule of thumb"),
        ("modelled", "by a formula"),
        ("simulated", "by running a model of it in time"),
    )
    marks = "".join(tag("span", f'<span class="badge {name}">{name}</span> {means}') for name, means in said)
    return tag(
        "p", f"{marks}<span>A number without a mark is exact, or marked by its title or note.</span>", class_="key"
    )


def _section(section: Section, keys: Iterator[str], data: dict[str, object]) -> str:
    said = "".join(tag("p", text(sentence), class_="said") for sentence in section.text)
    items = "\n".join(_item(item, next(keys), data) for item in section.items)
    return f"<section>\n<h2>{text(section.title)}</h2>\n{said}\n{items}\n</section>"


def _item(item: Item, key: str, data: dict[str, object]) -> str:
    if isinstance(item, SortableTable):
        return _sortable(item, key)
    if isinstance(item, FormulaList):
        return _formulas(item, key)
    if isinstance(item, ErrorTable):
        return _errors(item, key)
    if isinstance(item, TimeLine):
        drawn, data[key] = draw_timeline(item)
        return _figure(key, item, drawn, timeline_table(item), timeline_note(item))
    if isinstance(item, ParetoPlot):
        drawn, data[key] = draw_pareto(item)
        return _figure(key, item, drawn, pareto_table(item), pareto_note(item))
    if type(item) not in _PLAIN:
        known_types = ", ".join(sorted(kind.__name__ for kind in _PLAIN))
        raise PlanError(f"{type(item).__name__} is nothing that a page shows; use one of {known_types}")
    draw, listed = _PLAIN[type(item)]
    note = ""
    if isinstance(item, MemoryStack) and len(item.bars) > MAX_BARS:
        note = f"The first {MAX_BARS} of {len(item.bars)} bars."
    return _figure(key, item, draw(item), listed(item), note)


def _figure(key: str, item: Any, drawn: str, listed: str, note: str) -> str:
    marks = badges(getattr(item, "label", None), getattr(item, "basis", None))
    caption = " ".join(part for part in (item.caption, note) if part)
    parts = [f"<h3>{text(item.title)} {marks}</h3>", f'<div class="drawing">{drawn}</div>']
    if caption:
        parts.append(tag("figcaption", text(caption)))
    parts.append(f'<details class="numbers"><summary>The numbers</summary><div class="scroll">{listed}</div></details>')
    return tag("figure", "\n".join(parts), id=key)


def _sortable(item: SortableTable, key: str) -> str:
    numbers = [
        bool(item.rows) and all(isinstance(row[column], Value) for row in item.rows)
        for column in range(len(item.columns))
    ]
    head = "".join(
        tag(
            "th",
            tag("button", text(name), type="button"),
            scope="col",
            class_="number" if right else None,
            aria_sort="none",
        )
        for name, right in zip(item.columns, numbers, strict=True)
    )
    rows = "".join(
        tag("tr", "".join(map(_cell, row)), class_="chosen" if index == item.chosen else None)
        for index, row in enumerate(item.rows)
    )
    body = tag("table", tag("thead", tag("tr", head)) + tag("tbody", rows), class_="sortable")
    return _table_figure(key, item.title, body, item.caption)


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return tag("td", text(cell))
    body = tag("span", text(shown_value(cell))) + badges(cell.label, cell.basis)
    return tag("td", body, class_="number", data_value=repr(float(cell.value)), title=known(cell) or None)


def _formulas(item: FormulaList, key: str) -> str:
    rows = "".join(
        tag(
            "tr",
            tag("td", text(formula.name))
            + tag("td", tag("code", text(formula.formula)) + "<br>" + tag("code", text(f"= {formula.substituted}")))
            + _cell(formula.value),
        )
        for formula in item.formulas
    )
    head = '<thead><tr><th>quantity</th><th>formula, and with numbers</th><th class="number">value</th></tr></thead>'
    return _table_figure(key, item.title, tag("table", head + tag("tbody", rows), class_="formulas"), item.caption)


def _errors(item: ErrorTable, key: str) -> str:
    widest = max((abs(row.error) for row in item.rows), default=0.0) or 1.0
    rows = []
    for row in item.rows:
        width = f"width:{100 * abs(row.error) / widest:.1f}%"
        side = "over" if row.error >= 0 else "under"
        bar = tag("i", tag("i", style=width, class_=side), class_="errorbar")
        error = tag("td", f"{100 * row.error:+.1f} %", class_="number", data_value=repr(row.error))
        role = "fitted" if row.fitted else "predicted"
        rows.append(
            tag(
                "tr",
                tag("td", text(row.name))
                + _cell(row.predicted)
                + _cell(row.published)
                + error
                + tag("td", bar)
                + tag("td", role, class_="remark"),
                class_="fitted" if row.fitted else None,
            )
        )
    head = '<thead><tr><th>point</th><th class="number">predicted</th><th class="number">published</th>'
    head += '<th class="number">error</th><th></th><th></th></tr></thead>'
    free = [abs(row.error) for row in item.rows if not row.fitted]
    summary = ""
    if free:
        summary = f"Mean error {100 * sum(free) / len(free):.1f} %, largest {100 * max(free):.1f} %, "
        summary += f"over {len(free)} points that were not fitted; a fitted one is no test."
    caption = " ".join(part for part in (summary, item.caption) if part)
    return _table_figure(key, item.title, tag("table", head + tag("tbody", "".join(rows))), caption)


def _table_figure(key: str, title: str, body: str, caption: str) -> str:
    said = tag("figcaption", text(caption)) if caption else ""
    return tag("figure", f'<h3>{text(title)}</h3><div class="scroll">{body}</div>{said}', id=key, class_="tabled")


def _remarks(remarks: Iterable[str]) -> str:
    items = "".join(tag("li", text(remark)) for remark in remarks)
    return f"<section>\n<h2>Remarks</h2>\n{tag('ul', items, class_='notes')}\n</section>" if items else ""


def _json(data: dict[str, object]) -> str:
    """Return JSON that is safe inside a script element: no character there can end it."""
    packed = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return packed.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("cofire.plan.page") / name).read_text("utf-8")
