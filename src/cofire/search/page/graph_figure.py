"""The primitive graph as SVG: output iterators at the bottom, input and weights at the top, one box per primitive.

Read upwards it is the order in which a search builds the operator, read downwards it is what happens to the data. The
two halves of a Merge are one box. A box says its primitive and size, and its tip the coordinates that it makes; an
edge's tip says the coordinate that it carries. Colours are Syno's structural classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.page.boxes import Box, Edge, Graph, draw, key
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
        found.edges.append(Edge(source, found.add(box), _tip(dim), low_port=_made_as(dim)))
    top = found.layers
    x = found.add(Box("tensor", "x", _shape(operator.input_shape), f"the input: {_read('x', operator.input)}", top))
    for k, dim in enumerate(operator.input):
        found.edges.append(Edge(makers[_key(dim)], x, _tip(dim), low_port=_made_as(dim), high_port=k))
    for k, (dims, shape) in enumerate(zip(operator.weights, operator.weight_shapes, strict=True)):
        weight = found.add(Box("tensor", f"W{k}", _shape(shape), f"weight {k}: {_read(f'W{k}', dims)}", top))
        for position, dim in enumerate(dims):
            # The edge starts where the weight is multiplied in; an operator need not mark that by a Share.
            source = makers.get(_key(Share(dim, k)), makers[_key(dim)])
            found.edges.append(Edge(source, weight, _tip(dim), True, _made_as(dim), position))
    return found


def draw_graph(operator: Operator) -> str:
    """Return the primitive graph as an SVG.

    Args:
        operator: The operator.
    """
    return draw(graph(operator), "Primitive graph", f"{operator}, output at the bottom")


def legend(operator: Operator) -> str:
    """Return the key of the colours that the graph of an operator has."""
    return key(graph(operator), KINDS)


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
        found.edges.append(Edge(source, made, _tip(below), low_port=_made_as(below), high_port=k))


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


def _tip(dim: Dim) -> str:
    return f"{dim}\n{_extent(dim)}"


def _extent(dim: Dim) -> str:
    values = list(dict.fromkeys(str(value) for value in dim.size.values))
    return f"size {dim.size} = {' or '.join(values)}"


def _shape(sizes: Sequence[Size]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _read(name: str, dims: Sequence[Dim]) -> str:
    return f"{name}[{', '.join(map(str, dims))}]"
