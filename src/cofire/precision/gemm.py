"""Products of FP8 operands with fine-grained scales, on the backend that the caller names.

The three products of a linear layer (DeepSeek-V3 technical report, 3.3.1 and 3.3.2) are all ``a @ b.T``: Fprop with
``x`` in tiles and ``w`` in blocks, Dgrad with ``dy`` in tiles and :func:`transpose` of ``w``, Wgrad with both operands
in tiles along the tokens. Experts come as rows sorted by expert, as a fixed number of rows for each, or, for Wgrad, as
a contraction cut by expert.

| backend | what adds |
|---|---|
| ``reference`` | Hopper's accumulators, bit by bit (``accumulate.py``) |
| ``cpu`` | FP32, on dequantised operands |
| ``torch`` | cuBLAS through ``torch.nn.functional.scaled_mm``; experts one after the other |
| ``triton`` | our kernels for Hopper (``triton/gemm.py``) |

Left out: autograd, other backends than the one that was named, scales of rows and of whole tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision.accumulate import AccumulatorSpec, scaled_gemm_reference
from cofire.precision.product import grouped_product, padded_rows, product
from cofire.precision.quantize import BLOCK, TILE, Quantized

Backend = Literal["reference", "cpu", "torch", "triton"]

# Elements of the contraction that share a scale, and what every backend promotes by (technical report, 3.3.2).
_TILE = 128
_HOPPER = (9, 0)
_CUDA_MIN = (12, 9)
# What a GPU's callers get who do not choose, best first, for one matrix and for many (benchmarks/results: on an H100
# cuBLAS is 1.2 to 1.7 times as fast for 4,096 rows, ours 1.7 times for 32 experts of 120 rows).
_ON_GPU: tuple[Backend, ...] = ("torch", "triton")
_ON_GPU_FOR_EXPERTS: tuple[Backend, ...] = ("triton", "torch")


def available(backend: Backend, device: torch.device | str) -> str | None:
    """Return why a backend cannot run on a device, or None: it can.

    Args:
        backend: Its name.
        device: Where the operands are.

    Raises:
        PrecisionError: There is no such backend.
    """
    place = torch.device(device)
    if backend not in get_args(Backend):
        raise PrecisionError(f"backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if place.type == "cpu" else f"it needs operands on the CPU, these are on {place}"
    if place.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return f"it needs a CUDA device, not {place}"
    if torch.cuda.get_device_capability(place) != _HOPPER:
        return f"it needs a Hopper GPU, not {torch.cuda.get_device_name(place)}"
    if backend == "torch":
        cuda = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
        if cuda < _CUDA_MIN or not hasattr(F, "scaled_mm") or not hasattr(F, "ScalingType"):
            return f"it needs PyTorch 2.10 for CUDA 12.9 or later, not {torch.__version__}"
        return None
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def fastest(device: torch.device | str, experts: bool = False) -> Backend:
    """Return the backend for callers that do not choose.

    Args:
        device: Where the operands are.
        experts: Products of many matrices, not of one.

    Raises:
        PrecisionError: Only the reference runs there.
    """
    if torch.device(device).type == "cpu":
        return "cpu"
    reasons = []
    for backend in _ON_GPU_FOR_EXPERTS if experts else _ON_GPU:
        reason = available(backend, device)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    listed = "; ".join(reasons)
    raise PrecisionError(f"no fast FP8 product on {device} ({listed}); take operands to the CPU, or name 'reference'")


def transpose(q: Quantized) -> Quantized:
    """Return a view of the transpose: blocks stay blocks, tiles of 128 x 1 become tiles of 1 x 128.

    Args:
        q: [..., R, C].

    Returns:
        [..., C, R]. GPU backends copy its data into rows first; quantise the transpose itself where that counts.
    """
    return Quantized(q.data.mT, q.scale.mT, (q.tile[1], q.tile[0]))


def scaled_gemm(
    a: Quantized,
    b: Quantized,
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    promote_every: int = _TILE,
) -> Tensor:
    """Return ``a @ b.T``.

    Args:
        a: [M, K] in ``TILE``; scales FP32 or UE8M0.
        b: [N, K] in ``BLOCK`` or ``TILE``, likewise.
        backend: What computes.
        dtype: Of the result, ``float32`` or ``bfloat16``.
        promote_every: Elements of the contraction between promotions to FP32; only the reference takes other than 128.

    Returns:
        [M, N].

    Raises:
        PrecisionError: Operands or types do not fit, or the backend cannot run.
    """
    _check(a, b, (2, 2), backend, dtype)
    _check_promotion(promote_every, backend)
    return _multiply(a, b, backend, dtype, promote_every)


def grouped_gemm(
    a: Quantized, b: Quantized, counts: Tensor, backend: Backend, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the rows of each expert times the transpose of its matrix.

    Args:
        a: [M, K] in ``TILE``, rows sorted by expert.
        b: [E, N, K] in ``BLOCK`` or ``TILE``.
        counts: [E] int64 or int32 on the device of ``a``, rows of each expert; they sum to M. ``triton`` reads them on
            the device only: there, rows that no expert has come out zero.
        backend: What computes.
        dtype: Of the result, ``float32`` or ``bfloat16``.

    Returns:
        [M, N].

    Raises:
        PrecisionError: Operands, counts or types do not fit, or the backend cannot run.
    """
    _check(a, b, (2, 3), backend, dtype)
    _check_counts(counts, b.data.shape[0], a)
    if backend == "triton":
        return _kernels().grouped_gemm(a, b, counts, dtype)
    numbers = _numbers(counts)
    m = a.data.shape[0]
    if sum(numbers) != m:
        raise PrecisionError(f"counts sum to {sum(numbers)} and a has {m} rows; give each row to one expert")
    if backend == "cpu":
        return grouped_product(_values(a), _values(b), numbers).to(dtype)
    out = torch.empty(m, b.data.shape[1], dtype=dtype, device=a.data.device)
    for e, rows in _spans(numbers):
        out[rows] = _multiply(_rows(a, rows), _expert(b, e), backend, dtype)
    return out


