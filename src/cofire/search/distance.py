"""Shape distance as Syno reads it: how many steps lead from an interface to the input's shape.

The interface's sizes C are parted into groups, each of which provides some of the input's sizes D (Syno, shape
distance). With r the product of a group's C over that of its D, a group costs

    (#C - 1) splits + max(0, #D - 1) merges + [r != 1 and D] one more merge + [r != 1 or no D] an Unfold or Expand,

and r must not be a coefficient below one. A dim at the end of its chain must be one of D as it stands.

It charges every dim that the input lacks one step, although one Contraction removes any number of them, so it is not a
lower bound; :mod:`cofire.search.completion` has one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from cofire.search.sizes import Size, SizeKind, product

INFINITE = 1 << 20


class Current(NamedTuple):
    """A dim of the interface, as far as the distance goes.

    Attributes:
        size: Its size.
        left: Primitives its chain may still take.
    """

    size: Size
    left: int


@dataclass(frozen=True)
class Budget:
    """What is left to spend.

    Attributes:
        steps: Steps of any kind; a distance above it is reported as INFINITE.
        merges: Merges.
        splits: Splits.
        unfolds: Unfolds and Expands.
    """

    steps: int
    merges: int
    splits: int
    unfolds: int


class _Group(NamedTuple):
    rest: Size
    current: int
    desired: int
    direct: bool


def shape_distance(desired: tuple[Size, ...], current: tuple[Current, ...], budget: Budget) -> int:
    """Return the least number of steps by the module's rule, or INFINITE.

    Args:
        desired: Sizes of the input's dims; each holds one primary symbol, once.
        current: Dims of the interface that are to reach the input.
        budget: What may be spent.
    """
    if not current:
        return INFINITE
    symbols = desired[0].symbols
    ratio = product(symbols, (c.size for c in current)) / product(symbols, desired)
    if ratio.kind is SizeKind.ILLEGAL or ratio.smallest < 1:
        return INFINITE
    best = INFINITE
    for groups, taken in _provide(desired, current, budget, (), 0, 0):
        free = [k for k in range(len(current)) if not taken >> k & 1]
        if all(current[k].left > 0 for k in free):
            best = min(best, _place([current[k] for k in free], list(groups), budget, best))
    return best


def _provide(
    desired: tuple[Size, ...],
    current: tuple[Current, ...],
    budget: Budget,
    groups: tuple[_Group, ...],
    taken: int,
    index: int,
) -> Generator[tuple[tuple[_Group, ...], int], None, None]:
    """Yield every way to give each desired size a group that holds its primary symbol."""
    if sum(g.current - 1 for g in groups) > budget.splits or sum(max(0, g.desired - 1) for g in groups) > budget.merges:
        return
    if index == len(desired):
        yield groups, taken
        return
    size = desired[index]
    symbol = next((k for k in range(len(size.symbols.primary)) if size.exponents[k] > 0), None)
    for position in range(len(groups) + 1):
        new = position == len(groups)
        if not new and groups[position].direct:
            continue
        if not new and (symbol is None or groups[position].rest.exponents[symbol] > 0):
            g = groups[position]
            grown = g._replace(rest=g.rest / size, desired=g.desired + 1)
            yield from _provide(desired, current, budget, _swap(groups, position, grown), taken, index + 1)
            continue
        for k, dim in enumerate(current):
            if taken >> k & 1 or (symbol is not None and dim.size.exponents[symbol] <= 0):
                continue
            if dim.left <= 0 and (not new or dim.size != size):
                continue
            if new:
                more = (*groups, _Group(dim.size / size, 1, 1, dim.left <= 0))
            else:
                g = groups[position]
                grown = _Group(g.rest * dim.size / size, g.current + 1, g.desired + 1, False)
                more = _swap(groups, position, grown)
            yield from _provide(desired, current, budget, more, taken | 1 << k, index + 1)


def _swap(groups: tuple[_Group, ...], position: int, group: _Group) -> tuple[_Group, ...]:
    return (*groups[:position], group, *groups[position + 1 :])


def _place(free: list[Current], groups: list[_Group], budget: Budget, best: int) -> int:
    """Put the remaining dims into groups, old or new, and return the least cost."""
    splits = sum(g.current - 1 for g in groups)
    merges = sum(max(0, g.desired - 1) for g in groups)
    if splits > budget.splits or merges > budget.merges or splits + merges > min(best, budget.steps):
        return best
    if not free:
        return min(best, _cost(groups, budget))
    dim, rest = free[0], free[1:]
    if dim.left > 0:
        for position, g in enumerate(groups):
            if not g.direct:
                groups[position] = g._replace(rest=g.rest * dim.size, current=g.current + 1)
                best = _place(rest, groups, budget, best)
                groups[position] = g
    groups.append(_Group(dim.size, 1, 0, False))
    best = _place(rest, groups, budget, best)
    groups.pop()
    return best


def _cost(groups: list[_Group], budget: Budget) -> int:
    """Return the steps of a full partition, or INFINITE where it is not allowed."""
    splits = merges = unfolds = 0
    for g in groups:
        if g.rest.kind is SizeKind.ILLEGAL:
            return INFINITE
        splits += g.current - 1
        merges += max(0, g.desired - 1)
        if g.rest.is_one and g.desired:
            continue
        merges += g.desired > 0
        unfolds += 1
    if splits > budget.splits or merges > budget.merges or unfolds > budget.unfolds:
        return INFINITE
    steps = splits + merges + unfolds
    return steps if steps <= budget.steps else INFINITE
