"""The backend ``hfreduce`` between real processes: each collective against sums in fp64, gloo, or the rule itself.

Starting processes costs more than what they check, so one start of N ranks runs many checks.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DeviceMesh, Partial, Replicate, Shard, distribute_tensor

from cofire.collectives import backend
from cofire.collectives.backend import HFReduceGroup
from cofire.collectives.options import HFReduceOptions
from cofire.collectives.work import OperationQueue
from cofire.errors import CollectiveError

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (torch.int32, torch.int64)
# One rounding of a sum that was made in at least fp32.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-12,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
    torch.float8_e4m3fn: 2**-3,
    torch.float8_e5m2: 2**-2,
}
SIZES = (0, 1, 5, 1031, 70_001)
OPS = {
    dist.ReduceOp.SUM: lambda rows: rows.sum(0),
    dist.ReduceOp.AVG: lambda rows: rows.mean(0),
    dist.ReduceOp.PRODUCT: lambda rows: rows.prod(0),
    dist.ReduceOp.MIN: lambda rows: rows.amin(0),
    dist.ReduceOp.MAX: lambda rows: rows.amax(0),
}


def start_ranks(function, world_size, *arguments):
    """Run ``function(rank, world_size, *arguments)`` in processes of a server that has imported PyTorch once."""
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "cofire.collectives.backend", "hypothesis"])
    mp.start_processes(function, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


def values(rank, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        return torch.randint(-50, 50, (size,), generator=generator).to(dtype)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def rows_of(ranks, size, dtype, seed=0):
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    return torch.stack([values(rank, size, dtype, seed).to(wide) for rank in ranks])


def assert_near(found, reference, dtype):
    if not dtype.is_floating_point:
        assert torch.equal(found, reference.to(dtype))
        return
    rounded = reference.to(dtype).double()
    # Numbers of opposite signs lose digits of fp32, or fp64, in which they are added.
    rtol, atol = TOLERANCE[dtype], 1e-12 if dtype == torch.float64 else 2e-6
    if "hops" in os.environ.get("COFIRE_HOST", ""):
        # A node's sum is rounded before the sum of the nodes is, and may be larger than that.
        rtol, atol = 2 * rtol, 8 * rtol
    torch.testing.assert_close(found.double(), rounded, rtol=rtol, atol=atol)


def everyone():
    return range(dist.get_world_size())


def check_all_reduce_of_each_type_and_operation():
    for dtype in (*FLOATS, *WHOLE):
        for op, reference in OPS.items():
            if op == dist.ReduceOp.AVG and not dtype.is_floating_point:
                continue
            for seed, size in enumerate(SIZES):
                found = values(dist.get_rank(), size, dtype, seed)
                dist.all_reduce(found, op)
                if size:
                    assert_near(found, reference(rows_of(everyone(), size, dtype, seed)), dtype)


def check_bitwise_all_reduce():
    for dtype in WHOLE:
        rows = rows_of(everyone(), 777, dtype)
        for op, fold in ((dist.ReduceOp.BAND, torch.bitwise_and), (dist.ReduceOp.BOR, torch.bitwise_or),
                         (dist.ReduceOp.BXOR, torch.bitwise_xor)):  # fmt: skip
            found, expected = values(dist.get_rank(), 777, dtype), rows[0]
            for row in rows[1:]:
                expected = fold(expected, row)
            dist.all_reduce(found, op)
            assert torch.equal(found, expected.to(dtype))


def check_results_are_the_same_bits_on_all_ranks():
    gloo = dist.new_group(backend="gloo")
    for dtype in (torch.float32, torch.bfloat16):
        found = values(dist.get_rank(), 30_011, dtype)
        dist.all_reduce(found)
        bits = found.view(torch.uint8)
        others = [torch.empty_like(bits) for _ in everyone()]
        dist.all_gather(others, bits, group=gloo)
        assert all(torch.equal(other, bits) for other in others)
    dist.destroy_process_group(gloo)


def check_reduce_changes_the_roots_tensor_alone():
    for root in everyone():
        found = values(dist.get_rank(), 1031, torch.float32, root)
        before = found.clone()
        dist.reduce(found, root)
        if dist.get_rank() == root:
            assert_near(found, rows_of(everyone(), 1031, torch.float32, root).sum(0), torch.float32)
        else:
            assert torch.equal(found, before)


def check_broadcast_moves_every_type():
    moved = (*FLOATS, *WHOLE, torch.bool, torch.uint8, torch.int8, torch.int16, torch.complex64, torch.complex128)
    for root, dtype in enumerate(moved):
        root %= dist.get_world_size()
        expected = (values(root, 999, torch.float32, 7) * 3).to(dtype)
        found = expected.clone() if dist.get_rank() == root else torch.zeros(999, dtype=dtype)
        dist.broadcast(found, root)
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8)), dtype


def check_all_gather_in_each_form():
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.complex64):
        mine = values(dist.get_rank(), 12, torch.float32).to(dtype).view(3, 4)
        expected = torch.stack([values(rank, 12, torch.float32).to(dtype).view(3, 4) for rank in everyone()])
        separate = [torch.empty(3, 4, dtype=dtype) for _ in everyone()]
        dist.all_gather(separate, mine)
        behind = torch.empty_like(expected)
        dist.all_gather(list(behind.unbind(0)), mine)
        single = torch.empty(expected.shape[0] * 3, 4, dtype=dtype)
        dist.all_gather_into_tensor(single, mine)
        transposed = [torch.empty(4, 3, dtype=dtype).t() for _ in everyone()]
        dist.all_gather(transposed, mine.t().contiguous().t())
        for found in (torch.stack(separate), behind, single.view_as(expected), torch.stack(transposed)):
            assert torch.equal(found, expected)


def check_reduce_scatter_in_each_form():
    world, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        rows = rows_of(everyone(), world * 6, dtype)
        expected = rows.sum(0).view(world, 2, 3)[rank]
        mine = values(rank, world * 6, dtype).view(world, 2, 3)
        from_list, from_parts, single = (torch.empty(2, 3, dtype=dtype) for _ in range(3))
        dist.reduce_scatter(from_list, [row.clone() for row in mine])
        dist.reduce_scatter(from_parts, list(mine.unbind(0)))
        dist.reduce_scatter_tensor(single, mine.view(world * 2, 3))
        for found in (from_list, from_parts, single):
            assert_near(found, expected, dtype)
        assert torch.equal(mine.view(-1), values(rank, world * 6, dtype)), "an input was changed"
    average = torch.empty(5)
    dist.reduce_scatter_tensor(average, values(rank, world * 5, torch.float32), dist.ReduceOp.AVG)
    expected = rows_of(everyone(), world * 5, torch.float32).mean(0)[5 * rank : 5 * rank + 5]
    assert_near(average, expected, torch.float32)


def check_memory_that_does_not_lie_in_order():
    world = dist.get_world_size()
    expected = rows_of(everyone(), 24, torch.float32).sum(0).float()
    transposed = values(dist.get_rank(), 24, torch.float32).view(4, 6).t().contiguous().t()
    dist.all_reduce(transposed)
    torch.testing.assert_close(transposed.reshape(-1), expected)
    wide = torch.full((24, 3), 7.0)
    wide[:, 1] = values(dist.get_rank(), 24, torch.float32)
    dist.all_reduce(wide[:, 1])
    torch.testing.assert_close(wide[:, 1], expected)
    assert (wide[:, ::2] == 7).all()
    number = torch.tensor(2.5)
    dist.all_reduce(number)
    assert number.item() == 2.5 * world
    part = torch.ones(10)
    dist.all_reduce(part[3:6])
    assert part.tolist() == [1.0] * 3 + [float(world)] * 3 + [1.0] * 4
    parameter = torch.nn.Parameter(torch.full((3,), float(dist.get_rank())))
    dist.broadcast(parameter, world - 1)
    assert parameter.tolist() == [world - 1.0] * 3
    whole = torch.zeros(world * 4)
    whole.view(world, 4)[dist.get_rank()] = values(dist.get_rank(), 4, torch.float32)
    dist.all_gather_into_tensor(whole, whole.view(world, 4)[dist.get_rank()])
    assert torch.equal(whole.view(world, 4).double(), rows_of(everyone(), 4, torch.float32))


def check_twenty_handles_waited_for_in_reverse():
    tensors = [values(dist.get_rank(), 20_000 + i, torch.float32, i) for i in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for i in reversed(range(20)):
        assert works[i].wait()
        assert (works[i].is_completed(), works[i].is_success(), works[i].exception()) == (True, True, None)
        assert works[i].result()[0].data_ptr() == tensors[i].data_ptr()
        assert_near(tensors[i], rows_of(everyone(), 20_000 + i, torch.float32, i).sum(0), torch.float32)


def check_operations_in_flight_on_one_tensor_keep_their_order():
    world = dist.get_world_size()
    total, received = torch.ones(50_000), torch.empty(50_000 * world)
    signs = torch.ones(world, dtype=torch.uint8)
    works = [dist.all_reduce(total, async_op=True) for _ in range(5)]
    works.append(dist.all_gather_into_tensor(received, total, async_op=True))
    works.append(dist.all_reduce(signs, dist.ReduceOp.MAX, async_op=True))  # gloo's
    works.append(dist.all_reduce(total, dist.ReduceOp.AVG, async_op=True))
    works[-1].wait()
    assert all(work.is_completed() for work in works)
    assert total.unique().tolist() == received.unique().tolist() == [float(world**5)]


def check_futures_hold_the_outputs():
    tensor = torch.ones(1000)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    assert (doubled.wait() == 2.0 * dist.get_world_size()).all()
    late = dist.all_reduce(torch.ones(3), async_op=True)
    late.wait()
    assert late.get_future().wait()[0].tolist() == [float(dist.get_world_size())] * 3

    def average_too(done):
        # A callback runs on the queue's own thread, with operations behind it.
        dist.all_reduce(done.value()[0], dist.ReduceOp.AVG)
        return done.value()[0]

    first = dist.all_reduce(torch.ones(200_000), async_op=True).get_future().then(average_too)
    assert (first.wait() == float(dist.get_world_size())).all()


def check_sub_groups_disjoint_and_overlapping():
    world, rank = dist.get_world_size(), dist.get_rank()
    members = [[r] for r in everyone()] if world == 2 else [[0, 1], [2, 3], [1, 2], [0, 2, 3], [3]]
    groups = [(ranks, dist.new_group(ranks)) for ranks in members]
    mine = [(ranks, group) for ranks, group in groups if rank in ranks]
    tensors = [values(rank, 30_000, torch.float32, number) for number in range(len(mine))]
    works = [dist.all_reduce(t, group=group, async_op=True) for t, (_, group) in zip(tensors, mine, strict=True)]
    whole = torch.ones(1000)
    dist.all_reduce(whole)
    assert (whole == world).all()
    for number, (work, (ranks, group)) in enumerate(zip(works, mine, strict=True)):
        work.wait()
        assert dist.get_backend(group) == "hfreduce"
        assert_near(tensors[number], rows_of_members(ranks, mine_numbers(groups, ranks, number, rank)), torch.float32)
    for _, group in mine:
        dist.destroy_process_group(group)


def mine_numbers(groups, ranks, number, rank):
    """Seed that each member used for a group: the group's place among those that it belongs to."""
    wanted = [members for members, _ in groups if rank in members][number]
    return {r: [members for members, _ in groups if r in members].index(wanted) for r in ranks}


