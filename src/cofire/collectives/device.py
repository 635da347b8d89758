"""Sums of tensors on accelerators: copied to shared memory and back in chunks, beside the sums of other chunks.

HFReduce (Fire-Flyer, arXiv 2408.14158, IV-A) takes gradients from device to host by asynchronous copies, adds them
there, and copies the result back. A :class:`DeviceLayer` is what that needs of an accelerator; :class:`CudaLayer` is
PyTorch's CUDA, with one stream for each direction, so that copies share neither a stream with the program's kernels nor
with each other. ``cofire.testing.fake_device`` is one without hardware. Left out: GDRCopy, and copies of one rank for
its neighbours (Fire-Flyer's devices share a PCIe slot of their own each).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from cofire.collectives.shm import Collective, Kind, Segment
from cofire.errors import CollectiveError

# Copies whose end is waited for late, so that the stream always has another one.
_COPIES_AHEAD = 2


class Ticket(Protocol):
    """Something that an accelerator has been told to do."""

    def wait(self) -> None:
        """Block until it is done; from any thread."""
        ...


class DeviceLayer(Protocol):
    """What the engine needs of an accelerator. Copies of one direction end in the order in which they were begun."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies on it."""
        ...

    def pin(self, address: int, size_bytes: int) -> None:
        """Make host memory fit for asynchronous copies."""
        ...

    def unpin(self, address: int) -> None:
        """Undo :meth:`pin`."""
        ...

    def host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return pinned host memory, ``[count]``."""
        ...

    def fetch(self, host: torch.Tensor, source: torch.Tensor) -> Ticket:
        """Begin to copy from the device into pinned host memory of the same size; both ``[count]``."""
        ...

    def store(self, target: torch.Tensor, host: torch.Tensor) -> Ticket:
        """Begin to copy from pinned host memory to the device; both ``[count]``."""
        ...


class CudaLayer:
    """PyTorch's CUDA devices."""

    def __init__(self) -> None:
        """Make the streams of a device when it is first used."""
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on a CUDA device."""
        return tensor.is_cuda

    def pin(self, address: int, size_bytes: int) -> None:
        """Register memory with the driver.

        Raises:
            CollectiveError: The driver refuses.
        """
        portable = 1
        code = int(_runtime().cudaHostRegister(address, size_bytes, portable))
        if code:
            raise CollectiveError(
                f"CUDA cannot pin {size_bytes:,} bytes of shared memory (error {code}); see ulimit -l, "
                f"or take a smaller chunk_bytes or num_slots"
            )

    def unpin(self, address: int) -> None:
        """Take memory from the driver; at the end of a process it may be gone already."""
        _runtime().cudaHostUnregister(address)

    def host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of PyTorch's pinned pool, which keeps it for the next call."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def fetch(self, host: torch.Tensor, source: torch.Tensor) -> Ticket:
        """Copy on the stream from the device."""
        return self._copy(host, source, self._device_streams(source.device)[0])

    def store(self, target: torch.Tensor, host: torch.Tensor) -> Ticket:
        """Copy on the stream to the device."""
        return self._copy(target, host, self._device_streams(target.device)[1])

    def _device_streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> Ticket:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            # Blocking: who waits must leave the core to those who add.
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
        return _CudaTicket(event)


def _runtime() -> Any:
    """Return PyTorch's own binding of the CUDA runtime."""
    return torch.cuda.cudart()


class _CudaTicket:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def reduce_from_device(layer: DeviceLayer, segment: Segment, call: Collective, flat: torch.Tensor, takes: bool) -> None:
    """Take part in an all_reduce or reduce inside the node with a tensor on a device; blocks.

    Chunk i comes from the device while earlier chunks are added, and still earlier ones go back.

    Args:
        layer: Of the device; the segment's memory is pinned.
        segment: Of the node.
        call: What; all ranks of the node have their data on devices.
        flat: Contiguous, ``[count]``, and ready.
        takes: Whether the result goes back into ``flat``.

    Raises:
        CollectiveError: Ranks disagree, or one is late or gone.
    """
    if call.kind not in (Kind.ALL_REDUCE, Kind.REDUCE):
        raise AssertionError(f"{call.kind.name} does not add")
    work = segment.begin(call, flat.dtype)
    num_slots = segment.layout.num_slots
    # Iterations by which a chunk's phases follow the first; the last has to be over before its slot comes round.
    ends_after = num_slots - 1
    taken_after = ends_after - min(_COPIES_AHEAD, (num_slots - 1) // 3)
    arrived_after = min(_COPIES_AHEAD, max(1, taken_after // 2))
    arriving: dict[int, Ticket] = {}
    leaving: dict[int, Ticket] = {}
    try:
        for i in range(work.num_chunks + ends_after):
            if i < work.num_chunks:
                work.wait_free(i)
                arriving[i] = layer.fetch(work.slot(i), work.part(flat, i))
            if 0 <= (chunk := i - arrived_after) < work.num_chunks:
                arriving.pop(chunk).wait()
                work.publish(chunk)
                work.combine(chunk)
            if 0 <= (chunk := i - taken_after) < work.num_chunks:
                work.wait_result(chunk)
                if takes:
                    leaving[chunk] = layer.store(work.part(flat, chunk), work.result(chunk))
            if 0 <= (chunk := i - ends_after) < work.num_chunks:
                if takes:
                    leaving.pop(chunk).wait()
                work.consume(chunk)
        work.end()
    finally:
        # After a failure the memory may go away; no copy may still be on its way then.
        for ticket in (*arriving.values(), *leaving.values()):
            ticket.wait()


class DeviceChunks:
    """A tensor on a device as the chunks of an exchange between nodes, where a node has one rank."""

    def __init__(self, layer: DeviceLayer, flat: torch.Tensor, chunk_count: int, takes: bool) -> None:
        """Begin to copy all of it into pinned memory, chunk by chunk.

        Args:
            layer: Of the device.
            flat: Contiguous, ``[count]``, and ready.
            chunk_count: Elements of a chunk.
            takes: Whether the result goes back into ``flat``.
        """
        self.num_chunks = self.num_slots = -(-flat.numel() // chunk_count)
        self._layer, self._takes = layer, takes
        self._device = list(flat.split(chunk_count))
        self._host = list(layer.host_memory(flat.numel(), flat.dtype).split(chunk_count))
        self._arriving = [layer.fetch(h, d) for h, d in zip(self._host, self._device, strict=True)]
        self._leaving: list[Ticket] = []

    def buffer(self, chunk: int) -> torch.Tensor:
        """Return the chunk's pinned memory."""
        return self._host[chunk]

    def wait_reduced(self, chunk: int) -> None:
        """Wait until it has come from the device."""
        self._arriving[chunk].wait()

    def publish(self, chunk: int) -> None:
        """Begin to copy the result to the device."""
        if self._takes:
            self._leaving.append(self._layer.store(self._device[chunk], self._host[chunk]))

    def mark_sent(self, chunk: int) -> None:
        """Do nothing: each chunk has its own memory."""

    def drain(self) -> None:
        """Wait for all copies; the host memory may be used again then."""
        for ticket in (*self._arriving, *self._leaving):
            ticket.wait()
