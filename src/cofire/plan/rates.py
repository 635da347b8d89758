"""From kernels to seconds: the roofline of a device at what it reaches of its peaks.

A kernel takes its operations at the matrix (or attention) rate, plus its bytes at the memory rate, plus the latency of
a launch. The sum, not the larger of the two: a product's first tiles are waited for and its last ones written with
idle matrix units, and published iteration times are met better so (docs/lab/LOG.md). Every rate is a peak times a
:class:`~cofire.spec.figure.Figure`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cofire.errors import PlanError
from cofire.plan.kernels import Kernel, Work
from cofire.spec.hardware import DeviceSpec, Format
from cofire.spec.parallel import RecomputeName

WORKS: tuple[Work, ...] = ("matrix", "attention", "memory")


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block and micro-batch on a device, by pass and kind of work (in the order of :data:`WORKS`).

    ``recompute`` is the part of the forward pass that the backward pass runs again.
    """

    forward: tuple[float, float, float]
    backward: tuple[float, float, float]
    weight: tuple[float, float, float]
    recompute: tuple[float, float, float]

    @property
    def forward_s(self) -> float:
        """The whole forward pass."""
        return sum(self.forward)

    @property
    def input_s(self) -> float:
        """Gradient of the input, recomputation included."""
        return sum(self.backward) + sum(self.recompute)

    @property
    def weight_s(self) -> float:
        """Gradients of the weights."""
        return sum(self.weight)


class Rates:
    """What a device does per second."""

    def __init__(self, device: DeviceSpec) -> None:
        self._device = device
        self.memory_bytes_per_s = device.memory_bandwidth_bytes_per_s * device.memory_efficiency.value
        self.kernel_latency_s = device.kernel_latency_s.value

    def matrix_flops_per_s(self, number_format: Format, weight: bool = False) -> float:
        """Of large matrix products, or of those for gradients of weights.

        Raises:
            PlanError: The device has no peak for the format.
        """
        device = self._device
        efficiency = device.matrix_efficiency
        if number_format == "fp8":
            efficiency = device.fp8_matrix_efficiency or efficiency
            if weight:
                efficiency = device.fp8_weight_efficiency or efficiency
        return peak_flops_per_s(device, number_format) * efficiency.value

    def attention_flops_per_s(self, number_format: Format) -> float:
        """Of attention kernels."""
        return peak_flops_per_s(self._device, number_format) * self._device.attention_efficiency.value

    def kernel_s(self, kernel: Kernel) -> tuple[float, float, float]:
        """Seconds of a kernel's forward pass, input gradient and weight gradients; nothing where it has no work."""
        rates = (1.0, 1.0, 1.0)
        if kernel.work == "matrix":
            rate = self.matrix_flops_per_s(kernel.number_format)
            rates = (rate, rate, self.matrix_flops_per_s(kernel.number_format, weight=True))
        elif kernel.work == "attention":
            rates = (self.attention_flops_per_s(kernel.number_format),) * 3
        times = [
            flops / rate + size / self.memory_bytes_per_s + self.kernel_latency_s if flops or size else 0.0
            for flops, size, rate in zip(kernel.flops, kernel.size_bytes, rates, strict=True)
        ]
        return times[0], times[1], times[2]

    def block_time(self, kernels: Iterable[Kernel], recompute: RecomputeName) -> BlockTime:
        """Return the seconds of a block."""
        rows = [dict.fromkeys(WORKS, 0.0) for _ in range(4)]
        for kernel in kernels:
            times = self.kernel_s(kernel)
            again = times[0] if recompute == "full" or (recompute == "selective" and kernel.selective) else 0.0
            for row, time in zip(rows, (*times, again), strict=True):
                row[kernel.work] += time
        forward, backward, weight, repeated = ((row["matrix"], row["attention"], row["memory"]) for row in rows)
        return BlockTime(forward, backward, weight, repeated)


def peak_flops_per_s(device: DeviceSpec, number_format: Format) -> float:
    """Return the data-sheet peak of a format.

    Raises:
        PlanError: The device has none.
    """
    peak = device.peak_flops_per_s.get(number_format)
    if peak is None:
        known = ", ".join(device.peak_flops_per_s)
        raise PlanError(
            f"device {device.name!r} has no peak for {number_format} (known: {known}); "
            f"set cluster.device.peak_flops_per_s.{number_format} or another format"
        )
    return peak
