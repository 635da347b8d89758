"""Measures all-reduces of ranks on this machine, or of the group that torchrun describes.

Backends take turns call by call on the same buffers, with a barrier before each sample, and so does a copy: every rank
reading and writing its data once, all at once, is the bound by the memory that the results are held against
(Fire-Flyer, arXiv 2408.14158, IV-A). A sample is as slow as its slowest rank. Up to 1 MiB the same buffer is used again
and lies in the cache; larger ones change from call to call, so that the data comes from memory.

Imports PyTorch only where ranks run: a benchmark's MPI ranks, which have none, sample by the same rules.

Left out: other collectives than all-reduce, and devices.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofire.errors import CollectiveError
from cofire.spec.figure import Figure
from cofire.spec.spec_type import NonNegative, Positive, Spec

if TYPE_CHECKING:
    import torch

COPY = "copy"
HOT_BYTES_MAX = 1 << 20
_ROTATED_BYTES = 96 << 20  # of all ranks, beyond a common last level of cache
_SETS_MAX = 8
_SAMPLE_BYTES, _CALLS_MAX = 4 << 20, 200
_WARM_CALLS = 2
_TIMEOUT_S = 300.0

DTYPES = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"} | {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}
OPS = {"sum": "SUM", "average": "AVG", "min": "MIN", "max": "MAX", "product": "PRODUCT"}


class ReduceQuestion(Spec):
    """What is measured. ``sizes_bytes`` are of a rank's data."""

    num_ranks: Positive = 2
    sizes_bytes: tuple[Positive, ...]
    dtype: str = "fp32"
    op: str = "sum"
    backends: tuple[str, ...] = ("hfreduce", "gloo")
    repeats: Positive = 7
    chunk_bytes: NonNegative = 0


class ReduceSample(Spec):
    """One backend at one size: seconds of a call, and processor seconds of all ranks for it."""

    backend: str
    size_bytes: Positive
    time_s: Figure
    cpu_s: float


Calls = Mapping[str, Callable[[int], Any]]
"""What each backend does with the buffer of a number, by its name."""

Gather = Callable[[list[float]], list[list[float]]]
"""Collects a list of numbers from each rank; every rank, or the first alone, gets all."""


