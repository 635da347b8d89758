"""An operator under one mapping of its symbols: what every lowering reads.

Shares are left out of the coordinates, since a lowering only needs where each tensor is read. A coordinate that is
repeated over (Expand) yet passes through an Unfold still makes the output zero outside the window's domain, so it is
kept as a *mask*: a weight of ones that nobody trains.

An input dim that is read at a bare output iterator which occurs nowhere else, such as the batch, is *free*: no index
depends on its size, and it may differ from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from string import ascii_letters

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.primitives import Dim, Iterator


@dataclass(frozen=True)
class Signature:
    """The shapes of a call: plain numbers, so that a check of them can be traced.

    Attributes:
        input_shape: Shape of the input.
        free: Positions of the input dims that may have any size.
        weight_shapes: Shape of every weight.
    """

    input_shape: tuple[int, ...]
    free: frozenset[int]
    weight_shapes: tuple[tuple[int, ...], ...]

    def check(self, x: Sequence[int], weights: Sequence[Sequence[int]]) -> None:
        """Check the shapes of a call.

        Args:
            x: Shape of the input; free dims may have any size.
            weights: Shape of every weight.

        Raises:
            SearchError: They are not the operator's.
        """
        fixed = enumerate(zip(x, self.input_shape, strict=False))
        if len(x) != len(self.input_shape) or any(have != need for k, (have, need) in fixed if k not in self.free):
            wanted = ["any" if k in self.free else str(n) for k, n in enumerate(self.input_shape)]
            raise SearchError(f"an input of shape {list(x)} to an operator on [{', '.join(wanted)}]; reshape it first")
        if [tuple(weight) for weight in weights] != list(self.weight_shapes):
            raise SearchError(
                f"weights of shapes {[list(weight) for weight in weights]} to an operator with "
                f"{[list(shape) for shape in self.weight_shapes]}; pass them in the operator's order"
            )


@dataclass(frozen=True)
class Bound:
    """One operator at the sizes of one mapping.

    Attributes:
        operator: The operator.
        mapping: Which row of ``operator.symbols.mappings`` gives the sizes.
    """

    operator: Operator
    mapping: int = 0

    def __post_init__(self) -> None:
        """Check the mapping.

        Raises:
            SearchError: There is no such mapping, or there are more than 52 iterators, the letters of an einsum.
        """
        iterators = len(self.operator.output) + len(self.operator.reductions)
        if iterators > len(ascii_letters):
            raise SearchError(f"{iterators} iterators; an einsum has letters for {len(ascii_letters)}, merge some")
        count = len(self.operator.symbols.mappings)
        if not 0 <= self.mapping < count:
            raise SearchError(f"mapping {self.mapping} of an operator with {count}; count from 0 to {count - 1}")

    @property
    def output(self) -> tuple[Iterator, ...]:
        """Iterators of the output, in its order."""
        return self.operator.output

    @property
    def reductions(self) -> tuple[Iterator, ...]:
        """Iterators summed over."""
        return self.operator.reductions

    @property
    def input(self) -> tuple[Dim, ...]:
        """Coordinates at which the input is read."""
        return self.operator.input_coordinates

    @property
    def masks(self) -> tuple[Dim, ...]:
        """Coordinates repeated over whose windows no other tensor passes through."""
        return self.operator.masks

    @cached_property
    def factors(self) -> tuple[tuple[Dim, ...], ...]:
        """Coordinates of every tensor that the input is multiplied with: the weights, then the masks."""
        return (*self.operator.weight_coordinates, *((dim,) for dim in self.masks))

    def size(self, dim: Dim) -> int:
        """Return the number of elements of a dim."""
        return dim.size.value(self.mapping)

    def shape(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        """Return the number of elements of each dim."""
        return tuple(self.size(dim) for dim in dims)

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input."""
        return self.shape(self.input)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return self.shape(self.output)

    @cached_property
    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every weight."""
        return tuple(self.shape(dims) for dims in self.operator.weight_coordinates)

    @cached_property
    def idle(self) -> int:
        """What the sum counts more than once: the product of the reductions that no tensor depends on."""
        read = set().union(*(dim.iterators for dims in (self.input, *self.factors) for dim in dims))
        return prod(self.size(r) for r in self.reductions if r not in read)

    @cached_property
    def free(self) -> frozenset[int]:
        """Positions of the input dims whose size is free."""
        uses: dict[Dim, int] = {}
        for dim in (*self.input, *(dim for dims in self.factors for dim in dims)):
            for iterator in dim.iterators:
                uses[iterator] = uses.get(iterator, 0) + 1
        return frozenset(k for k, dim in enumerate(self.input) if dim in self.output and uses[dim] == 1)

    def is_free(self, dim: Dim) -> bool:
        """Say whether a dim of the input is read with any size."""
        return any(dim == self.input[k] for k in self.free)

    @property
    def signature(self) -> Signature:
        """The shapes that a call must have."""
        return Signature(self.input_shape, self.free, self.weight_shapes)
