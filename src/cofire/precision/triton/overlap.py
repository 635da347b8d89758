"""FP8 products whose promotion to FP32 runs while the tensor cores work on the next columns, for large matrices.

``gemm.py`` waits for each 128-wide block of the contraction before it promotes it, and the tensor cores stand still
meanwhile. Here, in Gluon, where waits are explicit, a tile's columns come in chunks of 64: while chunk j is multiplied,
chunk j - 1 is promoted. 128 x 256 is the largest tile whose sums and two chunks in flight fit into 255 registers. The
sums and their order are those of ``gemm.py`` (DeepSeek-V3 technical report, 3.3.2).

Left out: ``b`` in tiles of 1 x 128, split contractions, multicast between the blocks of a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cofire.precision.triton.compile import Variant
from cofire.precision.triton.gemm import Tiles

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = gl.constexpr

CHUNK = 64
_CHUNK = gl.constexpr(CHUNK)
_TILE = 128
_BLOCK_K = gl.constexpr(_TILE)
# How rows of 128 bytes lie in shared memory so that tensor cores read them without conflicts.
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def descriptor(matrix: Tensor, rows: int) -> TensorDescriptor:
    """Return what TMA reads [rows, 128] of a matrix by; its rows begin at multiples of 16 bytes."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, _TILE], LAYOUT)


@gluon.jit
def _in_bands(tile, row_tiles, column_tiles, GROUP_M: constexpr):
    band = tile // (GROUP_M * column_tiles) * GROUP_M
    height = gl.minimum(row_tiles - band, GROUP_M)
    within = tile % (GROUP_M * column_tiles)
    return band + within % height, within // height


@gluon.jit
def _place(groups, second, row_tile, m, blocks, row_tiles, TILES: constexpr):
    """Return the expert, the first row, where rows with values and all rows end, and how much is contracted."""
    expert = second * 0
    row = row_tile * TILES.block_m
    valid = m
    end = m
    if TILES.mode == "rows":
        expert = gl.load(groups + row_tile)
        row = gl.load(groups + row_tiles + row_tile)
        end = gl.load(groups + 2 * row_tiles + row_tile)
        valid = end
        blocks = gl.where((row < end) & (expert >= 0), blocks, 0)
        expert = gl.maximum(expert, 0)
    if TILES.mode == "masked":
        expert = second
        count = gl.minimum(gl.load(groups + expert).to(gl.int32), m)
        blocks = gl.where(row < count, blocks, 0)
        valid = expert * m + count
        end = expert * m + m
        row += expert * m
    return expert, row, valid, end, blocks


@gluon.jit
def _factors(a_at, b0_at, b1_at, b2_at, has_values, block):
    """Return the scales of a block: of rows, and of the first, the second and the third and fourth chunk."""
    of_a = gl.load(a_at + block, has_values, 0.0)
    return of_a, gl.load(b0_at + block), gl.load(b1_at + block), gl.load(b2_at + block)


@gluon.jit
def _fetch(a_desc, b_desc, a_slots, b_slots, filled, row, b_row, block, blocks, TILES: constexpr):
    """Have TMA fill a block's slot, if there is such a block."""
    CHUNKS: constexpr = TILES.block_n // _CHUNK
    slot = block % TILES.num_stages
    wanted = block < blocks
    bar = filled.index(slot)
    mbarrier.expect(bar, a_desc.block_type.nbytes + CHUNKS * b_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a_desc, [row, block * _BLOCK_K], bar, a_slots.index(slot), pred=wanted)
    for j in gl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        to = b_slots.index(slot * CHUNKS + j)
        tma.async_copy_global_to_shared(b_desc, [b_row + j * _CHUNK, block * _BLOCK_K], bar, to, pred=wanted)


@gluon.jit
def _start(a, b_slots, place, registers):
    """Have the tensor cores multiply a chunk into the registers of a value that is not needed any more."""
    return warpgroup_mma(a, b_slots.index(place).permute((1, 0)), registers, use_acc=False, is_async=True)


@gluon.jit
def _promote(total, flying, factor, OUTSTANDING: constexpr):
    """Wait until only so many chunks are in flight; return the sums with the one before, and its registers."""
    done = warpgroup_mma_wait(OUTSTANDING, deps=(flying,))
    total += done * gl.expand_dims(factor, 1)
    # Waits for nothing more, but keeps these sums before the next chunk, which then takes no registers of its own.
    return warpgroup_mma_wait(OUTSTANDING, deps=(total,)), done


@gluon.jit
def _write(out, total, row, column, valid, end, n, TILES: constexpr, num_warps: constexpr):
    """Write a chunk in runs of 8 columns; a thread of the tensor cores' layout has 2."""
    wide: constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    total = gl.convert_layout(total.to(out.dtype.element_ty), wide)
    rows = row + gl.arange(0, TILES.block_m, layout=gl.SliceLayout(1, wide))
    columns = column + gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, wide))
    if TILES.mode == "masked":
        total = gl.where(gl.expand_dims(rows < valid, 1), total, 0.0)
    at = out + gl.expand_dims(rows.to(gl.int64) * n, 1) + gl.expand_dims(columns, 0)
    gl.store(at, total, mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < n, 0))


