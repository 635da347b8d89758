"""Chooses the size of chunks and the number of threads by counting passes over memory.

Fire-Flyer (arXiv 2408.14158, IV-A) counts how often a byte of gradient is written to and read from host memory. Here
the ranks are processes on CPUs: each reads its data and writes the result once, at the memory's speed; what goes
through slots moves at the cache's speed while the slots fit there; each chunk costs its flags. Slower without cores
for all. The rates come from a short calibration, kept in the user's cache; without one they are assumed.

Left out: NUMA, and what other programs do to the memory meanwhile. Imports no PyTorch.
"""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from cofire.errors import CollectiveError, SpecError
from cofire.network.host import HostReduceBounds, cluster_host_reduce_bounds
from cofire.spec.figure import Figure
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import load_value, save, user_cache_folder
from cofire.spec.spec_type import Positive, Spec

CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4 << 10, 4 << 20
NUM_SLOTS = 4
_WHOLE_BYTES_MAX = 32 << 10  # up to here each rank adds everything itself, as csrc/segment does
_THREADS_MAX = 8
_LARGE_BYTES, _CACHED_BYTES = 64 << 20, 256 << 10
_SAMPLES, _SAMPLE_BYTES = 3, 32 << 20
_THREAD_START_S = 30e-6
_PAGE = 4096

PositiveFloat = Annotated[float, Field(gt=0)]


def _assumed(value: float, source: str) -> Figure:
    return Figure(value=value, low=value / 2, high=value * 2, source=source)


class CopyRate(Spec):
    """Bytes read and written per second by so many copies at once, all together."""

    copiers: Positive
    memory_bytes_per_s: Figure = Field(description="of buffers that no cache holds")
    cache_bytes_per_s: Figure = Field(description="of buffers that a cache holds")


class Calibration(Spec):
    """What one node's memory and processors do.

    ``copies`` are by rising number of copiers. ``hand_over_s`` is what a flag costs that the other rank looks at,
    ``wake_up_s`` what it costs to wake a rank that sleeps, as it does where ranks outnumber cores.
    """

    copies: tuple[CopyRate, ...] = Field(min_length=1)
    cache_bytes: PositiveFloat = Field(description="of the last level")
    hand_over_s: Figure = _assumed(0.4e-6, "a cache line's way to another core and back")
    wake_up_s: Figure = _assumed(6e-6, "a futex and a switch of processes")
    wire_bytes_per_s: Figure = _assumed(1.25e9, "10 Gbit/s, one way, of a node")
    message_s: Figure = _assumed(50e-6, "a message over TCP")

    def rate(self, copiers: int, cached: bool) -> float:
        """Return bytes per second, read and written, of so many copies at once; those measured next below."""
        known = [row for row in self.copies if row.copiers <= copiers] or [self.copies[0]]
        return (known[-1].cache_bytes_per_s if cached else known[-1].memory_bytes_per_s).value


class Choice(NamedTuple):
    """Size of a chunk, threads of a rank, and the seconds that the model gives an all-reduce with them."""

    chunk_bytes: int
    num_threads: int
    time_s: float


def assumed_calibration(num_cores: int | None = None) -> Calibration:
    """Return rates of a common server, for a machine that nobody has measured."""
    cores = num_cores or available_cores()
    rows = tuple(
        CopyRate(
            copiers=n,
            memory_bytes_per_s=_assumed(12e9 * min(n, 8), "of a server's core"),
            cache_bytes_per_s=_assumed(40e9 * n, "of a server's core"),
        )
        for n in _copiers(cores)
    )
    return Calibration(copies=rows, cache_bytes=_cache_bytes())


def available_cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bound_s(
    num_ranks: int, size_bytes: float, calibration: Calibration, num_workers: int | None = None
) -> float:
    """Return the time in which all ranks, at once, read their data and write the result once, as a copy does it.

    Args:
        num_ranks: Of the node.
        size_bytes: Of each rank's data.
        calibration: Of the node.
        num_workers: Threads of all ranks that copy at once; none: one a rank.

    Returns:
        Seconds; what fits the cache moves at its speed.
    """
    moved = 2.0 * num_ranks * size_bytes
    cached = min(moved, calibration.cache_bytes)
    return _move_s(cached, moved - cached, num_workers or num_ranks, calibration)


def _move_s(cached: float, uncached: float, workers: int, calibration: Calibration) -> float:
    return cached / calibration.rate(workers, True) + uncached / calibration.rate(workers, False)


def slot_passes(num_ranks: int, size_bytes: float) -> float:
    """Return how often a byte of a rank's data is written to or read from the slots, beside the data itself.

    Two ranks, or little data: a rank writes its slot, then reads its own and its peers' and writes the result at
    once. Else each adds its part: ``(n - 1) / n`` to the slot and again from the peers', ``1 / n`` to the result, and
    all of the result out.
    """
    if num_ranks == 1:
        return 0.0
    if num_ranks == 2 or size_bytes <= _WHOLE_BYTES_MAX:
        return 1.0 + num_ranks
    return 2.0 * (num_ranks - 1) / num_ranks + 1.0 / num_ranks + 1.0


