"""LogFMT-n on a GPU, in Triton: encode, decode, and both in one pass without codes in memory.

Codes, bytes and tiles are those of ``cofire.precision.logfmt``, whose module says what the format is (ISCA'25, 3.2).
Both forms take logarithms in FP32 and agree but for values within a thousandth of a step of the middle between two
neighbours, which may go to either side; decoded values agree within one in 50,000. What is decoded and encoded again
has the same bits, and :func:`round_trip` gives the bits of decoding what :func:`encode` made.

Two logarithms, two exponentials and a quotient of PyTorch's form become one of each per number: ``log2(|x| / low)``
with the machine's approximation, off by 2**-22, which is a fraction of a thousandth of a step if a tile's largest
magnitude is at least twice its smallest. Tiles that are narrower take the exact way, for which a program branches.
The choice is a tile's own, so that no tile's bits depend on its neighbours.

The bound is a copy, and is met only if the GPU issues nearly all it can: compiled, ``round_trip`` of BF16 takes 34
instructions per number, where a Hopper GPU at 3 TB/s has time for 39 per 4 bytes. Encoding takes 26 for n = 8 (31 are
the limit) and 36 for n = 10 (33), of which packing is ten; decoding 23 and 30. Other numbers of bits take more.

Left out: both ends of an all-to-all in one kernel with it, which is what the paper found to cost 50 to 100 %.
"""

# Kernels are compiled, not called: a checker takes their constants for wrappers and misses what they return.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision.logfmt import BITS_MAX, BITS_MIN, TILE_SIZE, LogFMT, Underflow
from cofire.precision.triton.compile import Variant
from cofire.precision.triton.quantize import OPTIONS, check_place, larger, start, tiles_at

_INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILES = 16
_APPROXIMATE = not triton.knobs.runtime.interpret
WARPS = {"encode": 4, "decode": 4, "round_trip": 4}
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_STEP_MIN = tl.constexpr(2.0**-19)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# Largest over smallest magnitude of a tile below which the machine's logarithms are too coarse.
_NARROW = tl.constexpr(2.0)
_HUGE = tl.constexpr(2.0**100)


@dataclass(frozen=True)
class Launch:
    """What a kernel knows when it is compiled.

    Attributes:
        bits: n.
        whole: Rows are whole tiles.
        zero: Magnitudes far below a tile's largest become zero.
        approximate: The machine's logarithm, which the interpreter lacks.
    """

    bits: int
    whole: bool
    zero: bool = False
    approximate: bool = True

    @property
    def top(self) -> int:
        """Code of the largest magnitude."""
        return 2 ** (self.bits - 1) - 1

    @property
    def word_bits(self) -> int:
        """Of what codes are written as: the widest words that eight of them fill."""
        return 8 if self.bits % 2 or self.bits == 8 else 16


def _options(launch: Launch, dtype: torch.dtype) -> dict[str, Any]:
    # The way of narrow tiles would take more registers than that of others, and leave fewer programs to a
    # multiprocessor. With FP32 or masks it would have to spill for that.
    return {**OPTIONS, "maxnreg": 96 if launch.whole and dtype.itemsize == 2 else 168}


@triton.jit
def _log2(x, LAUNCH: tl.constexpr):
    if LAUNCH.approximate:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _reciprocal(x, LAUNCH: tl.constexpr):
    """Return ``1 / x`` within one unit in the last place, where neither is subnormal."""
    if LAUNCH.approximate:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return tl.fma(tl.fma(-x, y, 1.0), y, y)


