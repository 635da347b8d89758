"""HFReduce over several nodes of one or more ranks each: sums, agreement between nodes, and deaths."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch
from rank_processes import World, gather, run_ranks, start_ranks, whole_numbers, work_until_it_fails

from cofire.collectives.elements import Op
from cofire.collectives.hfreduce import HFReduce
from cofire.errors import CollectiveError

Connect = Callable[[str], HFReduce]
CHUNK = 4096
KILLS = int(os.environ.get("COFIRE_KILL_RUNS", "3"))


def every_kind(connect: Connect, rank: int) -> list[bytes]:
    engine = connect("all")
    size = engine.world_size
    assert not engine.supports("reduce_scatter")
    assert engine.supports("reduce", torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        per_chunk = CHUNK // dtype.itemsize
        for count in (0, 1, per_chunk - 1, per_chunk + 1, 70_001):
            expected = sum(
                (whole_numbers(other, count, dtype).double() for other in range(size)), torch.zeros(count).double()
            )
            x = whole_numbers(rank, count, dtype)
            engine.all_reduce(x)
            assert torch.equal(x.double(), expected), (dtype, count)
            root = count % size
            x = whole_numbers(rank, count, dtype)
            engine.reduce(x, root)
            assert torch.equal(x.double(), expected if rank == root else whole_numbers(rank, count, dtype).double())
            engine.broadcast(x, root)
            assert torch.equal(x.double(), expected), (dtype, count)
    engine.barrier()
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(50_021, generator=torch.Generator().manual_seed(rank)) * 10.0**rank).to(dtype)
        time.sleep(random.random() * 0.05)
        engine.all_reduce(x, Op.AVERAGE)
        out.append(x.view(torch.uint8).numpy().tobytes())
    return out


@pytest.mark.parametrize("hosts", ["ab", "aabb", "abbc", "abaca"])
def test_sums_over_nodes_are_exact_and_the_same_bits_on_all_ranks(hosts: str) -> None:
    got = run_ranks(every_kind, World(list(hosts), chunk_bytes=CHUNK))
    assert all(other == got[0] for other in got)
    # fp32: near the sum in double precision.
    parts = [
        torch.randn(50_021, generator=torch.Generator().manual_seed(rank)).double() * 10.0**rank
        for rank in range(len(hosts))
    ]
    mean = torch.stack(parts).sum(0) / len(hosts)
    ours = torch.frombuffer(bytearray(got[0][0]), dtype=torch.float32).double()
    assert ((ours - mean).abs() <= len(hosts) * 2.0**-24 * torch.stack(parts).abs().sum(0)).all()


def test_two_runs_over_nodes_agree_bit_by_bit() -> None:
    runs = [run_ranks(every_kind, World(list("aab"), chunk_bytes=CHUNK))[0] for _ in range(2)]
    assert runs[0] == runs[1]


def disagree(connect: Connect, rank: int) -> list[str]:
    said = []
    for what in ("size", "type", "operation"):
        engine = connect(what)
        x = torch.ones(5000 - (what == "size" and rank == 2))
        try:
            dtype = torch.bfloat16 if what == "type" and rank == 2 else torch.float32
            engine.all_reduce(x.to(dtype), Op.MAX if what == "operation" and rank == 2 else Op.SUM)
        except CollectiveError as error:
            said.append(str(error))
    return said


def test_nodes_that_disagree_raise_on_every_rank() -> None:
    for said in run_ranks(disagree, World(list("aabc"), timeout_s=15.0)):
        assert len(said) == 3
        assert all("disagree" in text for text in said), said


@pytest.mark.parametrize("seed", range(KILLS))
def test_all_survivors_on_all_nodes_raise_when_a_rank_is_killed(seed: int) -> None:
    order = random.Random(seed)
    hosts = order.choice(["aab", "abc", "aabb"])
    victim = order.randrange(len(hosts))
    world = World(list(hosts), timeout_s=20.0, chunk_bytes=65536)
    store, ranks, results = start_ranks(work_until_it_fails, world, seed)
    while not all(store.check([f"engine/host/{rank}"]) for rank in range(len(hosts))):
        time.sleep(0.05)
    time.sleep(0.5 + order.random())
    os.kill(ranks[victim].pid, signal.SIGKILL)
    got = gather(ranks, results, [rank for rank in range(len(hosts)) if rank != victim], within_s=45)
    for value in got.values():
        text, wrong = value if not isinstance(value, str) else (value, False)
        assert not wrong
        assert text
