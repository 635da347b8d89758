"""Runs a node's program: one thread takes sums up, another takes results down, chunk after chunk.

Fire-Flyer (arXiv 2408.14158, IV-A): reduce and broadcast are separate loops, so that chunks on their way up and down
overlap. Receives are posted a window ahead into buffers that are kept between operations; sends are asynchronous. What
a node adds, it adds in the order of the program when all of it has arrived, so that sums are the same bits on all nodes
and in every run.

Before any data a node and each of its peers exchange a description of the operation. The two threads may be left behind
in a wait that cannot be stopped; whoever waits for them learns at once that the operation has failed. Left out: what
happens inside a node (``shm.py``).
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from cofire.collectives.elements import Element, Op
from cofire.collectives.schedule import BroadcastStep, NodeProgram
from cofire.collectives.shm import Kind, reduce_into
from cofire.collectives.transport import FailureBoard, Pending, Transport
from cofire.errors import CollectiveError

# Bytes that a node's peer may send ahead of what the node has dealt with, of each pass.
_WINDOW_BYTES = 4 << 20
_WINDOW_CHUNKS = (2, 16)
# Rounds by which a node sends what it need not wait for before what it must, and takes what it need not send on after.
_ROUNDS_APART = 4

_HEADER = struct.Struct("<8s q i i i i q q d q")
_MAGIC = b"cofire 1"


class ChunkSource(Protocol):
    """The chunks of one operation, as a node's leader sees them.

    ``publish`` and ``mark_sent`` are called for every chunk on every node, in ascending order, one at a time, from any
    thread; the other methods from two threads at once. It keeps the memory of its buffers alive.

    Attributes:
        num_chunks: Of the operation.
        num_slots: Chunks that have memory at the same time: chunk c lies where chunk ``c - num_slots`` did. At least
            two rounds of the program's, and 3; as many as chunks where each has its own.
    """

    num_chunks: int
    num_slots: int

    def buffer(self, chunk: int) -> torch.Tensor:
        """Return ``[count]``, on the CPU: this node's sum of the chunk, later the result; the address never changes."""
        ...

    def wait_reduced(self, chunk: int) -> None:
        """Wait until this node's sum is in the buffer, or, for a broadcast, until it may be written."""
        ...

    def publish(self, chunk: int) -> None:
        """Learn that the buffer holds the result over all nodes (a reduce: that this node's part is done)."""
        ...

    def mark_sent(self, chunk: int) -> None:
        """Learn that the buffer is not being sent any more, so that it may be written again."""
        ...


@dataclass(frozen=True)
class Operation:
    """What all nodes must agree on.

    Attributes:
        sequence: Number of the operation in its group.
        kind: What.
        element: Type.
        op: How to reduce.
        count: Elements.
        root: Rank, where there is one.
        chunk_count: Elements of a chunk; the last may have fewer.
        period: Of the program: tells one algorithm from another.
        divisor: For ``Op.AVERAGE``.
    """

    sequence: int
    kind: Kind
    element: Element
    op: Op
    count: int
    root: int
    chunk_count: int
    period: int
    divisor: float = 1.0

    def pack(self) -> bytes:
        """Return 64 bytes."""
        what = (self.sequence, self.kind, self.element, self.op, self.root)
        return _HEADER.pack(_MAGIC, *what, self.count, self.chunk_count, self.divisor, self.period)

    @classmethod
    def unpack(cls, data: bytes) -> Operation:
        """Return what was packed.

        Raises:
            ValueError: It was not.
        """
        magic, sequence, kind, element, op, root, count, chunk_count, divisor, period = _HEADER.unpack(data)
        if magic != _MAGIC:
            raise ValueError("not a header")
        return cls(sequence, Kind(kind), Element(element), Op(op), count, root, chunk_count, period, divisor)

    def __str__(self) -> str:
        """Return how errors say it."""
        text = f"{self.kind.name.lower()} number {self.sequence} of {self.count} {self.element.name.lower()}"
        if self.kind in (Kind.ALL_REDUCE, Kind.REDUCE, Kind.REDUCE_SCATTER):
            text += f" ({self.op.name.lower()})"
        if self.kind in (Kind.REDUCE, Kind.BROADCAST):
            text += f", root {self.root}"
        return text + f", chunks of {self.chunk_count}"


