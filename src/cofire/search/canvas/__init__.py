"""Canvas: kernels of coarse primitives, non-linear ones among them, with sizes that a solver closes."""

from cofire.search.canvas.actions import Limits
from cofire.search.canvas.graph import Graph, Kernel, Node
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.sampler import Sampler
from cofire.search.canvas.shapes import Channel, DimName, Shape, Spatial
from cofire.search.canvas.variables import Extent, Variable

__all__ = [
    "Channel",
    "DimName",
    "Extent",
    "Graph",
    "Kernel",
    "Limits",
    "Node",
    "Primitive",
    "Sampler",
    "Shape",
    "Spatial",
    "Variable",
]
