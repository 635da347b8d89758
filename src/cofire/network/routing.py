"""Which links a flow uses: ECMP, static and adaptive routing, and plane-affine forwarding inside a node.

All three keep to shortest paths, and leave a group of a dragonfly once at most. ``ecmp`` hashes each flow at each
switch to one way on, so that flows collide. ``static`` chooses by the destination (D-mod-k), so that no shift
permutation collides on a full fat tree. ``adaptive`` spreads a flow evenly over all its shortest paths (arXiv
2505.09343, section 5.2.2 and figure 8). A device that sends to a port of another plane first forwards inside its node
(the same paper, section 5.1; PXN in NCCL).

Left out: paths that are not shortest (Valiant routing on a dragonfly), deadlocks, and reaction to load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cofire.errors import PlanError
from cofire.network.topology import Floats, Ints, Network
from cofire.spec.hardware import Routing

# A link from one group (zone) to another counts as three, so that of a dragonfly's paths the shortest is always
# local, global, local, and never through a third group.
_BETWEEN_PLANES = 3

# Entries of the table of (destination switch, cable) that is held at once.
_TABLE_ENTRIES = 20_000_000


@dataclass(frozen=True, eq=False)
class Routes:
    """The links of each flow, as a sparse matrix of flows by links in compressed rows.

    A flow that is split over several paths has a fraction below one on the links that not all of it takes. A flow from
    an endpoint to itself has no links.

    Attributes:
        start: ``[num_flows + 1]``; flow f has entries ``start[f] .. start[f + 1] - 1``.
        link: ``[num_entries]``, the directed link of each entry.
        fraction: ``[num_entries]``, the part of the flow that takes it.
        latency_s: ``[num_flows]``, of the flow's longest path.
    """

    start: Ints
    link: Ints
    fraction: Floats
    latency_s: Floats

    @property
    def num_flows(self) -> int:
        """Rows."""
        return len(self.latency_s)


def link_loads(network: Network, routes: Routes, size_bytes: ArrayLike = 1.0) -> Floats:
    """Return what every link carries.

    Args:
        network: That the routes run through.
        routes: Of ``num_flows`` flows.
        size_bytes: ``[num_flows]``, or one size for all.

    Returns:
        ``[num_links]``, in the unit of the sizes.
    """
    sizes = np.broadcast_to(np.asarray(size_bytes, np.float64), (routes.num_flows,))
    weights = routes.fraction * np.repeat(sizes, np.diff(routes.start))
    return np.bincount(routes.link, weights, network.num_links).astype(np.float64)


def route(
    network: Network,
    sources: ArrayLike,
    destinations: ArrayLike,
    routing: Routing = "ecmp",
    seed: int = 0,
    failed_links: Iterable[int] = (),
    failed_switches: Iterable[int] = (),
    failed_planes: Iterable[int] = (),
) -> Routes:
    """Return the links of flows between endpoints.

    Args:
        network: Graph.
        sources: ``[num_flows]`` endpoints.
        destinations: ``[num_flows]`` endpoints.
        routing: ``ecmp``, ``static`` or ``adaptive``.
        seed: Of the hash of ``ecmp``; flow f of equal seed, source and destination takes the same path.
        failed_links: Links that are down, both ways.
        failed_switches: Vertices that are down.
        failed_planes: Planes whose switches are all down.

    Raises:
        PlanError: An endpoint does not exist, or no path is left for a flow.
    """
    source, destination = _endpoints(network, sources), _endpoints(network, destinations)
    if len(source) != len(destination):
        raise PlanError(f"{len(source)} sources and {len(destination)} destinations; give one of each per flow")
    fabric = _Fabric(network, failed_links, failed_switches, failed_planes)
    return _route(fabric, source, destination, routing, seed)


def device_routes(
    network: Network,
    sources: tuple[ArrayLike, ArrayLike],
    destinations: tuple[ArrayLike, ArrayLike],
    routing: Routing = "ecmp",
    seed: int = 0,
    failed_links: Iterable[int] = (),
    failed_switches: Iterable[int] = (),
    failed_planes: Iterable[int] = (),
) -> Routes:
    """Return the links of flows between devices, with forwarding inside nodes.

    Inside a node a flow takes the fast links. To a port on another plane it is forwarded by the device of its own node
    that has a port there. Where that plane is down for either node, the flow takes another plane, and is forwarded at
    both ends as needed: ``adaptive`` spreads it over all planes left, the others choose one.

    Args:
        network: Graph.
        sources: Nodes and devices in their nodes, ``[num_flows]`` each; device i has port ``i % ports``.
        destinations: Likewise.
        routing: As in :func:`route`.
        seed: As in :func:`route`.
        failed_links: As in :func:`route`.
        failed_switches: As in :func:`route`.
        failed_planes: As in :func:`route`.

    Raises:
        PlanError: A node does not exist, or no path is left for a flow.
    """
    fabric = _Fabric(network, failed_links, failed_switches, failed_planes)
    ports = _Ports(network)
    source, destination = np.broadcast_arrays(*(np.atleast_1d(ports.at(*ends)) for ends in (sources, destinations)))
    flow, leave, arrive = _relays(fabric, ports, source, destination, routing)
    part = 1.0 / np.bincount(flow, minlength=len(source))[flow]
    source, destination = source[flow], destination[flow]
    inside = (network.node[source] == network.node[destination]) & (fabric.fast[source] >= 0)
    # What stays inside the node passes no port: leaving and arriving at one and the same.
    leave, arrive = np.where(inside, source, leave), np.where(inside, source, arrive)
    main = _route(fabric, leave, arrive, routing, seed)
    before, after = source != leave, arrive != destination

    counts = np.diff(main.start)
    start = np.concatenate([[0], np.cumsum(counts + 2 * before + 2 * after)])
    link = np.empty(start[-1], np.int64)
    link[np.repeat(start[:-1] + 2 * before - main.start[:-1], counts) + np.arange(len(main.link))] = main.link
    fraction = np.ones(start[-1])
    fraction[np.repeat(start[:-1] + 2 * before - main.start[:-1], counts) + np.arange(len(main.link))] = main.fraction
    link[start[:-1][before]] = fabric.fast[source[before]]
    link[start[:-1][before] + 1] = fabric.fast[leave[before]] ^ 1
    link[start[1:][after] - 2] = fabric.fast[arrive[after]]
    link[start[1:][after] - 1] = fabric.fast[destination[after]] ^ 1
    hop_s = np.append(network.latency_s, 0.0)[fabric.fast]
    latency = main.latency_s + before * (hop_s[source] + hop_s[leave]) + after * (hop_s[arrive] + hop_s[destination])
    if part.min(initial=1.0) == 1.0:
        return Routes(start, link, fraction, latency)
    first = np.flatnonzero(np.diff(flow, prepend=-1))
    row = np.repeat(flow, np.diff(start))
    fraction *= np.repeat(part, np.diff(start))
    return _merged(network, row, link, fraction, np.maximum.reduceat(latency, first))


class _Ports:
    """Ports by node."""

    def __init__(self, network: Network) -> None:
        self._order = np.argsort(network.node, kind="stable")
        self.count = np.bincount(network.node)
        self._first = np.cumsum(self.count) - self.count
        self._plane = network.plane
        self._on_plane = np.full((len(self.count), network.plane.max() + 1), -1, np.int64)
        back = np.arange(network.num_endpoints)[::-1]
        self._on_plane[network.node[back], network.plane[back]] = back

    def at(self, nodes: ArrayLike, indices: ArrayLike) -> Ints:
        node, index = np.broadcast_arrays(np.asarray(nodes, np.int64), np.asarray(indices, np.int64))
        wrong = (node < 0) | (node >= len(self.count)) | (index < 0)
        if wrong.any():
            raise PlanError(
                f"device {index[wrong][0]} of node {node[wrong][0]} does not exist; nodes are 0 to "
                f"{len(self.count) - 1}, devices count from 0"
            )
        return self._order[self._first[node] + index % self.count[node]]

    def on_plane(self, node: Ints, plane: Ints, index: Ints) -> Ints:
        """Return the node's port of this index if it is on the plane, else the first that is, else -1."""
        wish = self.at(node, index)
        return np.where(self._plane[wish] == plane, wish, self._on_plane[node, plane])

    def index(self, port: Ints, node: Ints) -> Ints:
        place = np.empty_like(self._order)
        place[self._order] = np.arange(len(place))
        return place[port] - self._first[node]


