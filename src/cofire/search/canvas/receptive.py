"""The receptive field of a kernel: which places of the input one place of the output depends on (Canvas, analysis).

It follows from the graph alone. A mask of elements goes from one place of the output, in all its channels, back to the
input: what a primitive's output needs of its inputs, element by element, whatever the weights and data are. So a field
is what may matter; where values cancel (x - x, or the sum of a softmax) a derivative may be zero within it, and never
outside.

Canvas takes the map for a torus, so that the field is the same at every place of a kernel that treats all places alike.
``torus=False`` has zeros beside the map, as the lowered kernel has. Canvas counts windows and shifts alone, on a map of
21 x 21; here a fold, a mix, a softmax or a product over space sees all that it sums over, a Shift moves by the distance
that the kernel has, and groups, stretches and reshapes are followed element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cofire.errors import SearchError
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.primitives import (
    Activation,
    Bmm,
    Broadcast,
    Elementwise,
    Fold,
    Group,
    Output,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.shapes import DimName, Shape
from cofire.search.canvas.variables import Extent, Variable
from cofire.search.canvas.weighted import Convolution, Fc, Mix, Scale

Mask = NDArray[np.bool_]
Offset = tuple[int, int]
_MOST_TRIED = 1024  # numbers of channels, in steps of the groups


def receptive_field(
    kernel: Kernel, extent: Extent, place: Offset | None = None, torus: bool = True
) -> tuple[Offset, ...]:
    """Return the offsets (dh, dw) of the input places that an output place depends on, ascending.

    Args:
        kernel: The kernel.
        extent: Channels, height and width of the map.
        place: Row and column of the output place; none: the middle, height // 2 and width // 2.
        torus: Whether windows go around the map; else there are zeros beside it. On a torus an offset is the one of
            least absolute value, of two such the negative one.

    Raises:
        SearchError: The kernel cannot fill the map, or the place is not on it.
    """
    _, height, width = extent
    row, column = place or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise SearchError(f"place {row}, {column} is not on a map of {height} x {width}; rows and columns begin at 0")
    found = np.argwhere(_needed(kernel, extent, (row, column), torus))
    offsets = [(int(h) - row, int(w) - column) for h, w in found]
    if torus:
        offsets = [(_least(dh, height), _least(dw, width)) for dh, dw in offsets]
    return tuple(sorted(offsets))


def receptive_size(kernel: Kernel, h: int, w: int) -> int:
    """Return how many places of an h x w torus the middle one depends on.

    Channels are the fewest that the kernel can have there.

    Raises:
        SearchError: The kernel cannot fill such a map.
    """
    return len(receptive_field(kernel, _narrowest(kernel, h, w)))


def min_receptive_size(size: int, h: int, w: int) -> Callable[[Kernel], bool]:
    """Return a filter of kernels: whether the receptive size on an h x w torus is at least ``size``.

    Raises:
        SearchError: The map has fewer places.
    """
    if size > h * w:
        raise SearchError(f"a receptive size of {size} is more than the {h} x {w} places of the map; take a larger map")
    return lambda kernel: receptive_size(kernel, h, w) >= size


def _least(offset: int, size: int) -> int:
    return (offset + size // 2) % size - size // 2


def _narrowest(kernel: Kernel, h: int, w: int) -> Extent:
    """Return the map of fewest channels that a kernel can fill.

    Raises:
        SearchError: There is none.
    """
    for channels in range(kernel.groups, (_MOST_TRIED + 1) * kernel.groups, kernel.groups):
        extent = Extent(channels, h, w)
        if all(size.value(extent, kernel.groups).denominator == 1 for size in kernel.graph.whole):
            return extent
    raise SearchError(
        f"no number of channels up to {_MOST_TRIED * kernel.groups} makes all sizes of the kernel whole on a map of "
        f"{h} x {w}; take another map"
    )


class _Map:
    """Numbers of sizes, and whether windows go around."""

    def __init__(self, kernel: Kernel, extent: Extent, torus: bool) -> None:
        self.groups, self.extent, self.torus = kernel.groups, extent, torus

    def numbers(self, sizes: Sequence[Variable]) -> tuple[int, ...]:
        """Return sizes as numbers."""
        return tuple(int(size.value(self.extent, self.groups)) for size in sizes)

    def moved(self, mask: Mask, distance: int, axis: int) -> Mask:
        """Return a mask whose element i is now at i + distance."""
        if self.torus or not distance:
            return np.roll(mask, distance, axis)
        size = mask.shape[axis]
        moved = np.zeros_like(mask)
        if abs(distance) < size:
            source, target = (slice(max(0, sign * distance), size + min(0, sign * distance)) for sign in (-1, 1))
            before = (slice(None),) * axis
            moved[(*before, target)] = mask[(*before, source)]
        return moved


def _needed(kernel: Kernel, extent: Extent, place: Offset, torus: bool) -> Mask:
    """Return which places of the input an output place needs, [H, W]."""
    kernel.check(extent)
    graph, on = kernel.graph, _Map(kernel, extent, torus)
    masks: list[Mask] = [np.zeros(on.numbers(shape.sizes), dtype=bool) for shape in graph.shapes]
    masks[-1][..., place[0], place[1]] = True
    for position in reversed(range(1, len(graph.nodes))):
        node, inputs = graph.nodes[position], graph.input_shapes(position)
        needed = _NEEDS[type(node.primitive)](on, node.primitive, inputs, masks[position])
        for k, shape, mask in zip(node.inputs, inputs, needed, strict=True):
            masks[k] |= mask.reshape(on.numbers(shape.sizes))
    return _any(masks[0], (0, 1, 2, 3))


def _axes(shape: Shape, dims: Sequence[DimName]) -> tuple[int, ...]:
    return tuple(shape.dims.index(dim) for dim in dims)


def _any(mask: Mask, axes: tuple[int, ...], keepdims: bool = False) -> Mask:
    return np.logical_or.reduce(mask, axis=axes, keepdims=keepdims)


def _spread(mask: Mask, axes: tuple[int, ...], sizes: Sequence[int]) -> Mask:
    """Return a mask in which what one element along the axes needs, all need; the axes get the sizes of a shape."""
    return np.broadcast_to(_any(mask, axes, keepdims=True), sizes)


def _same(_: _Map, __: Primitive, ___: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    return (mask,)


def _fc(on: _Map, fc: Fc, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    groups, out, per_group = on.numbers(fc.weight((inputs[0],)))
    rest = prod(on.numbers(inputs[0].metas[1 - fc.meta].sizes))
    before, after = (1, rest) if fc.meta == 0 else (rest, 1)
    grouped = mask.reshape(before, groups, out, after)
    return (_spread(grouped, (2,), (before, groups, per_group, after)),)


def _convolution(on: _Map, convolution: Convolution, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    shape = inputs[0]
    position = shape.channel
    assert position is not None
    weight = on.numbers(convolution.weight((shape,)))
    groups, out, per_group = (weight[0], 1, 1) if convolution.channels is None else weight[:3]
    space = on.numbers(shape.metas[1 - position].sizes)
    if position == 0:
        found = _spread(mask.reshape(groups, out, *space), (1,), (groups, per_group, *space))
    else:
        found = _spread(mask.reshape(*space, groups, out), (3,), (*space, groups, per_group))
    for axis in (2, 3) if position == 0 else (0, 1):
        taps = [on.moved(found, distance, axis) for distance in _distances(convolution)]
        found = np.logical_or.reduce(taps)
    return (found,)


def _distances(window: Convolution | Unfold) -> list[int]:
    """Return how far from an output place each tap of a window lies."""
    return [window.dilation * (tap - window.kernel // 2) for tap in range(window.kernel)]


def _mix(on: _Map, mix: Mix, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    return (_spread(mask, _axes(inputs[0], mix.dims), on.numbers(inputs[0].sizes)),)


def _fold(on: _Map, fold: Fold, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    return (_spread(mask, _axes(inputs[0], fold.dims), on.numbers(inputs[0].sizes)),)


def _unfold(on: _Map, unfold: Unfold, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    shape = inputs[0]
    position = shape.channel
    assert position is not None
    for name in unfold.over:
        window, along = _axes(shape, [DimName(position, f"K{name}"), DimName(1 - position, name)])
        taps = [on.moved(mask.take([tap], window), distance, along) for tap, distance in enumerate(_distances(unfold))]
        mask = np.logical_or.reduce(taps)
    return (mask,)


def _shift(_: _Map, shift: Shift, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    axes = _axes(inputs[0], shift.dims)
    return (np.roll(mask, [-shift.distance] * len(axes), axes),)


def _softmax(_: _Map, softmax: Softmax, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    return (_spread(mask, _axes(inputs[0], [softmax.dim]), mask.shape),)


def _broadcast(on: _Map, broadcast: Broadcast, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    laid = mask.reshape(on.numbers(broadcast.stretch((inputs[0], inputs[1]))))
    return (_any(laid, (1,)), mask)


def _bmm(on: _Map, bmm: Bmm, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    left, right = (on.numbers([meta.numel for meta in shape.metas]) for shape in inputs)
    rows, inner = reversed(left) if bmm.transpose_left else left
    columns = right[0] if bmm.transpose_right else right[1]
    needed = mask.reshape(rows, columns)
    if bmm.softmax:
        needed = _spread(needed, (1,), (rows, columns))
    of_left = np.broadcast_to(_any(needed, (1,))[:, None], (rows, inner))
    of_right = np.broadcast_to(_any(needed, (0,))[None, :], (inner, columns))
    return (of_left.T if bmm.transpose_left else of_left, of_right.T if bmm.transpose_right else of_right)


def _output(on: _Map, _: Output, inputs: Sequence[Shape], mask: Mask) -> tuple[Mask, ...]:
    (shape,) = inputs
    if shape.channel != 1:
        return (mask,)
    space, channels = (prod(on.numbers(meta.sizes)) for meta in shape.metas)
    return (mask.reshape(channels, space).T,)


_NEEDS: dict[type[Primitive], Callable[[_Map, Any, Sequence[Shape], Mask], tuple[Mask, ...]]] = {
    **dict.fromkeys((Scale, Group, Activation, Elementwise), _same),
    Fc: _fc,
    Convolution: _convolution,
    Mix: _mix,
    Fold: _fold,
    Unfold: _unfold,
    Shift: _shift,
    Softmax: _softmax,
    Broadcast: _broadcast,
    Bmm: _bmm,
    Output: _output,
}
