"""Triton's kernels on a GPU against PyTorch's operations on the CPU: FP8 by tiles bit for bit, LogFMT but for ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cofire.errors import PrecisionError
from cofire.precision import logfmt as plain_logfmt
from cofire.precision import quantize as plain_quantize
from cofire.precision.quantize import (
    BLOCK,
    COLUMN_TILE,
    ROW,
    TILE,
    Quantized,
    TileShape,
    _from_tiles,
    _in_tiles,
    _quantize,
)

pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("needs a GPU that converts FP32 to E4M3", allow_module_level=True)

from cofire.precision.triton import logfmt, quantize

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Of a step: where FP32 logarithms decide, not distance.
UNDECIDED = 1e-3
# Types of numbers, FP8 and scales, and the shape: whole tiles; ragged, but aligned; ragged and not aligned.
CASES = [
    (torch.bfloat16, E4M3, "fp32", (2, 256, 384)),
    (torch.bfloat16, E4M3, "fp32", (2, 130, 208)),
    (torch.float32, E4M3, "fp32", (2, 256, 384)),
    (torch.float32, E4M3, "fp32", (1, 333, 77)),
    (torch.bfloat16, E4M3, "ue8m0", (2, 256, 384)),
    (torch.float32, E4M3, "ue8m0", (1, 333, 77)),
    (torch.float32, E5M2, "fp32", (2, 256, 384)),
    (torch.float16, E5M2, "ue8m0", (2, 130, 208)),
]


def boundaries(shape: tuple[int, ...], largest: float, generator: torch.Generator) -> torch.Tensor:
    """Return tiles of 1 x 128 whose quotients lie within two last places of where FP8 rounds; one is the largest."""
    x = torch.empty(shape)
    for rows in x.view(-1, shape[-1]).split(128, dim=1):
        amax = torch.rand(rows.shape[0], 1, generator=generator) + 1.0
        short = torch.randint(16, 32, rows.shape, generator=generator).float()
        short *= 2.0 ** -torch.randint(0, 14, rows.shape, generator=generator)
        near = amax / largest * short
        near.view(torch.int32).add_(torch.randint(-2, 3, rows.shape, generator=generator, dtype=torch.int32))
        near[:, :1] = amax
        rows.copy_(torch.minimum(near, amax))
    return x


def numbers(shape: tuple[int, ...], dtype: torch.dtype, fp8: torch.dtype) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yield what the numbers are, they, and the floor for their largest magnitude."""
    generator = torch.Generator().manual_seed(3)
    largest, limits = torch.finfo(fp8).max, torch.finfo(dtype)
    normal = torch.randn(shape, generator=generator)
    exponents = torch.randint(-60, 60, shape, generator=generator)
    yield "normal", normal.to(dtype), 1e-4
    yield "wide", (normal * 2.0**exponents).clamp(limits.min, limits.max).to(dtype), 1e-30
    # The scale is the smallest normal number, and most numbers are subnormal.
    yield "tiny", (normal * 2.0**-124).to(dtype), largest * 2.0**-126
    yield "huge", ((torch.rand(shape, generator=generator) * 2 - 1) * limits.max).to(dtype), 1e-4
    zeros = normal * (torch.rand(shape, generator=generator) < 0.3) * -1.0
    zeros[..., -1, :], zeros[..., :, -1], zeros[0, :128] = 0.0, -0.0, -0.0
    yield "zeros", zeros.to(dtype), 1e-4
    broken = normal.clone()
    broken[0, 3, 5], broken[0, 70, 65], broken[-1, -1, -1] = float("inf"), float("nan"), float("-inf")
    yield "broken", broken.to(dtype), 1e-30
    yield "boundaries", boundaries(shape, largest, generator).to(dtype), 1e-30


def values_of(q: Quantized) -> torch.Tensor:
    view, size = _in_tiles(q.data.float(), q.tile)
    return _from_tiles(view * q.scale.float()[..., :, None, :, None], size)


