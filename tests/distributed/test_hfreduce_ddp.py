"""Training over the backend ``hfreduce``: DDP, its communication hook, FSDP2 and the example, against one process."""

import contextlib
import multiprocessing
import os
import re
import runpy
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cofire.collectives.ddp_hook import HFReduceHookState, hfreduce_hook
from cofire.errors import CollectiveError

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, WIDTH = 3, 8, 16


def start_ranks(function, world_size, *arguments):
    """Run ``function(rank, world_size, *arguments)`` in processes of a server that has imported PyTorch once."""
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "cofire.collectives.backend"])
    mp.start_processes(function, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))


def samples_of(step, ranks):
    return torch.cat(
        [torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 * step + r)) for r in ranks]
    )


def train(module, ranks):
    """Train on the samples of some ranks, each with the same weight."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        samples = samples_of(step, ranks)
        loss = (module(samples)[:, 0] - samples.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def gathered(tensor, group):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor, group=group)
    return torch.stack(rows)


def assert_trained_alike(module, reference, gloo):
    rows = gathered(flat(module), gloo)
    assert all(torch.equal(row, rows[0]) for row in rows), "ranks differ"
    torch.testing.assert_close(rows[0], flat(reference), rtol=1e-5, atol=1e-6)


def check_ddp(rank, reference, gloo):
    over_gloo = DistributedDataParallel(make_model(), process_group=gloo)
    train(over_gloo, [rank])
    # Small buckets, so that several are in flight during the backward pass.
    over_hfreduce = DistributedDataParallel(make_model(), bucket_cap_mb=0.004)
    train(over_hfreduce, [rank])
    assert_trained_alike(over_hfreduce, reference, gloo)
    torch.testing.assert_close(flat(over_hfreduce), flat(over_gloo), rtol=1e-6, atol=1e-7)


def check_hook_averages_once_over_its_own_group(rank, reference, gloo):
    hooked = DistributedDataParallel(make_model(), process_group=gloo, bucket_cap_mb=0.004)
    hooked.register_comm_hook(HFReduceHookState(), hfreduce_hook)
    train(hooked, [rank])
    assert_trained_alike(hooked, reference, gloo)


def check_hook_rounds_to_its_wire_type(rank, gloo):
    alone = make_model()
    samples = samples_of(0, [rank])
    alone(samples).sum().backward()
    own = torch.cat([parameter.grad.reshape(-1) for parameter in alone.parameters()])
    for wire_dtype in (torch.bfloat16, torch.float16):
        hooked = DistributedDataParallel(make_model(), process_group=gloo)
        hooked.register_comm_hook(HFReduceHookState(dist.group.WORLD, wire_dtype), hfreduce_hook)
        hooked(samples).sum().backward()
        found = torch.cat([parameter.grad.reshape(-1) for parameter in hooked.parameters()])
        expected = gathered(own, gloo).to(wire_dtype).float().mean(0).to(wire_dtype).float()
        assert torch.equal(found, expected)
        assert not torch.equal(found, gathered(own, gloo).mean(0)), "nothing was rounded"


def check_ddp_with_unused_parameters_buffers_and_accumulation(rank, gloo):
    def make():
        torch.manual_seed(3)
        return torch.nn.ModuleDict({
            "used": torch.nn.Sequential(torch.nn.Linear(WIDTH, 4), torch.nn.BatchNorm1d(4)),
            "spare": torch.nn.Linear(4, 4),
        })  # fmt: skip

    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = make()

        def forward(self, samples, spare):
            hidden = self.parts["used"](samples)
            return self.parts["spare"](hidden) if spare else hidden

    grads = []
    for group in (gloo, dist.group.WORLD):
        module = DistributedDataParallel(Sometimes(), process_group=group, find_unused_parameters=True)
        with module.no_sync():
            module(samples_of(0, [rank]), spare=False).square().sum().backward()
        module(samples_of(1, [rank]), spare=rank == 0).square().sum().backward()
        found = [torch.zeros(1) if p.grad is None else p.grad.reshape(-1) for p in module.parameters()]
        grads.append(torch.cat([*found, *(buffer.float().reshape(-1) for buffer in module.buffers())]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def check_a_hook_whose_callbacks_reduce_too(gloo):
    trained = []
    for group in (gloo, dist.group.WORLD):
        module = DistributedDataParallel(make_model(), process_group=group)
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        train(module, [dist.get_rank()])
        trained.append(flat(module))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)


def check_fsdp2(rank, reference):
    sharded = make_model()
    for layer in sharded:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(sharded)
    train(sharded, [rank])
    full = torch.cat([parameter.full_tensor().detach().reshape(-1) for parameter in sharded.parameters()])
    torch.testing.assert_close(full, flat(reference), rtol=1e-5, atol=1e-6)


def check_hook_refuses_other_groups_and_types(gloo):
    with pytest.raises(CollectiveError, match="backend is gloo; give new_group"):
        HFReduceHookState(gloo)
    with pytest.raises(CollectiveError, match=r"wire_dtype torch\.int32 is not a floating-point type"):
        HFReduceHookState(wire_dtype=torch.int32)


def train_in_each_way(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "hfreduce",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    gloo = dist.new_group(backend="gloo")
    reference = make_model()
    train(reference, range(world_size))
    check_ddp(rank, reference, gloo)
    check_hook_averages_once_over_its_own_group(rank, reference, gloo)
    check_hook_rounds_to_its_wire_type(rank, gloo)
    check_ddp_with_unused_parameters_buffers_and_accumulation(rank, gloo)
    check_a_hook_whose_callbacks_reduce_too(gloo)
    check_fsdp2(rank, reference)
    check_hook_refuses_other_groups_and_types(gloo)
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_over_hfreduce_equals_training_in_one_process(world_size, tmp_path):
    start_ranks(train_in_each_way, world_size, str(tmp_path))
    assert {path.name for path in tmp_path.glob("done-*")} == {f"done-{rank}" for rank in range(world_size)}


# What the example's runs made, until the process ends: PyTorch 2.13 destroys a gloo group with the GIL held if DDP is
# its last owner, and waits for ever if a thread of gloo just then needs the GIL to forget its last operation.
_made = []


def run_example(rank, world_size, folder, ports):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    for backend, port in ports.items():
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["06_hfreduce.py", backend]
        with open(f"{folder}/{backend}-{rank}", "w") as file, contextlib.redirect_stdout(file):
            _made.append(runpy.run_path(str(ROOT / "examples" / sys.argv[0]), run_name="__main__"))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_the_example_trains_alike_with_either_word(tmp_path):
    start_ranks(run_example, 2, str(tmp_path), {backend: free_port() for backend in ("gloo", "hfreduce")})
    losses = set()
    for backend in ("gloo", "hfreduce"):
        for rank in range(2):
            printed = (tmp_path / f"{backend}-{rank}").read_text()
            found = re.fullmatch(rf"rank {rank} of 2 with {backend}: loss ([0-9.]+)\n", printed)
            assert found, printed
            losses.add(found[1])
    # Two numbers add to the same bits in either order, so nothing differs.
    assert len(losses) == 1
    assert float(losses.pop()) < 1.0, "the sum that is learnt has a variance of 8"
