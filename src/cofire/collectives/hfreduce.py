"""The engine of one group of ranks: HFReduce inside the nodes and between them.

Fire-Flyer (arXiv 2408.14158, IV-A): the ranks of a node add their data in shared memory, chunk by chunk; one rank of
each node, the leader, takes the node's sum through the other nodes and back, while later chunks are added; every rank
copies the result out. One collective at a time, on the thread that calls; ``backend.py`` makes it asynchronous.

The result is the same bits on all ranks and in every run on the same nodes: ranks of a node are added in their order,
nodes in the order of the schedule, each with fp32 (or wider) accumulation and one rounding per hop.

Left out: reduce_scatter and all_gather between nodes, which torch.distributed's own backends do as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store

from cofire.collectives.between_nodes import ChunkSource, Exchange, NodeExchange, Operation
from cofire.collectives.device import CudaLayer, DeviceChunks, DeviceLayer, reduce_from_device
from cofire.collectives.elements import Op, element_of, find_element
from cofire.collectives.options import HFReduceOptions
from cofire.collectives.schedule import NodeProgram, all_reduce_program, choose_algorithm, rooted_program
from cofire.collectives.shm import Collective, Kind, Segment, SegmentLayout, check_operation, new_segment_path
from cofire.collectives.transport import FailureBoard, Transport
from cofire.collectives.tuning import available_cores, choose, load_calibration
from cofire.errors import CollectiveError

_SPIN_S = 50e-6
# Below this, starting threads costs more than they save.
_LANES_FROM_BYTES = 1 << 20
# Sizes are chosen for data that no cache holds.
_CHOICE_BYTES = 64 << 20
# Copies from and to a device: each costs some microseconds to begin.
_DEVICE_CHUNK_BYTES, _DEVICE_SLOTS = 1 << 20, 8
# Between nodes: chunks, and what the choice of an algorithm takes for the network; the same on all ranks.
_CHUNK_BYTES = 256 << 10
_LEAST_CHUNK_BYTES = 16 << 10
_SLOTS_BETWEEN_NODES = 16
_WIRE_BYTES_PER_S = 1.25e9
_WIRE_LATENCY_S = 50e-6
# Each of the engine's own collectives, and whether it works between nodes too.
_KINDS = {
    "all_reduce": True,
    "reduce": True,
    "broadcast": True,
    "barrier": True,
    "reduce_scatter": False,
    "all_gather": False,
}


@dataclass(frozen=True)
class Placement:
    """Which ranks share a node, as one rank sees it.

    Attributes:
        nodes: Ranks of each node in ascending order; nodes in the order of their first ranks.
        node: This rank's.
        rank_in_node: This rank's place among its node's.
        hosts: Name of each node.
        zones: Network zone of each node; none where it is not said.
    """

    nodes: tuple[tuple[int, ...], ...]
    node: int
    rank_in_node: int
    hosts: tuple[str, ...]
    zones: tuple[str | None, ...]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Ranks of this node, this one included."""
        return self.nodes[self.node]

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.rank_in_node == 0

    def find(self, rank: int) -> tuple[int, int]:
        """Return the node of a rank and its place there."""
        for number, ranks in enumerate(self.nodes):
            if rank in ranks:
                return number, ranks.index(rank)
        raise CollectiveError(f"rank {rank} is not in this group of {sum(map(len, self.nodes))}")


