"""A graph of Canvas's primitives, and the kernel it is when it is finished.

A graph is a list of nodes; each names its inputs by their positions before it, the first is the input. It is immutable:
a primitive applied gives another graph. A kernel is a graph that ends with an output and has no dynamic variable left.

``digest`` names a graph whatever the order its nodes came in, by colours that are refined from inputs to outputs and
back (Weisfeiler-Lehman). A colour knows the primitive's name and arguments, the order of its inputs, and which of them
are one tensor. It is equal in every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import blake2b

from cofire.errors import SearchError
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.primitives import Input, Output
from cofire.search.canvas.shapes import Shape
from cofire.search.canvas.variables import MAX_DYNAMIC, Extent, Variable, product

_SWEEPS = 2  # of colours, each way


@dataclass(frozen=True)
class Node:
    """A primitive applied.

    Attributes:
        primitive: What is applied.
        inputs: Positions of the nodes it is applied to, in order.
    """

    primitive: Primitive
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed.

    Attributes:
        nodes: The nodes; the first is the input.
        known: Shapes of the first nodes where the maker has them already.
        shapes: Shape of the output of every node.
    """

    nodes: tuple[Node, ...]
    known: tuple[Shape, ...] = field(default=(), repr=False, compare=False)
    shapes: tuple[Shape, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Infer shapes.

        Raises:
            SearchError: A node comes before its inputs, does not apply to them, or needs what can never be whole.
        """
        if not self.nodes or not isinstance(self.nodes[0].primitive, Input):
            raise SearchError("a graph must begin with an input; put one first")
        shapes = list(self.known)
        for position, node in enumerate(self.nodes[len(shapes) :], len(shapes)):
            _check_node(position, node, self.nodes)
            inputs = tuple(shapes[k] for k in node.inputs)
            shape = node.primitive.shape(inputs)
            for size in (*shape.sizes, *node.primitive.constraints(inputs)):
                if not size.may_be_whole:
                    raise node.primitive.refuse(f"{size} can never be whole; inputs are {', '.join(map(str, inputs))}")
            shapes.append(shape)
        object.__setattr__(self, "shapes", tuple(shapes))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what follows from the rest, which another thread may be adding."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def start(cls) -> Graph:
        """Return the graph that has an input alone."""
        return cls((Node(Input()),))

    def apply(self, primitive: Primitive, *inputs: int) -> Graph:
        """Return this with one node more.

        Args:
            primitive: What to apply.
            inputs: Positions of its inputs, in order.

        Raises:
            SearchError: It does not apply.
        """
        return Graph((*self.nodes, Node(primitive, inputs)), self.shapes)

    def input_shapes(self, position: int) -> tuple[Shape, ...]:
        """Return the shapes of a node's inputs."""
        return tuple(self.shapes[k] for k in self.nodes[position].inputs)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the nodes that read each node, once per input."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for position, node in enumerate(self.nodes):
            for k in node.inputs:
                found[k].append(position)
        return tuple(map(tuple, found))

    @cached_property
    def open(self) -> tuple[int, ...]:
        """Positions of the nodes that nothing reads; their number is the width."""
        return tuple(position for position, readers in enumerate(self.consumers) if not readers)

    @cached_property
    def num_primitives(self) -> int:
        """Primitives, input and output not counted."""
        return sum(not isinstance(node.primitive, Input | Output) for node in self.nodes)

    @cached_property
    def num_weighted(self) -> int:
        """Primitives that have a weight."""
        return sum(node.primitive.weighted for node in self.nodes)

    def weight(self, position: int) -> tuple[Variable, ...]:
        """Return the sizes of a node's weight; empty: it has none."""
        return self.nodes[position].primitive.weight(self.input_shapes(position))

    @cached_property
    def whole(self) -> tuple[Variable, ...]:
        """Everything that must be whole: all sizes of all shapes, and what primitives ask for beside them."""
        found: dict[Variable, None] = {}
        for position, (node, shape) in enumerate(zip(self.nodes, self.shapes, strict=True)):
            found |= dict.fromkeys((*shape.sizes, *node.primitive.constraints(self.input_shapes(position))))
        return tuple(found)

    @cached_property
    def dynamic(self) -> tuple[int, ...]:
        """Indices of the dynamic variables in it, ascending."""
        found = {index for size in self.whole for index in size.dynamic}
        for position in range(len(self.nodes)):
            found |= {index for size in self.weight(position) for index in size.dynamic}
        return tuple(sorted(found))

    @property
    def fresh(self) -> int | None:
        """The first dynamic variable that is not in it; none: all are."""
        return next((index for index in range(MAX_DYNAMIC) if index not in self.dynamic), None)

    def substitute(self, index: int, by: Variable) -> Graph:
        """Return this with x<index> replaced everywhere.

        Raises:
            SearchError: Some node no longer applies, or needs what can never be whole.
        """
        return Graph(tuple(Node(node.primitive.substitute(index, by), node.inputs) for node in self.nodes))

    @cached_property
    def colours(self) -> tuple[str, ...]:
        """A name of every node that says what it computes, up to which of several equal weights it has."""
        found: list[str] = []
        for node in self.nodes:
            found.append(_digest(node.primitive, *(found[k] for k in node.inputs)))
        return tuple(found)

    @cached_property
    def digest(self) -> int:
        """128 bits that name the graph up to the order of its nodes."""
        colours = list(self.colours)
        for _ in range(_SWEEPS):
            for k in reversed(range(len(self.nodes))):
                readers = dict.fromkeys(self.consumers[k])  # one that reads it twice is one reader
                colours[k] = _digest(colours[k], *sorted(colours[r] for r in readers))
            for k, node in enumerate(self.nodes):
                colours[k] = _digest(colours[k], *(colours[i] for i in node.inputs))
        return int(_digest(*sorted(colours)), 16)

    def __str__(self) -> str:
        lines = []
        for position, (node, shape) in enumerate(zip(self.nodes, self.shapes, strict=True)):
            shown = "".join(f" t{k}" for k in node.inputs)
            lines.append(f"t{position} = {node.primitive}{shown}: {shape}")
        return "\n".join(lines)

    def graphviz(self) -> str:
        """Return the graph in Graphviz's DOT language, input at the top."""
        lines = ["digraph kernel {", "  rankdir=TB;"]
        for position, (node, shape) in enumerate(zip(self.nodes, self.shapes, strict=True)):
            box = ", shape=box" if node.primitive.weighted else ""
            lines.append(f'  t{position} [label="{node.primitive}\\n{shape}"{box}];')
            many = len(node.inputs) > 1
            lines += [f"  t{k} -> t{position}{f' [label={p}]' if many else ''};" for p, k in enumerate(node.inputs)]
        return "\n".join([*lines, "}"])


def _check_node(position: int, node: Node, nodes: tuple[Node, ...]) -> None:
    """Check that a node reads as many tensors as it must, all of them before it and none of them an output."""
    primitive = node.primitive
    if len(node.inputs) != primitive.arity:
        raise primitive.refuse(f"{len(node.inputs)} inputs are given; it has {primitive.arity}")
    if position and isinstance(primitive, Input):
        raise primitive.refuse(f"node {position} is another input; a graph has one, at its beginning")
    for k in node.inputs:
        if not 0 <= k < position:
            raise primitive.refuse(f"node {position} reads node {k}, which is not before it; put it there")
        if isinstance(nodes[k].primitive, Output):
            raise primitive.refuse(f"node {position} reads the output; nothing comes after it")


def _digest(*parts: object) -> str:
    return blake2b("|".join(map(str, parts)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Kernel:
    """A finished kernel from [N, C, H, W] to [N, C, H, W].

    Attributes:
        graph: Its graph, which ends with the only output.
        groups: The number that G stands for.
    """

    graph: Graph
    groups: int = 1

    def __post_init__(self) -> None:
        """Check that it is finished.

        Raises:
            SearchError: It has no output, a tensor that nothing reads, an open variable or less than one group.
        """
        last = len(self.graph.nodes) - 1
        if not isinstance(self.graph.nodes[-1].primitive, Output):
            raise SearchError(f"a kernel ends with {self.graph.nodes[-1].primitive}; apply an output")
        loose = [position for position in self.graph.open if position != last]
        if loose:
            raise SearchError(f"nothing reads node {loose[0]}, {self.graph.nodes[loose[0]].primitive}; leave it out")
        if self.graph.dynamic:
            raise SearchError(f"x{self.graph.dynamic[0]} of a kernel is open; solve the graph first")
        if self.groups < 1:
            raise SearchError(f"groups = {self.groups} of a kernel must be at least 1")

    def __getstate__(self) -> dict[str, object]:
        """Leave out what follows from the rest, which another thread may be adding."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def digest(self) -> int:
        """128 bits that name the kernel up to the order of its nodes."""
        return int(_digest(self.graph.digest, self.groups), 16)

    def check(self, extent: Extent) -> None:
        """Check that the kernel can fill a place.

        Raises:
            SearchError: Some size is not whole there.
        """
        for size in self.graph.whole:
            found = size.value(extent, self.groups)
            if found.denominator != 1:
                raise SearchError(
                    f"size {size} of the kernel is {found} at C, H, W = {', '.join(map(str, extent))} and "
                    f"G = {self.groups}; it must be whole: use a place whose sizes divide"
                )

    def parameters(self, extent: Extent) -> int:
        """Return the number of elements of all weights at a place.

        Raises:
            SearchError: The kernel cannot fill the place.
        """
        weights = (self.graph.weight(position) for position in range(len(self.graph.nodes)))
        return self._total((product(weight) for weight in weights if weight), extent)

    def multiply_adds(self, extent: Extent) -> int:
        """Return the multiply-adds of all contractions for one example at a place.

        Raises:
            SearchError: The kernel cannot fill the place.
        """
        found = (
            node.primitive.multiply_adds(self.graph.input_shapes(position))
            for position, node in enumerate(self.graph.nodes)
        )
        return self._total((size for size in found if size is not None), extent)

    def _total(self, sizes: Iterable[Variable], extent: Extent) -> int:
        self.check(extent)
        return sum(int(size.value(extent, self.groups)) for size in sizes)

    def __str__(self) -> str:
        return f"groups = {self.groups}\n{self.graph}"
