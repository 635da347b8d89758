"""The two solvers that give dynamic variables their sizes (Canvas, solvers).

Shape matching: where a Broadcast or a Bmm wants two sizes equal, their quotient is set to 1 and solved for one variable
of exponent 1 or -1; what it must be is put in its place in the whole graph, and every node is inferred anew.

Closing: the last tensor must have C*H*W elements, which fixes one variable. Each that is left becomes a divisor of what
it must divide (the greatest common one over 1, 2, 4 or 8), else C over 1, 2, 4 or 8, else the least that it must be a
multiple of; a choice stands if all sizes are whole numbers at every place. They are tried depth first and at most 1000
of them, because every open variable multiplies their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cofire.errors import SearchError
from cofire.search.canvas.graph import Graph, Kernel
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.primitives import Output
from cofire.search.canvas.variables import (
    C,
    Extent,
    Variable,
    common_divisor,
    common_multiple,
    dynamic_variable,
    number,
    solve_for_one,
)

REDUCTIONS = (1, 2, 4, 8)
_MOST_TRIALS = 1000  # substitutions in one closing; samples need a hundredth


class Substitution(NamedTuple):
    """x<variable> becomes ``by``."""

    variable: int
    by: Variable


@dataclass(frozen=True)
class Target:
    """The places that one kernel is to fill.

    Attributes:
        extents: Numbers of C, H and W at each.
        groups: Number of G, the same at all.
    """

    extents: tuple[Extent, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SearchError: No place, a number below 1, or groups that do not divide the channels of a place.
        """
        if not self.extents:
            raise SearchError("no place to fill is given; pass the C, H and W of one")
        for extent in self.extents:
            if min(extent) < 1:
                raise SearchError(f"C, H, W = {', '.join(map(str, extent))} of a place must be at least 1")
            if self.groups < 1 or extent.c % self.groups:
                raise SearchError(f"groups = {self.groups} does not divide the {extent.c} channels of a place")

    def admits(self, size: Variable) -> bool:
        """Whether a size is whole at every place, or may become so while a variable in it is open."""
        return _is_whole(self, size) if size.is_static else size.may_be_whole

    def admits_graph(self, graph: Graph) -> bool:
        """Whether it admits all that must be whole in a graph."""
        return all(map(self.admits, graph.whole))


@lru_cache(maxsize=1 << 14)
def _is_whole(target: Target, size: Variable) -> bool:
    return all(size.value(extent, target.groups).denominator == 1 for extent in target.extents)


def matches(graph: Graph, primitive: Primitive, inputs: tuple[int, ...]) -> Iterator[Substitution | None]:
    """Yield the substitutions under which a primitive may apply to nodes of a graph; none: as they are.

    Args:
        graph: The graph.
        primitive: What is to be applied.
        inputs: Positions of its inputs.
    """
    ratio = primitive.mismatch(tuple(graph.shapes[k] for k in inputs))
    if ratio is None or ratio.is_one or (primitive.stretches and ratio.may_be_whole):
        yield None
    if ratio is not None:
        for index in ratio.linear:
            yield Substitution(index, solve_for_one(ratio, index))


def close(graph: Graph, target: Target, reductions: tuple[int, ...] = REDUCTIONS) -> Iterator[Kernel]:
    """Yield the kernels that a graph with one open node may become, each with another choice of its variables.

    Args:
        graph: The graph, without an output.
        target: The places to fill.
        reductions: What divisors are taken of, in the order in which they are tried.

    Raises:
        SearchError: More than one node is open.
    """
    if len(graph.open) != 1:
        raise SearchError(f"{len(graph.open)} nodes are open; a kernel has one output: join them")
    output, last = Output(), graph.open
    trials = iter(range(_MOST_TRIALS))
    for substitution in sorted(matches(graph, output, last), key=lambda s: -s.variable if s else 0):
        try:
            closed = (graph.substitute(*substitution) if substitution else graph).apply(output, *last)
        except SearchError:
            continue
        for solved in _fill(closed, target, reductions, trials):
            grouped = any(size.power("G") for size in solved.whole)
            yield Kernel(solved, target.groups if grouped else 1)


def _fill(graph: Graph, target: Target, reductions: tuple[int, ...], trials: Iterator[int]) -> Iterator[Graph]:
    """Yield the graph with all variables replaced, while trials are left; what another must divide goes before it."""
    if not target.admits_graph(graph):
        return
    if not graph.dynamic:
        yield graph
        return
    divisors = {k for size in graph.whole if len(size.dynamic) > 1 for k in size.divisor.dynamic}
    index = next((k for k in graph.dynamic if k not in divisors), graph.dynamic[0])
    for size in candidates(graph.whole, index, reductions):
        if next(trials, None) is None:
            return
        try:
            filled = graph.substitute(index, size)
        except SearchError:
            continue
        yield from _fill(filled, target, reductions, trials)


def candidates(
    whole: tuple[Variable, ...], index: int, reductions: tuple[int, ...] = REDUCTIONS
) -> tuple[Variable, ...]:
    """Return the sizes that x<index> is tried with.

    Args:
        whole: What must be whole; what has another variable in it is left for when that one is known.
        index: Which variable.
        reductions: What divisors are taken of, in the order in which they are tried.
    """
    unknown = dynamic_variable(index)
    sizes = [size for size in whole if size.dynamic == (index,)]
    divided = [size * unknown for size in sizes if size.power(f"x{index}") < 0]
    multiple = common_multiple((size / unknown).divisor for size in sizes if size.power(f"x{index}") > 0)
    most = common_divisor(divided) if divided else C
    return tuple(dict.fromkeys([*(most / number(r) for r in reductions), multiple]))
