"""A step's kernels, memory and time against the FLOP rules, closed forms and invariants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.plan.activations import block_activation_bytes
from cofire.plan.flops import training_flops_per_token
from cofire.plan.kernels import BlockKind, block_kernels
from cofire.plan.parameters import count_parameters
from cofire.plan.stages import cut_stages, end_blocks, layer_kinds
from cofire.plan.step import StepModel
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

MODELS = ["deepseek-v3", "deepseek-v2-lite", "deepseekmoe-16b", "qwen2.5-72b", "small"]


def model(name: str) -> ModelSpec:
    return load_as(ModelSpec, name)


def cluster(name: str, *changes: str) -> ClusterSpec:
    return load_as(ClusterSpec, name, changes)


def step_model(name: str, machine: str = "h800-2048", **work: object) -> StepModel:
    return StepModel(model(name), cluster(machine), WorkloadSpec.model_validate({"sequence_length": 2048, **work}))


def blocks(spec: ModelSpec) -> dict[BlockKind, int]:
    """How often each block runs, written down by hand."""
    depth = spec.mtp.depth if spec.mtp else 0
    last: BlockKind = "moe" if spec.moe else "dense"
    counts: dict[BlockKind, int] = {
        "embedding": 1,
        "attention": spec.num_layers + depth,
        "dense": spec.num_dense_layers,
        "moe": spec.num_moe_layers,
        "head": 1 + depth,
        "mtp_entry": depth,
    }
    counts[last] += depth
    return {kind: number for kind, number in counts.items() if number}


@pytest.mark.parametrize("name", MODELS)
def test_operations_of_all_kernels_are_the_papers_rule(name: str) -> None:
    spec, length = model(name), 1024
    layout, flops = ParallelSpec(), dict.fromkeys(("matrix", "attention"), 0.0)
    for kind, number in blocks(spec).items():
        for kernel in block_kernels(spec, kind, layout, length):
            if kernel.work == "attention":
                forward, backward, weight = kernel.flops
                assert (backward, weight) == (2.5 * forward, 0.0)
                flops["attention"] += number * forward * 3  # the rule counts twice the forward pass for the backward
            else:
                flops["matrix"] += number * sum(kernel.flops)
    rule = training_flops_per_token(spec, length)
    depth = spec.mtp.depth if spec.mtp else 0
    core = rule.attention * (spec.num_layers + depth) / spec.num_layers
    assert flops["attention"] == pytest.approx(length * core, rel=1e-12)
    # The rule also multiplies norms, biases and the selection bias by six; products do not.
    assert flops["matrix"] == pytest.approx(length * (rule.total - core), rel=2e-3)
    assert flops["matrix"] <= length * (rule.total - core)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallelism_divides_the_products(name: str, tp: int) -> None:
    spec = model(name)
    for kind in ("attention", "dense", "head"):
        whole = sum(kernel.flops[0] for kernel in block_kernels(spec, kind, ParallelSpec(), 512))
        cut = sum(kernel.flops[0] for kernel in block_kernels(spec, kind, ParallelSpec(tp=tp), 512))
        if spec.attention.kind == "mla" and kind == "attention":
            assert whole / tp < cut < whole  # the projections down to latents are done by every device
        else:
            assert cut == pytest.approx(whole / tp, rel=1e-12)


def test_kept_activations_of_a_gpt_layer_are_near_korthikantis_formula() -> None:
    # s b h (34 + 5 a s / h) without recomputation, s b h 34 with the scores recomputed (arXiv 2205.05198, eq. 1 and 4);
    # ours keeps no dropout masks outside of attention, which are 2 of the 34.
    spec = model("megatron-22b")
    sbh, scores = 2048 * spec.hidden_size, 5 * 64 * 2048 / spec.hidden_size
    for recompute, formula in (("none", 34 + scores), ("selective", 34)):
        layout = ParallelSpec(attention_kernel="scores", recompute=recompute)
        kept = sum(block_activation_bytes(spec, kind, layout, 2048) for kind in ("attention", "dense"))
        assert kept == pytest.approx(sbh * formula, rel=0.08)
    full = ParallelSpec(recompute="full")
    assert sum(block_activation_bytes(spec, kind, full, 2048) for kind in ("attention", "dense")) == 2 * sbh


def test_weights_and_states_of_all_ranks_are_those_of_the_model() -> None:
    plain = step_model("deepseekmoe-16b")
    layout = ParallelSpec(pp=4, dp=8, ep=8, zero_stage=1)
    rows = plain.estimate(layout).memory
    parameters = count_parameters(model("deepseekmoe-16b"))
    experts = parameters.routed_experts / 8
    dense = parameters.total - parameters.routed_experts
    assert sum(row.weights for row in rows) == pytest.approx(2 * (dense + experts), rel=1e-4)
    assert sum(row.gradients for row in rows) == pytest.approx(4 * (dense + experts), rel=1e-4)
    assert sum(row.optimizer for row in rows) == pytest.approx(12 * (dense / 8 + experts), rel=1e-4)


def test_dualpipe_holds_weights_twice_and_states_once() -> None:
    plain = step_model("deepseek-v2")
    one = plain.estimate(ParallelSpec(pp=4, dp=8, ep=8, recompute="full"))
    two = plain.estimate(ParallelSpec(pp=4, dp=8, ep=8, recompute="full", schedule="dualpipe"))

    def total(rows: object, role: str) -> float:
        return sum(getattr(row, role) for row in rows.memory)  # type: ignore[attr-defined]

    assert total(two, "weights") == pytest.approx(2 * total(one, "weights"))
    assert total(two, "optimizer") == pytest.approx(total(one, "optimizer"))


def test_parts_sum_to_the_step() -> None:
    plain = step_model("deepseek-v3")
    for layout in (
        ParallelSpec(pp=8, dp=32, ep=32, schedule="dualpipe", precision="fp8", recompute="selective"),
        ParallelSpec(pp=4, dp=16, ep=16, tp=4),
        ParallelSpec(dp=64, ep=64, zero_stage=3),
        ParallelSpec(pp=4, dp=16, ep=16, schedule="interleaved", stages_per_rank=3),
    ):
        step = plain.estimate(layout)
        assert math.fsum(part.time_s for part in step.parts) == pytest.approx(step.step_s, rel=1e-9)
        assert step.tokens_per_s == pytest.approx(step.tokens_per_step / step.step_s)


def test_a_faster_device_or_link_never_makes_a_step_longer() -> None:
    spec, work = model("deepseek-v3"), WorkloadSpec(sequence_length=4096, global_batch_size=1024)
    layout = ParallelSpec(pp=8, dp=16, ep=16, tp=2, precision="fp8", recompute="selective")
    base = StepModel(spec, cluster("h800-2048"), work).estimate(layout).step_s
    for change in (
        "device.peak_flops_per_s.fp8=3e15",
        "device.memory_bandwidth_bytes_per_s=5e12",
        "network.bandwidth_bytes_per_s=100e9",
        "scale_up.bandwidth_bytes_per_s=450e9",
    ):
        assert StepModel(spec, cluster("h800-2048", change), work).estimate(layout).step_s < base, change


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 61), st.floats(0.1, 10), st.floats(0, 30), st.floats(0, 5))
def test_stages_keep_every_block_once_and_none_is_empty(number: int, moe: float, head: float, first: float) -> None:
    spec = model("deepseek-v3")
    block_s: dict[BlockKind, float] = {
        "embedding": first,
        "attention": 1.0,
        "dense": 1.5,
        "moe": moe,
        "head": head,
        "mtp_entry": 0.2,
    }
    stages = cut_stages(spec, number, block_s)
    assert len(stages) == number
    for kind in block_s:
        have = sum(stage.count(kind) for stage in stages)
        want = layer_kinds(spec).count(kind) + end_blocks(spec)[kind]
        want += {"attention": spec.num_layers, "embedding": 1}.get(kind, 0)
        assert have == want, kind
    assert min(stage.count("attention") for stage in stages[:-1] or stages) >= 1


def best_maximum(times: list[float], number: int, last: float) -> float:
    """The smallest possible time of the slowest stage, by dynamic programming."""
    n = len(times)
    prefix = [math.fsum(times[:i]) for i in range(n + 1)]
    best = {(0, 0): 0.0}
    for stages in range(1, number + 1):
        for end in range(stages, n + 1):
            extra = last if stages == number else 0.0
            best[end, stages] = min(
                max(best[start, stages - 1], prefix[end] - prefix[start] + extra)
                for start in range(stages - 1, end)
                if (start, stages - 1) in best
            )
    return best[n, number]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(0.1, 10), st.floats(0, 30))
def test_the_slowest_stage_is_as_fast_as_dynamic_programming_finds(number: int, moe: float, head: float) -> None:
    spec = load_as(ModelSpec, "deepseekmoe-16b")
    block_s: dict[BlockKind, float] = {"embedding": 0.0, "attention": 1.0, "dense": 4.0, "moe": moe, "head": head}
    stages = cut_stages(spec, number, block_s)
    times = [block_s["attention"] + block_s[kind] for kind in layer_kinds(spec)]
    assert max(stage.total(block_s) for stage in stages) == pytest.approx(best_maximum(times, number, head), rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelSpec(pp=64, dp=64), "4096 devices are more than the 2048 of h800-2048; take dp = 32"),
        (ParallelSpec(tp=3), "tp = 3 must divide the 128 heads of deepseek-v3; nearest: 2"),
        (ParallelSpec(dp=3, ep=3), "ep = 3 must divide the 256 routed experts of deepseek-v3; nearest: 2"),
        (ParallelSpec(pp=64), "64 pipeline stages are more than the 61 layers of deepseek-v3; take at most 61"),
        (ParallelSpec(dp=7), "global_batch_size = 1024 must be a multiple of dp x micro_batch_size = 7; nearest: 1022"),
    ],
)
def test_a_layout_that_cannot_run_names_number_rule_and_fix(layout: ParallelSpec, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        step_model("deepseek-v3", global_batch_size=1024).estimate(layout)
    assert message in str(caught.value)


def test_one_tensor_rank_with_many_expert_ranks_works() -> None:
    step = step_model("deepseek-v3", global_batch_size=512).estimate(ParallelSpec(tp=1, dp=64, ep=64))
    assert step.part_s("expert network") > 0
    assert step.part_s("tensor-parallel network") == 0


def test_a_group_beyond_the_fast_links_needs_a_network() -> None:
    with pytest.raises(PlanError, match="has no network"):
        step_model("deepseek-v3", "h100-8").links.group(9)


def test_a_dense_model_has_no_expert_axis() -> None:
    with pytest.raises(PlanError, match="dense; take ep = 1"):
        step_model("qwen2.5-72b").estimate(ParallelSpec(dp=2, ep=2))


def test_sharded_weights_cost_time_where_wires_are_slow_and_save_memory() -> None:
    spec, work = model("deepseekmoe-16b"), WorkloadSpec(sequence_length=2048, global_batch_size=512)
    for speed, slower in (("1000e9", False), ("50e9", True)):
        machine = cluster("h800-2048", f"network.bandwidth_bytes_per_s={speed}")
        plain, sharded = (
            StepModel(spec, machine, work).estimate(ParallelSpec(dp=64, ep=8, zero_stage=stage)) for stage in (1, 3)
        )
        assert sharded.peak_memory_bytes < plain.peak_memory_bytes
        assert (sharded.pipeline_s > 1.5 * plain.pipeline_s) == slower
