"""Networks as graphs: fat trees, planes and rails, two zones, dragonfly, Slim Fly, torus, fully connected.

A shape (``cofire.network.shapes``) says how many of each and what is joined, this module draws the links (arXiv
2505.09343, section 5; arXiv 2408.14158, section III). Vertices are numbered endpoints first, node by node, then
switches: plane by plane the leaves, the spines or aggregation switches, the cores; last the switches of nodes' fast
links. Left out: cable lengths; each link has the same latency as its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cofire.network.shapes import Dragonfly, FatTree, FullyConnected, Shape, SlimFly, Torus, TwoZone, cluster_shape
from cofire.network.slim_fly import slim_fly_edges
from cofire.network.topology import SCALE_UP, Ints, Network
from cofire.spec.hardware import ClusterSpec


@dataclass(frozen=True)
class LinkSpeed:
    """What a link carries and how long it takes.

    The two latencies are those of whole paths, as table 5 of arXiv 2505.09343 has them: a link at an endpoint takes
    half of the first, a link between switches half of the difference.

    Attributes:
        bandwidth_bytes_per_s: Of every cable, one way.
        same_leaf_latency_s: Between two endpoints of one switch.
        cross_leaf_latency_s: Between two leaves below one spine.
        scale_up_bandwidth_bytes_per_s: Of a device's fast links, one way; 0: nodes have none.
        scale_up_latency_s: Between two devices of a node.
    """

    bandwidth_bytes_per_s: float = 50e9
    same_leaf_latency_s: float = 2.8e-6
    cross_leaf_latency_s: float = 3.7e-6
    scale_up_bandwidth_bytes_per_s: float = 0.0
    scale_up_latency_s: float = 3.3e-6

    @property
    def endpoint_latency_s(self) -> float:
        """Of one link at an endpoint."""
        return self.same_leaf_latency_s / 2

    @property
    def switch_latency_s(self) -> float:
        """Of one link between switches."""
        return max(self.cross_leaf_latency_s - self.same_leaf_latency_s, 0.0) / 2


@dataclass
class _Wiring:
    """Cables gathered kind by kind; ``attach[e]`` is the switch of endpoint e, counted without the endpoints."""

    attach: Ints
    level: Ints
    plane: Ints
    node: Ints
    endpoint_plane: Ints
    ends: list[tuple[Ints, Ints]] = field(default_factory=list)

    def join(self, tail: Ints, head: Ints) -> None:
        """Add one cable between each pair of switches."""
        self.ends.append((tail, head))


def build_network(cluster: ClusterSpec, num_nodes: int | None = None, bundle: bool | None = None) -> Network:
    """Return the network of a cluster, with the fast links between the ports of each node.

    Capacities are what is reached: bandwidth times efficiency.

    Args:
        cluster: With a network.
        num_nodes: Nodes to build for; none: as many as the network is bought for.
        bundle: Merge parallel cables into one link; none: where the routing is adaptive, which evens them out anyway.

    Raises:
        PlanError: The cluster has no network, or its switches are too small.
    """
    shape = cluster_shape(cluster, num_nodes)
    network, scale_up = cluster.network, cluster.scale_up
    assert network is not None  # cluster_shape refuses a cluster without one
    speed = LinkSpeed(
        network.bandwidth_bytes_per_s * network.efficiency.value,
        network.same_leaf_latency_s.value,
        network.cross_leaf_latency_s.value,
        scale_up.bandwidth_bytes_per_s * scale_up.efficiency.value if scale_up else 0.0,
        scale_up.latency_s.value if scale_up else 0.0,
    )
    bundled = network.routing == "adaptive" if bundle is None else bundle
    return build(shape, speed, network.nics_per_node, bundled, f"{cluster.name}: {network.name}")


def build(
    shape: Shape,
    speed: LinkSpeed | None = None,
    ports_per_node: int | None = None,
    bundle: bool = False,
    name: str = "",
) -> Network:
    """Return a network of a shape.

    Args:
        shape: What to build.
        speed: Of its links; none: 400 Gb/s InfiniBand.
        ports_per_node: Consecutive endpoints that make a node; none: the shape's own, or 1. Fat trees and two zones
            have their own and need no other.
        bundle: Merge parallel cables between two switches into one link.
        name: For people; empty: the shape.

    Raises:
        PlanError: The shape has no graph (a Slim Fly whose q is no prime power).
    """
    if isinstance(shape, FatTree):
        wiring = _fat_tree(shape)
    elif isinstance(shape, TwoZone):
        wiring = _two_zone(shape)
    else:
        wiring = _direct(shape, ports_per_node or 1)
    return _finish(wiring, speed or LinkSpeed(), bundle, name or repr(shape))


def _fat_tree(shape: FatTree) -> _Wiring:
    ports, planes = shape.ports_per_node, shape.num_planes
    node, port = np.divmod(np.arange(shape.num_endpoints), ports)
    plane = port % planes
    if shape.rails:
        leaf = node // shape.down * (ports // planes) + port // planes
    else:
        leaf = (node * (ports // planes) + port // planes) // shape.down
    tree = _tree_cables(shape)
    per_plane = shape.num_leaves + shape.num_aggregations + shape.top_switches
    top = 2 if shape.layers == 2 else 3
    levels = np.repeat([1, 2, top], [shape.num_leaves, shape.num_aggregations, shape.top_switches])
    wiring = _Wiring(
        leaf + plane * per_plane,
        np.tile(levels, planes),
        np.repeat(np.arange(planes), per_plane),
        node,
        port if shape.rails else plane,
    )
    start = np.arange(planes)[:, None] * per_plane
    for tail, head in tree:
        wiring.join((start + tail).ravel(), (start + head).ravel())
    return wiring


def _tree_cables(shape: FatTree) -> list[tuple[Ints, Ints]]:
    """Return the cables of one plane, leaf uplinks first, each leaf's (and each aggregation switch's) in a row."""
    if shape.num_leaves == 1:
        return []
    leaf, uplink = np.divmod(np.arange(shape.num_leaves * shape.up), shape.up)
    if shape.layers == 2:
        return [(leaf, shape.num_leaves + (leaf * shape.up + uplink) % shape.top_switches)]
    aggregation = leaf // shape.leaves_per_pod * shape.up + uplink
    cables = [(leaf, shape.num_leaves + aggregation)]
    if shape.num_pods > 1:
        uplinks, group = shape.switch_ports // 2, shape.top_switches // shape.up
        switch, uplink = np.divmod(np.arange(shape.num_aggregations * uplinks), uplinks)
        pod, index = np.divmod(switch, shape.up)
        core = index * group + (pod * uplinks + uplink) % group
        first = shape.num_leaves
        cables.append((first + switch, first + shape.num_aggregations + core))
    return cables


def _two_zone(shape: TwoZone) -> _Wiring:
    """Endpoints: the nodes of zone 0, those of zone 1, then per storage node its ports in zones 0 and 1.

    Storage ports are spread evenly over the leaves, and so are the links to the joining switches.
    """
    per_zone = shape.num_leaves + shape.num_spines
    joining_links = shape.num_joining_switches * shape.cross_links
    # Round robin over the leaves: first the joining links, then storage, then nodes fill what is left.
    place = np.arange(joining_links + shape.num_storage_nodes)
    spread = place * shape.num_leaves // max(len(place), 1)
    taken = np.bincount(spread, minlength=shape.num_leaves)
    free = np.repeat(np.arange(shape.num_leaves), shape.down - taken)[: shape.ports_per_zone]
    # Every (number of places / number of joining links)-th place is a joining link.
    is_joining = np.zeros(len(place), bool)
    is_joining[np.arange(joining_links) * len(place) // max(joining_links, 1)] = True
    storage, joining = spread[~is_joining], spread[is_joining]

    num_nodes = 2 * shape.nodes_per_zone
    storage_zone = np.tile([0, 1], shape.num_storage_nodes)
    endpoint_zone = np.concatenate([np.repeat([0, 1], shape.ports_per_zone), storage_zone])
    attach = np.concatenate([free, free, np.repeat(storage, 2)]) + endpoint_zone * per_zone
    computing = np.arange(2 * shape.ports_per_zone) // shape.ports_per_node
    node = np.concatenate([computing, num_nodes + np.repeat(np.arange(shape.num_storage_nodes), 2)])
    zone_levels = np.repeat([1, 2], [shape.num_leaves, shape.num_spines])
    wiring = _Wiring(
        attach,
        np.concatenate([zone_levels, zone_levels, np.full(shape.num_joining_switches, 3)]),
        # A zone of their own for the joining switches: paths inside a zone do not pass them.
        np.concatenate([np.repeat([0, 1], per_zone), np.full(shape.num_joining_switches, 2)]),
        node,
        endpoint_zone,
    )
    leaf, uplink = np.divmod(np.arange(shape.num_leaves * shape.down), shape.down)
    spine = shape.num_leaves + (leaf * shape.down + uplink) % shape.num_spines
    joiner = 2 * per_zone + np.arange(joining_links) % shape.num_joining_switches
    for zone in (0, per_zone):
        wiring.join(zone + leaf, zone + spine)
    for zone in (0, per_zone):
        wiring.join(zone + joining, joiner)
    return wiring


def _direct(shape: Dragonfly | SlimFly | Torus | FullyConnected, ports_per_node: int) -> _Wiring:
    """Wire routers that all carry endpoints."""
    if isinstance(shape, Dragonfly):
        per_router, (tail, head) = shape.endpoints_per_router, _dragonfly_edges(shape)
    elif isinstance(shape, SlimFly):
        per_router, (tail, head) = shape.endpoints_per_router, slim_fly_edges(shape.q)
    elif isinstance(shape, Torus):
        per_router, (tail, head) = shape.endpoints_per_router, _torus_edges(shape)
    else:
        per_router, (tail, head) = shape.endpoints_per_switch, np.triu_indices(shape.num_switches, 1)
    endpoint, num_routers = np.arange(shape.num_endpoints), shape.counts().switches
    # The groups of a dragonfly are what planes and zones are elsewhere.
    per_group = shape.routers_per_group if isinstance(shape, Dragonfly) else num_routers
    group, router = np.arange(num_routers) // per_group, endpoint // per_router
    level = np.ones(num_routers, np.int64)
    wiring = _Wiring(router, level, group, endpoint // ports_per_node, group[router])
    wiring.join(tail, head)
    return wiring


def _dragonfly_edges(shape: Dragonfly) -> tuple[Ints, Ints]:
    """Port c of a group goes to the group ``offsets[c]`` further on; ports are dealt to the routers in a row."""
    a, groups = shape.routers_per_group, shape.num_groups
    low, high = np.triu_indices(a, 1)
    base = np.arange(groups)[:, None] * a
    tail, head = (base + low).ravel(), (base + high).ravel()
    offsets = np.asarray(shape.group_offsets, np.int64)
    if not len(offsets):
        return tail, head
    # The k-th port with offset d meets the k-th with offset g - d.
    first = np.searchsorted(offsets, offsets)
    back = np.searchsorted(offsets, groups - offsets) + np.arange(len(offsets)) - first
    ours = np.arange(len(offsets)) // shape.global_links_per_router
    theirs = back // shape.global_links_per_router
    group = np.arange(groups)[:, None]
    far = (group + offsets) % groups
    once = group < far
    return (
        np.concatenate([tail, (group * a + ours)[once]]),
        np.concatenate([head, (far * a + theirs)[once]]),
    )


def _torus_edges(shape: Torus) -> tuple[Ints, Ints]:
    router = np.arange(shape.num_routers)
    place = np.asarray(np.unravel_index(router, shape.dims))
    tails, heads = [], []
    for dim, size in enumerate(shape.dims):
        if size == 1:
            continue
        further = place.copy()
        further[dim] = (place[dim] + 1) % size
        kept = (place[dim] == 0) | (size > 2)
        tails.append(router[kept])
        heads.append(np.asarray(np.ravel_multi_index(tuple(further), shape.dims))[kept])
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *tails]), np.concatenate([empty, *heads])


def _finish(wiring: _Wiring, speed: LinkSpeed, bundle: bool, name: str) -> Network:
    """Number the vertices, merge cables where asked, add the fast links and both directions."""
    num_endpoints, num_switches = len(wiring.attach), len(wiring.level)
    empty = np.zeros(0, np.int64)
    low = np.concatenate([empty, *(tail for tail, _ in wiring.ends)]) + num_endpoints
    high = np.concatenate([empty, *(head for _, head in wiring.ends)]) + num_endpoints
    cables = np.ones(len(low), np.int64)
    if bundle and len(low):
        key = low * (num_endpoints + num_switches) + high
        _, first, cables = np.unique(key, return_index=True, return_counts=True)
        low, high = low[first], high[first]

    endpoint = np.arange(num_endpoints)
    fast_tail, fast_head, num_fast = _fast_links(wiring, speed, num_endpoints + num_switches)
    tail = np.concatenate([endpoint, low, fast_tail])
    head = np.concatenate([wiring.attach + num_endpoints, high, fast_head])
    kinds = [num_endpoints, len(low), len(fast_tail)]
    cable, fast = speed.bandwidth_bytes_per_s, speed.scale_up_bandwidth_bytes_per_s
    capacity = np.repeat(np.asarray([cable, cable, fast], np.float64), kinds)
    latency = np.repeat(
        np.asarray([speed.endpoint_latency_s, speed.switch_latency_s, speed.scale_up_latency_s / 2], np.float64), kinds
    )
    count = np.concatenate([np.ones(num_endpoints, np.int64), cables, np.ones(len(fast_tail), np.int64)])
    return Network(
        name=name,
        num_endpoints=num_endpoints,
        num_switches=num_switches + num_fast,
        tail=np.stack([tail, head], axis=1).ravel(),
        head=np.stack([head, tail], axis=1).ravel(),
        capacity_bytes_per_s=np.repeat(capacity * count, 2),
        latency_s=np.repeat(latency, 2),
        plane=np.concatenate([wiring.endpoint_plane, wiring.plane, np.full(num_fast, SCALE_UP)]),
        node=wiring.node,
        level=np.concatenate([np.zeros(num_endpoints, np.int64), wiring.level, np.full(num_fast, SCALE_UP)]),
        cables=np.repeat(count, 2),
    )


def _fast_links(wiring: _Wiring, speed: LinkSpeed, first: int) -> tuple[Ints, Ints, int]:
    """Return the links from ports to the switch of their node's fast links, and how many such switches there are.

    A node with a single port needs none: nothing could be forwarded.
    """
    ports = np.bincount(wiring.node)
    wide = np.flatnonzero(ports > 1)
    if not speed.scale_up_bandwidth_bytes_per_s or not len(wide):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    switch = np.full(len(ports), -1)
    switch[wide] = first + np.arange(len(wide))
    tail = np.flatnonzero(switch[wiring.node] >= 0)
    return tail, switch[wiring.node[tail]], len(wide)
