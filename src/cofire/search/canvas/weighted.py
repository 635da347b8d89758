"""The primitives of Canvas that have a weight: Fc, Convolution, Mix and Scale (Canvas, primitives)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cofire.search.canvas.primitive import (
    Primitive,
    Shapes,
    channel_and_space,
    channel_of,
    check_window,
    require_order,
    require_wide,
)
from cofire.search.canvas.shapes import Channel, DimName, Shape
from cofire.search.canvas.variables import Variable, number, product


@dataclass(frozen=True)
class Fc(Primitive):
    """Grouped 1x1 convolution: y[g*m + o, p] = sum over i of W[g, o, i] * x[g, i, p].

    i runs over C*KH*KW of one group, o over m = channels / G; the output's groups are flat.

    Attributes:
        channels: Channels of the output, all groups together.
        meta: Which meta-shape is mixed.
    """

    name: ClassVar[str] = "fc"
    weighted: ClassVar[bool] = True

    channels: Variable
    meta: int = 0

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with new channels."""
        channel_of(self, inputs[0], self.meta)
        return inputs[0].with_meta(self.meta, Channel(c=self.channels))

    def weight(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return [G, channels / G, C*KH*KW]."""
        channel = channel_of(self, inputs[0], self.meta)
        return (channel.g, self.channels / channel.g, channel.per_group)

    def multiply_adds(self, inputs: Shapes) -> Variable:
        """Return channels * C*KH*KW for each position."""
        return product(self.weight(inputs)) * inputs[0].metas[1 - self.meta].numel

    def constraints(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return channels / G."""
        return (self.weight(inputs)[1],)

    def substitute(self, index: int, by: Variable) -> Primitive:
        """Return this with x<index> replaced."""
        return Fc(self.channels.substitute(index, by), self.meta)


@dataclass(frozen=True)
class Convolution(Primitive):
    """Convolution over H and W, zero outside, of the same height and width.

    y[g*m + o, h, w] = sum over i, a, b of W[g, o, i, a, b] * x[g, i, h + d*(a - k//2), w + d*(b - k//2)], i over
    C*KH*KW of one group and o over m = channels / G. Without channels it is depthwise: every channel has a window of
    its own, y[c, h, w] = sum over a, b of W[c, a, b] * x[c, ..], and the meta-shape of channels stays as it is.

    Attributes:
        kernel: Window k: 3, 5 or 7.
        dilation: Distance d of its taps: 1, 2 or 3.
        channels: Channels of the output, all groups together; none: depthwise.
    """

    name: ClassVar[str] = "convolution"
    weighted: ClassVar[bool] = True

    kernel: int
    dilation: int = 1
    channels: Variable | None = None

    def __post_init__(self) -> None:
        """Check window and dilation.

        Raises:
            SearchError: Others than Canvas has.
        """
        check_window(self, self.kernel, self.dilation)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with new channels."""
        position, _, space = channel_and_space(self, inputs[0])
        if space.h.is_one or space.w.is_one:
            raise self.refuse(f"{inputs[0]} has no height or no width; use fc")
        return inputs[0] if self.channels is None else inputs[0].with_meta(position, Channel(c=self.channels))

    def weight(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return [G, channels / G, C*KH*KW, k, k]; depthwise: [G*C*KH*KW, k, k]."""
        _, channel, _ = channel_and_space(self, inputs[0])
        window = (number(self.kernel), number(self.kernel))
        if self.channels is None:
            return (channel.numel, *window)
        return (channel.g, self.channels / channel.g, channel.per_group, *window)

    def multiply_adds(self, inputs: Shapes) -> Variable:
        """Return the weight's elements times H*W."""
        _, _, space = channel_and_space(self, inputs[0])
        return product(self.weight(inputs)) * space.numel

    def constraints(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return channels / G."""
        return () if self.channels is None else (self.weight(inputs)[1],)

    def substitute(self, index: int, by: Variable) -> Primitive:
        """Return this with x<index> replaced."""
        if self.channels is None:
            return self
        return Convolution(self.kernel, self.dilation, self.channels.substitute(index, by))


@dataclass(frozen=True)
class Mix(Primitive):
    """Learned linear map of some dims onto new sizes: y[j, p] = sum over i of W[j, i] * x[i, p].

    i runs over the named dims together, j over their new sizes.

    Attributes:
        dims: The dims mixed, in the order of the shape.
        sizes: New size of each.
    """

    name: ClassVar[str] = "mix"
    weighted: ClassVar[bool] = True

    dims: tuple[DimName, ...]
    sizes: tuple[Variable, ...]

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with new sizes."""
        if len(self.dims) != len(self.sizes):
            raise self.refuse(f"{len(self.dims)} dims have {len(self.sizes)} new sizes; give each dim one")
        require_order(self, inputs[0], self.dims)
        if all(size.is_one for size in (*map(inputs[0].size, self.dims), *self.sizes)):
            raise self.refuse("nothing to mix, all sizes are 1; use scale")
        return inputs[0].resized(dict(zip(self.dims, self.sizes, strict=True)))

    def weight(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return [*new sizes, *old sizes]."""
        return (*self.sizes, *map(inputs[0].size, self.dims))

    def multiply_adds(self, inputs: Shapes) -> Variable:
        """Return elements of the input times the product of new sizes."""
        return inputs[0].numel * product(self.sizes)

    def substitute(self, index: int, by: Variable) -> Primitive:
        """Return this with x<index> replaced."""
        return Mix(self.dims, tuple(size.substitute(index, by) for size in self.sizes))


@dataclass(frozen=True)
class Scale(Primitive):
    """Learned factor: y[i, p] = W[i] * x[i, p], i over the named dims.

    Attributes:
        dims: The dims that the factor depends on, in the order of the shape.
    """

    name: ClassVar[str] = "scale"
    weighted: ClassVar[bool] = True

    dims: tuple[DimName, ...]

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape."""
        require_wide(self, inputs[0], self.dims)
        return inputs[0]

    def weight(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return the sizes of the named dims."""
        return tuple(map(inputs[0].size, self.dims))
