"""The shapes of networks as a few integers each, and what follows from these: endpoints, switches and links.

Fat trees of two and three layers, also several side by side as planes (arXiv 2505.09343, section 5.1 and table 3), the
two-zone tree of Fire-Flyer 2 (arXiv 2408.14158, section III), dragonfly, Slim Fly, torus and fully connected switches.
A shape that cannot be wired is a PlanError. Left out: the cables between an endpoint and its switch are not counted
among the links, as in table 3.

The graphs themselves are built in ``cofire.network.builders``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cofire.errors import PlanError
from cofire.spec.hardware import ClusterSpec, NetworkSpec


@dataclass(frozen=True)
class Counts:
    """What is bought: ``optical_links`` leave the rack or the group, ``electrical_links`` (copper) stay inside."""

    endpoints: int
    switches: int
    optical_links: int
    electrical_links: int = 0

    @property
    def links(self) -> int:
        """Cables between switches."""
        return self.optical_links + self.electrical_links


@dataclass(frozen=True)
class FatTree:
    """One fat tree, or ``num_planes`` equal ones side by side.

    Port i of a node is on plane ``i % num_planes``. Leaves are filled one after the other; the top layer has the
    fewest switches that divide the uplinks below evenly, unless ``num_top_switches`` (of one plane) says otherwise.

    Attributes:
        num_endpoints: NIC ports over all planes.
        switch_ports: Ports of every switch.
        layers: 2 or 3.
        oversubscription: Downward over upward ports of a leaf.
        num_planes: Trees.
        ports_per_node: NIC ports of a node; ``num_planes`` divides it.
        rails: Ports of equal index under the same leaf, so that nodes meet there rail by rail.
        num_top_switches: Spines (two layers) or cores (three) of a plane; 0: the fewest.
    """

    num_endpoints: int
    switch_ports: int = 64
    layers: int = 2
    oversubscription: float = 1.0
    num_planes: int = 1
    ports_per_node: int = 1
    rails: bool = False
    num_top_switches: int = 0

    def __post_init__(self) -> None:
        _check(self.layers in (2, 3), f"layers = {self.layers} is not 2 or 3; take 2 or 3")
        _check(self.num_endpoints >= 1, f"num_endpoints = {self.num_endpoints}: a tree has 1 or more")
        _check(self.switch_ports >= 2, f"switch_ports = {self.switch_ports}: a tree needs at least 2")
        _check(self.oversubscription >= 1, f"oversubscription = {self.oversubscription:g} must be 1 or more; take 1")
        _check(
            self.ports_per_node % self.num_planes == 0 and self.num_endpoints % self.ports_per_node == 0,
            f"num_planes = {self.num_planes} must divide ports_per_node = {self.ports_per_node}, and that "
            f"num_endpoints = {self.num_endpoints}; nearest: "
            f"{max(1, round(self.num_endpoints / self.ports_per_node)) * self.ports_per_node} endpoints",
        )
        _check(
            self.up >= 1,
            f"oversubscription = {self.oversubscription:g} leaves no uplink of {self.switch_ports} ports; "
            f"the most is {self.switch_ports - 1}",
        )
        wide = self.num_leaves if self.layers == 2 else self.num_pods
        _check(
            wide <= self.switch_ports,
            f"{self.endpoints_per_plane} endpoints need {wide} {'leaves' if self.layers == 2 else 'pods'}, but a "
            f"switch of {self.switch_ports} ports joins {self.switch_ports}; "
            f"{'take three layers or more planes' if self.layers == 2 else 'take more planes or larger switches'}",
        )
        _check(
            self.num_top_switches == 0 or self.num_top_switches * self.switch_ports >= self._uplinks_to_top,
            f"num_top_switches = {self.num_top_switches} of {self.switch_ports} ports take "
            f"{self.num_top_switches * self.switch_ports} of {self._uplinks_to_top} uplinks; "
            f"the fewest is {-(-self._uplinks_to_top // self.switch_ports)}",
        )
        _check(
            self.layers == 2 or self.num_top_switches % self.up == 0,
            f"num_top_switches = {self.num_top_switches} must be a multiple of the {self.up} aggregation switches of "
            f"a pod; nearest: {max(1, round(self.num_top_switches / self.up)) * self.up}",
        )

    @property
    def endpoints_per_plane(self) -> int:
        """NIC ports of one plane."""
        return self.num_endpoints // self.num_planes

    @property
    def up(self) -> int:
        """Uplinks of a leaf."""
        return int(self.switch_ports / (1 + self.oversubscription))

    @property
    def down(self) -> int:
        """Endpoints of a full leaf."""
        return min(self.switch_ports - self.up, int(self.up * self.oversubscription))

    @property
    def num_leaves(self) -> int:
        """Leaves of one plane. With rails, each group of ``down`` nodes has a leaf per port."""
        if self.rails:
            num_nodes = self.num_endpoints // self.ports_per_node
            return -(-num_nodes // self.down) * (self.ports_per_node // self.num_planes)
        return -(-self.endpoints_per_plane // self.down)

    @property
    def leaves_per_pod(self) -> int:
        """Leaves under the same aggregation switches; of two layers all of them."""
        return self.num_leaves if self.layers == 2 else self.switch_ports // 2

    @property
    def num_pods(self) -> int:
        """Groups of leaves that meet below the core."""
        return -(-self.num_leaves // self.leaves_per_pod)

    @property
    def num_aggregations(self) -> int:
        """Middle switches of one plane, ``up`` in each pod; none with two layers."""
        return 0 if self.layers == 2 else self.num_pods * self.up

    @property
    def _uplinks_to_top(self) -> int:
        if self.layers == 2:
            return self.num_leaves * self.up
        return self.num_aggregations * (self.switch_ports // 2)

    @cached_property
    def top_switches(self) -> int:
        """Spines or cores of one plane; none where a single leaf or pod holds everything."""
        if self.num_top_switches:
            return self.num_top_switches
        if self.layers == 2:
            return 0 if self.num_leaves == 1 else _fewest(self.up, self.num_leaves, self.switch_ports)
        if self.num_pods == 1:
            return 0
        return self.up * _fewest(self.switch_ports // 2, self.num_pods, self.switch_ports)

    def counts(self) -> Counts:
        """Return endpoints, switches and links of all planes."""
        low = self.num_leaves * self.up if self.num_leaves > 1 else 0
        high = self._uplinks_to_top if self.layers == 3 and self.num_pods > 1 else 0
        switches = self.num_leaves + self.num_aggregations + self.top_switches
        return Counts(self.num_endpoints, switches * self.num_planes, (low + high) * self.num_planes)


@dataclass(frozen=True)
class TwoZone:
    """Two equal two-layer trees, joined by a few switches (Fire-Flyer 2).

    The published integers are those of the defaults. How the joining switches are wired is not published; here each
    takes ``cross_links`` ports of leaves in either zone, so that 600 nodes, 180 storage nodes and 2 x 10 such links
    fill the 800 ports of a zone.

    Attributes:
        nodes_per_zone: Computing nodes of a zone.
        num_storage_nodes: Nodes with one port in each zone.
        switch_ports: Ports of every switch; half of a leaf's go up.
        num_leaves: Leaves of a zone.
        num_spines: Spines of a zone.
        num_joining_switches: Switches between the zones.
        cross_links: Links from a joining switch to each zone.
        ports_per_node: Of a computing node, all in its zone.
    """

    nodes_per_zone: int = 600
    num_storage_nodes: int = 180
    switch_ports: int = 40
    num_leaves: int = 40
    num_spines: int = 20
    num_joining_switches: int = 2
    cross_links: int = 10
    ports_per_node: int = 1

    def __post_init__(self) -> None:
        taken = self.ports_per_zone + self.num_storage_nodes + self.num_joining_switches * self.cross_links
        room = self.num_leaves * self.down
        _check(
            taken <= room,
            f"a zone of {self.num_leaves} leaves has {room} ports below, but {taken} are wanted; "
            f"take {-(-taken // max(self.down, 1))} leaves",
        )
        _check(
            self.num_leaves * self.down <= self.num_spines * self.switch_ports and self.num_leaves <= self.switch_ports,
            f"num_spines = {self.num_spines} of {self.switch_ports} ports cannot carry {self.num_leaves} leaves; "
            f"take {-(-self.num_leaves * self.down // self.switch_ports)}, and at most {self.switch_ports} leaves",
        )
        _check(
            2 * self.cross_links <= self.switch_ports,
            f"cross_links = {self.cross_links} to each zone needs {2 * self.cross_links} of {self.switch_ports} ports; "
            f"the most is {self.switch_ports // 2}",
        )

    @property
    def down(self) -> int:
        """Ports of a leaf below, and as many above."""
        return self.switch_ports // 2

    @property
    def ports_per_zone(self) -> int:
        """Of computing nodes."""
        return self.nodes_per_zone * self.ports_per_node

    @property
    def num_endpoints(self) -> int:
        """Ports of computing and storage nodes."""
        return 2 * (self.ports_per_zone + self.num_storage_nodes)

    def counts(self) -> Counts:
        """Return endpoints that are in use, switches and links."""
        switches = 2 * (self.num_leaves + self.num_spines) + self.num_joining_switches
        links = 2 * self.num_leaves * self.down + 2 * self.num_joining_switches * self.cross_links
        return Counts(self.num_endpoints, switches, links)


@dataclass(frozen=True)
class Dragonfly:
    """Groups of fully connected routers, and the groups fully connected.

    Attributes:
        endpoints_per_router: p.
        routers_per_group: a.
        global_links_per_router: h.
        num_groups: g, at most ``a h + 1``.
        num_endpoints: Endpoints in use, the first of all places; 0: all of them.
    """

    endpoints_per_router: int
    routers_per_group: int
    global_links_per_router: int
    num_groups: int
    num_endpoints: int = 0

    def __post_init__(self) -> None:
        most = self.routers_per_group * self.global_links_per_router + 1
        _check(
            1 <= self.num_groups <= most,
            f"num_groups = {self.num_groups}: {self.routers_per_group} routers with {self.global_links_per_router} "
            f"global links reach {most - 1} other groups; take 1 to {most}",
        )
        places = self.endpoints_per_router * self.num_routers
        _check(self.num_endpoints <= places, f"num_endpoints = {self.num_endpoints} is over the {places} places")
        if not self.num_endpoints:
            object.__setattr__(self, "num_endpoints", places)

    @property
    def num_routers(self) -> int:
        """Routers of all groups."""
        return self.routers_per_group * self.num_groups

    @property
    def group_offsets(self) -> list[int]:
        """How far each global port of a group reaches, in groups, sorted; it holds d as often as ``g - d``.

        All distances come round equally often; what remains goes to the nearest on both sides. Where groups and ports
        are both odd in number one port stays free.
        """
        others = self.num_groups - 1
        if others == 0:
            return []
        rounds, rest = divmod(self.routers_per_group * self.global_links_per_router, others)
        extra = [offset for near in range(1, rest // 2 + 1) for offset in (near, self.num_groups - near)]
        if rest % 2 and self.num_groups % 2 == 0:
            extra.append(self.num_groups // 2)
        return sorted([*range(1, self.num_groups)] * rounds + extra)

    def counts(self) -> Counts:
        """Return endpoints, switches and links; those inside a group are electrical."""
        local = self.num_groups * self.routers_per_group * (self.routers_per_group - 1) // 2
        return Counts(self.num_endpoints, self.num_routers, self.num_groups * len(self.group_offsets) // 2, local)


@dataclass(frozen=True)
class SlimFly:
    """The graphs of McKay, Miller and Siran: diameter 2 and close to the Moore bound.

    ``q = 4 w + delta`` with delta in -1, 0, 1. A graph exists for prime powers; the integers follow for any such q.

    Attributes:
        q: Size of the field; there are ``2 q^2`` routers of ``(3 q - delta) / 2`` links.
        endpoints_per_router: p; 0: half the links, rounded up.
        num_endpoints: Endpoints in use; 0: all places.
    """

    q: int
    endpoints_per_router: int = 0
    num_endpoints: int = 0

    def __post_init__(self) -> None:
        _check(
            self.q >= 3 and self.q % 4 != 2,
            f"q = {self.q} is not 4 w - 1, 4 w or 4 w + 1; nearest: {max(3, self.q + 1)}",
        )
        if not self.endpoints_per_router:
            object.__setattr__(self, "endpoints_per_router", -(-self.degree // 2))
        places = self.num_routers * self.endpoints_per_router
        _check(self.num_endpoints <= places, f"num_endpoints = {self.num_endpoints} is over the {places} places")
        if not self.num_endpoints:
            object.__setattr__(self, "num_endpoints", places)

    @property
    def delta(self) -> int:
        """-1, 0 or 1."""
        return (self.q + 1) % 4 - 1

    @property
    def degree(self) -> int:
        """Links of a router to others, k'."""
        return (3 * self.q - self.delta) // 2

    @property
    def num_routers(self) -> int:
        """Both halves of the graph."""
        return 2 * self.q**2

    def counts(self) -> Counts:
        """Return endpoints, switches and links."""
        return Counts(self.num_endpoints, self.num_routers, self.q**2 * self.degree)


