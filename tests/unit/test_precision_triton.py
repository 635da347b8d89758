"""Triton's kernels without a GPU: compiled for Hopper, and interpreted against PyTorch's form.

The interpreter gets three repairs, as it drops a carry in casts to FP8, truncates to BF16 and rounds a fused
multiply-add twice: casts are PyTorch's here. What a GPU does in their place is tested on one, in ``tests/gpu``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cofire.errors import PrecisionError
from cofire.precision import logfmt as plain_logfmt
from cofire.precision.quantize import BLOCK, COLUMN_TILE, ROW, TILE, Quantized, _quantize

triton = pytest.importorskip("triton")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Of a step: where FP32 logarithms decide, not distance.
UNDECIDED = 1e-3


def variants() -> list[Any]:
    from cofire.precision.triton import logfmt, quantize

    return [*quantize.variants(), *logfmt.variants()]


def parameters() -> list[Any]:
    """Return the variants; those that training starts are compiled in every run."""
    quick = ("bf16 fp8e4nv fp32", "logfmt-8 bf16", "logfmt-10 bf16")
    return [
        pytest.param(each, id=each.name, marks=[] if any(name in each.name for name in quick) else pytest.mark.slow)
        for each in variants()
    ]


@pytest.fixture(autouse=True)
def _own_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("variant", parameters())
def test_every_kernel_compiles_for_hopper_within_its_registers(variant) -> None:
    from cofire.precision.triton.compile import compile_ahead

    compiled = compile_ahead(variant)
    assert compiled.stack_bytes == 0
    assert compiled.count("STL") == compiled.count("LDL") == 0
    assert compiled.num_registers <= 255
    assert compiled.count("") > 100
    # No division with a branch for each number.
    assert "div.rn" not in compiled.ptx


def test_tiles_are_read_and_written_16_bytes_at_a_time_and_rounded_by_one_instruction_for_two() -> None:
    from cofire.precision.triton.compile import compile_ahead

    (rows,) = [each for each in variants() if each.name == "rows 0 bf16 fp8e4nv fp32 whole"]
    compiled = compile_ahead(rows)
    numbers_per_thread = 32
    assert compiled.count("LDG.E.128") == numbers_per_thread // 8
    assert compiled.count("STG.E.128") == numbers_per_thread // 16
    assert compiled.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == numbers_per_thread // 2
    assert "max.NaN.f32" in compiled.ptx
    # Numbers or quotients below FP32's normal range must not be flushed.
    assert ".ftz" not in compiled.ptx


def test_a_variant_names_each_argument_once() -> None:
    from dataclasses import replace

    from cofire.precision.triton.compile import compile_ahead

    variant = variants()[0]
    with pytest.raises(PrecisionError, match="missing or unknown") as error:
        compile_ahead(replace(variant, constants={}))
    assert "\n" not in str(error.value)
    names = [each.name for each in variants()]
    assert len(set(names)) == len(names)


def test_training_code_does_not_import_triton_before_it_is_on_a_gpu() -> None:
    code = (
        "import sys, torch; from cofire.precision import quantize, logfmt, linear; quantize.quantize(torch.ones(2, 2));"
        "logfmt.encode(torch.ones(2)); import cofire.precision.triton;"
        "sys.exit(any(name.startswith('cofire.precision.triton.') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return ``x * y + z``: the product is exact in 64 bits of mantissa, and so is a remainder."""
    return (np.longdouble(x) * np.longdouble(y) + np.longdouble(z)).astype(np.float32)


def fused_quotient(x: np.ndarray, divisor: np.ndarray, reciprocal: np.ndarray) -> np.ndarray:
    quotient = x * reciprocal
    quotient = fma(fma(quotient, divisor, -x), -reciprocal, quotient)
    return fma(fma(quotient, divisor, -x), -reciprocal, quotient)


def mantissas(random: np.random.Generator, size: int) -> np.ndarray:
    drawn = random.integers(0, 2**23, size)
    drawn[:4] = [0, 1, 2**23 - 1, 2**23 - 2]
    return (drawn | 0x3F800000).astype(np.uint32).view(np.float32)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs 64 bits of mantissa")
