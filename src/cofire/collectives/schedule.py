"""What each node of a collective receives, adds and sends, chunk by chunk, made from a list of messages.

Fire-Flyer (arXiv 2408.14158, IV-A): sums of all nodes go up a tree while finished sums of earlier chunks come down.
The messages are those of ``cofire.network.collectives`` (docs/adr/0007), so that the planner's simulator and the
runtime do the same. A list covers one *round*: one chunk per tree of a double tree, one per node of a ring. Chunk c of
a collective goes the way of chunk ``c % period`` of the round, so that all trees are busy from the start.

Pure: no threads, sockets, clock or PyTorch. Left out: lists whose messages hold several chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from cofire.errors import CollectiveError
from cofire.network.collectives import Messages, double_tree_all_reduce, ring, rooted_tree
from cofire.network.double_tree import depths, double_tree, zoned_double_tree
from cofire.network.topology import Ints

Algorithm = Literal["double_tree", "ring"]

_NOBODY = -1


@dataclass(frozen=True)
class ReduceStep:
    """A chunk of a round on its way up.

    Attributes:
        chunk: Below the period.
        receive_from: Nodes whose sums are added to this node's own, in this order.
        send_to: Who gets the sum; none: it is complete here, over all nodes.
        result_to: Where it is complete: who gets the result.
    """

    chunk: int
    receive_from: tuple[int, ...]
    send_to: int | None
    result_to: tuple[int, ...]


@dataclass(frozen=True)
class BroadcastStep:
    """A chunk of a round on its way down, at a node that receives it.

    Attributes:
        chunk: Below the period.
        receive_from: Who sends the result.
        send_to: Who gets it next.
    """

    chunk: int
    receive_from: int
    send_to: tuple[int, ...]


@dataclass(frozen=True)
class NodeProgram:
    """What one node does in both passes; see the module.

    The steps of a round stand in an order in which a node that does one after the other never waits for one that waits
    for it: deepest first on the way up, highest first on the way down. A node with buffers for ``period`` chunks or
    more can always go on.

    Attributes:
        node: Whose.
        num_nodes: In all.
        period: Chunks of a round.
        adds: Whether anything is added; a broadcast adds nothing.
        shares: Whether results are sent on; those of a reduce to a root are not.
        reduce: Steps of a round on the way up.
        broadcast: Steps of a round on the way down.
    """

    node: int
    num_nodes: int
    period: int
    adds: bool
    shares: bool
    reduce: tuple[ReduceStep, ...]
    broadcast: tuple[BroadcastStep, ...]

    @property
    def peers(self) -> tuple[int, ...]:
        """Nodes that this one exchanges messages with, in ascending order."""
        met: set[int] = set()
        for step in self.reduce:
            met.update(step.receive_from, step.result_to, () if step.send_to is None else (step.send_to,))
        for step in self.broadcast:
            met.update(step.send_to, (step.receive_from,))
        return tuple(sorted(met))

    def reduce_steps(self, num_chunks: int, rounds_ahead: int = 0) -> Iterator[tuple[int, ReduceStep]]:
        """Yield each chunk of a collective with its step on the way up, in the order of doing.

        Args:
            num_chunks: Of the collective.
            rounds_ahead: By which steps that receive nothing come before the others, so that these find on arrival
                what they add. A node then needs buffers for as many rounds more.
        """
        free = tuple(step for step in self.reduce if not step.receive_from)
        bound = tuple(step for step in self.reduce if step.receive_from)
        return _in_rounds(num_chunks, self.period, free, bound, rounds_ahead if free and bound else 0)

    def broadcast_steps(self, num_chunks: int, rounds_behind: int = 0) -> Iterator[tuple[int, BroadcastStep]]:
        """Yield each chunk of a collective with its step on the way down, in the order of doing.

        Args:
            num_chunks: Of the collective.
            rounds_behind: By which steps that send nothing come after the others, so that nobody waits for a result
                because this node waits for another. A node then needs buffers for as many rounds more.
        """
        inner = tuple(step for step in self.broadcast if step.send_to)
        last = tuple(step for step in self.broadcast if not step.send_to)
        return _in_rounds(num_chunks, self.period, inner, last, rounds_behind if inner and last else 0)


_Step = TypeVar("_Step", ReduceStep, BroadcastStep)


def _in_rounds(
    num_chunks: int, period: int, early: tuple[_Step, ...], late: tuple[_Step, ...], rounds_between: int
) -> Iterator[tuple[int, _Step]]:
    """Yield chunks and steps round by round, ``early`` ones some rounds before ``late`` ones."""
    for nth in range(-rounds_between, -(-num_chunks // period)):
        for start, steps in ((nth + rounds_between, early), (nth, late)):
            for step in steps:
                chunk = start * period + step.chunk
                if 0 <= chunk < num_chunks:
                    yield chunk, step


def node_program(round_messages: Messages, node: int) -> NodeProgram:
    """Return what a node does.

    Args:
        round_messages: Of one round, each of one chunk; those that add go up, the others down.
        node: Below ``round_messages.num_ranks``.

    Raises:
        CollectiveError: A message holds several chunks, or a chunk does not go over one tree.
    """
    up, down = _ways(round_messages)
    adds, shares = bool((up != _NOBODY).any()), bool((down != _NOBODY).any())
    above, below = _depths(up), _depths(down)
    reduce, broadcast = [], []
    for chunk in range(round_messages.num_chunks):
        to, source = int(up[node, chunk]), int(down[node, chunk])
        listeners = tuple(np.flatnonzero(down[:, chunk] == node).tolist())
        if to != _NOBODY or source == _NOBODY:
            children = tuple(np.flatnonzero(up[:, chunk] == node).tolist())
            complete = to == _NOBODY
            step = ReduceStep(chunk, children, None if complete else to, listeners if complete else ())
            reduce.append((-int(above[node, chunk]), chunk, step))
        if source != _NOBODY:
            broadcast.append((int(below[node, chunk]), chunk, BroadcastStep(chunk, source, listeners)))
    return NodeProgram(
        node=node,
        num_nodes=round_messages.num_ranks,
        period=round_messages.num_chunks,
        adds=adds,
        shares=shares,
        reduce=tuple(step for _, _, step in sorted(reduce, key=lambda entry: entry[:2])),
        broadcast=tuple(step for _, _, step in sorted(broadcast, key=lambda entry: entry[:2])),
    )


def _ways(messages: Messages) -> tuple[Ints, Ints]:
    """Return to whom each node sends its sum of a chunk, and from whom it has the result, ``[num_nodes, period]``."""
    if (messages.count != 1).any():
        raise CollectiveError(
            f"a message holds {messages.count.max()} chunks; a program is made of messages of 1 chunk"
        )
    shape = messages.num_ranks, messages.num_chunks
    ways = np.full((2, *shape), _NOBODY)
    times = np.zeros((2, *shape), np.int64)
    for way, who, whom, rows in (
        (0, messages.source, messages.target, messages.adds),
        (1, messages.target, messages.source, ~messages.adds),
    ):
        ways[way, who[rows], messages.chunk[rows]] = whom[rows]
        np.add.at(times[way], (who[rows], messages.chunk[rows]), 1)
    if times.max(initial=0) > 1:
        raise CollectiveError("a node sends its sum of a chunk, or receives its result, twice; a tree has one way")
    return ways[0], ways[1]


def _depths(parent: Ints) -> Ints:
    """Return how many edges each node is below the root of each chunk's tree, ``[num_nodes, period]``."""
    return np.stack([depths(tree) for tree in parent.T], axis=1)


