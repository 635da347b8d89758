"""What experts put on a network: nodes that a token reaches, copies to send, and the time of an exchange by formula.

Experts lie evenly over devices in their order. A token that goes to several experts of a node crosses the network once
and is copied inside the node (DeepSeek-V3 report, 3.2.2), to each device once. Node-limited routing: 2.1.2 of that
report. Left out: where a token's weight or index travels, and experts with redundant copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError
from cofire.network.collective_time import Group
from cofire.network.topology import Ints

# DeepSeek-V3 report, 3.3.2: activations travel in tiles of 128 numbers with a scale each.
_TILE, _SCALE_BYTES = 128, 4
# Tokens that a mean is taken over: its error is below 0.1 %.
_SAMPLE = 20_000


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


@lru_cache(maxsize=256)
def groups_reached(
    num_experts: int,
    num_experts_per_token: int,
    num_parts: int,
    num_groups: int = 1,
    num_limited_groups: int | None = None,
) -> float:
    """Return how many of ``num_parts`` equal parts of the experts (nodes, devices) a token reaches on average.

    Without a limit by formula; with one over 20,000 sampled tokens, which takes about 0.1 s once per model.

    Raises:
        PlanError: Parts or groups do not divide the experts.
    """
    if num_limited_groups is None or num_limited_groups >= num_groups:
        return expected_groups(num_experts, num_experts_per_token, num_parts)
    if num_experts % num_parts:
        raise PlanError(f"num_groups = {num_parts} must divide num_experts = {num_experts}")
    index = _sampled(num_experts, num_experts_per_token, num_groups, num_limited_groups)
    return sampled_groups(index, num_experts, num_parts)


@lru_cache(maxsize=8)  # nodes and devices, and every degree of expert parallelism, ask of the same tokens
def _sampled(num_experts: int, num_experts_per_token: int, num_groups: int, num_limited_groups: int) -> Ints:
    return sample_experts(_SAMPLE, num_experts, num_experts_per_token, num_groups, num_limited_groups)


def expert_exchange_time_s(
    num_tokens: float, token_bytes: float, group: Group, nodes_reached: float, devices_reached: float
) -> float:
    """Return the time of a dispatch, or of a combine, with even load.

    Args:
        num_tokens: Of each device.
        token_bytes: Of one copy, such as ``dispatch_token_bytes``.
        group: Devices that hold the experts, each with a port.
        nodes_reached: Nodes per token on average, its own among them where it reaches that.
        devices_reached: Devices per token on average.

    Returns:
        Seconds: the longer of the network's part and the fast links', after their latencies.
    """
    nodes, width = group.num_nodes, group.ranks_per_node
    time = latency = 0.0
    if nodes > 1:
        copies = num_tokens * nodes_reached * (nodes - 1) / nodes
        time, latency = copies * token_bytes / group.across.bandwidth_bytes_per_s, group.across.latency_s
    if width > 1:
        handed = num_tokens * devices_reached * (width - 1) / width
        time = max(time, handed * token_bytes / group.inside.bandwidth_bytes_per_s)
        latency += group.inside.latency_s
    return latency + time
