"""All primitives of Canvas: coarse tensor operations with arguments, from their inputs' shapes to their output's.

The notation of the formulas is that of ``primitive``; those with a weight are in ``weighted``.

Unlike Canvas, a Shift has a distance that belongs to the kernel; there it is drawn when a module is built, and a model
that is loaded again is another function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from cofire.search.canvas.primitive import (
    Primitive,
    Shapes,
    channel_and_space,
    channel_of,
    check_kind,
    check_window,
    require_one_or_pair,
    require_wide,
)
from cofire.search.canvas.shapes import INPUT_SHAPE, Channel, DimName, Shape
from cofire.search.canvas.variables import ONE, Variable, number, product
from cofire.search.canvas.weighted import Convolution, Fc, Mix, Scale

ActivationKind = Literal["gelu", "relu", "sigmoid", "tanh"]
ElementwiseKind = Literal["abs", "exp", "neg", "sin", "sqrt", "sqr"]
BroadcastKind = Literal["add", "sub", "mul", "max", "min"]
FoldKind = Literal["avg", "max"]
ACTIVATIONS: tuple[ActivationKind, ...] = ("gelu", "relu", "sigmoid", "tanh")
ELEMENTWISE: tuple[ElementwiseKind, ...] = ("abs", "exp", "neg", "sin", "sqrt", "sqr")
BROADCASTS: tuple[BroadcastKind, ...] = ("add", "sub", "mul", "max", "min")
FOLDS: tuple[FoldKind, ...] = ("avg", "max")
DISTANCES = (1, 2, 3)
SQRT_EPSILON = 1e-6  # inside the root, so that its gradient at 0 is finite


@dataclass(frozen=True)
class Input(Primitive):
    """The kernel's input: y = x, of shape [C | H, W]."""

    name: ClassVar[str] = "input"
    arity: ClassVar[int] = 0

    def shape(self, inputs: Shapes) -> Shape:
        """Return channels C and space H, W."""
        return INPUT_SHAPE


