"""Loop nests of an operator in pseudo-code: one for all of it, and one per stage of its cheapest staging.

A stage reads the value so far at coordinates in its own loops, multiplies it by one weight and sums what nothing needs
any more (Syno's materialised reductions, :mod:`cofire.search.cost`). Its loops may run over a coordinate that is no
iterator, for example over the places of a window's result; such a loop has a name of its own, u0, u1, and so on.

The last nest writes ``y``, or the value is read into it by a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cofire.search.cost import Cost, Stage
from cofire.search.graph import Operator
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Reduction,
    Shift,
    Split,
    Stride,
    Unfold,
)
from cofire.search.sizes import product

_INDENT = "    "
_LINE_LENGTH = 58  # half of the page's width


@dataclass(frozen=True)
class Nest:
    """One loop nest.

    Attributes:
        title: What it does.
        code: The pseudo-code, in lines.
        multiply_adds: Of this nest.
        result: Name of the tensor that it writes.
        result_elements: Elements of that.
    """

    title: str
    code: str
    multiply_adds: int
    result: str
    result_elements: int


def naive_nest(operator: Operator, found: Cost) -> Nest:
    """Return the one nest over all iterators.

    Args:
        operator: The operator.
        found: Its cost.
    """
    tensors = [_read("x", operator.input_coordinates)]
    tensors += [_read(_name(operator, k), dims) for k, dims in enumerate(_factors(operator))]
    code = _code(operator.output, operator.reductions, " * ".join(tensors), _read("y", operator.output))
    return Nest("All in one", code, found.naive_multiply_adds, "y", found.output_elements)


def staged_nests(operator: Operator, found: Cost) -> list[Nest]:
    """Return one nest per stage, and a last one without multiply-adds where ``y`` is a view of the last result.

    Args:
        operator: The operator.
        found: Its cost, whose stages are shown.
    """
    nests = []
    names = _names(found.stages)
    value, held = "x", operator.input_coordinates
    idle = _idle(operator)
    for number, stage in enumerate(found.stages):
        loops = sorted(stage.loops, key=_order)
        kept = tuple(dim for dim in loops if dim not in stage.summed)
        is_output = number == len(found.stages) - 1 and set(kept) == set(operator.output) and not idle
        result = "y" if is_output else f"t{number}"
        known = {dim: names.get(dim, dim) for dim in loops}
        factors = [_read(value, _expressed(held, known))]
        if stage.factor is not None:
            dims = _factors(operator)[stage.factor]
            factors.append(_read(_name(operator, stage.factor), _expressed(dims, known)))
        kept = operator.output if is_output else kept
        loop_names = [known[dim] for dim in kept]
        code = _code(
            loop_names,
            [known[dim] for dim in loops if dim in stage.summed],
            " * ".join(factors),
            _read(result, loop_names),
        )
        title = "Sum" if stage.factor is None else f"Multiply by {_name(operator, stage.factor)}"
        if stage.factor is not None and stage.summed:
            title += " and sum"
        nests.append(Nest(title, code, stage.multiply_adds, result, stage.result_elements))
        value, held = result, kept
    if value != "y":
        right = _read(value, held)
        if idle:
            right += f" * {_wrapped(str(product(operator.symbols, (dim.size for dim in idle))))}"
        code = _code(operator.output, (), right, _read("y", operator.output))
        nests.append(Nest("Read the output", code, 0, "y", found.output_elements))
    return nests


def notes(operator: Operator, found: Cost) -> list[str]:
    """Return a line on each name in the nests that is not in the formula."""
    lines = [f"u{named.index} stands for {dim}, of size {dim.size}." for dim, named in _names(found.stages).items()]
    lines += [
        f"{_name(operator, len(operator.weights) + k)} is all ones: outside its dim {dim} is zero though only repeated."
        for k, dim in enumerate(operator.masks)
    ]
    lines += [f"No tensor depends on {dim}: the sum over it is a product by {dim.size}." for dim in _idle(operator)]
    return lines


class _Loop(Iterator):
    """A loop over a coordinate that is no iterator, in its stead."""

    name = "loop"

    def formula(self, latex: bool = False) -> str:
        """Return ``u0``."""
        return f"u{self.index}"


def _names(stages: Iterable[Stage]) -> dict[Dim, _Loop]:
    """Return a name for every coordinate that is looped over and no iterator, in the order of the stages."""
    named: dict[Dim, _Loop] = {}
    for stage in stages:
        for dim in sorted(stage.loops, key=_order):
            if not isinstance(dim, Iterator) and dim not in named:
                named[dim] = _Loop(dim.size, len(named))
    return named


def _order(dim: Dim) -> tuple[int, int, int]:
    """Sort output iterators first, then coordinates that are none, then reductions."""
    if isinstance(dim, Reduction):
        return 2, dim.index, 0
    return (0, dim.index, 0) if isinstance(dim, Iterator) else (1, 0, dim.digest)


def _factors(operator: Operator) -> tuple[tuple[Dim, ...], ...]:
    """Return the coordinates of all weights, then of the masks, as costs number them."""
    return (*operator.weight_coordinates, *((dim,) for dim in operator.masks))


def _name(operator: Operator, factor: int) -> str:
    weights = len(operator.weights)
    return f"W{factor}" if factor < weights else f"M{factor - weights}"


def _idle(operator: Operator) -> list[Reduction]:
    """Return the reductions that no tensor depends on."""
    tensors = (operator.input_coordinates, *_factors(operator))
    read = {iterator for dims in tensors for dim in dims for iterator in dim.iterators}
    return [dim for dim in operator.reductions if dim not in read]


def _expressed(dims: Iterable[Dim], known: Mapping[Dim, Dim]) -> list[Dim]:
    """Return coordinates as expressions in loops; a dim that is a loop itself takes the loop's name."""
    return [_in_loops(dim, known) for dim in dims]