def _relays(
    fabric: _Fabric, ports: _Ports, source: Ints, destination: Ints, routing: Routing
) -> tuple[Ints, Ints, Ints]:
    """Return, per part of a flow, its flow, the port where it leaves its node and the one where it arrives."""
    network = fabric.network
    nodes = network.node[source], network.node[destination]
    plane = network.plane
    flow, leave, arrive = np.arange(len(source)), source.copy(), destination.copy()
    apart = (plane[source] != plane[destination]) & (nodes[0] != nodes[1])
    twin = ports.on_plane(nodes[0], plane[destination], ports.index(destination, nodes[1]))
    first = apart & (twin >= 0) & (fabric.fast[source] >= 0)
    leave[first] = twin[first]
    # A source without a port there (one zone only) may meet the destination's other port.
    twin = ports.on_plane(nodes[1], plane[source], ports.index(source, nodes[0]))
    last = apart & ~first & (twin >= 0) & (fabric.fast[destination] >= 0)
    arrive[last] = twin[last]
    dead = (nodes[0] != nodes[1]) & ~(fabric.port_alive[leave] & fabric.port_alive[arrive])
    if not dead.any():
        return flow, leave, arrive

    choices = np.arange(ports.count.max())
    ours, theirs = nodes[0][dead][:, None], nodes[1][dead][:, None]
    out, into = ports.at(ours, choices), ports.at(theirs, choices)
    usable = fabric.port_alive[out] & fabric.port_alive[into] & (plane[out] == plane[into])
    usable &= (choices < ports.count[ours]) & (choices < ports.count[theirs])
    # Without fast links only the device's own port will do.
    usable &= (fabric.fast[out] >= 0) | (out == source[dead][:, None])
    usable &= (fabric.fast[into] >= 0) | (into == destination[dead][:, None])
    none = ~usable.any(axis=1)
    if none.any():
        raise _unreachable(network, source[dead][none][0], destination[dead][none][0])
    if routing != "adaptive":
        options = usable.sum(axis=1)
        turn = source[dead] + destination[dead] if routing == "static" else _mix(source[dead], destination[dead])
        rank = usable.cumsum(axis=1)
        usable &= rank == (turn % options + 1)[:, None]
    row, choice = np.nonzero(usable)
    again = np.concatenate([flow[~dead], flow[dead][row]])
    order = np.argsort(again, kind="stable")
    left = np.concatenate([leave[~dead], out[row, choice]])
    come = np.concatenate([arrive[~dead], into[row, choice]])
    return again[order], left[order], come[order]