def rows_of_members(ranks, seeds):
    return torch.stack([values(r, 30_000, torch.float32, seeds[r]).double() for r in ranks]).sum(0)


def check_coalescing_manager():
    world, rank = dist.get_world_size(), dist.get_rank()
    tensors = [values(rank, size, torch.float32, size) for size in (3, 100, 0, 5000)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    outputs = [torch.empty(world * 4), torch.empty(world * 2)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for output, size in zip(outputs, (4, 2), strict=True):
            dist.all_gather_into_tensor(output, values(rank, size, torch.float32))
    manager.wait()
    kept = [torch.empty(4), torch.empty(2)]
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        for output, size in zip(kept, (4, 2), strict=True):
            dist.reduce_scatter_tensor(output, values(rank, world * size, torch.float32))
    manager.wait()
    sent = torch.full((4,), float(rank))
    with dist._coalescing_manager(device=torch.device("cpu")):
        dist.broadcast(sent, 1)
    assert sent.tolist() == [1.0] * 4
    for tensor, size in zip(tensors, (3, 100, 0, 5000), strict=True):
        assert_near(tensor, rows_of(everyone(), size, torch.float32, size).sum(0), torch.float32)
    for output, size in zip(outputs, (4, 2), strict=True):
        assert torch.equal(output.view(world, size).double(), rows_of(everyone(), size, torch.float32))
    for output, size in zip(kept, (4, 2), strict=True):
        rows = rows_of(everyone(), world * size, torch.float32)
        assert_near(output, rows.sum(0).view(world, size)[rank], torch.float32)


def check_what_gloo_does_for_us():
    world, rank = dist.get_world_size(), dist.get_rank()
    received = torch.empty(world)
    dist.all_to_all_single(received, torch.arange(world).float() + 10 * rank)
    assert received.tolist() == [10.0 * r + rank for r in everyone()]
    gathered = [torch.empty(2) for _ in everyone()] if rank == 0 else None
    dist.gather(torch.full((2,), float(rank)), gathered, 0)
    assert gathered is None or [row[0].item() for row in gathered] == list(everyone())
    part = torch.empty(2)
    dist.scatter(part, [torch.full((2,), float(r)) for r in everyone()] if rank == 1 else None, 1)
    assert part.tolist() == [rank, rank]
    small = torch.full((5,), 3, dtype=torch.uint8)
    dist.all_reduce(small)
    assert small.tolist() == [3 * world] * 5
    tokens = torch.empty(1)
    requests = [dist.isend(torch.tensor([float(rank)]), (rank + 1) % world),
                dist.irecv(tokens, (rank - 1) % world)]  # fmt: skip
    for request in requests:
        request.wait()
    assert tokens.item() == (rank - 1) % world
    objects = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in everyone()]
    sparse = torch.sparse_coo_tensor([[rank]], [2.0], (world,), check_invariants=True)
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [2.0] * world


def check_functional_collectives_and_dtensor():
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = values(rank, world * 6, torch.float32)
    rows = rows_of(everyone(), world * 6, torch.float32)
    group = dist.group.WORLD
    assert_near(functional.all_reduce(mine, "sum", group) + 0, rows.sum(0), torch.float32)
    assert torch.equal(functional.all_gather_tensor(mine, 0, group).view(world, -1).double(), rows)
    scattered = functional.reduce_scatter_tensor(mine, "avg", 0, group)
    assert_near(scattered + 0, rows.mean(0).view(world, -1)[rank], torch.float32)
    exchanged = functional.all_to_all_single(mine, None, None, group)
    assert torch.equal(exchanged.double(), torch.cat([row.view(world, -1)[rank] for row in rows]))
    mesh = DeviceMesh("cpu", list(everyone()))
    full = values(0, 8 * world, torch.float32).view(2 * world, 4)
    sharded = distribute_tensor(full, mesh, [Shard(0)])
    assert torch.equal(sharded.redistribute(placements=[Replicate()]).to_local(), full)
    partial_sum = torch.distributed.tensor.DTensor.from_local(full, mesh, [Partial()])
    torch.testing.assert_close(partial_sum.redistribute(placements=[Shard(1)]).full_tensor(), full * world)


def check_methods_of_the_group_take_every_form():
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    # Once as the engine does it, once as gloo does.
    for dtype in (torch.int32, torch.int8):
        for call in (
            lambda tensor: group.allreduce(tensor),
            lambda tensor: group.allreduce(tensor, dist.ReduceOp.SUM),
            lambda tensor: group.allreduce([tensor], dist.AllreduceOptions()),
            lambda tensor: group.allreduce_coalesced([tensor], dist.AllreduceCoalescedOptions()),
        ):
            tensor = torch.full((3,), rank + 1, dtype=dtype)
            call(tensor).wait()
            assert tensor.tolist() == [world * (world + 1) // 2] * 3
        largest = torch.full((3,), rank, dtype=dtype)
        group.reduce(largest, 0, dist.ReduceOp.MAX).wait()
        assert rank != 0 or largest.tolist() == [world - 1] * 3
        group.broadcast(largest, 0).wait()
        assert largest.tolist() == [world - 1] * 3
        rows = [torch.empty(2, dtype=dtype) for _ in everyone()]
        group.allgather(rows, torch.full((2,), rank, dtype=dtype)).wait()
        assert [row[0].item() for row in rows] == list(everyone())
        kept = torch.empty(2, dtype=dtype)
        group.reduce_scatter(kept, [torch.full((2,), r, dtype=dtype) for r in everyone()]).wait()
        assert kept.tolist() == [rank * world] * 2
        group.barrier().wait()


def check_refusals_leave_the_group_whole():
    with pytest.raises(CollectiveError, match=r"PREMUL_SUM is not one of SUM"):
        dist.all_reduce(torch.ones(3), dist._make_nccl_premul_sum(2.0))
    with pytest.raises(CollectiveError, match=r"BIT_OR of F32 is not defined"):
        dist.all_reduce(torch.ones(3), dist.ReduceOp.BOR)
    rows = [torch.ones(3, dtype=torch.float64) for _ in everyone()]
    with pytest.raises(RuntimeError, match="type"):
        dist.group.WORLD.allgather([rows], [torch.ones(3)]).wait()
    with pytest.raises(RuntimeError, match=r"row|size"):
        dist.reduce_scatter_tensor(torch.ones(3), torch.ones(3 * dist.get_world_size() + 1))
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [float(dist.get_world_size())] * 3


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


def join(rank, world_size, folder, timeout_s=60, name="store", **more):
    torch.set_num_threads(1)
    dist.init_process_group(
        "hfreduce",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        **more,
    )


def run_checks(rank, world_size, folder, ranks_per_node):
    kind = "hops" if 1 < ranks_per_node < world_size else "node"
    os.environ["COFIRE_HOST"] = f"{kind}-{rank // ranks_per_node}"
    join(rank, world_size, folder)
    for check in CHECKS:
        check()
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_every_collective_agrees_with_its_reference(world_size, ranks_per_node, tmp_path):
    start_ranks(run_checks, world_size, str(tmp_path), ranks_per_node)
    assert {path.name for path in tmp_path.glob("done-*")} == {f"done-{rank}" for rank in range(world_size)}


def expect_error(wait, pattern):
    with pytest.raises(RuntimeError, match=pattern) as caught:
        wait()
    return caught.value


def fail_in_each_way(rank, world_size, folder):
    # Ranks that disagree: the engine's own error, from wait() and from the future, on all ranks.
    join(rank, world_size, folder, name="sizes")
    work = dist.all_reduce(torch.ones(10 + rank), async_op=True)
    later = dist.all_reduce(torch.ones(10), async_op=True)
    error = expect_error(work.wait, "^ranks disagree: rank 0 calls all_reduce of 10 f32")
    assert type(error) is CollectiveError
    assert (work.is_completed(), work.is_success()) == (True, False)
    assert work.exception() is error
    expect_error(work.get_future().wait, re.escape(str(error)))
    expect_error(later.wait, "failed before")
    expect_error(lambda: dist.all_reduce(torch.ones(10)), "failed before")
    # Gloo would still do this; but who works on after a failure may hold half a result.
    expect_error(lambda: dist.all_reduce(torch.ones(10, dtype=torch.uint8)), "failed before")
    dist.destroy_process_group()

    # DDP's reducer waits for the future in C++.
    join(rank, world_size, folder, name="ddp")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    dist.group.WORLD._engine.abort("pulled the plug")
    expect_error(lambda: model(torch.ones(2, 3)).sum().backward(), "pulled the plug")
    dist.destroy_process_group()

    # One rank waits shorter than the other takes to come.
    join(rank, world_size, folder, name="wait")
    if rank == 0:
        work = dist.all_reduce(torch.ones(10), async_op=True)
        error = expect_error(lambda: work.wait(timedelta(seconds=0.05)), "more than the 0.05 s")
        assert type(error) is CollectiveError
    else:
        while dist.group.WORLD._engine._segment.failure is None:
            time.sleep(0.01)
    expect_error(lambda: dist.all_reduce(torch.ones(10)), "0.05 s")
    dist.destroy_process_group()

    # A group that is destroyed with an operation that can never end.
    join(rank, world_size, folder, name="destroy")
    backend._PATIENCE_S = 0.2
    group = dist.group.WORLD
    work = dist.all_reduce(torch.ones(10), async_op=True) if rank == 0 else None
    dist.destroy_process_group()
    if work is not None:
        expect_error(work.wait, "destroyed with operations in flight|gone|abort")
    expect_error(lambda: group.allreduce([torch.ones(2)]), "was destroyed; make a new one")
    Path(folder, f"done-{rank}").touch()


def test_an_error_of_the_engine_reaches_everyone_who_waits(tmp_path):
    start_ranks(fail_in_each_way, 2, str(tmp_path))
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


LEAVE = """
import sys, torch, torch.distributed as dist
rank, store = int(sys.argv[1]), sys.argv[2]
assert "cofire.collectives.backend" not in sys.modules, "import torch is to stay quick"
dist.init_process_group("hfreduce", init_method=f"file://{store}", rank=rank, world_size=2)
number = torch.ones(1)
dist.all_reduce(number)
assert number.item() == 2
if rank == 0:
    dist.all_reduce(torch.ones(1000), async_op=True)
"""


def test_a_program_ends_with_an_operation_in_flight_and_needs_no_import_of_cofire(tmp_path):
    program = [sys.executable, "-c", LEAVE]
    ranks = [
        subprocess.Popen(
            [*program, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_the_backend_is_known_without_autoload_and_registering_twice_does_no_harm():
    program = (
        "import torch.distributed as dist; assert 'hfreduce' not in dist.Backend.backend_list;"
        "import cofire.collectives.backend; from cofire.collectives import autoload; autoload.register();"
        "assert dist.Backend.backend_list.count('hfreduce') == 1; print(dist.Backend.backend_capability['hfreduce'])"
    )
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['cpu', 'cuda']", done.stderr


def test_options_of_another_type_are_refused_in_one_line():
    with pytest.raises(CollectiveError, match="pg_options is a dict; hfreduce takes HFReduceOptions"):
        HFReduceGroup(dist.HashStore(), 0, 1, timedelta(seconds=5), {"num_threads": 1})


def test_options_of_the_program_reach_the_engine():
    group = HFReduceGroup(dist.HashStore(), 0, 1, timedelta(seconds=5), HFReduceOptions(num_threads=3))
    assert group._engine.options.num_threads == 3
    assert group._engine.timeout_s == 5.0
    group.set_timeout(timedelta(seconds=9))
    assert group._engine.timeout_s == 9.0
    tensor = torch.arange(5.0)
    group.allreduce(tensor).wait()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    group.shutdown()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.0005]), st.booleans()), max_size=12))
def test_a_queue_runs_operations_one_at_a_time_and_in_order(operations):
    queue = OperationQueue("test", abort=lambda message: None)
    ran, running = [], threading.Lock()

    def make(number, pause_s, fails):
        def run():
            assert running.acquire(blocking=False), "two operations at once"
            time.sleep(pause_s)
            ran.append(number)
            running.release()
            if fails:
                raise CollectiveError(f"number {number}")

        return run

    works = [
        queue.submit(make(number, pause_s, fails), [], asynchronous)
        for number, (asynchronous, pause_s, fails) in enumerate(operations)
    ]
    for number, (work, (_, _, fails)) in reversed(list(enumerate(zip(works, operations, strict=True)))):
        if fails:
            with pytest.raises(CollectiveError, match=f"number {number}$"):
                work.wait()
        else:
            assert work.wait()
    assert ran == list(range(len(operations)))
    queue.close(5.0)
    with pytest.raises(CollectiveError, match="was destroyed"):
        queue.submit(lambda: None, [], False)
