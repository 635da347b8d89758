"""What a network is before anything is sent: its counts, cost and limits, beside other topologies, routings and hosts.

arXiv 2505.09343, table 3 (topologies) and 5.2.2 (routing); arXiv 2408.14158, III and IV (two zones, reducing in host
memory). Each answer is a value that prints (``cofire.network.report``) and dumps as JSON.

Left out: traffic in time, which ``cofire.network.scenario`` simulates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from cofire.errors import PlanError
from cofire.network import patterns
from cofire.network.analytical import NetworkFacts, analyse, analyse_cluster
from cofire.network.builders import build_network
from cofire.network.cost import NetworkCost, PriceList, cluster_network_cost, network_cost, price_list
from cofire.network.flowsim import link_name
from cofire.network.host import HostReduceBounds, cluster_host_reduce_bounds, peer_ring_bound
from cofire.network.routing import device_routes, link_loads
from cofire.network.shapes import Dragonfly, FatTree, Shape, SlimFly, Torus, TwoZone, cluster_shape, network_shape
from cofire.network.topology import Network
from cofire.spec.figure import Figure
from cofire.spec.hardware import ClusterSpec, NetworkSpec, Routing, Topology
from cofire.spec.spec_type import Spec

TOPOLOGIES: tuple[Topology, ...] = (
    "fat_tree2",
    "multi_plane",
    "multi_rail",
    "fat_tree3",
    "two_zone",
    "dragonfly",
    "slim_fly",
    "torus",
    "fully_connected",
)

ROUTINGS: tuple[Routing, ...] = ("ecmp", "static", "adaptive")

# A ratio of loads up to this counts as keeping up: uniform traffic of n ports leaves 1 / n to the port itself.
_KEEPS_UP = 1.01


class Printed(Spec):
    """What a paper prints of a topology; money in its own precision."""

    endpoints: int
    switches: int
    links: int
    million_usd: float
    thousand_usd_per_endpoint: float


class TopologyRow(Spec):
    """A topology at a size; ``refused`` says why it cannot be built, and then the rest is none.

    ``ports_used`` is what a full switch uses of its ports; the rest is paid for.
    """

    name: str
    shape: str = ""
    refused: str = ""
    facts: NetworkFacts | None = None
    cost: NetworkCost | None = None
    ports_used: int = 0
    printed: Printed | None = None

    @property
    def keeps_up(self) -> bool:
        """Whether the links between switches carry a uniform exchange of all ports."""
        return self.facts is not None and max(self.facts.all_to_all_load, self.facts.all_reduce_load) <= _KEEPS_UP


class TopologyComparison(Spec):
    """Topologies of one size and one kind of switch, or table 3 of arXiv 2505.09343 (each of its own size)."""

    endpoints: int | None
    switch_ports: int
    ports_per_node: int
    num_planes: int
    bandwidth_bytes_per_s: float
    rows: tuple[TopologyRow, ...]

    @property
    def cheapest(self) -> tuple[TopologyRow, ...]:
        """Of those that keep up the cheapest per port, and others that cost as much within a thousandth."""
        able = [(row.cost.per_endpoint, row) for row in self.rows if row.keeps_up and row.cost is not None]
        least = min((price for price, _ in able), default=0.0)
        return tuple(row for price, row in able if price <= 1.001 * least)


class NetworkSurvey(Spec):
    """A cluster's network: what it is, what it allows and costs, and what binds an exchange of everyone.

    ``port_bytes_per_s`` is what a port reaches, one way; ``all_to_all_bytes_per_s`` what is left of it when all ports
    exchange evenly. ``longest_latency_s`` is that of the longest shortest path.
    """

    cluster: str
    network: str
    topology: Topology
    routing: Routing
    shape: str
    num_nodes: int
    devices_per_node: int
    ports_per_node: int
    facts: NetworkFacts
    cost: NetworkCost
    port_bytes_per_s: Figure
    all_to_all_bytes_per_s: Figure
    same_leaf_latency_s: Figure
    cross_leaf_latency_s: Figure
    longest_latency_s: Figure
    scale_up_bytes_per_s: Figure | None
    binds: str


class BusyLink(Spec):
    """A link and the flows on it, in full ports' worth."""

    link: str
    load: float


class RoutingRow(Spec):
    """One routing under a shift; loads are of links between switches, in ports' worth over their cables.

    ``links_by_load`` counts the links that carry so many flows (rounded up); ``slowdown`` is what the busiest link
    makes of the time of a port alone.
    """

    routing: Routing
    largest: float
    mean: float
    slowdown: float
    links_by_load: dict[int, int]
    busiest: tuple[BusyLink, ...]


