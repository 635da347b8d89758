"""Collectives as data: which rank sends which chunk to whom, and what each message waits for.

Ring, double binary tree (Fire-Flyer, arXiv 2408.14158, IV-A), hierarchical, and all-to-all, direct or forwarded inside
the node so that data enters the network on the plane of its target (DeepSeek-V3 on several planes, arXiv 2505.09343,
5.1). The lists are pure: the planner sends them through a network in time, and a runtime may execute them.

What a rank holds is ``num_chunks`` numbered chunks of equal size. A message covers ``count`` chunks from ``chunk`` on,
``stride`` apart, and replaces the target's chunks or is added to them. For all-to-all the chunks are blocks: number
``source * num_ranks + target``. Left out: buffers; a rank has room for what arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError
from cofire.network.double_tree import ROOT, double_tree
from cofire.network.flowsim import Flows
from cofire.network.topology import Ints

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Messages:
    """A collective over ranks; all arrays of messages are ``[num_messages]``, of waits ``[num_waits]``.

    Attributes:
        num_ranks: Who takes part.
        num_chunks: That the data of a rank is cut into.
        chunk_bytes: Size of one.
        source: Rank that sends.
        target: Rank that receives.
        chunk: First chunk of a message.
        count: Chunks of a message.
        stride: From one chunk of a message to its next.
        adds: True where the target adds what it receives.
        before: A message that must have arrived at the source of ...
        after: ... this one, before it starts.
        queued: True where ``before`` is an earlier message of the same sender, which only has to have left.
    """

    num_ranks: int
    num_chunks: int
    chunk_bytes: float
    source: Ints
    target: Ints
    chunk: Ints
    count: Ints
    stride: Ints
    adds: Bools
    before: Ints
    after: Ints
    queued: Bools

    @property
    def num_messages(self) -> int:
        """Rows."""
        return len(self.source)

    def flows(self) -> Flows:
        """Return the messages as flows, in the same order."""
        return Flows(
            self.count.astype(np.float64) * self.chunk_bytes, before=self.before, after=self.after, queued=self.queued
        )


@dataclass
class _Draft:
    """Messages in the making: blocks of arrays, and the number of the next message."""

    columns: list[tuple[Ints, ...]] = field(default_factory=list)
    waits: list[tuple[Ints, Ints, bool]] = field(default_factory=list)
    size: int = 0

    def send(
        self, source: Ints, target: Ints, chunk: Ints, count: int = 1, stride: int = 1, adds: bool = False
    ) -> Ints:
        """Add messages between ranks; return their numbers, in the same shape."""
        rows = np.broadcast_arrays(source, target, chunk, count, stride, int(adds))
        number = self.size + np.arange(rows[0].size).reshape(rows[0].shape)
        self.columns.append(tuple(row.ravel().astype(np.int64) for row in rows))
        self.size += rows[0].size
        return number

    def wait(self, before: Ints, after: Ints, queued: bool = False) -> None:
        """Let messages wait for others, pair by pair."""
        pair = np.broadcast_arrays(before, after)
        self.waits.append((pair[0].ravel(), pair[1].ravel(), queued))

    def finish(self, num_ranks: int, num_chunks: int, size_bytes: float) -> Messages:
        """Return the messages; ``size_bytes`` is the size of all chunks."""
        none = np.zeros(0, np.int64)
        columns = [np.concatenate([none, *column]) for column in zip(*self.columns, strict=True)] or [none] * 6
        source, target, chunk, count, stride, adds = columns
        before, after = (np.concatenate([none, *(wait[i] for wait in self.waits)]) for i in (0, 1))
        queued = np.concatenate([np.zeros(0, bool), *(np.full(len(wait[0]), wait[2]) for wait in self.waits)])
        return Messages(
            num_ranks=num_ranks,
            num_chunks=num_chunks,
            chunk_bytes=size_bytes / num_chunks,
            source=source,
            target=target,
            chunk=chunk,
            count=count,
            stride=stride,
            adds=adds > 0,
            before=before,
            after=after,
            queued=queued,
        )


def ring(kind: str, num_ranks: int, size_bytes: float) -> Messages:
    """Return a collective around a ring, rank r sending to r + 1.

    Args:
        kind: ``reduce_scatter`` (rank r ends with the sum of chunk r), ``all_gather`` (it begins with chunk r) or
            ``all_reduce`` (one after the other).
        num_ranks: In the ring; as many chunks.
        size_bytes: Of the whole data: what a rank has before a reduce_scatter or after an all_gather.

    Raises:
        PlanError: The kind is none of these, or there is no rank.
    """
    _check_ranks(num_ranks)
    if kind not in ("reduce_scatter", "all_gather", "all_reduce"):
        raise PlanError(f"{kind!r} does not go around a ring; take reduce_scatter, all_gather or all_reduce")
    draft = _Draft()
    members = np.arange(num_ranks)[None, :]
    _ring(draft, members, np.zeros(1, np.int64), kind)
    return draft.finish(num_ranks, num_ranks, size_bytes)


def _ring(draft: _Draft, members: Ints, first: Ints, kind: str) -> tuple[Ints, Ints]:
    """Add rings over the rows of ``members [num_rings, n]``; ring i's chunks are ``first[i] ..`` in a row of n.

    Returns:
        Numbers of the messages that each member sends first and last, ``[num_rings, n]``.
    """
    size = members.shape[1]
    step, place = np.arange(size - 1)[:, None, None], np.arange(size)[None, None, :]
    parts = [part for part in ("reduce_scatter", "all_gather") if kind in (part, "all_reduce")]
    sent = []
    for part in parts:
        # A chunk's sum ends at the member of its number, and starts from there.
        at = place - step - (part == "reduce_scatter")
        chunk = first[None, :, None] + at % size
        to = np.roll(members, -1, axis=1)[None]
        sent.append(draft.send(members[None], to, chunk, adds=part == "reduce_scatter"))
    number = np.concatenate(sent)
    # A step sends what the step before brought, after what its sender sent in that step.
    draft.wait(np.roll(number[:-1], 1, axis=2), number[1:])
    draft.wait(number[:-1], number[1:], queued=True)
    if not len(number):
        none = np.zeros((0,), np.int64)
        return none, none
    return number[0], number[-1]


def double_tree_all_reduce(
    num_ranks: int, size_bytes: float, pieces: int = 8, trees: tuple[Ints, Ints] | None = None
) -> Messages:
    """Return an all-reduce over two trees: sums go up and come down again, piece after piece.

    Args:
        num_ranks: Who takes part.
        size_bytes: Of the data of each rank.
        pieces: That each tree's half is cut into; a rank passes one on while the next arrives.
        trees: Parents of each rank in both trees, such as ``zoned_double_tree``'s; none: the plain double tree.

    Raises:
        PlanError: There is no rank or no piece, or the trees are of another size.
    """
    _check_ranks(num_ranks)
    if pieces < 1:
        raise PlanError(f"pieces = {pieces}: data needs at least 1 piece")
    both = trees or double_tree(num_ranks)
    draft = _Draft()
    for number, parent in enumerate(both):
        if len(parent) != num_ranks:
            raise PlanError(f"the tree has {len(parent)} ranks; num_ranks = {num_ranks} needs as many")
        child = np.flatnonzero(parent != ROOT)
        above = parent[child]
        piece = number * pieces + np.arange(pieces)[:, None]
        up = draft.send(child[None], above[None], piece, adds=True)
        down = draft.send(above[None], child[None], piece)
        place = np.full(num_ranks, -1)
        place[child] = np.arange(len(child))
        below_root = parent[above] == ROOT
        if len(child):
            # Up: a rank's sum is complete when its children's have come. Down: when its own has come from above,
            # or, at the root, when the children's have come up.
            inner = np.flatnonzero(~below_root)
            draft.wait(up[:, inner], up[:, place[above[inner]]])
            draft.wait(down[:, place[above[inner]]], down[:, inner])
            top = np.flatnonzero(below_root)
            draft.wait(up[:, top][:, :, None], down[:, top][:, None, :])
        for way in (up, down):
            draft.wait(way[:-1], way[1:], queued=True)
    return draft.finish(num_ranks, 2 * pieces, size_bytes)


def hierarchical_all_reduce(num_nodes: int, devices_per_node: int, size_bytes: float) -> Messages:
    """Return an all-reduce in three stages: reduce_scatter in each node, a ring per device number, all_gather.

    Ranks are numbered node by node. Device d of each node sums part d of the data, on its own rail.

    Raises:
        PlanError: There is no node or no device.
    """
    _check_ranks(num_nodes)
    _check_ranks(devices_per_node)
    draft = _Draft()
    rank = np.arange(num_nodes * devices_per_node).reshape(num_nodes, devices_per_node)
    mine, other = (device[device_pairs] for device, device_pairs in _pairs(devices_per_node))
    # Stage 1: every device hands each other one that one's part: num_nodes chunks.
    source, target, part = rank[:, mine], rank[:, other], other * num_nodes
    scatter = draft.send(source, target, part[None], count=num_nodes, adds=True)
    # Stage 2.
    begin, end = _ring(draft, rank.T, np.arange(devices_per_node) * num_nodes, "all_reduce")
    # Stage 3.
    gather = draft.send(source, target, (mine * num_nodes)[None], count=num_nodes)
    if num_nodes > 1:
        draft.wait(scatter, begin.T[:, other])
        draft.wait(end.T[:, mine], gather, queued=True)
        draft.wait(np.roll(end.T, 1, axis=0)[:, mine], gather)
    else:
        into = other[:, None] == mine[None, :]
        before, after = np.nonzero(into)
        draft.wait(scatter[:, before], gather[:, after])
    return draft.finish(rank.size, rank.size, size_bytes)


def port_rings(kind: str, num_nodes: int, devices_per_node: int, size_bytes: float) -> Messages:
    """Return a collective around as many rings as a node has devices, each with its part of the data.

    Ranks are numbered node by node. Ring k enters every second node at device k and leaves it at device k - 1, where it
    enters the next node and goes through it backwards: it changes nodes between devices of one number, and each port
    of a node sends and receives one ring. An odd number of nodes closes the ring between two numbers.

    Args:
        kind: As in :func:`ring`; a rank ends a reduce_scatter with one chunk of each ring.
        num_nodes: Nodes.
        devices_per_node: Devices of a node, and rings.
        size_bytes: Of the whole data, as in :func:`ring`.

    Raises:
        PlanError: The kind does not go around a ring, or there is no node or no device.
    """
    _check_ranks(num_nodes)
    _check_ranks(devices_per_node)
    one = ring(kind, num_nodes * devices_per_node, size_bytes / devices_per_node)
    node, place = np.divmod(np.arange(one.num_ranks), devices_per_node)
    number = np.arange(devices_per_node)[:, None]
    device = np.where(node % 2 == 0, number + place, number - 1 - place) % devices_per_node
    return _side_by_side(one, node * devices_per_node + device)


def port_trees(num_nodes: int, devices_per_node: int, size_bytes: float, pieces: int = 8) -> Messages:
    """Return an all-reduce over as many double trees as a node has devices, each with its part of the data.

    Ranks are numbered node by node; in tree k the devices of each node are turned by k, so that every tree has its own
    ports at the top.

    Raises:
        PlanError: There is no node, no device or no piece.
    """
    _check_ranks(num_nodes)
    _check_ranks(devices_per_node)
    one = double_tree_all_reduce(num_nodes * devices_per_node, size_bytes / devices_per_node, pieces)
    node, device = np.divmod(np.arange(one.num_ranks), devices_per_node)
    turned = (device + np.arange(devices_per_node)[:, None]) % devices_per_node
    return _side_by_side(one, node * devices_per_node + turned)


def _side_by_side(one: Messages, rank: Ints) -> Messages:
    """Return copies of a collective, the ranks of copy k being ``rank[k]``, each over chunks of its own."""
    copies = len(rank)
    nth = np.arange(copies)[:, None]
    later = nth * one.num_messages
    return Messages(
        num_ranks=one.num_ranks,
        num_chunks=copies * one.num_chunks,
        chunk_bytes=one.chunk_bytes,
        source=rank[:, one.source].ravel(),
        target=rank[:, one.target].ravel(),
        chunk=(one.chunk + nth * one.num_chunks).ravel(),
        count=np.tile(one.count, copies),
        stride=np.tile(one.stride, copies),
        adds=np.tile(one.adds, copies),
        before=(one.before + later).ravel(),
        after=(one.after + later).ravel(),
        queued=np.tile(one.queued, copies),
    )


def rooted_tree(kind: str, num_ranks: int, root: int, size_bytes: float, pieces: int = 1) -> Messages:
    """Return a reduce to a rank, or a broadcast from it, over one tree: the plain double tree's first, renumbered.

    Args:
        kind: ``reduce`` or ``broadcast``.
        num_ranks: Who takes part.
        root: Who ends with the sum, or begins with the data.
        size_bytes: Of the data of each rank.
        pieces: That the data is cut into; a rank passes one on while the next arrives.

    Raises:
        PlanError: The kind is none of these, or there is no such rank or no piece.
    """
    _check_ranks(num_ranks)
    if kind not in ("reduce", "broadcast"):
        raise PlanError(f"{kind!r} has no root; take reduce or broadcast")
    if not 0 <= root < num_ranks:
        raise PlanError(f"root = {root} is not below num_ranks = {num_ranks}")
    if pieces < 1:
        raise PlanError(f"pieces = {pieces}: data needs at least 1 piece")
    draft = _Draft()
    parent = double_tree(num_ranks)[0]
    child = np.flatnonzero(parent != ROOT)
    low, high = (child + root) % num_ranks, (parent[child] + root) % num_ranks
    source, target = (low, high) if kind == "reduce" else (high, low)
    sent = draft.send(source[None], target[None], np.arange(pieces)[:, None], adds=kind == "reduce")
    inner = np.flatnonzero(parent[parent[child]] != ROOT)
    # In the tree that is numbered from 0, rank r's message is number r - 1 of a piece.
    over = parent[child][inner] - 1
    first, second = (sent[:, inner], sent[:, over]) if kind == "reduce" else (sent[:, over], sent[:, inner])
    draft.wait(first, second)
    draft.wait(sent[:-1], sent[1:], queued=True)
    return draft.finish(num_ranks, pieces, size_bytes)


def paired_host_all_reduce(num_devices: int, size_bytes: float, pieces: int = 8) -> Messages:
    """Return an all-reduce inside a node whose devices are bridged in pairs (Fire-Flyer, IV-A, the NVLink variant).

    A pair first adds over its bridge, each device one half of every piece; each ships its half to the host, which adds
    those of all pairs; the result comes back in halves, and the pair exchanges them over the bridge. Ranks are the
    devices (2k and 2k + 1 are a pair) and, as number ``num_devices``, the host. A node's network stage, between the
    host's sum and the result, is left out. Chunk ``2 p + h`` is half h of piece p.

    Args:
        num_devices: Of the node, an even number.
        size_bytes: Of the data of each device.
        pieces: That it is cut into.

    Raises:
        PlanError: The devices do not pair, or there is no piece.
    """
    if num_devices < 2 or num_devices % 2:
        raise PlanError(f"{num_devices} devices do not pair; take an even number, 2 or more")
    if pieces < 1:
        raise PlanError(f"pieces = {pieces}: data needs at least 1 piece")
    draft = _Draft()
    device = np.arange(num_devices)[None, :]
    other, half, piece = device ^ 1, device % 2, np.arange(pieces)[:, None]
    mine, theirs = 2 * piece + half, 2 * piece + 1 - half
    given = draft.send(device, other, theirs, adds=True)
    shipped = draft.send(device, np.full_like(device, num_devices), mine, adds=True)
    back = draft.send(np.full_like(device, num_devices), device, mine)
    gathered = draft.send(device, other, mine)
    draft.wait(given[:, other[0]], shipped)
    for first in (0, 1):
        half_of_all = slice(first, num_devices, 2)
        draft.wait(shipped[:, half_of_all, None], back[:, None, half_of_all])
    draft.wait(back, gathered)
    for way in (given, shipped, back, gathered):
        draft.wait(way[:-1], way[1:], queued=True)
    return draft.finish(num_devices + 1, 2 * pieces, size_bytes)


def all_to_all(num_ranks: int, pair_bytes: float) -> Messages:
    """Return every rank's block to every other, all at once.

    Raises:
        PlanError: There is no rank.
    """
    _check_ranks(num_ranks)
    draft = _Draft()
    source, target = (rank[pairs] for rank, pairs in _pairs(num_ranks))
    draft.send(source, target, source * num_ranks + target)
    return draft.finish(num_ranks, num_ranks**2, pair_bytes * num_ranks**2)


def forwarded_all_to_all(num_nodes: int, devices_per_node: int, pair_bytes: float) -> Messages:
    """Return an all-to-all that crosses the network only between devices of one number (PXN).

    Device i hands what is for devices d of all nodes to device d of its own node, which sends the whole node's blocks
    on: store and forward, one message per pair of nodes and device number.

    Raises:
        PlanError: There is no node or no device.
    """
    _check_ranks(num_nodes)
    _check_ranks(devices_per_node)
    draft = _Draft()
    total = num_nodes * devices_per_node
    rank = np.arange(total).reshape(num_nodes, devices_per_node)
    mine, other = (device[pairs] for device, pairs in _pairs(devices_per_node))
    inside = draft.send(
        rank[:, mine], rank[:, other], rank[:, mine] * total + other, count=num_nodes, stride=devices_per_node
    )
    near, far = (node[pairs] for node, pairs in _pairs(num_nodes))
    first = near[:, None] * devices_per_node * total + rank[far]
    across = draft.send(rank[near], rank[far], first, count=devices_per_node, stride=total)
    for device in range(devices_per_node):
        handed = inside[near][:, other == device]
        draft.wait(handed, across[:, device, None])
    return draft.finish(total, total**2, pair_bytes * total**2)


def _pairs(num: int) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
    """Return all pairs of two different numbers below ``num``, as arrays and an index that leaves equal ones out."""
    first, second = np.divmod(np.arange(num * num), num)
    keep = np.flatnonzero(first != second)
    return (first, keep), (second, keep)


def _check_ranks(num: int) -> None:
    if num < 1:
        raise PlanError(f"{num} ranks: a collective needs at least 1")
