"""An accelerator without hardware, for what copies tensors between a device and the host.

Its tensors are on the CPU and lie on the "device" because it made them. Copies are done by one thread a direction, in
the order in which they were begun, each after a random while. What a copy is to fill holds rubbish until it is done; a
copy whose memory another one under way writes, or that is not pinned, is kept as an error: what real hardware lets pass
until the day when the timing changes.
"""

from __future__ import annotations

import random
import threading
import time
from queue import SimpleQueue

import torch


class FakeDevice:
    """A :class:`cofire.collectives.device.DeviceLayer`.

    Attributes:
        errors: What was done wrong.
        overlaps: Copies that began while another of the other direction was under way.
        num_copies: Begun.
    """

    def __init__(self, seed: int = 0, delay_s: float = 300e-6) -> None:
        """Start the two threads.

        Args:
            seed: Of the delays.
            delay_s: At most, of one copy.
        """
        self.errors: list[str] = []
        self.overlaps = self.num_copies = 0
        self._random, self._delay_s = random.Random(seed), delay_s
        self._lock = threading.Lock()
        self._tensors: dict[int, torch.Tensor] = {}
        self._pinned: dict[int, int] = {}
        self._under_way: list[FakeCopy] = []
        self._queues: dict[str, SimpleQueue[FakeCopy]] = {"fetch": SimpleQueue(), "store": SimpleQueue()}
        for queue in self._queues.values():
            threading.Thread(target=self._serve, args=(queue,), daemon=True).start()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor on the device; it stays there for good."""
        there = tensor.clone()
        self._tensors[there.untyped_storage().data_ptr()] = there
        return there

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor, or what it is a view of, was made by :meth:`put`."""
        return tensor.untyped_storage().data_ptr() in self._tensors

    def pin(self, address: int, size_bytes: int) -> None:
        """Note memory as pinned."""
        self._pinned[address] = size_bytes

    def unpin(self, address: int) -> None:
        """Note memory as pinned no more."""
        if self._under_way:
            self.errors.append("memory is unpinned while copies are under way")
        del self._pinned[address]

    def host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return pinned memory, ``[count]``."""
        memory = torch.empty(count, dtype=dtype)
        self.pin(memory.data_ptr(), memory.nbytes)
        return memory

    def fetch(self, host: torch.Tensor, source: torch.Tensor) -> FakeCopy:
        """Begin a copy from the device."""
        return self._begin("fetch", host, source, host)

    def store(self, target: torch.Tensor, host: torch.Tensor) -> FakeCopy:
        """Begin a copy to the device."""
        return self._begin("store", target, host, host)

    def _begin(self, way: str, target: torch.Tensor, source: torch.Tensor, host: torch.Tensor) -> FakeCopy:
        copy = FakeCopy(way, target, source)
        with self._lock:
            first, last = _span(host)
            if host.numel() and not any(at <= first and last <= at + size for at, size in self._pinned.items()):
                self.errors.append(f"a {way} of host memory that is not pinned")
            for other in self._under_way:
                if (
                    _touch(copy.target, other.target)
                    or _touch(copy.target, other.source)
                    or _touch(copy.source, other.target)
                ):
                    self.errors.append(f"a {way} touches memory of a {other.way} under way")
            self.overlaps += any(other.way != way for other in self._under_way)
            self.num_copies += 1
            self._under_way.append(copy)
        target.view(torch.uint8).fill_(0xA5)
        self._queues[way].put(copy)
        return copy

    def _serve(self, queue: SimpleQueue[FakeCopy]) -> None:
        while True:
            copy = queue.get()
            time.sleep(self._random.random() * self._delay_s)
            copy.target.copy_(copy.source)
            with self._lock:
                self._under_way.remove(copy)
            copy.done.set()


class FakeCopy:
    """A copy under way."""

    def __init__(self, way: str, target: torch.Tensor, source: torch.Tensor) -> None:
        self.way, self.target, self.source = way, target, source
        self.done = threading.Event()

    def wait(self) -> None:
        """Block until it is done."""
        self.done.wait()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _touch(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b
