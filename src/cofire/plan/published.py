"""Training runs that others published, and what the planner says of each: the evidence for its step times.

Megatron-LM's A100 iterations (arXiv 2205.05198, tables 3 and 5, the points that Calculon validates on), DeepSeek-V3's
device hours (arXiv 2412.19437, table 1), Fire-Flyer 2's strong scaling (arXiv 2408.14158, section V) and the
utilisation of LLaMA-3.1-405B (arXiv 2407.21783, table 4). Two Megatron points set two figures of ``dgx-a100-512``;
nothing else is fitted to a point that stands here.

Left out: runs whose layout is not known. Fire-Flyer's paper gives pipeline ranks, batch and sequence length alone;
micro-batches of one sequence, 1F1B, selective recomputation and no expert parallelism are assumptions. LLaMA's 405B run
saves memory by means that the planner does not know, so its time is compared, not its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cofire.plan.step import StepEstimate, StepModel
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import load_as
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.workload import WorkloadSpec

Quantity = Literal["step_s", "device_hours_per_trillion_tokens", "mfu"]

# Model: pipeline ranks, micro-batch, batch, stages per rank; seconds of an iteration with full recomputation, and with
# sequence parallelism and selective recomputation.
_MEGATRON = {
    "megatron-22b": (1, 4, 4, 1, 1.42, 1.10),
    "megatron-175b": (8, 1, 64, 3, 18.13, 13.75),
    "megatron-530b": (35, 1, 280, 3, 49.05, 37.83),
    "megatron-1t": (64, 1, 512, 1, 94.42, 71.49),
}
_FITTED = {("megatron-22b", "full"), ("megatron-1t", "full")}
# Model: pipeline ranks, sequence length, batch; seconds of a step by devices.
_FIRE_FLYER = {
    "llama-13b": (4, 2048, 4096, {64: 64.118, 256: 17.448, 512: 9.717}),
    "deepseekmoe-16b": (10, 4096, 4608, {40: 79.615, 320: 10.71, 640: 6.535}),
}
# Devices: data-parallel ranks, TFLOP/s per device.
_LLAMA_405B = {8192: (64, 430), 16384: (128, 400)}


@dataclass(frozen=True)
class PublishedPoint:
    """A published run.

    Attributes:
        name: Of the point.
        model: Preset.
        cluster: Preset.
        num_nodes: Of the cluster that trained.
        layout: As published, or as the module's text assumes.
        workload: Sequence length, batch and formats.
        quantity: Which field of an estimate the figure is.
        value: Published; seconds, device hours per trillion tokens, or a fraction of the BF16 peak.
        source: Where.
        fitted: A figure of the cluster's preset was set by this point, so it is no test.
        assumed: What of the layout is not published.
        memory_known: Whether the planner knows how the run saved memory.
    """

    name: str
    model: str
    cluster: str
    num_nodes: int
    layout: ParallelSpec
    workload: WorkloadSpec
    quantity: Quantity
    value: float
    source: str
    fitted: bool = False
    assumed: str = ""
    memory_known: bool = True

    def estimate(self) -> StepEstimate:
        """Return the planner's step for this run.

        Raises:
            PlanError: The layout cannot run on the cluster.
        """
        cluster = load_as(ClusterSpec, self.cluster, [f"num_nodes={self.num_nodes}"])
        return StepModel(load_as(ModelSpec, self.model), cluster, self.workload).estimate(self.layout)


@dataclass(frozen=True)
class Prediction:
    """A published point and the planner's figure for it, in the same unit."""

    point: PublishedPoint
    value: float

    @property
    def error(self) -> float:
        """Prediction over published value, less one."""
        return self.value / self.point.value - 1


def published_points() -> tuple[PublishedPoint, ...]:
    """Return all published points, by source."""
    return (*_megatron(), _deepseek_v3(), *_fire_flyer(), *_llama_405b())


@cache
def predictions() -> tuple[Prediction, ...]:
    """Return the planner's figure for each published point."""
    return tuple(Prediction(point, getattr(point.estimate(), point.quantity)) for point in published_points())


def mean_error(of: tuple[Prediction, ...]) -> tuple[float, float]:
    """Return the mean and the largest size of the errors of those points that are not fitted."""
    sizes = [abs(each.error) for each in of if not each.point.fitted]
    return (sum(sizes) / len(sizes), max(sizes)) if sizes else (0.0, 0.0)


def _megatron() -> Iterator[PublishedPoint]:
    for model, (pp, micro_batch, batch, stages, full, selective) in _MEGATRON.items():
        for recompute, value in (("full", full), ("selective", selective)):
            layout = ParallelSpec(
                pp=pp,
                tp=8,
                micro_batch_size=micro_batch,
                schedule="interleaved" if stages > 1 else "1f1b",
                stages_per_rank=stages,
                recompute="full" if recompute == "full" else "selective",
                sequence_parallel=recompute == "selective",
                attention_kernel="scores",
                overlap_transfers=False,
            )
            yield PublishedPoint(
                name=f"{model}, {recompute} recomputation",
                model=model,
                cluster="dgx-a100-512",
                num_nodes=pp,
                layout=layout,
                workload=WorkloadSpec(sequence_length=2048, global_batch_size=batch),
                quantity="step_s",
                value=value,
                source="arXiv 2205.05198, table 5",
                fitted=(model, recompute) in _FITTED,
            )


def _deepseek_v3() -> PublishedPoint:
    return PublishedPoint(
        name="deepseek-v3, 2048 H800, device hours per 1e12 tokens",
        model="deepseek-v3",
        cluster="h800-2048",
        num_nodes=256,
        layout=ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8"),
        workload=WorkloadSpec(sequence_length=4096, global_batch_size=15360, moments="bf16"),
        quantity="device_hours_per_trillion_tokens",
        value=180e3,
        source="arXiv 2412.19437, section 1",
    )


def _fire_flyer() -> Iterator[PublishedPoint]:
    for model, (pp, length, batch, times) in _FIRE_FLYER.items():
        for devices, value in times.items():
            yield PublishedPoint(
                name=f"{model}, Fire-Flyer 2, {devices} devices",
                model=model,
                cluster="fire-flyer-2",
                num_nodes=devices // 8,
                layout=ParallelSpec(pp=pp, dp=devices // pp, recompute="selective"),
                workload=WorkloadSpec(sequence_length=length, global_batch_size=batch),
                quantity="step_s",
                value=value,
                source="arXiv 2408.14158, section V",
                assumed="micro-batches of one sequence, 1F1B, selective recomputation, no expert parallelism",
            )


def _llama_405b() -> Iterator[PublishedPoint]:
    for devices, (dp, tflops) in _LLAMA_405B.items():
        yield PublishedPoint(
            name=f"llama3.1-405b, {devices} H100, MFU",
            model="llama3.1-405b",
            cluster="h100-2048",
            num_nodes=devices // 8,
            layout=ParallelSpec(pp=16, tp=8, dp=dp, schedule="interleaved", stages_per_rank=7),
            workload=WorkloadSpec(sequence_length=8192, global_batch_size=2048),
            quantity="mfu",
            value=tflops / 989,
            source="arXiv 2407.21783, table 4",
            assumed="seven stages per rank, causal FLOP as the planner counts them",
            memory_known=False,
        )