def test_two_fused_corrections_give_the_quotient_of_ieee_754() -> None:
    random = np.random.default_rng(0)
    divisor = mantissas(random, 10**6)
    one = np.float32(1.0)
    x = mantissas(random, divisor.size) * np.exp2(random.integers(-12, 9, divisor.size)).astype(np.float32)
    # Half of them next to where FP8 rounds: a scale times a number of five bits, plus or minus some last places.
    near = divisor[::2] * random.integers(16, 32, divisor[::2].size).astype(np.float32)
    x[::2] = (near.view(np.int32) + random.integers(-2, 3, near.size).astype(np.int32)).view(np.float32)
    assert np.array_equal(fused_quotient(x, divisor, one / divisor), x / divisor)
    zeros = np.array([0.0, -0.0], np.float32)
    assert np.signbit(fused_quotient(zeros, divisor[:2], one / divisor[:2])).tolist() == [False, True]
    for largest in (448.0, 57344.0):
        constant = np.full_like(x, largest)
        amax = x * np.exp2(random.integers(-100, 100, x.size)).astype(np.float32)
        assert np.array_equal(fused_quotient(amax, constant, one / constant), amax / constant)
    # The reciprocal itself, from a start within three units in the last place.
    start = ((one / divisor).view(np.int32) + random.integers(-3, 4, x.size).astype(np.int32)).view(np.float32)
    for _ in range(2):
        start = fma(fma(-divisor, start, np.ones_like(start)), start, start)
    assert np.array_equal(np.maximum(start, np.float32(0.5 + 2.0**-24)), one / divisor)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels gave in another process, whose Triton interprets."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_tiles_have_the_bits_of_pytorch(interpreted: dict[str, Any]) -> None:
    assert interpreted["tiles compared"] == 180
    assert interpreted["tiles that differ"] == []


def test_interpreted_logfmt_is_pytorchs_but_next_to_the_middle_of_two_codes(interpreted: dict[str, Any]) -> None:
    assert interpreted["logfmt compared"] > 10**4
    assert interpreted["logfmt that differs"] == []
    assert interpreted["logfmt from the middle"] <= UNDECIDED


def test_tiles_that_are_not_finite_become_nan_in_a_round_trip_and_an_error_when_encoded(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["nan per row"] == [0, 128, 128]
    assert interpreted["refusals"]["not finite"].startswith("tile [1, 1] holds an infinity or a NaN")


def test_what_kernels_do_not_take_is_refused_in_one_line(interpreted: dict[str, Any]) -> None:
    refusals = interpreted["refusals"]
    for name, words in {
        "gaps": "give x.contiguous()",
        "type": "float64 is not quantised",
        "format": "not an FP8 format",
        "scales": "neither 'fp32' nor 'ue8m0'",
        "vector": "give a matrix",
        "floor": "take at least 5.27e-36",
        "tile": "take TILE, COLUMN_TILE or BLOCK",
        "transpose": "requantize() takes any",
        "values": "take float32, bfloat16 or float16",
        "bits": "LogFMT-11 is not defined",
        "underflow": "neither 'clamp' nor 'zero'",
        "scalar": "a scalar has no tiles",
        "logfmt type": "take float32, bfloat16 or float16",
    }.items():
        assert words in refusals[name], name
        assert "\n" not in refusals[name]


def test_a_tensor_on_the_cpu_is_not_for_compiled_kernels() -> None:
    from cofire.precision.triton import logfmt, quantize

    for call in (quantize.quantize, quantize.quantize_both, logfmt.encode, logfmt.round_trip):
        with pytest.raises(PrecisionError, match=r"give x.cuda\(\)"):
            call(torch.ones(2, 2))


# What follows runs in the process that interprets.


def repair_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: E4M3,
        tl.float8e5: E5M2,
    }
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(data, source, target, _rounding):
        tensor = torch.from_numpy(np.ascontiguousarray(data).reshape(-1))
        cast = tensor.view(bits[tensor.element_size()]).view(types[source]).to(types[target])
        size = cast.element_size()
        return cast.view(bits[size]).numpy().reshape(data.shape).view(unsigned[size])

    def create_fma(_builder, x, y, z):
        exact = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data.astype(np.longdouble)
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def reduce(operation, inputs):
        # The only reduction of the kernels that it does number by number is a maximum that keeps NaN.
        (x,) = inputs
        found = np.maximum.reduce(x.handle.data, axis=operation.axis, keepdims=operation.keep_dims)
        return operation.to_tensor(found, x.dtype)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_fma = create_fma
    interpreter.ReduceOps.generic_reduce = reduce
    np.seterr(all="ignore")


