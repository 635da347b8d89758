"""A finished operator: out[i] = Sum_r x[e(i, r)] * Prod_w W_w[c_w(i, r)].

The primitive graph is held by its dims, each of which holds those below it (see ``primitives``); an operator names the
dims at which the input and the weights are read, and the output iterators that are only repeated over. It is
multilinear: no activation is inside. Immutable, compared by a digest that is equal in every process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b

from cofire.errors import SearchError
from cofire.search.primitives import Dim, Iterator, Reduction, Unfold, without_shares
from cofire.search.sizes import Size, Symbols


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator, finished.

    Attributes:
        symbols: The symbols of its sizes.
        output: Iterators of the output tensor, in its order.
        reductions: Iterators summed over.
        input: Coordinates of the input tensor, one per dim, in its order.
        weights: Coordinates of each weight, one tuple per weight.
        expansions: Dims repeated over: coordinates that reach neither input nor weight.
    """

    symbols: Symbols
    output: tuple[Iterator, ...]
    reductions: tuple[Reduction, ...]
    input: tuple[Dim, ...]
    weights: tuple[tuple[Dim, ...], ...] = ()
    expansions: tuple[Dim, ...] = ()

    def __post_init__(self) -> None:
        """Check that iterators are numbered by position and that no tensor is read at a foreign one.

        Raises:
            SearchError: They are not.
        """
        for group in (self.output, self.reductions):
            for index, iterator in enumerate(group):
                if iterator.index != index:
                    raise SearchError(f"iterator {iterator} stands at position {index}; number iterators by position")
        known = frozenset((*self.output, *self.reductions))
        for dim in (*self.input, *(d for weight in self.weights for d in weight), *self.expansions):
            strangers = sorted(str(i) for i in dim.iterators - known)
            if strangers:
                raise SearchError(f"{dim} depends on {strangers[0]}, which is no iterator of the operator; declare it")

    def __getstate__(self) -> dict[str, object]:
        """Leave out what follows from the rest, which another thread may be adding."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operator) and self.digest == other.digest and self.symbols == other.symbols

    def __hash__(self) -> int:
        return self.digest & 0xFFFFFFFFFFFFFFF

    @cached_property
    def digest(self) -> int:
        """128 bits that name the graph; the order of weights' dims and of expansions does not count."""
        parts = [
            "out:" + ",".join(str(dim.size) for dim in self.output),
            "in:" + ",".join(f"{dim.digest:x}" for dim in self.input),
            *("w:" + ",".join(sorted(f"{dim.digest:x}" for dim in weight)) for weight in self.weights),
            "r:" + ",".join(str(dim.size) for dim in self.reductions),
            "e:" + ",".join(sorted(f"{dim.digest:x}" for dim in self.expansions)),
        ]
        return int.from_bytes(blake2b("|".join(parts).encode(), digest_size=16).digest(), "big")

    @property
    def input_shape(self) -> tuple[Size, ...]:
        """Size of each dim of the input."""
        return tuple(dim.size for dim in self.input)

    @property
    def output_shape(self) -> tuple[Size, ...]:
        """Size of each dim of the output."""
        return tuple(dim.size for dim in self.output)

    @property
    def weight_shapes(self) -> tuple[tuple[Size, ...], ...]:
        """Size of each dim of each weight."""
        return tuple(tuple(dim.size for dim in weight) for weight in self.weights)

    @cached_property
    def input_coordinates(self) -> tuple[Dim, ...]:
        """The input's coordinates with every Share left out: expressions in iterators alone."""
        return tuple(without_shares(dim) for dim in self.input)

    @cached_property
    def weight_coordinates(self) -> tuple[tuple[Dim, ...], ...]:
        """The weights' coordinates with every Share left out."""
        return tuple(tuple(without_shares(dim) for dim in weight) for weight in self.weights)

    @cached_property
    def masks(self) -> tuple[Dim, ...]:
        """Coordinates repeated over whose windows no tensor passes through."""
        read = (*self.input_coordinates, *(dim for weight in self.weight_coordinates for dim in weight))
        seen = {node for dim in read for node in dim.walk() if isinstance(node, Unfold)}
        found = []
        for dim in map(without_shares, self.expansions):
            windows = {node for node in dim.walk() if isinstance(node, Unfold)}
            if windows - seen:
                found.append(dim)
                seen |= windows
        return tuple(found)

    def formula(self, latex: bool = False) -> str:
        """Return the operator in index notation, one line.

        Args:
            latex: Write LaTeX instead of plain text.
        """

        def tensor(name: str, dims: tuple[Dim, ...]) -> str:
            return f"{name}[{', '.join(dim.formula(latex) for dim in dims)}]"

        factors = [tensor("x", self.input)]
        factors += [tensor(f"W_{{{k}}}" if latex else f"W{k}", dims) for k, dims in enumerate(self.weights)]
        right = (r" \, " if latex else " * ").join(factors)
        if self.reductions:
            names = ", ".join(dim.formula(latex) for dim in self.reductions)
            right = (rf"\sum_{{{names}}} " if latex else f"sum({names}) ") + right
        return f"{tensor('y', self.output)} = {right}"

    def __str__(self) -> str:
        return self.formula()

    def graphviz(self) -> str:
        """Return the primitive graph in Graphviz's DOT language, output at the bottom."""
        ends = [("x", dim) for dim in self.input]
        ends += [(f"W{k}", dim) for k, weight in enumerate(self.weights) for dim in weight]
        ends += [("repeat", dim) for dim in self.expansions]
        numbers: dict[Dim, int] = {}
        lines = ["digraph operator {", "  rankdir=TB;"]
        for _, end in ends:
            for dim in end.walk():
                numbers.setdefault(dim, len(numbers))
        for dim, number in numbers.items():
            label = str(dim) if isinstance(dim, Iterator) else dim.name
            lines.append(f'  d{number} [label="{label}: {dim.size}"];')
            lines += [f"  d{number} -> d{numbers[child]};" for child in dim.below]
        for position, (tensor, dim) in enumerate(ends):
            lines.append(f'  t{position} [label="{tensor}", shape=box];')
            lines.append(f"  t{position} -> d{numbers[dim]};")
        return "\n".join([*lines, "}"])
