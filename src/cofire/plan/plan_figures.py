"""The drawings of a plan's page, from a training plan's values: step, memory, schedule, roofline, network, tornados.

The records are those of ``cofire.plan.page.figures``. A part of the step has its own interval and label: every figure
of cluster and workload is moved to both ends, as for the whole step (``cofire.plan.uncertainty``). Left out: tables and
sentences (``cofire.plan.plan_page``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from cofire.errors import PlanError
from cofire.network.shapes import Dragonfly, FatTree, FullyConnected, SlimFly, Torus, TwoZone, cluster_shape
from cofire.plan.device_memory import ROLES
from cofire.plan.kernels import BlockKind, Kernel
from cofire.plan.page.figures import (
    GroupedTopology,
    LayeredTopology,
    MemoryBar,
    MemoryStack,
    Roof,
    Roofline,
    RoofPoint,
    Sensitivity,
    SensitivityRow,
    StepBreakdown,
    StepPart,
    SwitchLayer,
    TimeLine,
    TimeSpan,
    TorusTopology,
    Value,
)
from cofire.plan.page.scale import shown
from cofire.plan.pipeline import make_schedule
from cofire.plan.pipeline_cost import schedule_cost
from cofire.plan.rates import WORKS
from cofire.plan.step import PartName, PreparedStep, StepEstimate, StepModel
from cofire.plan.timeline import simulate
from cofire.plan.traffic import expert_traffic
from cofire.plan.training import TrainingPlan
from cofire.plan.uncertainty import Interval, figures, interval
from cofire.spec.figure import Label, weakest
from cofire.spec.hardware import ClusterSpec, Format
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

ROLE_NAMES = {"optimizer": "optimiser"}  # the page's word for a role or part; the others have the same
_SENSITIVITIES = 12
_EXTRA_MICRO_BATCHES = 4  # drawn beyond two per rank, so that a schedule's repeating middle shows


@dataclass(frozen=True)
class KernelSum:
    """A kernel over the whole model and one micro-batch, all three passes, recomputation apart."""

    name: str
    work: str
    number_format: Format
    flops: float
    size_bytes: float
    time_s: float

    @property
    def flops_per_byte(self) -> float:
        """Intensity."""
        return self.flops / self.size_bytes if self.size_bytes else 0.0


def draw_step_parts(plan: TrainingPlan, steps: StepModel, cluster: ClusterSpec) -> StepBreakdown:
    """Return where a step's time goes, each part with its own interval, and what other work hides."""
    step, hidden = plan.estimate, hidden_s(plan.estimate, steps)
    parts = []
    for name, each in part_intervals(plan, steps, cluster).items():
        if each.value > 0 or hidden.get(name, 0.0) > 0:
            label = each.label if each.sensitivities else None
            value = Value(each.value, "s", label, "modelled", max(0.0, each.low), each.high)
            parts.append(StepPart(ROLE_NAMES.get(name, name), value, hidden.get(name, 0.0), _part_remark(name)))
    total = Value(step.step_s, "s", plan.step.label, "modelled", plan.step.low, plan.step.high)
    return StepBreakdown(
        "Parts of a step",
        tuple(parts),
        total,
        "On the rank that works longest. A part's label is that of the weakest figure that moves it.",
    )


def _part_remark(name: str) -> str:
    return {
        "expert network": "dispatch and combine of the fullest device, as far as nothing hides them",
        "pipeline transfers": "sent beside computation; where a rank waits for them, that is bubble",
        "data-parallel network": "what is longer than the last backward and the first forward pass",
        "pipeline bubble": "simulated with the schedule's order",
    }.get(name, "")


def part_intervals(plan: TrainingPlan, steps: StepModel, cluster: ClusterSpec) -> dict[PartName, Interval]:
    """Return each part of a step with its interval and label; each moved figure is estimated once."""
    known: dict[tuple[float, ...], StepEstimate] = {}

    def moved(specs: dict[str, Spec]) -> StepEstimate:
        machine, work = specs["cluster"], specs["workload"]
        assert isinstance(machine, ClusterSpec)
        assert isinstance(work, WorkloadSpec)
        key = tuple(figure.value for spec in (machine, work) for _, figure in figures(spec))
        if key not in known:
            known[key] = StepModel(steps.model, machine, work).estimate(plan.estimate.layout)
        return known[key]

    specs: dict[str, Spec] = {"cluster": cluster, "workload": plan.workload}

    def part(name: PartName) -> Interval:
        return interval(specs, lambda each: moved(each).part_s(name))

    return {name: part(name) for name in get_args(PartName)}


