"""Memory that the ranks of one node share, and the native core that works on it.

Only this module imports ``_native``. The segment is a file in ``/dev/shm`` that has no name any more once every rank
has mapped it, so that nothing stays behind however the ranks end (Fire-Flyer, arXiv 2408.14158, IV-A: the part of
HFReduce inside a node). Left out: NUMA placement, and systems other than Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from cofire.collectives.elements import Element, Isa, Op, element_of
from cofire.errors import CollectiveError

try:
    from cofire.collectives import _native
except ImportError as error:  # pragma: no cover - a broken installation
    raise CollectiveError(
        f"the native core does not load ({error}); install Cofire again where a C++20 compiler is: pip install cofire"
    ) from None

SHARED_FOLDER = Path("/dev/shm")
_PAGE = 4096
_NAME = re.compile(r"cofire-(?P<namespace>\d+)-(?P<pid>\d+)-(?P<start>\d+)-\w+")


class Kind(IntEnum):
    """What a segment can do between its ranks; the numbers are those of ``csrc/segment/segment.h``."""

    BARRIER = 0
    ALL_REDUCE = 1
    REDUCE = 2
    BROADCAST = 3
    REDUCE_SCATTER = 4
    ALL_GATHER = 5


@dataclass(frozen=True)
class SegmentLayout:
    """Sizes of a segment.

    Attributes:
        slot_bytes: Of a chunk at most; rounded up to whole pages.
        num_slots: Chunks on their way at once, per rank and lane.
        num_lanes: Threads of a rank that work side by side at most.
    """

    slot_bytes: int = 256 << 10
    num_slots: int = 4
    num_lanes: int = 1

    def total_bytes(self, num_ranks: int) -> int:
        """Return the length of the file."""
        return _native.Segment.total_bytes(num_ranks, self.num_lanes, self.num_slots, self.page_bytes)

    @property
    def page_bytes(self) -> int:
        """``slot_bytes`` in whole pages."""
        return -(-self.slot_bytes // _PAGE) * _PAGE


@dataclass(frozen=True)
class Collective:
    """One collective inside a node, as every rank states it.

    Attributes:
        kind: What.
        count: Elements that each rank gives (all_gather), gets (reduce_scatter), or both.
        op: For reductions.
        divisor: For ``Op.AVERAGE``.
        root: Local rank, for reduce and broadcast; -1: on another node.
        timeout_s: From the call on.
        chunk_bytes: Not more than a slot; 0: a slot.
        num_lanes: Threads, not more than the layout's.
        between_nodes: The result is what :meth:`Segment.mark_exchanged` announces.
        sends: This process sends result slots, and says :meth:`Segment.mark_sent` of each.
        stepped: It is done by :meth:`Segment.begin`; an all_reduce or reduce with one lane.
    """

    kind: Kind
    count: int = 0
    op: Op = Op.SUM
    divisor: float = 1.0
    root: int = 0
    timeout_s: float = 1800.0
    chunk_bytes: int = 0
    num_lanes: int = 1
    between_nodes: bool = False
    sends: bool = False
    stepped: bool = False


def reduce_into(
    target: torch.Tensor, sources: Sequence[torch.Tensor], op: Op, divisor: float = 1.0, isa: Isa | None = None
) -> None:
    """Write the sources' sum, or another operation's result, into a tensor.

    Accumulates in the order of the sources, fp32 for types of 32 bits or less, and rounds once; see ``reference.py``.

    Args:
        target: Contiguous CPU tensor; may be one of the sources.
        sources: One or more, of the same type and number of elements.
        op: What to do.
        divisor: Of the result, where ``op`` is ``Op.AVERAGE``.
        isa: Instruction set; none: the widest that this processor has.

    Raises:
        CollectiveError: Types, sizes or memory formats differ, or the type has no such operation.
    """
    element, count = element_of(target.dtype), target.numel()
    for tensor in (target, *sources):
        if tensor.dtype != target.dtype or tensor.numel() != count:
            raise CollectiveError(
                f"{tensor.numel()} of {tensor.dtype} do not add to {count} of {target.dtype}; all must be alike"
            )
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise CollectiveError("a tensor is not contiguous or not on the CPU; take tensor.cpu().contiguous()")
    check_operation(element, op)
    if not sources:
        raise CollectiveError("nothing to reduce; give 1 source or more")
    chosen = Isa(_native.best_isa()) if isa is None else isa
    _native.reduce(chosen, element, op, target.data_ptr(), [t.data_ptr() for t in sources], count, divisor)


def check_operation(element: Element, op: Op) -> None:
    """Raise if a type has no such operation.

    Raises:
        CollectiveError: Bits of numbers that are not whole.
    """
    if not _native.is_supported(element, op):
        raise CollectiveError(f"{op.name} of {element.name} is not defined; bitwise operations need I32 or I64")


class Segment:
    """The part of one rank in the shared memory of its node. All ranks of the node make the same calls in one order."""

    def __init__(
        self, path: Path, rank: int, names: Sequence[int], layout: SegmentLayout, create: bool, spin_s: float
    ) -> None:
        """Create the file, or open it, and map it.

        Args:
            path: From :func:`new_segment_path`, the same for all ranks of the node.
            rank: Among the ranks of the node, from 0.
            names: By which messages call the ranks: their numbers in the group.
            layout: The same for all.
            create: For one rank, before the others.
            spin_s: How long to look at a flag before sleeping.

        Raises:
            CollectiveError: The file cannot be made, opened or mapped.
        """
        self.layout, self.num_ranks, self.rank = layout, len(names), rank
        total = layout.total_bytes(len(names))
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            file = os.open(path, flags, 0o600)
        except OSError as error:
            raise CollectiveError(f"cannot open shared memory {path}: {error.strerror}; is /dev/shm there?") from None
        try:
            if create:
                # Not only its length: a full /dev/shm must fail here and not in the middle of a sum.
                os.posix_fallocate(file, 0, total)
            self._native = _native.Segment(
                file, rank, layout.num_lanes, layout.num_slots, layout.page_bytes, list(names), spin_s
            )
        except (OSError, RuntimeError, ValueError) as error:
            os.close(file)
            if create:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise CollectiveError(
                    f"/dev/shm has no room for {total:,} bytes; make it larger, or take a smaller chunk_bytes"
                ) from None
            raise CollectiveError(f"cannot map shared memory {path}: {error}") from None

    def run(
        self, call: Collective, input_tensor: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> None:
        """Take part in a collective inside the node; blocks, with the GIL released.

        Args:
            call: What; a barrier takes no tensors.
            input_tensor: Contiguous CPU tensor that is read.
            output: Contiguous CPU tensor that is written; may be the input.

        Raises:
            CollectiveError: Ranks disagree, or one is late or gone; the segment is of no use any more.
        """
        tensor = output if output is not None else input_tensor
        element = Element.F32 if tensor is None else element_of(tensor.dtype)
        given = 0 if input_tensor is None else input_tensor.data_ptr()
        taken = 0 if output is None else output.data_ptr()
        with _failures():
            self._native.run(_native_call(call, element, given, taken))

    def begin(self, call: Collective, dtype: torch.dtype) -> SteppedSum:
        """Begin an all_reduce or reduce whose data the caller moves into slots and out of them.

        Raises:
            CollectiveError: The segment is of no use any more.
        """
        return SteppedSum(self, self._native, call, dtype)

    @property
    def memory(self) -> tuple[int, int]:
        """Address and bytes of the mapping."""
        return self._native.memory, self.layout.total_bytes(self.num_ranks)

    def wait_reduced(self, chunk: int, timeout_s: float) -> None:
        """Wait until all ranks of the node have reduced their part of a chunk of the collective under way.

        Raises:
            CollectiveError: A rank is late or gone.
        """
        with _failures():
            self._native.wait_reduced(chunk, timeout_s)

    def mark_exchanged(self, chunk: int) -> None:
        """Say that a chunk's result slot holds the result over all nodes."""
        self._native.mark_exchanged(chunk)

    def mark_sent(self, chunk: int) -> None:
        """Say that a chunk's result slot was sent, so that it may be written again."""
        self._native.mark_sent(chunk)

    def result(self, chunk: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return the result slot of a chunk of the collective under way, ``[count]``; valid while the segment is."""
        address = self._native.result(self._native.first_step + chunk)
        return tensor_at(address, dtype, count)

    def abort(self, message: str) -> None:
        """Make all ranks of the node raise, with this message unless there is one already."""
        self._native.abort(message)

    @property
    def failure(self) -> str | None:
        """Why the segment is of no use any more."""
        return self._native.abort_message if self._native.aborted else None


class SteppedSum:
    """A sum inside a node, chunk by chunk, whose data something else than the core's copies moves.

    For each chunk in ascending order: :meth:`wait_free`, then fill :meth:`slot`; :meth:`publish`; :meth:`combine`;
    :meth:`wait_result`, then fetch :meth:`result`; :meth:`consume`. At last :meth:`end`. Phases of different chunks may
    be interleaved, as long as no more than the layout's slots are between the first and the last of them.

    Attributes:
        num_chunks: One or more.
    """

    def __init__(self, segment: Segment, native: Any, call: Collective, dtype: torch.dtype) -> None:
        """Begin; see :meth:`Segment.begin`."""
        self._segment, self._native, self._call, self._dtype = segment, native, call, dtype
        slot_bytes = segment.layout.page_bytes
        chunk_bytes = min(call.chunk_bytes, slot_bytes) if call.chunk_bytes else slot_bytes
        self._chunk_count = chunk_bytes // 64 * 64 // dtype.itemsize
        self.num_chunks = max(1, -(-call.count // self._chunk_count))
        address, _ = segment.memory  # no data of the call's own
        self._step = _native_call(replace(call, stepped=True), element_of(dtype), address, address)
        with _failures():
            native.begin(self._step)
        self._first_step = native.first_step

    def count(self, chunk: int) -> int:
        """Return the elements of a chunk."""
        return max(0, min(self._chunk_count, self._call.count - chunk * self._chunk_count))

    def part(self, flat: torch.Tensor, chunk: int) -> torch.Tensor:
        """Return a chunk of the call's own tensor, ``[count]``."""
        return flat.narrow(0, chunk * self._chunk_count, self.count(chunk))

    def slot(self, chunk: int) -> torch.Tensor:
        """Return this rank's slot, ``[count]``."""
        address = self._native.slot(self._first_step + chunk, self._segment.rank)
        return tensor_at(address, self._dtype, self.count(chunk))

    def result(self, chunk: int) -> torch.Tensor:
        """Return the result slot, ``[count]``."""
        return tensor_at(self._native.result(self._first_step + chunk), self._dtype, self.count(chunk))

    def wait_free(self, chunk: int) -> None:
        """Wait until this rank's slot may be written."""
        with _failures():
            self._native.wait_free(self._step, chunk)

    def publish(self, chunk: int) -> None:
        """Say that this rank's data is in its slot."""
        self._native.publish(chunk)

    def combine(self, chunk: int) -> None:
        """Add this rank's part of all ranks' slots, once they are published."""
        with _failures():
            self._native.combine(self._step, chunk, self.count(chunk))

    def wait_result(self, chunk: int) -> None:
        """Wait until the result slot holds the result."""
        with _failures():
            self._native.wait_result(self._step, chunk)

    def consume(self, chunk: int) -> None:
        """Say that this rank needs neither its peers' slots nor the result any more."""
        self._native.consume(self._step, chunk)

    def end(self) -> None:
        """End the call, after the last chunk."""
        with _failures():
            self._native.end(self._step, self.num_chunks)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except _native.CollectiveFailure as error:
        raise CollectiveError(str(error)) from None


def _native_call(call: Collective, element: Element, given: int, taken: int) -> Any:
    return _native.Call(
        call.kind,
        element,
        call.op,
        call.count,
        call.root,
        call.divisor,
        given,
        taken,
        call.timeout_s,
        call.chunk_bytes,
        call.num_lanes,
        call.between_nodes,
        call.sends,
        call.stepped,
    )


def tensor_at(address: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Return a tensor ``[count]`` over memory that somebody else keeps alive."""
    size = count * dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype, count=count)


def new_segment_path() -> Path:
    """Return a name for a new segment, after removing those that dead processes have left.

    A segment has a name only while its ranks come together; who is killed then leaves it. The name says who made it.
    """
    namespace, pid = os.stat("/proc/self/ns/pid").st_ino, os.getpid()
    for path in SHARED_FOLDER.glob("cofire-*"):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match["namespace"]) != namespace:
            continue
        if _start_time(int(match["pid"])) != int(match["start"]):
            with contextlib.suppress(OSError):
                path.unlink()
    return SHARED_FOLDER / f"cofire-{namespace}-{pid}-{_start_time(pid)}-{secrets.token_hex(8)}"


def _start_time(pid: int) -> int:
    """Return when a process began, in ticks since the machine did; 0 if there is none. Tells it from a later one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything; the 22nd field is the 20th after it.
    return int(text.rpartition(")")[2].split()[19])
