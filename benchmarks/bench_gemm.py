"""FP8 products of DeepSeek-V3's shapes on a Hopper GPU: our kernels, cuBLAS with the same scales and without, and BF16.

m = 128 and 4096 by the seven (n, k) of DeepGEMM's public test list; then experts: rows sorted by expert, and a fixed
number of rows for each. Each call is timed by events while the host runs ahead (a kernel that only waits fills the
queue first), on operands in turn that together exceed the L2 cache; medians. Scales are laid out as each library wants
them beforehand. The floor of m = 128 is its bytes over the bandwidth of a copy.

    python benchmarks/bench_gemm.py [--quick] [--json FILE]
    python benchmarks/bench_gemm.py --candidates   # every tiling on every shape, to choose from
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.precision import gemm as interface
from cofire.precision.quantize import BLOCK, TILE, Quantized, scale_shape

SHAPES = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
ROWS = (128, 4096)
# Gate and up projection, and down projection, of an expert (2048 wide).
EXPERT_SHAPES = [(4096, 7168), (7168, 2048)]
EXPERTS = [(8, 1024), (32, 128)]
L2_BYTES = 50 << 20
WARMUPS = 3
CALLS = 24
# Cycles for which the device waits: longer than the host takes to enqueue all calls.
HEAD_START = 25_000_000


@dataclass
class Report:
    """What was measured, and what could not be.

    Attributes:
        machine: Device and versions.
        rows: One dict for each line of a table.
        failures: Why a column is empty.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def time(self, name: str, calls: list[Callable[[], object]]) -> float | None:
        """Return the median seconds of calls in turn, or None and why."""
        try:
            return seconds(calls)
        except Exception as error:
            self.failures.setdefault(name, str(error).strip().splitlines()[0][:160])
            return None


def seconds(calls: list[Callable[[], object]]) -> float:
    for number in range(WARMUPS + len(calls)):
        calls[number % len(calls)]()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    torch.cuda._sleep(HEAD_START)
    events[0].record()
    for number, event in enumerate(events[1:]):
        calls[number % len(calls)]()
        event.record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    return statistics.median(times) * 1e-3


