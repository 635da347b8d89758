"""Traffic that models put on a network, as flows with their routes: all-to-all, and experts' dispatch and combine.

With one port per device, data enters the network on the plane of its target: a device hands it to the device of its
node that has a port there (PXN; DeepSeek-V3 on several planes, arXiv 2505.09343, 5.1). A token that goes to several
experts of a node crosses the network once and is copied inside the node (DeepSeek-V3 report, 3.2.2). Forwarded bytes
stream on: the flow that crosses the network also loads the fast links, in step with it. Left out: buffers in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cofire.errors import PlanError
from cofire.network.collectives import Messages
from cofire.network.expert_traffic import ExpertTraffic
from cofire.network.flowsim import Flows
from cofire.network.routing import Routes, device_routes
from cofire.network.topology import Floats, Ints, Network
from cofire.spec.hardware import Routing


@dataclass(frozen=True, eq=False)
class Pattern:
    """Flows and the way of each.

    Attributes:
        source: ``[num_flows]``, port that sends.
        target: ``[num_flows]``, port that receives.
        flows: Sizes and waits.
        routes: One row per flow.
    """

    source: Ints
    target: Ints
    flows: Flows
    routes: Routes


def ports_of(network: Network, num_nodes: int | None = None) -> Ints:
    """Return the ports of each node, ``[num_nodes, ports_per_node]``; device i of a node has port i.

    Args:
        network: Graph.
        num_nodes: The first so many nodes, such as those that compute beside storage nodes; none: all.

    Raises:
        PlanError: There are fewer nodes, or they have different numbers of ports.
    """
    every = np.bincount(network.node)
    count = every[:num_nodes]
    if num_nodes is not None and not 1 <= num_nodes <= len(every):
        raise PlanError(f"num_nodes = {num_nodes}: the network has {len(every)} nodes; take 1 to {len(every)}")
    if count.min() != count.max():
        raise PlanError(f"nodes have {count.min()} to {count.max()} ports; a pattern needs as many on each")
    return np.argsort(network.node, kind="stable")[: count.sum()].reshape(len(count), -1)


def place(
    network: Network,
    messages: Messages,
    routing: Routing = "adaptive",
    seed: int = 0,
    failed_planes: tuple[int, ...] = (),
    num_nodes: int | None = None,
) -> Pattern:
    """Return a collective's messages between the devices of a network, ranks counted node by node.

    Args:
        network: With the same number of ports on each node, one per rank.
        messages: Of the collective.
        routing: As in ``route``.
        seed: As in ``route``.
        failed_planes: Planes that carry nothing.
        num_nodes: As in :func:`ports_of`.

    Raises:
        PlanError: The network has fewer ports than the collective has ranks.
    """
    ports = ports_of(network, num_nodes)
    if messages.num_ranks > ports.size:
        raise PlanError(f"{messages.num_ranks} ranks do not fit on {ports.size} ports; build a larger network")
    near, far = (np.divmod(rank, ports.shape[1]) for rank in (messages.source, messages.target))
    routes = device_routes(network, near, far, routing, seed, failed_planes=failed_planes)
    return Pattern(ports[near], ports[far], messages.flows(), routes)


def all_to_all(
    network: Network,
    pair_bytes: float,
    routing: Routing = "adaptive",
    seed: int = 0,
    failed_planes: tuple[int, ...] = (),
    forwarded: bool = True,
    num_nodes: int | None = None,
) -> Pattern:
    """Return ``pair_bytes`` from every device to every other.

    Args:
        network: With the same number of ports on each node, one per device.
        pair_bytes: From one device to another.
        routing: As in ``route``.
        seed: As in ``route``.
        failed_planes: Planes that carry nothing; their devices send over the others.
        forwarded: One flow for all that a node sends to a device of another: its devices hand theirs to the one on the
            target's plane. Otherwise each device sends over its own way.
        num_nodes: As in :func:`ports_of`.
    """
    ports = ports_of(network, num_nodes)
    nodes, width = ports.shape
    near, far = np.divmod(np.arange(nodes * nodes), nodes)
    near, far = near[near != far], far[near != far]
    here, there = np.divmod(np.arange(width * width), width)
    if forwarded:
        device = np.tile(np.arange(width), len(near))
        ends = (np.repeat(near, width), device), (np.repeat(far, width), device)
        across = device_routes(network, *ends, routing, seed, failed_planes=failed_planes)
        across = _handed(network, across, ports, ends[0])
        size = np.full(len(device), width * pair_bytes)
    else:
        pairs = len(here)
        ends = (
            (np.repeat(near, pairs), np.tile(here, len(near))),
            (np.repeat(far, pairs), np.tile(there, len(near))),
        )
        across = device_routes(network, *ends, routing, seed, failed_planes=failed_planes)
        size = np.full(len(ends[0][0]), float(pair_bytes))
    other = here != there
    node = np.repeat(np.arange(nodes), other.sum())
    local = (node, np.tile(here[other], nodes)), (node, np.tile(there[other], nodes))
    inside = device_routes(network, *local, routing, seed, failed_planes=failed_planes)
    return Pattern(
        np.concatenate([ports[ends[0]], ports[local[0]]]),
        np.concatenate([ports[ends[1]], ports[local[1]]]),
        Flows(np.concatenate([size, np.full(len(node), float(pair_bytes))])),
        join_routes(across, inside),
    )


def join_routes(*parts: Routes) -> Routes:
    """Return the rows of several routes, one after the other."""
    start = np.concatenate([[0], *(np.diff(part.start) for part in parts)]).cumsum()
    return Routes(
        start,
        np.concatenate([part.link for part in parts]),
        np.concatenate([part.fraction for part in parts]),
        np.concatenate([part.latency_s for part in parts]),
    )


def _fast_links(network: Network) -> tuple[Ints, Ints]:
    """Return the link of each port to its node's fast links and the one from there; -1: none."""
    up = np.full(network.num_endpoints, -1)
    fast = np.flatnonzero((network.level[network.tail] == 0) & (network.level[network.head] < 0))
    up[network.tail[fast]] = fast
    return up, np.where(up >= 0, up ^ 1, -1)