def assert_same(found: Quantized, expected: Quantized, what: str) -> None:
    """Assert that two have the same bits, all NaN being one."""
    data, scale = found.data.cpu(), found.scale.cpu()
    assert (data.dtype, scale.dtype, found.tile) == (expected.data.dtype, expected.scale.dtype, expected.tile), what
    assert torch.equal(scale.float().nan_to_num(-1.0), expected.scale.float().nan_to_num(-1.0)), f"scales, {what}"
    nan = expected.data.float().isnan()
    assert torch.equal(data.float().isnan(), nan), f"NaN, {what}"
    codes, wanted = (each.view(torch.uint8).masked_fill(nan, 0) for each in (data, expected.data))
    differ = (codes != wanted).sum().item()
    assert differ == 0, f"{differ} codes of {nan.numel()}, {what}"


@pytest.mark.parametrize(("dtype", "fp8", "scale_format", "shape"), CASES)
def test_tiles_have_the_bits_of_pytorch_on_the_cpu(dtype, fp8, scale_format, shape) -> None:
    for what, x, floor in numbers(shape, dtype, fp8):
        on_gpu, exact = x.cuda(), x.float()
        options = (fp8, scale_format, floor)
        for tile in (TILE, COLUMN_TILE, BLOCK):
            expected = _quantize(exact, tile, *options)
            assert_same(quantize.quantize(on_gpu, tile, *options), expected, f"{what} in {tile}")
        rows, turned = _quantize(exact, TILE, *options), _quantize(exact.mT.contiguous(), TILE, *options)
        assert_same(quantize.quantize_transposed(on_gpu, *options), turned, f"{what}, transposed")
        both = quantize.quantize_both(on_gpu, *options)
        assert_same(both[0], rows, f"{what}, rows of both")
        assert_same(both[1], turned, f"{what}, columns of both")


@pytest.mark.parametrize(("dtype", "fp8", "scale_format", "shape"), [CASES[i] for i in (0, 3, 4, 7)])
def test_values_and_their_transpose_have_the_bits_of_pytorch_on_the_cpu(dtype, fp8, scale_format, shape) -> None:
    for what, x, floor in numbers(shape, dtype, fp8):
        for tile in (TILE, COLUMN_TILE, BLOCK):
            q = _quantize(x.float(), tile, fp8, scale_format, floor)
            on_gpu = Quantized(q.data.cuda(), q.scale.cuda(), tile)
            found, expected = quantize.dequantize(on_gpu, dtype).cpu(), values_of(q).to(dtype)
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{what} in {tile}"
            if tile == TILE:
                again = _quantize(values_of(q).mT.contiguous(), TILE, fp8, scale_format, floor)
                assert_same(quantize.requantize_transposed(on_gpu, None, floor), again, what)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_bf16_number_is_rounded_as_pytorch_casts_it(fp8) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    largest = torch.finfo(fp8).max
    inside = every[every.abs() <= largest].view(-1, 1)
    # A second column with the largest value makes the scale 1 for every row.
    x = torch.cat([inside, torch.full_like(inside, largest)], dim=1)
    found = quantize.quantize(x.to(torch.bfloat16).cuda(), TILE, fp8)
    assert bool((found.scale == 1).all())
    assert torch.equal(found.data[:, 0].cpu().view(torch.uint8), inside[:, 0].to(fp8).view(torch.uint8))


def test_quantize_takes_the_kernels_on_a_gpu_and_gives_the_same_bits_without_them(monkeypatch) -> None:
    x = torch.randn(3, 256, 130).to(torch.bfloat16)
    started: list[Any] = []
    start = quantize.start
    monkeypatch.setattr(quantize, "start", lambda *given: started.append(given) or start(*given))
    turned = x.cuda().mT
    for tile in (TILE, COLUMN_TILE, BLOCK):
        q = plain_quantize.quantize(turned, tile)
        assert_same(q, _quantize(x.mT.float(), tile, E4M3, "fp32", 1e-4), str(tile))
        assert torch.equal(q.dequantize().cpu(), values_of(Quantized(q.data.cpu(), q.scale.cpu(), tile)))
    assert len(started) == 6
    for tile, floor in ((ROW, 1e-4), (TILE, 0.0)):
        q = plain_quantize.quantize(turned, tile, amax_floor=floor)
        assert_same(q, _quantize(x.mT.float(), tile, E4M3, "fp32", floor), f"{tile}, {floor}")
    assert len(started) == 6


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (2, 0, 7)])
def test_empty_matrices_come_back_empty(shape) -> None:
    x = torch.empty(shape, device="cuda")
    for tile in (TILE, COLUMN_TILE, BLOCK):
        assert quantize.dequantize(quantize.quantize(x, tile)).shape == shape
    rows, turned = quantize.quantize_both(x)
    assert turned.data.shape == x.mT.shape
    assert quantize.requantize_transposed(rows).data.shape == x.mT.shape
    assert logfmt.round_trip(x).shape == logfmt.decode(logfmt.encode(x)).shape == shape


