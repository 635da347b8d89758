"""The training step of a preset in FP32, BF16 and FP8, and what quantising costs beside a copy; one process, in turns.

The step is forward, backward and AdamW over batch x sequence tokens. FP8 is emulated on a CPU: its products run in FP32
on operands that were rounded to FP8, so its step can be faster than BF16's where BF16 itself is emulated. The bound of
quantising is a copy of the same bytes: it reads FP32 and writes a quarter, with one scale for 128 values.

    .venv/bin/python benchmarks/bench_precision.py
    .venv/bin/python benchmarks/bench_precision.py --model tiny --sequence 128 --repeats 9
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from cofire.model import build
from cofire.model.fp8 import use_fp8
from cofire.model.memory import keep_freed_memory
from cofire.precision.quantize import BLOCK, COLUMN_TILE, TENSOR, TILE, quantize, round_values
from cofire.spec import ModelSpec, load_as

RECIPES = ("fp32", "fp8", "bf16")


def steps(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    spec = load_as(ModelSpec, options.model)
    tokens = torch.randint(0, spec.vocab_size, (options.batch, options.sequence + 1))
    found: dict[str, Callable[[], None]] = {}
    for recipe in options.recipes:
        decoder = build(spec, seed=0).train()
        if recipe == "fp8":
            use_fp8(decoder)
        optimizer = torch.optim.AdamW(decoder.parameters(), fused=True, lr=1e-5)

        def step(recipe: str = recipe, decoder=decoder, optimizer=optimizer) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe == "bf16"):
                loss = decoder.loss(tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        found[recipe] = step
    return found


def kernels(options: argparse.Namespace) -> dict[str, tuple[Callable[[], object], float]]:
    """Return what is timed, and the bytes that it has to move; every call works on all buffers, one after the other."""
    inputs = [torch.randn(options.rows, options.columns) for _ in range(options.buffers)]
    targets = [torch.empty_like(x) for x in inputs]
    kept = [quantize(x) for x in inputs]
    size = sum(x.nbytes for x in inputs)

    def on_all(call: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [call(x) and None for x in inputs]

    def copy() -> None:
        for target, x in zip(targets, inputs, strict=True):
            target.copy_(x)

    found: dict[str, tuple[Callable[[], object], float]] = {"copy": (copy, 2.0 * size)}
    for name, tile in (("1 x 128", TILE), ("128 x 1", COLUMN_TILE), ("128 x 128", BLOCK), ("tensor", TENSOR)):
        found[f"quantize {name}"] = (on_all(lambda x, tile=tile: quantize(x, tile).data.nbytes), 1.25 * size)
    found["quantize 1 x 128, ue8m0"] = (on_all(lambda x: quantize(x, scale_format="ue8m0").data.nbytes), 1.25 * size)
    found["round to 1 x 128"] = (on_all(lambda x: round_values(x).nbytes), 2.0 * size)
    found["dequantize 1 x 128"] = (lambda: [q.dequantize().nbytes for q in kept], 1.25 * size)
    return found


def sample(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    options = parser.parse_args()
    keep_freed_memory()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    moved = kernels(options)
    times = sample({name: call for name, (call, _) in moved.items()}, options.repeats)
    copy_rate = moved["copy"][1] / statistics.median(times["copy"])
    print(f"{options.buffers} x {options.rows} x {options.columns} FP32, measured\n")
    print("| kernel | ms | GB/s | of the copy |\n|---|---|---|---|")
    for name, (_, size) in moved.items():
        median = statistics.median(times[name])
        print(f"| {name} | {median * 1e3:.1f} | {size / median / 1e9:.1f} | {size / median / copy_rate:.0%} |")
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