@dataclass(frozen=True)
class Output(Primitive):
    """The kernel's output: x as [C, H, W], row by row, after channels were put first where space was.

    Left to it is any split of C*H*W elements into dims.
    """

    name: ClassVar[str] = "output"

    def mismatch(self, inputs: Shapes) -> Variable | None:
        """Return the elements there are over C*H*W."""
        return inputs[0].numel / INPUT_SHAPE.numel

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape if the elements suffice."""
        if not inputs[0].numel == INPUT_SHAPE.numel:
            raise self.refuse(f"{inputs[0]} has {inputs[0].numel} elements; a kernel ends with C*H*W")
        return INPUT_SHAPE


@dataclass(frozen=True)
class Fold(Primitive):
    """Mean or maximum over dims: y[p] = avg or max over i of x[i, p]; the dims stay with size 1.

    Attributes:
        kind: ``avg`` or ``max``.
        dims: One dim, or KH and KW, or H and W of one meta-shape.
    """

    name: ClassVar[str] = "fold"

    kind: FoldKind
    dims: tuple[DimName, ...]

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            SearchError: Another kind.
        """
        check_kind(self, self.kind, FOLDS)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with size 1 in the dims."""
        require_wide(self, inputs[0], self.dims)
        require_one_or_pair(self, self.dims)
        return inputs[0].resized(dict.fromkeys(self.dims, ONE))


@dataclass(frozen=True)
class Unfold(Primitive):
    """Sliding window of the same size, zero outside, laid into the channels.

    y[.., a, b, h, w] = x[.., h + d*(a - k//2), w + d*(b - k//2)], a in KH and b in KW; over one dim only its own.

    Attributes:
        over: ``H``, ``W`` or ``HW``.
        kernel: Window k: 3, 5 or 7.
        dilation: Distance d of its taps: 1, 2 or 3.
    """

    name: ClassVar[str] = "unfold"

    over: Literal["H", "W", "HW"]
    kernel: int
    dilation: int = 1

    def __post_init__(self) -> None:
        """Check dims, window and dilation.

        Raises:
            SearchError: Others than Canvas has.
        """
        if self.over not in ("H", "W", "HW"):
            raise self.refuse("a window goes over H, W or HW")
        check_window(self, self.kernel, self.dilation)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with k in KH, KW or both, which must be free."""
        position, channel, space = channel_and_space(self, inputs[0])
        kh, kw = channel.kh, channel.kw
        for name, size, window in (("H", space.h, kh), ("W", space.w, kw)):
            if name in self.over and size.is_one:
                raise self.refuse(f"{name} of {inputs[0]} has size 1; name a wider one")
            if name in self.over and not window.is_one:
                raise self.refuse(f"K{name} of {inputs[0]} holds a window already; fold it or mix it first")
        k = number(self.kernel)
        wide = Channel(channel.g, channel.c, k if "H" in self.over else kh, k if "W" in self.over else kw)
        return inputs[0].with_meta(position, wide)


@dataclass(frozen=True)
class Group(Primitive):
    """View of channels as groups of channels: y[c div m, c mod m, p] = x[c, p] with m = C / factor.

    Attributes:
        factor: Number of groups.
        meta: Which meta-shape is grouped; its G must be 1.
    """

    name: ClassVar[str] = "group"

    factor: Variable
    meta: int = 0

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape with C split into G and C."""
        channel = channel_of(self, inputs[0], self.meta)
        if not channel.g.is_one:
            raise self.refuse(f"{inputs[0]} has groups already; fc makes them flat")
        if self.factor.is_one:
            raise self.refuse("one group is no group; leave it out")
        grouped = Channel(self.factor, channel.c / self.factor, channel.kh, channel.kw)
        return inputs[0].with_meta(self.meta, grouped)

    def substitute(self, index: int, by: Variable) -> Primitive:
        """Return this with x<index> replaced."""
        return Group(self.factor.substitute(index, by), self.meta)


@dataclass(frozen=True)
class Shift(Primitive):
    """Circular shift: y[i, p] = x[(i - distance) mod N, p] along each of the dims.

    Attributes:
        dims: One dim, or KH and KW, or H and W of one meta-shape.
        distance: 1, 2 or 3, in every dim the same.
    """

    name: ClassVar[str] = "shift"

    dims: tuple[DimName, ...]
    distance: int = 1

    def __post_init__(self) -> None:
        """Check the distance.

        Raises:
            SearchError: Another distance than Canvas has.
        """
        if self.distance not in DISTANCES:
            raise self.refuse("the distance must be 1, 2 or 3")

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape."""
        require_wide(self, inputs[0], self.dims)
        require_one_or_pair(self, self.dims)
        return inputs[0]


@dataclass(frozen=True)
class Softmax(Primitive):
    """Softmax over one dim: y[i, p] = exp(x[i, p]) / sum over j of exp(x[j, p]).

    Attributes:
        dim: The dim.
    """

    name: ClassVar[str] = "softmax"

    dim: DimName

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape."""
        require_wide(self, inputs[0], (self.dim,))
        return inputs[0]


@dataclass(frozen=True)
class Activation(Primitive):
    """Activation of every element: y[p] = f(x[p]), GeLU with the exact normal distribution.

    Attributes:
        kind: ``gelu``, ``relu``, ``sigmoid`` or ``tanh``.
    """

    name: ClassVar[str] = "activation"

    kind: ActivationKind

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            SearchError: Another kind.
        """
        check_kind(self, self.kind, ACTIVATIONS)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape."""
        return inputs[0]


@dataclass(frozen=True)
class Elementwise(Primitive):
    """Arithmetic on every element: abs, exp, neg, sin, sqr (x^2), and sqrt, which is sqrt(abs(x) + SQRT_EPSILON).

    Attributes:
        kind: ``abs``, ``exp``, ``neg``, ``sin``, ``sqrt`` or ``sqr``.
    """

    name: ClassVar[str] = "elementwise"

    kind: ElementwiseKind

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            SearchError: Another kind.
        """
        check_kind(self, self.kind, ELEMENTWISE)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the input's shape."""
        return inputs[0]


class Stretch(NamedTuple):
    """How the left input of a Broadcast is laid over the right one.

    Both are read row by row, the left as [prefix, 1, middle, suffix] and the right as [prefix, multiplier, middle,
    suffix].
    """

    prefix: Variable
    multiplier: Variable
    middle: Variable
    suffix: Variable


@dataclass(frozen=True)
class Broadcast(Primitive):
    """Two inputs element by element, the left one stretched over the right one: y[p] = op(left[p'], right[p]).

    Leading and trailing dims of equal size are set aside, those of size 1 do not count; what is left of the right one
    must be a multiple of what is left of the left one, which is repeated as a whole.

    Attributes:
        kind: ``add``, ``sub`` (left minus right), ``mul``, ``max`` or ``min``.
    """

    name: ClassVar[str] = "broadcast"
    arity: ClassVar[int] = 2
    stretches: ClassVar[bool] = True

    kind: BroadcastKind

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            SearchError: Another kind.
        """
        check_kind(self, self.kind, BROADCASTS)

    def stretch(self, inputs: Shapes) -> Stretch:
        """Return how the left input is laid over the right one; the multiplier need not be whole."""
        left, right = ([size for size in shape.sizes if not size.is_one] for shape in inputs)
        shared = min(len(left), len(right))
        head = next((k for k in range(shared) if left[k] != right[k]), shared)
        rest = shared - head
        tail = next((k for k in range(rest) if left[-1 - k] != right[-1 - k]), rest)
        middle = product(left[head : len(left) - tail])
        multiplier = product(right[head : len(right) - tail]) / middle
        return Stretch(product(left[:head]), multiplier, middle, product(left[len(left) - tail :]))

    def mismatch(self, inputs: Shapes) -> Variable:
        """Return the multiplier."""
        return self.stretch(inputs).multiplier

    def constraints(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return the multiplier."""
        return (self.mismatch(inputs),)

    def shape(self, inputs: Shapes) -> Shape:
        """Return the right input's shape."""
        multiplier = self.mismatch(inputs)
        if not multiplier.may_be_whole:
            raise self.refuse(f"{inputs[0]} does not fit {inputs[1]} a whole number of times but {multiplier}")
        return inputs[1]


@dataclass(frozen=True)
class Bmm(Primitive):
    """Product of two matrices, one per example: y[a, b] = sum over k of left[a, k] * right[k, b].

    A shape is the matrix of its two meta-shapes, each read row by row. With softmax,
    y[a, .] = softmax over b of (sum over k of left[a, k] * right[k, b]) / sqrt(K).

    Attributes:
        transpose_left: The left input is [k, a].
        transpose_right: The right input is [b, k].
        softmax: Scale and take the softmax.
    """

    name: ClassVar[str] = "bmm"
    arity: ClassVar[int] = 2

    transpose_left: bool = False
    transpose_right: bool = False
    softmax: bool = False

    def _matrices(self, inputs: Shapes) -> tuple[Shape, Shape]:
        left, right = inputs
        return (
            Shape(left.second, left.first) if self.transpose_left else left,
            Shape(right.second, right.first) if self.transpose_right else right,
        )

    def mismatch(self, inputs: Shapes) -> Variable:
        """Return K of the left input over that of the right one."""
        left, right = self._matrices(inputs)
        return left.second.numel / right.first.numel

    def shape(self, inputs: Shapes) -> Shape:
        """Return the pair of the meta-shapes that are not summed over."""
        left, right = self._matrices(inputs)
        if left.second.numel != right.first.numel:
            raise self.refuse(f"{left.second.numel} columns do not meet {right.first.numel} rows; make them equal")
        return Shape(left.first, right.second)

    def multiply_adds(self, inputs: Shapes) -> Variable:
        """Return a * k * b."""
        left, right = self._matrices(inputs)
        return left.numel * right.second.numel


PRIMITIVES: dict[str, type[Primitive]] = {
    kind.name: kind
    for kind in (
        *(Input, Output, Fc, Convolution, Mix, Scale, Fold, Unfold, Group, Shift, Softmax),
        *(Activation, Elementwise, Broadcast, Bmm),
    )
}