def test_numbers_that_begin_at_any_address_are_read() -> None:
    x = torch.randn(1 + 64 * 256)
    for first in (0, 1):
        part = x[first : first + 64 * 256].view(64, 256)
        on_gpu = x.cuda()[first : first + 64 * 256].view(64, 256)
        assert_same(quantize.quantize(on_gpu), _quantize(part, TILE, E4M3, "fp32", 1e-4), str(first))


def test_kernels_run_on_the_stream_of_their_caller() -> None:
    stream = torch.cuda.Stream()
    x = torch.randn(4096, 1024)
    on_gpu = torch.zeros(x.shape, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        on_gpu.copy_(x)
        q = quantize.quantize(on_gpu)
    stream.synchronize()
    assert_same(q, _quantize(x, TILE, E4M3, "fp32", 1e-4), "a second stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensor() -> None:
    x = torch.randn(64, 256)
    q = quantize.quantize(x.to("cuda:1"))
    assert q.data.device.index == 1
    assert_same(q, _quantize(x, TILE, E4M3, "fp32", 1e-4), "another device")


def test_matrices_of_more_than_two_billion_numbers_are_taken_to_their_end() -> None:
    rows, columns, last = 2**21 + 128, 1024, 256
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    end = torch.randn(last, columns).to(torch.bfloat16)
    x[-last:] = end.cuda()
    exact = end.float()
    by_row, turned = quantize.quantize_both(x)
    expected = _quantize(exact, TILE, E4M3, "fp32", 1e-4)
    found = quantize.quantize(x)
    for each in (found, by_row):
        assert_same(Quantized(each.data[-last:], each.scale[-last:], TILE), expected, "rows")
    columns_end = Quantized(turned.data[:, -last:].contiguous(), turned.scale[:, -last // 128 :].contiguous(), TILE)
    assert_same(columns_end, _quantize(exact.mT.contiguous(), TILE, E4M3, "fp32", 1e-4), "columns")
    values = quantize.dequantize(by_row, torch.bfloat16)[-last:].cpu()
    assert torch.equal(values, values_of(expected).to(torch.bfloat16))
    del found, by_row, turned
    coded = logfmt.encode(x, 10)
    few = logfmt.encode(end.cuda(), 10)
    assert torch.equal(coded.packed[-last:], few.packed)
    assert torch.equal(logfmt.decode(coded, torch.bfloat16)[-last:], logfmt.decode(few, torch.bfloat16))


def logfmt_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    ratio = uniform * torch.tensor([1e-6, 1e-4, 1e-2, 0.9, 1.2, 6.0]).repeat(shape[0])[: shape[0], None]
    yield "normal", normal.to(dtype)
    yield "with zeros", (normal * (uniform < 0.5)).to(dtype)
    yield "wide", (normal * 2.0 ** (uniform * 80 - 60)).to(dtype)
    yield "narrow", (1.0 + ratio).to(dtype)
    yield "one", torch.full(shape, -3.0).to(dtype)
    yield "zeros", (normal * 0.0).to(dtype)
    yield "tiny", (normal * 2.0**-124).to(dtype)
    yield "huge", ((1.0 + ratio).clamp(max=3.9) * 2.0**126 * normal.sign()).to(dtype)


def from_middle(x: torch.Tensor, one: plain_logfmt.LogFMT, other: plain_logfmt.LogFMT) -> float:
    """Return how far those numbers are from the middle of two codes whose codes differ, at most, in steps."""
    codes = torch.stack([one.codes(), other.codes()]).int()
    assert bool(((codes[0] - codes[1]).abs() <= 1).all())
    assert torch.equal(torch.signbit(one.decode()), torch.signbit(other.decode()))
    # FP32 is too coarse for the middle of narrow tiles.
    low, high = one.low.double(), one.high.double()
    step = ((high / low).log() / (2 ** (one.bits - 1) - 2)).clamp(min=2.0**-19)
    low, step = (each.repeat_interleave(128, dim=-1)[..., : x.shape[-1]] for each in (low, step))
    below = low * (step * (codes.amin(0) - 1)).exp()
    off = (x.double().abs() - below * (1.0 + step.exp()) / 2).abs() / (below * step.expm1())
    return off[codes[0] != codes[1]].max().item() if bool((codes[0] != codes[1]).any()) else 0.0


@pytest.mark.parametrize("underflow", ["clamp", "zero"])
@pytest.mark.parametrize(
    ("bits", "dtype", "shape"),
    [
        (8, torch.bfloat16, (96, 1024)),
        (10, torch.bfloat16, (96, 1024)),
        (8, torch.float32, (97, 777)),
        (10, torch.float32, (97, 777)),
        (9, torch.float32, (97, 777)),
        (3, torch.float32, (97, 777)),
        (5, torch.float32, (97, 777)),
        (6, torch.float32, (97, 777)),
    ],
)
def test_logfmt_is_pytorchs_but_next_to_the_middle_of_two_codes(bits, dtype, shape, underflow) -> None:
    if underflow == "zero" and bits != 10:
        pytest.skip("one number of bits is enough for what becomes zero")
    for what, x in logfmt_numbers(dtype, shape):
        expected = plain_logfmt.encode(x, bits, underflow)
        coded = logfmt.encode(x.cuda(), bits, underflow)
        assert torch.equal(coded.low.cpu(), expected.low), what
        assert torch.equal(coded.high.cpu(), expected.high), what
        on_cpu = plain_logfmt.LogFMT(bits, coded.packed.cpu(), coded.low.cpu(), coded.high.cpu(), coded.shape)
        assert from_middle(x, expected, on_cpu) <= UNDECIDED, what
        values = logfmt.decode(coded)
        torch.testing.assert_close(values.cpu(), on_cpu.decode(), rtol=2e-5, atol=0.0, msg=what)
        assert torch.equal(torch.signbit(values).cpu(), torch.signbit(on_cpu.decode())), what
        again = logfmt.encode(values, bits, underflow)
        assert torch.equal(again.packed, coded.packed), what
        assert torch.equal(logfmt.decode(again).view(torch.int32), values.view(torch.int32)), what
        trip = logfmt.round_trip(x.cuda(), bits, underflow, torch.float32)
        assert torch.equal(trip.view(torch.int32), values.view(torch.int32)), what


def test_logfmt_takes_the_kernels_on_a_gpu_and_keeps_its_errors() -> None:
    x = torch.randn(64, 300)
    coded = plain_logfmt.encode(x.cuda(), 10)
    assert torch.equal(coded.packed, logfmt.encode(x.cuda(), 10).packed)
    assert torch.equal(coded.decode(), logfmt.decode(coded))
    x[5, 200] = float("nan")
    with pytest.raises(PrecisionError, match=r"tile \[5, 1\] holds an infinity or a NaN"):
        plain_logfmt.encode(x.cuda())
    values = logfmt.round_trip(x.cuda())
    assert bool(values[5, 128:256].isnan().all())
    assert int(values.isnan().sum()) == 128


@pytest.mark.parametrize("tile", [TILE, COLUMN_TILE, BLOCK])
def test_gaps_in_memory_are_refused_by_kernels(tile: TileShape) -> None:
    with pytest.raises(PrecisionError, match=r"give x.contiguous\(\)"):
        quantize.quantize(torch.ones(8, 4, device="cuda").t(), tile)
    with pytest.raises(PrecisionError, match=r"give x.cuda\(\)"):
        quantize.quantize(torch.ones(8, 4), tile)
