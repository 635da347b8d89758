"""The workload that a model or a run is planned with when nobody says otherwise."""

from __future__ import annotations

from cofire.spec.model import ModelSpec
from cofire.spec.run import RunSpec
from cofire.spec.workload import WorkloadSpec


def default_workload(model: ModelSpec) -> WorkloadSpec:
    """The workload of the papers' tables, 4096 tokens, or the model's longest sequence if that is shorter."""
    length = min(4096, model.max_sequence_length)
    return WorkloadSpec(sequence_length=length, context_length=length)


def run_workload(run: RunSpec) -> WorkloadSpec:
    """The workload of a training run.

    ``auto`` precision is planned as FP32: which format is faster is measured only when the run starts. So is ``fp8``,
    which a CPU emulates in FP32; what it keeps for the backward pass is smaller.
    """
    return WorkloadSpec(
        sequence_length=run.data.sequence_length,
        micro_batch_size=run.micro_batch_size,
        recipe="bf16" if run.precision.recipe == "bf16" else "fp32",
        moments=run.precision.moment_format,
        recompute=run.recompute,
        ema=run.ema_decay is not None,
        context_length=min(1024, run.model.max_sequence_length),
        weight_format="fp32",
        cache_bytes_per_number=4,
    )