class RoutingSurvey(Spec):
    """Every port sends to the port of its number ``shift`` nodes on."""

    cluster: str
    own_routing: Routing
    num_nodes: int
    num_flows: int
    shift: int
    seed: int
    rows: tuple[RoutingRow, ...]


class HostVariant(Spec):
    """One way to reduce gradients in host memory; ``refused`` says why the host has not got it."""

    name: str
    refused: str = ""
    bounds: HostReduceBounds | None = None


class HostSurvey(Spec):
    """What the nodes' hosts allow; ``peer_ring`` is a ring of PCIe peers, where there are no fast links."""

    cluster: str
    num_nodes: int
    devices_per_node: int
    variants: tuple[HostVariant, ...]
    peer_ring: Figure | None


# arXiv 2505.09343, table 3: shapes of 64-port switches and what is printed of them. The Slim Fly's q is no prime power:
# a design by formula.
TABLE_3: dict[str, tuple[Shape, Printed]] = {
    name: (
        shape,
        Printed(
            endpoints=numbers[0],
            switches=numbers[1],
            links=numbers[2],
            million_usd=numbers[3],
            thousand_usd_per_endpoint=each,
        ),
    )
    for name, shape, numbers, each in (
        ("FT2", FatTree(2_048), (2_048, 96, 2_048, 9), 4.39),
        ("MPFT", FatTree(16_384, num_planes=8, ports_per_node=8), (16_384, 768, 16_384, 72), 4.39),
        ("FT3", FatTree(65_536, layers=3), (65_536, 5_120, 131_072, 491), 7.5),
        ("SF", SlimFly(28), (32_928, 1_568, 32_928, 146), 4.4),
        ("DF", Dragonfly(16, 32, 16, 511), (261_632, 16_352, 384_272, 1_522), 5.8),
    )
}


def survey(cluster: ClusterSpec, num_nodes: int | None = None, prices: PriceList | None = None) -> NetworkSurvey:
    """Return what a cluster's network is, allows and costs.

    Args:
        cluster: With a network.
        num_nodes: Nodes; none: as many as the network is bought for.
        prices: Price list; none: the fit to arXiv 2505.09343.

    Raises:
        PlanError: The cluster has no network, or its switches are too small.
    """
    facts, shape = analyse_cluster(cluster, num_nodes), cluster_shape(cluster, num_nodes)
    network, fast = cluster.network, cluster.scale_up
    assert network is not None  # cluster_shape refuses a cluster without one
    port = _scaled(network.efficiency, network.bandwidth_bytes_per_s)
    near, far = network.same_leaf_latency_s, network.cross_leaf_latency_s
    between = (facts.diameter_links - 2) / 2
    longest = Figure(
        value=near.value + between * max(far.value - near.value, 0.0),
        low=near.low + between * max(far.low - near.low, 0.0),
        high=near.high + between * max(far.high - near.high, 0.0),
        label=far.label,
        source="one cable at each end, the rest between switches",
    )
    return NetworkSurvey(
        cluster=cluster.name,
        network=network.name,
        topology=network.topology,
        routing=network.routing,
        shape=_shape_text(shape),
        num_nodes=num_nodes or cluster.num_nodes,
        devices_per_node=cluster.devices_per_node,
        ports_per_node=network.nics_per_node,
        facts=facts,
        cost=cluster_network_cost(cluster, num_nodes, prices),
        port_bytes_per_s=port,
        all_to_all_bytes_per_s=_scaled(port, 1 / max(facts.all_to_all_load, 1.0)),
        same_leaf_latency_s=near,
        cross_leaf_latency_s=far,
        longest_latency_s=longest,
        scale_up_bytes_per_s=None if fast is None else _scaled(fast.efficiency, fast.bandwidth_bytes_per_s),
        binds=_binds(cluster, facts),
    )


def _scaled(figure: Figure, factor: float) -> Figure:
    changes = {end: getattr(figure, end) * factor for end in ("value", "low", "high")}
    return figure.model_copy(update=changes)


