"""What a cluster is: devices in nodes. First cut; links and topologies come with the network planner.

Figures are vendors' dense peaks (no sparsity).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cofire.spec.spec_type import Positive, Spec

PositiveFloat = Annotated[float, Field(gt=0)]


class DeviceSpec(Spec):
    """One accelerator (or one CPU machine seen as a device)."""

    name: str
    memory_bytes: PositiveFloat
    memory_bandwidth_bytes_per_s: PositiveFloat
    peak_flops_per_s: dict[Literal["fp32", "bf16", "fp8"], PositiveFloat]


class ClusterSpec(Spec):
    """``num_nodes`` equal nodes of ``devices_per_node`` devices."""

    kind: Literal["cluster"] = "cluster"
    name: str
    description: str = ""
    num_nodes: Positive = 1
    devices_per_node: Positive = 8
    device: DeviceSpec

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster."""
        return self.num_nodes * self.devices_per_node
