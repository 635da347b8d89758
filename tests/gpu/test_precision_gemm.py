"""Scaled products on a Hopper GPU: against FP64 of the dequantised operands, and against the model of its accumulators.

How near the kernels come to that model, bit for bit, is printed: pytest -s. Outputs are poisoned with NaN before each
product, so an element that nobody wrote is seen.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision.gemm import (
    Backend,
    available,
    fastest,
    grouped_gemm,
    grouped_wgrad,
    masked_gemm,
    scaled_gemm,
    transpose,
)
from cofire.precision.quantize import BLOCK, TILE, Quantized, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Hopper keeps 14 bits over 128 elements; BF16 rounds the result to 8.
MOST = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
SHAPES = [(1, 48, 128), (128, 128, 128), (3, 5, 7), (130, 208, 1000), (64, 576, 7168), (257, 2112, 1024)]
TILINGS = [
    "default",
    "large",
    "narrow",
    "short",
    "narrow in 4",
    "short in 3",
    "overlapped 128",
    "overlapped 192",
    "overlapped 256",
]


def tiling(name: str):
    from cofire.precision.triton import gemm

    return {
        "default": None,
        "large": gemm.LARGE,
        "narrow": gemm.NARROW,
        "short": gemm.SHORT,
        "narrow in 4": gemm.Tiling(128, 64, 4, 4, split=4),
        "short in 3": gemm.Tiling(64, 128, 4, 3, split=3),
        "overlapped 128": gemm.OVERLAPPED[128],
        "overlapped 192": gemm.OVERLAPPED[192],
        "overlapped 256": gemm.OVERLAPPED[256],
    }[name]


def draw(*shape: int, tile=TILE, scales="fp32", dtype=E4M3, seed: int = 0) -> Quantized:
    """Return normal values in tiles whose sizes differ by up to 2**8."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator)
    sizes = 2.0 ** torch.randint(-4, 5, (*shape[:-1], -(-shape[-1] // 128)), generator=generator)
    q = quantize(x * sizes.repeat_interleave(128, -1)[..., : shape[-1]], tile, dtype, scales)
    return Quantized(q.data.cuda(), q.scale.cuda(), tile)


def exact(q: Quantized) -> Tensor:
    return q.dequantize().double()


def poison(numel: int) -> None:
    """Fill memory of that size, which the allocator hands out again, with NaN."""
    for size in (4 * numel, 2 * numel):
        torch.full((max(size // 4, 1),), torch.nan, device="cuda")


def check(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    norm = expected.norm().item()
    assert (found.double() - expected).norm().item() <= MOST[found.dtype] * norm


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_kernels_are_fp64_up_to_the_accumulators(name, dtype, m, n, k):
    from cofire.precision.triton import gemm

    a = draw(m, k)
    # What is left out here is compiled elsewhere; each combination takes half a second.
    both = dtype == torch.float32 and not name.startswith("overlapped")
    if n % 16 and (dtype == torch.bfloat16 or name not in ("default", "large", "narrow in 4", "overlapped 192")):
        pytest.skip("ragged stores are alike")
    for tile in (BLOCK, TILE) if both else (BLOCK,):
        b = draw(n, k, tile=tile)
        poison(m * n)
        found = gemm.scaled_gemm(a, b, dtype, tiling(name))
        assert found.dtype == dtype
        check(found, exact(a) @ exact(b).T)


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("of_a", "of_b"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)])
@pytest.mark.parametrize("name", ["large", "overlapped 192"])
def test_kernels_take_both_formats_and_both_kinds_of_scales(scales, of_a, of_b, name):
    from cofire.precision.triton import gemm

    a, b = draw(130, 640, scales=scales, dtype=of_a), draw(208, 640, tile=BLOCK, scales=scales, dtype=of_b)
    check(gemm.scaled_gemm(a, b, torch.float32, tiling(name)), exact(a) @ exact(b).T)


@pytest.mark.parametrize("tile", [BLOCK, TILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 512), (16, 128, 128), *SHAPES])
def test_cublas_is_fp64_up_to_the_accumulators(m, n, k, tile, dtype):
    if available("torch", "cuda"):
        pytest.skip(str(available("torch", "cuda")))
    a, b = draw(m, k, scales="ue8m0"), draw(n, k, tile=tile)
    try:
        found = scaled_gemm(a, b, "torch", dtype)
    except PrecisionError as error:
        if (m, n, k) == (128, 256, 512):
            raise
        pytest.skip(str(error))
    check(found, exact(a) @ exact(b).T)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 128, 128), (64, 128, 512), (48, 112, 1024)])
def test_kernels_are_near_the_model_of_the_accumulators(backend: Backend, m, n, k, capsys):
    if available(backend, "cuda"):
        pytest.skip(str(available(backend, "cuda")))
    a, b = draw(m, k), draw(n, k, tile=BLOCK)
    on_cpu = [Quantized(q.data.cpu(), q.scale.cpu(), q.tile) for q in (a, b)]
    model = scaled_gemm(on_cpu[0], on_cpu[1], "reference")
    fp64 = exact(on_cpu[0]) @ exact(on_cpu[1]).T
    found = scaled_gemm(a, b, backend).cpu()
    equal = (found == model).double().mean().item()
    away = (found.double() - model).norm().item() / (model.double() - fp64).norm().item()
    with capsys.disabled():
        print(f"\n{backend} {m} x {n} x {k}: {equal:.2%} of the bits of the model, {away:.3f} of its own error away")
    assert (found.double() - model).norm().item() <= 1e-3 * model.norm().item()


def test_tilings_without_a_split_add_in_the_same_order(capsys):
    from cofire.precision.triton import gemm

    a, b = draw(300, 2048), draw(400, 2048, tile=BLOCK)
    first = gemm.scaled_gemm(a, b, torch.float32, gemm.LARGE)
    for name in ("narrow", "short", "overlapped 128", "overlapped 192", "overlapped 256"):
        other = gemm.scaled_gemm(a, b, torch.float32, tiling(name))
        with capsys.disabled():
            print(f"\n{name}: {(other == first).double().mean().item():.2%} of the bits of large")
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4 * first.abs().max().item())


