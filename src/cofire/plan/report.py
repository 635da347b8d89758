"""A plan as a value and as an engineer's note.

:class:`Plan` holds the questions (model, run, workload, cluster) beside every answer, so that a saved plan can be
read, compared and computed again. :func:`note` renders it with rich.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, Self

from cofire.plan.bounds import Bounds
from cofire.plan.flops import DecodeFlops, TrainingFlops
from cofire.plan.inference import mtp_speed_up
from cofire.plan.kv_cache import KVCacheSize
from cofire.plan.machine import MachinePrediction
from cofire.plan.memory import InferenceMemory, MemoryEstimate
from cofire.plan.parameters import ParameterCount
from cofire.plan.training import TrainingPlan
from cofire.plan.training_note import training_note
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import load_value, save
from cofire.spec.model import ModelSpec
from cofire.spec.run import RunSpec
from cofire.spec.spec_type import Spec
from cofire.spec.units import format_count, format_duration, format_quantity
from cofire.spec.workload import WorkloadSpec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BAR_WIDTH = 32


class RunCost(Spec):
    """What a whole training run computes; recomputed forward passes are not counted."""

    tokens_per_step: int
    tokens: int
    flops_per_step: int
    flops: int


class Plan(Spec):
    """What a model costs: parameters, cache, operations, memory, and bounds on a cluster if one was given.

    ``training_memory_other`` is the same training with the opposite choice of recomputation. ``training`` is how the
    whole cluster trains the model; where no layout can be taken, ``training_refused`` says why. ``machine`` is a
    run's step on a machine that was calibrated.
    """

    kind: Literal["plan"] = "plan"
    model: ModelSpec
    run: RunSpec | None = None
    workload: WorkloadSpec
    cluster: ClusterSpec | None = None
    parameters: ParameterCount
    kv_cache: KVCacheSize
    training_flops: TrainingFlops
    training_memory: MemoryEstimate
    training_memory_other: MemoryEstimate
    run_cost: RunCost | None = None
    decode_flops: DecodeFlops
    inference_memory: InferenceMemory
    bounds: Bounds | None = None
    training: TrainingPlan | None = None
    training_refused: str = ""
    machine: MachinePrediction | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values; ``Plan.from_dict`` gives an equal plan."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """Return the plan that :meth:`to_dict` described."""
        return cls.model_validate(table)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            SpecError: The file cannot be written.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan that :meth:`save` wrote.

        Raises:
            SpecError: The file cannot be read or is no plan.
        """
        return load_value(cls, path)


