"""What the host allows when gradients are reduced in its memory (HFReduce) or by a ring over PCIe.

arXiv 2408.14158, section IV: the memory passes of HFReduce and its bound by the NIC, the root port that two devices
share, the variant with NVLink bridges, and why a ring of peer copies is slow on these hosts. All figures are
algorithm bandwidths: bytes of gradient per second, each device holding the whole gradient. Bounds, not predictions.

Left out: latency of small messages, kernels that start late, and contention by other traffic.
"""

from __future__ import annotations

from typing import Literal

from cofire.errors import PlanError
from cofire.spec.figure import Figure
from cofire.spec.hardware import ClusterSpec, HostSpec
from cofire.spec.spec_type import Spec

Resource = Literal["host memory", "NIC", "PCIe slot", "shared root port", "bridge"]

# Of a PCIe port's bandwidth, what each direction gets while both are busy. The paper gives 37.5 GB/s "in total" for
# the shared port and says that it is less with both directions busy.
DUPLEX = Figure(value=0.5, low=0.43, high=0.55, label="assumed", source="arXiv 2408.14158, section IV")

# GPU and NIC as PCIe peers on hosts without chained writes.
PEER_BYTES_PER_S = Figure(
    value=9 * 2**30, low=8.5 * 2**30, high=9.5 * 2**30, label="measured", source="arXiv 2408.14158, section IV"
)


class MemoryPasses(Spec):
    """How often a byte of gradient is written to or read from host memory, step by step."""

    device_to_host: float
    reduce: float
    network: float
    host_to_device: float

    @property
    def total(self) -> float:
        """All passes."""
        return self.device_to_host + self.reduce + self.network + self.host_to_device


class HostReduceBounds(Spec):
    """Upper bounds on the algorithm bandwidth of an all-reduce through host memory.

    ``bounds_bytes_per_s`` has one per resource; the least is the ``ceiling``, and its resource ``binds``.
    """

    passes: MemoryPasses
    bounds_bytes_per_s: dict[Resource, float]
    ceiling_bytes_per_s: Figure
    binds: Resource


def memory_passes(
    num_devices: int = 8, num_nodes: int = 3, gdrcopy: bool = True, paired: bool = False, num_sockets: int = 2
) -> MemoryPasses:
    """Return the passes over host memory of one all-reduce.

    Args:
        num_devices: Devices of a node.
        num_nodes: Nodes; one alone has no network stage.
        gdrcopy: The CPU writes the result to the devices out of its cache, so that each socket reads it once.
        paired: Bridges between device pairs: a pair reduces first, then each device ships half.
        num_sockets: Of the host.

    Raises:
        PlanError: Pairs of an odd number of devices.
    """
    if paired and num_devices % 2:
        raise PlanError(f"{num_devices} devices do not pair; take {num_devices + 1}, or paired = false")
    copies = num_devices / 2 if paired else float(num_devices)
    return MemoryPasses(
        device_to_host=copies,
        reduce=copies + 1,
        # Two sends read, two receives write, and the partial sum is read once more for the sum.
        network=5.0 if num_nodes > 1 else 0.0,
        host_to_device=min(float(num_sockets), copies) if gdrcopy else copies,
    )


