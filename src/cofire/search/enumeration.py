"""Every operator of a space up to a number of steps.

Three phases (Syno, search order): reductions are chosen first, as a multiset; then views and contractions, one step
each; then the interface is given to the input. A step is one Reduce, one view, or one whole Contraction. Views other
than Split and Unfold act on dims above the latest contraction alone.

How steps are pruned is the guidance:

- ``exact``, the default: an interface is kept while a lower bound (``completion``) is at most the steps left.
- ``compat``: Syno's shape distance, and where it equals the steps left, Shift, Stride and Contraction are not
  tried; two dims that are only summed over are not joined either. Operators are lost by that.
- ``none``: no distance; what the other two are measured against.

The result depends on the space alone and comes in the order of digests.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import cached_property
from itertools import combinations_with_replacement
from itertools import product as cartesian

from cofire.search.canonical import broken_rule
from cofire.search.completion import CompletionBound
from cofire.search.distance import INFINITE, Budget, Current, shape_distance
from cofire.search.fingerprint import distinct as distinct_groups
from cofire.search.graph import Operator
from cofire.search.interface import Contraction, Interface, Step, may_be_outer
from cofire.search.primitives import Dim, MergeMajor, MergeMinor, Reduction, Share, Shift, Split, Stride, Unfold
from cofire.search.selection import Selector
from cofire.search.sizes import Allowance, Size, product
from cofire.search.space import Guidance, Space
from cofire.search.unordered import keeps_unordered_rules


class Synthesis:
    """Walks a space: its roots, what may follow an interface, and how an interface ends.

    Attributes:
        space: The search space.
        depth: Most steps of an operator.
        guidance: How steps are pruned.
    """

    def __init__(self, space: Space, depth: int, guidance: Guidance = "exact") -> None:
        self.space = space
        self.depth = depth
        self.guidance: Guidance = guidance
        self._distances: dict[tuple[tuple[Current, ...], Budget], int] = {}
        self._blocks: dict[Size, tuple[Size, ...]] = {}
        self._domains = tuple(sorted(self._allowed_sizes()))
        self._strided = tuple(size for size in self._domains if space.is_strided(size))

    @cached_property
    def _completion(self) -> CompletionBound:
        return CompletionBound(self.space, self.depth)

    def roots(self) -> list[Interface]:
        """Return the interfaces after the choice of reductions, from none to the most, that can still end."""
        space = self.space
        found = []
        for count in range(min(space.max_reductions, self.depth) + 1):
            for domains in combinations_with_replacement(self._domains, count):
                allowance = space.allowance
                for size in domains:
                    allowance = allowance.charge(size) if allowance is not None else None
                if allowance is None or not self._fits_reductions(domains):
                    continue
                reductions = tuple(Reduction(size, index) for index, size in enumerate(domains))
                state = Interface(
                    dims=tuple(sorted((*space.free_iterators, *reductions))),
                    weights=(),
                    expansions=(),
                    reductions=reductions,
                    allowance=allowance,
                    steps=(("reduce", count),) if count else (),
                )
                if self.may_end(state):
                    found.append(state)
        return found

    def _allowed_sizes(self) -> Generator[Size, None, None]:
        symbols, left, most = self.space.allowance.symbols, self.space.allowance.left, self.space.max_exponents
        big = len(symbols.primary)
        ranges = [range(min(n, most - 1) + 1) for n in left[:big]]
        ranges += [range(max(most // 2 - most + 1, -n), min(most // 2, n) + 1) for n in left[big:]]
        for exponents in cartesian(*ranges):
            size = symbols.from_exponents(exponents)
            if self.space.admits(size):
                yield size

    def _fits_reductions(self, domains: Iterable[Size]) -> bool:
        ratio = product(self.space.allowance.symbols, domains) / self.space.largest_reduction
        return ratio.largest <= self.space.max_reduction_ratio

    def distance(self, state: Interface) -> int:
        """Return the distance of an interface from the input under the guidance, INFINITE where it cannot end."""
        if self.guidance != "compat":
            return self._completion(state)
        space = self.space
        left = self.depth - state.depth
        current, strided = [], 0
        for dim in state.dims:
            chain = space.max_chain - dim.chain
            if dim.discards:
                strided += 1
                if chain <= 0:
                    return INFINITE
            else:
                current.append(Current(dim.size, chain))
        unfolds = self._left(space.max_unfolds, state, "unfold") + (self.depth if space.max_repeat > 1 else 0)
        if strided > left or (strided and not unfolds):
            return INFINITE
        budget = Budget(
            steps=left - strided,
            merges=self._left(space.max_merges, state, "merge"),
            splits=self._left(space.max_splits, state, "split"),
            unfolds=unfolds - (strided > 0),
        )
        key = (tuple(sorted(current, key=_sort_key)), budget)
        if key not in self._distances:
            self._distances[key] = shape_distance(space.desired, *key)
        return min(INFINITE, self._distances[key] + strided)

    def is_hopeless(self, state: Interface) -> bool:
        """Whether no further reduction can bring an interface to an end, as far as the guidance sees."""
        return self.guidance == "exact" and self._completion.is_hopeless(state)

    def _left(self, most: int | None, state: Interface, kind: Step) -> int:
        return self.depth if most is None else max(0, most - state.count(kind))

    def may_end(self, state: Interface) -> bool:
        """Whether the guidance keeps an interface."""
        if self.guidance == "none":
            return state.depth <= self.depth
        return self.distance(state) <= self.depth - state.depth and keeps_unordered_rules(state, {})

    def steps(self, state: Interface) -> list[Interface]:
        """Return the interfaces after one more step that the rules admit and the guidance keeps."""
        left = self.depth - state.depth
        if left <= 0:
            return []
        critical = self.guidance == "compat" and self.distance(state) == left
        alive = [dim for dim in state.dims if dim.chain < self.space.max_chain]
        latest = [dim for dim in alive if state.is_latest(dim)]
        made = [*self._splits(state, alive), *self._unfolds(state, alive), *self._merges(state, latest)]
        made += self._expands(state, latest)
        if not critical:
            made += [*self._contractions(state, alive), *self._shifts(state, latest), *self._strides(state, latest)]
        return [after for after in made if self.may_end(after)]

    def _admits(self, candidate: Dim | Contraction, state: Interface) -> bool:
        return broken_rule(candidate, state, self.space, compat=self.guidance == "compat") is None

    def _splits(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if not self._left(self.space.max_splits, state, "split"):
            return
        for major in dims:
            for minor in dims:
                if major is minor or not self.space.admits(major.size * minor.size):
                    continue
                made = Split(major, minor)
                if self._admits(made, state):
                    yield state.step("split", (major, minor), (made,), state.allowance)

    def _unfolds(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if not self._left(self.space.max_unfolds, state, "unfold"):
            return
        for source in dims:
            for window in dims:
                if source is window:
                    continue
                made = Unfold(source, window)
                if self._admits(made, state):
                    yield state.step("unfold", (source, window), (made,), state.allowance)

    def _merges(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if not self._left(self.space.max_merges, state, "merge"):
            return
        for dim in dims:
            for block in self._divisors_of(dim.size):
                allowance = state.allowance.charge_merge(dim.size, block)
                if allowance is None:
                    continue
                minor = MergeMinor(dim, block)
                if self._admits(minor, state):
                    yield state.step("merge", (dim,), (MergeMajor(dim, block), minor), allowance)

    def _divisors_of(self, size: Size) -> tuple[Size, ...]:
        if size not in self._blocks:
            self._blocks[size] = tuple(self._divisors(size))
        return self._blocks[size]

    def _divisors(self, size: Size) -> Generator[Size, None, None]:
        """Yield blocks: per symbol a window of exponents around half the present one (Syno, limits on sizes)."""
        symbols, most = size.symbols, self.space.max_exponents
        ranges = []
        for index, exponent in enumerate(size.exponents):
            low = int(exponent / 2) + most // 2 - most + 1
            high = int(exponent / 2) + most // 2
            if index < len(symbols.primary):
                shift = max(0, -low)
                low, high = low + shift, min(high + shift, exponent)
            ranges.append(range(low, high + 1))
        for exponents in cartesian(*ranges):
            block = symbols.from_exponents(exponents)
            if self.space.admits(block) and self.space.admits(size / block):
                yield block

    def _expands(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if self.space.max_repeat <= 1:
            return
        symbols = self.space.allowance.symbols
        repeated = product(symbols, (dim.size for dim in state.expansions if isinstance(dim, MergeMinor)))
        for dim in dims:
            if isinstance(dim, MergeMinor) and (repeated * dim.size).largest <= self.space.max_repeat:
                yield state.step("expand", (dim,), (), state.allowance, expanded=(dim,))

    def _shifts(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if not self._left(self.space.max_shifts, state, "shift"):
            return
        for dim in dims:
            made = Shift(dim, 1)
            if self._admits(made, state):
                yield state.step("shift", (dim,), (made,), state.allowance)

    def _strides(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if not self._left(self.space.max_strides, state, "stride"):
            return
        for dim in dims:
            for stride in self._strided:
                allowance = state.allowance.charge(stride)
                size = dim.size * stride
                if allowance is None or size.largest > self.space.max_window or not self.space.admits(size):
                    continue
                made = Stride(dim, stride)
                if self._admits(made, state):
                    yield state.step("stride", (dim,), (made,), allowance)

    def _contractions(self, state: Interface, dims: list[Dim]) -> Generator[Interface, None, None]:
        if len(state.weights) + 1 < self.space.max_tensors:
            yield from self._contract(state, [dim for dim in dims if not dim.discards], (), (), state.allowance)

    def _contract(
        self, state: Interface, free: list[Dim], inner: tuple[Dim, ...], outer: tuple[Dim, ...], left: Allowance
    ) -> Generator[Interface, None, None]:
        """Give each free dim a part, or none; what begins with more than the allowance is not followed further."""
        if free:
            dim, rest = free[0], free[1:]
            yield from self._contract(state, rest, inner, outer, left)
            charged = left.charge(dim.size.primary_part)
            if charged is not None:
                yield from self._contract(state, rest, (*inner, dim), outer, charged)
                if may_be_outer(dim, self.space.low_rank):
                    yield from self._contract(state, rest, inner, (*outer, dim), charged)
            return
        weight = len(state.weights)
        candidate = Contraction(weight, inner, outer)
        if candidate.dims and self._admits(candidate, state):
            shared, expanded = (tuple(Share(dim, weight) for dim in part) for part in (inner, outer))
            yield state.step("contract", candidate.dims, shared, left, weight=candidate.dims, expanded=expanded)

    def finish(self, state: Interface) -> list[Operator]:
        """Return the operators that an interface is: one for each way to give its dims to the input's positions.

        Of more than ``max_ends`` the best are returned (Syno, finalisation).
        """
        space = self.space
        if len(state.dims) != len(space.desired) or (space.needs_weight and not state.weights):
            return []
        if any(dim.discards for dim in state.dims) or self._pools_too_much(state):
            return []
        found = [
            self._operator(state, dims) for dims in _assignments(state.dims, space.desired) if self._keeps(state, dims)
        ]
        if space.max_ends is None or len(found) <= space.max_ends:
            return found
        return Selector(keep=space.max_ends).select(found)

    def _pools_too_much(self, state: Interface) -> bool:
        met = frozenset().union(*(d.iterators for weight in state.weights for d in weight))
        alone = product(self.space.allowance.symbols, (r.size for r in state.reductions if r not in met))
        return alone.largest > self.space.max_pooling

    def _keeps(self, state: Interface, dims: tuple[Dim, ...]) -> bool:
        positions = self.space.free_input
        marked = {dim: p for dim, p in zip(dims, positions, strict=True) if p in self.space.unordered_input}
        return keeps_unordered_rules(state, marked)

    def _operator(self, state: Interface, dims: tuple[Dim, ...]) -> Operator:
        space = self.space
        iterators = space.iterators
        full: dict[int, Dim] = {i: iterators[o] for i, o in space.fixed}
        full.update(zip(space.free_input, dims, strict=True))
        return Operator(
            symbols=space.allowance.symbols,
            output=iterators,
            reductions=state.reductions,
            input=tuple(full[position] for position in range(len(space.input))),
            weights=state.weights,
            expansions=state.expansions,
        )


def _sort_key(dim: Current) -> tuple[tuple[int, ...], int]:
    return (dim.size.exponents, dim.left)


def _assignments(dims: tuple[Dim, ...], desired: tuple[Size, ...]) -> Generator[tuple[Dim, ...], None, None]:
    if not desired:
        yield ()
        return
    for dim in dims:
        if dim.size == desired[0]:
            rest = tuple(other for other in dims if other is not dim)
            for tail in _assignments(rest, desired[1:]):
                yield (dim, *tail)


def enumerate_operators(
    space: Space, depth: int, guidance: Guidance = "exact", *, distinct: bool = False
) -> list[Operator]:
    """Return every canonical operator of a space of at most ``depth`` steps, sorted by digest.

    Args:
        space: The search space.
        depth: Most steps.
        guidance: How steps are pruned; see the module.
        distinct: Keep the first of each group of :func:`cofire.search.fingerprint.distinct` alone, so that no two
            compute the same function up to a re-indexing of their weights.

    Raises:
        SearchError: ``distinct``, and an operator has too many points at probe sizes.
    """
    synthesis = Synthesis(space, depth, guidance)
    found: dict[int, Operator] = {}
    seen: set[int] = set()
    frontier = synthesis.roots()
    while frontier:
        state = frontier.pop()
        if state.digest in seen:
            continue
        seen.add(state.digest)
        found.update((operator.digest, operator) for operator in synthesis.finish(state))
        frontier.extend(synthesis.steps(state))
    operators = [found[digest] for digest in sorted(found)]
    return [group[0] for group in distinct_groups(operators)] if distinct else operators
