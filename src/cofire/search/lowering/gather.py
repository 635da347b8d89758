"""The lowering that is always right: every tensor gathered by its index expressions, then one einsum.

Each tensor is first read at the loops' points (``index_select`` with an index made once from the coordinates; what lies
outside an Unfold's domain reads a zero that is padded on), and the einsum multiplies and sums over the reductions. Only
the iterators that a tensor depends on are looped over, free dims such as the batch are not indexed, and autograd works
through it. It reads windows as copies, so it is the reference for the optimised lowering and no rival to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering.bound import Bound
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Shift, Split, Stride, Unfold


@dataclass(frozen=True)
class _Group:
    """Dims of a tensor that are read together, since their coordinates depend on the same iterators.

    Attributes:
        positions: Which dims.
        iterators: What they depend on; the group is read as a tensor over these.
        index: Flat index per point of the iterators, the number of elements where nothing is read; none: read as it is.
        is_padded: Whether some point reads nothing.
    """

    positions: tuple[int, ...]
    iterators: tuple[Dim, ...]
    index: Tensor | None
    is_padded: bool


class GatherKernel(nn.Module):
    """An operator at the sizes of one mapping, by gathering; the weights are arguments.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: There is no such mapping, or the operator has more than 52 iterators.
    """

    def __init__(self, operator: Operator, mapping: int = 0) -> None:
        super().__init__()
        self.bound = Bound(operator, mapping)
        self._signature = self.bound.signature
        iterators: tuple[Dim, ...] = (*self.bound.output, *self.bound.reductions)
        self._letters: dict[Dim, str] = dict(zip(iterators, ascii_letters, strict=False))
        self._groups = [_groups(self.bound, dims) for dims in (self.bound.input, *self.bound.factors)]
        for t, groups in enumerate(self._groups):
            for g, group in enumerate(groups):
                if group.index is not None:
                    self.register_buffer(f"index_{t}_{g}", group.index, persistent=False)

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the output, of the type of ``x``.

        Args:
            x: The input, of the operator's input shape; free dims may have any size.
            weights: One tensor per weight, in the operator's order.

        Raises:
            SearchError: Shapes are not the operator's.
        """
        self._signature.check(x.shape, [weight.shape for weight in weights])
        masks = [x.new_ones(self.bound.size(dim)) for dim in self.bound.masks]
        tensors = [self._read(k, tensor) for k, tensor in enumerate((x, *weights, *masks))]
        terms = ["".join(self._letters[i] for group in groups for i in group.iterators) for groups in self._groups]
        present = [k for k, i in enumerate(self.bound.output) if self._letters[i] in "".join(terms)]
        out = "".join(self._letters[self.bound.output[k]] for k in present)
        y = torch.einsum(f"{','.join(terms)}->{out}", *tensors) * self.bound.idle
        for k, size in enumerate(self.bound.output_shape):
            if k not in present:
                y = y.unsqueeze(k).expand(*y.shape[:k], size, *y.shape[k:])
        return y

    def _read(self, number: int, tensor: Tensor) -> Tensor:
        groups = self._groups[number]
        tensor = tensor.permute([position for group in groups for position in group.positions])
        dim = 0
        for g, group in enumerate(groups):
            if group.index is None:
                dim += 1
                continue
            tensor = tensor.flatten(dim, dim + len(group.positions) - 1)
            if group.is_padded:
                tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, 1])
            tensor = tensor.index_select(dim, self.get_buffer(f"index_{number}_{g}"))
            tensor = tensor.unflatten(dim, self.bound.shape(group.iterators))
            dim += len(group.iterators)
        return tensor


def _groups(bound: Bound, dims: Sequence[Dim]) -> list[_Group]:
    """Return the dims of one tensor, grouped by the iterators they share."""
    order: dict[Dim, int] = {iterator: k for k, iterator in enumerate((*bound.output, *bound.reductions))}
    merged: list[tuple[list[int], frozenset[Dim]]] = []
    for position, dim in enumerate(dims):
        positions, iterators = [position], dim.iterators
        for other in [group for group in merged if group[1] & iterators]:
            merged.remove(other)
            positions, iterators = other[0] + positions, iterators | other[1]
        merged.append((positions, iterators))
    groups = []
    for positions, iterators in merged:
        axes = tuple(sorted(iterators, key=order.__getitem__))
        if len(positions) == 1 and isinstance(dims[positions[0]], Iterator):
            groups.append(_Group(tuple(positions), axes, None, False))
            continue
        index, outside = _flat_index(bound, [dims[k] for k in positions], axes)
        groups.append(_Group(tuple(positions), axes, index, outside))
    return groups


def _flat_index(bound: Bound, dims: Sequence[Dim], axes: Sequence[Dim]) -> tuple[Tensor, bool]:
    """Return the flat index of every point of ``axes``, and whether some point lies outside."""
    values = {
        axis: torch.arange(bound.size(axis)).view([-1 if k == j else 1 for j in range(len(axes))])
        for k, axis in enumerate(axes)
    }
    flat, inside, numel = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool), 1
    for dim in dims:
        index, valid = _evaluate(bound, dim, values)
        flat = flat * bound.size(dim) + index
        inside = inside & valid
        numel *= bound.size(dim)
    flat, inside = (t.expand(bound.shape(axes)).flatten() for t in (flat, inside))
    return torch.where(inside, flat, numel), not bool(inside.all())


def _evaluate(bound: Bound, dim: Dim, values: Mapping[Dim, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a coordinate at all points, and where it lies in every Unfold's domain."""
    if isinstance(dim, Iterator):
        return values[dim], torch.ones((), dtype=torch.bool)
    (first, valid), *rest = [_evaluate(bound, child, values) for child in dim.below]
    if rest:
        valid = valid & rest[0][1]
    match dim:
        case Split():
            return first * bound.size(dim.minor) + rest[0][0], valid
        case MergeMajor():
            return first // dim.block.value(bound.mapping), valid
        case MergeMinor():
            return first % dim.block.value(bound.mapping), valid
        case Shift():
            return (first + dim.distance) % bound.size(dim), valid
        case Stride():
            return first * dim.stride.value(bound.mapping), valid
        case Unfold():
            index = first + rest[0][0] - bound.size(dim.window) // 2
            return index, valid & (index >= 0) & (index < bound.size(dim))
    raise SearchError(f"{type(dim).__name__} is not a primitive that can be lowered; use those of the assembler")
