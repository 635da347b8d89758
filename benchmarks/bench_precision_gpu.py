"""What quantising and LogFMT cost on a GPU beside a copy of as many bytes; CUDA events, buffers in turn.

The bound of each kernel is a copy from device to device, bytes read and written. A sample is one pass over all buffers,
which together exceed the L2 cache, divided by their number; results stay alive until the next pass, so that each call
writes elsewhere. The host runs ahead: the GPU sleeps until a whole sample is queued. Figures are medians with
quartiles.

    python benchmarks/bench_precision_gpu.py
    python benchmarks/bench_precision_gpu.py --json precision_gpu.json --sweep
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from cofire.precision.quantize import BLOCK, COLUMN_TILE, TILE
from cofire.precision.triton import logfmt, quantize

SHAPES = ((8192, 7168), (4096, 2048))
# Long enough for the host to queue one pass.
SLEEP_CYCLES = 4_000_000


def measure(call: Callable[[int], Any], buffers: int, repeats: int) -> list[float]:
    """Return seconds of one call, one figure for each of ``repeats`` passes over the buffers."""
    kept: list[Any] = [call(index) for index in range(buffers)]
    events = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        for index in range(buffers):
            kept[index] = call(index)
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 / buffers for begin, end in events]


def kernels(
    inputs: list[torch.Tensor],
) -> dict[str, tuple[Callable[[int], Any], float]]:
    """Return what is timed and the bytes that each call reads and writes."""
    n = inputs[0].numel()
    targets = [torch.empty_like(x) for x in inputs]
    rows = [quantize.quantize(x) for x in inputs]
    tens, eights = ([logfmt.encode_unchecked(x, bits) for x in inputs] for bits in (10, 8))
    # Bytes of a number and of its share of an FP32 scale.
    read, tile = 2.0, 4 / 128
    found: dict[str, tuple[Callable[[int], Any], float]] = {
        "copy": (lambda i: targets[i].copy_(inputs[i]) is None, 2 * read),
        "torch cast to E4M3": (lambda i: inputs[i].to(torch.float8_e4m3fn), read + 1),
    }
    for name, shape, share in (
        ("1 x 128", TILE, tile),
        ("128 x 1", COLUMN_TILE, tile),
        ("128 x 128", BLOCK, tile / 128),
    ):
        for scale_format, width in (("fp32", 1.0), ("ue8m0", 0.25)):
            found[f"quantize {name} {scale_format}"] = (
                lambda i, shape=shape, scale_format=scale_format: quantize.quantize(
                    inputs[i], shape, scale_format=scale_format
                ),
                read + 1 + share * width,
            )
    for scale_format, width in (("fp32", 1.0), ("ue8m0", 0.25)):
        found[f"quantize transposed {scale_format}"] = (
            lambda i, scale_format=scale_format: quantize.quantize_transposed(inputs[i], scale_format=scale_format),
            read + 1 + tile * width,
        )
        found[f"quantize both {scale_format}"] = (
            lambda i, scale_format=scale_format: quantize.quantize_both(inputs[i], scale_format=scale_format),
            read + 2 + 2 * tile * width,
        )
    found["requantize transposed fp32"] = (lambda i: quantize.requantize_transposed(rows[i]), 2 + 2 * tile)
    found["dequantize 1 x 128 to BF16"] = (lambda i: quantize.dequantize(rows[i], torch.bfloat16), 1 + tile + 2)
    found["dequantize 1 x 128 to FP32"] = (lambda i: quantize.dequantize(rows[i]), 1 + tile + 4)
    for bits, coded in ((8, eights), (10, tens)):
        packed = bits / 8 + 2 * tile
        found[f"LogFMT-{bits} encode"] = (lambda i, bits=bits: logfmt.encode_unchecked(inputs[i], bits), read + packed)
        found[f"LogFMT-{bits} decode"] = (lambda i, coded=coded: logfmt.decode(coded[i], torch.bfloat16), packed + 2)
        found[f"LogFMT-{bits} round trip"] = (lambda i, bits=bits: logfmt.round_trip(inputs[i], bits), 2 * read)
    return {name: (call, size * n) for name, (call, size) in found.items()}


def bench(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    # FP8 codes alone, which are half of the input, exceed the cache twice.
    buffers = max(2, -(-2 * cache // (shape[0] * shape[1])))
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(buffers)]
    rows: list[dict[str, Any]] = []
    for name, (call, size) in kernels(inputs).items():
        times = measure(call, buffers, repeats)
        low, median, high = statistics.quantiles(times, n=4)
        rows.append(
            {
                "kernel": name,
                "shape": list(shape),
                "buffers": buffers,
                "samples": len(times),
                "median_s": median,
                "quartile_low_s": low,
                "quartile_high_s": high,
                "bytes": size,
                "bytes_per_s": size / median,
                "share_of_copy": size / median / (rows[0]["bytes_per_s"] if rows else size / median),
            }
        )
    return rows


def sweep(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Return the median of the kernels that a number of warps decides, by that number."""
    buffers = 3
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(buffers)]
    calls = {
        "rows": lambda i: quantize.quantize(inputs[i]),
        "columns": lambda i: quantize.quantize_transposed(inputs[i]),
        "blocks": lambda i: quantize.quantize(inputs[i], BLOCK),
        "both": lambda i: quantize.quantize_both(inputs[i]),
        "encode": lambda i: logfmt.encode_unchecked(inputs[i], 10),
        "round_trip": lambda i: logfmt.round_trip(inputs[i], 8),
    }
    found = []
    for name, call in calls.items():
        table = logfmt.WARPS if name in logfmt.WARPS else quantize.WARPS
        usual = table[name]
        for warps in (2, 4, 8):
            table[name] = warps
            found.append(
                {"kernel": name, "warps": warps, "median_s": statistics.median(measure(call, buffers, repeats))}
            )
        table[name] = usual
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31, help="passes over the buffers, of which each is a sample")
    parser.add_argument("--sweep", action="store_true", help="also other numbers of warps")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    device = torch.cuda.get_device_name(0)
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, measured")
    rows = []
    for shape in SHAPES:
        measured = bench(shape, options.repeats)
        print(f"\n{shape[0]} x {shape[1]} BF16, {measured[0]['buffers']} buffers, {options.repeats} samples\n")
        print("| kernel | us (quartiles) | GB/s | of the copy |\n|---|---|---|---|")
        for row in measured:
            low, median, high = (row[key] * 1e6 for key in ("quartile_low_s", "median_s", "quartile_high_s"))
            rate, share = row["bytes_per_s"] / 1e9, row["share_of_copy"]
            print(f"| {row['kernel']} | {median:.1f} ({low:.1f} to {high:.1f}) | {rate:.0f} | {share:.0%} |")
        rows += measured
    swept = sweep(SHAPES[0], options.repeats) if options.sweep else []
    if swept:
        print("\n| kernel | warps | us |\n|---|---|---|")
        for row in swept:
            print(f"| {row['kernel']} | {row['warps']} | {row['median_s'] * 1e6:.1f} |")
    if options.json:
        versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({**versions, "rows": rows, "sweep": swept}, indent=1))


if __name__ == "__main__":
    main()
