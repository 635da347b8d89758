"""Operators in and out of :class:`~cofire.spec.OperatorSpec`, the form in which they are kept in files.

The primitive graph is written as the primitives that an assembler applies: iterators first, then every dim after
those it is built on. The same graph gives the same primitives and names in every process. The order of a weight's dims
is kept too, which an operator's digest leaves open: parameters saved beside a spec fit the operator that it gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cofire.errors import SearchError
from cofire.search.assembler import Assembler
from cofire.search.graph import Operator
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Share,
    Shift,
    Split,
    Stride,
    Unfold,
)
from cofire.search.sizes import Symbols
from cofire.spec.operator import OperatorSpec, PrimitiveSpec


def to_spec(operator: Operator, name: str = "operator", description: str = "") -> OperatorSpec:
    """Return an operator as a spec; :func:`from_spec` gives an equal operator with the same layout of weights.

    Args:
        operator: Any operator that an :class:`Assembler` can build.
        name: Kept in the spec.
        description: Kept in the spec.

    Raises:
        SearchError: A dim is used twice or by nothing, so that no order of primitives builds the graph.
    """
    writer = _Writer()
    for kind, group in (("output", operator.output), ("reduce", operator.reductions)):
        for iterator in group:
            writer.add(kind, (), (iterator,), size=str(iterator.size))
    ends = (*operator.input, *operator.expansions)
    for end in ends:
        writer.build(end)
    for end in operator.expansions:
        writer.add("expand", (end,), ())
    symbols = operator.symbols
    try:
        spec = OperatorSpec(
            name=name,
            description=description,
            primary=symbols.primary,
            coefficient=symbols.coefficient,
            mappings=tuple(dict(zip(symbols.names, row, strict=True)) for row in symbols.mappings),
            primitives=tuple(writer.steps),
            input=writer.named(operator.input),
            weights=tuple(writer.named(weight) for weight in operator.weights),
        )
    except ValueError:  # pydantic's; its text has several lines
        spec = None
    if spec is None or from_spec(spec) != operator:
        raise SearchError(f"{operator} is not built by primitives that use every dim once; build it with an Assembler")
    return spec


def from_spec(spec: OperatorSpec) -> Operator:
    """Return the operator that a spec says.

    Args:
        spec: Symbols, primitives, and where input and weights are read.

    Raises:
        SearchError: A size is not a monomial in the symbols, or does not divide under every mapping.
    """
    build = Assembler(Symbols.of(spec.primary, spec.coefficient, spec.mappings))
    numbers: dict[str, int] = {}
    for row in spec.weights:
        numbers.update(dict.fromkeys(row, build.weight()))
    dims: dict[str, Dim] = {}
    for position, step in enumerate(spec.primitives):
        taken = [dims[name] for name in step.dims]
        try:
            made = _apply(build, step, taken, numbers)
        except SearchError as error:
            raise SearchError(f"primitives.{position} ({step.primitive}): {error}") from None
        dims.update(zip(step.makes, made, strict=True))
    operator = build.finish(*(dims[name] for name in spec.input))
    return replace(operator, weights=tuple(tuple(dims[name] for name in row) for row in spec.weights))


def _apply(build: Assembler, step: PrimitiveSpec, dims: list[Dim], weights: dict[str, int]) -> tuple[Dim, ...]:
    """Apply one primitive and return the dims it makes."""
    size = step.size or ""
    match step.primitive:
        case "output":
            return build.output(size)
        case "reduce":
            return build.reduce(size)
        case "split":
            return (build.split(*dims),)
        case "merge":
            return build.merge(dims[0], size)
        case "shift":
            return (build.shift(dims[0], step.distance or 0),)
        case "unfold":
            return (build.unfold(*dims),)
        case "stride":
            return (build.stride(dims[0], size),)
        case "share":
            return (build.share(dims[0], weights[step.dims[0]]),)
        case "expand":
            build.expand(dims[0])
            return ()


class _Writer:
    """The primitives written so far and the names of the dims that they made."""

    def __init__(self) -> None:
        self.steps: list[PrimitiveSpec] = []
        self._names: dict[Dim, str] = {}

    def named(self, dims: Iterable[Dim]) -> tuple[str, ...]:
        """Return the names of dims; of one that was not made, its formula, which is no name."""
        return tuple(self._names.get(dim, str(dim)) for dim in dims)

    def add(
        self, kind: str, takes: tuple[Dim, ...], makes: tuple[Dim, ...], size: str | None = None, distance: int = 0
    ) -> None:
        """Write one primitive and name what it makes."""
        for dim in makes:
            iterators = sum(isinstance(known, Iterator) for known in self._names)
            self._names[dim] = str(dim) if isinstance(dim, Iterator) else f"d{len(self._names) - iterators}"
        table = {"primitive": kind, "dims": self.named(takes), "makes": self.named(makes), "size": size}
        self.steps.append(PrimitiveSpec.model_validate({**table, "distance": distance or None}))

    def build(self, dim: Dim) -> None:
        """Write the primitives that make a dim, those below it first."""
        if dim in self._names:
            return
        for below in dim.below:
            self.build(below)
        match dim:
            case Split():
                self.add("split", dim.below, (dim,))
            case Unfold():
                self.add("unfold", dim.below, (dim,))
            case MergeMajor() | MergeMinor():
                halves = MergeMajor(dim.source, dim.block), MergeMinor(dim.source, dim.block)
                self.add("merge", dim.below, halves, size=str(dim.block))
            case Stride():
                self.add("stride", dim.below, (dim,), size=str(dim.stride))
            case Shift():
                self.add("shift", dim.below, (dim,), distance=dim.distance)
            case Share():
                self.add("share", dim.below, (dim,))
            case _:
                raise SearchError(f"{dim} is no iterator and no primitive of this space; use those of the assembler")
