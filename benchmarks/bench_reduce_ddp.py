"""DDP's training step of a preset with hfreduce and with gloo, and without any reduction, taking turns step by step.

Each rank has two copies of the model, one a backend; "none" is gloo's copy under ``no_sync``. A time is that of the
slowest rank. What a backend costs is its step less "none": what DDP's overlap with the backward pass does not hide. CPU
seconds are those of all ranks.

    .venv/bin/python benchmarks/bench_reduce_ddp.py
    .venv/bin/python benchmarks/bench_reduce_ddp.py --model tiny --sequence 256 --repeats 20
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import statistics
import time
from typing import Any

SIDES = ("hfreduce", "gloo", "none")


def work(rank: int, options: argparse.Namespace, port: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from cofire.model import build
    from cofire.model.memory import keep_freed_memory
    from cofire.spec import ModelSpec, load_as

    class Loss(torch.nn.Module):
        def __init__(self, decoder: Any) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens: Any) -> Any:
            return self.decoder.loss(tokens).loss

    keep_freed_memory()
    torch.set_num_threads(options.threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks)
    spec = load_as(ModelSpec, options.model)
    ranks = list(range(options.ranks))
    wrappers = {
        name: DistributedDataParallel(
            Loss(build(spec, seed=0).train()), process_group=dist.new_group(ranks, backend=name)
        )
        for name in SIDES[:2]
    }
    optimizers = {
        name: torch.optim.AdamW(wrapper.parameters(), fused=True, lr=1e-5) for name, wrapper in wrappers.items()
    }
    torch.manual_seed(rank)

    def step(side: str) -> tuple[float, float]:
        tokens = torch.randint(0, spec.vocab_size, (options.batch, options.sequence + 1))
        name = "gloo" if side == "none" else side
        wrapper, optimizer = wrappers[name], optimizers[name]
        dist.barrier()
        cpu_s, began_s = time.process_time(), time.perf_counter()
        with wrapper.no_sync() if side == "none" else contextlib.nullcontext():
            wrapper(tokens).backward()
        optimizer.step()
        took = torch.tensor([time.perf_counter() - began_s])
        cpu = torch.tensor([time.process_time() - cpu_s])
        optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
        return float(took), float(cpu)

    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(options.repeats + 2):
        for side in SIDES[number % 3 :] + SIDES[: number % 3]:
            sample = step(side)
            if number >= 2:  # DDP orders its buckets anew after its first step
                found[side].append(sample)
    if rank == 0:
        report(found, sum(p.numel() for p in wrappers["gloo"].parameters()), options)
    dist.destroy_process_group()


def report(found: dict[str, list[tuple[float, float]]], num_parameters: int, options: argparse.Namespace) -> None:
    base = statistics.median(took for took, _ in found["none"])
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {options.model}, {num_parameters:,} fp32 gradients, "
        f"{options.ranks} ranks of {options.threads} thread, {options.batch} x {options.sequence} tokens a rank, "
        f"{options.repeats} steps, measured\n\n"
        "| reduction | step s, median (quartiles) | more than without, s | CPU s |\n|---|---|---|---|"
    )
    for side, samples in found.items():
        low, median, high = statistics.quantiles((took for took, _ in samples), n=4)
        cpu = statistics.median(cpu for _, cpu in samples)
        print(f"| {side} | {median:.3f} ({low:.3f} to {high:.3f}) | {median - base:+.3f} | {cpu:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(work, (options, port), options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
