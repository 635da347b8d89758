"""Codecs of rows: one contract for all of them, what each makes of values, and gradients that travel the other way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision import logfmt, reference
from cofire.precision.codec import (
    GRADIENT_FLOOR,
    BF16Codec,
    Codec,
    E5M6Codec,
    ExpertCodecs,
    FP8Codec,
    LogFMTCodec,
    transfer,
)
from cofire.precision.formats import E5M6, decode
from cofire.precision.quantize import TILE, quantize, round_values
from cofire.precision.survey import signal_to_noise_db

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CODECS = {
    "bf16": BF16Codec(),
    "fp8": FP8Codec(),
    "fp8-fp32": FP8Codec("fp32"),
    "fp8-gradient": FP8Codec(amax_floor=GRADIENT_FLOOR),
    "fp8-e5m2": FP8Codec("fp32", dtype=torch.float8_e5m2),
    **{f"logfmt-{bits}": LogFMTCodec(bits) for bits in range(3, 11)},
    "e5m6": E5M6Codec(),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def rows(count: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-8, 8, (count, 1), generator=generator)
    return torch.randn(count, length, generator=generator) * 2.0**spread


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 130, 301, 1024])
@each_codec
def test_a_message_is_one_dense_row_of_bytes_for_each_token(codec: Codec, length: int, device: str) -> None:
    for count in (0, 1, 5):
        x = rows(count, length).to(device)
        message = codec.encode(x)
        assert message.dtype == torch.uint8
        assert message.device == x.device
        assert message.is_contiguous()
        assert message.shape == (count, codec.bytes_per_token(length))
        y = codec.decode(message, length)
        assert y.shape == x.shape
        assert y.dtype == torch.float32


@each_codec
def test_messages_can_be_sent_anywhere_row_by_row(codec: Codec) -> None:
    x = rows(7, 200)
    message, y = codec.encode(x), codec.decode(codec.encode(x), 200)
    order = torch.tensor([6, 2, 2, 0, 5])
    assert torch.equal(codec.encode(x[order]), message[order])
    assert torch.equal(codec.decode(message[order], 200), y[order])
    assert torch.equal(codec.decode(message[::3], 200), y[::3])  # rows that do not lie together
    for i in range(7):
        assert torch.equal(codec.encode(x[i : i + 1])[0], message[i])


@pytest.mark.parametrize("length", [5, 128, 333])
@pytest.mark.parametrize("name", [name for name in CODECS if name != "fp8-fp32"])  # whose scales are rounded themselves
def test_decoded_rows_go_through_once_more_unchanged(name: str, length: int) -> None:
    codec = CODECS[name]
    once = codec.decode(codec.encode(rows(64, length)), length)
    assert torch.equal(codec.decode(codec.encode(once), length), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_codec
def test_rows_of_sixteen_bits_encode_as_their_values_do(codec: Codec, dtype: torch.dtype) -> None:
    x = rows(9, 160).to(dtype)
    message = codec.encode(x)
    assert torch.equal(message, codec.encode(x.float()))
    assert torch.equal(codec.decode(message, 160, dtype), codec.decode(message, 160).to(dtype))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bf16", 14336), ("fp8-fp32", 7392), ("fp8", 7224), ("logfmt-10", 9184), ("logfmt-8", 7392), ("e5m6", 10808)],
)
def test_a_token_of_deepseek_v3_takes_the_bytes_of_the_table(name: str, expected: int) -> None:
    """A.12: FP8 with scales 7,392, LogFMT-10 9,184, BF16 14,336 bytes at hidden size 7,168."""
    assert CODECS[name].bytes_per_token(7168) == expected
    assert CODECS[name].encode(rows(1, 7168)).nbytes == expected


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_fp8_messages_hold_codes_then_scales(scale_format) -> None:
    x, codec = rows(6, 300), FP8Codec(scale_format)
    message, q = codec.encode(x), quantize(x, TILE, scale_format=scale_format)
    assert torch.equal(message[:, :300], q.data.view(torch.uint8))
    assert torch.equal(message[:, 300:], q.scale.view(torch.uint8).view(6, -1))
    arrived = codec.quantized(message, 300)
    assert torch.equal(arrived.data.view(torch.uint8), q.data.view(torch.uint8))
    assert arrived.scale_format == scale_format
    assert torch.equal(codec.decode(message, 300), q.dequantize())


def test_values_that_arrive_in_fp8_with_powers_of_two_are_not_rounded_again() -> None:
    """Technical report, 3.3.3: the dispatched activation is the operand of the experts' Fprop."""
    arrived = FP8Codec().decode(FP8Codec().encode(rows(256, 512)), 512)
    assert torch.equal(round_values(arrived, TILE, scale_format="ue8m0"), arrived)


