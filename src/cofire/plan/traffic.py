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

from dataclasses import dataclass

from cofire.errors import PlanError
from cofire.network.collective_time import Group, Wire, collective_time_s
from cofire.network.expert_traffic import expert_exchange_time_s, groups_reached
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec

# An FP8 tile of 128 numbers carries one FP32 scale.
_FP8_BYTES = 1 + 4 / 128
_HOST_LATENCY_S = 10e-6  # of a copy through the host: an assumption, and little beside the copy itself


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
    """The wires of a cluster as one device sees them, at what they reach of their bandwidth."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster = cluster
        self.domain = 1
        self.scale_up: Wire | None = None
        if cluster.scale_up is not None:
            fast = cluster.scale_up
            self.domain = cluster.scale_up_size
            self.scale_up = Wire(fast.latency_s.value, fast.bandwidth_bytes_per_s * fast.efficiency.value)
        elif cluster.host is not None:  # devices of a node reach each other through the host
            self.domain = cluster.devices_per_node
            self.scale_up = Wire(_HOST_LATENCY_S, cluster.host.pcie_bandwidth_bytes_per_s)
        self.network: Wire | None = None
        if cluster.network is not None:
            wires = cluster.network
            share = wires.nics_per_node / cluster.devices_per_node
            rate = wires.bandwidth_bytes_per_s * share * wires.efficiency.value / wires.oversubscription
            self.network = Wire(wires.cross_leaf_latency_s.value, rate)

    def group(self, size: int, stride: int = 1) -> Group:
        """Return ``size`` devices, each ``stride`` after the one before, as nodes and ranks in them.

        Raises:
            PlanError: They are on several nodes, and the cluster has no network.
        """
        inside = min(size, max(1, self.domain // stride))
        nodes = -(-size // inside)
        if nodes > 1 and self.network is None:
            raise PlanError(
                f"{self.cluster.name} has no network, but a group of {size} devices needs one beyond its "
                f"{self.domain}; set cluster.network or take degrees up to {self.domain}"
            )
        return Group(nodes, inside, self.scale_up, self.network)

    def transfer_s(self, size_bytes: float, num_devices: int) -> float:
        """Return the time of a message within ``num_devices`` neighbouring devices, across nodes if they span some."""
        return collective_time_s("point_to_point", size_bytes, self.group(num_devices))

    def reduce_s(self, size_bytes: float, group: int, stride: int) -> float:
        """Return the time of a reduce-scatter or an all-gather, rings or first inside nodes, whichever is faster.

        Args:
            size_bytes: What each device has (reduce-scatter) or gets (all-gather).
            group: Devices.
            stride: How far apart in number two neighbours of the group are.
        """
        return 0.0 if size_bytes == 0 else collective_time_s("reduce_scatter", size_bytes, self.group(group, stride))


def hidden_bytes(model: ModelSpec, layout: ParallelSpec, sequence_length: int) -> float:
    """Bytes of a micro-batch's hidden states, which the tensor axis gathers and scatters."""
    width = 4 if layout.precision == "fp32" else 2
    return layout.micro_batch_size * sequence_length * model.hidden_size * width


def transfer_bytes(model: ModelSpec, layout: ParallelSpec, sequence_length: int) -> float:
    """Bytes that one device sends to the next stage for a micro-batch."""
    return hidden_bytes(model, layout, sequence_length) / layout.tp


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
    group = links.group(layout.ep)
    nodes, inside = group.num_nodes, group.ranks_per_node
    limit = moe.num_limited_groups if moe.num_expert_groups > 1 else None
    question = (moe.num_routed_experts, moe.num_experts_per_token)
    reached = groups_reached(*question, nodes, moe.num_expert_groups, limit)
    devices = groups_reached(*question, layout.ep, moe.num_expert_groups, limit)
    size = model.hidden_size * number
    return ExpertTraffic(
        nodes=reached,
        devices=devices,
        network_bytes=tokens * size * reached * (nodes - 1) / nodes,
        scale_up_bytes=tokens * size * devices * (inside - 1) / inside,
        time_s=expert_exchange_time_s(tokens, size, group, reached, devices),
    )
