"""What each axis of a layout sends, and how long that takes when nothing hides it.

Devices are numbered with ``tp`` running fastest, then ``dp`` (with ``ep`` inside it), then ``pp``: the axes that
send most lie on the fast links. Times are latency plus bytes over what a link reaches of its bandwidth.

- ``tp``: two all-gathers and two reduce-scatters of a micro-batch's hidden states per layer and pass with sequence
  parallelism, the same bytes as two all-reduces without.
- ``ep``: a token goes once to each node that holds one of its experts, over the network, and from there to the devices
  over the fast links (DeepSeek-V3 technical report, section 3.2.2). The slower of the two counts.
- ``pp``: hidden states of a micro-batch, split over ``tp``.
- ``dp``: gradients are reduce-scattered and weights gathered back, first inside nodes, so that each device of a node
  sends its share alone over the network.

Left out: contention between axes, which the flow simulation of ``cofire.network`` shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cofire.errors import PlanError
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec

# An FP8 tile of 128 numbers carries one FP32 scale.
_FP8_BYTES = 1 + 4 / 128
_HOST_LATENCY_S = 10e-6  # of a copy through the host: an assumption, and little beside the copy itself


@dataclass(frozen=True)
class Link:
    """What a device reaches of a link, one way."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def time_s(self, size_bytes: float, hops: float = 1) -> float:
        """Seconds of ``size_bytes`` in ``hops`` rounds; nothing for no bytes."""
        return 0.0 if size_bytes == 0 else size_bytes / self.bandwidth_bytes_per_s + hops * self.latency_s


@dataclass(frozen=True)
class ExpertTraffic:
    """One dispatch or combine of one micro-batch, on one device.

    Attributes:
        nodes: Distinct nodes that a token's experts are on, expected.
        devices: Distinct devices.
        network_bytes: Sent over the network.
        scale_up_bytes: Sent over the fast links.
        time_s: Of the slower of the two.
    """

    nodes: float
    devices: float
    network_bytes: float
    scale_up_bytes: float
    time_s: float


class Links:
    """The links of a cluster as one device sees them."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster = cluster
        self.domain = 1
        self.scale_up = None
        if cluster.scale_up is not None:
            fast = cluster.scale_up
            self.domain = cluster.scale_up_size
            self.scale_up = Link(fast.bandwidth_bytes_per_s * fast.efficiency.value, fast.latency_s.value)
        elif cluster.host is not None:  # devices of a node reach each other through the host
            self.domain = cluster.devices_per_node
            self.scale_up = Link(cluster.host.pcie_bandwidth_bytes_per_s, _HOST_LATENCY_S)
        self.network = None
        if cluster.network is not None:
            wires = cluster.network
            share = wires.nics_per_node / cluster.devices_per_node
            rate = wires.bandwidth_bytes_per_s * share * wires.efficiency.value / wires.oversubscription
            self.network = Link(rate, wires.cross_leaf_latency_s.value)

    def between(self, num_devices: int) -> Link:
        """Return the link that a group of ``num_devices`` neighbouring devices uses.

        Raises:
            PlanError: The cluster has none.
        """
        if self.scale_up is not None and num_devices <= self.domain:
            return self.scale_up
        if self.network is None:
            raise PlanError(
                f"{self.cluster.name} has no network, but a group of {num_devices} devices needs one beyond its "
                f"{self.domain}; set cluster.network or take degrees up to {self.domain}"
            )
        return self.network


def tensor_bytes(model: ModelSpec, layout: ParallelSpec, sequence_length: int) -> float:
    """Bytes that one all-gather or reduce-scatter of a micro-batch sends from a device."""
    width = 4 if layout.precision == "fp32" else 2
    tokens = layout.micro_batch_size * sequence_length
    return tokens * model.hidden_size * width * (layout.tp - 1) / layout.tp


def transfer_bytes(model: ModelSpec, layout: ParallelSpec, sequence_length: int) -> float:
    """Bytes that one device sends to the next stage for a micro-batch."""
    width = 4 if layout.precision == "fp32" else 2
    return layout.micro_batch_size * sequence_length * model.hidden_size * width / layout.tp


def expected_distinct(num_places: int, num_experts: int, num_chosen: int) -> float:
    """Expected places of ``num_places`` equal ones that hold a token's experts: ``G (1 - C(E-E/G, k) / C(E, k))``."""
    rest = num_experts - num_experts / num_places
    if rest < num_chosen:
        return float(num_places)
    log = math.lgamma
    missed = log(rest + 1) - log(rest - num_chosen + 1) - log(num_experts + 1) + log(num_experts - num_chosen + 1)
    return num_places * (1 - math.exp(missed))


def expert_traffic(
    model: ModelSpec, layout: ParallelSpec, sequence_length: int, links: Links, way: str
) -> ExpertTraffic:
    """Return what a ``dispatch`` or ``combine`` of one micro-batch sends.

    Dispatch is FP8 where the recipe is; combine is BF16 (DeepSeek-V3 technical report, section 3.3.3).
    """
    moe = model.moe
    if moe is None or layout.ep == 1:
        return ExpertTraffic(1, 1, 0.0, 0.0, 0.0)
    width = 4 if layout.precision == "fp32" else 2
    number = _FP8_BYTES if way == "dispatch" and layout.precision == "fp8" else width
    tokens = layout.micro_batch_size * sequence_length / layout.tp
    nodes = max(1, layout.ep // links.domain)
    experts, chosen = moe.num_routed_experts, moe.num_experts_per_token
    reached = expected_distinct(nodes, experts, chosen)
    if moe.num_expert_groups > 1 and moe.num_expert_groups >= nodes:
        reached = min(reached, moe.num_limited_groups)
    devices = max(reached, expected_distinct(layout.ep, experts, chosen))
    size = tokens * model.hidden_size * number
    network_bytes = size * reached * (nodes - 1) / nodes
    inside = min(layout.ep, links.domain)
    scale_up_bytes = size * devices * (inside - 1) / inside
    if nodes == 1:
        return ExpertTraffic(1, devices, 0.0, scale_up_bytes, links.between(layout.ep).time_s(scale_up_bytes))
    time_s = links.between(layout.ep).time_s(network_bytes)
    if links.scale_up is not None:
        time_s = max(time_s, links.scale_up.time_s(scale_up_bytes) + links.between(layout.ep).latency_s)
    return ExpertTraffic(reached, devices, network_bytes, scale_up_bytes, time_s)


def reduce_s(links: Links, size_bytes: float, group: int, stride: int) -> float:
    """Seconds of a reduce-scatter or an all-gather over a group, first inside nodes, then between them.

    Args:
        links: Of the cluster.
        size_bytes: What each device has (reduce-scatter) or gets (all-gather).
        group: Devices.
        stride: How far apart in number two neighbours of the group are.
    """
    if group <= 1 or size_bytes == 0:
        return 0.0
    inside = min(group, max(1, links.domain // stride))
    nodes = -(-group // inside)
    time_s = 0.0
    if inside > 1 and links.scale_up is not None:
        time_s += links.scale_up.time_s(size_bytes * (inside - 1) / inside, inside - 1)
    if nodes > 1:
        between = links.between(links.domain + 1)
        time_s += between.time_s(size_bytes / inside * (nodes - 1) / nodes, math.log2(nodes))
    return time_s