@gluon.jit(do_not_specialize=("m",))
def multiply(a_desc, b_desc, out, a_scale, b_scale, groups, m, n, TILES: constexpr, num_warps: constexpr):
    """Compute one tile of the output, 128, 192 or 256 columns; arguments as for ``gemm.py``'s kernel."""
    BLOCK_M: constexpr = TILES.block_m
    CHUNKS: constexpr = TILES.block_n // _CHUNK
    STAGES: constexpr = TILES.num_stages
    CHUNK_N: constexpr = _CHUNK
    cores: constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, CHUNK_N, 32])
    a_slots = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, _BLOCK_K], a_desc.layout)
    b_slots = gl.allocate_shared_memory(b_desc.dtype, [STAGES * CHUNKS, _CHUNK, _BLOCK_K], b_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        mbarrier.init(filled.index(i), count=1)
    column_tiles = gl.cdiv(n, TILES.block_n)
    row_tiles = gl.num_programs(0) // column_tiles
    all_blocks = gl.cdiv(a_desc.shape[1].to(gl.int32), _BLOCK_K)
    row_tile, column_tile = _in_bands(gl.program_id(0), row_tiles, column_tiles, TILES.group_m)
    expert, row, valid, end, blocks = _place(groups, gl.program_id(1), row_tile, m, all_blocks, row_tiles, TILES)
    column = column_tile * TILES.block_n
    b_first = expert * n + column
    for i in gl.static_range(STAGES - 1):
        _fetch(a_desc, b_desc, a_slots, b_slots, filled, row, b_first, i, blocks, TILES)

    rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, cores))
    a_at = a_scale + rows * all_blocks
    # Chunks of a tile of 192 columns begin in one block of scales and end in the next.
    column_blocks = gl.cdiv(n, _BLOCK_K)
    b_at = b_scale + expert * column_blocks * all_blocks
    b0_at = b_at + column // _BLOCK_K * all_blocks
    b1_at = b_at + gl.minimum((column + _CHUNK) // _BLOCK_K, column_blocks - 1) * all_blocks
    b2_at = b_at + gl.minimum((column + 2 * _CHUNK) // _BLOCK_K, column_blocks - 1) * all_blocks
    next_a, next_b0, next_b1, next_b2 = _factors(a_at, b0_at, b1_at, b2_at, rows < valid, 0)
    zeros = gl.zeros([BLOCK_M, _CHUNK], gl.float32, cores)
    total0, total1, total2, total3, even, odd = zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(blocks):
        of_a, of_b0, of_b1, of_b2 = next_a, next_b0, next_b1, next_b2
        after = gl.minimum(block + 1, blocks - 1)
        next_a, next_b0, next_b1, next_b2 = _factors(a_at, b0_at, b1_at, b2_at, rows < valid, after)
        slot = block % STAGES
        mbarrier.wait(filled.index(slot), block // STAGES & 1)
        a = a_slots.index(slot)
        chunk0 = _start(a, b_slots, slot * CHUNKS, even)
        chunk1 = _start(a, b_slots, slot * CHUNKS + 1, odd)
        # All have waited for the last chunk of the block before, so its slot is free; two chunks hide the barriers.
        _fetch(a_desc, b_desc, a_slots, b_slots, filled, row, b_first, block + STAGES - 1, blocks, TILES)
        total0, even = _promote(total0, chunk0, of_a * of_b0, 1)
        if CHUNKS == 2:
            total1, odd = _promote(total1, chunk1, of_a * of_b0, 0)
        elif CHUNKS == 3:
            chunk2 = _start(a, b_slots, slot * CHUNKS + 2, even)
            total1, odd = _promote(total1, chunk1, of_a * of_b1, 1)
            total2, even = _promote(total2, chunk2, of_a * of_b2, 0)
        else:
            chunk2 = _start(a, b_slots, slot * CHUNKS + 2, even)
            total1, odd = _promote(total1, chunk1, of_a * of_b0, 1)
            chunk3 = _start(a, b_slots, slot * CHUNKS + 3, odd)
            total2, even = _promote(total2, chunk2, of_a * of_b2, 1)
            total3, odd = _promote(total3, chunk3, of_a * of_b2, 0)
    totals = (total0, total1, total2, total3)
    for j in gl.static_range(CHUNKS):
        _write(out, totals[j], row, column + j * _CHUNK, valid, end, n, TILES, num_warps)


def variants() -> list[Variant]:
    """Return the kernels as they are started; Gluon's, so not for ``compile.py``'s list of Triton's."""
    found = []
    for mode in ("dense", "rows", "masked"):
        for out in ("fp32", "bf16"):
            for columns in (2 * CHUNK, 3 * CHUNK, 4 * CHUNK):
                tiles = Tiles(mode, True, 1, 128, columns, 4, 1, 8)
                operands = {
                    "a_desc": f"tensordesc<fp8e4nv[128,{_TILE}],{LAYOUT!r}>",
                    "b_desc": f"tensordesc<fp8e4nv[{CHUNK},{_TILE}],{LAYOUT!r}>",
                    "out": f"*{out}",
                    "a_scale": "*fp32",
                    "b_scale": "*fp32",
                    "groups": "*i32" if mode == "rows" else "*i64",
                }
                found.append(
                    Variant(
                        f"gemm overlapped {mode} {out} 128 x {columns}",
                        multiply,
                        operands | {"m": "i32", "n": "i32"},
                        {"TILES": tiles, "num_warps": 8},
                        {"num_warps": 8},
                        ("m",),
                        ("QGMMA", "UTMALDG"),
                    )
                )
    return found
