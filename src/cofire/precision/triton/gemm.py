"""FP8 products on Hopper's tensor cores, promoted to FP32 with their scales every 128 elements of the contraction.

DeepSeek-V3 technical report, 3.3.2: each 128-wide block of the contraction has a fresh accumulator in the tensor cores,
14 bits wide; its sum times the scales of both operands is added to FP32. ``accumulate.py`` models the same bit by bit,
``gemm.py`` is the interface. One kernel serves four groupings: one product; rows sorted by expert; a fixed number of
rows for each expert; the contraction cut by expert (weight gradients). Operands come by TMA, which fills what lies
outside a matrix with zeros. Few output tiles split the contraction; the block that ends last adds the parts in order.

Nothing imports this module before a kernel is wanted. Left out: multicast between clusters, other generations' scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cofire.errors import PrecisionError
from cofire.precision.quantize import BLOCK, Quantized
from cofire.precision.triton.compile import Variant

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr

# Elements of the contraction that share a scale.
_TILE = 128
_BLOCK_K = tl.constexpr(_TILE)
# Below this many blocks of the contraction a part of it does not pay for adding the parts.
_BLOCKS_PER_PART_MIN = 4
# Below this many, several small thread blocks on a processor hide beginnings and ends better.
_BLOCKS_TO_OVERLAP_MIN = 8
# What a tile costs besides its columns, in columns.
_OVERHEAD_COLUMNS = 40
_PLANNED_TILES = 64

_arrived: dict[tuple[int, int], Tensor] = {}


@dataclass(frozen=True)
class Tiling:
    """How one product is cut up.

    Attributes:
        block_m: Rows of an output tile.
        block_n: Columns of an output tile, 64 or 128, which share a scale of a block; more where it is overlapped.
        num_warps: Of a thread block.
        num_stages: Tiles of the contraction in shared memory at a time.
        split: Parts of the contraction.
        group_m: Tiles of rows that are worked on together, so that they find each other's operands in the L2 cache.
        overlapped: ``overlap.py``'s kernel, 128 x 128, 192 or 256 with 8 warps, for ``b`` in blocks; never split.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: int = 1
    group_m: int = 8
    overlapped: bool = False


LARGE = Tiling(128, 128, 8, 4)
NARROW = Tiling(128, 64, 4, 4)
SHORT = Tiling(64, 128, 4, 3)
OVERLAPPED = {columns: Tiling(128, columns, 8, 4, overlapped=True) for columns in (128, 192, 256)}