def all_reduce_round(
    algorithm: Algorithm, num_nodes: int, size_bytes: float = 1.0, num_near: int | None = None
) -> Messages:
    """Return a round of an all-reduce.

    Args:
        algorithm: "double_tree" (two chunks) or "ring" (as many as nodes).
        num_nodes: 1 or more.
        size_bytes: Of the round.
        num_near: Nodes of the first zone, where there are two; the rest is the other zone. For trees.
    """
    if algorithm == "ring":
        return ring("all_reduce", num_nodes, size_bytes)
    both = num_near is not None and 0 < num_near < num_nodes
    trees = zoned_double_tree(num_near, num_nodes - num_near) if both and num_near is not None else None
    return double_tree_all_reduce(num_nodes, size_bytes, 1, trees)


def all_reduce_program(
    algorithm: Algorithm, num_nodes: int, node: int, zones: tuple[str | None, ...] = ()
) -> NodeProgram:
    """Return a node's program of an all-reduce.

    Args:
        algorithm: "double_tree" or "ring".
        num_nodes: 1 or more.
        node: Whose.
        zones: Network zone of each node. With two of them the sums cross once per tree, or once each way in a ring.
    """
    order, num_near = _by_zone(num_nodes, zones)
    messages = all_reduce_round(algorithm, num_nodes, num_near=num_near)
    return node_program(_renamed(messages, order), node)


