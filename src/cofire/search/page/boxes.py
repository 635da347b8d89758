"""Boxes in layers and the edges between them as SVG, for whatever graph: bottom first, ports at the boxes' sides.

A box has a title and a line below it; box and edge say more under the mouse. Colours are the classes of ``page.css``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from cofire.plan.page.svg import number, tag, text, text_width, words
from cofire.search.page.layers import Placement, place

_HEIGHT = 54.0
_MARGIN = 6.0
_LEAST_WIDTH = 74.0
# Of a sans serif; the first is bold, which is about an eighth wider.
_TITLE_PX, _SIZE_PX = 14.6, 11.5
_PORT_WIDTH = 54.0


@dataclass(frozen=True)
class Box:
    """One box.

    Attributes:
        kind: Its class, which gives the colour.
        title: Its first line.
        size: Its second line: the sizes of its dims.
        tip: What it says under the mouse, in lines.
        layer: From 0 at the bottom.
        from_below: What each edge from below is to the primitive, by the order of its dims; empty where that is plain.
        to_above: The same for edges to above.
    """

    kind: str
    title: str
    size: str
    tip: str
    layer: int
    from_below: tuple[str, ...] = ()
    to_above: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        """Pixels."""
        ports = _PORT_WIDTH * max(len(self.from_below), len(self.to_above))
        return max(_LEAST_WIDTH, ports, text_width(self.title, _TITLE_PX) + 20, text_width(self.size, _SIZE_PX) + 20)


@dataclass(frozen=True)
class Edge:
    """One edge from a box that makes something to the one that takes it.

    Attributes:
        lower: Number of the box that makes it.
        upper: Number of the box that takes it.
        tip: What it says under the mouse, in lines.
        held: Whether it is drawn as one that ends in a weight.
        low_port: Which of the things that its box makes, from 0.
        high_port: Which of the things that its box takes, from 0.
    """

    lower: int
    upper: int
    tip: str
    held: bool = False
    low_port: int = 0
    high_port: int = 0


@dataclass
class Graph:
    """Boxes and edges; boxes are numbered in the order of ``boxes``."""

    boxes: list[Box] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def add(self, box: Box) -> int:
        """Add a box and return its number."""
        self.boxes.append(box)
        return len(self.boxes) - 1

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return 1 + max(box.layer for box in self.boxes)


def draw(drawn: Graph, title: str, about: str) -> str:
    """Return a graph as an SVG.

    Args:
        drawn: The graph.
        title: What it is.
        about: What it shows, in words.
    """
    widths = [box.width for box in drawn.boxes]
    placed = place(widths, [box.layer for box in drawn.boxes], [(edge.lower, edge.upper) for edge in drawn.edges])
    tops = _tops(drawn, placed)
    body = [_edge(edge, route, drawn, tops) for edge, route in zip(drawn.edges, placed.routes, strict=True)]
    for k, box in enumerate(drawn.boxes):
        ports = [
            (route[end], tops[box.layer] + height, names[port])
            for edge, route in zip(drawn.edges, placed.routes, strict=True)
            for at, port, names, end, height in (
                (edge.lower, edge.low_port, box.to_above, 0, 12.0),
                (edge.upper, edge.high_port, box.from_below, -1, _HEIGHT - 5),
            )
            if at == k and names
        ]
        body.append(_drawn_box(k, box, placed.centres[k], tops[box.layer], ports))
    width, height = placed.width + 2 * _MARGIN, tops[0] + _HEIGHT + _MARGIN
    head = tag("title", text(title)) + tag("desc", text(about))
    return tag(
        "svg",
        head + "\n" + "\n".join(body),
        class_="graph",
        viewBox=f"0 0 {number(width)} {number(height)}",
        style=f"max-width: {number(width)}px; min-width: {number(0.72 * width)}px",
        role="group",
    )


def key(drawn: Graph, kinds: Mapping[str, str]) -> str:
    """Return the key of the colours that a graph has.

    Args:
        drawn: The graph.
        kinds: What each kind of box holds.
    """
    there = {box.kind for box in drawn.boxes}
    entries = [
        tag("span", tag("i", class_=f"swatch {kind}") + text(said)) for kind, said in kinds.items() if kind in there
    ]
    return tag("div", "".join(entries), class_="legend")


def _tops(drawn: Graph, placed: Placement) -> list[float]:
    """Return the upper side of each layer; a gap is the higher the further its edges go sideways."""
    gaps = [34.0] * (drawn.layers - 1)
    for edge, route in zip(drawn.edges, placed.routes, strict=True):
        for k, (low, high) in enumerate(pairwise(route)):
            layer = drawn.boxes[edge.lower].layer + k
            gaps[layer] = max(gaps[layer], min(34 + 0.14 * abs(high - low), 92.0))
    tops = [_MARGIN]
    for gap in reversed(gaps):
        tops.append(tops[-1] + _HEIGHT + gap)
    return tops[::-1]


def _edge(edge: Edge, route: tuple[float, ...], drawn: Graph, tops: list[float]) -> str:
    """Return an edge: curves between layers, and straight lines where it passes one."""
    layer = drawn.boxes[edge.lower].layer
    path = f"M{number(route[0] + _MARGIN)} {number(tops[layer])}"
    for k, (low, high) in enumerate(pairwise(route)):
        start, end = tops[layer + k], tops[layer + k + 1] + _HEIGHT
        middle, x1, x2 = number((start + end) / 2), number(low + _MARGIN), number(high + _MARGIN)
        path += f"C{x1} {middle} {x2} {middle} {x2} {number(end)}"
        if k < len(route) - 2:
            path += f"V{number(end - _HEIGHT)}"
    tip = tag("title", text(edge.tip))
    kind = "edge held" if edge.held else "edge"
    return tag("path", tip, d=path, class_=kind, data_from=edge.lower, data_to=edge.upper)


def _drawn_box(key: int, box: Box, centre: float, top: float, ports: list[tuple[float, float, str]]) -> str:
    x, left = centre + _MARGIN, centre - box.width / 2 + _MARGIN
    # Names of ports stand at the edge that they are at; the two lines make room for them.
    title = top + 23 + (5 if box.to_above else 0) - (5 if box.from_below else 0)
    parts = [
        tag("title", text(box.tip)),
        tag("rect", x=left, y=top, width=box.width, height=_HEIGHT, rx=7),
        words(x, title, box.title, "name", "middle"),
        words(x, title + 15, box.size, "size", "middle"),
    ]
    parts += [words(place + _MARGIN, y, name, "port", "middle") for place, y, name in ports]
    return tag("g", "".join(parts), class_=f"node {box.kind}", data_box=key)
