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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import Store

from cofire.collectives.elements import Op, element_of, find_element
from cofire.collectives.options import HFReduceOptions
from cofire.collectives.shm import Collective, Kind, Segment, SegmentLayout, check_operation, new_segment_path
from cofire.errors import CollectiveError

_SPIN_S = 50e-6
# Below this, starting threads costs more than they save.
_LANES_FROM_BYTES = 1 << 20
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


class HFReduce:
    """One rank's engine. Each method blocks; after a failure every further call raises at once.

    Attributes:
        placement: Which ranks share a node.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout_s: float, options: HFReduceOptions | None = None
    ) -> None:
        """Meet the other ranks; all of them make the engine at the same time.

        Args:
            store: That all ranks share, for this group alone.
            rank: This one's number in the group.
            world_size: Ranks of the group.
            timeout_s: For this, and for each collective.
            options: None: what the environment says.

        Raises:
            CollectiveError: A rank does not come, or shared memory cannot be had.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.options = options or HFReduceOptions.from_environment()
        self._failure: str | None = None
        self.placement = find_placement(store, rank, world_size, self.options)
        self._segment = self._share_memory(store) if len(self.placement.neighbours) > 1 else None

    def _share_memory(self, store: Store) -> Segment:
        """Make the node's segment or map it; its name is gone when all have."""
        here, cores = self.placement, len(os.sched_getaffinity(0))
        local = len(here.neighbours)
        between = len(here.nodes) > 1
        lanes = 1 if between else self.options.num_threads or max(1, min(8, cores // local))
        slots = self.options.num_slots or (16 if between else 4)
        layout = SegmentLayout(self.options.chunk_bytes or (256 << 10), slots, lanes)
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

    def supports(self, kind: str, dtype: torch.dtype | None = None) -> bool:
        """Return whether the engine does a collective for a type; what it does not is for another backend."""
        if not _KINDS.get(kind, False) and len(self.placement.nodes) > 1:
            return False
        return kind in _KINDS and (dtype is None or find_element(dtype) is not None)

    def all_reduce(self, tensor: torch.Tensor, op: Op = Op.SUM) -> None:
        """Reduce a contiguous CPU tensor of any shape in place, over all ranks.

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
        self._run(Kind.BARRIER, None, None, 0)

    def abort(self, message: str) -> None:
        """Make this group raise, here and on the other ranks of the node, now and in every later call."""
        self._failure = self._failure or message
        if self._segment is not None:
            self._segment.abort(message)

    def close(self) -> None:
        """Let go of memory and connections."""
        self._failure = self._failure or "the group was closed"
        self._segment = None

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
        for tensor in (input_tensor, output):
            if tensor is not None and not (tensor.is_contiguous() and tensor.device.type == "cpu"):
                raise CollectiveError("a tensor is not contiguous or not on the CPU; take tensor.cpu().contiguous()")
        try:
            if len(self.placement.nodes) > 1:
                raise NotImplementedError
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
            num_lanes=self._segment.layout.num_lanes if size_bytes >= _LANES_FROM_BYTES else 1,
        )
        self._segment.run(call, input_tensor, output)