class _Fabric:
    """What is alive of a network: ports, and cables between switches in the order of the switch that they leave.

    Attributes:
        network: The whole.
        port_link: ``[num_endpoints]``, the link from an endpoint to its switch.
        port_alive: ``[num_endpoints]``.
        attach: ``[num_endpoints]``, the switch (a vertex).
        fast: ``[num_endpoints]``, the link to the node's fast links; -1: none.
        lane: ``[num_lanes]``, the link of every cable.
        head: ``[num_lanes]``, switch that it enters, counted without the endpoints.
        tail: ``[num_lanes]``.
        weight: ``[num_lanes]``.
        start: ``[num_switches + 1]``, lanes of a switch.
    """

    def __init__(
        self,
        network: Network,
        failed_links: Iterable[int],
        failed_switches: Iterable[int],
        failed_planes: Iterable[int],
    ) -> None:
        self.network = network
        alive = _alive(network, failed_links, failed_switches, failed_planes)
        tail, head, level = network.tail, network.head, network.level
        endpoints = network.num_endpoints
        self.port_link = _first_link(network, (level[tail] == 0) & (level[head] > 0))
        self.fast = _first_link(network, (level[tail] == 0) & (level[head] < 0) & alive)
        if (self.port_link < 0).any():
            raise PlanError(f"endpoint {np.flatnonzero(self.port_link < 0)[0]} has no switch; give each endpoint one")
        self.attach = head[self.port_link]
        self.port_alive = alive[self.port_link]
        between = np.flatnonzero((level[tail] > 0) & (level[head] > 0) & alive)
        between = between[np.argsort(tail[between], kind="stable")]
        if len(network.cables):
            between = np.repeat(between, network.cables[between])
        self.lane = between
        self.tail, self.head = tail[between] - endpoints, head[between] - endpoints
        plane = network.plane[endpoints:]
        self.weight = np.where(plane[self.tail] == plane[self.head], 1, _BETWEEN_PLANES)
        self.start = np.searchsorted(self.tail, np.arange(network.num_switches + 1))


