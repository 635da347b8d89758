"""What a cluster allows at best: roofline bounds, each with the resource that sets it.

Every figure here is *modelled* from the vendor's peaks and is a bound, not a prediction: work and data are *assumed*
to be split evenly over the devices, without communication, imbalance or idle time. Left out: networks, schedules and
layouts, which can only make these figures worse.
"""

from __future__ import annotations

import math
from typing import Literal

from cofire.plan.flops import DecodeFlops, TrainingFlops
from cofire.plan.memory import InferenceMemory, MemoryEstimate, weight_bytes
from cofire.plan.parameters import ParameterCount
from cofire.plan.rates import peak_flops_per_s
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

Resource = Literal["compute", "memory bandwidth", "memory capacity"]


class TrainingBound(Spec):
    """Best rate of training on all devices of a cluster.

    ``devices_for_state``: the fewest devices that hold weights, gradients and optimiser when these are split evenly;
    activations, which depend on the layout, come on top.
    """

    num_devices: int
    tokens_per_s: float
    device_hours_per_trillion_tokens: float
    state_bytes_per_device: float
    devices_for_state: int
    binds: Resource


class DecodeBound(Spec):
    """Best rate of decoding on the fewest devices that hold weights and cache.

    ``compute_s`` and ``bandwidth_s`` are the two bounds on one step of the whole batch; the larger one binds.
    ``experts_read`` is the expected number of distinct experts that a layer reads, for *assumed* uniform routing.
    """

    num_devices: int
    experts_read: float
    compute_s: float
    bandwidth_s: float
    step_s: float
    tokens_per_s: float
    binds: Resource


class Bounds(Spec):
    """Bounds of training and decoding on one cluster."""

    training: TrainingBound
    decode: DecodeBound


def cluster_bounds(
    model: ModelSpec,
    workload: WorkloadSpec,
    cluster: ClusterSpec,
    count: ParameterCount,
    training: tuple[TrainingFlops, MemoryEstimate],
    decode: tuple[DecodeFlops, InferenceMemory],
) -> Bounds:
    """Return the bounds of one model and workload on one cluster.

    Raises:
        PlanError: The device has no peak for a format that the workload needs.
    """
    return Bounds(
        training=_training_bound(workload, cluster, *training),
        decode=_decode_bound(model, workload, cluster, count, *decode),
    )


def expected_distinct_experts(num_experts: int, num_experts_per_token: int, num_tokens: int) -> float:
    """Expected number of distinct experts that ``num_tokens`` tokens choose, uniformly and independently."""
    return num_experts * (1 - (1 - num_experts_per_token / num_experts) ** num_tokens)


def _training_bound(
    workload: WorkloadSpec, cluster: ClusterSpec, flops: TrainingFlops, memory: MemoryEstimate
) -> TrainingBound:
    # Full recomputation repeats the forward pass: a third of forward and backward.
    done = flops.total * (4 / 3 if workload.recompute == "full" else 1)
    rate = cluster.num_devices * peak_flops_per_s(cluster.device, workload.recipe) / done
    state = memory.total - memory.activations
    needed = math.ceil(state / cluster.device.memory_bytes)
    return TrainingBound(
        num_devices=cluster.num_devices,
        tokens_per_s=rate,
        device_hours_per_trillion_tokens=1e12 / rate / 3600 * cluster.num_devices,
        state_bytes_per_device=state / cluster.num_devices,
        devices_for_state=needed,
        binds="compute" if needed <= cluster.num_devices else "memory capacity",
    )


def _decode_bound(
    model: ModelSpec,
    workload: WorkloadSpec,
    cluster: ClusterSpec,
    count: ParameterCount,
    flops: DecodeFlops,
    memory: InferenceMemory,
) -> DecodeBound:
    devices = math.ceil(memory.total / cluster.device.memory_bytes)
    compute = workload.batch_size * flops.total / (devices * peak_flops_per_s(cluster.device, workload.weight_format))
    read, unread = 0.0, 0.0
    if model.moe is not None:
        experts = model.moe.num_routed_experts
        read = expected_distinct_experts(experts, model.moe.num_experts_per_token, workload.batch_size)
        unread = count.routed_experts * (1 - read / experts)
    share = weight_bytes(count, workload.weight_format) / count.total
    # One row of the embedding is read per sequence; a head of its own is read whole.
    skipped = unread + (0 if model.tie_embeddings else count.embedding)
    bandwidth = (memory.total - share * skipped) / (devices * cluster.device.memory_bandwidth_bytes_per_s)
    step = max(compute, bandwidth)
    limit: Resource = "compute" if compute > bandwidth else "memory bandwidth"
    return DecodeBound(
        num_devices=devices,
        experts_read=read,
        compute_s=compute,
        bandwidth_s=bandwidth,
        step_s=step,
        tokens_per_s=workload.batch_size / step,
        binds=limit if devices <= cluster.num_devices else "memory capacity",
    )
