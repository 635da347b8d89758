"""What a training run is: a model, its data, its optimiser, and what is saved when.

The defaults are the DeepSeek-V3 technical report's (section 4.2) where they carry over to any size,
and values that train the ``small`` preset on a laptop otherwise.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cofire.spec.model import ModelSpec
from cofire.spec.precision import PrecisionSpec
from cofire.spec.spec_type import NonNegative, Positive, Spec, nearest_divisor

Fraction = Annotated[float, Field(ge=0, le=1)]


class DataSpec(Spec):
    """Which text is read and how it becomes tokens.

    ``paths`` are fsspec paths or globs of text, JSONL or Parquet; ``stdlib`` is the source of the
    running Python's own standard library. ``sequence_length`` is T: a sample has T + 1 tokens.
    """

    paths: tuple[str, ...] = ("stdlib",)
    text_field: str = Field(
        default="text", description="field or column that holds the text of JSONL and Parquet records"
    )
    tokenizer: str | None = Field(default=None, description="a tokenizer.json to use instead of training one")
    sequence_length: Positive = 512
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    cache: str | None = Field(
        default=None, description="folder of tokenizers and token files; none: the user's cache folder"
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("paths")
    @classmethod
    def _some_path(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("must name at least one file, folder or glob, none of them empty; stdlib is built in")
        return value


class OptimizerSpec(Spec):
    """AdamW with decoupled weight decay and global-norm clipping."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class ScheduleSpec(Spec):
    """Learning rate over steps: linear warm-up, then ``cosine`` decay to the floor, ``wsd``
    (warm-up, stable, decay: flat until the last ``decay_fraction`` of the steps, then linear to the
    floor) or ``constant``.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 40
    decay_fraction: Fraction = 0.2
    final_ratio: Fraction = Field(default=0.1, description="floor of the learning rate as a fraction of its peak")


class CheckpointSpec(Spec):
    """How often a resumable state is written, and how many are kept."""

    every_steps: Positive = 50
    keep: Positive = 2
    asynchronous: bool = True


class RunSpec(Spec):
    """A training run.

    ``batch_size`` sequences make one optimiser step; they are processed ``micro_batch_size`` at a time.
    """

    kind: Literal["run"] = "run"
    name: str = "run"
    description: str = ""
    model: ModelSpec
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    precision: PrecisionSpec = PrecisionSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    steps: Positive = 400
    batch_size: Positive = 8
    micro_batch_size: Positive = 8
    seed: NonNegative = 0
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    compile: bool = False
    recompute: Literal["none", "full"] = "none"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    validate_every_steps: Positive = 50
    validation_sequences: Positive = 64

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} must divide batch_size = {self.batch_size}; "
                f"nearest: {nearest_divisor(self.batch_size, self.micro_batch_size)}"
            )
        if self.data.sequence_length > self.model.max_sequence_length:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} must be at most "
                f"model.max_sequence_length = {self.model.max_sequence_length}"
            )
        if self.model.mtp is not None and self.data.sequence_length <= self.model.mtp.depth:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} must exceed mtp.depth = {self.model.mtp.depth}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Predicted positions per optimiser step."""
        return self.batch_size * self.data.sequence_length

    @property
    def training_tokens(self) -> int:
        """Predicted positions of the whole run."""
        return self.steps * self.tokens_per_step