def _alive(
    network: Network, failed_links: Iterable[int], failed_switches: Iterable[int], failed_planes: Iterable[int]
) -> NDArray[np.bool_]:
    """Return which links are up."""
    links, switches, planes = (np.asarray(list(f), np.int64) for f in (failed_links, failed_switches, failed_planes))
    for what, wrong, limits in (
        ("link", links[(links < 0) | (links >= network.num_links)], (0, network.num_links - 1)),
        (
            "switch",
            switches[(switches < network.num_endpoints) | (switches >= network.num_vertices)],
            (network.num_endpoints, network.num_vertices - 1),
        ),
        ("plane", planes[~np.isin(planes, network.plane)], (0, int(network.plane.max()))),
    ):
        if len(wrong):
            raise PlanError(f"failed {what} {wrong[0]} does not exist; take one of {limits[0]} to {limits[1]}")
    up = np.ones(network.num_links, bool)
    up[links] = up[links ^ 1] = False
    dead = np.zeros(network.num_vertices, bool)
    dead[switches] = True
    dead |= np.isin(network.plane, planes) & (network.level > 0)
    return up & ~dead[network.tail] & ~dead[network.head]


def _first_link(network: Network, wanted: NDArray[np.bool_]) -> Ints:
    """Return, per endpoint, its first wanted link, or -1."""
    link = np.full(network.num_endpoints, -1, np.int64)
    found = np.flatnonzero(wanted)[::-1]
    link[network.tail[found]] = found
    return link


@dataclass(frozen=True, eq=False)
class _Table:
    """The ways on toward some destination switches; rows are those switches, columns all switches.

    Attributes:
        distance: Sum of weights of the shortest path; -1: unreachable.
        begin: First of the ways on in ``way``.
        count: How many.
        way: Lanes.
        paths: Number of shortest paths; empty where nobody asked.
    """

    distance: Ints
    begin: Ints
    count: Ints
    way: Ints
    paths: Floats


def _table(fabric: _Fabric, targets: Ints, counted: bool) -> _Table:
    """Search from all targets at once, a hop at a time; ``counted`` asks for the number of paths too."""
    rows, num_lanes, num_switches = len(targets), len(fabric.lane), fabric.network.num_switches
    distance = np.full((rows, num_switches), -1, np.int64)
    distance[np.arange(rows), targets] = 0
    sending = np.flatnonzero(np.diff(fabric.start))
    cost, reached = 0, 0
    while len(sending) and cost <= reached + fabric.weight.max():
        cost += 1
        beyond = distance[:, fabric.head]
        moved = (beyond >= 0) & (beyond == cost - fabric.weight)
        found = np.zeros(distance.shape, bool)
        found[:, sending] = np.logical_or.reduceat(moved, fabric.start[sending], axis=1)
        found &= distance < 0
        distance[found] = cost
        reached = cost if found.any() else reached
    beyond, here = distance[:, fabric.head], distance[:, fabric.tail]
    onward = (beyond >= 0) & (beyond == here - fabric.weight)
    flat = np.concatenate([[0], np.cumsum(onward.ravel())])
    edge = np.arange(rows)[:, None] * num_lanes + fabric.start
    begin = flat[edge]
    way = np.flatnonzero(onward.ravel()) % max(num_lanes, 1)
    paths = _paths(fabric, distance, onward) if counted else np.zeros((0, 0))
    return _Table(distance, begin[:, :-1], np.diff(begin, axis=1), way, paths)


