"""The primitive graph as SVG: output iterators at the bottom, input and weights at the top, one box per primitive.

Read upwards it is the order in which a search builds the operator, read downwards it is what happens to the data. The
two halves of a Merge are one box. A box says its primitive and size, and its tip the coordinates that it makes; an
edge's tip says the coordinate that it carries. Colours are Syno's structural classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cofire.errors import SearchError
from cofire.plan.page.svg import number, tag, text, text_width, words
from cofire.search.graph import Operator
from cofire.search.page.layers import Placement, place
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Reduction,
    Share,
    Shift,
    Split,
    Stride,
    Unfold,
)
from cofire.search.sizes import Size

# Class names, what they hold, and the series colour of the style sheet.
KINDS = {
    "iterator": "output iterator",
    "reduce": "Reduce: none to one, summed",
    "repeat": "Shift, Stride: one to one",
    "split": "Split, Unfold: two to one",
    "merge": "Merge: one to two",
    "share": "Share: multiply by a weight",
    "expand": "Expand: one to none, repeated",
    "tensor": "input and weights",
}

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
        kind: A key of ``KINDS``.
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
    """One dim on its way from the box that makes it to the one that takes it.

    Attributes:
        lower: Number of the box that makes it.
        upper: Number of the box that takes it.
        dim: The dim.
        low_port: Which of the dims that its box makes, from 0.
        high_port: Which of the dims that its box takes, from 0.
    """

    lower: int
    upper: int
    dim: Dim
    low_port: int = 0
    high_port: int = 0


@dataclass
class Graph:
    """Boxes and edges of an operator; boxes are numbered in the order of ``boxes``."""

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


def graph(operator: Operator) -> Graph:
    """Return the boxes and edges of an operator.

    Args:
        operator: The operator.
    """
    found = Graph()
    makers: dict[Hashable, int] = {}
    for dim in (*operator.output, *operator.reductions):
        makers[_key(dim)] = found.add(_box(dim, 0))
    ends = [*operator.input, *operator.expansions, *(dim for weight in operator.weights for dim in weight)]
    for end in ends:
        _build(end, found, makers)
    for dim in operator.expansions:
        source = makers[_key(dim)]
        box = Box("expand", "Expand", str(dim.size), f"Expand: repeat over {dim}", found.boxes[source].layer + 1)
        found.edges.append(Edge(source, found.add(box), dim, _made_as(dim)))
    top = found.layers
    x = found.add(Box("tensor", "x", _shape(operator.input_shape), f"the input: {_read('x', operator.input)}", top))
    for k, dim in enumerate(operator.input):
        found.edges.append(Edge(makers[_key(dim)], x, dim, _made_as(dim), k))
    for k, (dims, shape) in enumerate(zip(operator.weights, operator.weight_shapes, strict=True)):
        weight = found.add(Box("tensor", f"W{k}", _shape(shape), f"weight {k}: {_read(f'W{k}', dims)}", top))
        for position, dim in enumerate(dims):
            # The edge starts where the weight is multiplied in; an operator need not mark that by a Share.
            source = makers.get(_key(Share(dim, k)), makers[_key(dim)])
            found.edges.append(Edge(source, weight, dim, _made_as(dim), position))
    return found


def draw_graph(operator: Operator) -> str:
    """Return the primitive graph as an SVG.

    Args:
        operator: The operator.
    """
    drawn = graph(operator)
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
    head = tag("title", "Primitive graph") + tag("desc", text(f"{operator}, output at the bottom"))
    return tag(
        "svg",
        head + "\n" + "\n".join(body),
        class_="graph",
        viewBox=f"0 0 {number(width)} {number(height)}",
        style=f"max-width: {number(width)}px; min-width: {number(0.72 * width)}px",
        role="group",
    )


def legend(operator: Operator) -> str:
    """Return the key of the colours that the graph of an operator has."""
    kinds = {box.kind for box in graph(operator).boxes}
    entries = [
        tag("span", tag("i", class_=f"swatch {kind}") + text(said)) for kind, said in KINDS.items() if kind in kinds
    ]
    return tag("div", "".join(entries), class_="legend")


# -- boxes and edges ---------------------------------------------------------------------------------------------


def _build(dim: Dim, found: Graph, makers: dict[Hashable, int]) -> None:
    """Add the box that makes a dim, those below it first."""
    if _key(dim) in makers:
        return
    for below in dim.below:
        _build(below, found, makers)
    sources = [makers[_key(below)] for below in dim.below]
    made = found.add(_box(dim, 1 + max(found.boxes[source].layer for source in sources)))
    makers[_key(dim)] = made
    for k, (source, below) in enumerate(zip(sources, dim.below, strict=True)):
        found.edges.append(Edge(source, made, below, _made_as(below), k))


def _box(dim: Dim, layer: int) -> Box:
    """Return the box of the primitive that makes a dim."""
    size, tip = str(dim.size), f"\ncoordinate {dim} of {_extent(dim)}"
    match dim:
        case Reduction():
            return Box("reduce", f"Reduce {dim}", size, f"Reduce: sum over {dim} of {_extent(dim)}", layer)
        case Iterator():
            return Box("iterator", f"{dim}", size, f"output dim {dim.index}: {dim} of {_extent(dim)}", layer)
        case Split():
            law = f"Split: i*B + j with B = {dim.minor.size}"
            return Box("split", "Split", size, law + tip, layer, from_below=("major", "minor"))
        case Unfold():
            law = f"Unfold: i + j - floor(k/2) with k = {dim.window.size}, zero outside [0, {size})"
            return Box("split", "Unfold", size, law + tip, layer, from_below=("place", "window"))
        case MergeMajor() | MergeMinor():
            halves = MergeMajor(dim.source, dim.block), MergeMinor(dim.source, dim.block)
            sizes = " and ".join(str(half.size) for half in halves)
            coordinates = "".join(f"\ncoordinate {half} of {_extent(half)}" for half in halves)
            law = f"Merge: i div B and i mod B with B = {dim.block}"
            return Box("merge", "Merge", sizes, law + coordinates, layer, to_above=("div", "mod"))
        case Shift():
            law = f"Shift: (i + d) mod N with d = {dim.distance}, N = {size}"
            return Box("repeat", f"Shift {dim.distance:+d}", size, law + tip, layer)
        case Stride():
            return Box("repeat", f"Stride {dim.stride}", size, f"Stride: s*i with s = {dim.stride}" + tip, layer)
        case Share():
            law = f"Share: index weight {dim.weight} by i too, and multiply"
            return Box("share", f"Share W{dim.weight}", size, law + tip, layer)
    raise SearchError(f"{type(dim).__name__} is not a primitive that can be drawn; use those of the assembler")


def _key(dim: Dim) -> Hashable:
    """Return what names the primitive that makes a dim."""
    return ("merge", dim.source, dim.block) if isinstance(dim, MergeMajor | MergeMinor) else dim


def _made_as(dim: Dim) -> int:
    """Return which of the dims that its primitive makes a dim is."""
    return int(isinstance(dim, MergeMinor))


def _extent(dim: Dim) -> str:
    values = list(dict.fromkeys(str(value) for value in dim.size.values))
    return f"size {dim.size} = {' or '.join(values)}"


def _shape(sizes: Sequence[Size]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _read(name: str, dims: Sequence[Dim]) -> str:
    return f"{name}[{', '.join(map(str, dims))}]"


# -- drawing -----------------------------------------------------------------------------------------------------


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
    upper = drawn.boxes[edge.upper]
    tip = tag("title", text(f"{edge.dim}\n{_extent(edge.dim)}"))
    kind = "edge held" if upper.kind == "tensor" and upper.title != "x" else "edge"
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
