"""The torch.distributed backend ``hfreduce``: a process group whose sums go through HFReduce.

``init_process_group("hfreduce")`` makes an :class:`HFReduceGroup` (Fire-Flyer, arXiv 2408.14158, IV-A). all_reduce,
reduce, broadcast, reduce_scatter, all_gather and barrier run on the engine of ``hfreduce.py``. What the engine has no
business doing (all_to_all, gather, scatter, types without a kernel, all_gather between nodes) is done by gloo, or by
NCCL for CUDA tensors of a group of backend ``cpu:hfreduce,cuda:nccl``. Both take their turn in one queue, so operations
of a group end in the order in which they were issued; send and receive do not wait for it, since they would wait for
each other. ``work.py`` says more on order.

Left out: the timeout of a single operation (the group's holds, as it was made or :meth:`HFReduceGroup.set_timeout`
changed it), ``split_group`` (makes a gloo group), ``PREMUL_SUM``.
"""

# PyTorch's methods are overloads, whose forms agree on neither names nor order; one signature takes all of them.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store, distributed_c10d

from cofire.collectives import autoload
from cofire.collectives.elements import Op, find_element
from cofire.collectives.hfreduce import HFReduce
from cofire.collectives.options import HFReduceOptions
from cofire.collectives.work import HFReduceWork, OperationQueue
from cofire.errors import CollectiveError

_PATIENCE_S = 5.0
_OPS = {
    "SUM": Op.SUM,
    "AVG": Op.AVERAGE,
    "PRODUCT": Op.PRODUCT,
    "MIN": Op.MIN,
    "MAX": Op.MAX,
    "BAND": Op.BIT_AND,
    "BOR": Op.BIT_OR,
    "BXOR": Op.BIT_XOR,
}

autoload.register()


