"""Diameter, mean path, bisection and link loads of a network in closed form, without building it.

A load is that of the busiest link between switches over its bandwidth when every endpoint sends at its full rate: 1
means that the network keeps up, 2 that it takes twice as long. The all-to-all is uniform inside a plane, its paths
shortest and evenly shared. The all-reduce is a ring per port index over the nodes in order, or, where every switch
carries endpoints, one ring laid along links. Sources: graph counting; for dragonfly arXiv 2505.09343, table 3, gives
the parameters, for Slim Fly the second eigenvalue (q - delta) / 2 of its graph gives the bound on the bisection.

Left out: what routing loses (``cofire.network.routing`` and the flow simulation tell), and patterns chosen by an
adversary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cofire.network.shapes import Dragonfly, FatTree, FullyConnected, Shape, SlimFly, Torus, TwoZone, cluster_shape
from cofire.spec.hardware import ClusterSpec
from cofire.spec.spec_type import Spec


class NetworkFacts(Spec):
    """What a shape allows.

    ``diameter_links`` and ``mean_links`` count links from endpoint to endpoint, between ports that reach each other
    without leaving their plane or zone. ``bisection_bytes_per_s`` is what one half can send to the other at least.
    ``exact`` is false where groups are joined unevenly or places are empty, so that the figures are estimates.
    """

    endpoints: int
    switches: int
    links: int
    diameter_links: int
    mean_links: float
    bisection_bytes_per_s: float
    all_to_all_load: float
    all_reduce_load: float
    exact: bool


def analyse(shape: Shape, bandwidth_bytes_per_s: float = 50e9) -> NetworkFacts:
    """Return what a shape allows.

    Args:
        shape: Of the network.
        bandwidth_bytes_per_s: Of every cable, one way.
    """
    counts = shape.counts()
    formulas: dict[type[Any], Callable[[Any], tuple[int, float, float, float, float, bool]]] = {
        FatTree: _fat_tree,
        TwoZone: _two_zone,
        Dragonfly: _dragonfly,
        SlimFly: _slim_fly,
        Torus: _torus,
        FullyConnected: _fully_connected,
    }
    diameter, mean, cut, all_to_all, all_reduce, exact = formulas[type(shape)](shape)
    return NetworkFacts(
        endpoints=counts.endpoints,
        switches=counts.switches,
        links=counts.links,
        diameter_links=diameter,
        mean_links=mean,
        bisection_bytes_per_s=min(cut, counts.endpoints / 2) * bandwidth_bytes_per_s,
        all_to_all_load=all_to_all,
        all_reduce_load=all_reduce,
        exact=exact,
    )


def analyse_cluster(cluster: ClusterSpec, num_nodes: int | None = None) -> NetworkFacts:
    """Return what a cluster's network allows, at the bandwidth that its links reach.

    Args:
        cluster: With a network.
        num_nodes: Nodes; none: as many as the network is bought for.

    Raises:
        PlanError: The cluster has no network, or its switches are too small.
    """
    shape, network = cluster_shape(cluster, num_nodes), cluster.network
    assert network is not None  # cluster_shape refuses a cluster without one
    return analyse(shape, network.bandwidth_bytes_per_s * network.efficiency.value)


def strong_scaling_efficiency(base_devices: int, base_s: float, devices: int, time_s: float) -> float:
    """Return the share of the ideal speed-up that one and the same work reaches on more devices, ``T0 n0 / (T n)``.

    Args:
        base_devices: n0.
        base_s: T0, time of a step on them.
        devices: n.
        time_s: T, time of the same step on these.
    """
    return base_s * base_devices / (time_s * devices)


def weak_scaling_efficiency(base_s: float, time_s: float) -> float:
    """Return ``T0 / T`` for work that grows with the devices."""
    return base_s / time_s


def _fat_tree(shape: FatTree) -> tuple[int, float, float, float, float, bool]:
    n, up = shape.endpoints_per_plane, shape.up
    ports = shape.ports_per_node // shape.num_planes
    # Endpoints of each leaf: full ones, and one that is filled in part (with rails, one per port).
    alike, fill = (ports, n // ports) if shape.rails else (1, n)
    leaves = np.repeat(np.minimum(fill - np.arange(0, fill, shape.down), shape.down), alike).astype(np.float64)
    pods = np.add.reduceat(leaves, np.arange(0, len(leaves), shape.leaves_per_pod))
    pairs = max(n * (n - 1), 1)
    near, middle = (leaves * (leaves - 1)).sum(), (pods * (pods - 1)).sum()
    mean = (2 * near + 4 * (middle - near) + 6 * (pairs - middle)) / pairs
    diameter = 2 if len(leaves) == 1 else 4 if len(pods) == 1 else 6

    pod_links = up * (shape.switch_ports // 2)
    others = max(n - 1, 1)
    load = float((leaves * (n - leaves)).max() / others / up)
    cut = n / 2 if len(leaves) == 1 else len(leaves) * up / 2
    leaving = 1 if shape.rails else min(ports, shape.down)
    ring = 0.0 if len(leaves) == 1 else leaving / up
    if len(pods) > 1:
        load = max(load, float((pods * (n - pods)).max() / others / pod_links))
        cut = min(cut, len(pods) * pod_links / 2)
        ring = max(ring, min(ports, pods.max()) / pod_links)
    even = len(set(leaves)) == 1 and len(set(pods)) == 1 and shape.num_top_switches == 0
    return diameter, mean, cut * shape.num_planes, load, ring, even


def _two_zone(shape: TwoZone) -> tuple[int, float, float, float, float, bool]:
    """Paths are those inside a zone; the bisection, and the all-to-all of everyone, pass the joining switches."""
    half = shape.num_endpoints // 2
    per_leaf = half / shape.num_leaves
    pairs = max(half * (half - 1), 1)
    near = half * (per_leaf - 1)
    joining = shape.num_joining_switches * shape.cross_links
    load = half * half / (2 * half - 1) / joining if joining else np.inf
    return 4, (2 * near + 4 * (pairs - near)) / pairs, float(joining), load, 1 / max(joining, 1), False


def _dragonfly(shape: Dragonfly) -> tuple[int, float, float, float, float, bool]:
    p, a, g, n = shape.endpoints_per_router, shape.routers_per_group, shape.num_groups, shape.num_endpoints
    ports = len(shape.group_offsets)
    joined = ports // (g - 1) if g > 1 else 0
    exact = n == p * a * g and (g == 1 or ports == g - 1)
    # Routers at one, two and three links from a router, if each pair of groups has a single link.
    direct = min(ports / a, g - 1)
    far = g - 1 - direct
    hops = (a - 1) + direct * (1 + 2 * (a - 1)) + far * (2 + 3 * (a - 1))
    mean = 2 + hops * p / max(p * a * g - 1, 1)
    others = max(n - 1, 1)
    local = (p * p + 2 * direct * a * p * p) / others if a > 1 else 0.0
    load = max(local, (a * p) ** 2 / (others * joined) if joined else 0.0)
    if g > 1:
        cut = (g // 2) * ((g + 1) // 2) * ports / (g - 1)
    else:
        cut = (a // 2) * ((a + 1) // 2)
    diameter = 2 + (a > 1) + (g > 1) * (1 + (a > 1))
    return diameter, mean, cut, load, 1.0, exact


def _slim_fly(shape: SlimFly) -> tuple[int, float, float, float, float, bool]:
    """The load is the mean over links; the graph is near enough to edge-transitive for that."""
    routers, degree, p, n = shape.num_routers, shape.degree, shape.endpoints_per_router, shape.num_endpoints
    hops = degree + 2 * (routers - 1 - degree)
    others = max(routers * p - 1, 1)
    return 4, 2 + hops * p / others, shape.q**3 / 2, p * p * hops / degree / others, 1.0, n == routers * p


def _torus(shape: Torus) -> tuple[int, float, float, float, float, bool]:
    n, p = shape.num_endpoints, shape.endpoints_per_router
    # Mean distance along a ring, its own place included.
    means = [size / 4 if size % 2 == 0 else (size * size - 1) / (4 * size) for size in shape.dims]
    ratio = n / max(n - 1, 1)
    load = max(mean * p * ratio / (1 if size == 2 else 2) for mean, size in zip(means, shape.dims, strict=True))
    longest = max(shape.dims)
    halves = (longest // 2) / longest if longest > 1 else 0.0
    cut = shape.num_routers / longest * (1 if longest == 2 else 2) if halves else 0.0
    diameter = 2 + sum(size // 2 for size in shape.dims)
    return diameter, 2 + sum(means) * ratio, cut, load, 1.0, longest % 2 == 0


def _fully_connected(shape: FullyConnected) -> tuple[int, float, float, float, float, bool]:
    s, p, n = shape.num_switches, shape.endpoints_per_switch, shape.num_endpoints
    others = max(s * p - 1, 1)
    if s == 1:
        return 2, 2.0, n / 2, 0.0, 0.0, True
    return 3, 2 + (s - 1) * p / others, float((s // 2) * ((s + 1) // 2)), p * p / others, 1.0, n == s * p