@pytest.mark.parametrize("name", ["narrow in 4", "short in 3", "overlapped 128", "overlapped 192", "overlapped 256"])
def test_repeated_products_are_the_same_bits(name):
    from cofire.precision.triton import gemm

    a, b = draw(130, 4096), draw(576, 4096, tile=BLOCK)
    first = gemm.scaled_gemm(a, b, torch.float32, tiling(name))
    for _ in range(30):
        poison(first.numel())
        assert torch.equal(gemm.scaled_gemm(a, b, torch.float32, tiling(name)), first)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dgrad_takes_the_transpose_of_the_same_blocks(backend: Backend):
    if available(backend, "cuda"):
        pytest.skip(str(available(backend, "cuda")))
    weight, grad = draw(256, 384, tile=BLOCK), draw(80, 256)
    check(scaled_gemm(grad, transpose(weight), backend), exact(grad) @ exact(weight))


@pytest.mark.parametrize("name", ["default", "large", "short", "overlapped 128", "overlapped 192", "overlapped 256"])
@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [0, 0, 300], [256, 128]])
def test_kernels_take_rows_sorted_by_expert(name, counts):
    from cofire.precision.triton import gemm

    m, experts = sum(counts), len(counts)
    a, b = draw(m + 7, 600), draw(experts, 208, 600, tile=BLOCK)
    expected = torch.zeros(m + 7, 208, dtype=torch.float64, device="cuda")
    first = 0
    for e, count in enumerate(counts):
        part = slice(first, first + count)
        first += count
        expected[part] = exact(a)[part] @ exact(b)[e].T
    poison(expected.numel())
    found = gemm.grouped_gemm(a, b, torch.tensor(counts, device="cuda"), torch.float32, tiling(name))
    check(found, expected)
    assert not found[m:].any()


@pytest.mark.parametrize("name", ["default", "large", "short", "overlapped 128", "overlapped 192", "overlapped 256"])
@pytest.mark.parametrize("counts", [[0, 137, 20], [137, 1, 128]])
def test_kernels_leave_rows_beyond_the_counts_zero(name, counts):
    from cofire.precision.triton import gemm

    a, b = draw(3, 137, 600), draw(3, 208, 600, tile=BLOCK)
    data = a.data.clone()
    expected = torch.zeros(3, 137, 208, dtype=torch.float64, device="cuda")
    for e, count in enumerate(counts):
        expected[e, :count] = exact(a)[e, :count] @ exact(b)[e].T
        data.view(torch.uint8)[e, count:] = 0x7F  # NaN.
    poison(expected.numel())
    dirty = Quantized(data, a.scale, TILE)
    for kind in (torch.int64, torch.int32) if name == "large" else (torch.int64,):
        numbers = torch.tensor(counts, device="cuda", dtype=kind)
        found = gemm.masked_gemm(dirty, b, numbers, torch.float32, tiling(name))
        check(found, expected)
        assert all(not found[e, count:].any() for e, count in enumerate(counts))


@pytest.mark.parametrize("name", ["default", "large", "short"])
def test_kernels_contract_each_experts_own_tokens(name):
    from cofire.precision.triton import gemm

    counts = [5, 0, 130, 128, 1]
    filled = [-(-count // 128) * 128 for count in counts]
    a, b = draw(200, sum(filled)), draw(136, sum(filled))
    poison(len(counts) * 200 * 136)
    found = gemm.grouped_wgrad(a, b, torch.tensor(counts, device="cuda"), torch.float32, tiling(name))
    first = 0
    for e, size in enumerate(filled):
        part = slice(first, first + size)
        first += size
        check(found[e], exact(a)[:, part] @ exact(b)[:, part].T)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_groups_go_through_the_interface(backend: Backend):
    if available(backend, "cuda"):
        pytest.skip(str(available(backend, "cuda")))
    counts = torch.tensor([64, 0, 192], device="cuda")
    a, b = draw(256, 512), draw(3, 256, 512, tile=BLOCK)
    found = grouped_gemm(a, b, counts, backend)
    check(found[:64], exact(a)[:64] @ exact(b)[0].T)
    check(found[64:], exact(a)[64:] @ exact(b)[2].T)
    c = draw(3, 192, 512)
    masked = masked_gemm(c, b, counts, backend)
    check(masked[0, :64], exact(c)[0, :64] @ exact(b)[0].T)
    check(masked[2], exact(c)[2] @ exact(b)[2].T)
    left, right = draw(128, 384), draw(256, 384)
    gradient = grouped_wgrad(left, right, counts, backend)
    check(gradient[0], exact(left)[:, :128] @ exact(right)[:, :128].T)
    assert not gradient[1].any()
    assert fastest("cuda") in ("triton", "torch")


def test_a_product_is_captured_in_a_graph_and_replayed():
    a, b = draw(128, 4096), draw(576, 4096, tile=BLOCK)
    first = scaled_gemm(a, b, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_gemm(a, b, "triton")
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, first)
