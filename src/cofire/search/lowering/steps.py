"""The steps of an optimised lowering: each runs on tensors and writes itself as a line of PyTorch.

A step reads one tensor by name (and a contraction a second one) and gives the first a new value. Tensors are named
``x`` (the input and what becomes of it), ``w0``, ``w1``, ... (weights) and ``m0``, ... (masks). No step holds a batch
size; a second free dim in one bundle takes its size from a tensor kept from before, ``s0``, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: The tensor that it reads and gives a new value.
    """

    name: str

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the new value.

        Args:
            tensors: Every tensor by name.
        """
        raise NotImplementedError

    def code(self) -> str:
        """Return the new value as a Python expression."""
        raise NotImplementedError


@dataclass(frozen=True)
class Permute(Step):
    """Reorder dims."""

    order: tuple[int, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].permute(self.order)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.permute({_listed(self.order)})"


@dataclass(frozen=True)
class Flatten(Step):
    """Merge, read top-down: dims ``first`` to ``last`` become one."""

    first: int
    last: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].flatten(self.first, self.last)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.flatten({self.first}, {self.last})"


class SizeOf(NamedTuple):
    """The size of a dim of a tensor, known at the call."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}.shape[{self.dim}]"


@dataclass(frozen=True)
class Keep(Step):
    """Another name for a tensor as it is now, for the sizes that it has."""

    source: str

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.source]

    def code(self) -> str:
        """See Step."""
        return self.source


@dataclass(frozen=True)
class Unflatten(Step):
    """Split, read top-down: a dim becomes several; a size of -1 is inferred."""

    dim: int
    sizes: tuple[int | SizeOf, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        sizes = [tensors[size.tensor].shape[size.dim] if isinstance(size, SizeOf) else size for size in self.sizes]
        return tensors[self.name].unflatten(self.dim, sizes)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.unflatten({self.dim}, ({_listed(self.sizes)}))"


@dataclass(frozen=True)
class Roll(Step):
    """Shift, read top-down: a roll by a fixed distance."""

    dim: int
    distance: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].roll(self.distance, self.dim)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.roll({self.distance}, {self.dim})"


@dataclass(frozen=True)
class EveryNth(Step):
    """Stride, read top-down: every ``stride``-th element of a dim."""

    dim: int
    stride: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name][(slice(None),) * self.dim + (slice(None, None, self.stride),)]

    def code(self) -> str:
        """See Step."""
        return f"{self.name}[{':, ' * self.dim}::{self.stride}]"


@dataclass(frozen=True)
class Pad(Step):
    """Zeros around dims, in the order of ``torch.nn.functional.pad``: the last dim first."""

    pads: tuple[int, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return F.pad(tensors[self.name], self.pads)

    def code(self) -> str:
        """See Step."""
        return f"F.pad({self.name}, ({_listed(self.pads)}))"


@dataclass(frozen=True)
class Window(Step):
    """Unfold, read top-down: a zero-padded sliding window, a view whose window dim comes last.

    Attributes:
        dim: The dim that the window slides on.
        rank: Number of dims before.
        padding: Zeros before and after.
        window: Elements in a window.
    """

    dim: int
    rank: int
    padding: tuple[int, int]
    window: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return F.pad(tensors[self.name], self._pads()).unfold(self.dim, self.window, 1)

    def code(self) -> str:
        """See Step."""
        return f"F.pad({self.name}, ({_listed(self._pads())})).unfold({self.dim}, {self.window}, 1)"

    def _pads(self) -> tuple[int, ...]:
        return (0, 0) * (self.rank - 1 - self.dim) + self.padding


@dataclass(frozen=True)
class Slide(Step):
    """Unfold, read top-down, where the offset is a dim already: each slab along it is moved by its offset.

    Attributes:
        dim: The dim that the window slides on.
        slabs: The dim of the offset.
        rank: Number of dims.
        before: How far the first slab is moved towards higher indices; zeros move in, and the other end falls out.
        pitch: Distance of the taps.
        is_summed: Whether the slabs are added up.
    """

    dim: int
    slabs: int
    rank: int
    before: int
    pitch: int
    is_summed: bool

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        around = (0, 0) * self._after()
        moves = (self.before - self.pitch * j for j in range(tensors[self.name].shape[self.slabs]))
        slabs = zip(tensors[self.name].unbind(self.slabs), moves, strict=True)
        moved = [F.pad(slab, (*around, move, -move)) for slab, move in slabs]
        return reduce(torch.add, moved) if self.is_summed else torch.stack(moved, self.slabs)

    def code(self) -> str:
        """See Step."""
        move = f"{self.before} - j" if self.pitch == 1 else f"{self.before} - {self.pitch} * j"
        back = f"j - {self.before}" if self.pitch == 1 else f"{self.pitch} * j - {self.before}"
        pads = "0, 0, " * self._after() + f"{move}, {back}"
        slabs = f"F.pad(slab, ({pads})) for j, slab in enumerate({self.name}.unbind({self.slabs}))"
        return f"sum([{slabs}])" if self.is_summed else f"torch.stack([{slabs}], {self.slabs})"

    def _after(self) -> int:
        """Return the number of a slab's dims behind the one that is slid on."""
        return self.rank - 1 - self.dim - (self.slabs > self.dim)


@dataclass(frozen=True)
class Sum(Step):
    """Reduce: sums over dims."""

    dims: tuple[int, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].sum(self.dims)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.sum(({_listed(self.dims)}))"


@dataclass(frozen=True)
class Repeat(Step):
    """Expand, read top-down: a new dim along which the tensor is repeated, without a copy."""

    dim: int
    rank: int
    size: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        grown = tensors[self.name].unsqueeze(self.dim)
        return grown if self.size == 1 else grown.expand(self._sizes())

    def code(self) -> str:
        """See Step."""
        grown = f"{self.name}.unsqueeze({self.dim})"
        return grown if self.size == 1 else f"{grown}.expand({_listed(self._sizes())})"

    def _sizes(self) -> tuple[int, ...]:
        return (-1,) * self.dim + (self.size,) + (-1,) * (self.rank - self.dim)


@dataclass(frozen=True)
class Diagonal(Step):
    """Two dims read at the same coordinate become one, the last."""

    first: int
    second: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].diagonal(0, self.first, self.second)

    def code(self) -> str:
        """See Step."""
        return f"{self.name}.diagonal(0, {self.first}, {self.second})"