def host_reduce_bounds(
    host: HostSpec,
    nic_bytes_per_s: float,
    num_devices: int = 8,
    num_nodes: int = 3,
    gdrcopy: bool = True,
    paired: bool = False,
    duplex: Figure = DUPLEX,
) -> HostReduceBounds:
    """Return what each part of the host allows, and which binds.

    A node of a double binary tree sends and receives each byte at most twice, and once where there are two nodes.

    Args:
        host: Memory, slots and root ports.
        nic_bytes_per_s: All NICs of the node, one way.
        num_devices: Devices of a node.
        num_nodes: Nodes.
        gdrcopy: See :func:`memory_passes`.
        paired: See :func:`memory_passes`; the host has a ``bridge_bandwidth_bytes_per_s``.
        duplex: Part of a shared port's bandwidth that each direction gets while both are busy.

    Raises:
        PlanError: Pairs without bridges, or of an odd number of devices.
    """
    if paired and host.bridge_bandwidth_bytes_per_s is None:
        raise PlanError("paired devices need host.bridge_bandwidth_bytes_per_s; set it, or take paired = false")
    passes = memory_passes(num_devices, num_nodes, gdrcopy, paired)
    shipped = 0.5 if paired else 1.0
    bounds: dict[Resource, float] = {
        "host memory": host.memory_bandwidth_bytes_per_s / passes.total,
        "PCIe slot": host.pcie_bandwidth_bytes_per_s / shipped,
    }
    if num_nodes > 1:
        bounds["NIC"] = nic_bytes_per_s / (1 if num_nodes == 2 else 2)
    sharers = max((len(port) for port in host.root_ports), default=0)
    if sharers > 1:
        port = host.shared_port_bandwidth_bytes_per_s or host.pcie_bandwidth_bytes_per_s
        bounds["shared root port"] = port * duplex.value / (sharers * shipped)
    if paired and host.bridge_bandwidth_bytes_per_s is not None:
        # Half the gradient each way to reduce, half to gather.
        bounds["bridge"] = host.bridge_bandwidth_bytes_per_s
    low, high = dict(bounds), dict(bounds)
    if "shared root port" in bounds:
        low["shared root port"] *= duplex.low / duplex.value
        high["shared root port"] *= duplex.high / duplex.value
    binds = min(bounds, key=lambda resource: bounds[resource])
    ceiling = Figure(value=bounds[binds], low=min(low.values()), high=min(high.values()), source=f"bound by {binds}")
    return HostReduceBounds(passes=passes, bounds_bytes_per_s=bounds, ceiling_bytes_per_s=ceiling, binds=binds)


def cluster_host_reduce_bounds(
    cluster: ClusterSpec, num_nodes: int | None = None, gdrcopy: bool = True, paired: bool = False
) -> HostReduceBounds:
    """Return the bounds of a cluster's nodes.

    Args:
        cluster: With a host, and a network if it has several nodes.
        num_nodes: Nodes that reduce together; none: all.
        gdrcopy: See :func:`memory_passes`.
        paired: See :func:`memory_passes`.

    Raises:
        PlanError: The cluster lacks a host or a network.
    """
    nodes = num_nodes or cluster.num_nodes
    if cluster.host is None:
        raise PlanError(f"{cluster.name} has no host; add a [host] table with its memory and PCIe bandwidth")
    if cluster.network is None and nodes > 1:
        raise PlanError(f"{cluster.name} has no network for {nodes} nodes; add a [network] table, or take one node")
    nic = 0.0 if cluster.network is None else cluster.network.nics_per_node * cluster.network.bandwidth_bytes_per_s
    return host_reduce_bounds(cluster.host, nic, cluster.devices_per_node, nodes, gdrcopy, paired)


def ring_factor(num_devices: int) -> float:
    """Return how often each byte passes a device's slot, one way, in a ring all-reduce: ``2 (n - 1) / n``."""
    return 2 * (num_devices - 1) / num_devices


def peer_ring_bound(num_devices: int, peer_bytes_per_s: Figure = PEER_BYTES_PER_S) -> Figure:
    """Return the algorithm bandwidth that a ring of peer copies reaches at most (NCCL on such hosts).

    Args:
        num_devices: Of the ring, 2 or more.
        peer_bytes_per_s: Between a device and the NIC, or two devices, without passing host memory.

    Raises:
        PlanError: Fewer than two devices.
    """
    if num_devices < 2:
        raise PlanError(f"a ring of {num_devices} devices sends nothing; take 2 or more")
    factor = ring_factor(num_devices)
    return Figure(
        value=peer_bytes_per_s.value / factor,
        low=peer_bytes_per_s.low / factor,
        high=peer_bytes_per_s.high / factor,
        label=peer_bytes_per_s.label,
        source=peer_bytes_per_s.source,
    )


def pcie_passes(num_devices: int) -> dict[str, float]:
    """Return how often a byte passes each device's slot, both directions: through the host, and in a ring."""
    return {"host": 2.0, "ring": 2 * ring_factor(num_devices)}