def same(one: Quantized, other: Quantized) -> bool:
    """Return whether two have the same bits, all NaN being one."""
    if one.data.shape != other.data.shape or one.scale.dtype != other.scale.dtype:
        return False
    nan = one.data.float().isnan()
    codes = [each.data.view(torch.uint8).masked_fill(nan, 0x7F) for each in (one, other)]
    scales = [each.scale.float().nan_to_num(-1.0) for each in (one, other)]
    return bool((nan == other.data.float().isnan()).all()) and torch.equal(*codes) and torch.equal(*scales)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 12, shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.02] = 0.0
    x.view(-1)[0] = -0.0
    x[..., -1, :] = 0.0
    if len(shape) > 2:
        x[0, 3, 4], x[1, 70, 7], x[1, 2, 3] = math.inf, math.nan, -math.inf
    return x.to(dtype)


def compare_tiles() -> dict[str, Any]:
    from cofire.precision.triton import quantize

    compared, differ = 0, []
    cases = [
        (shape, dtype, scale_format, x_dtype, floor)
        for shape, x_dtype in (
            ((3, 130), torch.float32),
            ((2, 129, 40), torch.bfloat16),
            ((128, 256), torch.float16),
            ((0, 7), torch.float32),
            ((1, 1), torch.float32),
        )
        for dtype, scale_format, floor in (
            (E4M3, "fp32", 1e-4),
            (E4M3, "ue8m0", 1e-30),
            (E5M2, "fp32", 1e-30),
            (E5M2, "ue8m0", 1e-4),
        )
    ]
    for shape, dtype, scale_format, x_dtype, floor in cases:
        x = awkward(shape, x_dtype) if 0 not in shape else torch.empty(shape)
        options = (dtype, scale_format, floor)
        exact = x.float()
        rows, turned = _quantize(exact, TILE, *options), _quantize(exact.mT.contiguous(), TILE, *options)
        both = quantize.quantize_both(x, *options)
        again = _quantize(rows.dequantize().mT.contiguous(), TILE, *options)
        found = {
            "transposed": same(quantize.quantize_transposed(x, *options), turned),
            "both": same(both[0], rows) and same(both[1], turned),
            "kept": same(quantize.requantize_transposed(rows, None, floor), again),
        }
        for tile in (TILE, COLUMN_TILE, BLOCK):
            plain = _quantize(exact, tile, *options)
            found[f"tiles of {tile}"] = same(quantize.quantize(x, tile, *options), plain)
            values, expected = quantize.dequantize(plain, x_dtype), plain.dequantize(x_dtype)
            found[f"values of {tile}"] = torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
        compared += len(found)
        differ += [f"{name} {shape} {dtype} {scale_format} {floor}" for name, equal in found.items() if not equal]
    return {"tiles compared": compared, "tiles that differ": differ}


def logfmt_samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(2, 300, generator=generator)
    ratio = torch.rand(4, 384, generator=generator) * torch.tensor([[1e-6], [1e-3], [0.5], [1.5]])
    return {
        "normal": normal,
        "with zeros": normal * (torch.rand(2, 300, generator=generator) < 0.5),
        "wide": normal * 2.0 ** (torch.rand(2, 300, generator=generator) * 80 - 60),
        "narrow": 3.0 + 2.0 * ratio,
        "one": torch.full((2, 130), -3.0),
        "tiny": normal * 2.0**-124,
        "huge": (1.0 + ratio) * 2.0**126,
        "far": torch.tensor([1.0, 2.0**-32, -(2.0**-32.9), 2.0**-33, 2.0**-33.1, -(2.0**-60), 1e-40, -0.0]),
        "empty": torch.empty(2, 0),
    }