def _paths(fabric: _Fabric, distance: Ints, onward: NDArray[np.bool_]) -> Floats:
    paths = (distance == 0).astype(np.float64)
    sending = np.flatnonzero(np.diff(fabric.start))
    for cost in range(1, int(distance.max(initial=0)) + 1):
        weight = np.where(onward, paths[:, fabric.head], 0.0)
        total = np.zeros_like(paths)
        total[:, sending] = np.add.reduceat(weight, fabric.start[sending], axis=1)
        paths = np.where(distance == cost, total, paths)
    return paths


def _route(fabric: _Fabric, source: Ints, destination: Ints, routing: Routing, seed: int) -> Routes:
    network = fabric.network
    moving = source != destination
    lost = moving & ~(fabric.port_alive[source] & fabric.port_alive[destination])
    if lost.any():
        raise _unreachable(network, source[lost][0], destination[lost][0])
    blocks: list[tuple[Ints, Routes]] = []
    for flow, targets, row in _blocks(fabric, destination):
        table = _table(fabric, targets, routing == "adaptive")
        here = fabric.attach[source[flow]] - network.num_endpoints
        gone = moving[flow] & (table.distance[row, here] < 0)
        if gone.any():
            raise _unreachable(network, source[flow][gone][0], destination[flow][gone][0])
        ends = source[flow], destination[flow]
        if routing == "adaptive":
            part = _spread(fabric, table, row, *ends)
        else:
            part = _single(fabric, table, row, *ends, _digits(fabric) if routing == "static" else seed)
        blocks.append((flow, part))
    return blocks[0][1] if len(blocks) == 1 else _gathered(len(source), blocks)


