"""How long a collective takes, by formula: latency per step plus bytes over bandwidth (Hockney's alpha and beta).

The step model asks this thousands of times, so each answer is a few products. The lists of ``collectives``, sent
through a network, are the reference. Bytes and steps: Thakur, Rabenseifner and Gropp, 2005; two trees: Sanders, Speck
and Traeff, 2009. Left out: contention with other traffic and with other groups; a port's bandwidth is the group's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cofire.errors import PlanError

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "point_to_point"]
Algorithm = Literal["ring", "double_tree", "hierarchical", "direct", "forwarded", "auto"]


@dataclass(frozen=True)
class Wire:
    """A path between two ranks: ``latency_s`` one way, and the bandwidth of a rank's port, each way."""

    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class Group:
    """Who takes part: ``num_nodes`` nodes with ``ranks_per_node`` ranks each.

    Attributes:
        num_nodes: That the group is spread over.
        ranks_per_node: Ranks of the group on each node, each with a port of its own.
        scale_up: Inside a node; none: ranks of a node talk over the network.
        network: Between nodes; none: there is one node only.
        pieces: That a tree's half of the data is cut into.
    """

    num_nodes: int
    ranks_per_node: int
    scale_up: Wire | None = None
    network: Wire | None = None
    pieces: int = 8

    @property
    def num_ranks(self) -> int:
        """In the group."""
        return self.num_nodes * self.ranks_per_node

    @property
    def inside(self) -> Wire:
        """The wire inside a node."""
        return self.scale_up or self.across

    @property
    def across(self) -> Wire:
        """The wire between nodes.

        Raises:
            PlanError: The group has none and needs one.
        """
        if self.network is None:
            raise PlanError(
                f"a group of {self.num_nodes} nodes of {self.ranks_per_node} ranks has no wire; give it one"
            )
        return self.network


def collective_time_s(kind: Kind, size_bytes: float, group: Group, algorithm: Algorithm = "auto") -> float:
    """Return how long a collective takes.

    Args:
        kind: What is done.
        size_bytes: Of the whole data of a rank: before a reduce_scatter, after an all_gather, all blocks of an
            all_to_all with its own, the message of a point_to_point.
        group: Who takes part.
        algorithm: ``ring`` (one per port where nodes have several), ``double_tree`` (all_reduce; as many as
            ports), ``hierarchical`` (inside nodes, and a ring across), ``direct`` and ``forwarded`` (all_to_all; PXN,
            where forwarded bytes stream on), or the fastest of those that fit.

    Returns:
        Seconds.

    Raises:
        PlanError: The algorithm does not do this, or a wire is missing.
    """
    if kind == "point_to_point":
        wire = group.across if group.num_nodes > 1 else group.inside
        return wire.latency_s + size_bytes / wire.bandwidth_bytes_per_s
    if group.num_ranks == 1:
        return 0.0
    able = ALGORITHMS[kind]
    if algorithm == "auto":
        return min(_time_s(kind, size_bytes, group, name) for name in able)
    if algorithm not in able:
        raise PlanError(f"{algorithm!r} does not do {kind}; take one of {', '.join(able)}, or auto")
    return _time_s(kind, size_bytes, group, algorithm)


ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {
    "all_reduce": ("ring", "double_tree", "hierarchical"),
    "reduce_scatter": ("ring", "hierarchical"),
    "all_gather": ("ring", "hierarchical"),
    "all_to_all": ("direct", "forwarded"),
}


def _time_s(kind: Kind, size_bytes: float, group: Group, algorithm: Algorithm) -> float:
    passes = 2 if kind == "all_reduce" else 1
    if algorithm == "ring":
        return passes * _ring_s(size_bytes, group.num_ranks, _edge(group))
    if algorithm == "double_tree":
        return _tree_s(size_bytes, group.num_ranks, _edge(group), group.pieces)
    if algorithm == "hierarchical":
        time = 0.0
        if group.ranks_per_node > 1:
            part = (group.ranks_per_node - 1) / group.ranks_per_node
            time += passes * (group.inside.latency_s + part * size_bytes / group.inside.bandwidth_bytes_per_s)
        if group.num_nodes > 1:
            time += passes * _ring_s(size_bytes / group.ranks_per_node, group.num_nodes, group.across)
        return time
    return _all_to_all_s(size_bytes / group.num_ranks, group, forwarded=algorithm == "forwarded")


def _edge(group: Group) -> Wire:
    """Return the wire of a ring or tree that visits node after node, one on each port: the slower of its two kinds."""
    if group.num_nodes == 1:
        return group.inside
    if group.ranks_per_node == 1:
        return group.across
    ports = group.ranks_per_node * group.across.bandwidth_bytes_per_s
    return Wire(max(group.inside.latency_s, group.across.latency_s), min(group.inside.bandwidth_bytes_per_s, ports))


def _ring_s(size_bytes: float, num_ranks: int, wire: Wire) -> float:
    return (num_ranks - 1) * (wire.latency_s + size_bytes / num_ranks / wire.bandwidth_bytes_per_s)


def _tree_s(size_bytes: float, num_ranks: int, wire: Wire, pieces: int) -> float:
    """Return the time of the double tree: latency of every edge, bytes of the busiest port, and the first piece's way.

    The last part is read off simulated trees of 2 to 128 ranks, and the whole is within 15 % of them: on an inner
    edge, up or down, a piece shares its port with one other; near leaves and root it does not wait.
    """
    bytes_s = size_bytes / wire.bandwidth_bytes_per_s
    if num_ranks == 2:
        # One half comes down while the other still goes up, unless the latency is longer than that.
        return wire.latency_s + max(bytes_s, wire.latency_s + bytes_s / 2 * (1 + 1 / pieces))
    depth = math.ceil(math.log2(num_ranks))
    busiest = 1.5 if num_ranks == 3 else 2.0
    return 2 * depth * wire.latency_s + bytes_s * (busiest + max(2 * (depth - 2), 1) / pieces)


def _all_to_all_s(pair_bytes: float, group: Group, forwarded: bool) -> float:
    nodes, ranks = group.num_nodes, group.ranks_per_node
    crossing_s = 0.0 if nodes == 1 else (nodes - 1) * ranks * pair_bytes / group.across.bandwidth_bytes_per_s
    # Forwarded data uses the fast links of the node it comes from, beside what stays there.
    handed = (ranks - 1) * (nodes if forwarded else 1) * pair_bytes
    inside_s = handed / group.inside.bandwidth_bytes_per_s if ranks > 1 else 0.0
    latency = group.inside.latency_s if ranks > 1 and (forwarded or nodes == 1) else 0.0
    latency += group.across.latency_s if nodes > 1 else 0.0
    return latency + max(crossing_s, inside_s)
