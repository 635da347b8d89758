"""This machine as a cluster, and what a training step costs on it.

``cofire plan calibrate`` measures rates of matrix products and of passes over memory and keeps them, as a cluster, in
the user's cache. :func:`predict_training_step` multiplies the operations of ``cofire.plan.step_machine`` with them:
each is its work over the rate of its shape, interpolated between the shapes that were measured. Nothing is fitted to a
training run.

Left out: what Python does beside operations of more than a few microseconds, validation, checkpoints, and operations
that overlap; on a CPU none do.
"""

from __future__ import annotations

import bisect
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from cofire.errors import PlanError, SpecError
from cofire.plan.memory import training_memory
from cofire.plan.step_machine import PASSES, MatrixProduct, Operation, Recipe, training_operations
from cofire.plan.workloads import run_workload
from cofire.spec.figure import Figure, Label, weakest
from cofire.spec.hardware import ClusterSpec, DeviceSpec, KernelRate, MatrixRate
from cofire.spec.io import load_as, save, this_machine_file
from cofire.spec.run import RunSpec
from cofire.spec.spec_type import Spec

Bound = Literal["value", "low", "high"]
# Framework calls without work of their own beside an operation: slices, views, nodes of the backward pass.
_CALLS_PER_OPERATION = 3
_SAMPLES = 5


class PartTime(Spec):
    """Seconds of one part of a step: in matrix products, in passes over memory, and in the framework's calls."""

    part: str
    products_s: float
    passes_s: float
    calls_s: float

    @property
    def total_s(self) -> float:
        """All three."""
        return self.products_s + self.passes_s + self.calls_s


class MachinePrediction(Spec):
    """Time of one optimiser step and peak memory of the process, modelled from measured rates.

    ``low`` and ``high`` of ``step_s`` take every rate at the end of its interval at once, so they are wide.
    ``memory`` says what ``peak_memory_bytes`` is the sum of, in bytes.
    """

    recipe: Recipe
    step_s: Figure
    parts: tuple[PartTime, ...]
    flops: float
    peak_memory_bytes: Figure
    memory: dict[str, float]


def machine_file() -> Path:
    """Return where the measured cluster is kept."""
    return this_machine_file()


def save_machine(cluster: ClusterSpec) -> Path:
    """Keep a measured cluster as ``this-machine`` and return its file.

    Raises:
        PlanError: The folder or the file cannot be written.
    """
    path = machine_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(cluster, path)
    except (OSError, SpecError) as error:
        raise PlanError(f"cannot keep the calibration in {path}: {error}; set COFIRE_CACHE to a folder") from None
    return path


def load_machine() -> ClusterSpec:
    """Return the measured cluster.

    Raises:
        PlanError: There is none, or its file cannot be used.
    """
    path = machine_file()
    if not path.exists():
        raise PlanError(f"this-machine is not calibrated: there is no {path}; run cofire plan calibrate")
    try:
        return load_as(ClusterSpec, path)
    except SpecError as error:
        raise PlanError(f"{error}; run cofire plan calibrate --again to measure anew") from None


# -- rates ------------------------------------------------------------------------------------------


class RateTable:
    """Rates on a grid, interpolated linearly between logarithms and constant beyond the grid.

    Args:
        points: Coordinates (positive) and rate of each point. Where the grid of all coordinates has no point, the
            nearest one, in logarithms, stands in.

    Raises:
        PlanError: There is no point.
    """

    def __init__(self, points: Mapping[tuple[float, ...], float]) -> None:
        if not points:
            raise PlanError("a table of rates without a rate; run cofire plan calibrate --again")
        self._known = {tuple(math.log(x) for x in at): math.log(rate) for at, rate in points.items()}
        self._axes = [sorted(set(values)) for values in zip(*self._known, strict=True)]
        self._cache: dict[tuple[float, ...], float] = {}

    def rate(self, *at: float) -> float:
        """Return the rate at a place, in the unit of the table."""
        sides = [_neighbours(axis, math.log(x)) for axis, x in zip(self._axes, at, strict=True)]
        total = 0.0
        for corner in itertools.product(*sides):
            weight = math.prod(w for _, w in corner)
            if weight:
                total += weight * self._at(tuple(x for x, _ in corner))
        return math.exp(total)

    def _at(self, corner: tuple[float, ...]) -> float:
        if corner in self._known:
            return self._known[corner]
        if corner not in self._cache:
            nearest = min(self._known, key=lambda p: (sum((a - b) ** 2 for a, b in zip(p, corner, strict=True)), p))
            self._cache[corner] = self._known[nearest]
        return self._cache[corner]


def _neighbours(axis: Sequence[float], x: float) -> tuple[tuple[float, float], ...]:
    """Return the grid's values around x with their weights."""
    if x <= axis[0] or len(axis) == 1:
        return ((axis[0], 1.0),)
    if x >= axis[-1]:
        return ((axis[-1], 1.0),)
    right = bisect.bisect_left(axis, x)
    part = (x - axis[right - 1]) / (axis[right] - axis[right - 1])
    return ((axis[right - 1], 1.0 - part), (axis[right], part))