def hidden_s(step: StepEstimate, steps: StepModel) -> dict[str, float]:
    """Return the communication that other work hides, on the rank that works longest, by part."""
    ready = steps.prepare(step.layout)
    cost = schedule_cost(*ready.pipeline, ready.times, ready.stages_per_rank)
    busiest = min(range(step.layout.pp), key=lambda rank: cost.bubble_s[rank])
    held = steps.hosts(step.layout)[busiest]
    passes = ready.micro_batches / (2 if step.layout.schedule == "dualpipe" else 1)
    moved = passes * sum(sum(ready.costs[number].expert_s) for number in held)
    sent = passes * 2 * ready.transfer_s * len(held) if step.layout.overlap_transfers else 0.0
    return {"expert network": max(0.0, moved - step.part_s("expert network")), "pipeline transfers": sent}


def draw_rank_memory(step: StepEstimate, cluster: ClusterSpec) -> MemoryStack:
    """Return what each pipeline rank holds, under what its device has."""
    bars = tuple(
        MemoryBar(f"rank {row.rank}", tuple((ROLE_NAMES.get(role, role), getattr(row, role)) for role in ROLES))
        for row in step.memory
    )
    caption = (
        "A rank's devices hold the same. Activations are those of all micro-batches that the schedule has in flight."
    )
    return MemoryStack("Memory of each pipeline rank", bars, cluster.device.memory_bytes, cluster.device.name, caption)


def draw_schedule(step: StepEstimate, steps: StepModel) -> TimeLine | None:
    """Return the schedule in time, with as many micro-batches as show its shape; none with one pipeline rank."""
    layout = step.layout
    if layout.pp == 1:
        return None
    ready = steps.prepare(layout)
    shown_ones = _drawn_micro_batches(ready)
    schedule = make_schedule(layout.schedule, layout.pp, shown_ones, ready.stages_per_rank)
    spans = tuple(
        TimeSpan(span.rank, tuple((c.part, c.stage, c.micro_batch) for c in span.slot), span.start_s, span.end_s)
        for span in simulate(schedule, ready.times).spans
    )
    caption = f"All {ready.micro_batches} micro-batches of a step."
    if shown_ones < ready.micro_batches:
        caption = f"Drawn with {shown_ones} of {ready.micro_batches} micro-batches: the middle repeats."
    caption += " Gradients' last reduction and the optimiser come after it."
    return TimeLine(f"{layout.schedule} on {layout.pp} ranks", spans, caption)


def _drawn_micro_batches(ready: PreparedStep) -> int:
    """Two per rank and a few more; of the interleaved schedule two rounds of all ranks."""
    pp = ready.layout.pp
    wanted = 2 * pp if ready.layout.schedule == "interleaved" else 2 * pp + _EXTRA_MICRO_BATCHES
    return min(ready.micro_batches, wanted)


def kernel_sums(step: StepEstimate, steps: StepModel) -> list[KernelSum]:
    """Return the kernels of the whole model by name, the longest first."""
    ready, blocks = steps.prepare(step.layout), Counter[BlockKind]()
    for stage in ready.stages:
        blocks.update(dict(stage.blocks))
    sums: dict[tuple[str, str, Format], list[float]] = {}
    for kind, number in blocks.items():
        for kernel in steps.kernels(kind, step.layout):
            key = (kernel.name, kernel.work, kernel.number_format)
            row = sums.setdefault(key, [0.0, 0.0, 0.0])
            for i, values in enumerate((kernel.flops, kernel.size_bytes, steps.rates.kernel_s(kernel))):
                row[i] += number * sum(values)
    found = [KernelSum(name, work, form, *row) for (name, work, form), row in sums.items()]
    return sorted(found, key=lambda each: -each.time_s)