def _handed(network: Network, routes: Routes, ports: Ints, source: tuple[Ints, Ints]) -> Routes:
    """Return the routes with the fast links that bring every device's equal part to the one that sends."""
    up, down = _fast_links(network)
    width = ports.shape[1]
    if width == 1:
        return routes
    if (up[ports] < 0).any():
        raise PlanError("devices without fast links cannot forward; give the nodes some, or forwarded = False")
    node, device = source
    row = np.arange(routes.num_flows)
    others = ports[node]
    keep = np.arange(width)[None, :] != device[:, None]
    flow = np.concatenate([np.repeat(row, np.diff(routes.start)), np.repeat(row, width - 1), row])
    link = np.concatenate([routes.link, up[others[keep]], down[ports[source]]])
    handing = np.full((width - 1) * len(row), 1 / width)
    fraction = np.concatenate([routes.fraction, handing, np.full(len(row), (width - 1) / width)])
    order = np.argsort(flow, kind="stable")
    fast_s = network.latency_s[up[others[:, 0]]] + network.latency_s[down[ports[source]]]
    start = routes.start + width * np.arange(routes.num_flows + 1)
    return Routes(start, link[order], fraction[order], routes.latency_s + fast_s)


def expert_pattern(
    network: Network,
    traffic: ExpertTraffic,
    token_bytes: float,
    combine: bool = False,
    routing: Routing = "adaptive",
    seed: int = 0,
    failed_planes: tuple[int, ...] = (),
) -> Pattern:
    """Return the flows of dispatch, or of combine, which takes the same ways back.

    Copies inside a node stream beside the network's flows, as kernels do that forward piece by piece.
    """
    ports = ports_of(network, len(traffic.crossing))
    near, number, far = np.nonzero(traffic.crossing)
    node, first, second = np.nonzero(traffic.handed)
    ends = (np.concatenate([near, node]), np.concatenate([number, first]))
    others = (np.concatenate([far, node]), np.concatenate([number, second]))
    copies: Floats = np.concatenate([traffic.crossing[near, number, far], traffic.handed[node, first, second]]).astype(
        float
    )
    if combine:
        ends, others = others, ends
    routes = device_routes(network, ends, others, routing, seed, failed_planes=failed_planes)
    return Pattern(ports[ends], ports[others], Flows(copies * token_bytes), routes)