def off_middle(x: torch.Tensor, one: plain_logfmt.LogFMT, other: plain_logfmt.LogFMT) -> float:
    """Return how far those numbers are from the middle of two codes whose codes differ, at most, in steps."""
    codes = torch.stack([one.codes(), other.codes()]).int()
    # FP32 is too coarse for the middle of narrow tiles.
    low, high = one.low.double(), one.high.double()
    step = ((high / low).log() / (2 ** (one.bits - 1) - 2)).clamp(min=2.0**-19)
    low, step = (each.repeat_interleave(128, dim=-1)[..., : x.shape[-1]] for each in (low, step))
    below = low * (step * (codes.amin(0) - 1)).exp()
    off = (x.double().abs() - below * (1.0 + step.exp()) / 2).abs() / (below * step.expm1())
    return max([0.0, *off[codes[0] != codes[1]].tolist()])


def compare_logfmt() -> dict[str, Any]:
    from cofire.precision.triton import logfmt

    compared, from_middle, differs = 0, 0.0, []
    for bits in (3, 5, 8, 9, 10):
        for underflow, (name, x) in [
            (each, sample) for each in ("clamp", "zero")[bits % 2 :] for sample in logfmt_samples().items()
        ]:
            plain, coded = plain_logfmt.encode(x, bits, underflow), logfmt.encode(x, bits, underflow)
            values, expected = logfmt.decode(coded), plain.decode()
            again = logfmt.encode(values, bits, underflow)
            checks = {
                "bounds": torch.equal(plain.low, coded.low) and torch.equal(plain.high, coded.high),
                "stable": torch.equal(again.packed, coded.packed),
                "values": torch.equal(logfmt.decode(again).view(torch.int32), values.view(torch.int32)),
                "round trip": torch.equal(
                    logfmt.round_trip(x, bits, underflow).view(torch.int32), values.view(torch.int32)
                ),
                "decoded": torch.allclose(logfmt.decode(plain), expected, rtol=1e-5, atol=0.0),
                "signs": torch.equal(torch.signbit(logfmt.decode(plain)), torch.signbit(expected)),
                "neighbours": bool(((plain.codes().int() - coded.codes().int()).abs() <= 1).all()),
            }
            differs += [f"{check} {name} {bits} {underflow}" for check, right in checks.items() if not right]
            compared += x.numel()
            from_middle = max(from_middle, off_middle(x, plain, coded))
    return {"logfmt compared": compared, "logfmt that differs": differs, "logfmt from the middle": from_middle}


def message_of(call: Any) -> str:
    try:
        call()
    except PrecisionError as error:
        return str(error)
    return "nothing was refused"


def refuse() -> dict[str, Any]:
    from cofire.precision.triton import logfmt, quantize

    x = torch.randn(3, 300)
    x[1, 200], x[2, 5], x[2, 6] = math.nan, -math.inf, 0.0
    square = torch.ones(4, 4)
    calls = {
        "not finite": lambda: logfmt.encode(x),
        "gaps": lambda: quantize.quantize(torch.ones(4, 8).t()),
        "type": lambda: quantize.quantize(square.double()),
        "format": lambda: quantize.quantize(square, dtype=torch.float16),
        "scales": lambda: quantize.quantize(square, scale_format="bf16"),  # pyright: ignore
        "vector": lambda: quantize.quantize(torch.ones(4)),
        "floor": lambda: quantize.quantize(square, amax_floor=0.0),
        "tile": lambda: quantize.quantize(square, ROW),
        "transpose": lambda: quantize.requantize_transposed(_quantize(square, BLOCK, E4M3, "fp32", 1e-4)),
        "values": lambda: quantize.dequantize(_quantize(square, BLOCK, E4M3, "fp32", 1e-4), torch.float64),
        "bits": lambda: logfmt.encode(square, 11),
        "underflow": lambda: logfmt.round_trip(square, 8, "wrap"),  # pyright: ignore
        "scalar": lambda: logfmt.encode(torch.tensor(1.0)),
        "logfmt type": lambda: logfmt.round_trip(square.double()),
    }
    return {
        "nan per row": logfmt.round_trip(x).isnan().sum(1).tolist(),
        "refusals": {name: message_of(call) for name, call in calls.items()},
    }


if __name__ == "__main__":
    repair_interpreter()
    print(json.dumps({**compare_tiles(), **compare_logfmt(), **refuse()}))