class HFReduceGroup(ProcessGroup):
    """One rank's process group. Methods have PyTorch's names and arguments; all return the handle of the operation.

    C++ code (DDP's reducer, functional collectives) calls those that PyTorch forwards to Python; the others, which only
    ``torch.distributed``'s own functions call, are overridden all the same.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: timedelta,
        options: HFReduceOptions | None = None,
        make_engine: Callable[..., HFReduce] = HFReduce,
    ) -> None:
        """Meet the other ranks; all of them make the group at the same time.

        Args:
            store: That all ranks share, for this group alone.
            rank: This one's number in the group.
            world_size: Ranks of the group.
            timeout: For this, and for each operation.
            options: None: what the environment says.
            make_engine: Called as ``HFReduce`` is.

        Raises:
            CollectiveError: A rank does not come, shared memory cannot be had, or the options are of another type.
        """
        if options is not None and not isinstance(options, HFReduceOptions):
            raise CollectiveError(f"pg_options is a {type(options).__name__}; hfreduce takes HFReduceOptions")
        # The form with a store makes an object whose methods C++ does not look up here.
        super().__init__(rank, world_size)  # pyright: ignore[reportCallIssue]
        self._store, self._timeout = store, timeout
        self._gloo = ProcessGroupGloo(PrefixStore("gloo/", store), rank, world_size, timeout=timeout)
        self._gloo._set_sequence_number_for_group()
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._has_cuda = False
        self._engine = make_engine(
            PrefixStore("hfreduce/", store), rank, world_size, timeout.total_seconds(), options=options
        )
        self._queue = OperationQueue(f"hfreduce-{rank}", self._engine.abort)
        self._coalesced: list[HFReduceWork] | None = None
        # Runs at the end of the interpreter too, where a thread in native code would bring the process down.
        self._finalizer = weakref.finalize(self, _end, self._queue, self._engine)

    def get_group_store(self) -> Store:
        """Return the store of this group alone."""
        return self._store

    def getBackendName(self) -> str:
        """Return the backend's name; PyTorch calls this."""
        return autoload.NAME

    def set_timeout(self, timeout: timedelta) -> None:
        """Change the timeout of each operation from now on."""
        self._timeout = timeout
        self._engine.timeout_s = timeout.total_seconds()
        self._gloo.set_timeout(timeout)

    def abort(self) -> None:
        """Make all operations in flight raise, here and on the other ranks of the node."""
        self._queue.abort("the group was aborted")
        self._gloo.abort()

    def shutdown(self) -> None:
        """End the group; operations in flight may take some seconds more, and are aborted then."""
        self._finalizer()
        self._gloo.shutdown()

    # What the engine does.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> HFReduceWork:
        """Reduce each tensor over all ranks, in place."""
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> HFReduceWork:
        """Reduce each tensor over all ranks, in place; one operation."""
        tensors = _as_list(tensors)
        if not self._is_ours("all_reduce", tensors):
            backend = self._backend_of(tensors)
            options = _as_options(dist.AllreduceOptions, opts)
            calls = [partial(backend.allreduce, [tensor], options) for tensor in tensors]
            return self._delegate(calls, tensors, opts)
        op = _op_of(opts)

        def run() -> None:
            for tensor in tensors:
                memory = self._to_reducible(tensor)
                self._engine.all_reduce(memory, op)
                _from_memory(memory, tensor)

        return self._submit(run, tensors, opts)

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None) -> HFReduceWork:
        """Reduce each tensor into the root's; ``opts`` may be the root, with ``op``."""
        tensors = _as_list(tensors)
        options = opts if isinstance(opts, dist.ReduceOptions) else _as_options(dist.ReduceOptions, op, opts)
        if not self._is_ours("reduce", tensors):
            return self._delegate([partial(self._backend_of(tensors).reduce, tensors, options)], tensors, options)
        root, kind = options.rootRank, _op_of(options)

        def run() -> None:
            for tensor in tensors:
                memory = self._to_reducible(tensor)
                self._engine.reduce(memory, root, kind)
                if root == self.rank():
                    _from_memory(memory, tensor)

        return self._submit(run, tensors, options)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> HFReduceWork:
        """Write the root's tensors into those of all others; ``opts`` may be the root."""
        tensors = _as_list(tensors)
        options = opts if isinstance(opts, dist.BroadcastOptions) else _as_options(dist.BroadcastOptions, None, opts)
        if not self._is_ours("broadcast", tensors, moves_only=True):
            return self._delegate([partial(self._backend_of(tensors).broadcast, tensors, options)], tensors, options)
        root = options.rootRank

        def run() -> None:
            for tensor in tensors:
                memory = _to_memory(tensor, read=root == self.rank())
                self._engine.broadcast(_as_movable(memory), root)
                if root != self.rank():
                    _from_memory(memory, tensor)

        return self._submit(run, tensors, options)

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> HFReduceWork:
        """Write the inputs of all ranks into a list of outputs, one per rank."""
        outputs, inputs = _as_lists(output_tensors), _as_list(input_tensors)
        flat = [tensor for row in outputs for tensor in row]
        alike = all(
            tensor.numel() == given.numel() for row, given in zip(outputs, inputs, strict=True) for tensor in row
        )
        if not (alike and self._is_ours("all_gather", [*inputs, *flat], moves_only=True)):
            call = partial(self._backend_of(inputs).allgather, outputs, inputs, *_options(opts))
            return self._delegate([call], flat, opts)

        def run() -> None:
            for row, given in zip(outputs, inputs, strict=True):
                self._all_gather(row, given)

        return self._submit(run, flat, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> HFReduceWork:
        """Write the inputs of all ranks into one output, in the order of the ranks."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> HFReduceWork:
        """Do :meth:`all_gather_single` for several tensors; one operation."""
        outputs, inputs = list(outputs), list(inputs)
        if not self._is_ours("all_gather", [*inputs, *outputs], moves_only=True):
            backend = self._backend_of(inputs)
            pairs = zip(outputs, inputs, strict=True)
            calls = [partial(backend._allgather_base, output, given, *_options(opts)) for output, given in pairs]
            return self._delegate(calls, outputs, opts)

        def run() -> None:
            for output, given in zip(outputs, inputs, strict=True):
                self._all_gather([output], given)

        return self._submit(run, outputs, opts)

    def allgather_coalesced(self, output_lists: Any, input_list: Any, opts: Any = None) -> HFReduceWork:
        """Do :meth:`allgather` for several tensors: ``output_lists[rank][tensor]``."""
        rows = [list(row) for row in zip(*output_lists, strict=True)]
        return self.allgather(rows, list(input_list), opts)

    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> HFReduceWork:
        """Reduce a list of inputs, one per rank, and keep this rank's."""
        outputs, inputs = _as_list(output_tensors), _as_lists(input_tensors)
        alike = all(tensor.numel() == kept.numel() for row, kept in zip(inputs, outputs, strict=True) for tensor in row)
        if not (alike and self._is_ours("all_reduce", [*outputs, *(tensor for row in inputs for tensor in row)])):
            options = _as_options(dist.ReduceScatterOptions, opts)
            call = partial(self._backend_of(outputs).reduce_scatter, outputs, inputs, options)
            return self._delegate([call], outputs, opts)
        op = _op_of(opts)

        def run() -> None:
            for kept, row in zip(outputs, inputs, strict=True):
                self._reduce_scatter(kept, row, op)

        return self._submit(run, outputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> HFReduceWork:
        """Reduce one input of a row per rank, and keep this rank's."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> HFReduceWork:
        """Do :meth:`reduce_scatter_single` for several tensors; one operation."""
        outputs, inputs = list(outputs), list(inputs)
        if not self._is_ours("all_reduce", [*outputs, *inputs]):
            backend = self._backend_of(outputs)
            pairs = zip(outputs, inputs, strict=True)
            options = _as_options(dist.ReduceScatterOptions, opts)
            calls = [partial(backend._reduce_scatter_base, output, given, options) for output, given in pairs]
            return self._delegate(calls, outputs, opts)
        op = _op_of(opts)

        def run() -> None:
            for kept, given in zip(outputs, inputs, strict=True):
                self._reduce_scatter(kept, [given], op)

        return self._submit(run, outputs, opts)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> HFReduceWork:
        """Wait for all ranks."""
        return self._submit(self._engine.barrier, [], opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # What another backend does, in its turn.

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_split_sizes: Any, input_split_sizes: Any, opts: Any = None
    ) -> HFReduceWork:
        """Send each rank its part of the input."""
        backend = self._backend_of([input])
        sizes = list(output_split_sizes), list(input_split_sizes)
        call = partial(backend.alltoall_base, output, input, *sizes, *_options(opts))
        return self._delegate([call], [output], opts)

    alltoall_base = all_to_all_single

    def alltoall(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> HFReduceWork:
        """Send each rank its tensor of the inputs."""
        outputs, inputs = list(output_tensors), list(input_tensors)
        call = partial(self._backend_of(inputs).alltoall, outputs, inputs, *_options(opts))
        return self._delegate([call], outputs, opts)

    def gather(self, output_tensors: Any, input_tensors: Any, *opts: Any) -> HFReduceWork:
        """Write the inputs of all ranks into the root's list."""
        call = partial(self._backend_of(_as_list(input_tensors)).gather, output_tensors, input_tensors, *opts)
        return self._delegate([call], [tensor for row in _as_lists(output_tensors) for tensor in row], *opts[:1])

    def scatter(self, output_tensors: Any, input_tensors: Any, *opts: Any) -> HFReduceWork:
        """Send each rank its tensor of the root's list."""
        outputs = _as_list(output_tensors)
        call = partial(self._backend_of(outputs).scatter, output_tensors, input_tensors, *opts)
        return self._delegate([call], outputs, *opts[:1])

    def send(self, tensors: Any, dst_rank: int, tag: int) -> Any:
        """Send to one rank, at once."""
        return self._backend_of(tensors).send(list(tensors), dst_rank, tag)

    def recv(self, tensors: Any, src_rank: int, tag: int) -> Any:
        """Receive from one rank, at once."""
        return self._backend_of(tensors).recv(list(tensors), src_rank, tag)

    def recv_anysource(self, tensors: Any, tag: int) -> Any:
        """Receive from whichever rank sends, at once."""
        return self._backend_of(tensors).recv_anysource(list(tensors), tag)

    # Coalescing of operations that have no coalesced form: they are in the queue one after the other anyway.

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> HFReduceWork:
        works, self._coalesced = self._coalesced or [], None

        def run() -> None:
            for work in works:
                work.wait()

        return self._queue.submit(run, [tensor for work in works for tensor in work.outputs], asynchronous=True)

    # Inside.

    def _is_ours(self, kind: str, tensors: Sequence[Tensor], moves_only: bool = False) -> bool:
        return all(
            tensor.layout == torch.strided and self._engine.supports(kind, None if moves_only else tensor.dtype)
            for tensor in tensors
        )

    def _submit(self, run: Callable[[], None], tensors: Sequence[Tensor], opts: Any) -> HFReduceWork:
        events = [_record_event(tensor.device) for tensor in tensors if tensor.is_cuda]

        def run_after_kernels() -> None:
            for event in events:
                event.synchronize()
            run()

        asynchronous = bool(getattr(opts, "asyncOp", True)) or self._coalesced is not None
        work = self._queue.submit(run_after_kernels if events else run, tensors, asynchronous)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _delegate(
        self, calls: Sequence[Callable[[], Any]], tensors: Sequence[Tensor], opts: Any = None
    ) -> HFReduceWork:
        def run() -> None:
            failure = self._queue.failure or self._engine.failure
            if failure is not None:
                raise CollectiveError(f"this group failed before: {failure}; make a new one")
            for call in calls:
                # Not is_completed(): that of gloo's composite operations stays False until somebody waits.
                call().wait()

        return self._submit(run, tensors, opts)

    def _backend_of(self, tensors: Sequence[Tensor]) -> Any:
        """Return the backend for what the engine does not do."""
        device = tensors[0].device if len(tensors) else torch.device("cpu")
        if device.type == "cuda" and not self._has_cuda:
            # Not before: while a group is made, PyTorch does not say which backend its configuration names for CUDA.
            names = distributed_c10d._world.pg_backend_config.get(self, "")
            if "cuda:nccl" in names:
                options = distributed_c10d.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                store = PrefixStore("nccl/", self._store)
                backend = distributed_c10d.ProcessGroupNCCL(store, self.rank(), self.size(), options)
                self._register_backend(device, ProcessGroup.BackendType.NCCL, backend)
            else:
                self._register_backend(device, ProcessGroup.BackendType.GLOO, self._gloo)
            self._has_cuda = True
        return self._get_backend(device)

    def _to_reducible(self, tensor: Tensor) -> Tensor:
        """Return what the engine can reduce in place: the tensor, or CPU memory with its values."""
        return tensor.detach() if self._engine.reaches(tensor) else _to_memory(tensor)

    def _all_gather(self, outputs: Sequence[Tensor], given: Tensor) -> None:
        if any(row.dtype != given.dtype for row in outputs):
            raise CollectiveError(f"{given.dtype} is not gathered into {outputs[0].dtype}; give rows of one type")
        rows = _as_one(outputs)
        whole = torch.empty(sum(row.numel() for row in outputs), dtype=given.dtype) if rows is None else rows
        self._engine.all_gather(_as_movable(whole), _as_movable(_to_memory(given)))
        if rows is None:
            _spread(whole, outputs)

    def _reduce_scatter(self, kept: Tensor, inputs: Sequence[Tensor], op: Op) -> None:
        rows = _as_one(inputs)
        whole = _concatenate(inputs) if rows is None else rows
        memory = _to_memory(kept, read=False)
        if self._engine.supports("reduce_scatter", kept.dtype):
            self._engine.reduce_scatter(memory, whole, op)
        else:
            # Between nodes: the whole sum is no more data on a leader's wire than gloo's own reduce_scatter sends.
            whole = whole.clone() if rows is not None else whole
            self._check_rows(whole, kept)
            self._engine.all_reduce(whole, op)
            memory.view(-1).copy_(whole.view(self.size(), -1)[self.rank()])
        _from_memory(memory, kept)

    def _check_rows(self, whole: Tensor, row: Tensor) -> None:
        if whole.numel() != self.size() * row.numel():
            raise CollectiveError(
                f"{whole.numel()} elements are not {self.size()} x {row.numel()}; give one row per rank"
            )


def _end(queue: OperationQueue, engine: HFReduce) -> None:
    queue.close(_PATIENCE_S)
    engine.close()


def _record_event(device: torch.device) -> torch.cuda.Event:
    """Return an event after all that the program has issued on a device's current stream; waiting for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _as_options(kind: type, opts: Any, root: int | None = None) -> Any:
    """Return PyTorch's options of a kind, made from another kind's or from a ReduceOp if need be."""
    if isinstance(opts, kind):
        return opts
    options = kind()
    given = getattr(opts, "reduceOp", opts)
    if given is not None:
        options.reduceOp = given
    options.asyncOp = getattr(opts, "asyncOp", options.asyncOp)
    if root is not None:
        options.rootRank = root
    return options


def _options(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _as_lists(tensors: Any) -> list[list[Tensor]]:
    if tensors and isinstance(tensors[0], Tensor):
        return [list(tensors)]
    return [list(row) for row in tensors]


def _op_of(opts: Any) -> Op:
    """Return the operation that PyTorch's options, or its ReduceOp, name."""
    given = getattr(opts, "reduceOp", opts)
    if given is None:
        return Op.SUM
    name = getattr(given, "op", given).name
    if name not in _OPS:
        raise CollectiveError(f"ReduceOp.{name} is not one of {', '.join(_OPS)}; multiply before, and take SUM")
    return _OPS[name]


def _is_memory(tensor: Tensor) -> bool:
    """Return whether the engine can work on a tensor as it lies."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _to_memory(tensor: Tensor, read: bool = True) -> Tensor:
    """Return contiguous CPU memory with a tensor's values: its own where it is that already."""
    tensor = tensor.detach()
    if _is_memory(tensor):
        return tensor
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return memory.copy_(tensor) if read else memory


def _from_memory(memory: Tensor, tensor: Tensor) -> None:
    """Write the values back, unless the memory is the tensor's own."""
    if memory.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(memory)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()


def _as_movable(tensor: Tensor) -> Tensor:
    """Return a type that the engine moves, over the same bytes: its own where the engine knows it."""
    return tensor if find_element(tensor.dtype) is not None else tensor.view(-1).view(torch.float8_e4m3fn)


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return one flat tensor over rows that lie behind each other in CPU memory; none if they do not."""
    first, place = tensors[0].detach(), tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if not _is_memory(tensor) or tensor.dtype != first.dtype or tensor.data_ptr() != place:
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        place += tensor.numel() * tensor.element_size()
    return first.as_strided((sum(tensor.numel() for tensor in tensors),), (1,))


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_to_memory(tensor).view(-1) for tensor in tensors])


def _spread(whole: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        _from_memory(whole[start : start + tensor.numel()].view(tensor.shape), tensor)
        start += tensor.numel()
