"""What a plan is asked about: how a model is trained and served, where the model alone does not say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cofire.spec.figure import Figure
from cofire.spec.spec_type import Positive, Spec


class WorkloadSpec(Spec):
    """Sizes and formats of training and decoding on one device.

    Training: ``micro_batch_size`` sequences of ``sequence_length`` tokens at a time. Decoding: ``batch_size``
    sequences that each attend to ``context_length`` tokens.
    """

    kind: Literal["workload"] = "workload"
    sequence_length: Positive = 4096
    micro_batch_size: Positive = 1
    global_batch_size: Positive | None = Field(
        default=None, description="sequences of an optimiser step, of a layout; none: 8 micro-batches per pipeline"
    )
    recipe: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: matrix products in bfloat16 over FP32 master weights"
    )
    moments: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "full"] = "none"
    ema: bool = Field(default=False, description="keep a moving average of the weights, in FP32")
    context_length: Positive = 4096
    batch_size: Positive = 1
    weight_format: Literal["fp32", "bf16", "fp8"] = Field(default="bf16", description="weights in decoding")
    expert_load_skew: Figure = Field(
        default=Figure(value=1.2, low=1.05, high=1.5, source="a batch balanced by a bias; a device's experts even out"),
        description="load of the fullest device over the mean, for routed experts spread over devices",
    )
    cache_bytes_per_number: Annotated[int | float, Field(gt=0)] = 2


class PipelineSpec(Spec):
    """A pipeline to compare schedules on: how many ranks and micro-batches, and the times of one.

    Times are those of a micro-batch through a rank's whole share of the layers.
    """

    num_ranks: Positive = Field(default=8, description="pipeline ranks")
    num_micro_batches: Positive = Field(default=20, description="of an optimiser step")
    stages_per_rank: Positive = Field(default=2, description="of the interleaved schedule")
    forward_s: Annotated[float, Field(gt=0)] = Field(default=1.0, description="forward pass")
    backward_s: Annotated[float, Field(gt=0)] = Field(default=2.0, description="whole backward pass")
    weight_s: Annotated[float, Field(ge=0)] = Field(default=1.0, description="the weight-gradient part of it")
    overlapped_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="a forward and a backward pass that overlap; none: their sum"
    )
    transfer_s: Annotated[float, Field(ge=0)] = Field(default=0.0, description="from rank to rank")