@dataclass(frozen=True)
class Torus:
    """A grid of routers closed in every dimension, each with ``endpoints_per_router`` endpoints."""

    dims: tuple[int, ...]
    endpoints_per_router: int = 1

    def __post_init__(self) -> None:
        _check(bool(self.dims) and min(self.dims) >= 1, f"dims = {self.dims}: each must be 1 or more; take (4, 4, 4)")

    @property
    def num_routers(self) -> int:
        """Product of the dimensions."""
        return math.prod(self.dims)

    @property
    def num_endpoints(self) -> int:
        """All places."""
        return self.num_routers * self.endpoints_per_router

    def counts(self) -> Counts:
        """Return endpoints, switches and links; a dimension of two has one link, not two."""
        links = sum(self.num_routers * (size > 1) // (2 if size == 2 else 1) for size in self.dims)
        return Counts(self.num_endpoints, self.num_routers, links)


@dataclass(frozen=True)
class FullyConnected:
    """``num_switches`` switches with a link between any two; endpoints fill one switch after the other."""

    num_switches: int
    endpoints_per_switch: int
    num_endpoints: int = 0

    def __post_init__(self) -> None:
        places = self.num_switches * self.endpoints_per_switch
        _check(self.num_endpoints <= places, f"num_endpoints = {self.num_endpoints} is over the {places} places")
        if not self.num_endpoints:
            object.__setattr__(self, "num_endpoints", places)

    def counts(self) -> Counts:
        """Return endpoints, switches and links."""
        return Counts(self.num_endpoints, self.num_switches, self.num_switches * (self.num_switches - 1) // 2)


Shape = FatTree | TwoZone | Dragonfly | SlimFly | Torus | FullyConnected


def cluster_shape(cluster: ClusterSpec, num_nodes: int | None = None) -> Shape:
    """Return the smallest shape of the cluster's topology that has a port for every NIC.

    ``network.num_endpoints``, where given, is what the network is bought for, unless ``num_nodes`` asks for another
    size.

    Args:
        cluster: With a network.
        num_nodes: Nodes; none: those of the cluster.

    Raises:
        PlanError: The cluster has no network, or its switches are too small for it.
    """
    network = cluster.network
    if network is None:
        raise PlanError(f"{cluster.name} has no network; add a [network] table, or plan one node")
    _check(num_nodes is None or num_nodes >= 1, f"num_nodes = {num_nodes}: a network joins 1 node or more")
    needed = (num_nodes or cluster.num_nodes) * network.nics_per_node
    num_endpoints = network.num_endpoints if num_nodes is None and network.num_endpoints else needed
    if num_endpoints < needed:
        raise PlanError(
            f"network.num_endpoints = {num_endpoints} is less than the {needed} ports of {cluster.num_nodes} nodes; "
            f"take {needed} or more"
        )
    if network.topology == "two_zone":
        return _two_zone(network, needed, num_endpoints)
    return network_shape(network, num_endpoints)


def network_shape(network: NetworkSpec, num_endpoints: int) -> Shape:
    """Return the smallest shape of a network's topology with a port for every endpoint, in whole nodes.

    Args:
        network: Topology, planes, switches and NICs of a node.
        num_endpoints: NIC ports; rounded up to whole nodes.

    Raises:
        PlanError: The switches are too small for it.
    """
    return _SHAPES[network.topology](network, -(-num_endpoints // network.nics_per_node) * network.nics_per_node)


def _tree(network: NetworkSpec, num_endpoints: int) -> FatTree:
    rails = network.topology == "multi_rail"
    planes = network.num_planes if network.topology == "multi_plane" else 1
    layers = 3 if network.topology == "fat_tree3" else 2
    ports = network.nics_per_node
    sizes = (network.switch_ports, layers, network.oversubscription, planes, ports, rails)
    if rails:
        group = FatTree(ports, network.switch_ports, 3, network.oversubscription, 1, ports, True).down * ports
        if -(-num_endpoints // group) * ports > network.switch_ports:
            sizes = (network.switch_ports, 3, network.oversubscription, 1, ports, True)
    return FatTree(num_endpoints, *sizes)


def _two_zone(network: NetworkSpec, num_endpoints: int, num_places: int = 0) -> TwoZone:
    """Zones with room for the nodes, a storage port for every fourth node and the joining links.

    ``num_places`` are what the leaves of both zones are bought for, storage and joining links included.
    """
    ports, half = network.nics_per_node, network.switch_ports // 2
    _check(half >= 1, f"switch_ports = {network.switch_ports}: a tree needs at least 2")
    nodes = -(-num_endpoints // (2 * ports))
    per_zone = nodes * ports
    joining = min(10, half, max(1, per_zone // 60))
    free = half * network.switch_ports - per_zone - 2 * joining
    storage = max(0, min(free, round(0.3 * per_zone)))
    leaves = max(-(-(per_zone + storage + 2 * joining) // half), -(-num_places // (2 * half)))
    most = 2 * ports * ((2 * half * half - 2 * min(10, half)) // ports)
    _check(
        leaves <= 2 * half,
        f"a zone of {per_zone} endpoints needs {leaves} leaves, but a switch of {network.switch_ports} ports joins "
        f"{2 * half}; {most} endpoints fit in both zones",
    )
    spines = _fewest(half, leaves, 2 * half)
    return TwoZone(nodes, storage, network.switch_ports, leaves, spines, 2, joining, ports)


def _dragonfly(network: NetworkSpec, num_endpoints: int) -> Dragonfly:
    """Balanced: ``a = 2 p = 2 h``."""
    h = next(h for h in range(1, num_endpoints + 2) if 2 * h * h * (2 * h * h + 1) >= num_endpoints)
    _check(
        4 * h - 1 <= network.switch_ports,
        f"a balanced dragonfly of {num_endpoints} endpoints needs switches of {4 * h - 1} ports, not "
        f"{network.switch_ports}; the most endpoints are {_most_dragonfly(network.switch_ports)}",
    )
    return Dragonfly(h, 2 * h, h, -(-num_endpoints // (2 * h * h)), num_endpoints)


def _most_dragonfly(ports: int) -> int:
    h = (ports + 1) // 4
    return 2 * h * h * (2 * h * h + 1)


def _slim_fly(network: NetworkSpec, num_endpoints: int) -> SlimFly:
    q = next(q for q in range(3, num_endpoints + 5) if _is_prime_power(q) and SlimFly(q).num_endpoints >= num_endpoints)
    per_router = -(-num_endpoints // (2 * q * q))
    ports = SlimFly(q).degree + per_router
    _check(
        ports <= network.switch_ports,
        f"a Slim Fly of {num_endpoints} endpoints needs switches of {ports} ports, not {network.switch_ports}; "
        "take larger switches or a fat tree",
    )
    return SlimFly(q, per_router, num_endpoints)


def _torus(network: NetworkSpec, num_endpoints: int) -> Torus:
    """Three dimensions, as near to a cube as the divisors allow."""
    options = [
        (a, b, num_endpoints // (a * b))
        for a in _divisors(num_endpoints)
        if a**3 <= num_endpoints
        for b in _divisors(num_endpoints // a)
        if a <= b and b * b <= num_endpoints // a
    ]
    return Torus(min(options, key=lambda dims: (dims[2] - dims[0], dims)))


def _fully_connected(network: NetworkSpec, num_endpoints: int) -> FullyConnected:
    """The fewest switches whose links carry a uniform exchange, or a single one."""
    for switches in range(1, network.switch_ports + 1):
        each = -(-num_endpoints // switches)
        if each + switches - 1 <= network.switch_ports and (each <= switches or switches == 1):
            return FullyConnected(switches, each, num_endpoints)
    half = network.switch_ports // 2
    raise PlanError(
        f"fully connected switches of {network.switch_ports} ports carry {half * (half + 1)} endpoints, not "
        f"{num_endpoints}; take fat_tree2"
    )


_SHAPES: dict[str, Callable[[NetworkSpec, int], Shape]] = {
    "fat_tree2": _tree,
    "fat_tree3": _tree,
    "multi_plane": _tree,
    "multi_rail": _tree,
    "two_zone": _two_zone,
    "dragonfly": _dragonfly,
    "slim_fly": _slim_fly,
    "torus": _torus,
    "fully_connected": _fully_connected,
}


def _fewest(uplinks: int, below: int, ports: int) -> int:
    """Return the smallest divisor of a switch's uplinks that takes those of all ``below`` switches."""
    return next(d for d in _divisors(uplinks) if d * ports >= below * uplinks)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _is_prime_power(q: int) -> bool:
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    while q % prime == 0:
        q //= prime
    return q == 1


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(message)