class MachineRates:
    """Seconds of operations on one device, at the middle or an end of the rates' intervals."""

    def __init__(self, device: DeviceSpec, bound: Bound = "value") -> None:
        self._device, self._bound = device, bound
        self._products: dict[tuple[str, str, bool], RateTable] = {}
        self._kernels: dict[str, RateTable] = {}
        self._smallest: dict[str, float] = {}
        for rate in device.kernel_rates:
            self._smallest[rate.kernel] = min(rate.size_bytes, self._smallest.get(rate.kernel, math.inf))
        self.call_s = getattr(device.kernel_latency_s, {"low": "high", "high": "low"}.get(bound, "value"))

    def seconds(self, operation: Operation) -> float:
        """Return the time of all calls of an operation.

        Raises:
            PlanError: Its format or kernel was not measured.
        """
        if isinstance(operation, MatrixProduct):
            table = self._product_table(operation)
            batched = operation.batch > 1
            at = (operation.batch,) * batched + (operation.m, operation.n, operation.k)
            return operation.flops / table.rate(*at)
        table = self._kernel_table(operation.kernel)
        # A call below the smallest size takes as long as that: what is left of it is the call itself.
        size = max(operation.size_bytes, self._smallest[operation.kernel])
        return operation.count * size / table.rate(size)

    def _product_table(self, operation: MatrixProduct) -> RateTable:
        batched = operation.batch > 1
        key = (operation.format, operation.form, batched)
        if key not in self._products:
            found: dict[tuple[float, ...], float] = {
                (r.batch,) * batched + (r.m, r.n, r.k): getattr(r.flops_per_s, self._bound)
                for r in self._device.matrix_rates
                if (r.format, r.form, r.batch > 1) == key
            }
            if not found:
                what = "batched products" if batched else "products"
                raise PlanError(
                    f"{self._device.name}: no measured rate of {operation.form} {what} in {operation.format}; run "
                    "cofire plan calibrate --again with PyTorch installed"
                )
            self._products[key] = RateTable(found)
        return self._products[key]

    def _kernel_table(self, kernel: str) -> RateTable:
        if kernel not in self._kernels:
            found: dict[tuple[float, ...], float] = {
                (r.size_bytes,): getattr(r.bytes_per_s, self._bound)
                for r in self._device.kernel_rates
                if r.kernel == kernel
            }
            if not found:
                raise PlanError(
                    f"{self._device.name}: no measured rate of the kernel {kernel}; run cofire plan calibrate --again "
                    "with PyTorch installed"
                )
            self._kernels[kernel] = RateTable(found)
        return self._kernels[kernel]


# -- prediction -------------------------------------------------------------------------------------


def faster_recipe(device: DeviceSpec) -> Recipe:
    """Return the format whose products have the higher peak here, as precision ``auto`` chooses it."""
    peaks = device.peak_flops_per_s
    return "bf16" if peaks.get("bf16", 0.0) > peaks.get("fp32", 0.0) else "fp32"


def predict_training_step(run: RunSpec, cluster: ClusterSpec) -> MachinePrediction:
    """Predict one optimiser step of ``cofire.fit`` on a measured machine.

    Args:
        run: The run; precision ``auto`` takes the format whose measured peak is higher.
        cluster: What :func:`load_machine` returns.

    Returns:
        Step time by part and peak memory of the process.

    Raises:
        PlanError: The run recomputes activations or is in FP8, or a rate was not measured.
    """
    device = cluster.device
    if run.precision.recipe == "fp8":
        raise PlanError(
            "FP8's quantisation is not modelled on this machine; set precision.recipe=fp32 to plan the rest"
        )
    recipe = faster_recipe(device) if run.precision.recipe == "auto" else run.precision.recipe
    operations = training_operations(run, recipe)
    parts = _part_times(operations, MachineRates(device))
    total = sum(part.total_s for part in parts)
    ends = [sum(p.total_s for p in _part_times(operations, MachineRates(device, end))) for end in ("high", "low")]
    figures = [device.kernel_latency_s, *(r.flops_per_s for r in device.matrix_rates)]
    labels: set[Label] = {figure.label for figure in (*figures, *(r.bytes_per_s for r in device.kernel_rates))}
    memory = memory_parts(run, recipe, device)
    source = "modelled from the rates of single operations"
    return MachinePrediction(
        recipe=recipe,
        step_s=Figure(
            value=total, low=min(ends[0], total), high=max(ends[1], total), label=weakest(labels), source=source
        ),
        parts=tuple(parts),
        flops=sum(o.flops for o in operations if isinstance(o, MatrixProduct)),
        peak_memory_bytes=memory_figure(memory, device),
        memory=memory,
    )


