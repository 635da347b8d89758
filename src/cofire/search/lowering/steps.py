"""The steps of an optimised lowering: each runs on tensors and writes itself as a line of PyTorch.

A step reads one tensor by name (and a contraction a second one) and gives the first a new value. Tensors are named
``x`` (the input and what becomes of it), ``w0``, ``w1``, ... (weights) and ``m0``, ... (masks). No step holds a batch
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Unflatten(Step):
    """Split, read top-down: a dim becomes several; a size of -1 is inferred."""

    dim: int
    sizes: tuple[int, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        return tensors[self.name].unflatten(self.dim, self.sizes)

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

    The weight's dims are permuted by ``order`` and reshaped to ``shape``, [out, in / groups, *kernel].

    Attributes:
        other: The weight.
        order: The weight's dims as [groups, out, in, kernel].
        shape: What conv takes.
        padding: Zeros before and after, per spatial dim.
        dilation: Distance of the taps, per spatial dim.
        groups: Number of groups.
    """

    other: str
    order: tuple[int, ...]
    shape: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See Step."""
        # Torch 2.13 cannot go backward through some convolutions with a strided weight: "must be contiguous".
        weight = tensors[self.other].permute(self.order).reshape(self.shape).contiguous()
        convolution = _CONVOLUTIONS[len(self.padding)]
        return convolution(tensors[self.name], weight, padding=self.padding, dilation=self.dilation, groups=self.groups)

    def code(self) -> str:
        """See Step."""
        weight = f"{self.other}.reshape({_listed(self.shape)})"
        if self.order != tuple(range(len(self.order))):
            weight = f"{self.other}.permute({_listed(self.order)}).reshape({_listed(self.shape)}).contiguous()"
        options = ""
        if any(self.padding):
            options += f", padding=({_listed(self.padding)})"
        if set(self.dilation) != {1}:
            options += f", dilation=({_listed(self.dilation)})"
        if self.groups != 1:
            options += f", groups={self.groups}"
        return f"F.conv{len(self.padding)}d({self.name}, {weight}{options})"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) + ("," if len(numbers) == 1 else "")
