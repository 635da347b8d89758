"""Double binary trees: every property of the plain and of the zone-aware ones, against counting on the tree itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cofire.errors import PlanError
from cofire.network.double_tree import ROOT, depths, double_tree, zoned_double_tree


def children(parent: np.ndarray) -> np.ndarray:
    return np.bincount(parent[parent != ROOT], minlength=len(parent))


def slow_depth(parent: np.ndarray, rank: int) -> int:
    steps = 0
    while parent[rank] != ROOT:
        rank, steps = int(parent[rank]), steps + 1
        assert steps <= len(parent), "a circle"
    return steps


def data_sent(trees: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of each rank, up and down both trees, per byte of the message: half per edge."""
    return sum(0.5 * ((tree != ROOT) + children(tree)) for tree in trees)


def test_every_property_of_the_double_tree_holds_up_to_512_ranks():
    for n in range(1, 513):
        trees = double_tree(n)
        inner = np.stack([children(tree) > 0 for tree in trees])
        for tree in trees:
            assert (tree == ROOT).sum() == 1
            assert children(tree).max() <= 2
            assert depths(tree).max() <= math.ceil(math.log2(n)) if n > 1 else depths(tree).max() == 0
        assert (children(trees[0])[1::2] == 0).all()
        if n % 2 == 0:
            assert (inner.sum(0) == 1).all(), n
        elif n > 1:
            assert (inner.sum(0) == 2).sum() == 1, n
            assert (inner.sum(0) == 0).sum() == 0, n
        # A rank receives over the edges that it sends over, in the other direction.
        assert data_sent(trees).max() <= (1 if n <= 2 else 2), n


@pytest.mark.parametrize(("num_ranks", "depth"), [(128, 7), (180, 8), (1280, 11)])
def test_the_depth_of_large_trees_is_the_known_one(num_ranks: int, depth: int):
    assert max(depths(tree).max() for tree in double_tree(num_ranks)) == depth


def test_depths_equal_walking_to_the_root():
    for n in (1, 2, 3, 17, 64, 100, 255):
        for tree in (*double_tree(n), *zoned_double_tree(n, 37)):
            assert depths(tree).tolist() == [slow_depth(tree, rank) for rank in range(len(tree))]


def crossings(trees: tuple[np.ndarray, np.ndarray], near: int) -> list[set[frozenset[int]]]:
    found = []
    for tree in trees:
        rank = np.arange(len(tree))
        over = (tree != ROOT) & ((rank < near) != (tree < near))
        found.append({frozenset((int(a), int(b))) for a, b in zip(rank[over], tree[over], strict=True)})
    return found


def zone_sizes() -> list[tuple[int, int]]:
    """All small sizes, the borders of the large ones, and a seeded thousand between: 1..199 each."""
    pairs = [(a, b) for a in range(1, 25) for b in range(1, 25)]
    pairs += [(a, b) for a in (1, 2, 63, 64, 65, 127, 128, 129, 198, 199) for b in range(1, 200)]
    random = np.random.default_rng(0).integers(1, 200, (1000, 2))
    return sorted({*pairs, *((int(a), int(b)) for a, b in random)})


def test_zone_aware_trees_cross_once_each_and_stay_binary_and_shallow():
    for near, far in zone_sizes():
        trees = zoned_double_tree(near, far)
        crossed = crossings(trees, near)
        assert [len(edges) for edges in crossed] == [1, 1], (near, far)
        assert len(crossed[0] | crossed[1]) in (1, 2)
        limit = max(math.ceil(math.log2(near)), math.ceil(math.log2(far)) + 1)
        for tree in trees:
            assert (tree == ROOT).sum() == 1
            assert children(tree).max() <= 2, (near, far)
            assert depths(tree).max() <= limit, (near, far)
        assert data_sent(trees).max() <= 2, (near, far)


@pytest.mark.parametrize(
    ("num_ranks", "edges"), [(8, 2), (16, 2), (32, 2), (64, 2), (128, 2), (100, 4), (160, 4), (180, 6)]
)
def test_plain_trees_cross_between_two_halves_more_than_once(num_ranks: int, edges: int):
    assert max(len(found) for found in crossings(double_tree(num_ranks), num_ranks // 2)) == edges


def test_a_tree_over_no_rank_is_refused_in_a_line():
    with pytest.raises(PlanError, match="num_ranks = 0: a tree needs at least 1 rank"):
        double_tree(0)
