"""The training step of a preset in FP32, BF16 and FP8, and what quantising costs beside a copy; one process, in turns.

The step is forward, backward and AdamW over batch x sequence tokens. FP8 is emulated on a CPU: its products run in FP32
on operands that were rounded to FP8, so its step can be faster than BF16's where BF16 itself is emulated. The bound of
quantising is a copy of the same bytes: it reads FP32 and writes a quarter, with one scale for 128 values.

    .venv/bin/python benchmarks/bench_precision.py
    .venv/bin/python benchmarks/bench_precision.py --recipes  # The kernels alone.
    .venv/bin/python benchmarks/bench_precision.py --model tiny --sequence 128 --repeats 9
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from cofire.model import build
from cofire.model.fp8 import use_fp8
from cofire.model.memory import keep_freed_memory
from cofire.precision.quantize import BLOCK, COLUMN_TILE, TENSOR, TILE, TileShape, quantize, round_values
from cofire.spec import ModelSpec, load_as
from cofire.train.metrics import choose_recipe

RECIPES = ("fp32", "fp8", "bf16")


def steps(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    spec = load_as(ModelSpec, options.model)
    tokens = torch.randint(0, spec.vocab_size, (options.batch, options.sequence + 1))
    found: dict[str, Callable[[], None]] = {}
    rest = choose_recipe(torch.device("cpu"))
    print(f"beside FP8 products: {rest}, which multiplies faster here")
    for recipe in options.recipes:
        decoder = build(spec, seed=0).train()
        if recipe == "fp8":
            use_fp8(decoder)
        optimizer = torch.optim.AdamW(decoder.parameters(), fused=True, lr=1e-5)

        def step(beside: str = rest if recipe == "fp8" else recipe, decoder=decoder, optimizer=optimizer) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=beside == "bf16"):
                loss = decoder.loss(tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        found[recipe] = step
    return found


def kernels(options: argparse.Namespace) -> dict[str, tuple[Callable[[int], object], float]]:
    """Return what is timed on the buffer of an index, and the bytes that it has to move."""
    inputs = [torch.randn(options.rows, options.columns) for _ in range(options.buffers)]
    targets = [torch.empty_like(x) for x in inputs]
    size = inputs[0].nbytes
    found: dict[str, tuple[Callable[[int], object], float]] = {
        "copy": (lambda i: targets[i].copy_(inputs[i]), 2.0 * size)
    }
    tiles: dict[str, TileShape] = {"1 x 128": TILE, "128 x 1": COLUMN_TILE, "128 x 128": BLOCK}
    for name, tile in tiles.items():
        kept = [quantize(x, tile) for x in inputs]
        found[f"quantize {name}"] = (lambda i, tile=tile: quantize(inputs[i], tile), 1.25 * size)
        found[f"round to {name}"] = (lambda i, tile=tile: round_values(inputs[i], tile), 2.0 * size)
        found[f"dequantize {name}"] = (lambda i, kept=kept: kept[i].dequantize(), 1.25 * size)
    found["quantize 1 x 128, ue8m0"] = (lambda i: quantize(inputs[i], scale_format="ue8m0"), 1.25 * size)
    found["quantize 1 x 128, e5m2"] = (lambda i: quantize(inputs[i], TILE, torch.float8_e5m2), 1.25 * size)
    found["quantize tensor"] = (lambda i: quantize(inputs[i], TENSOR), 1.25 * size)
    return found


def print_kernels(options: argparse.Namespace) -> None:
    """Time every kernel on every buffer in turns, and count each at its fastest: others may use the machine."""
    calls = kernels(options)
    fastest = {name: [float("inf")] * options.buffers for name in calls}
    for _ in range(options.kernel_repeats):
        for name, (call, _) in calls.items():
            for i in range(options.buffers):
                began = time.perf_counter()
                call(i)
                fastest[name][i] = min(fastest[name][i], time.perf_counter() - began)
    seconds = {name: sum(times) / options.buffers for name, times in fastest.items()}
    copy_rate = calls["copy"][1] / seconds["copy"]
    numbers = options.rows * options.columns
    print(
        f"{options.buffers} x {options.rows} x {options.columns} FP32, measured, minima of {options.kernel_repeats}\n"
    )
    print("| kernel | ns per number | GB/s | of the copy |\n|---|---|---|---|")
    for name, (_, size) in calls.items():
        rate = size / seconds[name]
        print(f"| {name} | {seconds[name] / numbers * 1e9:.3f} | {rate / 1e9:.1f} | {rate / copy_rate:.0%} |")


def sample(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2048, help="of each matrix that is quantised")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--buffers", type=int, default=8, help="matrices in turn, so that none is in a cache")
    parser.add_argument("--kernel-repeats", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5, help="of the step")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    options = parser.parse_args()
    keep_freed_memory()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print_kernels(options)
    if not options.recipes:
        return
    found = sample(steps(options), options.repeats)
    print(
        f"\n{options.model}, {options.batch} x {options.sequence} tokens, measured\n\n| recipe | step s (quartiles) |",
        end="",
    )
    print(" of FP32 | of BF16 |\n|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios = " | ".join(
            f"{medians[name] / medians[base]:.2f}" if base in medians else "-" for base in ("fp32", "bf16")
        )
        print(f"| {name} | {medians[name]:.3f} ({low:.3f} to {high:.3f}) | {ratios} |")


if __name__ == "__main__":
    main()
