"""Double binary trees: two trees over the same ranks, so that whoever adds in one only sends in the other.

Each tree carries half the data, up to the root and down again, so that no rank sends or receives more than twice the
data (Fire-Flyer, arXiv 2408.14158, IV-A; the idea is Sanders, Speck and Traeff's, 2009). The plain trees follow the
bits of a rank: odd ranks are leaves. The zone-aware trees (our addition) hang one zone's root under the other's, so
that one edge of each tree crosses between the zones, which the plain trees do not promise. Left out: more than two
zones.
"""

from __future__ import annotations

import numpy as np

from cofire.errors import PlanError
from cofire.network.topology import Ints

ROOT = -1


def double_tree(num_ranks: int) -> tuple[Ints, Ints]:
    """Return the parent of each rank in both trees; ``ROOT`` for the root.

    The second tree is the first one mirrored where ``num_ranks`` is even, and turned by one rank where it is odd.

    Raises:
        PlanError: There is no rank.
    """
    if num_ranks < 1:
        raise PlanError(f"num_ranks = {num_ranks}: a tree needs at least 1 rank")
    first = _bit_tree(num_ranks)
    ranks = np.arange(num_ranks)
    # where[r]: the rank of the second tree that takes the place of rank r of the first.
    where = num_ranks - 1 - ranks if num_ranks % 2 == 0 else (ranks + 1) % num_ranks
    second = np.empty_like(first)
    second[where] = np.where(first == ROOT, ROOT, where[first])
    return first, second


def zoned_double_tree(num_ranks_near: int, num_ranks_far: int) -> tuple[Ints, Ints]:
    """Return the parents in both trees over two zones: the near zone's ranks first, then the far zone's.

    Raises:
        PlanError: A zone is empty.
    """
    trees = []
    for near, far in zip(double_tree(num_ranks_near), double_tree(num_ranks_far), strict=True):
        top = int(np.flatnonzero(near == ROOT)[0])
        trees.append(np.concatenate([near, np.where(far == ROOT, top, far + num_ranks_near)]))
    return trees[0], trees[1]


def depths(parent: Ints) -> Ints:
    """Return how many edges each rank of a tree is below its root."""
    depth = (parent != ROOT).astype(np.int64)
    above = parent.copy()
    while (above != ROOT).any():
        inner = above != ROOT
        # Pointer jumping: each round doubles how far up a rank has looked.
        depth[inner] += depth[above[inner]]
        above[inner] = above[above[inner]]
    return depth


def _bit_tree(num_ranks: int) -> Ints:
    """Return the tree where a rank's parent has the rank's lowest bit moved up by one, or cleared if that is too far.

    Rank 0 is the root; its only child is the largest power of two.
    """
    rank = np.arange(num_ranks)
    low = rank & -rank
    cleared = rank ^ low
    moved = cleared | (low << 1)
    parent = np.where(moved < num_ranks, moved, cleared)
    parent[0] = ROOT
    return parent