def all_reduce_s(
    num_local_ranks: int,
    num_cores: int,
    size_bytes: float,
    chunk_bytes: float,
    num_threads: int,
    calibration: Calibration,
    num_nodes: int = 1,
) -> float:
    """Return what an all-reduce takes by the model.

    Args:
        num_local_ranks: Of each node.
        num_cores: Of each node.
        size_bytes: Of each rank's data.
        chunk_bytes: Of a chunk.
        num_threads: Of each rank.
        calibration: Of each node.
        num_nodes: With several, chunks pass a double binary tree behind the sums.

    Returns:
        Seconds.
    """
    ranks, crew = num_local_ranks, num_local_ranks * num_threads
    workers = max(1, min(crew, num_cores))
    chunk = min(chunk_bytes, max(size_bytes, 1.0))
    chunks = -(-size_bytes // (chunk * num_threads)) if size_bytes else 1.0
    passes = slot_passes(ranks, size_bytes)
    ring = (ranks + 1.0) * num_threads * min(NUM_SLOTS, chunks) * chunk
    # Half of the cache: data pass through it too.
    fits = min(1.0, calibration.cache_bytes / 2 / ring)
    through = ranks * size_bytes * passes
    work = memory_bound_s(ranks, size_bytes, calibration, workers)
    work += _move_s(through * fits, through * (1 - fits), workers, calibration)
    # Ranks do not come in step: a chunk's worth of work is waited for at the end.
    fill = _move_s(ranks * chunk * (passes + 2.0), 0.0, workers, calibration)
    flags = 0.0 if ranks == 1 else 2.0 if ranks == 2 or size_bytes <= _WHOLE_BYTES_MAX else 3.0
    crowded = crew > num_cores
    flag_s = calibration.wake_up_s.value if crowded else calibration.hand_over_s.value
    turns = -(-crew // max(1, num_cores)) if crowded else max(1, ranks - 1)
    flags_s = chunks * flags * flag_s * turns
    node_s = work + flags_s + fill + (num_threads - 1) * _THREAD_START_S
    if num_nodes == 1:
        return node_s
    return max(node_s, _wire_s(size_bytes, chunk, num_nodes, calibration)) + _climb_s(chunk, num_nodes, calibration)


def _wire_s(size_bytes: float, chunk: float, num_nodes: int, calibration: Calibration) -> float:
    """Seconds for which a node's wire is busy one way: each byte once of two nodes, else at most twice."""
    times = 1 if num_nodes == 2 else 2
    messages = max(1.0, -(-size_bytes // chunk))
    return times * (size_bytes / calibration.wire_bytes_per_s.value + messages * calibration.message_s.value)


def _climb_s(chunk: float, num_nodes: int, calibration: Calibration) -> float:
    """Seconds of one chunk up to the root and down again, which nothing hides."""
    depth = (num_nodes - 1).bit_length()
    return 2 * depth * (chunk / calibration.wire_bytes_per_s.value + calibration.message_s.value)


def choose(
    num_local_ranks: int,
    num_cores: int,
    size_bytes: float,
    calibration: Calibration,
    *,
    num_nodes: int = 1,
    chunk_bytes: int | None = None,
    num_threads: int | None = None,
) -> Choice:
    """Return the chunk and the threads that are fastest by :func:`all_reduce_s`.

    All ranks of a group have to use one choice: let one rank choose.

    Args:
        num_local_ranks: Of each node.
        num_cores: Of each node.
        size_bytes: Of each rank's data.
        calibration: Of each node.
        num_nodes: Of the group; between nodes one thread of a rank works.
        chunk_bytes: Set by the user (``COFIRE_HFREDUCE_CHUNK_BYTES``); none: a power of two, 4 KiB to 4 MiB.
        num_threads: Set by the user (``COFIRE_HFREDUCE_NUM_THREADS``); none: as many as leave a core to each.

    Raises:
        CollectiveError: No ranks, cores or nodes.
    """
    for name, value in (("ranks", num_local_ranks), ("cores", num_cores), ("nodes", num_nodes)):
        if value < 1:
            raise CollectiveError(f"{value} {name} reduce nothing; take 1 or more")
    chunks = [chunk_bytes] if chunk_bytes is not None else _powers(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    most = 1 if num_nodes > 1 else max(1, min(_THREADS_MAX, num_cores // num_local_ranks))
    threads = [num_threads] if num_threads is not None else _powers(1, most)
    found = [
        Choice(c, n, all_reduce_s(num_local_ranks, num_cores, size_bytes, c, n, calibration, num_nodes))
        for c, n in product(chunks, threads)
    ]
    return min(found, key=lambda choice: (choice.time_s, choice.num_threads, choice.chunk_bytes))


def _powers(low: int, high: int) -> list[int]:
    found = [low]
    while found[-1] * 2 <= high:
        found.append(found[-1] * 2)
    return found


def ceilings_bytes_per_s(
    num_local_ranks: int,
    size_bytes: float,
    calibration: Calibration,
    cluster: ClusterSpec | None = None,
    num_nodes: int | None = None,
) -> dict[str, float]:
    """Return upper bounds on the algorithm bandwidth by what binds, in bytes of a rank's data per second.

    ``memory`` is of this machine's CPU ranks. A cluster adds those of its own hosts, devices copying to host memory:
    ``host memory``, ``NIC``, ``PCIe slot`` and ``shared root port``.

    Raises:
        PlanError: The cluster lacks a host or a network.
    """
    found = {"memory": size_bytes / memory_bound_s(num_local_ranks, size_bytes, calibration)} if size_bytes else {}
    if cluster is not None:
        bounds: HostReduceBounds = cluster_host_reduce_bounds(cluster, num_nodes)
        found |= {str(resource): value for resource, value in bounds.bounds_bytes_per_s.items()}
    return found


# -- calibration ------------------------------------------------------------------------------------


def calibration_file() -> Path:
    """Return where this machine's calibration is kept: beside that of ``cofire plan calibrate``."""
    return user_cache_folder() / "this-machine-reduce.toml"


def load_calibration() -> Calibration:
    """Return the calibration that is kept here; without one, or with one that cannot be read, what is assumed."""
    try:
        return load_value(Calibration, calibration_file())
    except SpecError:
        return assumed_calibration()


def save_calibration(calibration: Calibration) -> None:
    """Keep a calibration.

    Raises:
        CollectiveError: The folder cannot be made.
        SpecError: The file cannot be written.
    """
    path = calibration_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CollectiveError(f"cannot make {path.parent}: {error.strerror}; set COFIRE_CACHE to a folder") from None
    save(calibration, path)


def calibrate() -> Calibration:
    """Measure copies out of memory and out of the cache, by one and more threads at once, and a thread's wake-up.

    Takes about a second on two cores; at most eight threads copy.

    Returns:
        Medians of three samples, with their extremes.
    """
    source = f"{_SAMPLES} samples, {time.strftime('%Y-%m-%d')}"
    rows = []
    for copiers in _copiers(available_cores()):
        large, cached = (_figure(_copy_rates(copiers, size), source) for size in (_LARGE_BYTES, _CACHED_BYTES))
        rows.append(CopyRate(copiers=copiers, memory_bytes_per_s=large, cache_bytes_per_s=cached))
    wake_up_s = _figure(_wake_up_seconds(), source)
    return Calibration(copies=tuple(rows), cache_bytes=_cache_bytes(), wake_up_s=wake_up_s)


def _copiers(cores: int) -> list[int]:
    return _powers(1, min(8, cores))


def _figure(values: Sequence[float], source: str) -> Figure:
    return Figure(value=statistics.median(values), low=min(values), high=max(values), label="measured", source=source)


def _copy_rates(copiers: int, size_bytes: int) -> list[float]:
    """Bytes read and written per second by threads that each copy buffers of their own; one value a sample."""
    import ctypes

    import numpy as np

    buffers = [(np.ones(size_bytes + _PAGE, np.uint8), np.ones(size_bytes + _PAGE, np.uint8)) for _ in range(copiers)]
    calls = max(1, _SAMPLE_BYTES // size_bytes)

    def copy(rank: int) -> None:
        # Whole pages: some processors copy ten times slower where the two ends are a few bytes apart within a page.
        source, target = (-(-buffer.ctypes.data // _PAGE) * _PAGE for buffer in buffers[rank])
        for _ in range(calls):
            ctypes.memmove(target, source, size_bytes)  # lets go of the interpreter's lock

    return [2.0 * copiers * size_bytes * calls / _together_s(copiers, copy) for _ in range(_SAMPLES)]


def _together_s(count: int, work: Callable[[int], None]) -> float:
    """Seconds from the first start to the last end of threads that start together."""
    gate = threading.Barrier(count)
    spans = [(0.0, 0.0)] * count

    def run(rank: int) -> None:
        gate.wait()
        start = time.perf_counter()
        work(rank)
        spans[rank] = start, time.perf_counter()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _wake_up_seconds(turns: int = 500) -> list[float]:
    """Seconds from a word written to a thread that sleeps until it runs; half of a word there and back."""
    ends = os.pipe(), os.pipe()

    def answer() -> None:
        while os.read(ends[0][0], 1) == b"?":
            os.write(ends[1][1], b"!")

    thread = threading.Thread(target=answer)
    thread.start()
    found = []
    try:
        for _ in range(_SAMPLES):
            start = time.perf_counter()
            for _ in range(turns):
                os.write(ends[0][1], b"?")
                os.read(ends[1][0], 1)
            found.append((time.perf_counter() - start) / turns / 2)
    finally:
        os.write(ends[0][1], b".")
        thread.join()
        for end in (*ends[0], *ends[1]):
            os.close(end)
    return found


def _cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> float:
    """Return the size of the last level's cache; 8 MiB where the system does not say."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20}
    found = [8 << 20]
    texts = [path.read_text().strip() for path in sorted(folder.glob("index*/size"))]
    sizes = [int(m[1]) * units[m[2]] for text in texts if (m := re.fullmatch(r"(\d+)([KM]?)", text))]
    return float(max(sizes or found))
