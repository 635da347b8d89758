"""Traffic that models put on a network, as flows with their routes: all-to-all, and experts' dispatch and combine.

With one port per device, data enters the network on the plane of its target: a device hands it to the device of its
node that has a port there (PXN; DeepSeek-V3 on several planes, arXiv 2505.09343, 5.1). A token that goes to several
experts of a node crosses the network once and is copied inside the node (DeepSeek-V3 report, 3.2.2). Forwarded bytes
stream on: the flow that crosses the network also loads the fast links, in step with it. Left out: where a token's
weight or index travels, and experts with redundant copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError
from cofire.network.collectives import Messages
from cofire.network.flowsim import Flows
from cofire.network.routing import Routes, device_routes
from cofire.network.topology import Floats, Ints, Network
from cofire.spec.hardware import Routing

# DeepSeek-V3 report, 3.3.2: activations travel in tiles of 128 numbers with a scale each.
_TILE, _SCALE_BYTES = 128, 4


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


def ports_of(network: Network) -> Ints:
    """Return the ports of each node, ``[num_nodes, ports_per_node]``; device i of a node has port i.

    Raises:
        PlanError: Nodes have different numbers of ports.
    """
    count = np.bincount(network.node)
    if count.min() != count.max():
        raise PlanError(f"nodes have {count.min()} to {count.max()} ports; a pattern needs as many on each")
    return np.argsort(network.node, kind="stable").reshape(len(count), -1)


def place(network: Network, messages: Messages, routing: Routing = "adaptive", seed: int = 0) -> Pattern:
    """Return a collective's messages between the devices of a network, ranks counted node by node.

    Raises:
        PlanError: The network has fewer ports than the collective has ranks.
    """
    ports = ports_of(network)
    if messages.num_ranks > ports.size:
        raise PlanError(f"{messages.num_ranks} ranks do not fit on {ports.size} ports; build a larger network")
    near, far = (np.divmod(rank, ports.shape[1]) for rank in (messages.source, messages.target))
    routes = device_routes(network, near, far, routing, seed)
    return Pattern(ports[near], ports[far], messages.flows(), routes)


def all_to_all(
    network: Network,
    pair_bytes: float,
    routing: Routing = "adaptive",
    seed: int = 0,
    failed_planes: tuple[int, ...] = (),
    forwarded: bool = True,
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
    """
    ports = ports_of(network)
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