def choose(
    rows: int,
    columns: int,
    contraction: int,
    groups: int | None = None,
    b_in_blocks: bool = True,
    num_processors: int = 132,
) -> Tiling:
    """Return a tiling for a product [rows, contraction] x [columns, contraction].

    Args:
        rows: Of the output, of one group.
        columns: Of the output.
        contraction: What is summed over.
        groups: Products of this shape that run together and are not split; None: one, which may be.
        b_in_blocks: 128 rows of the right operand share a scale.
        num_processors: Streaming multiprocessors of the device.
    """
    blocks, bands = -(-contraction // _TILE), -(-rows // 128) * (groups or 1)
    rounds = bands * -(-columns // 128) / num_processors
    overlaps = b_in_blocks and blocks >= _BLOCKS_TO_OVERLAP_MIN
    if rows <= 64:
        base = SHORT
    elif rounds < (1 if overlaps else 2):
        base = NARROW
    elif not b_in_blocks:
        base = LARGE
    elif not overlaps:
        base = SHORT
    else:
        # A tile's time grows with its columns; all processors wait for the last round of tiles.
        return min(
            OVERLAPPED.values(),
            key=lambda t: -(-bands * -(-columns // t.block_n) // num_processors) * (t.block_n + _OVERHEAD_COLUMNS),
        )
    if groups is not None:
        return base
    tiles = -(-rows // base.block_m) * -(-columns // base.block_n)
    split = max(1, min(num_processors // max(tiles, 1), blocks // _BLOCKS_PER_PART_MIN, 16))
    return replace(base, split=split)


def scaled_gemm(a: Quantized, b: Quantized, dtype: torch.dtype, tiling: Tiling | None = None) -> Tensor:
    """Return ``a @ b.T``, [M, N].

    Args:
        a: [M, K] in ``TILE``.
        b: [N, K] in ``BLOCK`` or ``TILE``.
        dtype: ``float32`` or ``bfloat16``.
        tiling: None: chosen by shape.
    """
    (m, k), n = a.data.shape, b.data.shape[0]
    tiling = tiling or choose(m, n, k, b_in_blocks=b.tile == BLOCK, num_processors=_num_processors(a.data))
    out = torch.empty(m, n, dtype=dtype, device=a.data.device)
    _launch(_Product(a, b, out, m, n, k), tiling, "dense")
    return out


def grouped_gemm(
    a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, tiling: Tiling | None = None
) -> Tensor:
    """Return the rows of each expert times the transpose of its matrix, [M, N]; rows of no expert are zero.

    Args:
        a: [M, K] in ``TILE``, rows sorted by expert.
        b: [E, N, K] in ``BLOCK`` or ``TILE``.
        counts: [E] int64 or int32, rows of each expert; read on the device.
        dtype: ``float32`` or ``bfloat16``.
        tiling: None: chosen by shape.
    """
    (m, k), (experts, n, _) = a.data.shape, b.data.shape
    tiling = tiling or choose(-(-m // experts), n, k, experts, b.tile == BLOCK)
    out = torch.empty(m, n, dtype=dtype, device=a.data.device)
    num_tiles = m // tiling.block_m + experts + 1
    plan = torch.empty(3, num_tiles, dtype=torch.int32, device=a.data.device)
    start: Any = _plan_tiles[(-(-num_tiles // _PLANNED_TILES),)]
    with torch.cuda.device_of(a.data):
        start(
            counts,
            plan,
            m,
            experts,
            num_tiles,
            BLOCK_M=tiling.block_m,
            EXPERTS=triton.next_power_of_2(experts),
            TILES=_PLANNED_TILES,
        )
    _launch(_Product(a, b, out, m, n, k, plan, experts, num_tiles), tiling, "rows")
    return out


def masked_gemm(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, tiling: Tiling | None = None) -> Tensor:
    """Return the first ``counts[e]`` rows of each expert times the transpose of its matrix, [E, R, N]; zeros below.

    Args:
        a: [E, R, K] in ``TILE``.
        b: [E, N, K] in ``BLOCK`` or ``TILE``.
        counts: [E] int64 or int32; read on the device.
        dtype: ``float32`` or ``bfloat16``.
        tiling: None: chosen by shape.
    """
    (experts, rows, k), n = a.data.shape, b.data.shape[1]
    tiling = tiling or choose(rows, n, k, experts, b.tile == BLOCK)
    out = torch.empty(experts, rows, n, dtype=dtype, device=a.data.device)
    _launch(_Product(a, b, out, rows, n, k, counts, experts), tiling, "masked")
    return out


def grouped_wgrad(
    a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, tiling: Tiling | None = None
) -> Tensor:
    """Return ``a[:, of e] @ b[:, of e].T`` for each expert, [E, M, N].

    Args:
        a: [M, T] in ``TILE``; the columns of each expert begin at a multiple of 128.
        b: [N, T] in ``TILE``, likewise.
        counts: [E] int64 or int32, columns of each expert before they were filled up; read on the device.
        dtype: ``float32`` or ``bfloat16``.
        tiling: None: chosen by shape.
    """
    (m, k), n = a.data.shape, b.data.shape[0]
    experts = counts.numel()
    tiling = tiling or choose(m, n, k // experts, experts, b_in_blocks=False)
    out = torch.empty(experts, m, n, dtype=dtype, device=a.data.device)
    _launch(_Product(a, b, out, m, n, k, counts, experts), tiling, "contraction")
    return out


@dataclass(frozen=True)
class Tiles:
    """What the kernel knows when it is compiled.

    Attributes:
        mode: "dense"; "rows" sorted by expert; "masked" rows; the "contraction" cut by expert.
        b_in_blocks: 128 rows of ``b`` share a scale.
        experts: Their number, filled up to a power of two.
        block_m: As in :class:`Tiling`, and so on.
        block_n: Likewise.
        num_stages: Likewise.
        split: Likewise.
        group_m: Likewise.
    """

    mode: str
    b_in_blocks: bool
    experts: int
    block_m: int
    block_n: int
    num_stages: int
    split: int
    group_m: int


@dataclass(frozen=True)
class _Product:
    """Operands and sizes of a launch; ``groups`` is the plan or the counts, ``row_tiles`` those of the plan."""

    a: Quantized
    b: Quantized
    out: Tensor
    m: int
    n: int
    k: int
    groups: Tensor | None = None
    experts: int = 1
    row_tiles: int = 0


def _launch(product: _Product, tiling: Tiling, mode: str) -> None:
    out = product.out
    if not out.numel() or not product.k:
        out.zero_()
        return
    if tiling.split > 1 and mode != "dense":
        raise PrecisionError(f"{tiling} splits a product of several experts; take split 1")
    row_tiles = product.row_tiles or -(-product.m // tiling.block_m)
    num_tiles = row_tiles * -(-product.n // tiling.block_n)
    parts, groups = out, out if product.groups is None else product.groups
    if tiling.split > 1:
        parts = torch.empty(num_tiles, tiling.split, tiling.block_m, tiling.block_n, device=out.device)
        groups = _counters(num_tiles, out.device)
    together = product.experts if mode in ("masked", "contraction") else tiling.split
    # Dense scales, so that their strides follow from the sizes.
    a_scale, b_scale = (q.scale.to(torch.float32).contiguous() for q in (product.a, product.b))
    tiles = _tiles(tiling, mode, product.b.tile == BLOCK, product.experts)
    a, b = _rows(product.a.data), _rows(product.b.data)
    start: Any
    if tiling.overlapped:
        overlap = _overlap(tiling, product.b)
        start = overlap.multiply[(num_tiles, together)]
        operands = (overlap.descriptor(a, tiling.block_m), overlap.descriptor(b, overlap.CHUNK), out, a_scale, b_scale)
        options = {"num_warps": tiling.num_warps}
    else:
        start = _multiply[(num_tiles, together)]
        operands = (_descriptor(a, tiling.block_m), _descriptor(b, tiling.block_n), out, a_scale, b_scale, parts)
        options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    with torch.cuda.device_of(out):
        start(*operands, groups, product.m, product.n, tiles, **options)


def _overlap(tiling: Tiling, b: Quantized) -> ModuleType:
    if b.tile != BLOCK or tiling.split > 1 or tiling.block_m != 128 or tiling.block_n not in OVERLAPPED:
        raise PrecisionError(f"{tiling} with b in tiles of {b.tile} cannot overlap; take BLOCK, 128 x 128, no split")
    from cofire.precision.triton import overlap

    return overlap


def _tiles(tiling: Tiling, mode: str, b_in_blocks: bool, experts: int) -> Tiles:
    width = 1 << max(experts - 1, 0).bit_length()
    sizes = (tiling.block_m, tiling.block_n, tiling.num_stages, tiling.split, tiling.group_m)
    # Only a contraction cut by expert looks at all of them at once.
    return Tiles(mode, b_in_blocks, width if mode == "contraction" else 1, *sizes)


def _rows(data: Tensor) -> Tensor:
    """Return a matrix whose rows TMA can step through: it is copied if they begin anywhere but at 16 bytes."""
    matrix = data.reshape(-1, data.shape[-1])
    step = matrix.stride(0)
    if matrix.stride(-1) != 1 or step % 16 or step < matrix.shape[1] or matrix.data_ptr() % 16:
        width = -(-matrix.shape[1] // 16) * 16
        filled = torch.zeros(matrix.shape[0], width, dtype=torch.uint8, device=matrix.device)
        filled[:, : matrix.shape[1]] = matrix.view(torch.uint8)
        matrix = filled.view(matrix.dtype)
    return matrix


def _descriptor(matrix: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, _TILE])


def _num_processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _counters(count: int, device: torch.device) -> Tensor:
    """Return zeros, one for each output tile; kernels leave them zero for the next one on the same stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    found = _arrived.get(key)
    if found is None or found.numel() < count:
        found = _arrived[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return found


@triton.jit(do_not_specialize=("m", "experts", "num_tiles"))
def _plan_tiles(counts, plan, m, experts, num_tiles, BLOCK_M: constexpr, EXPERTS: constexpr, TILES: constexpr):
    """Write the expert, the first row and the end of each tile of rows; -1 for rows of no expert."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.arange(0, EXPERTS)
    count = tl.maximum(tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32), 0)
    tiles = tl.cdiv(count, BLOCK_M)
    last_tile, last_row = tl.cumsum(tiles, 0), tl.cumsum(count, 0)
    index = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = expert[None, :] == index[:, None]
    first = tl.sum(tl.where(own, (last_row - count)[None, :], 0), 1)
    first += (tile - tl.sum(tl.where(own, (last_tile - tiles)[None, :], 0), 1)) * BLOCK_M
    end = tl.sum(tl.where(own, last_row[None, :], 0), 1)
    beyond = tile >= tl.sum(tiles, 0)
    first = tl.where(beyond, tl.sum(count, 0) + (tile - tl.sum(tiles, 0)) * BLOCK_M, first)
    end = tl.minimum(tl.where(beyond, m, end), m)
    mask = tile < num_tiles
    tl.store(plan + tile, tl.where(beyond, -1, index), mask=mask)
    tl.store(plan + num_tiles + tile, first, mask=mask)
    tl.store(plan + 2 * num_tiles + tile, end, mask=mask)


@triton.jit
def _in_bands(tile, row_tiles, column_tiles, GROUP_M: constexpr):
    """Return row and column of a tile, counted down bands of GROUP_M rows, so that neighbours share operands."""
    band = tile // (GROUP_M * column_tiles) * GROUP_M
    height = tl.minimum(row_tiles - band, GROUP_M)
    within = tile % (GROUP_M * column_tiles)
    return band + within % height, within // height


@triton.jit
def _place(groups, second, row_tile, m, blocks, row_tiles, TILES: constexpr):
    """Return the expert, the first row, where rows with values and all rows end, and the blocks of the contraction."""
    expert = 0
    row = row_tile * TILES.block_m
    valid = m
    end = m
    first = 0
    last = blocks
    if TILES.mode == "dense":
        share = tl.cdiv(blocks, TILES.split)
        first = second * share
        last = tl.minimum(first + share, blocks)
    elif TILES.mode == "rows":
        expert = tl.load(groups + row_tile)
        row = tl.load(groups + row_tiles + row_tile)
        end = tl.load(groups + 2 * row_tiles + row_tile)
        valid = end
        last = tl.where((row < end) & (expert >= 0), blocks, 0)
        expert = tl.maximum(expert, 0)
    elif TILES.mode == "masked":
        expert = second
        count = tl.minimum(tl.load(groups + expert).to(tl.int32), m)
        last = tl.where(row < count, blocks, 0)
        valid = expert * m + count
        end = expert * m + m
        row += expert * m
    else:
        expert = second
        index = tl.arange(0, TILES.experts)
        filled = tl.load(groups + index, mask=index < tl.num_programs(1), other=0).to(tl.int32)
        filled = tl.cdiv(tl.maximum(filled, 0), _BLOCK_K)
        first = tl.sum(tl.where(index < expert, filled, 0), 0)
        last = tl.minimum(first + tl.sum(tl.where(index == expert, filled, 0), 0), blocks)
    return expert, row, valid, end, first, last


@triton.jit
def _add_parts(total, tile, part, parts, arrived, TILES: constexpr):
    """Write a part; return the sum of all parts in order and whether this block is the last to arrive."""
    size: constexpr = TILES.block_m * TILES.block_n
    place = tl.arange(0, TILES.block_m)[:, None] * TILES.block_n + tl.arange(0, TILES.block_n)[None, :]
    at = parts + tile.to(tl.int64) * (TILES.split * size) + place
    tl.store(at + part * size, total)
    # All threads of the block have written before one of them says so.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == TILES.split - 1
    if is_last:
        total = tl.load(at, cache_modifier=".cg")
        # Their number from the grid: a loop of known length would be unrolled and take all registers.
        for other in range(1, tl.num_programs(1)):
            total += tl.load(at + other * size, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return total, is_last


@triton.jit(do_not_specialize=("m",))
def _multiply(a_desc, b_desc, out, a_scale, b_scale, parts, groups, m, n, TILES: constexpr):
    """Compute one tile of the output, or a part of the contraction of one.

    ``groups`` is the plan, the counts, or how many parts of each tile have arrived; rows of scales lie densely.
    """
    BLOCK_M: constexpr = TILES.block_m
    BLOCK_N: constexpr = TILES.block_n
    tile = tl.program_id(0)
    second = tl.program_id(1)
    column_tiles = tl.cdiv(n, BLOCK_N)
    row_tiles = tl.num_programs(0) // column_tiles
    blocks = tl.cdiv(a_desc.shape[1].to(tl.int32), _BLOCK_K)
    row_tile, column_tile = _in_bands(tile, row_tiles, column_tiles, TILES.group_m)  # pyright: ignore[reportGeneralTypeIssues]
    expert, row, valid, end, first, last = _place(groups, second, row_tile, m, blocks, row_tiles, TILES)
    rows = row + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    of_expert = 0 if TILES.mode == "contraction" else expert
    b_rows = tl.cdiv(n, _BLOCK_K) if TILES.b_in_blocks else n
    a_at = a_scale + rows * blocks
    b_at = b_scale + of_expert * b_rows * blocks
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(first, last, num_stages=TILES.num_stages):
        of_a = tl.load(a_at + block, mask=rows < valid, other=0.0)
        a = a_desc.load([row, block * _BLOCK_K])
        b = b_desc.load([of_expert * n + column, block * _BLOCK_K])
        # Each product has a fresh accumulator: the tensor cores' sum is promoted before the next block.
        if TILES.b_in_blocks:
            of_b = tl.load(b_at + column // _BLOCK_K * blocks + block)
            total += tl.dot(a, b.T) * (of_a * of_b)[:, None]
        else:
            of_b = tl.load(b_at + columns * blocks + block, mask=columns < n, other=0.0)
            total += tl.dot(a, b.T) * (of_a[:, None] * of_b[None, :])
    writes = True
    if TILES.split > 1:
        total, writes = _add_parts(total, tile, second, parts, groups, TILES)
    if TILES.mode == "masked":
        total = tl.where((rows < valid)[:, None], total, 0.0)
    to_out = expert * m if TILES.mode == "contraction" else 0
    at = out + (rows + to_out).to(tl.int64)[:, None] * n + columns[None, :]
    mask = ((rows < end) & writes)[:, None] & (columns < n)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


def variants() -> list[Variant]:
    """Return the kernels as they are started, for :mod:`cofire.precision.triton.compile`."""
    found = []
    for dtype, kind in (("fp32", "*fp32"), ("bf16", "*bf16")):
        for tiling in (LARGE, NARROW, SHORT, replace(NARROW, split=4), replace(SHORT, split=4)):
            found.append(_variant(f"dense {dtype}", kind, tiling, "dense", True))
        found.append(_variant(f"dense tiles {dtype}", kind, LARGE, "dense", False))
        for mode in ("rows", "masked"):
            found += [_variant(f"{mode} {dtype}", kind, tiling, mode, True) for tiling in (LARGE, NARROW, SHORT)]
    found.append(_variant("contraction fp32", "*fp32", LARGE, "contraction", False))
    found.append(_variant("contraction fp32", "*fp32", NARROW, "contraction", False))
    plan = {"counts": "*i64", "plan": "*i32", "m": "i32", "experts": "i32", "num_tiles": "i32"}
    sizes = {"BLOCK_M": 128, "EXPERTS": 256, "TILES": _PLANNED_TILES}
    found.append(Variant("gemm plan", _plan_tiles, plan, sizes, unaligned=("m", "experts", "num_tiles")))
    return found


def _variant(name: str, out: str, tiling: Tiling, mode: str, b_in_blocks: bool) -> Variant:
    operands = {
        "a_desc": f"tensordesc<fp8e4nv[{tiling.block_m},{_TILE}]>",
        "b_desc": f"tensordesc<fp8e4nv[{tiling.block_n},{_TILE}]>",
        "out": out,
        "a_scale": "*fp32",
        "b_scale": "*fp32",
        "groups": "*i64" if mode in ("masked", "contraction") else "*i32",
        "parts": "*fp32",
        "m": "i32",
        "n": "i32",
    }
    return Variant(
        f"gemm {name} {tiling.block_m} x {tiling.block_n} / {tiling.split}",
        _multiply,
        operands,
        {"TILES": _tiles(tiling, mode, b_in_blocks, 256)},
        {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        ("m",),
        ("QGMMA", "UTMALDG"),
    )
