"""Rows of numbers as rows of bytes: what goes over a network between tokens and experts, and what is kept in E5M6.

A codec makes one message of ``uint8`` from each row of numbers, a token, codes and scales side by side, so that an
all-to-all moves whole rows and nothing else. Bytes of a token of 7,168 numbers:

| codec | codes | scales of 56 tiles | together |
|---|---|---|---|
| BF16 | 14,336 | | 14,336 |
| FP8, FP32 scales (DeepEP's message) | 7,168 | 224 | 7,392 |
| FP8, UE8M0 scales | 7,168 | 56 | 7,224 |
| LogFMT-10 | 8,960 | 224 | 9,184 |
| LogFMT-8 | 7,168 | 224 | 7,392 |
| E5M6, UE8M0 scales | 10,752 | 56 | 10,808 |

In training DeepSeek-V3 (technical report, 3.3.3) dispatches in FP8 with scales that are powers of two, activations to
the experts' first matrix and, in the backward pass, gradients to their second one; what comes back, either way, is
BF16. LogFMT (ISCA'25, 3.2) is proposed for what comes back. :class:`ExpertCodecs` holds both, and :func:`transfer` is
what they do to a tensor and to its gradient. Powers of two make the FP8 product behind the dispatch exact in what it
was sent: its own rounding to tiles finds the values as they are.

Left out: sending, and DeepEP's choice of BF16 for single tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire.errors import PrecisionError
from cofire.precision import logfmt
from cofire.precision.formats import E4M3, E5M6
from cofire.precision.formats import decode as decode_format
from cofire.precision.formats import encode as encode_format
from cofire.precision.quantize import AMAX_FLOOR, SCALE_TYPES, TILE, Quantized, ScaleFormat, quantize, scale_of

# Gradients of a mean over tokens are small: DeepSeek's floor for activations would take them below FP8's range.
GRADIENT_FLOOR = 1e-30
_TILE = 128
_INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BF16_LARGEST = torch.finfo(torch.bfloat16).max


class Codec(Protocol):
    """Makes messages of rows of numbers, and numbers of messages."""

    def bytes_per_token(self, length: int) -> int:
        """Return the bytes of a message for a row of so many numbers."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return messages [N, bytes_per_token(D)], ``uint8``, contiguous, for rows ``x`` [N, D]; N may be 0."""
        ...

    def decode(self, message: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows [N, D] of messages of rows of D = ``length`` numbers."""
        ...


@dataclass(frozen=True)
class BF16Codec:
    """Two bytes for a number; infinities and NaN pass."""

    def bytes_per_token(self, length: int) -> int:
        """Return 2 D."""
        return 2 * _checked_length(length)

    def encode(self, x: Tensor) -> Tensor:
        """Return messages [N, 2 D], ``uint8``.

        Args:
            x: [N, D], FP32, BF16 or FP16.

        Raises:
            PrecisionError: Another shape or type.
        """
        return _message(_checked_rows(x).to(torch.bfloat16))

    def decode(self, message: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows [N, D].

        Args:
            message: [N, 2 D], ``uint8``.
            length: D.
            dtype: Of the rows.

        Raises:
            PrecisionError: Messages of another width or type.
        """
        return _part(_checked_message(message, self.bytes_per_token(length), length), 0, torch.bfloat16).to(dtype)


@dataclass(frozen=True)
class FP8Codec:
    """FP8 in tiles of 1 x 128, then a scale for each; a tile with an infinity or a NaN is NaN throughout.

    Attributes:
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        scale_format: FP32, or powers of two of one byte.
        amax_floor: A tile's largest value counts as at least this.
    """

    scale_format: ScaleFormat = "ue8m0"
    amax_floor: float = AMAX_FLOOR
    dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            PrecisionError: One is out of range.
        """
        if self.scale_format not in SCALE_TYPES:
            raise PrecisionError(f"scale format {self.scale_format!r} is neither 'fp32' nor 'ue8m0'")
        if self.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise PrecisionError(f"{self.dtype} is not an FP8 format; take float8_e4m3fn or float8_e5m2")
        if not 0.0 < self.amax_floor < float("inf"):
            raise PrecisionError(f"amax_floor {self.amax_floor} is not a positive number; take {AMAX_FLOOR:g}")

    def bytes_per_token(self, length: int) -> int:
        """Return D and 4 or 1 for each tile."""
        return _checked_length(length) + _num_tiles(length) * SCALE_TYPES[self.scale_format].itemsize

    def encode(self, x: Tensor) -> Tensor:
        """Return messages [N, D + 4 or 1 for each tile], ``uint8``.

        Args:
            x: [N, D], FP32, BF16 or FP16.

        Raises:
            PrecisionError: Another shape or type.
        """
        q = quantize(_checked_rows(x), TILE, self.dtype, self.scale_format, self.amax_floor)
        return _message(q.data, q.scale)

    def decode(self, message: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows [N, D].

        Args:
            message: As :meth:`encode` makes it.
            length: D.
            dtype: Of the rows.

        Raises:
            PrecisionError: Messages of another width or type.
        """
        return self.quantized(message, length).dequantize(dtype)

    def quantized(self, message: Tensor, length: int) -> Quantized:
        """Return codes and scales as they came, for a product that takes them; arguments as for :meth:`decode`."""
        message = _checked_message(message, self.bytes_per_token(length), length)
        data = _part(message, 0, self.dtype, length)
        return Quantized(data, _part(message, length, SCALE_TYPES[self.scale_format]), TILE)


@dataclass(frozen=True)
class LogFMTCodec:
    """LogFMT-n, then the smallest and the largest magnitude of each tile in BF16, as DeepEP's kernel sends them.

    That is exact for rows in BF16. Of FP32 rows the two, and the grid between them, move by a 512th at most, which
    costs LogFMT-10 of Gaussian values 0.7 dB. Decoded rows encode to themselves either way.

    Attributes:
        bits: n, 3 to 10.
    """

    bits: int = 10

    def __post_init__(self) -> None:
        """Check the width.

        Raises:
            PrecisionError: It is out of range.
        """
        if not logfmt.BITS_MIN <= self.bits <= logfmt.BITS_MAX:
            raise PrecisionError(f"LogFMT-{self.bits} is not defined; take {logfmt.BITS_MIN} to {logfmt.BITS_MAX} bits")

    def bytes_per_token(self, length: int) -> int:
        """Return D n / 8, rounded up, and 4 for each tile."""
        return self._code_bytes(_checked_length(length)) + 4 * _num_tiles(length)

    def encode(self, x: Tensor) -> Tensor:
        """Return messages [N, ceil(D n / 8) + 4 for each tile], ``uint8``.

        Args:
            x: [N, D], FP32, BF16 or FP16, finite.

        Raises:
            PrecisionError: Another shape or type, or a value that is not finite.
        """
        coded = logfmt.encode(_checked_rows(x), self.bits)
        low, high = (each.clamp(max=_BF16_LARGEST).to(torch.bfloat16) for each in (coded.low, coded.high))
        return _message(coded.packed, low, high)

    def decode(self, message: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows [N, D].

        Args:
            message: As :meth:`encode` makes it.
            length: D.
            dtype: Of the rows.

        Raises:
            PrecisionError: Messages of another width or type.
        """
        message = _checked_message(message, self.bytes_per_token(length), length)
        codes, num_tiles = self._code_bytes(length), _num_tiles(length)
        low = _part(message, codes, torch.bfloat16, 2 * num_tiles).float()
        high = _part(message, codes + 2 * num_tiles, torch.bfloat16).float()
        shape = (message.shape[0], length)
        return logfmt.LogFMT(self.bits, message[:, :codes].contiguous(), low, high, shape).decode().to(dtype)

    def _code_bytes(self, length: int) -> int:
        return -(-length * self.bits // 8)


@dataclass(frozen=True)
class E5M6Codec:
    """E5M6 (technical report, 3.3.3), 12 bits for a number, then a UE8M0 scale for each tile of 1 x 128.

    The upper eight bits of all codes lie together, then the lower four, two in a byte.

    The scale is the one that E4M3 has: it takes a tile's largest magnitude to 448 at most, so that the FP8 operand and
    this copy share it. Below 448 E5M6 has 22 powers of two with all of its bits and six more with fewer, where E4M3 has
    14 and three: the seven powers of two above 448 that stay unused would buy only what no product notices. A tile
    with an infinity or a NaN is NaN throughout.
    """

    def bytes_per_token(self, length: int) -> int:
        """Return 1.5 D, rounded up, and 1 for each tile."""
        return _packed_bytes(_checked_length(length)) + _num_tiles(length)

    def encode(self, x: Tensor) -> Tensor:
        """Return messages [N, ceil(1.5 D) + 1 for each tile], ``uint8``.

        Args:
            x: [N, D], FP32, BF16 or FP16.

        Raises:
            PrecisionError: Another shape or type.
        """
        rows = _checked_rows(x).float()
        tiles = F.pad(rows, (0, -rows.shape[1] % _TILE)).unflatten(1, (-1, _TILE))
        scale = scale_of(tiles.abs().amax(-1), E4M3.largest, "ue8m0")
        codes = encode_format(tiles / scale.float()[..., None], E5M6)
        return _message(_pack_codes(codes.flatten(1)[:, : rows.shape[1]]), scale)

    def decode(self, message: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows [N, D].

        Args:
            message: As :meth:`encode` makes it.
            length: D.
            dtype: Of the rows.

        Raises:
            PrecisionError: Messages of another width or type.
        """
        message = _checked_message(message, self.bytes_per_token(length), length)
        packed = _packed_bytes(length)
        values = decode_format(_unpack_codes(message[:, :packed], length), E5M6)
        scale = _part(message, packed, torch.float8_e8m0fnu).float()
        return values.mul_(scale.repeat_interleave(_TILE, dim=1)[:, :length]).to(dtype)


@dataclass(frozen=True)
class ExpertCodecs:
    """What travels between tokens and experts; the defaults are DeepSeek-V3's in training.

    Attributes:
        dispatch: Of activations on their way to experts; none: they arrive as they are.
        combine: Of the experts' outputs on their way back, and of the gradients of their inputs; none: likewise.
        gradient: Of the outputs' gradients on their way to experts; none: likewise.
    """

    dispatch: Codec | None = field(default_factory=FP8Codec)
    combine: Codec | None = field(default_factory=BF16Codec)
    gradient: Codec | None = field(default_factory=lambda: FP8Codec(amax_floor=GRADIENT_FLOOR))


EXACT = ExpertCodecs(None, None, None)


def transfer(x: Tensor, forward: Codec | None, backward: Codec | None) -> Tensor:
    """Return ``x`` as it arrives after ``forward``; its gradient travels back through ``backward``.

    Args:
        x: [N, D], FP32, BF16 or FP16.
        forward: Of the values; none: exact.
        backward: Of the gradient; none: exact.

    Returns:
        [N, D] of the type of ``x``.

    Raises:
        PrecisionError: A codec does not take the rows or the gradient.
    """
    if forward is None and backward is None:
        return x
    y = _Transfer.apply(x, forward, backward)
    assert isinstance(y, Tensor)
    return y


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Codec | None, backward: Codec | None) -> Tensor:
        ctx.backward_codec = backward
        return x.view_as(x) if forward is None else _received(x, forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        codec = ctx.backward_codec
        return (grads[0] if codec is None else _received(grads[0], codec)), None, None


def _received(x: Tensor, codec: Codec) -> Tensor:
    return codec.decode(codec.encode(x), x.shape[1], x.dtype)


def _checked_rows(x: Tensor) -> Tensor:
    """Return rows outside autograd, once it is clear that they can be encoded."""
    if x.dim() != 2:
        raise PrecisionError(f"rows of shape {list(x.shape)} are no [N, D]; flatten all dims but the last")
    if x.dtype not in _INPUT_TYPES:
        raise PrecisionError(f"{x.dtype} is not encoded; give float32, bfloat16 or float16")
    _checked_length(x.shape[1])
    return x.detach()


def _checked_length(length: int) -> int:
    if length < 1:
        raise PrecisionError(f"rows of {length} numbers have no message; give 1 or more")
    return length


def _checked_message(message: Tensor, width: int, length: int) -> Tensor:
    if message.dtype != torch.uint8:
        raise PrecisionError(f"messages of {message.dtype} are not bytes; give the uint8 that encode() made")
    if message.dim() != 2 or message.shape[1] != width:
        raise PrecisionError(
            f"messages {list(message.shape)} are not of {length} numbers in this codec; they must be [N, {width}]"
        )
    return message.detach()


def _num_tiles(length: int) -> int:
    return -(-length // _TILE)


def _message(*parts: Tensor) -> Tensor:
    """Return parts [N, ...] of any types side by side in one row of bytes each."""
    return torch.cat([_in_order(part).view(torch.uint8) for part in parts], dim=1)


def _in_order(x: Tensor) -> Tensor:
    """Return a dense tensor whose last stride is 1, which PyTorch does not promise for a dim of size 0 or 1."""
    return x if x.is_contiguous() and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _part(message: Tensor, first: int, dtype: torch.dtype, num_bytes: int | None = None) -> Tensor:
    """Return the numbers in a part of all messages; copied, since rows of odd widths do not lie where numbers may."""
    last = message.shape[1] if num_bytes is None else first + num_bytes
    part = message[:, first:last]
    aligned = torch.empty(part.shape, dtype=torch.uint8, device=message.device).copy_(part)
    return aligned.view(dtype)


def _packed_bytes(length: int) -> int:
    return -(-length * 3 // 2)


def _pack_codes(codes: Tensor) -> Tensor:
    """Return codes [N, L] of 12 bits densely: the upper eight bits of all, then the lower four, two in a byte."""
    upper, lower = (codes >> 4).to(torch.uint8), F.pad((codes & 15).to(torch.uint8), (0, codes.shape[1] % 2))
    return torch.cat((upper, lower[:, 0::2] | (lower[:, 1::2] << 4)), dim=1)


def _unpack_codes(packed: Tensor, length: int) -> Tensor:
    """Return what :func:`_pack_codes` packed, [N, length] of ``int16``."""
    upper, pairs = packed[:, :length], packed[:, length:]
    lower = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)[:, :length]
    return (upper.to(torch.int16) << 4) | lower
