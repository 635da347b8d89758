"""Run the product kernels in Triton's interpreter on operands whose products and sums are exact; no test by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.precision.quantize import BLOCK, TILE, Quantized, TileShape, scale_shape
from cofire.precision.triton import gemm
from cofire.precision.triton.gemm import Tiling

SMALL = Tiling(64, 64, 4, 3)
TILINGS = (SMALL, Tiling(128, 128, 8, 4), Tiling(64, 64, 4, 3, split=2), Tiling(64, 128, 4, 3, split=3, group_m=2))


def draw(*shape: int, tile: TileShape = TILE, scales: torch.dtype = torch.float32) -> Quantized:
    data = torch.randint(-8, 9, shape).float().to(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-2, 3, scale_shape(data.shape, tile))
    return Quantized(data, scale.to(scales), tile)


def exact(q: Quantized) -> Tensor:
    return q.dequantize().double()


def check(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.double(), expected), (found - expected).abs().max()


def dense() -> None:
    for m, n, k in ((1, 64, 128), (70, 130, 384), (130, 200, 1000), (3, 5, 7)):
        a = draw(m, k, scales=torch.float8_e8m0fnu)
        for b in (draw(n, k, tile=BLOCK), draw(n, k)):
            for tiling in TILINGS:
                check(gemm.scaled_gemm(a, b, torch.float32, tiling), exact(a) @ exact(b).T)
    weight, grad = draw(130, 70, tile=BLOCK), draw(20, 130)
    turned = Quantized(weight.data.mT, weight.scale.mT, BLOCK)
    check(gemm.scaled_gemm(grad, turned, torch.float32, SMALL), exact(grad) @ exact(weight))


def rows() -> None:
    counts = torch.tensor([5, 0, 130, 1])
    for b in (draw(4, 130, 200, tile=BLOCK), draw(4, 130, 200)):
        # Rows of no expert, and fewer rows than the counts say.
        for total in (150, 100):
            a, first = draw(total, 200), 0
            expected = torch.zeros(total, 130, dtype=torch.float64)
            for e, count in enumerate(counts.tolist()):
                part = slice(first, min(first + count, total))
                expected[part] = exact(a)[part] @ exact(b)[e].T
                first += count
            check(gemm.grouped_gemm(a, b, counts, torch.float32, SMALL), expected)


def masked() -> None:
    counts = torch.tensor([70, 0, 3, 65], dtype=torch.int32)
    a = draw(4, 70, 200)
    for b in (draw(4, 130, 200, tile=BLOCK), draw(4, 130, 200)):
        expected = torch.zeros(4, 70, 130, dtype=torch.float64)
        for e, count in enumerate(counts.tolist()):
            expected[e, :count] = exact(a)[e, :count] @ exact(b)[e].T
        check(gemm.masked_gemm(a, b, counts, torch.float32, SMALL), expected)


def contraction() -> None:
    counts = torch.tensor([5, 0, 130, 128, 1])
    filled = (-(-counts // 128) * 128).tolist()
    a, b, first = draw(130, sum(filled)), draw(70, sum(filled)), 0
    found = gemm.grouped_wgrad(a, b, counts, torch.float32, SMALL)
    for e, size in enumerate(filled):
        check(found[e], exact(a)[:, first : first + size] @ exact(b)[:, first : first + size].T)
        first += size


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (dense, rows, masked, contraction):
        part()
        print(part.__name__)
