"""Canonical forms: rules that refuse a primitive where another graph builds the same operator, or none worth having.

Each rule has a letter (C: contraction, R: reshape, V: order of views, U: unordered dims) and a number, and looks at one
candidate on one interface, so that it can be tested alone. Rules marked approximate also lose operators that no other
graph builds, most of them at the border alone, where zeros are read; Syno has them, and so has this space. C1 (nothing
above a Share's right side) and the numbering of weights hold by construction of the interface.

What the rules leave double: two equal reductions or windows swapped, a weight indexed by a bijection of its reduction,
and Shifts that commute with towers of reshapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cofire.search.interface import Contraction, Interface, below_shares
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
from cofire.search.sizes import Size, product
from cofire.search.space import Space

# Neighbours of a fragment of a reshape, per weight that was shared above it (-1: none yet): what lies left and right.
Neighbours = dict[int, tuple[object, object]]
_UNSHARED = -1
_SUM = "sum"  # two sums side by side are one larger sum


@dataclass(frozen=True)
class Rule:
    """One rule of the normal form.

    Attributes:
        name: Its letter and number.
        statement: What it refuses.
        refuses: Takes a candidate, the interface it is put on, and the space.
        compat_only: Whether only Syno's reading has it, because it loses operators that no other graph builds.
    """

    name: str
    statement: str
    refuses: Callable[[Any, Interface, Space], bool]
    compat_only: bool = False


def neighbours(dim: Dim) -> Neighbours:
    """Return the Merges that a fragment was cut by, on its left and right, per weight (Syno, neighbour tracking)."""
    if isinstance(dim, Reduction):
        return {_UNSHARED: (_SUM, _SUM)}
    if isinstance(dim, Split):
        left, right = neighbours(dim.major), neighbours(dim.minor)
        nothing = (None, None)
        return {w: (left.get(w, nothing)[0], right.get(w, nothing)[1]) for w in sorted({*left, *right})}
    if isinstance(dim, (MergeMajor, MergeMinor)):
        cut = (dim.source.digest, dim.block)
        around = neighbours(dim.source)
        around.setdefault(_UNSHARED, (None, None))
        if isinstance(dim, MergeMajor):
            return {w: (left, cut) for w, (left, _) in around.items()}
        return {w: (cut, right) for w, (_, right) in around.items()}
    if isinstance(dim, Share):
        around = neighbours(dim.source)
        around[dim.weight] = around.pop(_UNSHARED, (None, None))
        return around
    return {}


def are_adjacent(left: Dim, right: Dim) -> bool:
    """Whether two dims are neighbouring fragments of one Merge, in this order, or two reductions.

    A weight that was shared with one of them alone comes between.
    """
    a, b = neighbours(left), neighbours(right)
    return any(a[w][1] is not None and a[w][1] == b[w][0] for w in a if w in b)


def unordered_scope(dim: Dim, space: Space) -> Dim | None:
    """Return the unordered dim that this one is made of, or none: a reduction, or an unordered dim of the output."""
    if isinstance(dim, Reduction):
        return dim
    if isinstance(dim, Iterator):
        return dim if dim.index in space.unordered_output else None
    scopes = {unordered_scope(child, space) for child in dim.below}
    return scopes.pop() if len(scopes) == 1 else None


def _same_merge(left: Dim, right: Dim) -> bool:
    while isinstance(left, (MergeMajor, MergeMinor)):
        left = left.source
    while isinstance(right, (MergeMajor, MergeMinor)):
        right = right.source
    return left == right


def _u3(split: Split, _: Interface, space: Space) -> bool:
    scope = unordered_scope(split.major, space)
    return scope is not None and scope == unordered_scope(split.minor, space) and _same_merge(split.major, split.minor)


def _c6(split: Split, _: Interface, __: Space) -> bool:
    a, b = split.major, split.minor
    return isinstance(a, Share) and isinstance(b, Share) and a.weight == b.weight


SPLIT_RULES = (
    Rule("R2", "the major side of a Split is no Split", lambda s, i, _: isinstance(s.major, Split)),
    Rule("C5", "a Split of two older dims", lambda s, i, _: not i.is_latest(s.major) and not i.is_latest(s.minor)),
    Rule(
        "R3",
        "a Split that joins again what a Merge parted, or two reductions",
        lambda s, i, _: are_adjacent(s.major, s.minor),
    ),
    Rule(
        "R3 sums",
        "a Split of two dims that are only summed over, one of them with a weight",
        lambda s, i, _: s.ends_in_reduce,
        compat_only=True,
    ),
    Rule("C6", "a Split of two dims of one weight", _c6),
    Rule("U3", "a Split of two fragments of one unordered dim", _u3),
)


def _above_large(merge: MergeMinor, kind: type[Dim], inner: Callable[[Any], Size]) -> bool:
    return isinstance(merge.source, kind) and (merge.block / inner(merge.source)).smallest >= 1


def _v11_merge(merge: MergeMinor, _: Interface, space: Space) -> bool:
    source = merge.source
    if not isinstance(source, Shift):
        return False
    return merge.block.largest > space.max_reshape_over_shift * abs(source.distance)


def _u2(merge: MergeMinor, _: Interface, space: Space) -> bool:
    if unordered_scope(merge.source, space) is None:
        return False
    major = merge.source.size / merge.block
    before = merge.source
    if isinstance(before, MergeMinor) and major < before.source.size / before.block:
        return True
    return merge.block < major


MERGE_RULES = (
    Rule(
        "R1",
        "a Merge above a Share, a Split (approximate where blocks do not divide) or the major side of a Merge",
        lambda m, i, _: isinstance(m.source, (Share, Split, MergeMajor)),
    ),
    Rule("R4", "a Merge directly above a Reduce", lambda m, i, _: isinstance(m.source, Reduction)),
    Rule(
        "V3",
        "a Merge of at least a window above its Unfold (approximate)",
        lambda m, i, _: _above_large(m, Unfold, lambda u: u.window.size),
    ),
    Rule(
        "V5",
        "a Merge of at least a stride above its Stride",
        lambda m, i, _: _above_large(m, Stride, lambda s: s.stride),
    ),
    Rule("V11", "a Merge with a large block above a Shift (approximate)", _v11_merge),
    Rule("U2", "fragments of an unordered dim out of order", _u2),
)


def _v11_shift(shift: Shift, _: Interface, space: Space) -> bool:
    source = shift.source
    if not isinstance(source, Split):
        return False
    return source.minor.size.largest > space.max_reshape_over_shift * abs(shift.distance)


SHIFT_RULES = (
    Rule(
        "V8",
        "a Shift above a Reduce, a Share or (approximate) a Shift",
        lambda s, i, _: isinstance(s.source, (Reduction, Share, Shift)),
    ),
    Rule("U1", "a Shift of an unordered dim", lambda s, i, space: unordered_scope(s.source, space) is not None),
    Rule("V11", "a Shift above a Split with a large block (approximate)", _v11_shift),
)

STRIDE_RULES = (
    Rule("V4", "a Stride above a Split", lambda s, i, _: isinstance(s.source, Split)),
    Rule(
        "V7",
        "a Stride above an Unfold (approximate) or a Stride",
        lambda s, i, _: isinstance(s.source, (Unfold, Stride)),
    ),
)


def _v12(unfold: Unfold, _: Interface, space: Space) -> bool:
    k = unfold.window.size
    if space.odd_windows and any(value % 2 == 0 for value in k.values):
        return True
    return k.largest > space.max_window or (unfold.source.size / k).smallest < space.min_unfold_ratio


def _v1(unfold: Unfold, _: Interface, __: Space) -> bool:
    inner = unfold.source
    return isinstance(inner, Unfold) and (unfold.window.size / inner.window.size).smallest < 1


def _v9(unfold: Unfold, _: Interface, space: Space) -> bool:
    return space.needs_weight and isinstance(unfold.window, Reduction)


UNFOLD_RULES = (
    Rule("V9", "an Unfold whose window is a Reduce, which is pooling", _v9),
    Rule("V2", "an Unfold of a Split (approximate)", lambda u, i, _: isinstance(u.source, Split)),
    Rule("V6", "an Unfold of a Shift (approximate)", lambda u, i, _: isinstance(u.source, Shift)),
    Rule("V10", "an Unfold of what ends in reductions alone (approximate)", lambda u, i, _: u.source.ends_in_reduce),
    Rule("V12", "an even, large or relatively large window", _v12),
    Rule("V1", "an Unfold with a smaller window above another Unfold (approximate)", _v1),
)


def _c2(candidate: Contraction, state: Interface, _: Space) -> bool:
    """Order contractions that commute by their leaders, the least dims by chain and digest."""
    last = len(state.weights) - 1
    if last < 0 or any(last in dim.weights for dim in candidate.dims):
        return False
    return _leader(candidate.dims) < _leader(state.weights[last])


def _leader(dims: Iterable[Dim]) -> tuple[int, int]:
    return min((dim.chain, dim.digest) for dim in dims)


def _c3(candidate: Contraction, _: Interface, space: Space) -> bool:
    if space.needs_matmul and not (candidate.inner and candidate.outer):
        return True
    numel = product(space.allowance.symbols, (dim.size for dim in candidate.dims))
    return numel.smallest < space.min_weight


def _c3_outer(candidate: Contraction, state: Interface, space: Space) -> bool:
    if not candidate.outer:
        return False
    alone = [dim for dim in candidate.outer if not isinstance(below_shares(dim), Reduction)]
    before = [
        dim for dim in state.expansions if isinstance(dim, Share) and not isinstance(below_shares(dim), Reduction)
    ]
    total = product(space.allowance.symbols, (dim.size for dim in (*alone, *before)))
    return total.largest > space.max_outer


def _c4(candidate: Contraction, _: Interface, __: Space) -> bool:
    views = [dim for dim in candidate.outer if not isinstance(below_shares(dim), Reduction)]
    return any(are_adjacent(a, b) for a in views for b in views if a is not b)


CONTRACTION_RULES = (
    Rule("C2", "contractions that commute, out of order", _c2),
    Rule("C3", "a contraction that is no matrix product, or has a tiny weight", _c3),
    Rule("C3 outer", "too many elements that only weights have", _c3_outer),
    Rule("C4", "two outer dims that one outer dim replaces", _c4),
)

RULES: dict[type, tuple[Rule, ...]] = {
    Split: SPLIT_RULES,
    MergeMinor: MERGE_RULES,
    Shift: SHIFT_RULES,
    Stride: STRIDE_RULES,
    Unfold: UNFOLD_RULES,
    Contraction: CONTRACTION_RULES,
}


def broken_rule(candidate: Dim | Contraction, state: Interface, space: Space, *, compat: bool = False) -> Rule | None:
    """Return the first rule that refuses a candidate, or none.

    Args:
        candidate: The dim that a primitive would add (of a Merge: the minor side), or a contraction.
        state: The interface it would be put on.
        space: The search space.
        compat: Ask Syno's own rules too, which lose operators.
    """
    for rule in RULES[type(candidate)]:
        if (compat or not rule.compat_only) and rule.refuses(candidate, state, space):
            return rule
    return None
