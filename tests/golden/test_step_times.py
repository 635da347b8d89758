"""Predicted step times against published runs; ``-s`` prints the tables.

Of the A100 points two set two figures of the ``dgx-a100-512`` preset, the others are predictions. No figure of
``h800-2048`` is fitted to the run that it is compared with.
"""

from __future__ import annotations

import statistics

import pytest

from cofire.plan.kernels import block_kernels
from cofire.plan.rates import Rates
from cofire.plan.step import StepEstimate, StepModel
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

# arXiv 2205.05198, tables 3 and 5: pipeline ranks, micro-batch, batch, stages per rank; seconds of an iteration with
# full recomputation and with sequence parallelism and selective recomputation.
MEGATRON = {
    "megatron-22b": (1, 4, 4, 1, 1.42, 1.10),
    "megatron-175b": (8, 1, 64, 3, 18.13, 13.75),
    "megatron-530b": (35, 1, 280, 3, 49.05, 37.83),
    "megatron-1t": (64, 1, 512, 1, 94.42, 71.49),
}
FITTED = {("megatron-22b", "full"), ("megatron-1t", "full")}
# Public rates of FP8 products with fine-grained scaling on an H800: m, n, k, TFLOP/s, and the speed-up over the kernels
# in use before, as DeepSeek-V3 was trained (DeepGEMM, February 2025; gradients of weights: pull request 95, May 2025).
PRODUCTS = [
    (4096, 2112, 7168, 1058, 1.1),
    (4096, 24576, 1536, 990, 1.0),
    (4096, 32768, 512, 590, 1.0),
    (4096, 7168, 16384, 1358, 1.2),
    (4096, 4096, 7168, 1304, 1.1),
    (4096, 7168, 2048, 1025, 1.1),
]
# Gradients of [n, k] weights over m rows.
WEIGHT_PRODUCTS = [
    (4096, 2112, 7168, 920, 1.2),
    (4096, 24576, 1536, 986, 1.2),
    (4096, 32768, 512, 878, 1.2),
    (4096, 7168, 16384, 994, 1.2),
    (4096, 4096, 7168, 942, 1.2),
    (8192, 2112, 7168, 1052, 1.2),
    (8192, 24576, 1536, 1092, 1.2),
    (8192, 32768, 512, 1014, 1.2),
]


def megatron_step(name: str, recompute: str) -> StepEstimate:
    pp, micro_batch, batch, stages, _, _ = MEGATRON[name]
    layout = ParallelSpec.model_validate(
        {
            "pp": pp,
            "tp": 8,
            "micro_batch_size": micro_batch,
            "schedule": "interleaved" if stages > 1 else "1f1b",
            "stages_per_rank": stages,
            "recompute": recompute,
            "sequence_parallel": recompute == "selective",
            "attention_kernel": "scores",
            "overlap_transfers": False,
        }
    )
    work = WorkloadSpec(sequence_length=2048, global_batch_size=batch)
    return StepModel(load_as(ModelSpec, name), load_as(ClusterSpec, "dgx-a100-512"), work).estimate(layout)


def megatron_errors() -> dict[tuple[str, str], tuple[float, float]]:
    rows = {}
    for name, (*_, full, selective) in MEGATRON.items():
        for recompute, measured in (("full", full), ("selective", selective)):
            rows[name, recompute] = (measured, megatron_step(name, recompute).step_s)
    return rows


def test_published_a100_iterations_are_predicted() -> None:
    errors = {}
    for key, (measured, predicted) in megatron_errors().items():
        errors[key] = predicted / measured - 1
        mark = "fitted" if key in FITTED else ""
        times = f"measured {measured:6.2f} s  modelled {predicted:6.2f} s"
        print(f"{key[0]:14} {key[1]:10} {times} {errors[key]:+7.1%} {mark}")
    free = [abs(error) for key, error in errors.items() if key not in FITTED]
    print(f"of the six that are not fitted: mean {statistics.mean(free):.1%}, largest {max(free):.1%}")
    assert statistics.mean(free) <= 0.03
    assert max(free) <= 0.07
    assert all(abs(errors[key]) <= 0.005 for key in FITTED)


def test_the_1t_run_fits_its_devices_and_would_not_without_recomputation() -> None:
    assert megatron_step("megatron-1t", "selective").fits
    assert not megatron_step("megatron-1t", "none").fits


def deepseek_v3_step() -> StepEstimate:
    layout = ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8")
    work = WorkloadSpec(sequence_length=4096, global_batch_size=15360, moments="bf16")
    return StepModel(load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048"), work).estimate(layout)


def test_deepseek_v3_takes_its_device_hours_within_a_tenth_and_fits() -> None:
    step = deepseek_v3_step()
    hours = step.device_hours_per_trillion_tokens
    print(f"DeepSeek-V3: {hours:,.0f} device hours per trillion tokens modelled, 180,000 published")
    print(f"  error {hours / 180e3 - 1:+.1%}")
    for part in step.parts:
        print(f"  {part.name:24} {part.time_s:7.3f} s")
    assert abs(hours / 180e3 - 1) <= 0.10
    assert step.tokens_per_step == 62_914_560
    assert step.fits
    assert step.peak_memory_bytes > 0.7 * 80e9  # DeepSeek needed every technique of its report to fit


def test_deepseek_v3_needs_its_memory_techniques() -> None:
    work = WorkloadSpec(sequence_length=4096, global_batch_size=15360)
    model = StepModel(load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048"), work)
    plain = ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", precision="bf16")
    assert not model.estimate(plain).fits


@pytest.mark.parametrize(("rows", "part"), [(PRODUCTS, 0), (WEIGHT_PRODUCTS, 2)], ids=["forward", "weights"])
def test_fp8_products_take_the_published_time(rows: list[tuple[int, int, int, int, float]], part: int) -> None:
    rates = Rates(load_as(ClusterSpec, "h800-2048").device)
    errors = []
    for m, n, k, tflops, speed_up in rows:
        # Of a dense block with hidden size k and n/2 numbers between, gate and up are one product [m, k] x [k, n].
        spec = load_as(ModelSpec, "qwen2.5-72b", [f"hidden_size={k}", f"intermediate_size={n // 2}"])
        layout = ParallelSpec(precision="fp8")
        kernel = next(x for x in block_kernels(spec, "dense", layout, m) if x.name == "dense gate and up")
        reached = kernel.flops[part] / rates.kernel_s(kernel)[part] / 1e12
        published = tflops / speed_up
        errors.append(reached / published - 1)
        print(f"{m:5} {n:6} {k:6} published {published:5.0f} TFLOP/s  modelled {reached:6.0f} {errors[-1]:+7.1%}")
    print(f"mean error {statistics.mean(errors):+.1%}")
    assert abs(statistics.mean(errors)) <= 0.05
    assert max(map(abs, errors)) <= 0.25
