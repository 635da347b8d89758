"""A kernel in numbers at a place: what its primitives make and cost, as documents, tables and pages say it."""

from __future__ import annotations

from typing import NamedTuple

from cofire.search.canvas.from_spec import dense_multiply_adds
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.receptive import Offset, receptive_field
from cofire.search.canvas.variables import Extent

DENSE_KERNEL = 3  # window of the dense convolution that a kernel by itself is measured against
MAP_SIDE = 31  # of the map that its receptive field is shown on: the windows of few kernels go around


class NodeFigures(NamedTuple):
    """One node at a place.

    Attributes:
        primitive: The primitive with its arguments.
        inputs: Positions of the nodes it reads.
        shape: Its output's shape in symbols; sizes of 1 are left out.
        sizes: The same in numbers.
        weight: Sizes of its weight; empty: it has none.
        multiply_adds: For one example.
    """

    primitive: str
    inputs: tuple[int, ...]
    shape: str
    sizes: tuple[int, ...]
    weight: tuple[int, ...]
    multiply_adds: int


class PlaceFigures(NamedTuple):
    """A kernel at a place.

    Attributes:
        place: Channels, height and width.
        parameters: Elements of all weights.
        multiply_adds: For one example.
        dense_ratio: The multiply-adds over those of a dense 3 x 3 convolution.
    """

    place: Extent
    parameters: int
    multiply_adds: int
    dense_ratio: float


def node_figures(kernel: Kernel, extent: Extent) -> tuple[NodeFigures, ...]:
    """Return all nodes of a kernel at a place.

    Args:
        kernel: The kernel.
        extent: The place.

    Raises:
        SearchError: The kernel cannot fill the place.
    """
    kernel.check(extent)
    graph, found = kernel.graph, []
    for position, (node, shape) in enumerate(zip(graph.nodes, graph.shapes, strict=True)):
        sizes = tuple(int(shape.size(dim).value(extent, kernel.groups)) for dim in shape.wide_dims)
        weight = tuple(int(size.value(extent, kernel.groups)) for size in graph.weight(position))
        count = node.primitive.multiply_adds(graph.input_shapes(position))
        work = 0 if count is None else int(count.value(extent, kernel.groups))
        found.append(NodeFigures(str(node.primitive), node.inputs, str(shape), sizes, weight, work))
    return tuple(found)


def place_figures(kernel: Kernel, extent: Extent) -> PlaceFigures:
    """Return what a kernel costs at a place.

    Args:
        kernel: The kernel.
        extent: The place.

    Raises:
        SearchError: The kernel cannot fill the place.
    """
    work = kernel.multiply_adds(extent)
    return PlaceFigures(extent, kernel.parameters(extent), work, work / dense_multiply_adds(extent, DENSE_KERNEL))


def shown_field(kernel: Kernel, extent: Extent) -> tuple[Offset, ...]:
    """Return the receptive field on a map that is large enough to see its form.

    Args:
        kernel: The kernel.
        extent: The place whose channels it has.

    Raises:
        SearchError: The kernel cannot fill a map of so many channels.
    """
    return receptive_field(kernel, extent._replace(h=MAP_SIDE, w=MAP_SIDE))