class _Line:
    """Passes on the numbers of chunks in ascending order, however they come, one at a time."""

    def __init__(self, num_chunks: int, pass_on: Callable[[int], None]) -> None:
        self._come, self._next, self._pass_on, self._lock = bytearray(num_chunks + 1), 0, pass_on, threading.Lock()

    def mark(self, chunk: int) -> None:
        with self._lock:
            self._come[chunk] = 1
            while self._come[self._next]:
                self._pass_on(self._next)
                self._next += 1


class _Sends:
    """Sends under way, of which only so many chunks' may be."""

    def __init__(self, chunks_max: int, mark_sent: Callable[[int], None] | None) -> None:
        self._chunks_max, self._mark_sent = chunks_max, mark_sent
        self._under_way: deque[tuple[int, list[Pending]]] = deque()

    def add(self, chunk: int, sends: list[Pending]) -> None:
        self._under_way.append((chunk, sends))
        if len(self._under_way) > self._chunks_max:
            self._wait_for_first()

    def drain(self) -> None:
        while self._under_way:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        chunk, sends = self._under_way.popleft()
        for send in sends:
            send.wait()
        if self._mark_sent is not None:
            self._mark_sent(chunk)


@dataclass
class _Receive:
    """A chunk that comes from several nodes."""

    tag: int
    peers: tuple[int, ...]
    count: int