def _part_times(operations: Iterable[Operation], rates: MachineRates) -> list[PartTime]:
    found: dict[str, list[float]] = {}
    for operation in operations:
        times = found.setdefault(operation.part, [0.0, 0.0, 0.0])
        times[0 if isinstance(operation, MatrixProduct) else 1] += rates.seconds(operation)
        times[2] += operation.count * _CALLS_PER_OPERATION * rates.call_s
    return [PartTime(part=part, products_s=t[0], passes_s=t[1], calls_s=t[2]) for part, t in found.items()]


def memory_parts(run: RunSpec, recipe: Recipe, device: DeviceSpec) -> dict[str, float]:
    """Return the bytes of a process that trains: tensors of the plan, the framework, and freed blocks that are kept.

    State lies still; what comes and goes in every step, activations and gradients, leaves holes.
    """
    plan = training_memory(run.model, run_workload(run).model_copy(update={"recipe": recipe}))
    return {
        "weights": float(plan.weights),
        "gradients": float(plan.gradients),
        "optimizer": float(plan.optimizer),
        "activations": float(plan.activations),
        "framework": device.reserved_bytes,
        "freed blocks kept": device.retained_share.value * (plan.activations + plan.gradients),
    }


def memory_figure(parts: Mapping[str, float], device: DeviceSpec) -> Figure:
    """Return the sum of :func:`memory_parts`, with the interval of the share that the allocator keeps."""
    share, total = device.retained_share, sum(parts.values())
    passing = parts["activations"] + parts["gradients"]
    ends = [total + (end - share.value) * passing for end in (share.low, share.high)]
    return Figure(value=total, low=ends[0], high=ends[1], label=share.label, source="modelled")


# -- measurements without PyTorch -------------------------------------------------------------------


def figure_of(values: Sequence[float], source: str) -> Figure:
    """Return the median of repeats with their quartiles."""
    ordered = sorted(values)
    last = len(ordered) - 1

    def at(part: float) -> float:
        place = part * last
        left = math.floor(place)
        return ordered[left] + (ordered[min(left + 1, last)] - ordered[left]) * (place - left)

    return Figure(value=at(0.5), low=at(0.25), high=at(0.75), label="measured", source=source)


def measure_with_numpy() -> ClusterSpec:
    """Return this machine as far as NumPy can measure it: FP32 products, additions and copies; no step is predicted."""
    import numpy as np

    source = f"{_SAMPLES} samples, NumPy, {datetime.date.today().isoformat()}"
    generator = np.random.default_rng(0)
    products, kernels = [], []
    for size in (256, 1024):
        a = generator.standard_normal((size, size), dtype=np.float32)
        out = np.empty_like(a)
        rates = [2.0 * size**3 / t for t in _seconds(lambda a=a, out=out: np.matmul(a, a.T, out=out))]
        products.append(MatrixRate(format="fp32", m=size, n=size, k=size, flops_per_s=figure_of(rates, source)))
    for numbers in (1 << 16, 1 << 22):
        x = generator.standard_normal(numbers, dtype=np.float32)
        y = np.empty_like(x)
        for kernel, call in (
            ("add", lambda x=x, y=y: np.add(x, x, out=y)),
            ("copy", lambda x=x, y=y: np.copyto(y, x)),
        ):
            moved = 4.0 * numbers * PASSES[kernel]
            figure = figure_of([moved / t for t in _seconds(call)], source)
            kernels.append(KernelRate(kernel=kernel, size_bytes=moved, bytes_per_s=figure))
    device = device_of(products, kernels)
    return ClusterSpec(name="this-machine", description="without PyTorch", devices_per_node=1, device=device)


def _seconds(call: Callable[[], object]) -> list[float]:
    call()
    found = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def device_of(
    products: Sequence[MatrixRate],
    kernels: Sequence[KernelRate],
    latency_s: Figure | None = None,
    reserved_bytes: float = 0.0,
    retained_share: Figure | None = None,
) -> DeviceSpec:
    """Return a device of measured rates; its peaks are the best of them."""
    peaks: dict[str, float] = {}
    for rate in products:
        peaks[rate.format] = max(rate.flops_per_s.value, peaks.get(rate.format, 0.0))
    copies = [rate for rate in kernels if rate.kernel == "copy"]
    bandwidth = max(copies, key=lambda rate: rate.size_bytes).bytes_per_s
    fields: dict[str, object] = {"reserved_bytes": reserved_bytes}
    if latency_s is not None:
        fields["kernel_latency_s"] = latency_s
    if retained_share is not None:
        fields["retained_share"] = retained_share
    whole = Figure(value=1.0, low=1.0, high=1.0, label="measured", source="the peak is itself measured")
    return DeviceSpec.model_validate(
        {
            "name": "this machine's CPU",
            "memory_bytes": _memory_bytes(),
            "memory_bandwidth_bytes_per_s": bandwidth.value,
            "peak_flops_per_s": peaks,
            "matrix_efficiency": whole,
            "memory_efficiency": whole,
            "matrix_rates": tuple(products),
            "kernel_rates": tuple(kernels),
            **fields,
        }
    )


def _memory_bytes() -> float:
    """Return the machine's memory as the system says it; a terabyte where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return 1e12
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), 1e12)
