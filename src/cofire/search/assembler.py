"""Builds an operator by hand, bottom-up, one method per primitive.

An assembler keeps the interface: the dims not used up yet. Every method takes dims off it and puts new ones on it, so
that each is used once; a weight multiplies in through Share, and the input takes what is left. A matrix product::

    build = Assembler(symbols)
    m, n = build.output("M", "N")
    (k,) = build.reduce("K")
    (k,) = build.contract(inner=[k], outer=[n])  # W0[k, n]; k goes on towards the input
    operator = build.finish(m, k)                # y[i0, i1] = sum(r0) x[i0, r0] * W0[r0, i1]

Every operator of the search space can be built, and more: any number of weights from none, and any block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from cofire.errors import SearchError
from cofire.search.graph import Operator
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
from cofire.search.sizes import Size, Symbols

D = TypeVar("D", bound=Dim)


class Assembler:
    """The interface of an unfinished operator and the methods that rewrite it.

    Sizes are given as :class:`Size` or as text such as ``"C/g"``. Every method raises SearchError for a dim that is not
    on the interface and for a size that is not whole and at least 1 under all mappings.

    Attributes:
        symbols: The symbols of all sizes.
        interface: Dims not used up yet.
    """

    def __init__(self, symbols: Symbols) -> None:
        self.symbols = symbols
        self.interface: list[Dim] = []
        self._output: list[Iterator] = []
        self._reductions: list[Reduction] = []
        self._weights: list[list[Dim]] = []
        self._expansions: list[Dim] = []

    def output(self, *sizes: str | Size) -> tuple[Iterator, ...]:
        """Add output iterators i0, i1, ... of these sizes and return them."""
        made = []
        for size in sizes:
            dim = Iterator(self._legal(size), len(self._output))
            self._output.append(dim)
            made.append(self._put(dim))
        return tuple(made)

    def reduce(self, *sizes: str | Size) -> tuple[Reduction, ...]:
        """Reduce: add iterators r0, r1, ... that the output is summed over and return them."""
        made = []
        for size in sizes:
            dim = Reduction(self._legal(size), len(self._reductions))
            self._reductions.append(dim)
            made.append(self._put(dim))
        return tuple(made)

    def split(self, major: Dim, minor: Dim) -> Split:
        """Split: return i*B + j for the dims i and j of size B."""
        self._take(major, minor)
        return self._put(Split(major, minor))

    def merge(self, dim: Dim, block: str | Size) -> tuple[MergeMajor, MergeMinor]:
        """Merge: return i div B and i mod B."""
        size = self._legal(block)
        parts = MergeMajor(dim, size), MergeMinor(dim, size)
        self._take(dim)
        return self._put(parts[0]), self._put(parts[1])

    def shift(self, dim: Dim, distance: int = 1) -> Shift:
        """Shift: return (i + d) mod N."""
        made = Shift(dim, distance)
        self._take(dim)
        return self._put(made)

    def unfold(self, dim: Dim, window: Dim) -> Unfold:
        """Unfold: return i + j - floor(k/2), zero outside [0, N), for a window j of size k."""
        made = Unfold(dim, window)
        self._take(dim, window)
        return self._put(made)

    def stride(self, dim: Dim, stride: str | Size) -> Stride:
        """Stride: return s*i."""
        made = Stride(dim, self._legal(stride))
        self._take(dim)
        return self._put(made)

    def expand(self, *dims: Dim) -> None:
        """Expand: repeat over the dims, which reach the input no more."""
        self._take(*dims)
        self._expansions.extend(dims)

    def weight(self) -> int:
        """Begin a weight and return its number; :meth:`share` gives it dims."""
        self._weights.append([])
        return len(self._weights) - 1

    def share(self, dim: Dim, weight: int) -> Share:
        """Share: index the weight by the dim too and return the dim as it goes on towards the input."""
        if not 0 <= weight < len(self._weights):
            raise SearchError(f"weight {weight} was not begun, {len(self._weights)} were; call weight() first")
        self._take(dim)
        self._weights[weight].append(dim)
        return self._put(Share(dim, weight))

    def contract(self, inner: Sequence[Dim], outer: Sequence[Dim] = ()) -> tuple[Share, ...]:
        """Contraction: multiply by a new weight indexed by ``inner`` and then ``outer``, its dims in that order.

        Args:
            inner: Dims shared by the weight and what lies above.
            outer: Dims that only the weight has (Share, then Expand).

        Returns:
            The inner dims as they go on towards the input, in the same order.
        """
        weight = self.weight()
        shared = tuple(self.share(dim, weight) for dim in inner)
        self.expand(*(self.share(dim, weight) for dim in outer))
        return shared

    def finish(self, *dims: Dim) -> Operator:
        """Return the operator that reads its input at ``dims``, in this order.

        Raises:
            SearchError: A dim is left over, or a weight has no dims.
        """
        for number, weight in enumerate(self._weights):
            if not weight:
                raise SearchError(f"weight {number} has no dims; share a dim with it")
        self._take(*dims)
        if self.interface:
            names = ", ".join(str(dim) for dim in self.interface)
            self.interface.extend(dims)
            raise SearchError(f"{names} not used; give them to the input, share and expand them, or expand them")
        return Operator(
            symbols=self.symbols,
            output=tuple(self._output),
            reductions=tuple(self._reductions),
            input=dims,
            weights=tuple(tuple(weight) for weight in self._weights),
            expansions=tuple(self._expansions),
        )

    def _legal(self, size: str | Size) -> Size:
        found = self.symbols.size(size) if isinstance(size, str) else size
        if not found.is_legal:
            raise SearchError(f"size {found} is not whole and at least 1 under all mappings, or is 1; pick another")
        return found

    def _put(self, dim: D) -> D:
        self.interface.append(dim)
        return dim

    def _take(self, *dims: Dim) -> None:
        for position, dim in enumerate(dims):
            if dim not in self.interface or dim in dims[:position]:
                raise SearchError(f"{dim} is not on the interface; it was used already or belongs to another operator")
        for dim in dims:
            self.interface.remove(dim)