@dataclass(frozen=True)
class Scale(Step):
    """A product with a number."""

    factor: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name] * self.factor

    def code(self) -> str:
        """See Step."""
        return f"{self.name} * {self.factor}"


@dataclass(frozen=True)
class Contract(Step):
    """Share and Reduce: an einsum with a second tensor."""

    other: str
    equation: str

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return torch.einsum(self.equation, tensors[self.name], tensors[self.other])

    def code(self) -> str:
        """See Step."""
        return f'torch.einsum("{self.equation}", {self.name}, {self.other})'


@dataclass(frozen=True)
class Convolve(Step):
    """Unfold, Share and Reduce at once: a convolution of [batch, channels, *spatial] with a weight.

    The weight's dims are permuted by ``order`` and reshaped to ``shape``, [out, in / groups, *kernel]: a view, if they
    lie in memory in that order.

    Attributes:
        other: The weight.
        order: The weight's dims as [groups, out, in, kernel].
        shape: What conv takes.
        padding: Zeros before and after, per spatial dim.
        stride: Distance of the places, per spatial dim.
        dilation: Distance of the taps, per spatial dim.
        groups: Number of groups, repeats included.
        repeats: How often the weight is repeated, for groups that share it.
    """

    other: str
    order: tuple[int, ...]
    shape: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    repeats: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        weight = tensors[self.other]
        if self._is_in_order():
            weight = weight.reshape(self.shape)
        else:
            # Torch 2.13 cannot go backward through some convolutions with a strided weight: "must be contiguous".
            weight = weight.permute(self.order).reshape(self.shape).contiguous()
        if self.repeats > 1:
            weight = weight.repeat(self._repeats())
        convolution = _CONVOLUTIONS[len(self.padding)]
        return convolution(
            tensors[self.name],
            weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def code(self) -> str:
        """See Step."""
        return self.call(self.kernel())

    def kernel(self) -> str:
        """Return the weight, as the convolution takes it, as a Python expression."""
        kernel = f"{self.other}.reshape({_listed(self.shape)})"
        if not self._is_in_order():
            kernel = f"{self.other}.permute({_listed(self.order)}).reshape({_listed(self.shape)}).contiguous()"
        return f"{kernel}.repeat({_listed(self._repeats())})" if self.repeats > 1 else kernel

    def call(self, kernel: str) -> str:
        """Return the convolution with a kernel as a Python expression."""
        options = ""
        if set(self.stride) != {1}:
            options += f", stride=({_listed(self.stride)})"
        if any(self.padding):
            options += f", padding=({_listed(self.padding)})"
        if set(self.dilation) != {1}:
            options += f", dilation=({_listed(self.dilation)})"
        if self.groups != 1:
            options += f", groups={self.groups}"
        return f"F.conv{len(self.padding)}d({self.name}, {kernel}{options})"

    def _is_in_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def _repeats(self) -> tuple[int, ...]:
        return (self.repeats, *(1 for _ in self.shape[1:]))


def storage_order(steps: Sequence[Step], name: str, rank: int) -> tuple[int, ...]:
    """Return the order in which a weight's dims should lie in memory, so that a convolution reads it without a copy.

    Args:
        steps: The steps of a plan.
        name: The weight.
        rank: Number of its dims.
    """
    orders = [step.order for step in steps if isinstance(step, Convolve) and step.other == name]
    return orders[0] if orders else tuple(range(rank))


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that takes dims back."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _listed(numbers: tuple[int, ...] | tuple[int | SizeOf, ...]) -> str:
    return ", ".join(map(str, numbers)) + ("," if len(numbers) == 1 else "")
