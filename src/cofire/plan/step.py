"""How long an optimiser step takes on a cluster, by part, and what it holds: one layout, one answer.

The time of a stage is the sum of its blocks' kernels (``cofire.plan.kernels``, at the rates of ``cofire.plan.rates``)
and of the communication that nothing hides (``cofire.plan.traffic``). The schedule's simulation
(``cofire.plan.pipeline_cost``) turns stage times into a makespan; the reduction of gradients, as far as it is longer
than the last backward pass, and the optimiser come after it.

Hidden: with DualPipe's schedules dispatch and combine run beside the other direction's computation in overlapped
slots, where they take ``communication_share`` of the compute units and their bytes' share of the memory bandwidth
(read where they are sent, written where they arrive). Everywhere else they are exposed.

Everything here is *modelled*; ``cofire.plan.uncertainty`` says how sure its inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cofire.errors import PlanError
from cofire.network.collective_time import collective_time_s
from cofire.plan.activations import block_activation_bytes
from cofire.plan.device_memory import BlockParameters, RankMemory, rank_memory
from cofire.plan.flops import training_flops_per_token
from cofire.plan.kernels import BlockKind, Kernel, block_kernels
from cofire.plan.parameters import count_parameters
from cofire.plan.pipeline import make_schedule
from cofire.plan.pipeline_cost import PipelineCost, schedule_cost
from cofire.plan.rates import BlockTime, Rates, peak_flops_per_s
from cofire.plan.stages import Stage, cut_stages
from cofire.plan.timeline import ChunkTimes
from cofire.plan.traffic import Links, expert_traffic, hidden_bytes, transfer_bytes
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.spec_type import Spec, nearest_divisor
from cofire.spec.workload import WorkloadSpec

PartName = Literal[
    "matrix products",
    "attention",
    "memory traffic",
    "recomputation",
    "tensor-parallel network",
    "expert network",
    "pipeline transfers",
    "pipeline bubble",
    "data-parallel network",
    "optimizer",
]

# Passes over a parameter in an optimiser step: its FP32 gradient is zeroed, read for the norm, clipped (read, written)
# and read; master weight and both moments are read and written; the 16-bit copy is written.
_GRADIENT_PASSES = 5
_DUAL = ("dualpipe", "dualpipev")
_TENSOR_PASSES = 2  # an all-gather and a reduce-scatter per block that is cut over the tensor axis


class StepPart(Spec):
    """A part of the step on the rank that works longest; the parts sum to the step."""

    name: PartName
    time_s: float


class StepEstimate(Spec):
    """One layout's step.

    ``tokens_per_step`` of ``num_micro_batches`` per pipeline on ``num_devices``. ``mfu`` counts the papers' FLOP of the
    main model with causal attention against the BF16 peak (FP32 in FP32). ``usd_per_trillion_tokens`` is none without
    a price. ``peak_memory_bytes`` is that of rank ``peak_memory_rank``; ``fits`` compares it with the device.
    """

    layout: ParallelSpec
    num_devices: int
    num_micro_batches: int
    tokens_per_step: int
    step_s: float
    pipeline_s: float
    parts: tuple[StepPart, ...]
    binds: PartName
    tokens_per_s: float
    mfu: float
    device_hours_per_trillion_tokens: float
    usd_per_trillion_tokens: float | None
    memory: tuple[RankMemory, ...]
    peak_memory_rank: int
    peak_memory_bytes: float
    fits: bool
    bubble_fraction: float

    def part_s(self, name: PartName) -> float:
        """Seconds of one part."""
        return next((part.time_s for part in self.parts if part.name == name), 0.0)


@dataclass(frozen=True)
class BlockCost:
    """Seconds of a block and micro-batch: computation, and communication of the forward and of the backward pass.

    ``expert_bytes`` is what dispatch and combine of both passes send.
    """

    time: BlockTime
    tensor_s: tuple[float, float]
    expert_s: tuple[float, float]
    expert_bytes: float = 0.0


@dataclass(frozen=True)
class StageCost:
    """Seconds of a micro-batch on a stage.

    Attributes:
        forward_s: Computation and tensor-parallel communication of the forward pass.
        backward_s: The same of the backward pass, weights' gradients included.
        weight_s: The weights' gradients.
        expert_s: Dispatch and combine, forward and backward.
        expert_memory_s: What these take of the memory's time.
        recompute_s: Part of ``backward_s``.
        tensor_s: Part of ``forward_s`` and ``backward_s``.
        work_s: Computation without recomputation by kind of work.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    expert_s: tuple[float, float]
    expert_memory_s: float
    recompute_s: float
    tensor_s: float
    work_s: tuple[float, float, float]


