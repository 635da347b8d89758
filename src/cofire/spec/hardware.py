"""What a cluster is: devices in nodes, nodes on a network, and what they cost.

Peaks and sizes are data-sheet values (dense, no sparsity) and count as exact. What a program reaches of them is a
:class:`~cofire.spec.figure.Figure`: a fraction with an interval and an origin.

Bandwidths are one way unless a name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cofire.spec.figure import Figure
from cofire.spec.spec_type import NonNegative, Positive, Spec, nearest_divisor

PositiveFloat = Annotated[float, Field(gt=0)]
Format = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
Topology = Literal[
    "fat_tree2",
    "fat_tree3",
    "multi_plane",
    "multi_rail",
    "two_zone",
    "dragonfly",
    "slim_fly",
    "torus",
    "fully_connected",
]
Routing = Literal["ecmp", "static", "adaptive"]


def _fraction(value: float, low: float, high: float) -> Figure:
    return Figure(value=value, low=low, high=high, source="rule of thumb")


class MatrixRate(Spec):
    """Measured rate of ``batch`` products of [m, k] with [k, n], in FLOP/s.

    ``form`` is the product of a linear layer: ``forward`` reads both operands along k, ``input_gradient`` the second
    one across, ``weight_gradient`` both across.
    """

    format: Format
    form: Literal["forward", "input_gradient", "weight_gradient"] = "forward"
    batch: Positive = 1
    m: Positive
    n: Positive
    k: Positive
    flops_per_s: Figure


class KernelRate(Spec):
    """Measured rate of a kernel that makes one pass over memory: bytes read and written per second.

    ``size_bytes`` is what one call reads and writes.
    """

    kernel: str
    size_bytes: PositiveFloat
    bytes_per_s: Figure


class DeviceSpec(Spec):
    """One accelerator (or one CPU machine seen as a device).

    ``matrix_efficiency`` is the fraction of the peak that a large matrix product reaches, ``memory_efficiency`` the
    fraction of the memory bandwidth that element-wise kernels reach; ``kernel_latency_s`` is what each kernel costs
    beside its work. ``communication_share`` is the part of the compute units that dispatch and combine take away while
    they run beside computation.
    """

    name: str
    memory_bytes: PositiveFloat
    memory_bandwidth_bytes_per_s: PositiveFloat
    peak_flops_per_s: dict[Format, PositiveFloat]
    matrix_efficiency: Figure = _fraction(0.7, 0.55, 0.8)
    fp8_matrix_efficiency: Figure | None = Field(
        default=None, description="of FP8 products with fine-grained scaling; none: matrix_efficiency"
    )
    fp8_weight_efficiency: Figure | None = Field(
        default=None, description="of FP8 products for gradients of weights; none: fp8_matrix_efficiency"
    )
    attention_efficiency: Figure = _fraction(0.5, 0.35, 0.65)
    memory_efficiency: Figure = _fraction(0.8, 0.65, 0.9)
    kernel_latency_s: Figure = Figure(value=4e-6, low=2e-6, high=8e-6, source="rule of thumb")
    communication_share: Figure = Figure(value=0.0, low=0.0, high=0.0, source="none taken")
    reserved_bytes: Annotated[float, Field(ge=0)] = Field(
        default=2e9, description="context, kernels and communication library"
    )
    retained_share: Figure = Field(
        default=Figure(value=0.0, low=0.0, high=0.2, source="a caching allocator wastes little"),
        description="freed blocks that the allocator keeps, as a share of what is allocated and freed in a step",
    )
    matrix_rates: tuple[MatrixRate, ...] = ()
    kernel_rates: tuple[KernelRate, ...] = ()


class ScaleUpSpec(Spec):
    """The fast links inside a node, or inside a rack that acts as one.

    ``bandwidth_bytes_per_s`` is a device's, one way. ``domain_size`` devices reach each other over it.
    """

    name: str = "NVLink"
    bandwidth_bytes_per_s: PositiveFloat
    efficiency: Figure = _fraction(0.8, 0.7, 0.9)
    latency_s: Figure = Figure(value=3.3e-6, low=2e-6, high=6e-6, label="measured", source="arXiv 2505.09343, table 5")
    domain_size: Positive = 8


class NetworkSpec(Spec):
    """The network between nodes.

    A node has ``nics_per_node`` ports of ``bandwidth_bytes_per_s`` each, one way. With ``multi_plane`` and
    ``multi_rail`` port i is on plane (rail) ``i % num_planes``; a device uses port ``rank % nics_per_node``.
    ``num_endpoints`` is how many the network is built for; none: what the cluster needs.
    """

    name: str = "InfiniBand"
    topology: Topology = "fat_tree2"
    switch_ports: Positive = 64
    num_planes: Positive = 1
    num_endpoints: Positive | None = None
    nics_per_node: Positive = 8
    bandwidth_bytes_per_s: PositiveFloat
    efficiency: Figure = _fraction(0.85, 0.75, 0.95)
    same_leaf_latency_s: Figure = Figure(
        value=2.8e-6, low=2e-6, high=4e-6, label="measured", source="arXiv 2505.09343, table 5"
    )
    cross_leaf_latency_s: Figure = Figure(
        value=3.7e-6, low=3e-6, high=6e-6, label="measured", source="arXiv 2505.09343, table 5"
    )
    routing: Routing = "adaptive"
    oversubscription: Annotated[float, Field(ge=1)] = Field(
        default=1.0, description="downward over upward bandwidth of a leaf"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nics_per_node % self.num_planes:
            raise ValueError(
                f"num_planes = {self.num_planes} must divide nics_per_node = {self.nics_per_node}; "
                f"nearest: {nearest_divisor(self.nics_per_node, self.num_planes)}"
            )
        return self


class HostSpec(Spec):
    """The CPU side of a node, where gradients are reduced or parameters are offloaded.

    ``root_ports`` lists device numbers that share one PCIe root port; devices not listed have one of their own.
    """

    memory_bandwidth_bytes_per_s: PositiveFloat = Field(description="usable, reads and writes together")
    pcie_bandwidth_bytes_per_s: PositiveFloat = Field(description="of one device's slot, one way")
    shared_port_bandwidth_bytes_per_s: PositiveFloat | None = Field(
        default=None, description="of a root port that devices share, one way; none: that of one slot"
    )
    root_ports: tuple[tuple[NonNegative, ...], ...] = ()
    bridge_bandwidth_bytes_per_s: PositiveFloat | None = Field(
        default=None, description="of an NVLink bridge between device pairs, one way"
    )


class ClusterSpec(Spec):
    """``num_nodes`` equal nodes of ``devices_per_node`` devices.

    Without ``network`` it is one node or several that cannot talk; without ``scale_up`` devices of a node talk
    through the host.
    """

    kind: Literal["cluster"] = "cluster"
    name: str
    description: str = ""
    num_nodes: Positive = 1
    devices_per_node: Positive = 8
    device: DeviceSpec
    scale_up: ScaleUpSpec | None = None
    network: NetworkSpec | None = None
    host: HostSpec | None = None
    device_hour_usd: Figure | None = Field(default=None, description="rent of one device for an hour")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host is not None:
            listed = [device for port in self.host.root_ports for device in port]
            wrong = [device for device in listed if device >= self.devices_per_node or listed.count(device) > 1]
            if wrong:
                raise ValueError(
                    f"host.root_ports names device {wrong[0]}, but each of 0 to {self.devices_per_node - 1} may stand "
                    "there once"
                )
        return self

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster."""
        return self.num_nodes * self.devices_per_node

    @property
    def scale_up_size(self) -> int:
        """Devices that reach each other over the fast links; 1 without such links."""
        return 1 if self.scale_up is None else min(self.scale_up.domain_size, self.num_devices)
