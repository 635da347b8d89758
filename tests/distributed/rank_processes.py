"""Ranks as real processes around an HFReduce engine, for the tests of this folder."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from cofire.collectives.hfreduce import HFReduce
from cofire.collectives.options import HFReduceOptions
from cofire.errors import CollectiveError
from cofire.testing.fake_device import FakeDevice

# A server that has imported PyTorch once forks the ranks, so that hundreds of them start in seconds.
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(["torch", "cofire.collectives.hfreduce"])


def whole_numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return -1, 0 and 1, so that a sum of a few ranks is exact in every type."""
    return torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(count * 64 + rank)).to(dtype)


@dataclass(frozen=True)
class World:
    """Where the ranks run: the host of each rank, and how long they wait for each other."""

    hosts: Sequence[str]
    timeout_s: float = 30.0
    chunk_bytes: int | None = None
    num_threads: int | None = None
    num_slots: int | None = None
    fake_device: bool = False


def _work(function: Callable[..., Any], world: World, rank: int, port: int, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        size = len(world.hosts)
        store = TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=60))
        options = HFReduceOptions(
            host=world.hosts[rank],
            chunk_bytes=world.chunk_bytes,
            num_threads=world.num_threads,
            num_slots=world.num_slots,
        )

        def connect(name: str) -> HFReduce:
            device = FakeDevice(rank) if world.fake_device else None
            return HFReduce(PrefixStore(name, store), rank, size, world.timeout_s, options, device)

        results.put((rank, function(connect, rank, *args), None))
    except BaseException as error:
        results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    results.close()
    results.join_thread()
    os._exit(0)  # threads that wait for dead peers must not hold the process


def start_ranks(function: Callable[..., Any], world: World, *args: Any) -> tuple[TCPStore, list[Any], Any]:
    """Start the ranks; return the store, which must outlive them, the processes and the queue of their results."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    results = _RANKS.Queue()
    ranks = [
        _RANKS.Process(target=_work, args=(function, world, rank, store.port, results, args), daemon=True)
        for rank in range(len(world.hosts))
    ]
    for process in ranks:
        process.start()
    return store, ranks, results


def gather(ranks: list[Any], results: Any, expected: Sequence[int], within_s: float = 120.0) -> dict[int, Any]:
    """Return what the expected ranks returned, or the text of what they raised; kill all ranks."""
    got: dict[int, Any] = {}
    end = time.monotonic() + within_s
    try:
        while not set(expected) <= got.keys():
            try:
                rank, value, error = results.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"ranks {sorted(set(expected) - got.keys())} hang") from None
            got[rank] = value if error is None else error
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
    return got


def run_ranks(function: Callable[..., Any], world: World, *args: Any) -> list[Any]:
    """Run ``function(connect, rank, *args)`` on every rank and return what each returned.

    ``connect(name)`` makes an engine with the other ranks that say the same name.

    Raises:
        AssertionError: A rank raised; with its traceback.
    """
    store, ranks, results = start_ranks(function, world, *args)
    got = gather(ranks, results, range(len(world.hosts)))
    del store
    for rank, value in got.items():
        assert not (isinstance(value, str) and "Traceback" in value), f"rank {rank}: {value}"
    return [got[rank] for rank in range(len(world.hosts))]


def work_until_it_fails(connect: Callable[[str], HFReduce], rank: int, seed: int) -> tuple[str, bool]:
    """Reduce for ever; return how it ended, and whether a sum that was reported as done was wrong."""
    engine = connect("engine")
    order, right = random.Random(seed), 0
    while True:
        count = order.choice([1, 1000, 40_000, 700_000])
        x = torch.full((count,), float(rank + right % 7))
        expected = float(sum(range(engine.world_size)) + engine.world_size * (right % 7))
        try:
            engine.all_reduce(x)
        except CollectiveError as error:
            return str(error), False
        if not bool((x == expected).all()):
            return "wrong", True
        right += 1
