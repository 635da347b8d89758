"""Sums of tensors on a device that is not the CPU: a fake one everywhere, CUDA where there is a GPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from rank_processes import World, gather, run_ranks, start_ranks, whole_numbers

from cofire.collectives.elements import Op
from cofire.collectives.hfreduce import HFReduce
from cofire.errors import CollectiveError
from cofire.testing.fake_device import FakeDevice

CHUNK = 4096
Connect = Callable[[str], HFReduce]


def fake_of(engine: HFReduce) -> FakeDevice:
    device = engine._device
    assert isinstance(device, FakeDevice)
    return device


def sums(connect: Connect, rank: int) -> tuple[list[bytes], int]:
    engine = connect("all")
    fake, size = fake_of(engine), engine.world_size
    said = []
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        per_chunk = CHUNK // dtype.itemsize
        for count in (0, 1, per_chunk - 1, per_chunk, per_chunk + 1, 3 * per_chunk, 30_011):
            expected = sum(
                (whole_numbers(other, count, dtype).double() for other in range(size)), torch.zeros(count).double()
            )
            x = fake.put(whole_numbers(rank, count, dtype))
            assert engine.reaches(x)
            engine.all_reduce(x)
            assert torch.equal(x.double(), expected), (dtype, count)
            on_cpu = whole_numbers(rank, count, dtype)
            engine.all_reduce(on_cpu)  # takes turns with the other kind in the same memory
            assert torch.equal(on_cpu.double(), expected), (dtype, count)
            root = count % size
            y = fake.put(whole_numbers(rank, count, dtype))
            engine.reduce(y, root)
            assert torch.equal(y.double(), expected if rank == root else whole_numbers(rank, count, dtype).double())
            said.append(x.view(torch.uint8).numpy().tobytes())
    noise = torch.randn(50_021, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
    from_device, from_memory = fake.put(noise), noise.clone()
    engine.all_reduce(from_device, Op.AVERAGE)
    engine.all_reduce(from_memory, Op.AVERAGE)
    assert torch.equal(from_device, from_memory), "the same bits, wherever the data lay"
    assert not fake.errors, fake.errors[:3]
    engine.close()
    assert not fake.errors, fake.errors[:3]
    return said, fake.overlaps


@pytest.mark.parametrize("num_slots", [3, 4, 8])
@pytest.mark.parametrize("hosts", ["aa", "aaa"])
def test_sums_from_a_device_are_those_of_memory_and_copies_overlap(hosts: str, num_slots: int) -> None:
    world = World(list(hosts), chunk_bytes=CHUNK, num_slots=num_slots, fake_device=True)
    got = run_ranks(sums, world)
    assert all(said == got[0][0] for said, _ in got)
    assert all(overlaps > 50 for _, overlaps in got), [overlaps for _, overlaps in got]


@pytest.mark.parametrize("hosts", ["ab", "aab", "aabb"])
def test_sums_from_a_device_pass_through_several_nodes(hosts: str) -> None:
    got = run_ranks(sums, World(list(hosts), chunk_bytes=CHUNK, fake_device=True))
    assert all(said == got[0][0] for said, _ in got)
    assert any(overlaps > 0 for _, overlaps in got)


def one_in_memory(connect: Connect, rank: int) -> str:
    engine = connect("mixed")
    x = torch.ones(5000)
    try:
        engine.all_reduce(x if rank == 1 else fake_of(engine).put(x))
    except CollectiveError as error:
        return str(error)
    return "no error"


def test_a_rank_with_its_data_in_memory_raises_on_all_ranks() -> None:
    for said in run_ranks(one_in_memory, World(["a"] * 3, timeout_s=20.0, fake_device=True)):
        assert "ranks disagree" in said
        assert "on a device" in said


def reduce_for_ever(connect: Connect, rank: int) -> tuple[str, bool]:
    engine = connect("engine")
    fake = fake_of(engine)
    while True:
        x = fake.put(torch.full((40_000,), float(rank)))
        try:
            engine.all_reduce(x)
        except CollectiveError as error:
            return str(error), bool(fake.errors)
        if not bool((x == sum(range(engine.world_size))).all()):
            return "wrong", True


@pytest.mark.parametrize("hosts", ["aaa", "aab"])
def test_survivors_raise_when_a_rank_with_a_device_is_killed(hosts: str) -> None:
    world = World(list(hosts), timeout_s=20.0, chunk_bytes=CHUNK, fake_device=True)
    store, ranks, results = start_ranks(reduce_for_ever, world)
    while not all(store.check([f"engine/host/{rank}"]) for rank in range(3)):
        time.sleep(0.05)
    time.sleep(0.7)
    os.kill(ranks[1].pid, signal.SIGKILL)
    for value in gather(ranks, results, [0, 2], within_s=60).values():
        text, wrong = value if not isinstance(value, str) else (value, True)
        assert not wrong, text


def on_cuda(connect: Connect, rank: int) -> None:
    engine = connect("cuda")
    size = engine.world_size
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 1 << 18, (1 << 18) + 1, 5_000_011):
            expected = sum(
                (whole_numbers(other, count, dtype).double() for other in range(size)), torch.zeros(count).double()
            )
            x = whole_numbers(rank, count, dtype).cuda()
            torch.cuda.synchronize()
            engine.all_reduce(x)
            assert torch.equal(x.cpu().double(), expected), (dtype, count)
            y = whole_numbers(rank, count, dtype).cuda()
            torch.cuda.synchronize()
            engine.reduce(y, 1)
            assert torch.equal(y.cpu().double(), expected if rank == 1 else whole_numbers(rank, count, dtype).double())
    engine.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hosts", ["aa", "ab", "aab"])
def test_sums_of_cuda_tensors_are_right(hosts: str) -> None:
    run_ranks(on_cuda, World(list(hosts)))