class _Staging:
    """Memory for what arrives to be added; kept from one operation to the next."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def slots(self, num_slots: int, per_slot: int, count: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """Return ``num_slots x per_slot`` tensors ``[count]``."""
        size_bytes = count * dtype.itemsize
        self._buffers = [buffer for buffer in self._buffers if buffer.numel() >= size_bytes]
        while len(self._buffers) < num_slots * per_slot:
            self._buffers.append(torch.empty(size_bytes, dtype=torch.uint8))
        views = [buffer[:size_bytes].view(dtype) for buffer in self._buffers[: num_slots * per_slot]]
        return [views[first : first + per_slot] for first in range(0, len(views), per_slot)]


class _Incoming:
    """Receives that are posted ahead, in turn into each slot of the staging memory."""

    def __init__(self, transport: Transport, receives: Iterator[_Receive], slots: list[list[torch.Tensor]]) -> None:
        self._transport, self._receives, self._slots = transport, receives, slots
        self._posted: deque[list[tuple[torch.Tensor, Pending]]] = deque()
        self._num_posted = 0
        for _ in slots:
            self.post()

    def post(self) -> None:
        """Post the next receive into the slot that was taken longest ago."""
        receive = next(self._receives, None)
        if receive is None:
            return
        slot = self._slots[self._num_posted % len(self._slots)]
        self._num_posted += 1
        entry = []
        for peer, tensor in zip(receive.peers, slot, strict=False):
            part = tensor if tensor.numel() == receive.count else tensor[: receive.count]
            entry.append((part, self._transport.post_receive(part, peer, receive.tag)))
        self._posted.append(entry)

    def take(self) -> list[torch.Tensor]:
        """Wait for the chunk that was posted first, and return its tensors."""
        entry = self._posted.popleft()
        for _, pending in entry:
            pending.wait()
        return [tensor for tensor, _ in entry]


class Exchange:
    """An operation under way; see :meth:`NodeExchange.start`."""

    def __init__(
        self,
        program: NodeProgram,
        chunks: ChunkSource,
        operation: Operation,
        transport: Transport,
        staging: _Staging,
        on_failure: Callable[[str], None] | None,
    ) -> None:
        self._program, self._chunks, self._operation = program, chunks, operation
        self._transport, self._staging, self._on_failure = transport, staging, on_failure
        self._lock, self._finished = threading.Lock(), threading.Event()
        self._published = _Line(chunks.num_chunks, chunks.publish)
        self._sent = _Line(chunks.num_chunks, chunks.mark_sent)
        self._num_loops = 2
        chunk_bytes = max(1, operation.chunk_count * operation.element.size_bytes)
        low, high = _WINDOW_CHUNKS
        self._window = max(low, min(high, _WINDOW_BYTES // chunk_bytes))
        # One round is being worked on, one may wait until its last chunk was sent.
        has_all = chunks.num_slots >= chunks.num_chunks
        spare = 2 * _ROUNDS_APART if has_all else max(0, chunks.num_slots // program.period - 2)
        self._ahead, self._behind = min(_ROUNDS_APART, -(-spare // 2)), min(_ROUNDS_APART, spare // 2)
        self._results_max = self._window if has_all else 1
        self.error: str | None = None

    def fail(self, message: str) -> None:
        """End the operation with an error, whatever its threads wait for."""
        with self._lock:
            if self._finished.is_set():
                return
            self.error = message
            self._finished.set()
        if self._on_failure is not None:
            self._on_failure(message)

    def wait(self, timeout_s: float) -> bool:
        """Return whether the operation has ended, well or not, within a time."""
        return self._finished.wait(timeout_s)

    def begin(self, submit: Callable[[Exchange, Callable[[], None]], None]) -> None:
        """Agree with the peers, then go up here and down on the thread that ``submit`` gives work to."""
        self._agree()
        if self._chunks.num_chunks <= 1 or not self._program.broadcast:
            self._up()
            self._end_loop()
            self._down()
        else:
            submit(self, self._down)
            self._up()
            self._end_loop()

    def _end_loop(self) -> None:
        """Count a loop that has ended; the last one ends the operation."""
        with self._lock:
            self._num_loops -= 1
            if self._num_loops == 0:
                self._finished.set()

    def _agree(self) -> None:
        """Exchange headers with all peers; raise if one is about to do something else."""
        transport, mine = self._transport, self._operation.pack()
        ours = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        theirs = [(peer, torch.zeros(_HEADER.size, dtype=torch.uint8)) for peer in self._program.peers]
        under_way = [transport.post_receive(header, peer, 0) for peer, header in theirs]
        under_way += [transport.send(ours, peer, 0) for peer in self._program.peers]
        for pending in under_way:
            pending.wait()
        for peer, header in theirs:
            data = header.numpy().tobytes()
            if data != mine:
                raise CollectiveError(self._disagreement(peer, data))

    def _disagreement(self, peer: int, data: bytes) -> str:
        mine = str(self._operation)
        try:
            other = Operation.unpack(data)
            theirs = str(other)
            if theirs == mine:
                mine += f", {self._operation.period} chunks a round, divided by {self._operation.divisor:g}"
                theirs += f", {other.period} chunks a round, divided by {other.divisor:g}"
        except ValueError:
            theirs = "something else"
        # The lower node first, so that both ends say the same.
        said = [
            f"{self._transport.name(node)} asks for {what}"
            for node, what in sorted([(self._transport.node, mine), (peer, theirs)])
        ]
        return f"nodes disagree: {said[0]}; {said[1]}; call the same collective on all ranks"

    def _tag(self, chunk: int, is_down: int) -> int:
        """Return the tag of a chunk: its way, then its connection.

        Messages of one tag come in the order of sending, and each way's connections take turns. Headers have tag 0.
        """
        connections = self._transport.num_connections
        turn, way = divmod(chunk, self._program.period)
        return (way * 2 + is_down + 1) * connections + turn % connections

    def _up(self) -> None:
        """Add what comes from below to this node's sums and send them up; at the top, send results down."""
        program, chunks, transport = self._program, self._chunks, self._transport
        op, divisor = self._operation.op, self._operation.divisor
        incoming = self._post_below()
        # Whoever gets a result of an all-reduce has sent its sum: its buffer is free before it is received into. A peer
        # may take a sum that was sent rounds ahead only after others, so that waiting for one here could be for ever.
        # In a reduce to a root, a later chunk may need the very buffer that is being sent.
        sums = _Sends(chunks.num_chunks, None) if program.shares else _Sends(1, self._sent.mark)
        results = _Sends(self._results_max, self._sent.mark)
        for chunk, step in program.reduce_steps(chunks.num_chunks, self._ahead):
            chunks.wait_reduced(chunk)
            buffer = chunks.buffer(chunk)
            complete = step.send_to is None
            if step.receive_from:
                reduce_into(buffer, [buffer, *incoming.take()], op, divisor if complete else 1.0)
                incoming.post()
            elif complete and op is Op.AVERAGE and divisor != 1.0:
                reduce_into(buffer, [buffer], op, divisor)
            if step.send_to is not None:
                sums.add(chunk, [transport.send(buffer, step.send_to, self._tag(chunk, 0))])
            if step.send_to is None or not program.shares:
                self._published.mark(chunk)
            if step.send_to is None:
                tag = self._tag(chunk, 1)
                results.add(chunk, [transport.send(buffer, peer, tag) for peer in step.result_to])
        sums.drain()
        results.drain()

    def _post_below(self) -> _Incoming:
        """Post the first receives of sums from below."""
        program, num_chunks = self._program, self._chunks.num_chunks
        most = max((len(step.receive_from) for step in program.reduce), default=0)
        if not most or not num_chunks:
            return _Incoming(self._transport, iter(()), [])
        first = self._chunks.buffer(0)
        slots = self._staging.slots(min(self._window, num_chunks), most, first.numel(), first.dtype)
        receives = (
            _Receive(self._tag(chunk, 0), step.receive_from, self._chunks.buffer(chunk).numel())
            for chunk, step in program.reduce_steps(num_chunks)
            if step.receive_from
        )
        return _Incoming(self._transport, receives, slots)

    def _post_result(
        self,
        posted: dict[int, tuple[torch.Tensor, Pending]],
        following: tuple[int, BroadcastStep],
        later: Iterator[tuple[int, BroadcastStep]],
    ) -> tuple[int, BroadcastStep] | None:
        """Post the receive of a result into its buffer; return the step after it."""
        chunk, step = following
        if not self._program.adds:
            # Nobody waits for a sum of this node before it sends the result, so look for room first.
            self._chunks.wait_reduced(chunk)
        buffer = self._chunks.buffer(chunk)
        posted[chunk] = buffer, self._transport.post_receive(buffer, step.receive_from, self._tag(chunk, 1))
        return next(later, None)

    def _down(self) -> None:
        """Receive results into their buffers and send them on."""
        program, chunks, transport = self._program, self._chunks, self._transport
        # Posted round by round, as they are sent, whenever they are taken: else a peer that waits until its send is
        # taken could wait for this node, and this node for the peer.
        later = program.broadcast_steps(chunks.num_chunks)
        # A broadcast's buffer is free when an earlier chunk is through, which may need what is posted here.
        rounds_posted = max(2, self._window // program.period) if program.adds else 2
        posted: dict[int, tuple[torch.Tensor, Pending]] = {}
        sends = _Sends(self._results_max, self._sent.mark)
        following, reached = next(later, None), -1
        for taken in (None, *program.broadcast_steps(chunks.num_chunks, self._behind)):
            if taken is not None:
                chunk, step = taken
                buffer, pending = posted.pop(chunk)
                pending.wait()
                self._published.mark(chunk)
                tag = self._tag(chunk, 1)
                sends.add(chunk, [transport.send(buffer, peer, tag) for peer in step.send_to])
                reached = max(reached, chunk // program.period)
            while following is not None and following[0] // program.period <= reached + rounds_posted:
                following = self._post_result(posted, following, later)
        sends.drain()
        self._end_loop()


_Work = tuple[Exchange, Callable[[], None]]


class NodeExchange:
    """One node's side of all operations of a group, one at a time; after a failure every further one raises."""

    def __init__(self, transport: Transport, board: FailureBoard) -> None:
        """Start the two threads.

        Args:
            transport: To the other nodes.
            board: Of the group.
        """
        self._transport, self._board = transport, board
        self._staging = _Staging()
        self._failure: str | None = None
        self._work: tuple[SimpleQueue[_Work | None], ...] = (SimpleQueue(), SimpleQueue())
        self._threads = [
            threading.Thread(target=self._serve, args=(queue,), name=f"cofire-nodes-{way}", daemon=True)
            for way, queue in zip(("up", "down"), self._work, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def start(
        self,
        program: NodeProgram,
        chunks: ChunkSource,
        operation: Operation,
        on_failure: Callable[[str], None] | None = None,
    ) -> Exchange:
        """Begin an operation; :meth:`finish` must follow.

        Args:
            program: What this node does.
            chunks: On what.
            operation: What all nodes must agree on.
            on_failure: Called once with the message if the operation fails, from any thread.

        Raises:
            CollectiveError: The group has failed before.
        """
        if self._failure is not None:
            raise CollectiveError(f"this group failed before: {self._failure}; make a new one")
        self._transport.doing = operation.kind.name.lower()
        exchange = Exchange(program, chunks, operation, self._transport, self._staging, on_failure)
        self._board.begin(time.monotonic(), exchange.fail)
        self._work[0].put((exchange, lambda: exchange.begin(self._submit_down)))
        return exchange

    def finish(self, exchange: Exchange, deadline_s: float) -> None:
        """Wait until an operation has ended.

        Args:
            exchange: From :meth:`start`.
            deadline_s: By ``time.monotonic``.

        Raises:
            CollectiveError: It failed, here or elsewhere, or the time is over.
        """
        if not exchange.wait(max(0.0, deadline_s - time.monotonic())):
            exchange.fail(self._board.post(self._late()))
        self._board.end()
        if exchange.error is not None:
            self._failure = exchange.error
            raise CollectiveError(exchange.error)

    def run(self, program: NodeProgram, chunks: ChunkSource, operation: Operation, deadline_s: float) -> None:
        """Begin an operation and wait until it has ended; see :meth:`start` and :meth:`finish`.

        Raises:
            CollectiveError: It failed, here or elsewhere, or the time is over.
        """
        self.finish(self.start(program, chunks, operation), deadline_s)

    def close(self) -> None:
        """Let threads and connections go; a thread that still waits ends with its wait."""
        self._failure = self._failure or "the group was closed"
        for queue in self._work:
            queue.put(None)
        self._board.close()
        self._transport.close()

    def _submit_down(self, exchange: Exchange, loop: Callable[[], None]) -> None:
        self._work[1].put((exchange, loop))

    def _late(self) -> str:
        """Return whom the threads wait for when the time is over."""
        transport = self._transport
        last = {transport.waits_for.get(thread.ident or 0) for thread in self._threads} - {None}
        names = " and ".join(transport.name(node) for node in sorted(node for node in last if node is not None))
        return (
            f"{transport.doing} did not end within the timeout on {transport.name(transport.node)}, "
            f"which waits for {names or 'its own ranks'}; see what they do, or raise the timeout"
        )

    def _serve(self, queue: SimpleQueue[_Work | None]) -> None:
        """Do what comes, until there is nothing more to come or something failed."""
        while (work := queue.get()) is not None:
            exchange, loop = work
            try:
                loop()
            except Exception as error:
                # Whatever it is, the caller must hear of it; a fault of ours is told from a user's by its type.
                said = str(error) if isinstance(error, CollectiveError) else f"{type(error).__name__}: {error}"
                exchange.fail(self._board.post((said.splitlines() or [""])[0]))
                return
            del work, exchange, loop