@dataclass(frozen=True)
class PreparedStep:
    """A layout's step before its schedule is simulated: micro-batches per pipeline, stages, and their seconds."""

    layout: ParallelSpec
    micro_batches: int
    stages: list[Stage]
    costs: list[StageCost]
    times: ChunkTimes
    transfer_s: float

    @property
    def pipeline(self) -> tuple[str, int, int]:
        """The schedule, its ranks and micro-batches."""
        return self.layout.schedule, self.layout.pp, self.micro_batches

    @property
    def stages_per_rank(self) -> int:
        """Of the interleaved schedule."""
        return max(1, self.layout.stages_per_rank)


class StepModel:
    """A model on a cluster: asked for many layouts, it remembers what they share."""

    def __init__(self, model: ModelSpec, cluster: ClusterSpec, workload: WorkloadSpec) -> None:
        self.model, self.cluster, self.workload = model, cluster, workload
        self.rates, self.links = Rates(cluster.device), Links(cluster)
        self.count = count_parameters(model)
        self.flops = training_flops_per_token(model, workload.sequence_length)
        self._blocks: dict[tuple[object, ...], BlockCost] = {}
        self._kept: dict[tuple[object, ...], float] = {}
        self._hosts: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = {}
        self._cuts: dict[tuple[object, ...], list[Stage]] = {}
        self._peaks: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._parameters: dict[tuple[int, int], BlockParameters] = {}

    def estimate(self, layout: ParallelSpec) -> StepEstimate:
        """Return the step of a layout.

        Raises:
            PlanError: The layout cannot run this model on this cluster, whatever its memory.
        """
        ready = self.prepare(layout)
        return self.finish(ready, schedule_cost(*ready.pipeline, ready.times, ready.stages_per_rank))

    def prepare(self, layout: ParallelSpec) -> PreparedStep:
        """Return all of a step but the schedule's simulation, which many layouts can share a run of.

        Raises:
            PlanError: The layout cannot run this model on this cluster, whatever its memory.
        """
        micro_batches = check_layout(self.model, self.cluster, self.workload, layout)
        blocks = self.block_costs(layout)
        stages = self.stages(layout, blocks)
        # Most stages are alike.
        cost_of = {stage: self.stage_cost(stage, blocks) for stage in dict.fromkeys(stages)}
        gather_of = {stage: self._gather_s(layout, stage) for stage in cost_of}
        costs = [cost_of[stage] for stage in stages]
        transfer_s = self._transfer_s(layout)
        times = self._chunk_times(layout, costs, transfer_s, [gather_of[stage] for stage in stages])
        return PreparedStep(layout, micro_batches, stages, costs, times, transfer_s)

    def peaks(self, ready: PreparedStep) -> tuple[int, ...]:
        """Return the chunks that each rank holds activations of at most; they depend on the schedule's order alone."""
        key = (*ready.pipeline, ready.stages_per_rank)
        if key not in self._peaks:
            self._peaks[key] = schedule_cost(*ready.pipeline, ready.times, ready.stages_per_rank).peak_activations
        return self._peaks[key]

    def memory(self, ready: PreparedStep) -> tuple[RankMemory, ...]:
        """Return what each pipeline rank holds."""
        layout, stages = ready.layout, ready.stages
        hosts = self.hosts(layout)
        kinds: set[BlockKind] = {kind for stage in stages for kind, _ in stage.blocks}
        kept: dict[BlockKind, float] = {}
        for kind in kinds:
            kept[kind] = self._kept_bytes(kind, layout, layout.recompute)
        hosted = [tuple(stages[number] for number in held) for held in hosts]
        buffers = {held: self._buffers(layout, held) for held in dict.fromkeys(hosted)}
        return tuple(
            rank_memory(
                self._block_parameters(layout),
                layout,
                self.workload,
                hosted,
                kept,
                self.peaks(ready),
                [buffers[held] for held in hosted],
                self.cluster.device.reserved_bytes,
            )
        )

    def finish(
        self, ready: PreparedStep, pipeline: PipelineCost, memory: tuple[RankMemory, ...] | None = None
    ) -> StepEstimate:
        """Return a prepared step with its schedule simulated; ``memory`` is that of :meth:`memory`, if known."""
        layout, costs = ready.layout, ready.costs
        hosts = self.hosts(layout)
        busiest = min(range(layout.pp), key=lambda rank: pipeline.bubble_s[rank])
        after, optimizer_s = self._after(layout, ready.stages, costs, hosts)
        parts = self._parts(ready, hosts[busiest], pipeline, busiest)
        parts["data-parallel network"] += after
        parts["optimizer"] = optimizer_s
        return self._result(ready, pipeline, parts, self.memory(ready) if memory is None else memory)

    # -- times ------------------------------------------------------------------------------------------

    def block_costs(self, layout: ParallelSpec) -> dict[BlockKind, BlockCost]:
        """Return what each kind of block of the model costs in a layout."""
        kinds: list[BlockKind] = ["embedding", "attention", "head"]
        if self.model.num_dense_layers:
            kinds.append("dense")
        if self.model.moe is not None:
            kinds.append("moe")
        if self.model.mtp is not None:
            kinds.append("mtp_entry")
        return {kind: self._block_cost(kind, layout) for kind in kinds}

    def _block_cost(self, kind: BlockKind, layout: ParallelSpec) -> BlockCost:
        key = (
            kind,
            layout.micro_batch_size,
            layout.tp,
            layout.ep,
            layout.sequence_parallel,
            layout.precision,
            layout.attention_kernel,
            layout.recompute,
        )
        if key not in self._blocks:
            self._blocks[key] = self._new_block_cost(kind, layout)
        return self._blocks[key]

    def kernels(self, kind: BlockKind, layout: ParallelSpec) -> list[Kernel]:
        """Return the kernels of a block and micro-batch on the device with the most rows of routed experts."""
        kernels = block_kernels(self.model, kind, layout, self.workload.sequence_length)
        if kind != "moe" or layout.ep == 1:
            return kernels
        skew = self.workload.expert_load_skew.value
        return [kernel.stretched(skew) if kernel.experts else kernel for kernel in kernels]

    def _new_block_cost(self, kind: BlockKind, layout: ParallelSpec) -> BlockCost:
        length, recompute = self.workload.sequence_length, layout.recompute
        outside = kind in ("embedding", "head", "mtp_entry")
        time = self.rates.block_time(self.kernels(kind, layout), "none" if outside else recompute)
        passes = 0 if layout.tp == 1 or outside or (kind == "moe" and layout.ep > 1) else _TENSOR_PASSES
        again = 2 if recompute == "full" else 1
        tensor = 0.0
        if passes:
            size = hidden_bytes(self.model, layout, length)
            tensor = passes * collective_time_s("all_gather", size, self.links.group(layout.tp), "ring")
        if kind != "moe":
            return BlockCost(time, (tensor, again * tensor), (0.0, 0.0))
        # The fullest device receives more; the others wait for it.
        skew = self.workload.expert_load_skew.value if layout.ep > 1 else 1.0
        ways = [expert_traffic(self.model, layout, length, self.links, way) for way in ("dispatch", "combine")]
        expert = skew * sum(way.time_s for way in ways)
        sent = skew * (1 + again) * sum(way.network_bytes + way.scale_up_bytes for way in ways)
        return BlockCost(time, (tensor, again * tensor), (expert, again * expert), sent)

    def stages(self, layout: ParallelSpec, blocks: Mapping[BlockKind, BlockCost]) -> list[Stage]:
        """Cut the model into the stages of a layout, from first to last."""
        seconds: dict[BlockKind, float] = {}
        for kind, cost in blocks.items():
            seconds[kind] = cost.time.forward_s + cost.time.input_s + cost.time.weight_s + sum(cost.tensor_s)
        key = (num_stages(layout), *seconds.values())
        if key not in self._cuts:
            self._cuts[key] = cut_stages(self.model, num_stages(layout), seconds)
        return self._cuts[key]

    def stage_cost(self, stage: Stage, blocks: Mapping[BlockKind, BlockCost]) -> StageCost:
        """Return the seconds of a micro-batch on a stage."""
        forward = backward = weight = recompute = tensor = 0.0
        expert, work, sent = [0.0, 0.0], [0.0, 0.0, 0.0], 0.0
        for kind, number in stage.blocks:
            cost = blocks[kind]
            time = cost.time
            forward += number * (time.forward_s + cost.tensor_s[0])
            backward += number * (time.input_s + time.weight_s + cost.tensor_s[1])
            weight += number * time.weight_s
            recompute += number * sum(time.recompute)
            tensor += number * sum(cost.tensor_s)
            sent += number * cost.expert_bytes
            expert = [have + number * more for have, more in zip(expert, cost.expert_s, strict=True)]
            for i in range(3):
                work[i] += number * (time.forward[i] + time.backward[i] + time.weight[i])
        return StageCost(
            forward_s=forward,
            backward_s=backward,
            weight_s=weight,
            expert_s=(expert[0], expert[1]),
            expert_memory_s=2 * sent / self.rates.memory_bytes_per_s,
            recompute_s=recompute,
            tensor_s=tensor,
            work_s=(work[0], work[1], work[2]),
        )

    def _transfer_s(self, layout: ParallelSpec) -> float:
        if layout.pp == 1:
            return 0.0
        size = transfer_bytes(self.model, layout, self.workload.sequence_length)
        return self.links.transfer_s(size, layout.num_devices)

    def _gather_s(self, layout: ParallelSpec, stage: Stage) -> tuple[float, float]:
        """Seconds that ZeRO 3 needs to gather a stage's weights, and to reduce their gradients, per micro-batch."""
        if layout.zero_stage < 3:
            return 0.0, 0.0
        wide, dense, experts = self._block_parameters(layout).of(stage)
        width, group = (4 if layout.precision == "fp32" else 2), _expert_group(layout)
        gather = self._reduce_s(layout, width * (wide + dense), width * experts, group)
        return gather, self._reduce_s(layout, 4 * (wide + dense), 4 * experts, group)

    def _chunk_times(
        self,
        layout: ParallelSpec,
        costs: list[StageCost],
        transfer_s: float,
        sharded_s: list[tuple[float, float]],
    ) -> ChunkTimes:
        exposed = 0.0 if layout.overlap_transfers else transfer_s
        share = self.cluster.device.communication_share.value
        forward = [cost.forward_s + cost.expert_s[0] + exposed for cost in costs]
        backward = [cost.backward_s + cost.expert_s[1] + exposed for cost in costs]
        paired = None
        if layout.schedule in _DUAL:
            paired = []
            for cost in costs:
                compute = cost.forward_s + cost.backward_s + cost.expert_memory_s
                moved = sum(cost.expert_s)
                # While it moves, communication has its share of the units; computation has the rest.
                stretched = compute + share * min(moved, compute / (1 - share))
                paired.append(max(stretched, moved) + 2 * exposed)
        weight = [cost.weight_s for cost in costs]
        for i, (gather, reduce) in enumerate(sharded_s):  # fetched ahead: what is longer, of work and of wires, counts
            forward[i], backward[i] = max(forward[i], gather), max(backward[i], gather + reduce)
            if paired is not None:
                paired[i] = max(paired[i], 2 * gather + reduce)
        if len(costs) == 1:
            alone = None if paired is None else paired[0]
            return ChunkTimes(forward[0], backward[0], weight[0], alone, transfer_s - exposed)
        return ChunkTimes(forward, backward, weight, paired, transfer_s - exposed)

    def _after(
        self, layout: ParallelSpec, stages: list[Stage], costs: list[StageCost], hosts: tuple[tuple[int, ...], ...]
    ) -> tuple[float, float]:
        """Exposed reduction of gradients, and the optimiser; of the slowest rank."""
        parameters = self._block_parameters(layout)
        expert_group = _expert_group(layout)
        width = {"fp32": 4, "bf16": 2, "fp8": 2}[layout.precision]
        state = (4 if layout.precision != "fp32" else 0) + 2 * (4 if self.workload.moments == "fp32" else 2)
        network = optimizer = 0.0
        # One of the ranks that hold the same; a stage that is there twice counts once.
        distinct = {tuple(stages[number] for number in sorted(set(held))): sorted(set(held)) for held in hosts}
        for stage_numbers in distinct.values():
            dense = experts = forward = backward = 0.0
            for number in stage_numbers:
                wide, rest, routed_ones = parameters.of(stages[number])
                dense, experts = dense + wide + rest, experts + routed_ones
                forward = max(forward, costs[number].forward_s)
                backward = max(backward, costs[number].backward_s)
            sharded = layout.zero_stage >= 1
            local = dense / (layout.dp if sharded else 1) + experts / (expert_group if sharded else 1)
            moved = local * (2 * state + width) + 4 * _GRADIENT_PASSES * (dense + experts)
            optimizer = max(optimizer, moved / self.rates.memory_bytes_per_s)
            down = self._reduce_s(layout, 4 * dense, 4 * experts, expert_group)
            up = self._reduce_s(layout, width * dense, width * experts, expert_group)
            if layout.zero_stage == 3:
                down = up = 0.0  # paid for with every micro-batch
            network = max(network, max(0.0, down - backward) + max(0.0, up - forward))
        return network, optimizer

    def _block_parameters(self, layout: ParallelSpec) -> BlockParameters:
        key = (layout.tp, layout.ep)
        if key not in self._parameters:
            self._parameters[key] = BlockParameters(self.model, self.count, layout)
        return self._parameters[key]

    def _reduce_s(self, layout: ParallelSpec, dense_bytes: float, expert_bytes: float, expert_group: int) -> float:
        stride = layout.tp if layout.ep == 1 else layout.ep
        dense_s = self.links.reduce_s(dense_bytes, layout.dp, layout.tp)
        return dense_s + self.links.reduce_s(expert_bytes, expert_group, stride)

    # -- memory -----------------------------------------------------------------------------------------

    def hosts(self, layout: ParallelSpec) -> tuple[tuple[int, ...], ...]:
        """Return, for each rank, the stages that it holds, copies counted, numbered from first to last."""
        key = (layout.schedule, layout.pp, layout.stages_per_rank)
        if key not in self._hosts:
            # Where stages lie does not depend on the number of micro-batches; this many suits every schedule.
            schedule = make_schedule(layout.schedule, layout.pp, 2 * layout.pp, max(1, layout.stages_per_rank))
            held: list[list[int]] = [[] for _ in range(layout.pp)]
            for way in schedule.ranks:
                for stage, rank in enumerate(way):
                    held[rank].append(stage)
            self._hosts[key] = tuple(map(tuple, held))
        return self._hosts[key]

    def _kept_bytes(self, kind: BlockKind, layout: ParallelSpec, recompute: str) -> float:
        key = (
            kind,
            layout.micro_batch_size,
            layout.tp,
            layout.ep > 1,
            layout.sequence_parallel,
            layout.precision,
            layout.attention_kernel,
            recompute,
        )
        if key not in self._kept:
            self._kept[key] = block_activation_bytes(
                self.model,
                kind,
                layout,
                self.workload.sequence_length,
                self.workload.expert_load_skew.value,
                recompute,  # type: ignore[arg-type]
            )
        return self._kept[key]

    def _buffers(self, layout: ParallelSpec, stages: Sequence[Stage]) -> float:
        """Logits with their gradient where the head is, else the layer that is expanded, and rows on their way."""
        tokens, hidden = layout.micro_batch_size * self.workload.sequence_length, self.model.hidden_size
        width = 4 if layout.precision == "fp32" else 2
        size = width * tokens * hidden  # gathered hidden states and the gradient in flight
        if any(stage.count("head") for stage in stages):
            size += (4 + width) * tokens * self.model.vocab_size / layout.tp
        if layout.recompute != "none":
            feed: BlockKind = "moe" if any(stage.count("moe") for stage in stages) else "dense"
            if feed == "moe" or any(stage.count("dense") for stage in stages):
                size += self._kept_bytes("attention", layout, "none") + self._kept_bytes(feed, layout, "none")
        if self.model.moe is not None and layout.ep > 1:
            rows = tokens / layout.tp * self.model.moe.num_experts_per_token * self.workload.expert_load_skew.high
            size += 2 * width * rows * hidden
        return size

    # -- the answer -------------------------------------------------------------------------------------

    def _parts(
        self, ready: PreparedStep, held: tuple[int, ...], pipeline: PipelineCost, rank: int
    ) -> dict[PartName, float]:
        """Split the pipeline's time on one rank; what computation does not explain is communication."""
        layout = ready.layout
        # With two copies, half of the micro-batches pass through each of a rank's stages.
        passes = ready.micro_batches / (2 if layout.schedule == "dualpipe" else 1)
        mine = [ready.costs[number] for number in held]
        parts: dict[PartName, float] = {
            "matrix products": passes * sum(cost.work_s[0] for cost in mine),
            "attention": passes * sum(cost.work_s[1] for cost in mine),
            "memory traffic": passes * sum(cost.work_s[2] for cost in mine),
            "recomputation": passes * sum(cost.recompute_s for cost in mine),
            "tensor-parallel network": passes * sum(cost.tensor_s for cost in mine),
            "pipeline transfers": 0.0 if layout.overlap_transfers else passes * 2 * ready.transfer_s * len(mine),
        }
        exposed = pipeline.makespan_s - pipeline.bubble_s[rank] - sum(parts.values())
        sent = passes * sum(sum(cost.expert_s) for cost in mine)
        parts["expert network"] = max(0.0, min(exposed, sent) if layout.zero_stage == 3 else exposed) if sent else 0.0
        parts["data-parallel network"] = max(0.0, exposed - parts["expert network"]) if layout.zero_stage == 3 else 0.0
        parts["pipeline bubble"] = pipeline.makespan_s - sum(parts.values())
        return parts

    def _result(
        self,
        ready: PreparedStep,
        pipeline: PipelineCost,
        parts: dict[PartName, float],
        memory: tuple[RankMemory, ...],
    ) -> StepEstimate:
        layout = ready.layout
        step_s = sum(parts.values())
        tokens = ready.micro_batches * layout.micro_batch_size * layout.dp * self.workload.sequence_length
        devices, rate = layout.num_devices, tokens / step_s
        hours = 1e12 / rate / 3600 * devices
        price = self.cluster.device_hour_usd
        fullest = max(memory, key=lambda row: row.total)
        peak = peak_flops_per_s(self.cluster.device, "fp32" if layout.precision == "fp32" else "bf16")
        return StepEstimate(
            layout=layout,
            num_devices=devices,
            num_micro_batches=ready.micro_batches,
            tokens_per_step=tokens,
            step_s=step_s,
            pipeline_s=pipeline.makespan_s,
            parts=tuple(StepPart(name=name, time_s=max(0.0, time)) for name, time in parts.items()),
            binds=max(parts, key=lambda name: parts[name]),
            tokens_per_s=rate,
            mfu=rate * self.flops.main / (devices * peak),
            device_hours_per_trillion_tokens=hours,
            usd_per_trillion_tokens=None if price is None else hours * price.value,
            memory=memory,
            peak_memory_rank=fullest.rank,
            peak_memory_bytes=fullest.total,
            fits=fullest.total <= self.cluster.device.memory_bytes,
            bubble_fraction=pipeline.bubble_fraction,
        )