def _binds(cluster: ClusterSpec, facts: NetworkFacts) -> str:
    """Say what an all-to-all of every port waits for."""
    network, host = cluster.network, cluster.host
    assert network is not None
    load = facts.all_to_all_load
    if load > _KEEPS_UP:
        where = "the links that join the zones" if network.topology == "two_zone" else "links between switches"
        return f"{where}: an all-to-all of every port takes {load:.1f} times what the ports alone would"
    sharing = max(network.nics_per_node, cluster.devices_per_node) / cluster.devices_per_node
    if host is not None and host.pcie_bandwidth_bytes_per_s < sharing * network.bandwidth_bytes_per_s:
        return (
            f"the host's slots: {host.pcie_bandwidth_bytes_per_s / 1e9:g} GB/s behind ports of "
            f"{network.bandwidth_bytes_per_s / 1e9:g} GB/s"
        )
    return f"the ports: links between switches are {load:.0%} full when every port sends all it can"


def compare_topologies(network: NetworkSpec, num_endpoints: int, prices: PriceList | None = None) -> TopologyComparison:
    """Return every topology at one size.

    Args:
        network: Switches, ports of a node, planes (of ``multi_plane``), oversubscription and bandwidth.
        num_endpoints: NIC ports; rounded up to whole nodes.
        prices: Price list; none: the fit to arXiv 2505.09343.

    Raises:
        PlanError: There is no endpoint.
    """
    if num_endpoints < 1:
        raise PlanError(f"endpoints = {num_endpoints}: a network joins 1 or more")
    prices = prices or price_list()
    rows = []
    for name in TOPOLOGIES:
        try:
            shape = network_shape(network.model_copy(update={"topology": name}), num_endpoints)
        except PlanError as error:
            rows.append(TopologyRow(name=name, refused=str(error)))
            continue
        rows.append(_row(name, shape, network.bandwidth_bytes_per_s, prices))
    return TopologyComparison(
        endpoints=num_endpoints,
        switch_ports=network.switch_ports,
        ports_per_node=network.nics_per_node,
        num_planes=network.num_planes,
        bandwidth_bytes_per_s=network.bandwidth_bytes_per_s,
        rows=tuple(rows),
    )


def compare_table_3(prices: PriceList | None = None, bandwidth_bytes_per_s: float = 50e9) -> TopologyComparison:
    """Return the five networks of arXiv 2505.09343, table 3, computed, with what it prints beside.

    Args:
        prices: Price list; none: the fit to this table.
        bandwidth_bytes_per_s: Of a port, for the bisection.
    """
    prices = prices or price_list()
    rows = [_row(name, shape, bandwidth_bytes_per_s, prices, printed) for name, (shape, printed) in TABLE_3.items()]
    return TopologyComparison(
        endpoints=None,
        switch_ports=64,
        ports_per_node=8,
        num_planes=8,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        rows=tuple(rows),
    )


def _row(name: str, shape: Shape, bandwidth: float, prices: PriceList, printed: Printed | None = None) -> TopologyRow:
    return TopologyRow(
        name=name,
        shape=_shape_text(shape),
        facts=analyse(shape, bandwidth),
        cost=network_cost(shape.counts(), prices),
        ports_used=_ports_used(shape),
        printed=printed,
    )


def _shape_text(shape: Shape) -> str:
    """Return a shape as its makers write it."""
    if isinstance(shape, FatTree):
        planes = f"{shape.num_planes} planes of " if shape.num_planes > 1 else ""
        over = f", {shape.oversubscription:g}:1" if shape.oversubscription > 1 else ""
        return f"{planes}{shape.layers} layers{', leaves by rail' if shape.rails else ''}{over}"
    if isinstance(shape, TwoZone):
        joined = f"{shape.num_joining_switches} x {shape.cross_links}"
        return f"2 x {shape.num_leaves} leaves and {shape.num_spines} spines, joined by {joined} links"
    if isinstance(shape, Dragonfly):
        return (
            f"p {shape.endpoints_per_router}, a {shape.routers_per_group}, h {shape.global_links_per_router}, "
            f"g {shape.num_groups}"
        )
    if isinstance(shape, SlimFly):
        return f"q {shape.q}, {shape.degree} links and {shape.endpoints_per_router} endpoints per switch"
    if isinstance(shape, Torus):
        return " x ".join(str(size) for size in shape.dims)
    return f"{shape.num_switches} switches of {shape.endpoints_per_switch} endpoints"


def _ports_used(shape: Shape) -> int:
    """Return how many ports the fullest switch uses."""
    if isinstance(shape, FatTree | TwoZone):
        return shape.switch_ports
    if isinstance(shape, Dragonfly):
        return shape.endpoints_per_router + shape.routers_per_group - 1 + shape.global_links_per_router
    if isinstance(shape, SlimFly):
        return shape.degree + shape.endpoints_per_router
    if isinstance(shape, Torus):
        return shape.endpoints_per_router + sum(0 if size == 1 else 1 if size == 2 else 2 for size in shape.dims)
    return shape.endpoints_per_switch + shape.num_switches - 1