def calls_per_sample(size_bytes: int) -> int:
    """Return how many calls one sample makes: small data needs many to be timed."""
    return max(1, min(_CALLS_MAX, _SAMPLE_BYTES // max(1, size_bytes)))


def num_buffers(size_bytes: int, num_ranks: int) -> int:
    """Return how many buffers a rank changes between: two for what may stay in the cache."""
    if size_bytes <= HOT_BYTES_MAX:
        return 2
    return max(2, min(_SETS_MAX, -(-_ROTATED_BYTES // (size_bytes * num_ranks))))


def sample(
    calls: Calls, size_bytes: int, num_ranks: int, repeats: int, barrier: Callable[[], Any], gather: Gather
) -> list[ReduceSample]:
    """Time every backend in turn; all ranks make this call.

    Args:
        calls: See ``Calls``; the same order on all ranks.
        size_bytes: Of a rank's data.
        num_ranks: That take part.
        repeats: Samples of each.
        barrier: Returns when all ranks have come.
        gather: See ``Gather``.

    Returns:
        Median, fastest and slowest sample, on the ranks for which ``gather`` returns something.
    """
    many, buffers = calls_per_sample(size_bytes), num_buffers(size_bytes, num_ranks)
    turning = size_bytes > HOT_BYTES_MAX
    for call in calls.values():
        for number in range(max(_WARM_CALLS, buffers if turning else 1)):
            call(number % buffers if turning else 0)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            barrier()
            busy, start = _cpu_s(), time.perf_counter()
            for number in range(many):
                call((repeat * many + number) % buffers if turning else 0)
            spent[name].append(((time.perf_counter() - start) / many, (_cpu_s() - busy) / many))
    found = []
    for name, samples in spent.items():
        walls = gather([wall for wall, _ in samples])
        busy_s = gather([cpu for _, cpu in samples])
        if walls:
            times = [max(column) for column in zip(*walls, strict=True)]
            figure = _figure(times, f"{len(times)} samples of {many} calls")
            cpu = statistics.median(sum(column) for column in zip(*busy_s, strict=True))
            found.append(ReduceSample(backend=name, size_bytes=size_bytes, time_s=figure, cpu_s=cpu))
    return found


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _figure(values: Sequence[float], source: str) -> Figure:
    return Figure(value=statistics.median(values), low=min(values), high=max(values), label="measured", source=source)


def in_torchrun() -> bool:
    """Return whether this process is a rank that torchrun, or the like, has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def check_question(question: ReduceQuestion) -> None:
    """Raise if PyTorch does not know a name in the question.

    Raises:
        CollectiveError: An unknown type, operation or backend, a size that is no whole number of elements.
    """
    import torch.distributed as dist

    for what, value, known in (("dtype", question.dtype, DTYPES), ("op", question.op, OPS)):
        if value not in known:
            raise CollectiveError(f"{what} {value!r} is not one of {', '.join(known)}; take {next(iter(known))}")
    for backend in question.backends:
        if backend not in dist.Backend.backend_list:
            raise CollectiveError(
                f"backend {backend!r} is not one of {', '.join(dist.Backend.backend_list)}; take gloo"
            )
    width = _dtype(question.dtype).itemsize
    for size in question.sizes_bytes:
        if size % width:
            raise CollectiveError(
                f"{size} bytes are no whole number of {question.dtype}; take {size - size % width or width}"
            )


def measure(question: ReduceQuestion) -> list[ReduceSample]:
    """Measure; in ranks that this process starts, or as one rank of torchrun's group.

    Returns:
        Samples by size, the copy and then each backend; under torchrun on rank 0 alone.

    Raises:
        CollectiveError: The question is wrong, or ranks fail.
    """
    check_question(question)
    if in_torchrun():
        try:
            return _run_rank(question, int(os.environ["RANK"]), None)
        except RuntimeError as error:
            raise CollectiveError(f"a rank failed: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory(prefix="cofire-bench-") as folder:
        try:
            processes.start_processes(_start_rank, (question, folder), question.num_ranks, start_method="spawn")
        except (processes.ProcessRaisedException, processes.ProcessExitedException) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise CollectiveError(f"a rank failed: {lines[-1].strip()}") from None
        rows = json.loads((Path(folder) / "samples.json").read_text())
    return [ReduceSample.model_validate(row) for row in rows]


def _start_rank(rank: int, question: ReduceQuestion, folder: str) -> None:
    found = _run_rank(question, rank, folder)
    if rank == 0:
        rows = [row.model_dump(mode="json") for row in found]
        (Path(folder) / "samples.json").write_text(json.dumps(rows))


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[name])


def _run_rank(question: ReduceQuestion, rank: int, folder: str | None) -> list[ReduceSample]:
    """Join the group, measure all sizes and leave. Without a folder the group is torchrun's."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if question.chunk_bytes:
        os.environ["COFIRE_HFREDUCE_CHUNK_BYTES"] = str(question.chunk_bytes)
    where: dict[str, Any] = {}
    if folder is not None:
        where = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": question.num_ranks}
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S), **where)
    try:
        groups = {name: dist.new_group(backend=name) for name in question.backends}
        found: list[ReduceSample] = []
        for size in question.sizes_bytes:
            if rank == 0 and sys.stderr.isatty():
                sys.stderr.write(f"cofire: {size:,} bytes\n")
            found += _measure_size(question, size, rank, groups)
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


def _measure_size(question: ReduceQuestion, size_bytes: int, rank: int, groups: dict[str, Any]) -> list[ReduceSample]:
    import torch
    import torch.distributed as dist

    world, dtype = dist.get_world_size(), _dtype(question.dtype)
    count = size_bytes // dtype.itemsize
    buffers = [torch.ones(count).to(dtype) for _ in range(num_buffers(size_bytes, world))]
    op = getattr(dist.ReduceOp, OPS[question.op])

    def copy(number: int) -> None:
        buffers[(number + 1) % len(buffers)].copy_(buffers[number])

    def reduction(group: Any) -> Callable[[int], Any]:
        return lambda number: dist.all_reduce(buffers[number], op, group=group)

    def gather(values: list[float]) -> list[list[float]]:
        rows = [torch.zeros(len(values), dtype=torch.float64) for _ in range(world)] if rank == 0 else None
        dist.gather(torch.tensor(values, dtype=torch.float64), rows)
        return [row.tolist() for row in rows or ()]

    calls = {COPY: copy} | {name: reduction(group) for name, group in groups.items()}
    _check_sums(question, rank, groups)
    return sample(calls, size_bytes, world, question.repeats, dist.barrier, gather)


def _check_sums(question: ReduceQuestion, rank: int, groups: dict[str, Any]) -> None:
    """Raise unless each backend gets a small sum right: what is wrong need not be timed."""
    import torch
    import torch.distributed as dist

    if question.op != "sum":
        return
    world = dist.get_world_size()
    for name, group in groups.items():
        tensor = torch.full((64,), float(rank % 2 + 1)).to(_dtype(question.dtype))
        dist.all_reduce(tensor, group=group)
        expected = float(sum(other % 2 + 1 for other in range(world)))
        if set(tensor.float().tolist()) != {expected}:
            raise CollectiveError(f"{name} sums to {float(tensor[0])} and not to {expected}; it is not measured")


def bus_factor(num_ranks: int) -> float:
    """Return bus bandwidth over algorithm bandwidth of an all-reduce: ``2 (n - 1) / n``."""
    return 2 * (num_ranks - 1) / num_ranks
