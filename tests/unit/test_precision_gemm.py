"""Scaled products: CPU backends against FP64, groups against loops, kernels interpreted and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import gluon_in_numpy as gluon
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision import gemm
from cofire.precision.accumulate import AccumulatorSpec, scaled_gemm_reference
from cofire.precision.gemm import (
    available,
    fastest,
    grouped_gemm,
    grouped_wgrad,
    masked_gemm,
    scaled_gemm,
    transpose,
)
from cofire.precision.quantize import BLOCK, COLUMN_TILE, ROW, TILE, Quantized, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 130, 128), (130, 200, 300), (64, 257, 513)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Triton 3.6 interprets no loop over a device's scalars.
INTERPRETER_MIN = (3, 7)


def draw(*shape: int, tile=TILE, scales="fp32", dtype=E4M3, seed: int = 0) -> Quantized:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return quantize(x, tile, dtype, scales)


def exact(q: Quantized) -> Tensor:
    return q.dequantize().double()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("tile", [BLOCK, TILE])
@pytest.mark.parametrize(("scales", "dtype"), [("fp32", E4M3), ("ue8m0", E4M3), ("fp32", E5M2)])
def test_the_cpu_backend_is_fp64_up_to_fp32s_sums(m, n, k, tile, scales, dtype):
    a, b = draw(m, k, scales=scales, dtype=dtype), draw(n, k, tile=tile, scales=scales)
    found = scaled_gemm(a, b, "cpu")
    assert found.dtype == torch.float32
    assert error(found, exact(a) @ exact(b).T) < 1e-6
    assert torch.equal(scaled_gemm(a, b, "cpu", torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("tile", [BLOCK, TILE])
def test_the_reference_is_the_accumulators_and_near_fp64(m, n, k, tile):
    a, b = draw(m, k, scales="ue8m0"), draw(n, k, tile=tile)
    found = scaled_gemm(a, b, "reference")
    assert torch.equal(found, scaled_gemm_reference(a.data, a.scale, b.data, b.scale))
    assert error(found, exact(a) @ exact(b).T) < 1e-3
    # 4 times in 128 elements, each of 33 terms and their sum loses less than 2**-13 of the largest.
    bound = 4 * 34 * 2.0**-13 * (exact(a).abs() @ exact(b).abs().T)
    assert ((found - scaled_gemm(a, b, "cpu")).abs() <= bound).all()


def test_the_reference_loses_less_when_it_promotes_more_often():
    x, y = (torch.rand(48, 1024, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    a, b = quantize(x), quantize(y, BLOCK)
    expected = exact(a) @ exact(b).T
    often, seldom = (error(scaled_gemm(a, b, "reference", promote_every=n), expected) for n in (32, 128))
    assert 0 < often < seldom
    assert torch.equal(
        scaled_gemm(a, b, "reference", promote_every=32),
        scaled_gemm_reference(a.data, a.scale, b.data, b.scale, AccumulatorSpec(interval=32)),
    )


def test_dgrad_takes_the_transpose_of_the_same_blocks():
    weight, grad = draw(200, 300, tile=BLOCK), draw(70, 200)
    turned = transpose(weight)
    assert turned.tile == BLOCK
    assert turned.data.data_ptr() == weight.data.data_ptr()
    assert error(scaled_gemm(grad, turned, "cpu"), exact(grad) @ exact(weight)) < 1e-6
    assert error(scaled_gemm(grad, turned, "reference"), exact(grad) @ exact(weight)) < 1e-3


def test_wgrad_takes_transposes_of_tiles_along_the_tokens():
    grad, x = draw(256, 130, tile=COLUMN_TILE), draw(256, 70, tile=COLUMN_TILE)
    assert transpose(grad).tile == TILE
    for backend, most in (("cpu", 1e-6), ("reference", 1e-3)):
        assert error(scaled_gemm(transpose(grad), transpose(x), backend), exact(grad).T @ exact(x)) < most


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tile", [BLOCK, TILE])
@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [0, 0, 3], [40, 40]])
def test_groups_of_rows_are_products_one_after_the_other(backend, tile, counts):
    experts, m = len(counts), sum(counts)
    a, b = draw(m, 200), draw(experts, 70, 200, tile=tile)
    found = grouped_gemm(a, b, torch.tensor(counts), backend)
    first = 0
    for e, count in enumerate(counts):
        rows = slice(first, first + count)
        first += count
        if count:
            one = scaled_gemm(
                Quantized(a.data[rows], a.scale[rows], TILE), Quantized(b.data[e], b.scale[e], tile), backend
            )
            torch.testing.assert_close(found[rows], one)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("counts", [[0, 37, 20], [37, 1, 0]])
def test_rows_beyond_the_counts_are_zero_whatever_they_hold(backend, counts):
    x = torch.randn(3, 37, 200, generator=torch.Generator().manual_seed(3))
    for e, count in enumerate(counts):
        x[e, count:] = torch.nan
    a, b = quantize(x), draw(3, 70, 200, tile=BLOCK)
    found = masked_gemm(a, b, torch.tensor(counts), backend)
    for e, count in enumerate(counts):
        assert not found[e, count:].any()
        if count:
            expected = exact(Quantized(a.data[e, :count], a.scale[e, :count], TILE)) @ exact(b)[e].T
            assert error(found[e, :count], expected) < 1e-3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_experts_weight_gradient_contracts_its_own_tokens(backend):
    counts = [5, 0, 130, 128]
    filled = [128, 0, 256, 128]
    a, b = draw(70, sum(filled)), draw(33, sum(filled))
    found = grouped_wgrad(a, b, torch.tensor(counts), backend)
    assert found.shape == (4, 70, 33)
    first = 0
    for e, size in enumerate(filled):
        part = slice(first, first + size)
        first += size
        expected = exact(a)[:, part] @ exact(b)[:, part].T
        if size:
            assert error(found[e], expected) < 1e-3
        else:
            assert not found[e].any()


def test_products_without_rows_are_empty_and_without_a_contraction_zero():
    for backend in ("cpu", "reference"):
        assert scaled_gemm(draw(0, 128), draw(5, 128, tile=BLOCK), backend).shape == (0, 5)
        assert not scaled_gemm(draw(4, 0), draw(5, 0, tile=BLOCK), backend).any()


BAD = {
    "a in blocks": (lambda: scaled_gemm(draw(8, 128, tile=BLOCK), draw(8, 128), "cpu"), "not of 1 x 128"),
    "b by rows": (lambda: scaled_gemm(draw(8, 128), draw(8, 128, tile=ROW), "cpu"), "128 x 128"),
    "contractions": (lambda: scaled_gemm(draw(8, 128), draw(8, 64), "cpu"), "share no contraction"),
    "dims": (lambda: scaled_gemm(draw(2, 8, 128), draw(8, 128), "cpu"), "3 dims"),
    "result": (lambda: scaled_gemm(draw(8, 128), draw(8, 128), "cpu", torch.float16), "float32 or bfloat16"),
    "backend": (lambda: scaled_gemm(draw(8, 128), draw(8, 128), "cuda"), "not one of"),  # pyright: ignore[reportArgumentType]
    "triton": (lambda: scaled_gemm(draw(8, 128), draw(8, 128), "triton"), "needs a CUDA device"),
    "torch": (lambda: scaled_gemm(draw(8, 128), draw(8, 128), "torch"), "needs a CUDA device"),
    "promotion": (lambda: scaled_gemm(draw(8, 128), draw(8, 128), "cpu", promote_every=64), "promotes every 128"),
    "interval": (lambda: scaled_gemm(draw(8, 256), draw(8, 256), "reference", promote_every=96), "divide 128"),
    "sum": (lambda: grouped_gemm(draw(8, 128), draw(2, 8, 128), torch.tensor([3, 4]), "cpu"), "sum to 7"),
    "length": (lambda: grouped_gemm(draw(8, 128), draw(2, 8, 128), torch.tensor([8]), "cpu"), "each of 2 experts"),
    "type": (lambda: grouped_gemm(draw(8, 128), draw(2, 8, 128), torch.ones(2), "cpu"), "one int64"),
    "negative": (lambda: grouped_gemm(draw(8, 128), draw(2, 8, 128), torch.tensor([9, -1]), "cpu"), "negative"),
    "too many": (lambda: masked_gemm(draw(2, 8, 128), draw(2, 8, 128), torch.tensor([9, 1]), "cpu"), "exceeds"),
    "experts": (lambda: masked_gemm(draw(3, 8, 128), draw(2, 8, 128), torch.tensor([1, 1]), "cpu"), "3 experts"),
    "blocks": (lambda: grouped_wgrad(draw(8, 128), draw(8, 128, tile=BLOCK), torch.tensor([9]), "cpu"), "blocks"),
    "tokens": (lambda: grouped_wgrad(draw(8, 100), draw(8, 100), torch.tensor([100]), "cpu"), "multiple of 128"),
    "filled": (lambda: grouped_wgrad(draw(8, 256), draw(8, 256), torch.tensor([100]), "cpu"), "sum to 128"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(name):
    call, says = BAD[name]
    with pytest.raises(PrecisionError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_backends_say_where_they_run():
    assert available("reference", "cuda:0") is None
    assert available("cpu", "cpu") is None
    assert "on the CPU" in str(available("cpu", "cuda"))
    assert fastest("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(PrecisionError, match="no fast FP8 product"):
            fastest("cuda")


@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 512), (3, 5, 7), (130, 200, 1000), (64, 576, 640)])
@pytest.mark.parametrize("tile", [BLOCK, TILE])
def test_cublas_gets_its_layouts(m, n, k, tile, monkeypatch):
    """Checks PyTorch's own conditions (ScaledBlas.cpp) and computes what it would from what it is given."""

    def scaled_mm(x, y, x_scale, x_kind, y_scale, y_kind, output_dtype):
        (rows, inner), columns = x.shape, y.shape[1]
        assert rows % 16 == columns % 16 == inner % 128 == 0
        assert (x.is_contiguous(), y.t().is_contiguous()) == (True, True)
        assert x_kind == F.ScalingType.BlockWise1x128
        assert (tuple(x_scale.shape), x_scale.stride()) == ((rows, inner // 128), (1, rows))
        if tile == BLOCK:
            room = -(-(inner // 128) // 4) * 4
            assert y_kind == F.ScalingType.BlockWise128x128
            assert (tuple(y_scale.shape), y_scale.stride()) == ((room, -(-columns // 128)), (1, room))
            of_y = y_scale[: inner // 128].t().repeat_interleave(128, 0)[:columns]
        else:
            assert y_kind == F.ScalingType.BlockWise1x128
            assert (tuple(y_scale.shape), y_scale.stride()) == ((columns, inner // 128), (1, columns))
            of_y = y_scale
        left = x.double() * x_scale.double().repeat_interleave(128, 1)
        return (left @ (y.t().double() * of_y.double().repeat_interleave(128, 1)).t()).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    a, b = draw(m, k, scales="ue8m0"), draw(n, k, tile=tile)
    found = gemm._torch_gemm(a, b, torch.float32)
    assert found.is_contiguous()
    assert error(found, exact(a) @ exact(b).T) < 1e-6
    with pytest.raises(PrecisionError, match="not E5M2"):
        gemm._torch_gemm(draw(m, k, dtype=E5M2), b, torch.float32)


@needs_triton
def test_interpreted_kernels_add_exactly_what_is_exact():
    from triton import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < INTERPRETER_MIN:
        pytest.skip(f"Triton {version} interprets too little")
    script = Path(__file__).with_name("interpret_gemm.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["dense", "rows", "masked", "contraction"]


@needs_triton
def test_every_variant_uses_the_tensor_cores_of_hopper_and_spills_nothing():
    from cofire.precision.triton import gemm as kernels
    from cofire.precision.triton.compile import compile_ahead

    for variant in kernels.variants():
        found = compile_ahead(variant)
        assert found.stack_bytes == 0, variant.name
        assert found.shared_bytes <= 227 * 1024, variant.name
        for instruction in variant.instructions:
            assert found.count(instruction), (variant.name, instruction)


@needs_triton
def test_overlapped_variants_keep_chunks_in_flight_and_spill_nothing(monkeypatch):
    from triton.experimental.gluon._runtime import GluonASTSource

    from cofire.precision.triton import compile as ahead
    from cofire.precision.triton import overlap

    monkeypatch.setattr(ahead, "ASTSource", GluonASTSource)
    for variant in overlap.variants():
        found = ahead.compile_ahead(variant)
        assert found.stack_bytes == 0, variant.name
        assert found.shared_bytes <= 227 * 1024, variant.name
        chunks = variant.constants["TILES"].block_n // overlap.CHUNK
        assert found.count("QGMMA") == 4 * chunks, variant.name
        # ptxas would wait after every instruction if it could not tell whose registers are in flight.
        assert found.count("WARPGROUP.DEPBAR") == 2 * chunks, variant.name


def run_in_numpy(kernel, a, b, groups, m, tiles, row_tiles: int, together: int) -> np.ndarray:
    """Return the output [rows, n] of all programs of the overlapped kernel, on operands [values, scales]."""
    experts, n = b[1].shape[0], b[0].shape[0] // b[1].shape[0]
    out = np.full(m * (experts if tiles.mode == "masked" else 1) * n, np.nan, np.float32)
    gluon.programs[:] = [row_tiles * -(-n // tiles.block_n), together]
    operands = gluon.Descriptor(a[0], (128, 128)), gluon.Descriptor(b[0], (64, 128))
    pointers = [gluon.Pointer(each) for each in (out, a[1].ravel(), b[1].ravel(), groups)]
    for place in itertools.product(*map(range, gluon.programs)):
        gluon.program[:] = place
        gluon.in_flight.clear()
        kernel(*operands, *pointers, gluon.Scalar(m), gluon.Scalar(n), tiles, 8)
    return out.reshape(-1, n)


@needs_triton
@pytest.mark.parametrize("columns", [128, 192, 256])
def test_the_overlapped_kernel_multiplies_in_numpy(columns, monkeypatch):
    """Its chunks, slots, phases, scales and edges, on operands whose sums are exact."""
    kernel = gluon.load_overlap(monkeypatch).multiply
    random = np.random.default_rng(columns)

    def draw_exact(*shape: int, scales: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return random.integers(-8, 9, shape).astype(float), (2.0 ** random.integers(-2, 3, scales)).astype(np.float32)

    def values(q: tuple[np.ndarray, np.ndarray], height: int) -> np.ndarray:
        return q[0] * q[1].repeat(height, -2).repeat(128, -1)[..., : q[0].shape[-2], : q[0].shape[-1]]

    def tiles(mode: str):
        from cofire.precision.triton.gemm import Tiles

        return Tiles(mode, True, 1, 128, columns, 4, 1, 8)

    for m, n, k in ((1, 64, 128), (300, 576, 384), (130, 200, 1008), (256, 768, 1280)):
        blocks = -(-k // 128)
        a, b = draw_exact(m, k, scales=(m, blocks)), draw_exact(n, k, scales=(1, -(-n // 128), blocks))
        found = run_in_numpy(kernel, a, b, np.zeros(1, np.int64), m, tiles("dense"), -(-m // 128), 1)
        assert np.array_equal(found, values(a, 1) @ values((b[0], b[1][0]), 128).T)
    counts, rows, n = [0, 140, 17], 140, 200
    a, b = draw_exact(3 * rows, 512, scales=(3 * rows, 4)), draw_exact(3 * n, 512, scales=(3, 2, 4))
    by_expert = [values((b[0][e * n : (e + 1) * n], b[1][e]), 128) for e in range(3)]
    found = run_in_numpy(kernel, a, b, np.array(counts), rows, tiles("masked"), 2, 3)
    for e, count in enumerate(counts):
        assert np.array_equal(found[e * rows :][:count], values(a, 1)[e * rows :][:count] @ by_expert[e].T)
        assert not found[e * rows + count : (e + 1) * rows].any()
    # Experts 0 and 2 have 5 and 200 rows of 210, the last 5 have none: expert, first row and end of each tile.
    plan = np.array([[0, 2, 2, -1, -1], [0, 5, 133, 205, 333], [5, 205, 205, 210, 210]])
    found = run_in_numpy(kernel, (a[0][:210], a[1][:210]), b, plan.ravel(), 210, tiles("rows"), 5, 1)
    assert np.array_equal(found[:5], values(a, 1)[:5] @ by_expert[0].T)
    assert np.array_equal(found[5:205], values(a, 1)[5:205] @ by_expert[2].T)
    assert not found[205:].any()


@needs_triton
def test_tilings_fill_the_processors_or_do_not_split():
    from cofire.precision.triton.gemm import LARGE, OVERLAPPED, SHORT, choose

    assert choose(4096, 7168, 16384) == OVERLAPPED[256]
    assert choose(4096, 2112, 7168) == OVERLAPPED[192]
    assert choose(4096, 7168, 16384, b_in_blocks=False) == LARGE
    assert choose(1, 576, 7168).block_m == SHORT.block_m
    for m, n, k in ((128, 2112, 7168), (128, 576, 7168), (128, 32768, 512), (1, 1, 128), (128, 7168, 16384)):
        tiling = choose(m, n, k)
        tiles = -(-m // tiling.block_m) * -(-n // tiling.block_n)
        assert tiling.split == 1 or tiles * tiling.split <= 132
        assert tiling.split == 1 or k // tiling.split >= 4 * 128
    assert choose(128, 576, 7168).split > 1
    assert choose(128, 576, 7168, groups=1).split == 1


@needs_triton
def test_tilings_that_do_not_fit_are_refused():
    from cofire.precision.triton import gemm as kernels

    a, b, counts = draw(8, 128), draw(2, 8, 128), torch.tensor([4, 4])
    with pytest.raises(PrecisionError, match="take split 1"):
        kernels.masked_gemm(draw(2, 8, 128), b, counts, torch.float32, kernels.Tiling(64, 64, 4, 3, split=2))
    with pytest.raises(PrecisionError, match="cannot overlap"):
        kernels.scaled_gemm(a, draw(8, 128), torch.float32, kernels.OVERLAPPED[128])
