"""What steps are made of against published figures: FP8 products, and what fits; ``-s`` prints the tables.

Whole steps are compared in ``test_published.py``.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from cofire.plan.kernels import block_kernels
from cofire.plan.published import published_points
from cofire.plan.rates import Rates
from cofire.plan.step import StepModel
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

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


def test_the_1t_run_fits_its_devices_and_would_not_without_recomputation() -> None:
    point = next(p for p in published_points() if p.name == "megatron-1t, selective recomputation")
    assert point.estimate().fits
    plain = point.layout.model_copy(update={"recompute": "none"})
    assert not replace(point, layout=plain).estimate().fits


def test_deepseek_v3_fits_but_only_just() -> None:
    step = next(p for p in published_points() if p.model == "deepseek-v3").estimate()
    for part in step.parts:
        print(f"  {part.name:24} {part.time_s:7.3f} s")
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