def survey_routing(
    cluster: ClusterSpec,
    num_nodes: int | None = None,
    shift: int | None = None,
    routings: Sequence[Routing] = ROUTINGS,
    seed: int = 0,
) -> RoutingSurvey:
    """Return what each routing makes of a shift permutation.

    Args:
        cluster: With a network.
        num_nodes: Nodes that send, and that the network is built for; none: those of the cluster.
        shift: Nodes from sender to receiver; none: half of all.
        routings: Which; the cables of a bundle are told apart for all of them.
        seed: Of the hash of ``ecmp``.

    Raises:
        PlanError: The cluster has no network, or the shift sends a node to itself.
    """
    nodes = num_nodes or cluster.num_nodes
    network = build_network(cluster, nodes, bundle=False)
    assert cluster.network is not None  # build_network refuses a cluster without one
    step = nodes // 2 if shift is None else shift
    if step % nodes == 0:
        fix = f"take 1 to {nodes - 1}" if nodes > 1 else "take 2 nodes or more"
        raise PlanError(f"shift = {step} of {nodes} nodes sends each node to itself; {fix}")
    width = patterns.ports_of(network, nodes).shape[1]
    node, device = np.divmod(np.arange(nodes * width), width)
    rows = []
    for routing in routings:
        routes = device_routes(network, (node, device), ((node + step) % nodes, device), routing, seed)
        rows.append(_routing_row(routing, network, link_loads(network, routes)))
    return RoutingSurvey(
        cluster=cluster.name,
        own_routing=cluster.network.routing,
        num_nodes=nodes,
        num_flows=len(node),
        shift=step,
        seed=seed,
        rows=tuple(rows),
    )


def _routing_row(routing: Routing, network: Network, loads: np.ndarray, count: int = 5) -> RoutingRow:
    level = network.level
    between = np.flatnonzero((level[network.tail] > 0) & (level[network.head] > 0))
    ports = network.capacity_bytes_per_s[(level[network.tail] == 0) & (level[network.head] > 0)]
    part = loads[between] * (ports.min() / network.capacity_bytes_per_s[between])
    whole = np.ceil(np.round(part, 9)).astype(np.int64)
    values, numbers = np.unique(whole, return_counts=True)
    order = np.argsort(-part, kind="stable")[:count]
    busiest = [
        BusyLink(link=link_name(network, int(between[at])), load=float(part[at])) for at in order if part[at] > 0
    ]
    largest = float(part.max(initial=0.0))
    return RoutingRow(
        routing=routing,
        largest=largest,
        mean=float(part.mean()) if len(part) else 0.0,
        slowdown=max(1.0, largest),
        links_by_load=dict(zip(values.tolist(), numbers.tolist(), strict=True)),
        busiest=tuple(busiest),
    )


def survey_host(cluster: ClusterSpec, num_nodes: int | None = None) -> HostSurvey:
    """Return what reducing in host memory (HFReduce) reaches at most, in each of its variants.

    Args:
        cluster: With a host, and a network if it has several nodes.
        num_nodes: Nodes that reduce together; none: all.

    Raises:
        PlanError: The cluster lacks a host or a network.
    """
    nodes = num_nodes or cluster.num_nodes
    ways: tuple[tuple[str, dict[Literal["gdrcopy", "paired"], bool]], ...] = (
        ("results by GDRCopy", {}),
        ("results by copy engines", {"gdrcopy": False}),
        ("pairs over bridges", {"paired": True}),
    )
    variants = []
    for name, options in ways:
        paired = options.get("paired", False)
        if paired and (cluster.host is None or cluster.host.bridge_bandwidth_bytes_per_s is None):
            refused = "host.bridge_bandwidth_bytes_per_s is not set; Fire-Flyer 2 later had 300e9"
            variants.append(HostVariant(name=name, refused=refused))
            continue
        bounds = cluster_host_reduce_bounds(cluster, nodes, options.get("gdrcopy", True), paired)
        variants.append(HostVariant(name=name, bounds=bounds))
    total = nodes * cluster.devices_per_node
    ring = peer_ring_bound(total) if cluster.scale_up is None and total > 1 else None
    return HostSurvey(
        cluster=cluster.name,
        num_nodes=nodes,
        devices_per_node=cluster.devices_per_node,
        variants=tuple(variants),
        peer_ring=ring,
    )