def _blocks(fabric: _Fabric, destination: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield flows, the switches that they go to, and which of these each goes to: as many as the table holds."""
    network = fabric.network
    targets, row = _distinct(fabric.attach[destination] - network.num_endpoints, network.num_switches)
    size = max(1, _TABLE_ENTRIES // max(1, len(fabric.lane)))
    if len(targets) <= size:
        yield np.arange(len(destination)), targets, row
        return
    order = np.argsort(row, kind="stable")
    edges = np.searchsorted(row[order], np.arange(0, len(targets) + size, size))
    for number, (low, high) in enumerate(pairwise(edges)):
        flow = order[low:high]
        yield flow, targets[number * size : (number + 1) * size], row[flow] - number * size


def _gathered(num_flows: int, blocks: list[tuple[Ints, Routes]]) -> Routes:
    """Return one table from those of several sets of flows."""
    counts, latency = np.zeros(num_flows, np.int64), np.zeros(num_flows)
    for flow, part in blocks:
        counts[flow], latency[flow] = np.diff(part.start), part.latency_s
    start = np.concatenate([[0], np.cumsum(counts)])
    link, fraction = np.empty(start[-1], np.int64), np.empty(start[-1])
    for flow, part in blocks:
        place = np.repeat(start[flow] - part.start[:-1], np.diff(part.start)) + np.arange(len(part.link))
        link[place], fraction[place] = part.link, part.fraction
    return Routes(start, link, fraction, latency)


Digits = tuple[Ints, Ints, Ints, Ints]


def _digits(fabric: _Fabric) -> Digits:
    """Return the two digits of a destination that static routing goes by, and the range of each.

    The first is its place at its switch, the second the place of that switch among those below one aggregation switch.
    """
    network = fabric.network
    local, width = _rank(fabric.attach)
    level = network.level[network.num_endpoints :]
    rising = np.flatnonzero(level[fabric.head] > level[fabric.tail])[::-1]
    parent = np.full(network.num_switches, -1, np.int64)
    parent[fabric.tail[rising]] = fabric.head[rising]
    leaves = np.unique(fabric.attach - network.num_endpoints)
    rank, size = _rank(parent[leaves])
    place, places = np.zeros(network.num_switches, np.int64), np.ones(network.num_switches, np.int64)
    place[leaves], places[leaves] = rank, size
    switch = fabric.attach - network.num_endpoints
    return local, width, place[switch], places[switch]


def _distinct(values: Ints, limit: int) -> tuple[Ints, Ints]:
    """Like ``np.unique`` with the inverse, without sorting: for many values below a small limit."""
    present = np.zeros(limit, bool)
    present[values] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[values]


def _rank(group: Ints) -> tuple[Ints, Ints]:
    """Return each member's rank in its group, and the group's size."""
    order = np.argsort(group, kind="stable")
    _, inverse, count = np.unique(group, return_inverse=True, return_counts=True)
    begin = np.cumsum(count) - count
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - begin[inverse[order]]
    return rank, count[inverse]


def _single(fabric: _Fabric, table: _Table, row: Ints, source: Ints, destination: Ints, rule: Digits | int) -> Routes:
    """Walk every flow along one path; ``rule`` is the digits of static routing or the seed of the hash."""
    network = fabric.network
    here = fabric.attach[source] - network.num_endpoints
    moving = source != destination
    ends = np.full((len(source), 2), -1, np.int64)
    ends[moving, 0] = fabric.port_link[source[moving]]
    ends[moving, 1] = fabric.port_link[destination[moving]] ^ 1
    columns = [ends[:, :1]]
    walking = np.flatnonzero(moving & (table.distance[row, here] > 0))
    here = here[walking]
    flow_hash = _mix(_mix(source, destination), np.asarray(rule)) if isinstance(rule, int) else source
    while len(walking):
        at = row[walking]
        count, begin = table.count[at, here], table.begin[at, here]
        if isinstance(rule, int):
            choice = _mix(flow_hash[walking], here) % count
        else:
            up_to = fabric.head[table.way[begin]]
            choice = _by_destination(fabric, here, up_to, count, [digit[destination[walking]] for digit in rule])
        lane = table.way[begin + choice]
        column = np.full((len(source), 1), -1, np.int64)
        column[walking, 0] = fabric.lane[lane]
        columns.append(column)
        on = table.distance[at, fabric.head[lane]] > 0
        here, walking = fabric.head[lane][on], walking[on]
    links = np.concatenate([*columns, ends[:, 1:]], axis=1)
    used = links >= 0
    latency = np.append(network.latency_s, 0.0)[links].sum(axis=1)
    start = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return Routes(start, links[used], np.ones(start[-1]), latency)


def _by_destination(fabric: _Fabric, here: Ints, there: Ints, count: Ints, digits: list[Ints]) -> Ints:
    """Choose among ``count`` ways: upward the destination's digit modulo them, so that a leaf's flows part.

    Downward all ways lead to one switch, and the flows that meet there differ by multiples of the ways up: the digit's
    upper part tells them apart. Between leaf and aggregation the first digit counts, above that the second.
    """
    local, width, place, places = digits
    level = fabric.network.level[fabric.network.num_endpoints :]
    low = np.minimum(level[here], level[there]) == 1
    digit, base = np.where(low, local, place), np.where(low, width, places)
    return np.where(level[there] < level[here], digit * count // base, digit % count)


def _spread(fabric: _Fabric, table: _Table, row: Ints, source: Ints, destination: Ints) -> Routes:
    """Spread every flow evenly over its shortest paths; flows between the same two switches share the work."""
    network = fabric.network
    num_switches = network.num_switches
    here = fabric.attach[source] - network.num_endpoints
    pairs, pair = _distinct(row * num_switches + here, len(table.distance) * num_switches)
    inner = _spread_pairs(fabric, table, *np.divmod(pairs, num_switches))
    moving = source != destination
    counts = np.where(moving, np.diff(inner.start)[pair], 0)
    start = np.concatenate([[0], np.cumsum(counts + 2 * moving)])
    link, fraction = np.empty(start[-1], np.int64), np.ones(start[-1])
    link[start[:-1][moving]] = fabric.port_link[source[moving]]
    link[start[1:][moving] - 1] = fabric.port_link[destination[moving]] ^ 1
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    entry = np.repeat(inner.start[:-1][pair], counts) + within
    place = np.repeat(start[:-1] + 1, counts) + within
    link[place], fraction[place] = inner.link[entry], inner.fraction[entry]
    ends_s = network.latency_s[fabric.port_link[source]] + network.latency_s[fabric.port_link[destination]]
    return Routes(start, link, fraction, np.where(moving, ends_s + inner.latency_s[pair], 0.0))


def _spread_pairs(fabric: _Fabric, table: _Table, row: Ints, here: Ints) -> Routes:
    """Return the links between switches of each pair, with the part of its paths that takes them."""
    network, num_switches = fabric.network, fabric.network.num_switches
    pair, share, late = np.arange(len(row)), np.ones(len(row)), np.zeros(len(row))
    entries: list[tuple[Ints, Ints, Floats]] = []
    latency = np.zeros(len(row))
    while True:
        done = table.distance[row[pair], here] <= 0
        np.maximum.at(latency, pair[done], late[done])
        pair, here, share, late = pair[~done], here[~done], share[~done], late[~done]
        if not len(pair):
            break
        count, begin = table.count[row[pair], here], table.begin[row[pair], here]
        each = np.repeat(np.arange(len(pair)), count)
        lane = table.way[begin[each] + np.arange(len(each)) - np.repeat(np.cumsum(count) - count, count)]
        target = row[pair][each]
        part = share[each] * table.paths[target, fabric.head[lane]] / table.paths[target, here[each]]
        entries.append((pair[each], fabric.lane[lane], part))
        key = pair[each] * num_switches + fabric.head[lane]
        late = late[each] + network.latency_s[fabric.lane[lane]]
        states, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        longest = late[first]
        np.maximum.at(longest, inverse, late)
        share, late = np.bincount(inverse, part, len(states)), longest
        pair, here = np.divmod(states, num_switches)
    if not entries:
        return Routes(np.zeros(len(row) + 1, np.int64), np.zeros(0, np.int64), np.zeros(0), latency)
    columns = [np.concatenate(column) for column in zip(*entries, strict=True)]
    return _merged(network, columns[0], columns[1], columns[2], latency)


def _merged(network: Network, row: Ints, link: Ints, fraction: Floats, latency_s: Floats) -> Routes:
    """Return routes from entries in any order, those of one flow and link added up."""
    keys, inverse = np.unique(row * network.num_links + link, return_inverse=True)
    rows, links = np.divmod(keys, network.num_links)
    start = np.searchsorted(rows, np.arange(len(latency_s) + 1))
    return Routes(start, links, np.bincount(inverse, fraction, len(keys)).astype(np.float64), latency_s)


def _mix(a: ArrayLike, b: ArrayLike) -> Ints:
    """Hash pairs of numbers to non-negative ones (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.asarray(a, np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.asarray(b, np.int64).astype(np.uint64) + np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _endpoints(network: Network, numbers: ArrayLike) -> Ints:
    endpoint = np.atleast_1d(np.asarray(numbers, np.int64))
    wrong = (endpoint < 0) | (endpoint >= network.num_endpoints)
    if wrong.any():
        raise PlanError(f"endpoint {endpoint[wrong][0]} does not exist; take one of 0 to {network.num_endpoints - 1}")
    return endpoint


def _unreachable(network: Network, source: np.int64, destination: np.int64) -> PlanError:
    names = [f"endpoint {e} (node {network.node[e]}, plane {network.plane[e]})" for e in (source, destination)]
    return PlanError(f"no path is left from {names[0]} to {names[1]}; mend a link, or send by another plane")