def this_host() -> str:
    """Return a name that processes share if they share memory: this boot of the kernel, and its ``/dev/shm``."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot[:8]}/{os.stat('/dev/shm').st_dev}"


def find_placement(store: Store, rank: int, world_size: int, options: HFReduceOptions) -> Placement:
    """Let all ranks of a group tell each other where they are.

    Args:
        store: That all ranks share, for this group alone.
        rank: This one.
        world_size: Ranks.
        options: ``host`` and ``zone``.

    Raises:
        CollectiveError: A rank does not come, or the ranks of one node name different zones.
    """
    store.set(f"host/{rank}", f"{options.host or this_host()}\n{options.zone or ''}")
    try:
        said = store.multi_get([f"host/{other}" for other in range(world_size)])
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(f"not all {world_size} ranks came together: {first_line(error)}") from None
    where: dict[str, list[int]] = {}
    zones: dict[str, str] = {}
    for other, text in enumerate(said):
        host, _, zone = bytes(text).decode().partition("\n")
        where.setdefault(host, []).append(other)
        if zones.setdefault(host, zone) != zone:
            raise CollectiveError(f"rank {other} says zone {zone!r}, others of {host} {zones[host]!r}; set COFIRE_ZONE")
    nodes = tuple(tuple(ranks) for ranks in where.values())
    node = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    return Placement(nodes, node, nodes[node].index(rank), tuple(where), tuple(zones[host] or None for host in where))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Leader:
    """What a node's leader has of the other nodes."""

    exchange: NodeExchange
    board: FailureBoard


