"""The few operations of Gluon that ``overlap.py`` uses, in numpy, with checks that a GPU would not make; no test.

Copies arrive at once, products are computed as late as waits allow: an operand that was overwritten in flight, a sum
that was read too early, a barrier with the wrong phase, an access outside a buffer and an element that is written twice
are errors.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

in_flight: list[Flying] = []
program, programs = [0, 0], [1, 1]


class Scalar(int):
    """An integer on the device."""

    def to(self, kind: object) -> Scalar:
        return self


class Block(np.ndarray):
    """A tensor on the device: never changed in place."""

    def to(self, kind: Any) -> Block:
        return self.astype(kind).view(Block)

    def __iadd__(self, other: Any) -> Block:
        return self + other


class Pointer:
    def __init__(self, buffer: np.ndarray, at: Any = 0) -> None:
        self.buffer, self.at = buffer, np.asarray(at, dtype=np.int64)
        self.dtype = types.SimpleNamespace(element_ty=np.float32)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.buffer, self.at + np.asarray(offset))


class Slots:
    """Shared memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def index(self, slot: int) -> Slots:
        return Slots(self.values[slot])

    def permute(self, order: tuple[int, ...]) -> Slots:
        return Slots(self.values.transpose(order))


class Barriers:
    def __init__(self, count: int) -> None:
        self.each = [types.SimpleNamespace(ready=False, completed=0, expected=0, arrived=0) for _ in range(count)]

    def index(self, slot: int) -> types.SimpleNamespace:
        return self.each[slot]


class Descriptor:
    def __init__(self, matrix: np.ndarray, block: tuple[int, int]) -> None:
        self.matrix, self.block = matrix, block
        self.shape = [Scalar(size) for size in matrix.shape]
        self.dtype, self.layout = np.float64, None
        self.block_type = types.SimpleNamespace(nbytes=block[0] * block[1])


class Flying:
    """A product that the tensor cores have begun."""

    def __init__(self, a: Slots, b: Slots) -> None:
        self.operands = (a.values, b.values)
        self.begun_with = (a.values.copy(), b.values.copy())
        self.result: Block | None = None

    def finish(self) -> None:
        for now, then in zip(self.operands, self.begun_with, strict=True):
            assert np.array_equal(now, then), "an operand was overwritten in flight"
        self.result = (self.operands[0] @ self.operands[1]).astype(np.float32).view(Block)


def warpgroup_mma(a: Slots, b: Slots, registers: Block, use_acc: bool, is_async: bool) -> Flying:
    assert is_async
    assert not use_acc
    assert not isinstance(registers, Flying), "registers in flight"
    in_flight.append(Flying(a, b))
    return in_flight[-1]


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any]) -> Block:
    while len(in_flight) > outstanding:
        in_flight.pop(0).finish()
    if not isinstance(deps[0], Flying):
        return deps[0]
    assert deps[0].result is not None, "a sum was read in flight"
    return deps[0].result


def load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Any:
    at, mask = np.broadcast_arrays(pointer.at, mask)
    assert ((at[mask] >= 0) & (at[mask] < pointer.buffer.size)).all(), "read outside"
    values = np.where(mask, pointer.buffer[np.where(mask, at, 0)], other)
    if values.ndim:
        return values.view(Block)
    return Scalar(values) if pointer.buffer.dtype.kind == "i" else float(values)


def store(pointer: Pointer, values: Block, mask: Any) -> None:
    at, mask, values = np.broadcast_arrays(pointer.at, mask, values)
    assert ((at[mask] >= 0) & (at[mask] < pointer.buffer.size)).all(), "written outside"
    assert np.isnan(pointer.buffer[at[mask]]).all(), "written twice"
    pointer.buffer[at[mask]] = values[mask]


def where(condition: Any, a: Any, b: Any) -> Any:
    found = np.where(condition, a, b)
    return found.view(Block) if found.ndim else Scalar(found)


def allocate_shared_memory(kind: Any, shape: list[int], layout: object) -> Slots | Barriers:
    return Barriers(shape[0]) if kind is np.int64 else Slots(np.full(shape, np.nan))


def expect(barrier: types.SimpleNamespace, nbytes: int, pred: Any = True) -> None:
    if pred:
        assert barrier.ready
        assert not barrier.expected, "the slot's last copy has not arrived"
        barrier.expected = nbytes


def wait(barrier: types.SimpleNamespace, phase: int) -> None:
    assert barrier.completed, "nobody will ever arrive"
    assert (barrier.completed - 1) % 2 == phase, "the other phase"


def copy(descriptor: Descriptor, at: list[int], barrier: types.SimpleNamespace, to: Slots, pred: Any = True) -> None:
    if pred:
        part = descriptor.matrix[at[0] : at[0] + descriptor.block[0], at[1] : at[1] + descriptor.block[1]]
        to.values[...] = 0.0
        to.values[: part.shape[0], : part.shape[1]] = part
        barrier.arrived += descriptor.block_type.nbytes
        assert barrier.arrived <= barrier.expected
        if barrier.arrived == barrier.expected:
            barrier.completed += 1
            barrier.expected = barrier.arrived = 0


def modules() -> dict[str, types.ModuleType]:
    """Return what stands in for Gluon's modules, by their names."""

    def nothing(*_: object, **__: object) -> None:
        return None

    def jit(function: Callable[..., Any] | None = None, **_: object) -> Any:
        return function or (lambda decorated: decorated)

    language = types.SimpleNamespace(
        **dict.fromkeys(("NVMMASharedLayout", "NVMMADistributedLayout", "BlockedLayout", "SliceLayout"), nothing),
        **{"constexpr": Scalar, "int64": np.int64, "int32": np.int64, "float32": np.float32, "static_range": range},
        **{"load": load, "store": store, "where": where, "allocate_shared_memory": allocate_shared_memory},
        program_id=lambda axis: Scalar(program[axis]),
        num_programs=lambda axis: Scalar(programs[axis]),
        cdiv=lambda a, b: Scalar(-(-a // b)),
        minimum=lambda a, b: Scalar(min(a, b)),
        maximum=lambda a, b: Scalar(max(a, b)),
        arange=lambda first, last, layout: np.arange(first, last).view(Block),
        zeros=lambda shape, kind, layout: np.zeros(shape, kind).view(Block),
        expand_dims=lambda x, axis: np.expand_dims(x, axis),
        convert_layout=lambda x, layout: x,
    )
    barriers = types.SimpleNamespace(
        MBarrierLayout=nothing, init=lambda barrier, count: setattr(barrier, "ready", True), expect=expect, wait=wait
    )
    hopper = {"mbarrier": barriers, "tma": types.SimpleNamespace(async_copy_global_to_shared=copy)}
    hopper |= {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    top = "triton.experimental.gluon"
    contents = {
        top: {"jit": jit, "language": language},
        f"{top}.language": vars(language),
        f"{top}.language.nvidia.hopper": hopper,
        f"{top}.nvidia.hopper": {"TensorDescriptor": Descriptor},
    }
    found = {}
    for name, members in contents.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(members)
    vars(found[top])["language"] = found[f"{top}.language"]
    return found


def load_overlap(monkeypatch: Any) -> types.ModuleType:
    """Return ``overlap.py`` as it is when Gluon is this module."""
    import importlib.util

    import triton.experimental

    from cofire.precision.triton import gemm

    stand_ins = modules()
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(triton.experimental, "gluon", stand_ins["triton.experimental.gluon"], raising=False)
    path = gemm.__file__.replace("gemm.py", "overlap.py")
    spec = importlib.util.spec_from_file_location("overlap_in_numpy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
