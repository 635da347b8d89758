"""Flows that fare alike: colour refinement of flows and links into classes, and the small problem over the classes.

Two flows are alike when size, start, lane and latency are equal and they cross as many links of each class by the same
fractions, and wait for as many flows of each class; two links when capacity is equal and they carry as many flows of
each class. Refinement splits classes until none splits further (Weisfeiler and Leman; an equitable partition). Within
such classes max-min rates are equal, since the filling never sees a difference, so one flow and one link of each class
stand for all.

Signatures are 64-bit sums of mixed values: two classes are taken for one by chance about once in 10^6 runs with a
million signatures. Left out: symmetries that refinement does not see, which only cost time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cofire.network.max_min import Uses
from cofire.network.topology import Ints

Words = NDArray[np.uint64]
Values = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Classes:
    """A partition of things that fare alike.

    Attributes:
        of: ``[num_things]``, the class of each.
        first: ``[num_classes]``, one thing of each class.
        size: ``[num_classes]``.
    """

    of: Ints
    first: Ints
    size: Ints


def refine(
    stages: list[Uses],
    flow_values: list[Values],
    link_values: list[Values],
    waits: tuple[Ints, Ints, NDArray[np.bool_]],
) -> tuple[Classes, Classes]:
    """Return the coarsest classes of flows and of links that never fare differently.

    Args:
        stages: Which flow crosses which link by which fraction, at first and after each change of routes.
        flow_values: Arrays ``[num_flows]`` of 64-bit values that flows of a class have in common.
        link_values: The same for links.
        waits: Each ``[num_waits]``: a flow that another waits for, the flow that waits, and which kind of wait it is.
    """
    before, after, kind = waits
    wait = _mix(kind.astype(np.uint64) + np.uint64(0x5851F42D4C957F2D))
    flow, link = _signature([*flow_values, _depth(before, after, len(flow_values[0]))]), _signature(link_values)
    user = np.concatenate([uses.flow for uses in stages])
    used = np.concatenate([uses.link for uses in stages])
    # Fractions that differ by rounding alone are one.
    parts = [_words(np.round(uses.load, 12)) + np.uint64(stage) for stage, uses in enumerate(stages)]
    part = _mix(np.concatenate(parts))
    count = -1
    while True:
        # The old signature goes into the new one, so that classes only ever split.
        link = _mix(link + _mix(_gather(used, user, flow, part, len(link))))
        met = _mix(_gather(user, used, link, part, len(flow)))
        waited = np.zeros_like(flow)
        np.add.at(waited, after, _mix(flow[before] ^ wait))
        flow = _mix(flow + met + _mix(waited + np.uint64(1)))
        flows, links = _classes(flow), _classes(link)
        if len(flows.first) + len(links.first) == count:
            return flows, links
        count = len(flows.first) + len(links.first)


def _depth(before: Ints, after: Ints, num: int) -> Ints:
    """Return the longest chain of waits before each flow; -1 in a circle.

    Refinement finds it too, but takes a round over everything for every step of the chain.
    """
    order = np.argsort(before, kind="stable")
    follower, start = after[order], np.searchsorted(before[order], np.arange(num + 1))
    waits = np.bincount(after, minlength=num)
    depth = np.full(num, -1)
    front, level = np.flatnonzero(waits == 0), 0
    while len(front):
        depth[front] = level
        _, rows = spans(start, front)
        reached = follower[rows]
        np.subtract.at(waits, reached, 1)
        front, level = np.unique(reached[waits[reached] == 0]), level + 1
    return depth


def spans(start: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Return the entries of some rows of a sparse matrix in compressed rows: each entry's row, and its number."""
    count = start[rows + 1] - start[rows]
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), np.repeat(start[rows], count) + within


def single(num_things: int) -> Classes:
    """Return the partition into classes of one."""
    order = np.arange(num_things)
    return Classes(order, order, np.ones(num_things, np.int64))


def quotient(uses: Uses, flows: Classes, links: Classes) -> Uses:
    """Return what a class of flows loads on one link of a class, per byte per second of one of its flows."""
    is_first = np.zeros(len(links.of), bool)
    is_first[links.first] = True
    some = uses.of(is_first[uses.link])
    key = flows.of[some.flow] * len(links.first) + links.of[some.link]
    keys, where = np.unique(key, return_inverse=True)
    load = np.bincount(where, some.load, len(keys)).astype(np.float64)
    return Uses(keys // len(links.first), keys % len(links.first), load)


def _gather(to: Ints, by: Ints, signature: Words, part: Words, num: int) -> Words:
    """Return for each thing the sum over its entries of the other side's mixed signature and fraction."""
    total = np.zeros(num, np.uint64)
    np.add.at(total, to, _mix(signature[by] ^ part))
    return total


def _signature(values: list[Values]) -> Words:
    signature = np.zeros(len(values[0]), np.uint64)
    for value in values:
        signature = _mix(signature + _mix(_words(value)))
    return signature


def _words(value: Values) -> Words:
    return np.ascontiguousarray(value + 0).view(np.uint64)  # minus zero becomes zero


def _mix(word: Words) -> Words:
    """Scramble 64-bit words: two multiplications with odd constants, each after a shift."""
    word = (word ^ (word >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
    return word ^ (word >> np.uint64(32))


def _classes(signature: Words) -> Classes:
    _, first, of, size = np.unique(signature, return_index=True, return_inverse=True, return_counts=True)
    return Classes(of.astype(np.int64), first.astype(np.int64), size.astype(np.int64))