class TensorChunks:
    """A tensor as the chunks of an exchange, where a node has one rank or the leader alone moves data."""

    def __init__(self, flat: torch.Tensor, chunk_count: int) -> None:
        self.num_chunks = self.num_slots = -(-flat.numel() // chunk_count)
        self._chunks = list(flat.split(chunk_count))

    def buffer(self, chunk: int) -> torch.Tensor:
        """Return a part of the tensor."""
        return self._chunks[chunk]

    def wait_reduced(self, chunk: int) -> None:
        """Return: the rank's data is the node's sum."""

    def publish(self, chunk: int) -> None:
        """Do nothing: the result is in its place."""

    def mark_sent(self, chunk: int) -> None:
        """Do nothing: each chunk has its own memory."""


class SegmentChunks:
    """The result slots of a node's segment as the chunks of an exchange."""

    def __init__(self, segment: Segment, flat: torch.Tensor, chunk_count: int, timeout_s: float) -> None:
        self.num_chunks = -(-flat.numel() // chunk_count)
        self.num_slots = segment.layout.num_slots
        self._segment, self._dtype = segment, flat.dtype
        self._total, self._chunk_count, self._timeout_s = flat.numel(), chunk_count, timeout_s

    def buffer(self, chunk: int) -> torch.Tensor:
        """Return the chunk's result slot."""
        count = min(self._chunk_count, self._total - chunk * self._chunk_count)
        return self._segment.result(chunk, self._dtype, count)

    def wait_reduced(self, chunk: int) -> None:
        """Wait for all ranks of the node."""
        self._segment.wait_reduced(chunk, self._timeout_s)

    def publish(self, chunk: int) -> None:
        """Let the ranks of the node copy the result."""
        self._segment.mark_exchanged(chunk)

    def mark_sent(self, chunk: int) -> None:
        """Let the ranks of the node write the slot again."""
        self._segment.mark_sent(chunk)


class HFReduce:
    """One rank's engine. Each method blocks; after a failure every further call raises at once.

    Attributes:
        placement: Which ranks share a node.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        options: HFReduceOptions | None = None,
        device: DeviceLayer | None = None,
    ) -> None:
        """Meet the other ranks; all of them make the engine at the same time.

        Args:
            store: That all ranks share, for this group alone.
            rank: This one's number in the group.
            world_size: Ranks of the group.
            timeout_s: For this, and for each collective.
            options: None: what the environment says.
            device: Of the tensors that are not on the CPU; none: CUDA, where there is a device.

        Raises:
            CollectiveError: A rank does not come, or shared memory cannot be had.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.options = options or HFReduceOptions.from_environment()
        self._device = device or (CudaLayer() if torch.cuda.is_available() else None)
        self._failure: str | None = None
        self._chunk_bytes = 0
        self._is_pinned = False
        self.placement = find_placement(store, rank, world_size, self.options)
        self._segment = self._share_memory(store) if len(self.placement.neighbours) > 1 else None
        self._nodes = self._connect_nodes(store) if len(self.placement.nodes) > 1 and self.placement.is_leader else None
        self._num_calls = 0
        self._programs: dict[tuple[str, int], NodeProgram] = {}

    def _share_memory(self, store: Store) -> Segment:
        """Make the node's segment or map it; its name is gone when all have."""
        here, cores, local = self.placement, available_cores(), len(self.placement.neighbours)
        if len(here.nodes) > 1:
            layout = SegmentLayout(self.options.chunk_bytes or _CHUNK_BYTES, self._most_slots(), 1)
        else:
            self._chunk_bytes, layout = self._choose(store, local, cores)
        spin_s = (_SPIN_S if local <= cores else 0.0) if self.options.spin_us is None else self.options.spin_us * 1e-6
        key = f"segment/{here.node}"
        if here.is_leader:
            path = new_segment_path()
            segment = Segment(path, 0, here.neighbours, layout, True, spin_s)
            store.set(key, str(path))
        else:
            path = Path(bytes(store.get(key)).decode())
            segment = Segment(path, here.rank_in_node, here.neighbours, layout, False, spin_s)
        try:
            segment.run(Collective(Kind.BARRIER, timeout_s=self.timeout_s))
        finally:
            if here.is_leader:
                path.unlink(missing_ok=True)
        return segment

    def _choose(self, store: Store, num_ranks: int, cores: int) -> tuple[int, SegmentLayout]:
        """Return the bytes of a chunk in memory, and the segment's sizes: rank 0's, since calibrations may differ."""
        if self.rank == 0:
            options = self.options
            choice = choose(
                num_ranks,
                cores,
                _CHOICE_BYTES,
                load_calibration(),
                chunk_bytes=options.chunk_bytes,
                num_threads=options.num_threads,
            )
            # The model has one cache; measured, chunks that leave a core's second level are slower than it says.
            chunk_bytes = options.chunk_bytes or min(choice.chunk_bytes, _CHUNK_BYTES)
            slot_bytes, num_slots = chunk_bytes, options.num_slots or 4
            if self._device is not None:
                slot_bytes, num_slots = options.chunk_bytes or _DEVICE_CHUNK_BYTES, options.num_slots or _DEVICE_SLOTS
            store.set("choice", f"{chunk_bytes} {slot_bytes} {num_slots} {choice.num_threads}")
        chunk_bytes, *sizes = map(int, bytes(store.get("choice")).split())
        return chunk_bytes, SegmentLayout(*sizes)

    def _connect_nodes(self, store: Store) -> Leader:
        """Connect this leader with the other nodes'."""
        here = self.placement
        transport = Transport.connect(
            PrefixStore("leaders", store),
            here.node,
            len(here.nodes),
            self.timeout_s,
            here.hosts,
            self.options.num_connections,
            self.options.interface,
        )
        return Leader(NodeExchange(transport, board := FailureBoard(PrefixStore("board", store))), board)

    def supports(self, kind: str, dtype: torch.dtype | None = None) -> bool:
        """Return whether the engine does a collective for a type; what it does not is for another backend."""
        if not _KINDS.get(kind, False) and len(self.placement.nodes) > 1:
            return False
        return kind in _KINDS and (dtype is None or find_element(dtype) is not None)

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Return whether :meth:`all_reduce` and :meth:`reduce` take a tensor on its device as it lies there."""
        return self._device is not None and tensor.is_contiguous() and self._device.holds(tensor)

    def all_reduce(self, tensor: torch.Tensor, op: Op = Op.SUM) -> None:
        """Reduce a contiguous tensor of any shape in place, over all ranks; on the CPU, or one that :meth:`reaches`.

        All kernels that write a device's tensor have to be done.

        Raises:
            CollectiveError: Ranks disagree, or one is late or gone.
        """
        check_operation(element_of(tensor.dtype), op)
        self._run(Kind.ALL_REDUCE, tensor, tensor, tensor.numel(), op=op)

    def reduce(self, tensor: torch.Tensor, root: int, op: Op = Op.SUM) -> None:
        """Reduce into the tensor of rank ``root``; the others keep theirs.

        Raises:
            CollectiveError: Ranks disagree, or one is late or gone.
        """
        check_operation(element_of(tensor.dtype), op)
        self._run(Kind.REDUCE, tensor, tensor, tensor.numel(), op=op, root=root)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Write the tensor of rank ``root`` into all others.

        Raises:
            CollectiveError: Ranks disagree, or one is late or gone.
        """
        self._run(Kind.BROADCAST, tensor, tensor, tensor.numel(), root=root)

    def reduce_scatter(self, output: torch.Tensor, input_tensor: torch.Tensor, op: Op = Op.SUM) -> None:
        """Reduce ``[world_size, ...]`` over all ranks and keep this rank's row.

        Raises:
            CollectiveError: The input is not ``world_size`` outputs; ranks disagree, or one is late or gone.
        """
        check_operation(element_of(output.dtype), op)
        self._check_rows(input_tensor, output)
        self._run(Kind.REDUCE_SCATTER, input_tensor, output, output.numel(), op=op)

    def all_gather(self, output: torch.Tensor, input_tensor: torch.Tensor) -> None:
        """Write the inputs of all ranks into ``[world_size, ...]``, in the order of the ranks.

        Raises:
            CollectiveError: The output is not ``world_size`` inputs; ranks disagree, or one is late or gone.
        """
        self._check_rows(output, input_tensor)
        self._run(Kind.ALL_GATHER, input_tensor, output, input_tensor.numel())

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            CollectiveError: One is late or gone.
        """
        if len(self.placement.nodes) > 1:
            self.all_reduce(torch.zeros(1, dtype=torch.int32))
        else:
            self._run(Kind.BARRIER, None, None, 0)

    @property
    def failure(self) -> str | None:
        """Why the group is of no use any more."""
        return self._failure

    def abort(self, message: str) -> None:
        """Make this group raise, here and on the other ranks of the node, now and in every later call."""
        self._failure = self._failure or message
        if self._segment is not None:
            self._segment.abort(message)

    def close(self) -> None:
        """Let go of memory and connections."""
        self._failure = self._failure or "the group was closed"
        if self._segment is not None and self._device is not None and self._is_pinned:
            self._device.unpin(self._segment.memory[0])
            self._is_pinned = False
        self._segment = None
        if self._nodes is not None:
            self._nodes.exchange.close()
            self._nodes = None

    def _check_rows(self, whole: torch.Tensor, row: torch.Tensor) -> None:
        if whole.numel() != self.world_size * row.numel() or whole.dtype != row.dtype:
            raise CollectiveError(
                f"{whole.numel()} of {whole.dtype} are not {self.world_size} x {row.numel()} of {row.dtype}: "
                f"one row per rank"
            )

    def _run(
        self,
        kind: Kind,
        input_tensor: torch.Tensor | None,
        output: torch.Tensor | None,
        count: int,
        op: Op = Op.SUM,
        root: int = 0,
    ) -> None:
        if self._failure is not None:
            raise CollectiveError(f"this group failed before: {self._failure}; make a new one")
        adds_in_place = kind in (Kind.ALL_REDUCE, Kind.REDUCE)
        for tensor in (input_tensor, output):
            if tensor is None or (adds_in_place and self.reaches(tensor)):
                continue
            if not (tensor.is_contiguous() and tensor.device.type == "cpu"):
                raise CollectiveError("a tensor is not contiguous or not on the CPU; take tensor.cpu().contiguous()")
        try:
            if len(self.placement.nodes) > 1 and output is not None:
                self._run_between_nodes(kind, output.view(-1), op, root)
                return
            self._run_in_node(kind, input_tensor, output, count, op, root)
        except BaseException as error:
            self.abort(first_line(error))
            raise

    def _run_in_node(
        self,
        kind: Kind,
        input_tensor: torch.Tensor | None,
        output: torch.Tensor | None,
        count: int,
        op: Op,
        root: int,
    ) -> None:
        if self._segment is None:
            if input_tensor is not None and output is not None and output.data_ptr() != input_tensor.data_ptr():
                output.view(-1).copy_(input_tensor.view(-1))
            return
        size_bytes = count * (output.dtype.itemsize if output is not None else 0)
        call = Collective(
            kind,
            count,
            op,
            divisor=float(self.world_size),
            root=self.placement.find(root)[1],
            timeout_s=self.timeout_s,
            chunk_bytes=self._chunk_bytes,
            num_lanes=self._segment.layout.num_lanes if size_bytes >= _LANES_FROM_BYTES else 1,
        )
        if output is not None and self.reaches(output):
            call = replace(call, chunk_bytes=0, num_lanes=1)
            self._reduce_from_device(call, output.view(-1), self._takes(kind, root))
        else:
            self._segment.run(call, input_tensor, output)

    def _takes(self, kind: Kind, root: int) -> bool:
        """Return whether this rank gets the result of an all_reduce or reduce."""
        return kind is Kind.ALL_REDUCE or root == self.rank

    def _reduce_from_device(self, call: Collective, flat: torch.Tensor, takes: bool) -> None:
        """Do the part inside the node of a sum of tensors on devices."""
        if self._segment is None or self._device is None:
            raise AssertionError("nothing to reduce from or through")
        if not self._is_pinned:
            self._device.pin(*self._segment.memory)
            self._is_pinned = True
        reduce_from_device(self._device, self._segment, call, flat, takes)

    def _run_between_nodes(self, kind: Kind, flat: torch.Tensor, op: Op, root: int) -> None:
        """Run a collective of several nodes on ``[count]``."""
        self._num_calls += 1
        if not flat.numel():
            # Nothing to move, but nobody may go on before all have come.
            kind, op, flat = Kind.ALL_REDUCE, Op.SUM, torch.zeros(1, dtype=torch.int32)
        if kind is Kind.BROADCAST:
            self._broadcast_between_nodes(flat, root)
            return
        if self._segment is None:
            self._run_between_leaders(kind, flat, op, root)
            return
        root_node, root_place = self.placement.find(root)
        chunk_count = self._chunk_count(flat)
        exchange = None
        if self._nodes is not None:
            chunks = SegmentChunks(self._segment, flat, chunk_count, self.timeout_s)
            exchange = self._start(kind, chunks, flat, op, root, chunk_count)
        call = Collective(
            kind,
            flat.numel(),
            op,
            root=root_place if root_node == self.placement.node else -1,
            timeout_s=self.timeout_s,
            chunk_bytes=chunk_count * flat.dtype.itemsize,
            between_nodes=True,
            sends=exchange is not None,
        )
        if self.reaches(flat):
            self._run_beside(exchange, partial(self._reduce_from_device, call, flat, self._takes(kind, root)))
        else:
            self._run_beside(exchange, partial(self._segment.run, call, flat, flat))

    def _run_between_leaders(self, kind: Kind, flat: torch.Tensor, op: Op, root: int) -> None:
        """Run an all_reduce or reduce where this node has one rank."""
        if self._nodes is None:
            raise AssertionError("a rank without neighbours is a leader")
        chunk_count = self._chunk_count(flat)
        takes = self._takes(kind, root)
        on_device = (
            DeviceChunks(self._device, flat, chunk_count, takes)
            if self._device is not None and self.reaches(flat)
            else None
        )
        chunks = on_device or TensorChunks(flat if takes else flat.clone(), chunk_count)
        try:
            exchange = self._start(kind, chunks, flat, op, root, chunk_count)
            self._nodes.exchange.finish(exchange, time.monotonic() + self.timeout_s)
        finally:
            if on_device is not None:
                on_device.drain()

    def _run_beside(self, exchange: Exchange | None, run: Callable[[], None]) -> None:
        """Run the part inside the node while the exchange goes on; a failure of one ends the other."""
        if exchange is None or self._nodes is None:
            run()
            return
        end = time.monotonic() + self.timeout_s
        try:
            run()
        except BaseException as error:
            exchange.fail(self._nodes.board.post(first_line(error)))
            self._nodes.exchange.finish(exchange, end)
            raise
        self._nodes.exchange.finish(exchange, end)

    def _broadcast_between_nodes(self, flat: torch.Tensor, root: int) -> None:
        """Broadcast inside the root's node, between the leaders, then inside the other nodes."""
        root_node, root_place = self.placement.find(root)
        is_here = root_node == self.placement.node
        call = Collective(Kind.BROADCAST, flat.numel(), root=root_place if is_here else 0, timeout_s=self.timeout_s)
        if is_here and self._segment is not None:
            self._segment.run(call, flat, flat)
        if self._nodes is not None:
            chunk_count = self._chunk_count(flat)
            exchange = self._start(Kind.BROADCAST, TensorChunks(flat, chunk_count), flat, Op.SUM, root, chunk_count)
            self._nodes.exchange.finish(exchange, time.monotonic() + self.timeout_s)
        if not is_here and self._segment is not None:
            self._segment.run(call, flat, flat)

    def _start(
        self, kind: Kind, chunks: ChunkSource, flat: torch.Tensor, op: Op, root: int, chunk_count: int
    ) -> Exchange:
        """Begin the exchange of a collective between the leaders."""
        if self._nodes is None:
            raise AssertionError("only a leader talks to other nodes")
        program = self._program(kind, flat.numel() * flat.dtype.itemsize, root)
        operation = Operation(
            sequence=self._num_calls,
            kind=kind,
            element=element_of(flat.dtype),
            op=op,
            count=flat.numel(),
            root=root,
            chunk_count=chunk_count,
            period=program.period,
            divisor=float(self.world_size),
        )
        return self._nodes.exchange.start(program, chunks, operation, self.abort)

    def _program(self, kind: Kind, size_bytes: int, root: int) -> NodeProgram:
        """Return what this node sends and receives."""
        here, num_nodes = self.placement, len(self.placement.nodes)
        if kind is not Kind.ALL_REDUCE:
            name = "reduce" if kind is Kind.REDUCE else "broadcast"
            return rooted_program(name, num_nodes, here.node, here.find(root)[0])
        algorithm = self.options.algorithm
        if algorithm == "auto":
            algorithm = choose_algorithm(num_nodes, size_bytes, _WIRE_BYTES_PER_S, _WIRE_LATENCY_S)
        if algorithm == "ring" and self._most_slots() < 2 * num_nodes and not self._one_rank_per_node:
            algorithm = "double_tree"  # two rounds of the ring would not fit the slots
        key = (algorithm, num_nodes)
        if key not in self._programs:
            self._programs[key] = all_reduce_program(algorithm, num_nodes, here.node, here.zones)
        return self._programs[key]

    @property
    def _one_rank_per_node(self) -> bool:
        return self.world_size == len(self.placement.nodes)

    def _most_slots(self) -> int:
        """Return how many chunks are on their way at once where several ranks share a node."""
        return self.options.num_slots or _SLOTS_BETWEEN_NODES

    def _chunk_count(self, flat: torch.Tensor) -> int:
        """Return the elements of a chunk between nodes, the same on all of them: an eighth, within limits."""
        size_bytes = flat.numel() * flat.dtype.itemsize
        largest = self.options.chunk_bytes or _CHUNK_BYTES
        wish = min(largest, max(_LEAST_CHUNK_BYTES, -(-size_bytes // 8)))
        return max(1, wish // 64) * 64 // flat.dtype.itemsize
