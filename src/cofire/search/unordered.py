"""The rules on dims without order (U1 to U3), read from the tensors down to the output.

A dim of a weight, a dim that is repeated and an unordered dim of the input have no order, and neither has a dim below
that is made into them alone. Such a dim may not be shifted or slid over, and its fragments must come in order and may
neither be joined again nor both be summed. Left out: Syno's guess of unordered dims in mid-search (U4), which refuses
such operators earlier.
"""

from __future__ import annotations

from cofire.search.interface import Interface
from cofire.search.primitives import Dim, MergeMajor, MergeMinor, Share, Shift, Split, Stride, Unfold

# None: ordered. Otherwise the position of the unordered dim of the input that it comes from, or -1: of no one dim.
_Mark = int | None
_ANYWHERE = -1


def keeps_unordered_rules(state: Interface, unordered: dict[Dim, int]) -> bool:
    """Whether a graph is in normal form as far as dims without order go.

    Args:
        state: The interface.
        unordered: For each dim of the interface that is an unordered dim of the input, that dim's position.
    """
    order = _by_height(state)
    marks = _marks(order, state, unordered)
    towers = _towers(order)
    for dim in order:
        if marks[dim] is None:
            continue
        if isinstance(dim, (Shift, Unfold)) or (isinstance(dim, Split) and _out_of_order(dim)):
            return False
    for major in order:
        if isinstance(major, MergeMajor) and marks[major.source] is not None:
            tower = towers.get(major)
            if tower is not None and tower == towers.get(MergeMinor(major.source, major.block)):
                return False
    summed = [towers[r] for r in state.reductions if r in towers]
    return len(set(summed)) == len(summed)


def _by_height(state: Interface) -> list[Dim]:
    dims: set[Dim] = set()
    for top in (*state.dims, *state.expansions):
        dims.update(top.walk())
    return sorted(dims, key=lambda dim: (-dim.chain, dim.digest))


def _marks(order: list[Dim], state: Interface, unordered: dict[Dim, int]) -> dict[Dim, _Mark]:
    """Return each dim's mark; ``order`` has every dim after those above it."""
    marks: dict[Dim, _Mark] = {dim: unordered.get(dim) for dim in state.dims}
    marks.update(dict.fromkeys(state.expansions, _ANYWHERE))
    for dim in order:
        if isinstance(dim, MergeMajor):
            other = marks.get(MergeMinor(dim.source, dim.block))
            marks[dim.source] = _both(marks[dim], other)
        elif isinstance(dim, (Share, Shift, Stride, Split, Unfold)):
            marks.update(dict.fromkeys(dim.below, marks[dim]))
    return marks


def _both(left: _Mark, right: _Mark) -> _Mark:
    if left is None or right is None:
        return None
    if _ANYWHERE in (left, right):
        return max(left, right)
    return left if left == right else None


def _towers(order: list[Dim]) -> dict[Dim, Dim]:
    """Return, for each dim that a Split takes, the topmost Split of its tower."""
    towers: dict[Dim, Dim] = {}
    for dim in order:
        if isinstance(dim, Split):
            top = towers.get(dim, dim)
            towers[dim.major] = towers[dim.minor] = top
    return towers


def _out_of_order(split: Split) -> bool:
    minor = split.minor
    after = minor.major.size if isinstance(minor, Split) else minor.size
    return after < split.major.size
