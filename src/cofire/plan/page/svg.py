"""SVG as text: elements, words that fit, patterns and the parts that several figures share.

Every text is escaped here and nowhere else. Colours are class names that ``page.css`` gives a light and a dark value.
Left out: measuring fonts; a character is taken as 0.56 em wide, a little more than a sans serif's mean.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from cofire.plan.page.figures import Basis, Value
from cofire.plan.page.scale import interval
from cofire.spec.figure import Label

WIDTH = 1120.0
NUM_COLOURS = 10

_CHARACTER_EM = 0.56


def text(value: str) -> str:
    """Return text that HTML and SVG show as it is, in an element and in a quoted attribute."""
    return html.escape(_printable(value), quote=True)


def _printable(value: str) -> str:
    # Control characters are no part of HTML, not even as references.
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in value)


def tag(name: str, body: str = "", /, **attributes: object) -> str:
    """Return an element; ``class_`` stands for class, an underscore for a hyphen, and what is None is left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = number(value) if isinstance(value, float) else text(str(value))
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    opened = " ".join(parts)
    return f"<{opened}>{body}</{name}>" if body or name not in _VOID else f"<{opened}/>"


_VOID = {"rect", "line", "path", "circle", "polygon", "polyline", "use"}


def number(value: float) -> str:
    """Return a coordinate to a tenth of a pixel, without a trailing zero."""
    rounded = f"{value:.1f}"
    rounded = rounded[:-2] if rounded.endswith(".0") else rounded
    return "0" if rounded == "-0" else rounded


def words(x: float, y: float, value: str, class_: str | None = None, anchor: str | None = None) -> str:
    """Return text at a place; ``anchor`` is ``middle`` or ``end``."""
    return tag("text", text(value), x=x, y=y, class_=class_, text_anchor=anchor)


def rect(x: float, y: float, width: float, height: float, class_: str | None = None, tip: str | None = None) -> str:
    """Return a rectangle; one with a tip takes the keyboard's focus."""
    return tag("rect", x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_, **tipped(tip))


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """Return a line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def tipped(tip: str | None) -> dict[str, object]:
    """Return the attributes of a mark that says ``tip`` under the mouse and to a screen reader."""
    if tip is None:
        return {}
    return {"data_tip": tip, "aria_label": tip.replace("\n", ", "), "tabindex": 0, "role": "img"}


def clipped(value: str, width: float, size: float = 12.0) -> str:
    """Return text cut to a width in pixels, with dots where something is missing."""
    most = int(width / (size * _CHARACTER_EM))
    return value if len(value) <= most else value[: max(most - 2, 1)].rstrip() + ".."


def text_width(value: str, size: float = 12.0) -> float:
    """Pixels that a text takes, about."""
    return len(value) * size * _CHARACTER_EM


def colour(index: int) -> str:
    """Return the class of the colour of a series."""
    return f"c{index % NUM_COLOURS}"


def drawing(title: str, about: str, height: float, body: str, width: float = WIDTH) -> str:
    """Return an SVG that scales with the page; ``about`` says in words what it shows."""
    head = tag("title", text(title)) + tag("desc", text(about))
    return tag("svg", head + body, class_="plot", viewBox=f"0 0 {number(width)} {number(height)}", role="group")


def legend(entries: Iterable[tuple[str, str]], *, line_classes: Iterable[str] = ()) -> str:
    """Return buttons that hide a series; entries are (class, name), of which ``line_classes`` are drawn as lines."""
    lines = set(line_classes)
    buttons = "".join(
        tag(
            "button",
            tag("i", class_=f"swatch {key} {'dash' if key in lines else ''}".rstrip()) + text(name),
            type="button",
            data_series=key,
            aria_pressed="true",
        )
        for key, name in entries
    )
    return tag("div", buttons, class_="legend")


def badges(label: Label | None, basis: Basis | None) -> str:
    """Return small marks that say how a number is known."""
    marks = [mark for mark in (basis, label) if mark]
    return "".join(tag("span", mark, class_=f"badge {mark}") for mark in marks)


def known(value: Value) -> str:
    """Return what is known about a value as lines of a tip: interval, basis, label and source."""
    parts = [interval(value), ", ".join(mark for mark in (value.basis, value.label) if mark), value.source]
    return "\n".join(part for part in parts if part)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a plain table of texts: what a figure shows, for those who do not see it."""
    head = "".join(tag("th", text(column), scope="col") for column in columns)
    body = "".join(tag("tr", "".join(tag("td", text(cell)) for cell in row)) for row in rows)
    return tag("table", tag("thead", tag("tr", head)) + tag("tbody", body))
