"""How a model is laid out over devices: degrees of parallelism, micro-batches, schedule and recomputation.

Axes, from the fastest links outward: ``tp`` (tensor, with sequence parallelism of what lies between), ``ep`` (experts,
over the data-parallel devices of a stage), ``dp`` (data), ``pp`` (pipeline). ``tp * dp * pp`` devices train. The
experts of a stage are spread over ``ep`` of its ``tp * dp`` devices, so ``ep`` divides ``tp * dp``; ``tp = 1`` with
``ep > 1`` is the usual case of a mixture of experts.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cofire.spec.spec_type import NonNegative, Positive, Spec, nearest_divisor

ScheduleName = Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]
RecomputeName = Literal["none", "selective", "full"]


class ParallelSpec(Spec):
    """A layout.

    ``recompute``: ``selective`` computes norms, activations and up-projections of latents anew (DeepSeek-V3), and the
    attention core where the kernel keeps its scores; ``full`` keeps the input of each layer alone.
    ``zero_stage``: 0 keeps whole optimiser states, 1 shards them over data parallelism, 3 shards weights too.
    """

    kind: Literal["parallel"] = "parallel"
    pp: Positive = 1
    dp: Positive = 1
    ep: Positive = 1
    tp: Positive = 1
    micro_batch_size: Positive = 1
    schedule: ScheduleName = "1f1b"
    stages_per_rank: Positive = Field(default=1, description="of the interleaved schedule")
    recompute: RecomputeName = "none"
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    zero_stage: Annotated[NonNegative, Field(le=3)] = 1
    sequence_parallel: bool = True
    attention_kernel: Literal["flash", "scores"] = Field(
        default="flash", description="scores: a kernel that writes all attention scores to memory"
    )
    overlap_transfers: bool = Field(
        default=True, description="send to the next stage beside computation; false: a stage waits for its transfers"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dp * self.tp % self.ep:
            raise ValueError(
                f"ep = {self.ep} must divide dp x tp = {self.dp * self.tp}; "
                f"nearest: {nearest_divisor(self.dp * self.tp, self.ep)}"
            )
        if self.zero_stage == 2:
            raise ValueError("zero_stage = 2 is not planned; take 1, which shards the optimiser, or 3")
        if self.stages_per_rank > 1 and self.schedule != "interleaved":
            raise ValueError(
                f"stages_per_rank = {self.stages_per_rank} is for the interleaved schedule; {self.schedule} has its own"
            )
        return self

    @property
    def num_devices(self) -> int:
        """Devices that the layout needs."""
        return self.pp * self.dp * self.tp