def masked_gemm(
    a: Quantized, b: Quantized, counts: Tensor, backend: Backend, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the first ``counts[e]`` rows of each expert times the transpose of its matrix; the others are zero.

    Args:
        a: [E, R, K] in ``TILE``; what rows beyond the counts hold does not matter.
        b: [E, N, K] in ``BLOCK`` or ``TILE``.
        counts: [E] int64 or int32 on the device of ``a``, 0 to R each.
        backend: What computes.
        dtype: Of the result, ``float32`` or ``bfloat16``.

    Returns:
        [E, R, N].

    Raises:
        PrecisionError: Operands, counts or types do not fit, or the backend cannot run.
    """
    _check(a, b, (3, 3), backend, dtype)
    (experts, size, _), n = a.data.shape, b.data.shape[1]
    if b.data.shape[0] != experts:
        raise PrecisionError(f"a has {experts} experts and b {b.data.shape[0]}; give one matrix for each")
    _check_counts(counts, experts, a)
    if backend == "triton":
        return _kernels().masked_gemm(a, b, counts, dtype)
    numbers = _numbers(counts)
    if max(numbers, default=0) > size:
        raise PrecisionError(f"a count of {max(numbers)} exceeds the {size} rows of an expert; give 0 to {size}")
    out = torch.zeros(experts, size, n, dtype=dtype, device=a.data.device)
    for e, count in enumerate(numbers):
        if count:
            # oneDNN compiles for every number of rows.
            width = min(padded_rows(count), size) if backend == "cpu" else count
            out[e, :count] = _multiply(_rows(_expert(a, e), slice(0, width)), _expert(b, e), backend, dtype)[:count]
    return out


def grouped_wgrad(
    a: Quantized, b: Quantized, counts: Tensor, backend: Backend, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``a @ b.T`` over the tokens of each expert: its weight's gradient from ``dy.T`` and ``x.T``.

    Args:
        a: [M, T] in ``TILE``; each expert's tokens are filled up to a multiple of 128 with zeros, so no tile has two.
        b: [N, T] in ``TILE``, likewise.
        counts: [E] int64 or int32 on the device of ``a``, tokens of each expert before they were filled up.
        backend: What computes.
        dtype: Of the result, ``float32`` or ``bfloat16``.

    Returns:
        [E, M, N]; zeros for an expert without tokens.

    Raises:
        PrecisionError: Operands, counts or types do not fit, or the backend cannot run.
    """
    _check(a, b, (2, 2), backend, dtype)
    if b.tile != TILE:
        raise PrecisionError("b is in blocks; a weight's gradient contracts tiles of 1 x 128 on both sides")
    _check_counts(counts, counts.numel(), a)
    (m, tokens), n = a.data.shape, b.data.shape[0]
    if tokens % _TILE:
        raise PrecisionError(f"{tokens} tokens are no multiple of {_TILE}; fill each expert's up with zeros")
    if backend == "triton":
        return _kernels().grouped_wgrad(a, b, counts, dtype)
    filled = [-(-count // _TILE) * _TILE for count in _numbers(counts)]
    if sum(filled) != tokens:
        raise PrecisionError(f"counts filled up to tiles sum to {sum(filled)} and a has {tokens} tokens")
    out = torch.zeros(len(filled), m, n, dtype=dtype, device=a.data.device)
    for e, span in _spans(filled):
        out[e] = _multiply(_columns(a, span), _columns(b, span), backend, dtype)
    return out


def _multiply(a: Quantized, b: Quantized, backend: Backend, dtype: torch.dtype, promote_every: int = _TILE) -> Tensor:
    """Compute one product of checked operands."""
    if backend == "reference":
        spec = AccumulatorSpec(interval=promote_every)
        return scaled_gemm_reference(a.data, a.scale, b.data, b.scale, spec).to(dtype)
    if backend == "cpu":
        return product(_values(a), _values(b)).to(dtype)
    if backend == "torch":
        return _torch_gemm(a, b, dtype)
    return _kernels().scaled_gemm(a, b, dtype)


def _kernels() -> ModuleType:
    # Triton takes a second to load and is wanted on a GPU only.
    from cofire.precision.triton import gemm

    return gemm


def _values(q: Quantized) -> Tensor:
    """Return FP32 values; those of a transposed view are read in the order in which they lie."""
    if q.data.is_contiguous() or not q.data.mT.is_contiguous():
        return q.dequantize()
    original = transpose(q)
    return Quantized(original.data, original.scale.contiguous(), original.tile).dequantize().mT


def _torch_gemm(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """Multiply through cuBLAS, which takes sizes that are multiples of 16 and, with these scales, of 128 along K.

    Scales of tiles lie along the rows, those of blocks along K with room for a multiple of four
    (PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp).
    """
    if a.data.dtype != torch.float8_e4m3fn or b.data.dtype != torch.float8_e4m3fn:
        raise PrecisionError("backend 'torch' multiplies E4M3 with these scales, not E5M2; take 'triton'")
    (m, k), n = a.data.shape, b.data.shape[0]
    if not m or not n or not k:
        return torch.zeros(m, n, dtype=dtype, device=a.data.device)
    wide, left, right = _up(k, _TILE), _up(m, 16), _up(n, 16)
    blocks = wide // _TILE
    kinds = F.ScalingType
    if b.tile == BLOCK:
        b_scale = _laid_out(b.scale.mT, _up(blocks, 4), -(-n // _TILE))
    else:
        b_scale = _laid_out(b.scale, right, blocks)
    try:
        out = F.scaled_mm(
            _filled(a.data, left, wide),
            _filled(b.data, right, wide).t(),
            _laid_out(a.scale, left, blocks),
            kinds.BlockWise1x128,
            b_scale,
            kinds.BlockWise128x128 if b.tile == BLOCK else kinds.BlockWise1x128,
            output_dtype=dtype,
        )
    except RuntimeError as error:
        if "NOT_SUPPORTED" not in str(error):
            raise
        raise PrecisionError(f"cuBLAS has no kernel for {m} x {n} x {k} with these scales; take 'triton'") from None
    return out if out.shape == (m, n) else out[:m, :n].contiguous()


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _filled(data: Tensor, rows: int, columns: int) -> Tensor:
    """Return FP8 data as rows of memory, filled up with zeros."""
    if data.shape == (rows, columns):
        return data.contiguous()
    filled = torch.zeros(rows, columns, dtype=torch.uint8, device=data.device)
    filled[: data.shape[0], : data.shape[1]] = data.view(torch.uint8)
    return filled.view(data.dtype)


def _laid_out(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Return FP32 scales that lie column by column, filled up with zeros."""
    if scale.shape == (rows, columns) and scale.dtype == torch.float32 and scale.stride() == (1, rows):
        return scale
    laid = torch.empty_strided((rows, columns), (1, rows), dtype=torch.float32, device=scale.device)
    if scale.shape != laid.shape:
        laid.zero_()
    laid[: scale.shape[0], : scale.shape[1]] = scale.float()
    return laid


def _expert(q: Quantized, e: int) -> Quantized:
    return Quantized(q.data[e], q.scale[e], q.tile)


def _rows(q: Quantized, rows: slice) -> Quantized:
    return Quantized(q.data[rows], q.scale[rows], q.tile)


def _columns(q: Quantized, columns: slice) -> Quantized:
    tiles = slice(columns.start // _TILE, columns.stop // _TILE)
    return Quantized(q.data[:, columns], q.scale[:, tiles], q.tile)


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has any, with its place."""
    first = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(first, first + count)
        first += count


def _numbers(counts: Tensor) -> list[int]:
    numbers = [int(count) for count in counts.tolist()]
    if min(numbers, default=0) < 0:
        raise PrecisionError(f"a count of {min(numbers)} is negative; give 0 for an expert without rows")
    return numbers


def _check(a: Quantized, b: Quantized, dims: tuple[int, int], backend: Backend, dtype: torch.dtype) -> None:
    for name, q, dim in (("a", a, dims[0]), ("b", b, dims[1])):
        if q.data.dim() != dim:
            raise PrecisionError(f"{name} {list(q.data.shape)} has {q.data.dim()} dims, this product takes {dim}")
    if a.tile != TILE:
        raise PrecisionError(f"a is in tiles of {a.tile}, not of 1 x 128; requantize(a, TILE), or transpose() it")
    if b.tile not in (TILE, BLOCK):
        raise PrecisionError(f"b is in tiles of {b.tile}, not of 1 x 128 or 128 x 128; requantize(b, BLOCK)")
    if a.data.shape[-1] != b.data.shape[-1]:
        shapes = f"a {list(a.data.shape)} and b {list(b.data.shape)}"
        raise PrecisionError(f"{shapes} share no contraction; give [M, K] and [N, K], or transpose() one")
    if a.data.device != b.data.device:
        raise PrecisionError(f"a on {a.data.device} and b on {b.data.device}; move one of them")
    if dtype not in (torch.float32, torch.bfloat16):
        raise PrecisionError(f"a product comes in float32 or bfloat16, not {dtype}; convert the result")
    reason = available(backend, a.data.device)
    if reason is not None:
        raise PrecisionError(f"backend {backend!r} cannot run: {reason}; take another")


def _check_promotion(promote_every: int, backend: Backend) -> None:
    if promote_every != _TILE and backend != "reference":
        raise PrecisionError(
            f"backend {backend!r} promotes every {_TILE} elements, not {promote_every}; take 'reference'"
        )


def _check_counts(counts: Tensor, experts: int, a: Quantized) -> None:
    if counts.dtype not in (torch.int32, torch.int64) or counts.dim() != 1 or counts.numel() != experts or not experts:
        raise PrecisionError(
            f"counts {list(counts.shape)} of {counts.dtype} do not fit; give one int64 for each of {experts} experts"
        )
    if counts.device != a.data.device:
        raise PrecisionError(f"counts on {counts.device} and a on {a.data.device}; move them")