@triton.jit
def _log1p(x):
    """Return ``log(1 + x)`` within two units in the last place, for ``x`` not negative."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def _expm1(x):
    """Return ``exp(x) - 1`` by its series; ``x`` is within 0 and 1.04, whose 11th power over 11! is below 2**-24."""
    y = 1.0 + x * (1.0 / 10)
    for i in tl.static_range(9, 1, -1):
        y = tl.fma(y * x, 1.0 / i, 1.0)
    return y * x


@triton.jit
def _bounds(x, LAUNCH: tl.constexpr):
    """Return which numbers [T, 128] have a code above 0, and the smallest and largest magnitude of tiles [T].

    Both are 0 for a tile of zeros. If a number is not finite, the largest magnitude is not either, and all have codes.
    """
    high = tl.reduce(tl.abs(x), 1, larger)
    smallest = tl.zeros_like(high) + _SMALLEST_NORMAL
    if LAUNCH.zero:
        smallest = tl.maximum(smallest, high * 2.0**-33)
    smallest = tl.where(high < float("inf"), smallest, 0.0).to(tl.uint32, bitcast=True)
    # Numbers that are not negative are in the order of their bits; what is below the smallest wraps around.
    above = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) - smallest[:, None]
    low = (tl.min(above, 1) + smallest).to(tl.float32, bitcast=True)
    empty = high < _SMALLEST_NORMAL
    low = tl.where(empty, 0.0, tl.maximum(low, high * 2.0**-32))
    return above.to(tl.int32, bitcast=True) >= 0, low, tl.where(empty, 0.0, high)


@triton.jit
def _shift(base):
    """Return a power of two that brings numbers to where their quotients and reciprocals are right."""
    # Above, the reciprocal is subnormal, and the machine's division returns 0 for divisors beyond 2**126.
    return tl.where(base > _HUGE, 2.0**-64, 1.0)


@triton.jit
def _grid(low, high, LAUNCH: tl.constexpr):
    """Return what the codes of tiles stand for.

    Which tiles are narrow, whether any is, the logarithm between neighbours, natural for narrow tiles and to the base
    2 for the others, its reciprocal, and 2 less the place of the arithmetic mean between neighbours, in steps.
    """
    narrow = high < low * _NARROW
    any_narrow = tl.max(narrow.to(tl.int32), 0) > 0
    base = tl.maximum(low, _SMALLEST_NORMAL)
    shift = _shift(base)
    ratio = tl.maximum(high * shift * _reciprocal(base * shift, LAUNCH), 1.0)
    step = tl.maximum(_log2(ratio, LAUNCH) * (1.0 / (LAUNCH.top - 1)), _STEP_MIN * _LOG2_E)
    per_step = _reciprocal(step, LAUNCH)
    # The mean is log(cosh(s / 2)) / s + 1 / 2 above the lower one; by its series where a difference would lose it.
    natural = step * _LN_2
    series = 1.5 - natural * (0.125 - natural * natural * (1.0 / 192 - natural * natural * (1.0 / 2880)))
    rest = tl.where(step < 0.5, series, 1.0 + (1.0 - _log2(1.0 + tl.exp2(-step), LAUNCH)) * per_step)
    if any_narrow:
        exact = tl.maximum(_log1p((high - low) * shift / (base * shift)) * (1.0 / (LAUNCH.top - 1)), _STEP_MIN)
        step = tl.where(narrow, exact, step)
        per_step = tl.where(narrow, 1.0 / exact, per_step)
        rest = tl.where(narrow, 1.5 - exact * (0.125 - exact * exact * (1.0 / 192)), rest)
    return narrow, any_narrow, step, per_step, rest


@triton.jit
def _codes(x, low, narrow, per_step, rest, LAUNCH: tl.constexpr):
    """Return K as FP32 of those numbers [T, 128] that are not zero."""
    base = tl.maximum(low, _SMALLEST_NORMAL)
    unit = _reciprocal(base, LAUNCH)
    logs = _log2(tl.maximum(tl.abs(x) * unit[:, None], 1.0), LAUNCH)
    exact = narrow | (base > _HUGE)
    if tl.max(exact.to(tl.int32), 0) > 0:
        shift = _shift(base)
        above = (tl.maximum(tl.abs(x), low[:, None]) - low[:, None]) * shift[:, None] / (base * shift)[:, None]
        scale = tl.where(narrow, 1.0, _LOG2_E)
        logs = tl.where(exact[:, None], _log1p(above) * scale[:, None], logs)
    return tl.floor(tl.fma(logs, per_step[:, None], rest[:, None]))


@triton.jit
def _values(code, low, high, narrow, any_narrow, step, LAUNCH: tl.constexpr):
    """Return the magnitudes of codes K above 0, which are FP32, [T, 128]."""
    # The highest code goes one further, above the largest magnitude, to which it is then cut.
    code = tl.where(code == LAUNCH.top, LAUNCH.top + 1.0, code)
    steps = tl.fma(code, step[:, None], -step[:, None])
    value = tl.exp2(steps) * low[:, None]
    if any_narrow:
        value = tl.where(narrow[:, None], tl.fma(_expm1(steps), low[:, None], low[:, None]), value)
    return tl.minimum(value, high[:, None], propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _signed(value, sign, not_zero):
    """Return magnitudes with signs (the highest bit of each), or a positive zero."""
    bits = value.to(tl.int32, bitcast=True) | sign
    return tl.where(not_zero, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _with_part(unit, pair, BELOW: tl.constexpr, BITS: tl.constexpr):
    """Return a unit with what it has of an integer of 2 n bits that begins so many bits below it."""
    if BELOW >= 0:
        if BELOW < 2 * BITS:
            unit = unit | (pair >> BELOW)
    else:
        if BELOW > -16:
            unit = unit | (pair << -BELOW)
    return unit


@triton.jit
def _unit(pairs, J: tl.constexpr, LAUNCH: tl.constexpr):
    """Return word J of four integers of 2 n bits that lie one after another."""
    unit = tl.zeros_like(pairs[0])
    if J * LAUNCH.word_bits < 8 * LAUNCH.bits:
        for k in tl.static_range(4):
            unit = _with_part(unit, pairs[k], LAUNCH.word_bits * J - 2 * LAUNCH.bits * k, LAUNCH.bits)
    return unit.to(tl.uint8 if LAUNCH.word_bits == 8 else tl.uint16)


@triton.jit
def _four_units(pairs, J: tl.constexpr, COUNT: tl.constexpr, LAUNCH: tl.constexpr):
    """Return each fourth of so many words from J on in two new dims."""
    first = tl.join(_unit(pairs, J, LAUNCH), _unit(pairs, J + COUNT // 2, LAUNCH))
    second = tl.join(_unit(pairs, J + COUNT // 4, LAUNCH), _unit(pairs, J + 3 * COUNT // 4, LAUNCH))
    return tl.join(first, second)


@triton.jit
def _packed(codes, TILES: tl.constexpr, LAUNCH: tl.constexpr):
    """Return codes [T, 128] of n bits as words [T, 16, 8 or 16], of which those that eight codes fill count."""
    even, odd = tl.split(tl.reshape(codes, [TILES, 64, 2]))
    even, odd = tl.split(tl.reshape(even | (odd << LAUNCH.bits), [TILES, 16, 2, 2]))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    pairs = (p0, p1, p2, p3)
    if LAUNCH.word_bits == 8:
        first = tl.join(_four_units(pairs, 0, 16, LAUNCH), _four_units(pairs, 2, 16, LAUNCH))
        second = tl.join(_four_units(pairs, 1, 16, LAUNCH), _four_units(pairs, 3, 16, LAUNCH))
        words = tl.reshape(tl.join(first, second), [TILES, 16, 16])
    else:
        words = tl.join(_four_units(pairs, 0, 8, LAUNCH), _four_units(pairs, 1, 8, LAUNCH))
        words = tl.reshape(words, [TILES, 16, 8])
    return words


@triton.jit
def _encode(x, packed, lows, highs, num_tiles, length, LAUNCH: tl.constexpr, TILES: tl.constexpr):
    tile, exists, at, mask = tiles_at(num_tiles, length, LAUNCH.whole, TILES)
    values = tl.load(x + at, mask, 0.0).to(tl.float32)
    not_zero, low, high = _bounds(values, LAUNCH)
    narrow, _, _, per_step, rest = _grid(low, high, LAUNCH)
    code = _codes(values, low, narrow, per_step, rest, LAUNCH).to(tl.int32).to(tl.uint32, bitcast=True)
    sign = (values.to(tl.uint32, bitcast=True) >> 31) << (LAUNCH.bits - 1)
    words = tl.where(not_zero, code | sign, 0)
    tl.store(lows + tile, low, exists)
    tl.store(highs + tile, high, exists)
    if LAUNCH.bits == 8:
        inside = tl.arange(0, 128)[None, :]
        tl.store(packed + (tile.to(tl.int64)[:, None] * 128 + inside), words.to(tl.uint8), exists[:, None])
    else:
        units = _packed(words, TILES, LAUNCH)
        # Eight codes fill n bytes.
        count = 8 * LAUNCH.bits // LAUNCH.word_bits
        group = tl.arange(0, 16)[None, :, None]
        j = tl.arange(0, 128 // LAUNCH.word_bits)[None, None, :]
        first = tl.program_id(0).to(tl.int64) * (TILES * 16 * count)
        inside = (tl.arange(0, TILES)[:, None, None] * 16 + group) * count + j
        tl.store(packed + first + inside, units, exists[:, None, None] & (j < count))


@triton.jit
def _words(packed, tile, at, mask, length, LAUNCH: tl.constexpr, TILES: tl.constexpr):
    """Return codes with their signs [T, 128]; above them are other bits."""
    if LAUNCH.bits == 8:
        words = tl.load(packed + at, mask, 0).to(tl.int32)
    else:
        # A code of 10 bits begins on an even bit: none lies in more than two bytes.
        inside = tl.arange(0, 128)[None, :]
        byte = inside * LAUNCH.bits >> 3
        row_bytes = tl.cdiv(length * LAUNCH.bits, 8)
        tiles_per_row = tl.cdiv(length, 128)
        first = (tile % tiles_per_row) * (16 * LAUNCH.bits)
        if LAUNCH.whole:
            program = packed + tl.program_id(0).to(tl.int64) * (TILES * 16 * LAUNCH.bits)
            place = program + (tl.arange(0, TILES)[:, None] * (16 * LAUNCH.bits) + byte)
        else:
            place = packed + ((tile // tiles_per_row).to(tl.int64) * row_bytes + first)[:, None] + byte
        words = tl.load(place, mask, 0).to(tl.int32)
        # The last code of a tile or row may end in its first byte.
        if LAUNCH.bits < 9:
            mask = mask & (first[:, None] + byte + 1 < row_bytes)
        words |= tl.load(place + 1, mask, 0).to(tl.int32) << 8
        words = words >> (inside * LAUNCH.bits & 7)
    return words


@triton.jit
def _decode(packed, lows, highs, values, num_tiles, length, LAUNCH: tl.constexpr, TILES: tl.constexpr):
    tile, exists, at, mask = tiles_at(num_tiles, length, LAUNCH.whole, TILES)
    low = tl.load(lows + tile, exists, 0.0)
    high = tl.load(highs + tile, exists, 0.0)
    words = _words(packed, tile, at, mask, length, LAUNCH, TILES)
    narrow, any_narrow, step, _, _ = _grid(low, high, LAUNCH)
    code = (words & LAUNCH.top).to(tl.float32)
    value = _values(code, low, high, narrow, any_narrow, step, LAUNCH)
    value = _signed(value, (words << (32 - LAUNCH.bits)) & -2147483648, code > 0.0)
    tl.store(values + at, value.to(values.dtype.element_ty), mask)


@triton.jit
def _round_trip(x, values, num_tiles, length, LAUNCH: tl.constexpr, TILES: tl.constexpr):
    _, _, at, mask = tiles_at(num_tiles, length, LAUNCH.whole, TILES)
    exact = tl.load(x + at, mask, 0.0).to(tl.float32)
    not_zero, low, high = _bounds(exact, LAUNCH)
    high = tl.where(high < float("inf"), high, float("nan"))
    narrow, any_narrow, step, per_step, rest = _grid(low, high, LAUNCH)
    code = _codes(exact, low, narrow, per_step, rest, LAUNCH)
    value = _values(code, low, high, narrow, any_narrow, step, LAUNCH)
    value = _signed(value, exact.to(tl.int32, bitcast=True) & -2147483648, not_zero)
    tl.store(values + at, value.to(values.dtype.element_ty), mask)


def encode(x: Tensor, bits: int = 8, underflow: Underflow = "clamp") -> LogFMT:
    """Encode on a GPU as :func:`cofire.precision.logfmt.encode` does (ISCA'25, 3.2); waits for the check of numbers.

    Args:
        x: [..., L], FP32, BF16 or FP16, finite, contiguous, on a CUDA device.
        bits: n, 3 to 10.
        underflow: Whether magnitudes far below their tile's largest become its smallest code or zero.

    Raises:
        PrecisionError: Numbers that are not finite, another type or device, gaps, a scalar, or bits out of bounds.
    """
    encoded = encode_unchecked(x, bits, underflow)
    if not bool(encoded.high.isfinite().all()):
        place = (~encoded.high.isfinite()).nonzero()[0].tolist()
        raise PrecisionError(f"tile {place} holds an infinity or a NaN, for which LogFMT has no code; mask it before")
    return encoded


def encode_unchecked(x: Tensor, bits: int = 8, underflow: Underflow = "clamp") -> LogFMT:
    """Encode without waiting for the GPU: tiles that hold an infinity or a NaN have such a ``high`` and no meaning.

    Args:
        x: As for :func:`encode`.
        bits: As there.
        underflow: As there.

    Raises:
        PrecisionError: As there, but for numbers that are not finite.
    """
    launch, num_tiles = _checked(x, bits, underflow)
    *batch, length = x.shape
    tiles = (*batch, -(-length // TILE_SIZE))
    low = torch.empty(tiles, dtype=torch.float32, device=x.device)
    high = torch.empty_like(low)
    packed = torch.empty(num_tiles * TILE_SIZE * bits // 8, dtype=torch.uint8, device=x.device)
    words = packed.view(torch.uint8 if launch.word_bits == 8 else torch.uint16)
    arguments = (x, words, low, high, num_tiles, length, launch, _TILES)
    start(_encode, -(-num_tiles // _TILES), WARPS["encode"], arguments, _options(launch, x.dtype))
    # The last tile of a row fills whole bytes, of which a shorter row keeps the first.
    packed = packed.view(*batch, tiles[-1] * TILE_SIZE * bits // 8)
    return LogFMT(bits, packed[..., : -(-length * bits // 8)].contiguous(), low, high, tuple(x.shape))


def decode(encoded: LogFMT, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode on a GPU as :meth:`cofire.precision.logfmt.LogFMT.decode` does.

    Args:
        encoded: Contiguous, on a CUDA device.
        dtype: ``float32``, ``bfloat16`` or ``float16``, to which numbers are rounded.

    Returns:
        [..., L].

    Raises:
        PrecisionError: Another type or device, or gaps.
    """
    for tensor in (encoded.packed, encoded.low, encoded.high):
        check_place(tensor)
    _check_type(dtype)
    values = torch.empty(encoded.shape, dtype=dtype, device=encoded.packed.device)
    length, num_tiles = encoded.shape[-1], encoded.low.numel()
    launch = Launch(encoded.bits, length % TILE_SIZE == 0, approximate=_APPROXIMATE)
    arguments = (encoded.packed, encoded.low, encoded.high, values, num_tiles, length, launch, _TILES)
    start(_decode, -(-num_tiles // _TILES), WARPS["decode"], arguments, _options(launch, dtype))
    return values


def round_trip(x: Tensor, bits: int = 8, underflow: Underflow = "clamp", dtype: torch.dtype | None = None) -> Tensor:
    """Return what is left of numbers after LogFMT-n: ``decode(encode(x, bits, underflow), dtype)`` in one pass.

    Numbers that are not finite are no error here: their tile becomes NaN throughout.

    Args:
        x: [..., L], FP32, BF16 or FP16, contiguous, on a CUDA device.
        bits: n, 3 to 10.
        underflow: As for :func:`encode`.
        dtype: Of the result; None: that of ``x``.

    Raises:
        PrecisionError: Another type or device, gaps, a scalar, or bits out of bounds.
    """
    launch, num_tiles = _checked(x, bits, underflow)
    _check_type(dtype or x.dtype)
    values = torch.empty_like(x, dtype=dtype)
    arguments = (x, values, num_tiles, x.shape[-1], launch, _TILES)
    start(_round_trip, -(-num_tiles // _TILES), WARPS["round_trip"], arguments, _options(launch, x.dtype))
    return values


def _checked(x: Tensor, bits: int, underflow: str) -> tuple[Launch, int]:
    """Return what an encoder's kernel knows when it is compiled, and the number of tiles."""
    if not BITS_MIN <= bits <= BITS_MAX:
        raise PrecisionError(f"LogFMT-{bits} is not defined; take {BITS_MIN} to {BITS_MAX} bits")
    if underflow not in get_args(Underflow):
        raise PrecisionError(f"underflow {underflow!r} is neither 'clamp' nor 'zero'")
    _check_type(x.dtype)
    if x.dim() == 0:
        raise PrecisionError("a scalar has no tiles; give a vector")
    check_place(x)
    num_tiles = math.prod(x.shape[:-1]) * -(-x.shape[-1] // TILE_SIZE)
    whole = x.shape[-1] % TILE_SIZE == 0
    return Launch(bits, whole, underflow == "zero", _APPROXIMATE), num_tiles


def _check_type(dtype: torch.dtype) -> None:
    if dtype not in _INPUT_TYPES:
        raise PrecisionError(f"{dtype} is not a type of LogFMT's numbers; take float32, bfloat16 or float16")


def variants() -> list[Variant]:
    """Return what the functions above start, for :mod:`cofire.precision.triton.compile`."""
    found = []
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    plans = {3: [("bf16", True)], 9: [("bf16", True)], 8: [("bf16", True), ("fp32", False)]}
    plans[10] = [("bf16", True), ("fp32", True), ("fp32", False)]
    for bits, plan in plans.items():
        for x, whole in plan:
            launch = Launch(bits, whole)
            options = _options(launch, types[x])
            tiles = {"lows": "*fp32", "highs": "*fp32"}
            sizes = {"num_tiles": "i32", "length": "i32"}
            words = {"packed": f"*u{launch.word_bits}"}
            constants = {"LAUNCH": launch, "TILES": _TILES}
            zero = constants | {"LAUNCH": replace(launch, zero=True)}
            for kind, kernel, signature, known in (
                ("encode", _encode, {"x": f"*{x}"} | words | tiles | sizes, zero),
                ("decode", _decode, {"packed": "*u8", "values": f"*{x}"} | tiles | sizes, constants),
                ("round_trip", _round_trip, {"x": f"*{x}", "values": f"*{x}"} | sizes, constants),
            ):
                name = f"{kind} logfmt-{bits} {x} {'whole' if whole else 'ragged'}"
                found.append(Variant(name, kernel, signature, known, {"num_warps": WARPS[kind], **options}))
    return found
