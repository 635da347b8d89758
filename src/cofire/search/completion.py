"""At least how many steps complete an interface: a lower bound that knows which step may follow which.

As in Syno's shape distance the interface's dims are parted into groups that provide the input's dims, and dims that are
to go. Syno charges each dim that goes one step. Here it is asked how it can go:

- A Contraction to come takes any number of dims that the weight alone may have, so all of them cost the one step. What
  it takes is charged to the allowance: a primary symbol that the allowance does not cover can never go.
- A window goes by Unfold if it is small and odd under every mapping, and no even dim goes where no Contraction comes.
- A group whose product is not the input's needs a Merge, which never lies directly above a Reduce, a Share, a Split or
  the major side of another Merge, nor above a Shift or an Unfold with a large block. Where each dim of the group is one
  of these, an Unfold or a Shift must come between, or nothing can.

Every charge is one that no completion avoids, so guided synthesis loses nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from fractions import Fraction
from itertools import combinations
from itertools import product as cartesian
from math import inf, prod
from typing import NamedTuple

from cofire.search.canonical import unordered_scope
from cofire.search.distance import INFINITE
from cofire.search.interface import Interface, Step, below_shares, may_be_outer
from cofire.search.primitives import Dim, MergeMajor, Reduction, Share, Shift, Split, Unfold
from cofire.search.sizes import Size, SizeKind, product
from cofire.search.space import Space

_CACHED = 1 << 16  # bounds and parts that are kept


class _Part(NamedTuple):
    """What the bound asks of a dim.

    Attributes:
        size: Its size.
        left: Whether its chain may still take a primitive.
        cut: The largest minor side that a Merge directly above it may have; 0: no Merge may come.
        slides: Whether an Unfold may slide over it.
        shifts: Whether a Shift may lie directly above it.
        outer: The number of contractions by which a weight alone may have it; 0: never.
        raw: Whether it is a reduction that no weight has; it slides over nothing as it stands.
    """

    size: Size
    left: bool
    cut: float
    slides: bool
    shifts: bool
    outer: int
    raw: bool


class _Group(NamedTuple):
    """Dims that provide some of the input's dims.

    Attributes:
        rest: Their product over that of what they provide.
        members: Their positions among the parts.
        desired: Positions of what they provide.
        closed: Whether it is a dim at the end of its chain.
    """

    rest: Size
    members: tuple[int, ...]
    desired: tuple[int, ...]
    closed: bool


class _Budget(NamedTuple):
    """What is left of each kind of step.

    Attributes:
        contractions: Contractions.
        merges: Merges.
        splits: Splits.
        unfolds: Unfolds and Expands.
        shifts: Shifts.
        strides: Strides.
        needs_weight: Whether a contraction must come.
        strided: Dims that a Stride has made windows of.
    """

    contractions: int
    merges: int
    splits: int
    unfolds: int
    shifts: int
    strides: int
    needs_weight: bool
    strided: int


class CompletionBound:
    """Bounds from below the steps that interfaces of a space still need.

    Attributes:
        space: The space.
        depth: Most steps of an operator.
        desired: Sizes of the input's dims that are to be provided.
    """

    def __init__(self, space: Space, depth: int) -> None:
        self.space, self.depth = space, depth
        self.desired = space.desired
        symbols = space.allowance.symbols
        self._primaries = len(symbols.primary)
        self._wanted = product(symbols, self.desired)
        self._parts: dict[tuple[Dim, bool, bool, bool, bool], _Part] = {}
        self._windows: dict[Size, tuple[bool, bool, int]] = {}
        # The bound, and up to which number of steps it was looked for.
        self._known: dict[tuple[tuple[_Part, ...], _Budget], tuple[int, int]] = {}
        sizes = [size for size in self._sizes() if space.admits(size)]
        slid = [size for size in sizes if self._window(size)[0]]
        self._slides = tuple(any(size.exponents[k] > 0 for size in slid) for k in range(self._primaries))
        widest = [max(values) for values in zip(*(size.values for size in slid), strict=True)]
        # A block need be smaller than its window under one mapping only (rule V3). Limits are numbers of the first.
        blocks = [size for size in sizes if any(b < w for b, w in zip(size.values, widest, strict=False))]
        self.slid_cut = max((float(size.values[0]) for size in blocks), default=0.0)

    def __call__(self, state: Interface) -> int:
        """Return the least number of steps by the module's rules, or INFINITE where it is above what is left.

        Args:
            state: An interface of the space.
        """
        parts, strided = [], 0
        for dim in state.dims:
            left = self.space.max_chain - dim.chain
            if dim.discards:
                strided += 1
                if left <= 0:
                    return INFINITE
            else:
                parts.append(self._part(dim, left > 0, state))
        budget = self._budget(state, strided)
        most = self.depth - state.depth - strided
        if most < 0 or (strided and not budget.unfolds) or self.is_hopeless(state):
            return INFINITE
        parts.sort(key=lambda part: (part.size.packed, *part[1:]))
        key = (tuple(parts), budget)
        steps, asked = self._known.get(key, (INFINITE, -1))
        if steps >= INFINITE and asked < most:
            steps = self._least(key[0], budget, most)
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[key] = steps, most
        return steps + strided if steps <= most else INFINITE

    def is_hopeless(self, state: Interface) -> bool:
        """Whether an interface has more to get rid of than any steps can, further reductions included.

        Args:
            state: An interface of the space.
        """
        space, symbols = self.space, self._wanted.symbols
        bare = [(dim, below_shares(dim)) for dim in state.dims if not dim.discards]
        going = product(symbols, (dim.size for dim, _ in bare)) / self._wanted
        contracts = len(state.weights) + 1 < space.max_tensors
        for k in range(self._primaries):
            if not self._slides[k] and going.exponents[k] > (state.allowance.left[k] if contracts else 0):
                return True
        if not space.odd_windows or space.max_repeat > 1:
            return False
        # Windows take odd sizes only; the rest must go into weights, within the limit of rule C3.
        low, high = space.low_rank
        gone = [dim for dim in state.expansions if not isinstance(below_shares(dim), Reduction)]
        ranked = [dim for dim, bottom in bare if isinstance(bottom, Reduction) and low <= dim.size.largest <= high]
        spent, spared = product(symbols, (dim.size for dim in gone)), product(symbols, (dim.size for dim in ranked))
        return any(
            _even_part(all_of_it) * before > space.max_outer * _even_part(ranks)
            for all_of_it, before, ranks in zip(going.values, spent.values, spared.values, strict=True)
        )

    def _budget(self, state: Interface, strided: int) -> _Budget:
        space, depth, counts = self.space, self.depth, dict(state.steps)

        def left(most: int | None, kind: Step) -> int:
            return depth if most is None else max(0, most - counts.get(kind, 0))

        return _Budget(
            contractions=max(0, space.max_tensors - 1 - len(state.weights)),
            merges=left(space.max_merges, "merge"),
            splits=left(space.max_splits, "split"),
            unfolds=left(space.max_unfolds, "unfold") + (depth if space.max_repeat > 1 else 0),
            shifts=left(space.max_shifts, "shift"),
            strides=left(space.max_strides, "stride"),
            needs_weight=space.needs_weight and not state.weights,
            strided=strided,
        )

    def _part(self, dim: Dim, left: bool, state: Interface) -> _Part:
        is_allowed = left
        for need, have in zip(dim.size.exponents[: self._primaries], state.allowance.left, strict=False):
            is_allowed = is_allowed and need <= have
        key = (
            dim,
            left,
            state.is_latest(dim),
            is_allowed,
            is_allowed and len(state.weights) + 1 < self.space.max_tensors,
        )
        part = self._parts.get(key)
        if part is None:
            if len(self._parts) >= _CACHED:
                self._parts.clear()
            part = self._parts[key] = self._new_part(*key)
        return part

    def _new_part(self, dim: Dim, left: bool, latest: bool, is_allowed: bool, may_share: bool) -> _Part:
        space, cut = self.space, 0.0
        if latest and not isinstance(dim, (Reduction, Share, Split, MergeMajor)):
            cut = inf
            if isinstance(dim, Shift):
                cut = space.max_reshape_over_shift * abs(dim.distance)
            elif isinstance(dim, Unfold):
                cut = self.slid_cut
        shifts = latest and not isinstance(dim, (Reduction, Share, Shift)) and unordered_scope(dim, space) is None
        if isinstance(dim, Split):
            shifts = shifts and dim.minor.size.largest <= space.max_reshape_over_shift
        outer = 0
        if is_allowed:
            low, high = space.low_rank
            if may_be_outer(dim, space.low_rank):
                outer = 1
            elif isinstance(dim, Reduction) and low <= dim.size.largest <= high:
                outer = 2
        # Above a Split or a Shift no Unfold comes, but above the Share of one.
        slides = not dim.ends_in_reduce and (may_share or not isinstance(dim, (Split, Shift)))
        return _Part(dim.size, left, cut, slides, shifts, outer, isinstance(dim, Reduction))

    def _sizes(self) -> Generator[Size, None, None]:
        """Yield the sizes that dims of the space may have, by what the output has and the allowance brings in."""
        space, symbols = self.space, self.space.allowance.symbols
        most = [n + sum(abs(size.exponents[k]) for size in space.output) for k, n in enumerate(space.allowance.left)]
        ranges = [range(-n if k >= self._primaries else 0, n + 1) for k, n in enumerate(most)]
        for exponents in cartesian(*ranges):
            if 0 < sum(e != 0 for e in exponents) <= space.max_symbols:
                yield symbols.from_exponents(exponents)

    def _window(self, size: Size) -> tuple[bool, bool, int]:
        """Return whether a size is a window, whether it is a product of windows, and of at least how many."""
        known = self._windows.get(size)
        if known is None:
            space = self.space
            whole = size.is_legal and (not space.odd_windows or all(value % 2 == 1 for value in size.values))
            count, reach = 1, space.max_window
            while reach < size.largest and space.max_window > 1:
                count, reach = count + 1, reach * space.max_window
            known = (True, True, 1) if space.max_repeat > 1 else (whole and count == 1, whole, count)
            self._windows[size] = known
        return known

    def _least(self, parts: tuple[_Part, ...], budget: _Budget, most: int) -> int:
        if not parts:
            return INFINITE
        ratio = product(self._wanted.symbols, (part.size for part in parts)) / self._wanted
        if ratio.kind is SizeKind.ILLEGAL or ratio.smallest < 1:
            return INFINITE
        if not budget.contractions and not ratio.is_one and not self._window(ratio)[1]:
            return INFINITE
        return _Partition(self, parts, budget, most).least()


class _Going(NamedTuple):
    """How dims that provide nothing go: steps but the contraction, and what they are.

    Attributes:
        steps: Steps, or INFINITE where it does not go alone.
        unfolds: How many of them are surely Unfolds.
        openings: How often an Unfold or a Shift must come before a Merge; not in ``steps``.
    """

    steps: int
    unfolds: int = 0
    openings: int = 0


class _Merging(NamedTuple):
    """What a group needs whose product is not what it provides."""

    merges: int
    openings: int = 0
    unfolds: int = 0


_NOTHING = _Merging(0)
_NEVER = _Merging(INFINITE)


class _Partition:
    """The search for the cheapest partition of one interface."""

    def __init__(self, bound: CompletionBound, parts: tuple[_Part, ...], budget: _Budget, most: int) -> None:
        self.bound, self.parts, self.budget = bound, parts, budget
        self.space = bound.space
        self.desired = bound.desired
        self.choices = range(int(budget.needs_weight), budget.contractions + 1)
        self.reach = self.space.max_reshape_over_shift
        self.is_cut = any(part.cut for part in parts)
        self.alone = tuple(tuple(self._goes(part, count) for count in self.choices) for part in parts)
        self.cheapest = tuple(min((min(way.steps, 1) for way in ways), default=1) for ways in self.alone)
        self.is_small = tuple(part.size.largest <= self.reach for part in parts)
        self.is_window = tuple(bound._window(part.size)[0] for part in parts)
        self.is_lonely = tuple(all(way.steps >= INFINITE for way in ways) for ways in self.alone)
        self.may_join = bool(budget.splits and budget.shifts and budget.merges)
        self.merged: dict[tuple[_Group, bool, bool], _Merging] = {}
        self.best = most + 1

    def least(self) -> int:
        """Return the cost of the cheapest partition, INFINITE where it is above ``most``."""
        most = self.best
        if self.choices:
            self._provide(0, [], 0)
        return self.best if self.best < most else INFINITE

    def _goes(self, part: _Part, contractions: int) -> _Going:
        """Return how a dim goes that provides nothing."""
        if not part.left:
            return _Going(INFINITE)
        if 0 < part.outer <= contractions:
            return _Going(0)
        is_window, is_windows, count = self.bound._window(part.size)
        is_merged = part.cut > 0 or part.slides or (part.shifts and self.budget.shifts > 0)
        if is_window:
            return _Going(1, int(not (contractions and is_merged)))
        if not is_merged or not (contractions or is_windows):
            return _Going(INFINITE)
        opening = int(not part.cut)
        return _Going(1, 0, opening) if contractions else _Going(1 + count, count, opening)

    def _provide(self, index: int, groups: list[_Group], taken: int) -> None:
        """Give each of the input's dims a group that holds its primary symbol."""
        if index == len(self.desired):
            free = [k for k in range(len(self.parts)) if not taken >> k & 1]
            splits = len(self.parts) - len(free) - len(groups)
            merges = len(self.desired) - len(groups)
            if merges <= self.budget.merges and all(self.parts[k].left for k in free):
                self._place(free, groups, [], splits, splits + merges + self.choices[0])
            return
        size = self.desired[index]
        symbol = next((k for k in range(self.bound._primaries) if size.exponents[k] > 0), None)
        for position, g in enumerate(groups):
            if not g.closed and (symbol is None or g.rest.exponents[symbol] > 0):
                self._provide(index + 1, _swap(groups, position, _serve(g, size, index)), taken)
        for k, part in enumerate(self.parts):
            if taken >> k & 1 or (symbol is not None and part.size.exponents[symbol] <= 0):
                continue
            if part.left or part.size == size:
                new = _Group(part.size / size, (k,), (index,), not part.left)
                self._provide(index + 1, [*groups, new], taken | 1 << k)
            if not part.left:
                continue
            for position, g in enumerate(groups):
                if not g.closed and (symbol is None or g.rest.exponents[symbol] <= 0):
                    more = _serve(self._join(g, k), size, index)
                    self._provide(index + 1, _swap(groups, position, more), taken | 1 << k)

    def _join(self, g: _Group, k: int) -> _Group:
        return _Group(g.rest * self.parts[k].size, (*g.members, k), g.desired, g.closed)

    def _place(self, free: list[int], groups: list[_Group], alone: list[int], splits: int, least: int) -> None:
        """Put the remaining dims into groups or let them go; ``least`` is what it costs so far."""
        if splits > self.budget.splits or least >= self.best:
            return
        if not free:
            for number, count in enumerate(self.choices):
                if least + number < self.best:
                    self.best = min(self.best, self._cost(groups, alone, number, count))
            return
        k, rest = free[0], free[1:]
        if self.may_join or not self.is_lonely[k]:
            self._place(rest, groups, [*alone, k], splits, least + self.cheapest[k])
        for position, g in enumerate(groups):
            if not g.closed:
                self._place(rest, _swap(groups, position, self._join(g, k)), alone, splits + 1, least + 1)

    def _cost(self, groups: list[_Group], alone: list[int], number: int, contractions: int) -> int:
        """Return the steps of a full partition with so many contractions, or INFINITE where it is not allowed."""
        budget = self.budget
        windows = budget.strided
        for k in alone:
            windows += self.is_window[k]
        merges = unfolds = openings = 0
        for g in groups:
            needed, opening, windowed = self._merging(g, contractions > 0, windows > 0 or self.is_cut)
            merges, openings, unfolds = merges + needed, openings + opening, unfolds + windowed
            if merges > budget.merges:
                return INFINITE
        others, slid, opening = self._going(alone, number, contractions)
        unfolds, openings = unfolds + slid, openings + opening
        splits = len(self.parts) - len(alone) - len(groups)
        if unfolds and (not budget.unfolds or unfolds - budget.unfolds > budget.splits - splits):
            return INFINITE
        opened = max(0, openings - unfolds - others)
        if openings and not windows and not self.is_cut:
            opened = max(opened, 1)
        return splits + merges + unfolds + others + contractions + opened

    def _going(self, alone: list[int], number: int, contractions: int) -> _Going:
        """Return how all dims go that provide nothing; Unfolds are not among the steps."""
        others = company = raw = slid = unfolds = openings = 0
        for k in alone:
            steps, sure, opening = self.alone[k][number]
            if steps >= INFINITE:
                company += 1
                continue
            unfolds, others, openings = unfolds + sure, others + steps - sure, openings + opening
            if sure:
                raw, slid = raw + self.parts[k].raw, slid + 1
        if company:
            if not self._have_company(alone, contractions):
                return _Going(INFINITE)
            others += company + 1
        if raw and raw == slid and not contractions and self.space.needs_weight:
            # A reduction that no weight has slides over nothing alone; a Stride above it makes it another dim.
            others += 1 if self.budget.strides else INFINITE
        return _Going(others, unfolds, openings)

    def _have_company(self, alone: list[int], contractions: int) -> bool:
        """Whether dims that cannot go alone may go together, by a Split, a Shift and a Merge of a small minor side."""
        if len(alone) < 2 or not self.may_join:
            return False
        if not contractions and not all(self.bound._window(self.parts[k].size)[1] for k in alone):
            return False
        return self._may_shift_together(alone)

    def _may_shift_together(self, members: Iterable[int]) -> bool:
        """Whether a Shift may lie above a Split of two dims, whose minor side must be small, or of parts of them."""
        sizes = [self.parts[k].size for k in members]
        return len(sizes) > 1 and any(
            self.parts[k].cut > 0
            or (self.is_small[k] and any(self.space.admits(size * self.parts[k].size) for size in sizes))
            for k in members
        )

    def _merging(self, g: _Group, may_contract: bool, may_slide: bool) -> _Merging:
        """Return what a group needs; more merges than any budget where it cannot be."""
        if len(g.desired) == 1 and g.rest.is_one:
            return _NOTHING
        key = (g, may_contract, may_slide)
        found = self.merged.get(key)
        if found is None:
            found = self.merged[key] = self._merge(*key)
        return found

    def _merge(self, g: _Group, may_contract: bool, may_slide: bool) -> _Merging:
        if g.rest.kind is SizeKind.ILLEGAL:
            return _NEVER
        merges = len(g.desired) - 1 + (not g.rest.is_one)
        parts = [self.parts[k] for k in g.members]
        cut, limit = max(part.cut for part in parts), 0.0
        if may_slide and any(part.slides for part in parts):
            limit = self.bound.slid_cut
        if self.budget.shifts and (limit or any(part.shifts for part in parts) or self._may_shift_together(g.members)):
            limit = max(limit, self.reach)
        if not cut and not limit:
            return _NEVER
        limited = self._limited(g, parts, max(limit, cut if cut < inf else 0.0))
        merges = max(merges, limited)
        openings = max(int(not cut), limited - (0 < cut < inf))
        if openings and not limit:
            return _NEVER
        if g.rest.is_one or may_contract:
            return _Merging(merges, openings)
        _, is_windows, count = self.bound._window(g.rest)
        return _Merging(merges, openings, count) if is_windows else _NEVER

    def _limited(self, g: _Group, parts: list[_Part], limit: float) -> int:
        """Return how many Merges with a limited minor side it takes to part what no free Merge parts."""
        if limit == inf or min(self.desired[k].values[0] for k in g.desired) <= limit:
            return 0
        # Some dims go whole, what is free goes as it likes, and minor sides take the rest or put back what is too much.
        free = prod(float(part.size.values[0]) for part in parts if part.cut == inf)
        fixed = [float(part.size.values[0]) for part in parts if part.cut < inf]
        rest, least = float(g.rest.values[0]), inf
        for count in range(len(fixed) + 1):
            for chosen in combinations(fixed, count):
                going = prod(chosen)
                least = min(least, max(rest / (going * free), going / rest))
        # A dim leaves one large part; each further one that the input wants is put together of two small ones or more.
        count = 0 if free > 1 else 2 * max(0, len(g.desired) - len(parts))
        merges = 0
        while least > 1 + 1e-9:
            if limit <= 1:
                return INFINITE
            least, merges = least / limit, merges + 1
        return max(count, merges)


def _even_part(number: int | Fraction) -> int | Fraction:
    """Return the greatest power of two that divides a number; one that is not whole may have it below the line."""
    if isinstance(number, int):
        return number & -number
    above, below = number.numerator, number.denominator
    return Fraction(above & -above, below & -below)


def _serve(g: _Group, size: Size, index: int) -> _Group:
    return g._replace(rest=g.rest / size, desired=(*g.desired, index))


def _swap(groups: list[_Group], position: int, group: _Group) -> list[_Group]:
    return [*groups[:position], group, *groups[position + 1 :]]
