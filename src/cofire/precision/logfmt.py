"""LogFMT-n: tiles of 128 numbers on a logarithmic grid between their smallest and largest magnitude.

ISCA'25 (arXiv 2505.09343), 3.2, proposed for the combine of experts. With ``min`` and ``max`` of log |x| over a tile's
non-zeros, ``step = (max - min) / (2**(n-1) - 2)``; a code is a sign bit and K of n - 1 bits, 0 for zero, else
``exp(min + step * (K - 1))``. The nearest code is sought in linear space: between neighbours lies their arithmetic
mean, which rounding log |x| would miss and bias sums by. ``min`` is at least ``max - log(2**32)``.

The paper leaves open what follows; here it is so:

- Magnitudes below the clamp become code 1 (``underflow="clamp"``). With ``"zero"`` what is below half of the clamp
  becomes 0 and does not count for ``min``; DeepEP's kernel, too, sends what is far below to 0.
- A subnormal FP32 number is zero, and zero has no sign. A tile of zeros has codes 0; one of a single magnitude has
  code 1 and no error.
- ``step`` is at least 2**-19, below which FP32 could not tell neighbours apart. Only tiles whose magnitudes are equal
  within one in a thousand (n = 10) notice, and keep an error of 1e-6.
- A tile keeps its smallest and largest magnitude in FP32, not their logarithms, and both decode to themselves.
  Encoding decoded values therefore finds the same two, the same step, codes and, bit for bit, the same values.

Logarithms are FP32, so that a value within a thousandth of a step of the middle may go to either side, and a CPU and a
GPU may differ there. Left out: the kernel's choice of BF16 for tiles with a magnitude of 1 and more, and its log2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import PrecisionError

Underflow = Literal["clamp", "zero"]

TILE_SIZE = 128
BITS_MIN, BITS_MAX = 3, 10
# Of a tile's magnitudes, between the largest and the smallest that has its own code.
RANGE_MAX = 2.0**32
_STEP_MIN = 2.0**-19
_SMALLEST_NORMAL = 2.0**-126
# Of a thread of a CPU: half a megabyte of FP32.
_TILES_AT_A_TIME = 1024
_MAGNITUDE_BITS = 0x7FFFFFFF
_INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LogFMT:
    """Numbers in LogFMT.

    Attributes:
        bits: n, of an element with its sign.
        packed: [..., ceil(L * n / 8)], ``uint8``: a row's codes one after another, from the lowest bit up.
        low: [..., ceil(L / 128)], FP32: magnitude of code 1; 0 for a tile of zeros.
        high: [..., ceil(L / 128)], FP32: magnitude of the highest code, or the largest of fewer.
        shape: [..., L], of the numbers.
    """

    bits: int
    packed: Tensor
    low: Tensor
    high: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that codes and tiles belong together.

        Raises:
            PrecisionError: They do not.
        """
        _check_bits(self.bits)
        *batch, length = self.shape
        for name, tensor, dtype, size in (
            ("packed codes", self.packed, torch.uint8, -(-length * self.bits // 8)),
            ("lowest magnitudes", self.low, torch.float32, -(-length // TILE_SIZE)),
            ("highest magnitudes", self.high, torch.float32, -(-length // TILE_SIZE)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != (*batch, size):
                raise PrecisionError(
                    f"{name} {list(tensor.shape)} of {tensor.dtype} do not fit LogFMT-{self.bits} of "
                    f"{list(self.shape)}; they must be {[*batch, size]} of {dtype}"
                )
            if tensor.device != self.packed.device:
                raise PrecisionError(f"{name} on {tensor.device} and codes on {self.packed.device}; move one of them")

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and of two FP32 numbers per tile."""
        return self.packed.nbytes + self.low.nbytes + self.high.nbytes

    @property
    def min(self) -> Tensor:
        """Natural logarithm of code 1, [..., ceil(L / 128)]; minus infinity for a tile of zeros."""
        return self.low.log()

    @property
    def step(self) -> Tensor:
        """Natural logarithm between neighbouring codes, [..., ceil(L / 128)]."""
        return _step(self.low, self.high, self.bits)

    def words(self) -> Tensor:
        """Return the codes with their signs, the highest bit, [..., L], ``uint8`` for n = 8, else ``int32``."""
        return unpack_bits(self.packed, self.bits, self.shape[-1])

    def codes(self) -> Tensor:
        """Return K of each number, the code without its sign, in the shape and type of :meth:`words`."""
        return self.words() & (_sign_bit(self.bits) - 1)

    def decode(self) -> Tensor:
        """Return the numbers, [..., L], FP32."""
        gpu = _gpu_kernels(self.packed)
        if gpu is not None:
            dense = LogFMT(
                self.bits, self.packed.contiguous(), self.low.contiguous(), self.high.contiguous(), self.shape
            )
            return gpu.decode(dense)
        *batch, length = self.shape
        tile_bytes = TILE_SIZE * self.bits // 8
        packed = _fill_up(self.packed, self.low.shape[-1] * tile_bytes)
        low, high = self.low.reshape(-1), self.high.reshape(-1)
        packed = packed.reshape(low.numel(), tile_bytes)
        values = packed.new_empty(low.numel(), TILE_SIZE, dtype=torch.float32)
        for part in _parts(low):
            values[part] = _decode_tiles(packed[part], low[part], high[part], self.bits)
        values = values.view(*batch, self.low.shape[-1] * TILE_SIZE)
        return values if values.shape[-1] == length else values[..., :length].contiguous()


def encode(x: Tensor, bits: int = 8, underflow: Underflow = "clamp") -> LogFMT:
    """Encode numbers in tiles of 128 along the last dim; the last tile of a row may be smaller.

    Args:
        x: [..., L], FP32, BF16 or FP16, finite.
        bits: n, 3 to 10.
        underflow: Whether magnitudes far below their tile's largest become its smallest code or zero.

    Returns:
        Codes and tiles on ``x``'s device.

    Raises:
        PrecisionError: Numbers that are not finite, another type, a scalar, or bits out of bounds.
    """
    _check_bits(bits)
    if underflow not in get_args(Underflow):
        raise PrecisionError(f"underflow {underflow!r} is neither 'clamp' nor 'zero'")
    if x.dtype not in _INPUT_TYPES:
        raise PrecisionError(f"{x.dtype} is not encoded to LogFMT; give float32, bfloat16 or float16")
    if x.dim() == 0:
        raise PrecisionError("a scalar has no tiles; give a vector")
    gpu = _gpu_kernels(x)
    if gpu is not None:
        return gpu.encode(x.detach().contiguous(), bits, underflow)
    return _encode(x.detach(), bits, underflow)


def _gpu_kernels(x: Tensor) -> Any:
    """Return the module of Triton's kernels if they run where a tensor is, else None."""
    if x.device.type != "cuda":
        return None
    from cofire.precision import triton

    if not triton.runs_on(x.device):
        return None
    from cofire.precision.triton import logfmt

    return logfmt


def _encode(x: Tensor, bits: int, underflow: Underflow) -> LogFMT:
    """Encode with PyTorch's operations, on any device."""
    *batch, length = x.shape
    num_tiles, tile_bytes = -(-length // TILE_SIZE), TILE_SIZE * bits // 8
    tiles = _fill_up(x, num_tiles * TILE_SIZE).reshape(math.prod(batch) * num_tiles, TILE_SIZE)
    packed = tiles.new_empty(tiles.shape[0], tile_bytes, dtype=torch.uint8)
    low = tiles.new_empty(tiles.shape[0], dtype=torch.float32)
    high = torch.empty_like(low)
    for part in _parts(low):
        packed[part], low[part], high[part] = _encode_tiles(tiles[part].to(torch.float32), bits, underflow)
    if not bool(high.isfinite().all()):
        place = (~high.isfinite()).view(*batch, num_tiles).nonzero()[0].tolist()
        raise PrecisionError(f"tile {place} holds an infinity or a NaN, for which LogFMT has no code; mask it before")
    # A tile fills whole bytes, so that filled-up rows only end too late.
    packed = packed.view(*batch, num_tiles * tile_bytes)[..., : -(-length * bits // 8)].contiguous()
    return LogFMT(bits, packed, low.view(*batch, num_tiles), high.view(*batch, num_tiles), (*batch, length))


def _parts(tiles: Tensor) -> Iterator[slice]:
    """Yield the tiles to take at a time: on a CPU few enough that what is between the steps stays in its cache."""
    size = _TILES_AT_A_TIME * torch.get_num_threads() if tiles.device.type == "cpu" else max(1, tiles.numel())
    for first in range(0, tiles.numel(), size):
        yield slice(first, first + size)


def _encode_tiles(tiles: Tensor, bits: int, underflow: Underflow) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes [T, 16 n], lowest and highest magnitudes [T] of tiles [T, 128].

    Selects with the bits of integers: masks are the slowest thing that PyTorch does on a CPU.
    """
    signed = tiles.view(torch.int32)
    magnitudes = (signed & _MAGNITUDE_BITS).view(torch.float32)
    high = magnitudes.amax(dim=-1)
    smallest = torch.full_like(high, _SMALLEST_NORMAL)
    if underflow == "zero":
        smallest = torch.maximum(smallest, high / (2 * RANGE_MAX))
    # FP32 numbers that are not negative are in the order of their bits. What is below the smallest is negative here;
    # without its sign it is above all that is not.
    above = magnitudes.view(torch.int32) - smallest.view(torch.int32)[:, None]
    low = ((above & _MAGNITUDE_BITS).amin(dim=-1) + smallest.view(torch.int32)).view(torch.float32)
    empty = high < _SMALLEST_NORMAL
    high.masked_fill_(empty, 0.0)
    low = torch.maximum(low.masked_fill_(empty, 0.0), high / RANGE_MAX)
    step = _step(low, high, bits)[:, None]
    # log(|x| / low) in steps. The difference comes first: it is exact where |x| is near low.
    steps = torch.maximum(magnitudes, low[:, None], out=magnitudes).sub_(low[:, None])
    steps.div_(low.clamp(min=_SMALLEST_NORMAL)[:, None]).log1p_().div_(step)
    # The arithmetic mean of two neighbours is log((1 + e**step) / 2) above the lower one, at least half of a step:
    # the highest magnitude's code is cut off to the highest, not above.
    middle = torch.log1p(torch.expm1(step) / 2) / step
    words = steps.add_(2 - middle).to(torch.int32)
    words.bitwise_or_((signed >> 31).bitwise_and_(_sign_bit(bits)))
    words.bitwise_and_(above.bitwise_right_shift_(31).bitwise_not_())
    return pack_bits(words, bits), low, high


def _decode_tiles(packed: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the numbers [T, 128] of packed codes [T, 16 n], lowest and highest magnitudes [T]."""
    words = unpack_bits(packed, bits, TILE_SIZE).to(torch.int32)
    codes = (words & _top(bits)).to(torch.float32)
    not_zero = codes.clamp(max=1)
    # The highest code goes one further, above the highest magnitude, to which it is then cut.
    codes.add_((codes - (_top(bits) - 1)).clamp_(min=0)).sub_(1)
    values = codes.mul_(_step(low, high, bits)[:, None]).exp_().mul_(low[:, None])
    values = torch.minimum(values, high[:, None], out=values).mul_(not_zero)
    values.view(torch.int32).bitwise_or_((words >> (bits - 1)).bitwise_left_shift_(31))
    return values


def _step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    spread = torch.log1p((high - low) / low.clamp(min=_SMALLEST_NORMAL))
    return (spread / (_top(bits) - 1)).clamp_(min=_STEP_MIN)


def _check_bits(bits: int) -> None:
    if not BITS_MIN <= bits <= BITS_MAX:
        raise PrecisionError(f"LogFMT-{bits} is not defined; take {BITS_MIN} to {BITS_MAX} bits")


def _sign_bit(bits: int) -> int:
    return 1 << (bits - 1)


def _top(bits: int) -> int:
    """Return the code of a tile's largest magnitude."""
    return _sign_bit(bits) - 1


def _fill_up(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely: code i of a row takes bits ``i * bits`` and up of its bytes, the lowest first.

    Args:
        codes: [..., L], of an integer type, each within ``bits`` bits.
        bits: 1 to 10.

    Returns:
        [..., ceil(L * bits / 8)], ``uint8``; what is left of a row's last byte is zero.
    """
    length = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8)
    if not codes.numel():
        return codes.new_empty(*codes.shape[:-1], -(-length * bits // 8), dtype=torch.uint8)
    # Eight codes fill as many bytes as a code has bits.
    codes = _fill_up(codes, -(-length // 8) * 8).to(torch.int32)
    fours = _merge(_merge(codes, bits).to(torch.int32), 2 * bits)
    first, second = fours[..., 0::2], fours[..., 1::2]
    packed = _bytes(first | (second << (4 * bits)))[..., :bits]
    if bits > 8:
        packed = torch.cat([packed, _bytes(second >> (64 - 4 * bits))[..., : bits - 8]], dim=-1)
    return packed.flatten(-2)[..., : -(-length * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """Return what :func:`pack_bits` packed.

    Args:
        packed: [..., ceil(length * bits / 8)], ``uint8``.
        bits: 1 to 10.
        length: L, codes of a row.

    Returns:
        [..., L], ``uint8`` for 8 bits, else ``int32``.
    """
    if bits == 8:
        return packed
    if not packed.numel():
        return packed.new_empty(*packed.shape[:-1], length, dtype=torch.int32)
    num_groups = -(-length // 8)
    groups = _fill_up(packed, num_groups * bits).unflatten(-1, (num_groups, bits))
    groups = _fill_up(groups, max(bits, 8))
    # The first four codes are within the first eight bytes, the others within the last eight.
    first = _wide(groups[..., :8])
    last = first if bits <= 8 else _wide(groups[..., -8:])
    fours = torch.cat([first, last >> (4 * bits - 8 * max(0, bits - 8))], dim=-1) & ((1 << (4 * bits)) - 1)
    codes = _split(_split(fours.flatten(-2), 2 * bits).to(torch.int64), bits)
    return codes if codes.shape[-1] == length else codes[..., :length].contiguous()


def _merge(x: Tensor, width: int) -> Tensor:
    """Return neighbours of ``width`` bits, ``int32``, side by side in one ``int64``; of half the elements."""
    mask, pairs = (1 << width) - 1, _wide(x)
    return (pairs >> (32 - width)).bitwise_and_(mask << width).bitwise_or_(pairs & mask)


def _split(x: Tensor, width: int) -> Tensor:
    """Return the two numbers of ``width`` bits in each ``int64`` as neighbours, ``int32``."""
    mask = (1 << width) - 1
    return (x << (32 - width)).bitwise_and_(mask << 32).bitwise_or_(x & mask).view(torch.int32)


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in numbers of 64 bits; a view if it is dense and begins on one."""
    flat = x.reshape(-1)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64).view(*x.shape[:-1], -1)


def _bytes(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).view(torch.uint8)
