"""What a search may build: shapes, symbols, and the limits of Syno's generators.

Defaults are those of Syno's core, whose published searches also forbid Stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cofire.errors import SearchError
from cofire.search.primitives import Iterator
from cofire.search.sizes import Allowance, Size, SizeKind, product

Guidance = Literal["compat", "exact", "none"]


@dataclass(frozen=True)
class Space:
    """A search space: every canonical operator from the input's to the output's shape within the limits.

    Attributes:
        input: Size of each dim of the input.
        output: Size of each dim of the output.
        allowance: How often each symbol may be introduced.
        fixed: Pairs of an input's and an output's position that are one dim, such as the batch; it is never touched.
        unordered_input: Positions of the input whose elements have no order, such as channels.
        unordered_output: The same of the output.
        max_tensors: The input and the weights.
        max_reductions: Reductions.
        max_chain: Primitives from a dim of a tensor down to the output.
        max_splits: Splits; none: no limit.
        max_merges: Merges; none: no limit.
        max_shifts: Shifts; none: no limit.
        max_strides: Strides; none: no limit; 0 in every published search.
        max_unfolds: Unfolds; none: no limit.
        min_unfold_ratio: A window k over N needs N/k at least this.
        max_window: Largest window, and largest strided dim.
        odd_windows: Windows must be odd under every mapping.
        max_reshape_over_shift: A Shift by d does not touch a reshape whose block is above this times d.
        max_repeat: Product of dims that are repeated without a weight.
        max_outer: Product of dims that only weights have.
        low_rank: Least and largest dim that two weights share and the input does not have.
        min_weight: Least number of elements of a weight.
        max_pooling: Product of reductions that meet no weight.
        max_reduction_ratio: Product of all reductions, in units of the input's size.
        max_symbols: Distinct symbols in a size.
        max_degree: Sum of the absolute exponents of a size.
        max_exponents: Exponents tried per symbol when a dim is divided.
        max_ends: Operators kept of those that one interface is, by how equal the sizes of their weights are and then by
            multiply-adds; none: all (Syno's searches: 2).
        needs_matmul: A contraction needs a dim that the weight alone has and one that it shares (Syno: always). False
            admits depthwise convolution.
        needs_weight: An operator needs a weight (Syno: always). False admits pooling.
    """

    input: tuple[Size, ...]
    output: tuple[Size, ...]
    allowance: Allowance
    fixed: tuple[tuple[int, int], ...] = ()
    unordered_input: frozenset[int] = frozenset()
    unordered_output: frozenset[int] = frozenset()
    max_tensors: int = 2
    max_reductions: int = 2
    max_chain: int = 5
    max_splits: int | None = None
    max_merges: int | None = None
    max_shifts: int | None = None
    max_strides: int | None = None
    max_unfolds: int | None = None
    min_unfold_ratio: float = 2.0
    max_window: int = 30
    odd_windows: bool = True
    max_reshape_over_shift: float = 5.0
    max_repeat: int = 1
    max_outer: int = 512
    low_rank: tuple[int, int] = (3, 8)
    min_weight: int = 1
    max_pooling: int = 8
    max_reduction_ratio: int = 32
    max_symbols: int = 3
    max_degree: int = 16
    max_exponents: int = 5
    max_ends: int | None = None
    needs_matmul: bool = True
    needs_weight: bool = True

    def __post_init__(self) -> None:
        """Check shapes and limits.

        Raises:
            SearchError: A shape has a size that is none, fixed dims differ, or limits contradict each other.
        """
        for name, shape in (("input", self.input), ("output", self.output)):
            for size in shape:
                if not size.is_legal:
                    raise SearchError(f"{name} has a dim of {size}, which is not whole and above 1 in every mapping")
        for i, o in self.fixed:
            if not (0 <= i < len(self.input) and 0 <= o < len(self.output)):
                raise SearchError(f"fixed pair ({i}, {o}) is outside the shapes; positions count from 0")
            if self.input[i] != self.output[o]:
                raise SearchError(f"fixed pair ({i}, {o}) joins {self.input[i]} and {self.output[o]}; make them equal")
        if self.needs_weight and self.max_tensors < 2:
            raise SearchError(f"max_tensors = {self.max_tensors} leaves no weight, yet needs_weight; allow 2 tensors")
        if not self.desired:
            raise SearchError("every dim of the input is fixed; leave one to the search")
        self._check_symbols()

    def _check_symbols(self) -> None:
        """Refuse an input that no operator can read whole: a primary symbol it has and nothing introduces."""
        symbols = self.allowance.symbols
        needed = product(symbols, self.desired).exponents
        there = product(symbols, (dim.size for dim in self.free_iterators)).exponents
        for k, name in enumerate(symbols.primary):
            if needed[k] > there[k] + self.allowance.left[k]:
                missing = needed[k] - there[k]
                raise SearchError(
                    f"the input has {missing} {name} more than the output, and the allowance for {name} is "
                    f"{self.allowance.left[k]}: no operator reads the whole input; allow {name}: {missing}"
                )

    @property
    def desired(self) -> tuple[Size, ...]:
        """Sizes of the input's dims that are not fixed, in order."""
        held = {i for i, _ in self.fixed}
        return tuple(size for k, size in enumerate(self.input) if k not in held)

    @property
    def free_input(self) -> tuple[int, ...]:
        """Positions of the input's dims that are not fixed."""
        held = {i for i, _ in self.fixed}
        return tuple(k for k in range(len(self.input)) if k not in held)

    @property
    def iterators(self) -> tuple[Iterator, ...]:
        """Iterators of the whole output, in order."""
        return tuple(Iterator(size, index) for index, size in enumerate(self.output))

    @property
    def free_iterators(self) -> tuple[Iterator, ...]:
        """Iterators of the output's dims that are not fixed."""
        held = {o for _, o in self.fixed}
        return tuple(dim for dim in self.iterators if dim.index not in held)

    def admits(self, size: Size) -> bool:
        """Whether a dim of the space may have this size; one element under every mapping is no dim."""
        symbols = sum(e != 0 for e in size.exponents)
        return size.is_legal and size.largest > 1 and symbols <= self.max_symbols and size.degree <= self.max_degree

    def is_strided(self, size: Size) -> bool:
        """Whether a Stride may use this size: coefficients only, at most the largest window."""
        return size.kind is SizeKind.COEFFICIENT and size.largest <= self.max_window

    @property
    def largest_reduction(self) -> Size:
        """The number of elements of the input, in which products of reductions are measured."""
        return product(self.allowance.symbols, self.desired)