def draw_roofline(step: StepEstimate, steps: StepModel) -> Roofline:
    """Return the device's roofs and the kernels that compute; those that only move bytes have no place there."""
    device, sums = steps.cluster.device, kernel_sums(step, steps)
    formats: set[Format] = {each.number_format for each in sums if each.flops}
    roofs = [
        Roof(f"{each} peak", Value(device.peak_flops_per_s[each], "FLOP/s", source="data sheet"), "compute")
        for each in sorted(formats)
    ]
    memory = Value(device.memory_bandwidth_bytes_per_s, "B/s", source="data sheet")
    roofs.append(Roof("memory", memory, "memory"))
    points = [
        RoofPoint(each.name, each.flops_per_byte, Value(each.flops / each.time_s, "FLOP/s", label, "modelled"))
        for each in sums
        if each.flops
        for label in (_kernel_label(steps, each),)
    ]
    network = _expert_point(step, steps)
    if network is not None:
        roofs.append(network[0])
        points.append(network[1])
    return Roofline(
        "Kernels under the device's roofs",
        tuple(roofs),
        tuple(points),
        "A kernel's forward and backward passes together, over all layers. It takes its operations' time plus its "
        "bytes' time plus a launch, and so stays below its roof.",
    )


def _kernel_label(steps: StepModel, kernel: KernelSum) -> Label:
    device = steps.cluster.device
    used = [device.memory_efficiency, device.kernel_latency_s]
    if kernel.work == "attention":
        used.append(device.attention_efficiency)
    elif kernel.number_format == "fp8":
        forward = device.fp8_matrix_efficiency or device.matrix_efficiency
        used += [forward, device.fp8_weight_efficiency or forward]
    else:
        used.append(device.matrix_efficiency)
    return weakest({figure.label for figure in used})


def _expert_point(step: StepEstimate, steps: StepModel) -> tuple[Roof, RoofPoint] | None:
    """Return the experts' computation per byte of dispatch and combine, and the roof of the wire that sends them."""
    layout, links = step.layout, steps.links
    if steps.model.moe is None or layout.ep == 1:
        return None
    ways = [expert_traffic(steps.model, layout, steps.workload.sequence_length, links, w) for w in _WAYS]
    across = sum(way.network_bytes for way in ways)
    sent, wire = (across, links.network) if across else (sum(way.scale_up_bytes for way in ways), links.scale_up)
    if wire is None or not sent:
        return None
    kernels: list[Kernel] = [kernel for kernel in steps.kernels("moe", layout) if kernel.experts]
    flops = sum(sum(kernel.flops) for kernel in kernels)
    skew, turns = steps.workload.expert_load_skew.value, 3 if layout.recompute == "full" else 2
    time_s = sum(sum(steps.rates.kernel_s(kernel)) for kernel in kernels) + skew * turns * sum(w.time_s for w in ways)
    name = "network, a device's share as reached" if across else "fast links as reached"
    rate = Value(flops / time_s, "FLOP/s", "assumed", "modelled", source="one after the other, nothing hidden")
    roof = Roof(name, Value(wire.bandwidth_bytes_per_s, "B/s", "assumed"), "network")
    return roof, RoofPoint("experts and exchange", flops / (skew * turns * sent), rate, "network")


_WAYS = ("dispatch", "combine")


def work_shares(sums: list[KernelSum]) -> dict[str, float]:
    """Return the share of the kernels' time by kind of work."""
    total = sum(each.time_s for each in sums)
    return {work: sum(each.time_s for each in sums if each.work == work) / total for work in WORKS}


def draw_sensitivity(title: str, result: Interval, unit: str) -> Sensitivity | None:
    """Return the tornado of a result; none where no figure moves it."""
    rows = tuple(
        SensitivityRow(
            name=readable(each.path),
            low_input=_input(each.path, each.low),
            high_input=_input(each.path, each.high),
            result_at_low=each.at_low,
            result_at_high=each.at_high,
            label=each.label,
            source=each.source,
        )
        for each in result.sensitivities[:_SENSITIVITIES]
    )
    if not rows:
        return None
    value = Value(result.value, unit, result.label, "modelled", result.low, result.high)
    more = len(result.sensitivities) - len(rows)
    caption = "Each figure moved to the ends of its interval, the others as planned."
    return Sensitivity(title, value, rows, caption + (f" {more} more move it less." if more > 0 else ""))


def readable(path: str) -> str:
    """Return a figure's path in words, for example ``device matrix efficiency``."""
    words = path.removeprefix("cluster.").removeprefix("workload.")
    for unit in ("_s", "_usd", "_bytes_per_s"):
        words = words.removesuffix(unit)
    return words.replace(".", " ").replace("_", " ")


