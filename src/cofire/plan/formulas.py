"""A plan's reasoning as lines: each formula, with the numbers of this model, cluster and layout in, and its result."""

from __future__ import annotations

from collections.abc import Iterator

from cofire.network.collective_time import collective_time_s
from cofire.plan.device_memory import ROLES
from cofire.plan.step import StepEstimate, StepModel, num_stages
from cofire.plan.traffic import expert_traffic, hidden_bytes, transfer_bytes
from cofire.spec.spec_type import Spec
from cofire.spec.units import format_duration, format_quantity


class Formula(Spec):
    """One line: what it is, the formula, its numbers, and what comes out."""

    name: str
    formula: str
    numbers: str
    result: str


def formulas(steps: StepModel, step: StepEstimate) -> list[Formula]:
    """Return how a step's figures come about."""
    rows = [*_work(steps, step), *_rates(steps, step), *_traffic(steps, step), *_answers(steps, step)]
    return [
        Formula(name=name, formula=formula, numbers=numbers, result=result) for name, formula, numbers, result in rows
    ]


_Row = tuple[str, str, str, str]


def _work(steps: StepModel, step: StepEstimate) -> Iterator[_Row]:
    model, length, layout = steps.model, steps.workload.sequence_length, step.layout
    attention = model.attention
    yield (
        "FLOP per token",
        "6 N + 3 L s h (d_qk + d_v)",
        f"6 x {steps.count.activated_head_only / 1e9:.3f}e9 + 3 x {model.num_layers} x {length} x "
        f"{attention.num_heads} x ({attention.qk_head_dim} + {attention.v_head_dim})",
        format_quantity(steps.flops.main, "FLOP"),
    )
    yield (
        "tokens per step",
        "micro-batches x micro-batch x dp x s",
        f"{step.num_micro_batches} x {layout.micro_batch_size} x {layout.dp} x {length}",
        f"{step.tokens_per_step:,}",
    )


def _rates(steps: StepModel, step: StepEstimate) -> Iterator[_Row]:
    device, number_format = steps.cluster.device, step.layout.precision
    peak, rate = device.peak_flops_per_s[number_format], steps.rates.matrix_flops_per_s(number_format)
    yield (
        "matrix rate",
        f"peak in {number_format} x efficiency",
        f"{format_quantity(peak, 'FLOP/s')} x {rate / peak:.3g}",
        format_quantity(rate, "FLOP/s"),
    )
    yield (
        "memory rate",
        "bandwidth x efficiency",
        f"{format_quantity(device.memory_bandwidth_bytes_per_s, 'B/s')} x {device.memory_efficiency.value:.3g}",
        format_quantity(steps.rates.memory_bytes_per_s, "B/s"),
    )
    yield (
        "time of a kernel",
        "FLOP / matrix rate + bytes / memory rate + latency",
        f"latency {steps.rates.kernel_latency_s * 1e6:.3g} us",
        "summed over the kernels of a stage",
    )


def _traffic(steps: StepModel, step: StepEstimate) -> Iterator[_Row]:
    layout, length, model = step.layout, steps.workload.sequence_length, steps.model
    if layout.tp > 1:
        size, group = hidden_bytes(model, layout, length), steps.links.group(layout.tp)
        yield (
            "tensor-parallel exchange",
            "b s d bytes (tp - 1) / tp / bandwidth",
            f"{format_quantity(size, 'B')} x {layout.tp - 1} / {layout.tp} / "
            f"{format_quantity(group.inside.bandwidth_bytes_per_s, 'B/s')}",
            format_duration(collective_time_s("all_gather", size, group, "ring")),
        )
    if layout.ep > 1:
        for way in ("dispatch", "combine"):
            sent = expert_traffic(model, layout, length, steps.links, way)
            yield (
                f"expert {way}",
                "slower of: network bytes / bandwidth, fast-link bytes / bandwidth",
                f"{sent.nodes:.2f} nodes and {sent.devices:.2f} devices per token: "
                f"{format_quantity(sent.network_bytes, 'B')}, {format_quantity(sent.scale_up_bytes, 'B')}",
                format_duration(sent.time_s),
            )
    if layout.pp > 1:
        size = transfer_bytes(model, layout, length)
        group = steps.links.group(layout.num_devices)
        wire = group.across if group.num_nodes > 1 else group.inside
        yield (
            "transfer between stages",
            "b s d bytes / tp / bandwidth",
            f"{format_quantity(size, 'B')} / {format_quantity(wire.bandwidth_bytes_per_s, 'B/s')}",
            format_duration(steps.links.transfer_s(size, layout.num_devices)),
        )


def _answers(steps: StepModel, step: StepEstimate) -> Iterator[_Row]:
    yield (
        "step",
        "makespan of the schedule + exposed gradients + optimiser",
        f"{step.pipeline_s:.3f} s + {step.part_s('data-parallel network'):.3f} s + {step.part_s('optimizer'):.3f} s "
        f"({num_stages(step.layout)} stages, {step.num_micro_batches} micro-batches)",
        format_duration(step.step_s),
    )
    yield (
        "MFU",
        "tokens/s x FLOP per token / (devices x 16-bit peak)",
        f"{step.tokens_per_s:,.0f} x {steps.flops.main / 1e9:.1f}e9 / ({step.num_devices} x peak)",
        f"{step.mfu:.1%}",
    )
    yield (
        "device hours per 1e12 tokens",
        "1e12 / (tokens/s) / 3600 x devices",
        f"1e12 / {step.tokens_per_s:,.0f} / 3600 x {step.num_devices}",
        f"{step.device_hours_per_trillion_tokens:,.0f}",
    )
    fullest = step.memory[step.peak_memory_rank]
    yield (
        f"memory of rank {fullest.rank}, GB",
        " + ".join(ROLES),
        " + ".join(f"{getattr(fullest, role) / 1e9:.2f}" for role in ROLES),
        format_quantity(fullest.total, "B"),
    )
    price = steps.cluster.device_hour_usd
    if step.usd_per_trillion_tokens is not None and price is not None:
        yield (
            "$ per 1e12 tokens",
            "device hours x rent",
            f"{step.device_hours_per_trillion_tokens:,.0f} x ${price.value:g}",
            f"${step.usd_per_trillion_tokens:,.0f}",
        )