@pytest.mark.parametrize("bits", [3, 8, 10])
def test_logfmt_of_bf16_rows_is_logfmt(bits: int) -> None:
    x = rows(8, 384).bfloat16().float()
    assert torch.equal(LogFMTCodec(bits).decode(LogFMTCodec(bits).encode(x), 384), logfmt.encode(x, bits).decode())


@pytest.mark.parametrize("bits", [4, 8, 10])
def test_logfmt_of_fp32_rows_errs_by_bf16_at_the_ends_of_a_tile(bits: int) -> None:
    x = rows(64, 256)
    y = LogFMTCodec(bits).decode(LogFMTCodec(bits).encode(x), 256)
    tiles, decoded = (each.abs().view(64, 2, 128) for each in (x, y))
    for exact, found in ((tiles.amax(-1), decoded.amax(-1)), (tiles.amin(-1), decoded.amin(-1))):
        assert torch.equal(found, exact.bfloat16().float())
    plain = signal_to_noise_db(x, logfmt.encode(x, bits).decode())
    assert signal_to_noise_db(x, y) == pytest.approx(plain, abs=1.0)


def test_e5m6_is_the_nearest_value_on_the_scale_of_e4m3() -> None:
    x = rows(5, 300)
    x[1] *= torch.logspace(-8, 0, 300)  # down into the subnormals
    y = E5M6Codec().decode(E5M6Codec().encode(x), 300)
    scale = quantize(x, TILE, scale_format="ue8m0").scale.float().repeat_interleave(128, 1)[:, :300]
    values = reference.all_values(E5M6)
    codes = reference.encode((x / scale).flatten().numpy(), E5M6)
    expected = values[codes] * scale.flatten().double().numpy()
    assert np.array_equal(y.flatten().double().numpy(), expected)


def test_e5m6_packs_upper_bytes_then_lower_halves_of_bytes() -> None:
    x = torch.tensor([[1.0, -1.5, 448.0]])  # 448 makes the scale one
    codes = [15 << 6, 1 << 11 | 15 << 6 | 32, 23 << 6 | 48]
    expected = [code >> 4 for code in codes] + [codes[0] & 15 | (codes[1] & 15) << 4, codes[2] & 15] + [127]
    assert E5M6Codec().encode(x).tolist() == [expected]  # 127 is the scale 2 ** 0
    assert E5M6Codec().decode(torch.tensor([expected], dtype=torch.uint8), 3).tolist() == x.tolist()
    every = decode(torch.arange(4096, dtype=torch.int16), E5M6)
    every = every[every.abs() <= 448].unsqueeze(0)  # all values of a tile whose scale is one, 448 among them
    tiles = torch.cat((every, every.new_zeros(1, -every.shape[1] % 127)), 1).view(-1, 127)
    tiles = torch.cat((tiles, torch.full((len(tiles), 1), 448.0)), 1)
    assert torch.equal(E5M6Codec().decode(E5M6Codec().encode(tiles), 128), tiles)


def test_e5m6_keeps_small_values_of_a_tile_that_e4m3_loses() -> None:
    x = torch.full((1, 128), 1e-5)
    x[0, 0] = 400.0
    assert round_values(x, TILE, scale_format="ue8m0")[0, 1] == 0
    assert E5M6Codec().decode(E5M6Codec().encode(x), 128)[0, 1] == pytest.approx(1e-5, rel=0.1)
    gaussian = rows(64, 128)
    assert signal_to_noise_db(gaussian, E5M6Codec().decode(E5M6Codec().encode(gaussian), 128)) > 49


@pytest.mark.parametrize("device", DEVICES)
@each_codec
def test_zeros_and_subnormal_numbers_arrive_as_zeros_or_as_they_are(codec: Codec, device: str) -> None:
    x = torch.zeros(3, 200, device=device)
    x[1] = 1e-40
    x[2, 7] = 3.0
    y = codec.decode(codec.encode(x), 200)
    assert torch.equal(y[0], x[0])
    assert float((y[1] - x[1]).abs().max()) <= 1e-40
    assert y[2, 7] == pytest.approx(3.0, rel=0.05)
    assert y[2].count_nonzero() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_codec
def test_what_is_not_finite_breaks_its_tile_or_is_refused(codec: Codec, bad: float) -> None:
    x = rows(3, 300)
    x[1, 130] = bad
    if isinstance(codec, LogFMTCodec):
        with pytest.raises(PrecisionError, match=r"tile \[1, 1\] holds an infinity or a NaN"):
            codec.encode(x)
        return
    y = codec.decode(codec.encode(x), 300)
    if isinstance(codec, BF16Codec):
        assert torch.equal(y, x.bfloat16().float()) or math.isnan(bad)
        assert y.isfinite().sum() == x.numel() - 1
    else:
        assert y[1, 128:256].isnan().all()
        assert y.isfinite().sum() == x.numel() - 128