def _input(path: str, value: float) -> str:
    if path.endswith("_s"):
        return shown(value, "s")
    return shown(value, "$") if path.endswith("_usd") else f"{value:.3g}"


_KINDS = {
    "fat_tree2": "fat tree of two layers",
    "fat_tree3": "fat tree of three layers",
    "multi_plane": "planes",
    "multi_rail": "rails",
    "two_zone": "two zones",
    "dragonfly": "dragonfly",
    "slim_fly": "Slim Fly",
    "torus": "torus",
    "fully_connected": "fully connected",
}
Topology = LayeredTopology | GroupedTopology | TorusTopology


def network_nodes(cluster: ClusterSpec) -> int | None:
    """Return how many nodes the cluster's network is built for; none: as many as the spec buys it for.

    Where no switches can be wired for what it is bought for, the network is that of the cluster's own nodes.

    Raises:
        PlanError: The cluster has no network, or its switches are too small for its own nodes.
    """
    try:
        cluster_shape(cluster)
    except PlanError:
        cluster_shape(cluster, cluster.num_nodes)
        return cluster.num_nodes
    return None


def draw_network(cluster: ClusterSpec, num_nodes: int | None = None) -> Topology:
    """Return the drawing of the cluster's network, or of one for ``num_nodes``.

    Raises:
        PlanError: The cluster has no network, or its switches are too small.
    """
    shape, wires = cluster_shape(cluster, num_nodes), cluster.network
    assert wires is not None
    port = f"{shown(wires.bandwidth_bytes_per_s, 'B/s')} a port"
    kind = _KINDS[wires.topology]
    title = wires.name if kind.split()[-1] in wires.name else f"{wires.name}, {kind}"
    if isinstance(shape, FatTree | TwoZone):
        return _layered(shape, cluster, title, port)
    endpoints = shape.counts().endpoints
    caption = f"{endpoints:,} endpoints in use; {port}."
    if isinstance(shape, Dragonfly):
        sizes = (shape.num_groups, shape.routers_per_group, shape.endpoints_per_router)
        return GroupedTopology(title, *sizes, "all to all", "all to all", caption)
    if isinstance(shape, SlimFly):
        each = -(-endpoints // shape.num_routers)
        return GroupedTopology(title, 2, shape.num_routers // 2, max(1, each), "q-cycles", "diameter 2", caption)
    if isinstance(shape, FullyConnected):
        return GroupedTopology(title, shape.num_switches, 1, shape.endpoints_per_switch, "", "all to all", caption)
    assert isinstance(shape, Torus)
    return TorusTopology(title, shape.dims, port, caption)


def _layered(shape: FatTree | TwoZone, cluster: ClusterSpec, title: str, port: str) -> LayeredTopology:
    zones = isinstance(shape, TwoZone)
    fast = cluster.scale_up
    inside = f"{shown(fast.bandwidth_bytes_per_s, 'B/s')} {fast.name}" if fast else "through the host"
    if zones:
        caption = f"{shape.num_joining_switches} switches join the zones; links of each to a zone: {shape.cross_links}."
    else:
        caption = f"A leaf of {shape.switch_ports} ports has {shape.down} below and {shape.up} above."
        if shape.oversubscription > 1:
            caption += f" It is oversubscribed {shape.oversubscription:g} to 1."
    assert cluster.network is not None
    return LayeredTopology(
        title,
        tuple(_layers(shape, port)),
        2 if zones else shape.num_planes,
        cluster.num_nodes,
        cluster.devices_per_node,
        cluster.network.nics_per_node,
        device_name=cluster.device.name.split()[0],
        inside_link=inside,
        plane_name="zone" if zones else "plane",
        split_hosts=zones,
        caption=caption,
    )


def _layers(shape: FatTree | TwoZone, port: str) -> Iterator[SwitchLayer]:
    """Yield the layers that have switches, top first."""
    if isinstance(shape, TwoZone):
        yield SwitchLayer("spine", shape.num_spines, port)
        yield SwitchLayer("leaf", shape.num_leaves, port)
        return
    if shape.top_switches:
        yield SwitchLayer("spine" if shape.layers == 2 else "core", shape.top_switches, port)
    if shape.num_aggregations:
        yield SwitchLayer("aggregation", shape.num_aggregations, port)
    yield SwitchLayer("leaf", shape.num_leaves, port)