def expected_groups(num_experts: int, num_experts_per_token: int, num_groups: int) -> float:
    """Return how many groups (nodes, devices) a token reaches on average when its experts are drawn evenly.

    ``G (1 - C(E - E/G, k) / C(E, k))`` for G groups, E experts, k of them per token.

    Raises:
        PlanError: The groups do not divide the experts.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise PlanError(f"num_groups = {num_groups} must divide num_experts = {num_experts}")
    missed = num_experts - num_experts // num_groups
    return num_groups * (1 - math.comb(missed, num_experts_per_token) / math.comb(num_experts, num_experts_per_token))


def sample_experts(
    num_tokens: int,
    num_experts: int,
    num_experts_per_token: int,
    num_groups: int = 1,
    num_limited_groups: int | None = None,
    seed: int = 0,
) -> Ints:
    """Return the experts of tokens whose scores are independent, ``[num_tokens, num_experts_per_token]``.

    Node-limited routing (DeepSeek-V3 report, 2.1.2): the ``num_limited_groups`` M groups with the largest sum of their
    ``num_experts_per_token / M`` best scores; the experts are the best of those groups.

    Raises:
        PlanError: The groups do not divide the experts, or those left are too few.
    """
    limit = num_groups if num_limited_groups is None else num_limited_groups
    if num_groups < 1 or num_experts % num_groups or not 1 <= limit <= num_groups:
        raise PlanError(f"{limit} of {num_groups} groups of {num_experts} experts: groups must divide the experts")
    size = num_experts // num_groups
    if num_experts_per_token > limit * size:
        raise PlanError(
            f"{limit} groups have {limit * size} experts, below num_experts_per_token = {num_experts_per_token}"
        )
    score = np.random.default_rng(seed).random((num_tokens, num_experts))
    if limit < num_groups:
        best = min(max(num_experts_per_token // limit, 1), size)
        grouped = score.reshape(num_tokens, num_groups, size)
        strength = np.partition(grouped, size - best, axis=2)[:, :, size - best :].sum(2)
        out = np.argpartition(strength, num_groups - limit, axis=1)[:, : num_groups - limit]
        grouped[np.arange(num_tokens)[:, None], out] = -np.inf
    first = num_experts - num_experts_per_token
    return (
        np.argpartition(score, first, axis=1)[:, first:] if first else np.tile(np.arange(num_experts), (num_tokens, 1))
    )


def sampled_groups(expert_index: Ints, num_experts: int, num_groups: int) -> float:
    """Return how many groups the tokens of ``expert_index [num_tokens, k]`` reach on average."""
    group = np.sort(expert_index // (num_experts // num_groups), axis=1)
    return float(1 + (np.diff(group, axis=1) != 0).sum(1).mean())


def dispatch_token_bytes(hidden_size: int, number_bytes: float = 1.0) -> float:
    """Return what a token's activation weighs; a scale goes with each tile where a number takes one byte or less."""
    scales = -(-hidden_size // _TILE) * _SCALE_BYTES if number_bytes <= 1 else 0
    return hidden_size * number_bytes + scales


@dataclass(frozen=True, eq=False)
class ExpertTraffic:
    """Copies of tokens that dispatch moves; combine moves as many the other way.

    Attributes:
        crossing: ``[num_nodes, devices_per_node, num_nodes]``, from a device over the network to the device of its
            number on another node.
        handed: ``[num_nodes, devices_per_node, devices_per_node]``, from there, or from a token's own device, over the
            fast links to another device of the node.
    """

    crossing: NDArray[np.int64]
    handed: NDArray[np.int64]


def expert_traffic(expert_index: Ints, num_experts: int, devices_per_node: int) -> ExpertTraffic:
    """Count the copies of tokens between devices that each hold an equal run of experts.

    Args:
        expert_index: ``[num_devices, num_tokens, num_experts_per_token]``, where the tokens of each device go.
        num_experts: Spread over the devices in order.
        devices_per_node: Of the devices, consecutive ones.

    Raises:
        PlanError: Experts or nodes do not divide.
    """
    devices, tokens, _ = expert_index.shape
    if num_experts % devices or devices % devices_per_node:
        raise PlanError(
            f"{devices} devices must divide num_experts = {num_experts}, and devices_per_node = {devices_per_node} them"
        )
    nodes = devices // devices_per_node
    crossing = np.zeros((nodes, devices_per_node, nodes), np.int64)
    handed = np.zeros((nodes, devices_per_node, devices_per_node), np.int64)
    for device in range(devices):
        hit = np.zeros((tokens, devices), bool)
        hit[np.arange(tokens)[:, None], expert_index[device] // (num_experts // devices)] = True
        by_node = hit.reshape(tokens, nodes, devices_per_node)
        node, number = divmod(device, devices_per_node)
        crossing[node, number] = by_node.any(2).sum(0)
        crossing[node, number, node] = 0
        handed[:, number] += by_node.sum(0)
    device = np.arange(devices_per_node)
    handed[:, device, device] = 0
    return ExpertTraffic(crossing, handed)


def expert_pattern(
    network: Network,
    traffic: ExpertTraffic,
    token_bytes: float,
    combine: bool = False,
    routing: Routing = "adaptive",
    seed: int = 0,
) -> Pattern:
    """Return the flows of dispatch, or of combine, which takes the same ways back.

    Copies inside a node stream beside the network's flows, as kernels do that forward piece by piece.
    """
    ports = ports_of(network)
    near, number, far = np.nonzero(traffic.crossing)
    node, first, second = np.nonzero(traffic.handed)
    ends = (np.concatenate([near, node]), np.concatenate([number, first]))
    others = (np.concatenate([far, node]), np.concatenate([number, second]))
    copies: Floats = np.concatenate([traffic.crossing[near, number, far], traffic.handed[node, first, second]]).astype(
        float
    )
    if combine:
        ends, others = others, ends
    routes = device_routes(network, ends, others, routing, seed)
    return Pattern(ports[ends], ports[others], Flows(copies * token_bytes), routes)