@each_codec
def test_values_near_the_end_of_fp32_do_not_become_nan(codec: Codec) -> None:
    y = codec.decode(codec.encode(torch.full((1, 8), 3.4e38)), 8)
    assert not y.isnan().any()
    assert (y > 3.3e38).all()


@each_codec
def test_what_cannot_be_encoded_or_decoded_is_refused_in_one_line(codec: Codec) -> None:
    message = codec.encode(rows(2, 128))
    wide = message.new_zeros(2, message.shape[1] + 1)
    for call, match in (
        (lambda: codec.encode(torch.zeros(4)), r"no \[N, D\]"),
        (lambda: codec.encode(torch.zeros(2, 3, 4)), r"no \[N, D\]"),
        (lambda: codec.encode(torch.zeros(2, 4, dtype=torch.float64)), "not encoded"),
        (lambda: codec.encode(torch.zeros(2, 4, dtype=torch.int32)), "not encoded"),
        (lambda: codec.encode(torch.zeros(2, 0)), "no message"),
        (lambda: codec.bytes_per_token(0), "no message"),
        (lambda: codec.decode(wide, 128), "must be"),
        (lambda: codec.decode(message, 120), "must be"),
        (lambda: codec.decode(message[0], 128), "must be"),
        (lambda: codec.decode(message.to(torch.int16), 128), "not bytes"),
    ):
        with pytest.raises(PrecisionError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_scale_of_another_format_is_not_read() -> None:
    x = rows(2, 128)
    with pytest.raises(PrecisionError, match="must be"):
        FP8Codec("ue8m0").decode(FP8Codec("fp32").encode(x), 128)
    with pytest.raises(PrecisionError, match="must be"):
        LogFMTCodec(10).decode(LogFMTCodec(8).encode(x), 128)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FP8Codec("e8m0"), "neither"),  # type: ignore[arg-type]
        (lambda: FP8Codec(dtype=torch.float16), "not an FP8 format"),
        (lambda: FP8Codec(amax_floor=0.0), "positive"),
        (lambda: FP8Codec(amax_floor=math.nan), "positive"),
        (lambda: LogFMTCodec(2), "3 to 10"),
        (lambda: LogFMTCodec(11), "3 to 10"),
    ],
)
def test_a_codec_that_does_not_exist_is_refused(make, match: str) -> None:
    with pytest.raises(PrecisionError, match=match):
        make()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_go_through_one_codec_and_gradients_through_the_other(dtype: torch.dtype, device: str) -> None:
    codecs = ExpertCodecs()
    assert codecs.dispatch is not None
    assert codecs.combine is not None
    x = rows(6, 200).to(device, dtype).requires_grad_()
    grad = rows(6, 200, seed=1).to(device, dtype) * 1e-9
    y = transfer(x, codecs.dispatch, codecs.combine)
    y.backward(grad)
    assert y.dtype == dtype
    assert torch.equal(y, codecs.dispatch.decode(codecs.dispatch.encode(x.detach()), 200, dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, grad.bfloat16().to(dtype))


def test_small_gradients_survive_the_dispatch_of_the_backward_pass() -> None:
    codecs = ExpertCodecs()
    x = rows(4, 128).requires_grad_()
    grad = rows(4, 128, seed=2) * 1e-12
    transfer(x, None, codecs.gradient).backward(grad)
    assert x.grad is not None
    assert signal_to_noise_db(grad, x.grad) > 30


def test_without_codecs_nothing_is_done_and_without_a_forward_codec_values_stay() -> None:
    x = rows(3, 10).requires_grad_()
    assert transfer(x, None, None) is x
    assert torch.equal(transfer(x, None, BF16Codec()), x)
    empty = torch.zeros(0, 10, requires_grad=True)
    transfer(empty, FP8Codec(), BF16Codec()).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_codec
def test_a_gpu_makes_the_messages_of_a_cpu(codec: Codec) -> None:
    x = rows(33, 1000)
    on_cpu, on_gpu = codec.encode(x), codec.encode(x.cuda()).cpu()
    if isinstance(codec, LogFMTCodec):  # logarithms differ in their last bit, and so a code next to a threshold
        y = [codec.decode(each, 1000) for each in (on_cpu, on_gpu)]
        assert (y[0] - y[1]).abs().count_nonzero() < 0.001 * x.numel() or signal_to_noise_db(*y) > 60
    else:
        assert torch.equal(on_cpu, on_gpu)
        assert torch.equal(codec.decode(on_gpu.cuda(), 1000).cpu(), codec.decode(on_cpu, 1000))
