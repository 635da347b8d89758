"""The page of a kernel: one HTML file like an operator's, with its graph, primitives, field, cost and code.

Data flows downwards, from the input to the output. The same kernel gives the same bytes in every process.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from textwrap import fill

from cofire.errors import SearchError, SpecError
from cofire.plan.page.svg import tag, text
from cofire.search.canvas.description import (
    DENSE_KERNEL,
    MAP_SIDE,
    NodeFigures,
    node_figures,
    place_figures,
    shown_field,
)
from cofire.search.canvas.from_spec import to_spec
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.receptive import Offset
from cofire.search.canvas.variables import Extent
from cofire.search.page import parts
from cofire.search.page.boxes import Box, Edge, Graph, draw, key
from cofire.spec.io import dump, write_text

# Classes that give boxes their colours, and the primitives of each.
KINDS = {
    "share": "with a weight: fc, convolution, mix, scale",
    "expand": "two tensors: broadcast, bmm",
    "reduce": "sums over a dim: fold, softmax",
    "split": "windows: unfold",
    "repeat": "moves or regroups: shift, group",
    "iterator": "one by one: activation, elementwise",
    "tensor": "input and output",
}
_CLASSES = {
    **dict.fromkeys(("fc", "convolution", "mix", "scale"), "share"),
    **dict.fromkeys(("broadcast", "bmm"), "expand"),
    **dict.fromkeys(("fold", "softmax"), "reduce"),
    "unfold": "split",
    **dict.fromkeys(("shift", "group"), "repeat"),
    **dict.fromkeys(("activation", "elementwise"), "iterator"),
    **dict.fromkeys(("input", "output"), "tensor"),
}
_CELL = 9  # pixels of a place of the map
_LINE = 40  # characters of a primitive, of which a table has several lines where it has more


def write_page(kernel: Kernel, extents: tuple[Extent, ...], path: Path) -> None:
    """Write the page of a kernel to a file, whole or not at all.

    Args:
        kernel: The kernel.
        extents: Places that it fills; numbers and code are those of the first.
        path: The file; its folder must exist.

    Raises:
        SearchError: The kernel cannot fill a place, or the file cannot be written.
    """
    page = render_page(kernel, extents)
    try:
        write_text(path, page)
    except SpecError as error:
        raise SearchError(f"{error}; name a file in a folder that is there and may be written to") from None


def render_page(kernel: Kernel, extents: tuple[Extent, ...]) -> str:
    """Return the page of a kernel as HTML text in ASCII.

    Args:
        kernel: The kernel.
        extents: Places that it fills; numbers and code are those of the first.

    Raises:
        SearchError: There is no place, or the kernel cannot fill one.
    """
    if not extents:
        raise SearchError("a page shows a kernel at a place; give one")
    nodes, field = node_figures(kernel, extents[0]), shown_field(kernel, extents[0])
    sections = (
        parts.section("Primitive graph", _graph(kernel, nodes)),
        parts.section("Primitives", _primitives(nodes, extents[0])),
        parts.section("Receptive field", _field(field)),
        parts.section("Cost", _costs(kernel, extents)),
        parts.section("PyTorch", _code(kernel, extents[0])),
        parts.section("Files", _files(kernel, extents)),
    )
    return parts.document(
        "Kernel", f"{kernel.digest:032x}", _summary(kernel), _tiles(kernel, extents[0], len(field)), sections
    )


def _summary(kernel: Kernel) -> str:
    graph = kernel.graph
    weights = f"{graph.num_weighted} of them with a weight" if graph.num_weighted else "none of them with a weight"
    grouped = f" Groups G = {kernel.groups}." if kernel.groups > 1 else ""
    return f"Maps [N, C, H, W] to the same shape by {graph.num_primitives} primitives, {weights}.{grouped}"


def _tiles(kernel: Kernel, extent: Extent, field_size: int) -> str:
    cost = place_figures(kernel, extent)
    at = f"at {_place(extent)}"
    return parts.tiles(
        (
            ("Parameters", *parts.count(cost.parameters, at)),
            ("Multiply-adds", *parts.count(cost.multiply_adds, at)),
            ("Of dense", f"{cost.dense_ratio:.1%}", f"a convolution {DENSE_KERNEL} x {DENSE_KERNEL}"),
            ("Sees", f"{field_size:,}", f"of {MAP_SIDE**2:,} places around"),
        )
    )


def _place(extent: Extent) -> str:
    return " x ".join(map(str, extent))


def graph(kernel: Kernel, nodes: tuple[NodeFigures, ...]) -> Graph:
    """Return the boxes and edges of a kernel, a box for every node under the node's number; the output is lowest.

    Args:
        kernel: The kernel.
        nodes: Its nodes at a place.
    """
    found = kernel.graph
    layers = [0] * len(nodes)
    for position in reversed(range(len(nodes))):
        for k in found.nodes[position].inputs:
            layers[k] = max(layers[k], layers[position] + 1)
    drawn = Graph()
    for position, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        primitive = found.nodes[position].primitive
        tip = f"{node.primitive}\n{_times(node.sizes)}" + (f"\nweight {_times(node.weight)}" if node.weight else "")
        names = ("first", "second") if len(node.inputs) > 1 else ()
        drawn.add(
            Box(_CLASSES[primitive.name], f"t{position} {primitive.name}", node.shape, tip, layer, to_above=names)
        )
    for position, node in enumerate(nodes):
        for port, k in enumerate(node.inputs):
            drawn.edges.append(Edge(position, k, f"t{k}: {nodes[k].shape}\n{_times(nodes[k].sizes)}", low_port=port))
    return drawn


def _graph(kernel: Kernel, nodes: tuple[NodeFigures, ...]) -> str:
    drawn = graph(kernel, nodes)
    picture = draw(drawn, "Primitive graph", f"{kernel}, input at the top")
    caption = "Downwards: what happens to the data. A box and an edge say more under the mouse."
    return f"<figure>{key(drawn, KINDS)}<div class='drawing'>{picture}</div>{tag('figcaption', text(caption))}</figure>"


def _primitives(nodes: tuple[NodeFigures, ...], extent: Extent) -> str:
    rows = [
        [
            f"t{position}",
            fill(" ".join([node.primitive, *(f"t{k}" for k in node.inputs)]), _LINE),
            node.shape,
            _times(node.sizes),
            _times(node.weight),
            f"{node.multiply_adds:,}" if node.multiply_adds else "",
        ]
        for position, node in enumerate(nodes)
    ]
    head = ["", "primitive", "shape", f"at {_place(extent)}", "weight", "multiply-adds"]
    return parts.table(head, rows, 3)


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _field(field: tuple[Offset, ...]) -> str:
    """Return the field on its map, with the place itself marked."""
    middle, side = MAP_SIDE // 2, MAP_SIDE * _CELL
    cells = []
    for row, offsets in groupby(sorted(field), key=lambda offset: offset[0]):
        columns = [column for _, column in offsets]
        runs = [
            [column for _, column in run] for _, run in groupby(enumerate(columns), key=lambda pair: pair[1] - pair[0])
        ]
        cells += [
            tag(
                "rect",
                x=(run[0] + middle) * _CELL,
                y=(row + middle) * _CELL,
                width=len(run) * _CELL,
                height=_CELL,
                class_="seen",
            )
            for run in runs
        ]
    frame = tag("rect", x=0, y=0, width=side, height=side, class_="map")
    itself = tag("circle", cx=side / 2, cy=side / 2, r=_CELL / 3, class_="itself")
    about = f"{len(field)} of {MAP_SIDE**2} places are seen"
    picture = tag(
        "svg",
        tag("title", "Receptive field") + tag("desc", about) + frame + "".join(cells) + itself,
        class_="field",
        viewBox=f"0 0 {side} {side}",
        style=f"max-width: {side}px",
        role="img",
    )
    said = (
        f"Places of the input that the output at the dot may depend on, whatever the weights are, on a torus of "
        f"{MAP_SIDE} x {MAP_SIDE}."
    )
    return f"<figure>{picture}{tag('figcaption', text(said))}</figure>"


def _costs(kernel: Kernel, extents: tuple[Extent, ...]) -> str:
    found = [place_figures(kernel, extent) for extent in extents]
    rows = [
        [_place(cost.place), f"{cost.parameters:,}", f"{cost.multiply_adds:,}", f"{cost.dense_ratio:.1%}"]
        for cost in found
    ]
    said = "Multiply-adds are those of contractions, for one example."
    head = ["C x H x W", "parameters", "multiply-adds", f"of dense {DENSE_KERNEL} x {DENSE_KERNEL}"]
    return parts.table(head, rows, 1) + tag("p", said, class_="note")


def _code(kernel: Kernel, extent: Extent) -> str:
    try:
        from cofire.search.canvas.lowering import write_source
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return parts.absent(parts.NO_TORCH)
    return parts.code(f"A module that needs nothing but PyTorch, at {_place(extent)}", write_source(kernel, extent))


def _files(kernel: Kernel, extents: tuple[Extent, ...]) -> str:
    spec = f'<pre id="spec">{text(dump(to_spec(kernel, places=extents)))}</pre>'
    drawing = f'<pre id="graphviz">{text(kernel.graph.graphviz())}</pre>'
    return parts.files(("KernelSpec in TOML", spec), ("Graphviz source of the graph", drawing))