def _in_loops(dim: Dim, known: Mapping[Dim, Dim]) -> Dim:
    if dim in known:
        return known[dim]
    below = _expressed(dim.below, known)
    match dim:
        case MergeMajor() | MergeMinor():
            return type(dim)(below[0], dim.block)
        case Shift():
            return Shift(below[0], dim.distance)
        case Stride():
            return Stride(below[0], dim.stride)
        case Split():
            return Split(below[0], below[1])
        case Unfold():
            return Unfold(below[0], below[1])
    raise AssertionError(f"{dim} does not follow from the loops of its stage")


def _code(outer: Sequence[Dim], inner: Sequence[Dim], right: str, left: str) -> str:
    """Return a nest that writes ``left`` at every point of ``outer``: ``right``, or its sum over ``inner``."""
    lines, indent = [], ""
    if outer:
        lines.append(_for(outer))
        indent = _INDENT
    if inner:
        lines += [f"{indent}sum = 0", f"{indent}{_for(inner)}", f"{indent}{_INDENT}sum += {right}"]
        lines.append(f"{indent}{left} = sum")
    else:
        lines.append(f"{indent}{left} = {right}")
    return "\n".join(part for line in lines for part in _broken(line))


def _broken(line: str) -> list[str]:
    """Break a line before products, and where one is too long after commas, until it fits."""
    bare = line.lstrip()
    indent = " " * (len(line) - len(bare))
    room = _LINE_LENGTH - len(indent) - len(2 * _INDENT)
    pieces = [
        piece
        for factor in re.split(r" (?=\* )", bare)
        for piece in (re.split(r"(?<=,) ", factor) if len(factor) > room else [factor])
    ]
    lines = [indent + pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) > _LINE_LENGTH:
            lines.append(indent + 2 * _INDENT + piece)
        else:
            lines[-1] += f" {piece}"
    return lines


def _for(loops: Sequence[Dim]) -> str:
    return f"for {', '.join(f'{dim} < {dim.size}' for dim in loops)}:"


def _read(name: str, dims: Sequence[Dim]) -> str:
    return f"{name}[{', '.join(map(str, dims))}]" if dims else name


def _wrapped(size: str) -> str:
    return size if size.isidentifier() else f"({size})"
