"""HFReduce among the ranks of one node: right sums, agreement, repeatability, and failures that everybody hears of."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import World, gather, run_ranks, start_ranks, work_until_it_fails

from cofire.collectives.elements import Op, element_of
from cofire.collectives.hfreduce import HFReduce
from cofire.collectives.options import HFReduceOptions
from cofire.collectives.shm import SHARED_FOLDER, new_segment_path
from cofire.errors import CollectiveError

CHUNK = 4096
DISAGREEMENTS = ("size", "type", "operation", "order", "root")
Connect = Callable[[str], HFReduce]
KILLS = int(os.environ.get("COFIRE_KILL_RUNS", "3"))
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int32,
    torch.int64,
]


def node(num_ranks: int, **settings) -> World:
    return World(hosts=["here"] * num_ranks, **settings)


def data(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return whole numbers of a few bits, so that a sum of a few ranks is exact in every type."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randint(-1, 2, (count,), generator=generator).to(dtype)


def total(num_ranks: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return sum((data(rank, count, dtype, seed).double() for rank in range(num_ranks)), torch.zeros(count).double())


def every_kind(connect: Connect, rank: int) -> int:
    engine = connect("all")
    size, checked = engine.world_size, 0
    for dtype in DTYPES:
        per_chunk = CHUNK // dtype.itemsize
        for count in (0, 1, per_chunk - 1, per_chunk, per_chunk + 1, 4 * per_chunk, 20011):
            seed, expected = count, total(size, count, dtype, count)
            x = data(rank, count, dtype, seed)
            engine.all_reduce(x)
            assert torch.equal(x.double(), expected), (dtype, count, "all_reduce")
            root = count % size
            x = data(rank, count, dtype, seed)
            engine.reduce(x, root)
            assert torch.equal(x.double(), expected if rank == root else data(rank, count, dtype, seed).double())
            x = data(rank, count, dtype, seed)
            engine.broadcast(x, root)
            assert torch.equal(x.double(), data(root, count, dtype, seed).double()), (dtype, count, "broadcast")
            rows, row = data(rank, count * size, dtype, seed), torch.empty(count, dtype=dtype)
            engine.reduce_scatter(row, rows)
            wide = total(size, count * size, dtype, seed).view(size, count)
            assert torch.equal(row.double(), wide[rank]), (dtype, count, "reduce_scatter")
            gathered = torch.empty(count * size, dtype=dtype)
            engine.all_gather(gathered, data(rank, count, dtype, seed))
            together = torch.cat([data(other, count, dtype, seed) for other in range(size)])
            assert torch.equal(gathered.double(), together.double()), (dtype, count, "all_gather")
            engine.barrier()
            checked += 1
    return checked


@pytest.mark.parametrize(("num_ranks", "num_threads"), [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_every_collective_of_every_type_is_exact_at_sizes_around_the_chunk(num_ranks: int, num_threads: int) -> None:
    world = node(num_ranks, chunk_bytes=CHUNK, num_threads=num_threads)
    assert run_ranks(every_kind, world) == [len(DTYPES) * 7] * num_ranks


def noisy(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank * 3)


def sums_with_delays(connect: Connect, rank: int, seed: int) -> list[bytes]:
    engine = connect("delays")
    order, out = random.Random(seed * 10 + rank), []
    for dtype in (torch.float32, torch.bfloat16):
        x = noisy(rank, 30011).to(dtype)
        time.sleep(order.random() * 0.02)
        engine.all_reduce(x, Op.AVERAGE)
        out.append(x.view(torch.uint8).numpy().tobytes())
    return out


def test_ranks_and_runs_agree_bit_by_bit_whoever_comes_first() -> None:
    runs = [run_ranks(sums_with_delays, node(3, chunk_bytes=CHUNK), seed) for seed in (1, 2)]
    assert runs[0][0] == runs[0][1] == runs[0][2] == runs[1][0] == runs[1][1] == runs[1][2]
    # fp32 accumulation in the order of the ranks, and one rounding, done by hand.
    for dtype, got in zip((torch.float32, torch.bfloat16), runs[0][0], strict=True):
        parts = [noisy(rank, 30011).to(dtype).float() for rank in range(3)]
        expected = ((parts[0] + parts[1] + parts[2]) / 3).to(dtype)
        assert got == expected.view(torch.uint8).numpy().tobytes()


def disagree(connect: Connect, rank: int) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    for what in DISAGREEMENTS:
        engine = connect(what)
        x = torch.ones(5000)
        for _ in range(2):
            try:
                if what == "size":
                    engine.all_reduce(x[: 5000 - (rank == 1)].clone())
                elif what == "type":
                    engine.all_reduce(x.to(torch.bfloat16 if rank == 1 else torch.float32))
                elif what == "operation":
                    engine.all_reduce(x, Op.MAX if rank == 1 else Op.SUM)
                elif what == "order":
                    engine.broadcast(x, 0) if rank == 1 else engine.all_reduce(x)
                else:
                    engine.broadcast(x, rank % 2)
            except CollectiveError as error:
                said.setdefault(what, []).append(str(error))
    return said


def test_what_ranks_disagree_about_is_raised_on_all_of_them() -> None:
    said = run_ranks(disagree, node(3))
    assert said[0] == said[1] == said[2]
    assert set(said[0]) == set(DISAGREEMENTS)
    for first, second in said[0].values():
        assert first.startswith("ranks disagree: rank 0 calls ")
        assert "rank 1 calls " in first
        assert second.startswith("this group failed before: ranks disagree")


def come_late(connect: Connect, rank: int) -> tuple[str, float]:
    engine = connect("late")
    engine.barrier()
    began = time.monotonic()
    if rank == 2:
        time.sleep(4)
    try:
        engine.all_reduce(torch.ones(100_000))
    except CollectiveError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


def test_a_rank_that_does_not_come_within_the_timeout_raises_on_all() -> None:
    said = run_ranks(come_late, node(3, timeout_s=1.0))
    for text, after_s in said[:2]:
        assert text.startswith("rank 2 has not come in time in all_reduce of 100000 f32")
        assert after_s < 3.5
    assert "rank 2 has not come" in said[2][0]


@pytest.mark.parametrize("seed", range(KILLS))
def test_survivors_of_a_killed_rank_raise_and_report_no_partial_sum(seed: int) -> None:
    order = random.Random(seed)
    num_ranks = order.choice([2, 3, 4])
    victim = order.randrange(num_ranks)
    store, ranks, results = start_ranks(work_until_it_fails, node(num_ranks, timeout_s=20.0, chunk_bytes=65536), seed)
    while not all(store.check([f"engine/host/{rank}"]) for rank in range(num_ranks)):
        time.sleep(0.05)
    time.sleep(order.random() * 0.8)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    survivors = [rank for rank in range(num_ranks) if rank != victim]
    got = gather(ranks, results, survivors, within_s=40)
    assert time.monotonic() - killed < 30
    for rank in survivors:
        text, wrong = got[rank] if not isinstance(got[rank], str) else (got[rank], False)
        assert not wrong
        assert f"rank {victim}" in text or "not all" in text, text


def test_a_segment_leaves_no_name_and_a_dead_creators_name_is_swept() -> None:
    run_ranks(come_late, node(1))
    mine = new_segment_path()
    dead = SHARED_FOLDER / mine.name.replace(f"-{os.getpid()}-", "-999999999-")
    dead.write_bytes(b"left")
    new_segment_path()
    assert not dead.exists()
    own = [path for path in Path("/dev/shm").glob("cofire-*") if f"-{os.getpid()}-" in path.name]
    assert own == []


def large(connect: Connect, rank: int) -> list[float]:
    engine = connect("large")
    count = 2**31 + 12345
    x = torch.empty(count, dtype=torch.float8_e5m2)
    x.view(torch.uint8).zero_()
    places = [0, 1, 2**31 - 1, 2**31, count - 1]
    for place in places:
        x.view(torch.uint8)[place] = int(torch.tensor(float(rank + 1)).to(torch.float8_e5m2).view(torch.uint8))
    engine.all_reduce(x)
    rest = x.view(torch.uint8)
    assert int((rest[: 2**20] != 0).sum()) == 2
    assert int((rest[-(2**20) :] != 0).sum()) == 3
    return [float(x[place : place + 1].float()) for place in places]


@pytest.mark.slow
def test_more_bytes_than_an_int_holds_are_summed_at_the_right_places() -> None:
    assert run_ranks(large, node(2, timeout_s=120.0)) == [[3.0] * 5] * 2


def test_options_come_from_the_environment_and_wrong_ones_are_named() -> None:
    options = HFReduceOptions.from_environment({"COFIRE_HFREDUCE_CHUNK_BYTES": "65536", "COFIRE_HOST": "a"})
    assert (options.chunk_bytes, options.host) == (65536, "a")
    with pytest.raises(CollectiveError, match=r"COFIRE_HFREDUCE_NUM_THREADS = '0': .*greater than or equal to 1"):
        HFReduceOptions.from_environment({"COFIRE_HFREDUCE_NUM_THREADS": "0"})
    with pytest.raises(CollectiveError, match=r"torch.complex64 has no reduction kernel; take one of float32, "):
        element_of(torch.complex64)