def fp8(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def quantized(*shape: int, tile=TILE) -> Quantized:
    return Quantized(fp8(*shape), torch.rand(scale_shape(shape, tile), device="cuda") + 0.5, tile)


def copies(nbytes: int) -> int:
    return max(1, min(8, -(-3 * L2_BYTES // max(nbytes, 1))))


def peaks(report: Report, size: int) -> None:
    """Measure a copy, and the best products of one size."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    took = seconds([lambda: target.copy_(source)])
    report.machine["copy_bytes_per_s"] = 2 * source.nbytes / took
    a, b, one = fp8(size, size), fp8(size, size), torch.ones(1, device="cuda")
    flops = 2.0 * size**3
    report.machine["fp8_flops_per_s"] = max(
        flops / (report.time(f"peak, fast accumulation {fast}", [lambda fast=fast: tensorwise(a, b, one, fast)]) or 1e9)
        for fast in (True, False)
    )
    x, y = a.bfloat16(), b.bfloat16()
    report.machine["bf16_flops_per_s"] = flops / seconds([lambda: F.linear(x, y)])


def tensorwise(a: Tensor, b: Tensor, one: Tensor, fast: bool = True) -> Tensor:
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def rowwise(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def cublas_blockwise(a: Quantized, b: Quantized) -> Callable[[], Tensor]:
    """Return a call of cuBLAS with the scales of both, laid out beforehand."""
    blocks = a.scale.shape[1]
    a_scale = interface._laid_out(a.scale, a.data.shape[0], blocks)
    b_scale = interface._laid_out(b.scale.mT, -(-blocks // 4) * 4, b.scale.shape[0])
    kinds = F.ScalingType
    right = b.data.t()
    return lambda: F.scaled_mm(a.data, right, a_scale, kinds.BlockWise1x128, b_scale, kinds.BlockWise128x128)


def dense(report: Report, m: int, n: int, k: int) -> dict[str, Any]:
    from cofire.precision.triton import gemm

    number = copies(m * k + n * k)
    pairs = [(quantized(m, k), quantized(n, k, tile=BLOCK)) for _ in range(number)]
    one = torch.ones(1, device="cuda")
    of_rows, of_columns = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
    tilings = {"ours": None, "large": gemm.LARGE, **overlapped()}
    took: dict[str, float | None] = {}
    for name, tiling in tilings.items():
        took[name] = report.time(
            name, [lambda a=a, b=b, t=tiling: gemm.scaled_gemm(a, b, torch.bfloat16, t) for a, b in pairs]
        )
    took["cuBLAS blockwise"] = report.time("cuBLAS blockwise", attempt(lambda: [cublas_blockwise(*p) for p in pairs]))
    took["cuBLAS rowwise"] = report.time(
        "cuBLAS rowwise", [lambda a=a, b=b: rowwise(a.data, b.data, of_rows, of_columns) for a, b in pairs]
    )
    took["cuBLAS tensorwise"] = report.time(
        "cuBLAS tensorwise", [lambda a=a, b=b: tensorwise(a.data, b.data, one) for a, b in pairs]
    )
    plain = [(a.data.bfloat16(), b.data.bfloat16()) for a, b in pairs[: max(1, number // 2)]]
    took["BF16"] = report.time("BF16", [lambda x=x, y=y: F.linear(x, y) for x, y in plain])
    nbytes = pairs[0][0].num_bytes + pairs[0][1].num_bytes + 2 * m * n
    floor = nbytes / report.machine["copy_bytes_per_s"]
    row = {"kind": "dense", "m": m, "n": n, "k": k, "flops": 2.0 * m * n * k, "floor_s": floor, "seconds": took}
    row["tiling"] = str(gemm.choose(m, n, k, num_processors=report.machine["processors"]))
    return row


def overlapped() -> dict[str, Any]:
    from cofire.precision.triton import gemm

    return {f"overlapped {columns}": tiling for columns, tiling in gemm.OVERLAPPED.items()}


def attempt(make: Callable[[], list[Callable[[], object]]]) -> list[Callable[[], object]]:
    """Return calls, or one that raises what making them raised."""
    try:
        return make()
    except Exception as error:
        reason = error

    def fail() -> None:
        raise reason

    return [fail]


def experts(report: Report, number: int, mean: int, n: int, k: int) -> list[dict[str, Any]]:
    from cofire.precision.triton import gemm

    generator = torch.Generator().manual_seed(number)
    counts = (mean * (0.7 + 0.6 * torch.rand(number, generator=generator))).long() // 16 * 16
    on_device = counts.cuda()
    offsets = on_device.cumsum(0).to(torch.int32)
    total = int(counts.sum())
    a, b = quantized(total, k), quantized(number, n, k, tile=BLOCK)
    x, y = a.data.bfloat16(), b.data.bfloat16()
    grouped_mm: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    took: dict[str, float | None] = {}
    tilings = {"ours": None, "large": gemm.LARGE, **overlapped()}
    for name, tiling in tilings.items():
        took[name] = report.time(
            f"rows, {name}", [lambda t=tiling: gemm.grouped_gemm(a, b, on_device, torch.bfloat16, t)]
        )

    def one_by_one() -> list[Callable[[], object]]:
        each = []
        for e, rows in interface._spans(counts.tolist()):
            each.append(cublas_blockwise(interface._rows(a, rows), interface._expert(b, e)))
        return [lambda: [call() for call in each]]

    took["cuBLAS blockwise, one by one"] = report.time("experts one by one", attempt(one_by_one))
    took["BF16 grouped"] = report.time("BF16 grouped", [lambda: grouped_mm(x, y.transpose(1, 2), offs=offsets)])
    common = {"experts": number, "n": n, "k": k, "flops": 2.0 * total * n * k, "m": total}
    found = [{"kind": "rows", "seconds": took, **common}]
    room = int(counts.max()) // 128 * 128 + 128
    c = quantized(number, room, k)
    took = {
        name: report.time(f"masked, {name}", [lambda t=tiling: gemm.masked_gemm(c, b, on_device, torch.bfloat16, t)])
        for name, tiling in tilings.items()
    }
    found.append({"kind": "masked", "seconds": took, **common})
    filled = int((-(-counts // 128) * 128).sum())
    dy, inputs = quantized(n, filled), quantized(k, filled)
    took = {
        name: report.time(
            f"weight gradient, {name}", [lambda t=tiling: gemm.grouped_wgrad(dy, inputs, on_device, torch.float32, t)]
        )
        for name, tiling in (("ours", None), ("large", gemm.LARGE))
    }
    grad = torch.randn(total, n, device="cuda", dtype=torch.bfloat16)
    took["BF16 grouped"] = report.time("BF16 gradient", [lambda: grouped_mm(grad.t(), x, offs=offsets)])
    found.append({"kind": "contraction", "seconds": took, **common})
    return found


def candidates(report: Report, shapes: list[tuple[int, int]]) -> None:
    """Time every tiling on every shape."""
    from cofire.precision.triton.gemm import Tiling

    large = [
        Tiling(128, 128, 8, 4),
        Tiling(128, 128, 8, 3),
        Tiling(128, 128, 8, 6),
        Tiling(64, 128, 4, 3),
        Tiling(128, 64, 4, 3),
        Tiling(128, 128, 8, 4, group_m=16),
        *overlapped().values(),
        Tiling(128, 128, 8, 6, overlapped=True),
        Tiling(128, 192, 8, 5, overlapped=True),
        Tiling(128, 256, 8, 3, overlapped=True),
        Tiling(128, 256, 8, 4, group_m=16, overlapped=True),
        Tiling(128, 256, 8, 4, group_m=4, overlapped=True),
    ]
    small = [
        Tiling(rows, columns, warps, stages, split)
        for rows, columns, warps, stages in ((128, 64, 4, 4), (128, 64, 4, 6), (128, 128, 8, 4), (64, 128, 4, 4))
        for split in (1, 2, 4, 8)
    ]
    print(
        "| m | n | k | TFLOP/s by tiling, best first: rows x columns / warps, stages, split, group |\n|---|---|---|---|"
    )
    for m in ROWS:
        for n, k in shapes:
            found = []
            for tiling in small if m <= 128 else large:
                took = tiling_seconds(report, m, n, k, tiling)
                if took is not None:
                    found.append((2e-12 * m * n * k / took, tiling))
            found.sort(key=lambda pair: -pair[0])
            best = ", ".join(f"{rate:.0f} ({label(tiling)})" for rate, tiling in found[:6])
            print(f"| {m} | {n} | {k} | {best} |", flush=True)
            report.rows.append({"kind": "candidates", "m": m, "n": n, "k": k, "best": best})


def tiling_seconds(report: Report, m: int, n: int, k: int, tiling: Any) -> float | None:
    from cofire.precision.triton import gemm

    if tiling.split > 1 and tiling.split * 4 > k // 128:
        return None
    pairs = [(quantized(m, k), quantized(n, k, tile=BLOCK)) for _ in range(copies(m * k + n * k))]
    return report.time(
        label(tiling), [lambda a=a, b=b: gemm.scaled_gemm(a, b, torch.bfloat16, tiling) for a, b in pairs]
    )


def label(tiling: Any) -> str:
    kind = " overlapped" if tiling.overlapped else ""
    sizes = f"{tiling.block_m} x {tiling.block_n} / {tiling.num_warps}, {tiling.num_stages}, {tiling.split}"
    return f"{sizes}, {tiling.group_m}{kind}"


def cell(flops: float, took: float | None) -> str:
    return "-" if took is None else f"{flops / took * 1e-12:.0f}"


def best_of_ours(took: dict[str, float | None]) -> float | None:
    return min(
        (value for name, value in took.items() if value and "cuBLAS" not in name and "BF16" not in name), default=None
    )


def print_dense(report: Report) -> None:
    rows = [row for row in report.rows if row["kind"] == "dense"]
    columns = list(rows[0]["seconds"])
    heads = " | ".join(columns)
    print(f"\nTFLOP/s, measured\n\n| m | n | k | {heads} | best of ours: of FP8 peak | of BF16 | us | floor us |")
    print("|---" * (len(columns) + 7) + "|")
    for row in rows:
        took = row["seconds"]
        ours = best_of_ours(took)
        cells = " | ".join(cell(row["flops"], took[name]) for name in columns)
        peak = "-" if ours is None else f"{row['flops'] / ours / report.machine['fp8_flops_per_s']:.0%}"
        bf16 = "-" if ours is None or not took["BF16"] else f"{took['BF16'] / ours:.2f}"
        micro = "-" if ours is None else f"{ours * 1e6:.1f}"
        floor = f"{row['floor_s'] * 1e6:.1f}"
        print(f"| {row['m']} | {row['n']} | {row['k']} | {cells} | {peak} | {bf16} | {micro} | {floor} |")


def print_experts(report: Report) -> None:
    for kind, title in (
        ("rows", "Rows sorted by expert"),
        ("masked", "A fixed number of rows for each expert"),
        ("contraction", "Weight gradients"),
    ):
        rows = [row for row in report.rows if row["kind"] == kind]
        if not rows:
            continue
        columns = list(rows[0]["seconds"])
        print(f"\n{title}, TFLOP/s, measured\n\n| experts | rows | n | k | {' | '.join(columns)} |")
        print("|---" * (len(columns) + 4) + "|")
        for row in rows:
            cells = " | ".join(cell(row["flops"], row["seconds"][name]) for name in columns)
            print(f"| {row['experts']} | {row['m']} | {row['n']} | {row['k']} | {cells} |")


def machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "calls": CALLS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes and eight experts")
    parser.add_argument("--candidates", action="store_true", help="every tiling instead of the comparison")
    parser.add_argument("--json", help="where to write all numbers")
    options = parser.parse_args()
    reason = interface.available("triton", "cuda")
    if reason is not None:
        sys.exit(f"bench_gemm: {reason}")
    began = time.perf_counter()
    torch.manual_seed(0)
    report = Report(machine())
    shapes = SHAPES[-2:] if options.quick else SHAPES
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()), flush=True)
    peaks(report, 8192)
    rates = report.machine
    print(
        f"FP8 {rates['fp8_flops_per_s'] * 1e-12:.0f} and BF16 {rates['bf16_flops_per_s'] * 1e-12:.0f} TFLOP/s at 8192, "
        f"a copy {rates['copy_bytes_per_s'] * 1e-12:.2f} TB/s",
        flush=True,
    )
    if options.candidates:
        candidates(report, shapes)
    else:
        report.rows += [dense(report, m, n, k) for m in ROWS for n, k in shapes]
        print_dense(report)
        for number, mean in EXPERTS[:1] if options.quick else EXPERTS:
            for n, k in EXPERT_SHAPES:
                report.rows += experts(report, number, mean, n, k)
                torch.cuda.empty_cache()
        print_experts(report)
    for name, why in report.failures.items():
        print(f"\n{name}: {why}")
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": report.machine, "rows": report.rows, "failures": report.failures}, file, indent=1)


if __name__ == "__main__":
    main()