def _by_zone(num_nodes: int, zones: tuple[str | None, ...]) -> tuple[Ints, int | None]:
    """Return the nodes zone by zone, and how many the first zone has if there are two."""
    if len(zones) not in (0, num_nodes):
        raise CollectiveError(f"{len(zones)} zones of {num_nodes} nodes; name one zone per node, or none")
    names = list(dict.fromkeys(zones))
    if len(names) < 2:
        return np.arange(num_nodes), None
    place = np.array([names.index(zone) for zone in zones])
    order = np.argsort(place, kind="stable")
    return order, int((place == 0).sum()) if len(names) == 2 else None


def _renamed(messages: Messages, order: Ints) -> Messages:
    """Return the same messages with ``order[rank]`` in the place of each rank."""
    return replace(messages, source=order[messages.source], target=order[messages.target])


def rooted_program(kind: Literal["reduce", "broadcast"], num_nodes: int, node: int, root: int) -> NodeProgram:
    """Return a node's program of a reduce to ``root``, or of a broadcast from it, over one tree."""
    return node_program(rooted_tree(kind, num_nodes, root, 1.0), node)


def busiest_node_bytes(messages: Messages) -> float:
    """Return the most that any node sends or receives in a list of messages, bytes one way: the bound of its wire."""
    sizes = messages.count * messages.chunk_bytes
    ends = (messages.source, messages.target)
    return float(max(np.bincount(end, sizes, messages.num_ranks).max(initial=0.0) for end in ends))


def modelled_time_s(
    algorithm: Algorithm,
    num_nodes: int,
    size_bytes: float,
    bandwidth_bytes_per_s: float,
    latency_s: float,
    chunk_bytes: float = 0.0,
) -> float:
    """Return how long an all-reduce takes: the busiest wire, then the latencies one after the other.

    A double tree moves each byte at most twice over a wire (once for two nodes) and waits for its depth twice; a ring
    moves ``2 (n - 1) / n`` and waits ``2 (n - 1)`` times.

    Args:
        algorithm: "double_tree" or "ring".
        num_nodes: 1 or more.
        size_bytes: Of the data of a node.
        bandwidth_bytes_per_s: Of a node, one way.
        latency_s: Of a message without content, with the work at both ends.
        chunk_bytes: What a node receives of a tree before it sends on; a ring's part of a round is not larger.
    """
    if num_nodes == 1:
        return 0.0
    if algorithm == "ring":
        hops, factor = 2 * (num_nodes - 1), 2 * (num_nodes - 1) / num_nodes
        filling_bytes = 0.0
    else:
        trees = double_tree(num_nodes)
        hops = 2 * max(int(depths(tree).max()) for tree in trees)
        factor = busiest_node_bytes(all_reduce_round("double_tree", num_nodes))
        filling_bytes = (hops - 1) * min(chunk_bytes, size_bytes)
    return (factor * size_bytes + filling_bytes) / bandwidth_bytes_per_s + hops * latency_s


def choose_algorithm(
    num_nodes: int, size_bytes: float, bandwidth_bytes_per_s: float, latency_s: float, chunk_bytes: float = 0.0
) -> Algorithm:
    """Return the faster way to all-reduce by :func:`modelled_time_s`; the double tree where they are as fast."""
    if not (bandwidth_bytes_per_s > 0 and latency_s >= 0 and math.isfinite(latency_s)):
        raise CollectiveError(
            f"bandwidth {bandwidth_bytes_per_s} B/s, latency {latency_s} s: "
            f"the first must be above 0, the second 0 or more"
        )
    args = (num_nodes, size_bytes, bandwidth_bytes_per_s, latency_s, chunk_bytes)
    return "ring" if modelled_time_s("ring", *args) < modelled_time_s("double_tree", *args) else "double_tree"