def note(plan: Plan, explain: bool = False) -> RenderableType:
    """Return the plan as an engineer's note, to be printed by a rich console; ``explain`` adds the formulas."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(_title(plan), style="bold"),
        _parameter_table(plan),
        _cache_table(plan),
        _flops_table(plan),
        _memory_table(plan),
    ]
    if plan.bounds is not None:
        parts.append(_bounds_table(plan))
    if plan.training is not None and plan.cluster is not None:
        parts += training_note(plan.training, plan.cluster, explain)
    if plan.machine is not None:
        parts.append(_machine_table(plan.machine))
    parts.append(Text("\n".join(_remarks(plan)), style="dim"))
    return Group(*(item for part in parts for item in (part, Text(""))))


def _title(plan: Plan) -> str:
    model, work = plan.model, plan.workload
    count = plan.parameters
    subject = f"run {plan.run.name} of {model.name}" if plan.run else model.name
    return (
        f"{subject}: {format_count(count.total)} parameters, {format_count(count.activated_head_only)} activated per "
        f"token; trained on {work.micro_batch_size} x {work.sequence_length} tokens in {work.recipe}"
    )


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold cyan", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in (1, 2) else "left", no_wrap=index < 3)
    return table


def _parameter_table(plan: Plan) -> Table:
    count = plan.parameters
    table = _table("Parameters", "role", "count", "share", "")
    for role, number in count.by_role().items():
        if number:
            share = number / count.total
            table.add_row(role.replace("_", " "), f"{number:,}", f"{share:.1%}", _bar(share))
    table.add_section()
    table.add_row("total", f"{count.total:,}", "", "")
    table.add_row("activated, both embeddings", f"{count.activated_with_both_embeddings:,}", "", "")
    table.add_row("activated, head only", f"{count.activated_head_only:,}", "", "the papers' rule")
    table.add_row("activated, no embeddings", f"{count.activated_without_embeddings:,}", "", "")
    if count.mtp.depth:
        table.add_row(
            "MTP modules, apart", f"{count.mtp.total:,}", "", f"{format_count(count.mtp.activated)} activated"
        )
    return table


def _cache_table(plan: Plan) -> Table:
    cache = plan.kv_cache
    table = _table("Key-value cache", "per token", "bytes", "", "")
    numbers = f"{plan.model.num_layers} layers x {cache.width} numbers x {cache.bytes_per_number:g} B"
    table.add_row("as stored", _integer(cache.bytes_per_token), "", numbers)
    if plan.parameters.mtp.depth:
        table.add_row("with MTP modules", _integer(cache.bytes_per_token_with_mtp), "", "for speculative decoding")
    ratio = cache.bytes_per_token_expanded / cache.bytes_per_token
    if ratio > 1:
        table.add_row("if every head were cached", _integer(cache.bytes_per_token_expanded), "", f"{ratio:.1f} times")
    return table


def _flops_table(plan: Plan) -> Table:
    training, decode = plan.training_flops, plan.decode_flops
    table = _table("Operations per token", "", "FLOP", "", "")
    flop = "FLOP"
    table.add_row("training, matrices", format_quantity(training.matrices, flop), "", "6 x activated (head only)")
    table.add_row("training, attention core", format_quantity(training.attention, flop), "", _causal(training))
    table.add_row("training, main model", format_quantity(training.main, flop), "", "the papers' rule")
    if training.mtp:
        table.add_row("training, MTP modules", format_quantity(training.mtp, flop), "", "head passes included")
        table.add_row("training, all that runs", format_quantity(training.total, flop), "", "what MFU divides by")
    text = f"{decode.form} attention, {decode.context_length} tokens of context"
    table.add_row("decoding", format_quantity(decode.total, flop), "", text)
    if plan.run_cost is not None:
        cost = plan.run_cost
        table.add_section()
        step = f"{cost.tokens_per_step:,} tokens"
        table.add_row("one optimiser step", format_quantity(cost.flops_per_step, flop), "", step)
        table.add_row("the whole run", format_quantity(cost.flops, flop), "", f"{format_count(cost.tokens)} tokens")
    return table


def _memory_table(plan: Plan) -> Table:
    memory, other, work = plan.training_memory, plan.training_memory_other, plan.workload
    table = _table("Memory on one device that holds the whole model", "", "bytes", "share", "")
    for role in ("weights", "gradients", "optimizer", "activations"):
        size = getattr(memory, role)
        table.add_row(role, format_quantity(size, "B"), f"{size / memory.total:.1%}", _bar(size / memory.total))
    for part, size in memory.activation_parts.items():
        if size:
            share = f"{size / memory.total:.1%}"
            table.add_row(f"  {part.replace('_', ' ')}", format_quantity(size, "B"), share, "modelled")
    name = {"none": "no recomputation", "full": "full recomputation"}
    opposite = "none" if work.recompute == "full" else "full"
    table.add_section()
    table.add_row(f"training, {name[work.recompute]}", format_quantity(memory.total, "B"), "", "")
    table.add_row(f"training, {name[opposite]}", format_quantity(other.total, "B"), "", "")
    serving = plan.inference_memory
    text = (
        f"weights {format_quantity(serving.weights, 'B')} in {work.weight_format}, cache "
        f"{format_quantity(serving.cache, 'B')} for {work.batch_size} x {work.context_length} tokens"
    )
    table.add_row("decoding", format_quantity(serving.total, "B"), "", text)
    return table


def _bounds_table(plan: Plan) -> Table:
    assert plan.bounds is not None
    assert plan.cluster is not None
    train, decode, cluster = plan.bounds.training, plan.bounds.decode, plan.cluster
    title = f"Bounds on {cluster.name}: {cluster.num_devices} x {cluster.device.name}"
    table = _table(title, "", "at best", "", "binds")
    rate = format_quantity(train.tokens_per_s, "token/s")
    table.add_row(f"training, {train.num_devices} devices", rate, "", train.binds)
    hours = format_count(train.device_hours_per_trillion_tokens)
    table.add_row("  per trillion tokens", f"{hours} device hours", "", "")
    room = format_quantity(cluster.device.memory_bytes, "B")
    verdict = f"needs >= {train.devices_for_state:,} devices of {room}, before activations"
    share = format_quantity(train.state_bytes_per_device, "B")
    table.add_row("  state per device, split evenly", share, "", verdict)
    step = format_duration(decode.step_s)
    table.add_row(f"decoding step, {decode.num_devices} devices", step, "", decode.binds)
    table.add_row("  set by compute", format_duration(decode.compute_s), "", "")
    experts = plan.model.moe.num_routed_experts if plan.model.moe else 0
    read = f"{decode.experts_read:.1f} of {experts} experts read per layer" if experts else ""
    table.add_row("  set by memory bandwidth", format_duration(decode.bandwidth_s), "", read)
    table.add_row("  all sequences", format_quantity(decode.tokens_per_s, "token/s"), "", "")
    if plan.parameters.mtp.depth == 1:
        gain = mtp_speed_up(0.85, plan.model.num_layers)
        table.add_row("  with MTP drafts", f"x {gain:.2f}", "", "assumed: 85% accepted, rest as without")
    return table


def _machine_table(machine: MachinePrediction) -> Table:
    step, peak = machine.step_s, machine.peak_memory_bytes
    table = _table(f"A step on this machine, in {machine.recipe}", "", "time", "share", "")
    for part in sorted(machine.parts, key=lambda one: -one.total_s):
        share = part.total_s / step.value
        table.add_row(part.part, format_duration(part.total_s), f"{share:.1%}", _bar(share))
    table.add_section()
    ends = f"{format_duration(step.low)} to {format_duration(step.high)}, modelled from {step.label} rates"
    table.add_row("one optimiser step", format_duration(step.value), "", ends)
    ends = f"{format_quantity(peak.low, 'B')} to {format_quantity(peak.high, 'B')}, of the process"
    table.add_row("peak memory", format_quantity(peak.value, "B"), "", ends)
    return table


def _remarks(plan: Plan) -> list[str]:
    remarks = [
        "Counts, cache and state are exact formulas over the spec. Activations are modelled.",
        "Memory is that of tensors; the framework and its allocator come on top (measured on a CPU: 0.4 GB and more).",
    ]
    if plan.bounds is not None:
        remarks.append(
            "Bounds are modelled from the vendor's peaks; assumed: an even split, no communication, uniform routing."
        )
        needed, cluster = plan.bounds.decode.num_devices, plan.cluster
        if cluster is not None and needed > cluster.num_devices:
            remarks.append(f"Decoding needs {needed} devices; {cluster.name} has {cluster.num_devices}.")
    if plan.training is not None:
        remarks.append(
            "A step is modelled from kernels, traffic and the schedule's simulation; in brackets, figures at the ends "
            "of their intervals, taken as independent. cofire plan layouts looks further."
        )
    if plan.training_refused:
        remarks.append(f"No training plan: {plan.training_refused}.")
    if plan.run is not None and plan.run.precision.recipe == "auto":
        remarks.append("precision.recipe = auto is planned as fp32; the run takes the faster one it measures.")
    if plan.run is not None and plan.run.precision.recipe == "fp8":
        remarks.append("precision.recipe = fp8 is planned as fp32; a CPU emulates FP8 in that or in bf16.")
    return remarks


def _causal(training: TrainingFlops) -> str:
    return f"{training.sequence_length} tokens, {'causal half' if training.causal else 'full square'}"


def _integer(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _bar(share: float) -> str:
    return "#" * round(share * _BAR_WIDTH)