def _expert_group(layout: ParallelSpec) -> int:
    """Devices of a stage that hold the same experts."""
    return layout.dp if layout.ep == 1 else max(1, layout.dp * layout.tp // layout.ep)


def num_stages(layout: ParallelSpec) -> int:
    """Stages into which a layout cuts the model."""
    if layout.schedule in ("zbv", "dualpipev"):
        return 2 * layout.pp
    return layout.pp * (layout.stages_per_rank if layout.schedule == "interleaved" else 1)


def check_layout(model: ModelSpec, cluster: ClusterSpec, workload: WorkloadSpec, layout: ParallelSpec) -> int:
    """Check what a layout needs to run at all.

    Returns:
        Micro-batches per pipeline and step.

    Raises:
        PlanError: A degree does not divide what it splits, or the cluster has too few devices.
    """
    if layout.num_devices > cluster.num_devices:
        raise PlanError(
            f"pp x dp x tp = {layout.num_devices} devices are more than the {cluster.num_devices} of {cluster.name}; "
            f"take dp = {max(1, cluster.num_devices // (layout.pp * layout.tp))} or a larger cluster.num_nodes"
        )
    check_degrees(model, layout.tp, layout.ep)
    sequences = layout.dp * layout.micro_batch_size
    batch = workload.global_batch_size
    if batch is None:
        return 8 * layout.pp
    if batch % sequences:
        fit = max(1, round(batch / sequences)) * sequences
        raise PlanError(
            f"global_batch_size = {batch} must be a multiple of dp x micro_batch_size = {sequences}; nearest: {fit}"
        )
    return batch // sequences


def check_degrees(model: ModelSpec, tp: int, ep: int) -> None:
    """Check that a model can be cut along its tensor and expert axes.

    Raises:
        PlanError: A degree does not divide what it splits.
    """
    heads = model.attention.num_heads
    if heads % tp:
        raise PlanError(f"tp = {tp} must divide the {heads} heads of {model.name}; {_near(heads, tp)}")
    if model.moe is None and ep > 1:
        raise PlanError(f"ep = {ep} needs experts, but {model.name} is dense; take ep = 1")
    if model.moe is not None and model.moe.num_routed_experts % ep:
        experts = model.moe.num_routed_experts
        raise PlanError(f"ep = {ep} must divide the {experts} routed experts of {model.name}; {_near(experts, ep)}")


def _near(number: int, wish: int) -> str:
    return f"nearest: {nearest_divisor(number, wish)}"
