"""How many bytes each pipeline rank of a layout holds, by role.

- ``weights``: what matrix products read: BF16, or FP8 with BF16 embedding and head.
- ``gradients``: FP32 sums over micro-batches.
- ``optimizer``: FP32 master weights and two moments, sharded over data parallelism from ZeRO stage 1 on.
- ``activations``: of all micro-batches in flight (``cofire.plan.activations``), as the schedule's simulation counts
  them.
- ``buffers``: what exists for a moment: logits, gathered hidden states, rows on their way to experts, the layer that is
  being recomputed, gradients being reduced.
- ``reserved``: context, kernels and communication library, an assumption of the device.

DualPipe holds two stages per rank with both copies' weights and gradients; the optimiser's states exist once
(DeepSeek-V3 technical report, section 3.2.1). Experts of a rank are the logical ones; ``load_skew`` makes the fullest
device's rows longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cofire.plan.kernels import BlockKind
from cofire.plan.parameters import ParameterCount
from cofire.plan.stages import Stage
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

ROLES = ("weights", "gradients", "optimizer", "activations", "buffers", "reserved")

_BUCKET_BYTES = 200e6  # of gradients on their way, as data-parallel libraries size them


class RankMemory(Spec):
    """Bytes of one pipeline rank."""

    rank: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    reserved: float

    @property
    def total(self) -> float:
        """All roles."""
        return sum(getattr(self, role) for role in ROLES)


class BlockParameters:
    """Parameters of each kind of block on one device of a layout, experts apart."""

    def __init__(self, model: ModelSpec, count: ParameterCount, layout: ParallelSpec) -> None:
        hidden, moe, tp = model.hidden_size, model.moe, layout.tp
        whole = 0
        if isinstance(model.attention, MLASpec):  # the projections down to latents are on every device
            whole = hidden * (model.attention.cache_width + (model.attention.q_lora_rank or 0))
        # Without expert parallelism an expert is cut over the tensor axis; with it, whole experts are spread.
        cut = 1 if layout.ep > 1 else tp
        shared = moe.num_shared_experts * count.expert / cut if moe else 0
        self.dense: dict[BlockKind, float] = {
            "embedding": count.embedding / tp,
            "head": 0.0,  # once, below, whatever the number of passes
            "attention": whole + (count.attention_per_layer - whole) / tp + hidden,
            "dense": count.dense_ffn_per_layer / tp + hidden,
            "moe": shared + count.router_per_layer + hidden,
            "mtp_entry": 2 * hidden * hidden + 3 * hidden,
        }
        self.head = (count.head or count.embedding) / tp
        self.experts: dict[BlockKind, float] = dict.fromkeys(self.dense, 0.0)
        if moe:
            self.experts["moe"] = moe.num_routed_experts * count.expert / cut / layout.ep
        self._of: dict[Stage, tuple[float, float, float]] = {}

    def of(self, stage: Stage) -> tuple[float, float, float]:
        """Return a stage's parameters: in 16 bits at least (embedding and head), other dense ones, experts'."""
        found = self._of.get(stage)
        if found is None:
            wide = stage.count("embedding") * self.dense["embedding"] + (self.head if stage.count("head") else 0.0)
            dense = stage.total(self.dense) - stage.count("embedding") * self.dense["embedding"]
            found = self._of[stage] = (wide, dense, stage.total(self.experts))
        return found


def rank_memory(
    parameters: BlockParameters,
    layout: ParallelSpec,
    workload: WorkloadSpec,
    hosted: Sequence[Sequence[Stage]],
    kept: Mapping[BlockKind, float],
    peaks: Sequence[int],
    buffers: Sequence[float],
    reserved_bytes: float,
) -> list[RankMemory]:
    """Return the memory of each rank.

    Args:
        parameters: Per block.
        layout: Degrees and formats.
        workload: Formats of moments.
        hosted: For each rank, the stages whose weights it holds, copies counted.
        kept: Activations of one micro-batch per block, bytes.
        peaks: For each rank, micro-batches' chunks in flight.
        buffers: For each rank, bytes.
        reserved_bytes: See the module's text.
    """
    weight_bytes = {"fp32": 4, "bf16": 2, "fp8": 1}[layout.precision]
    wide_bytes = 4 if layout.precision == "fp32" else 2
    master = 0 if layout.precision == "fp32" else 4
    state_bytes = master + 2 * (4 if workload.moments == "fp32" else 2) + (4 if workload.ema else 0)
    sharded = layout.zero_stage >= 1
    dense_shards = layout.dp if sharded else 1
    expert_shards = max(1, layout.dp * (layout.tp if layout.ep > 1 else 1) // layout.ep) if sharded else 1
    whole = layout.zero_stage < 3
    copies = 2 if layout.schedule == "dualpipe" else 1
    rows = []
    for rank, stages in enumerate(hosted):
        wide = dense = experts = 0.0
        for stage in stages:
            parts = parameters.of(stage)
            wide, dense, experts = wide + parts[0], dense + parts[1], experts + parts[2]
        dense_cut, expert_cut = (1, 1) if whole else (dense_shards, expert_shards)
        held = (wide_bytes * wide + weight_bytes * dense) / dense_cut + weight_bytes * experts / expert_cut
        summed = 4 * ((wide + dense) / dense_cut + experts / expert_cut)
        states = state_bytes * ((wide + dense) / dense_shards + experts / expert_shards) / copies
        chunk = max((stage.total(kept) for stage in stages), default=0.0)
        rows.append(
            RankMemory(
                rank=rank,
                weights=held,
                gradients=summed,
                optimizer=states,
                activations=peaks[rank] * chunk,
                buffers=buffers[rank] + min(_BUCKET_BYTES, summed),
                reserved=reserved_bytes,
            )
        )
    return rows
