"""From a kernel of Canvas at a place to the calls of PyTorch that compute it.

Every tensor is [N, dims that are wider than 1], row by row in the order of its shape, and a primitive that wants a
vector or a matrix reshapes it; a dim of one symbol that happens to be 1 at the place stays. No call holds the size of
the batch. A window is a strided view of the padded tensor, copied only by what cannot read it so; windows that one Fc
reads are a convolution with it. A tensor takes the name of one that is read no more, so that memory is freed as soon as
it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import NamedTuple

from cofire.search.canvas.graph import Graph, Kernel
from cofire.search.canvas.lowering_calls import Call, Expression, Name
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.primitives import (
    SQRT_EPSILON,
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
from cofire.search.canvas.shapes import Channel, DimName, MetaShape, Shape
from cofire.search.canvas.variables import Extent, Variable, product
from cofire.search.canvas.weighted import Convolution, Fc, Mix, Scale

_LETTERS = "abcdefghijklmopqrstuvwxyz"  # n is the batch
_ACTIVATIONS = {"gelu": "F.gelu", "relu": "F.relu", "sigmoid": "torch.sigmoid", "tanh": "torch.tanh"}
_BROADCASTS = {"add": "+", "sub": "-", "mul": "*", "max": "torch.maximum", "min": "torch.minimum"}
_FOLDS = {"avg": "mean", "max": "amax"}


@dataclass(frozen=True)
class Line:
    """One primitive: a tensor gets a value.

    Attributes:
        target: Name of the tensor.
        expression: Its value.
        note: Which node it is, and its shape in symbols.
    """

    target: str
    expression: Expression
    note: str


@dataclass(frozen=True)
class Weight:
    """A weight and how it begins.

    Attributes:
        name: Its name in the module and in the state dict.
        sizes: As the primitive's formula indexes it.
        deviation: Standard deviation of the normal numbers that it begins with; none: it begins with ones.
        note: Which node reads it.
    """

    name: str
    sizes: tuple[int, ...]
    deviation: float | None
    note: str


@dataclass(frozen=True)
class KernelPlan:
    """What a lowered kernel does.

    Attributes:
        lines: In order; the input is ``x``.
        weights: In the order of the nodes.
        result: Name of the output.
    """

    lines: tuple[Line, ...]
    weights: tuple[Weight, ...]
    result: str


class _Sized(NamedTuple):
    """An expression and its sizes beside the batch."""

    expression: Expression
    sizes: tuple[int, ...]

    def reshaped(self, *sizes: int) -> _Sized:
        """Return this in other sizes; nothing is done where they are the same."""
        if sizes == self.sizes:
            return self
        return _Sized(Call("reshape", (self.expression, -1, *sizes)), sizes)

    def permuted(self, *order: int) -> _Sized:
        """Return this with its dims, the batch left out, in another order."""
        if order == tuple(range(len(order))):
            return self
        call = Call("permute", (self.expression, 0, *(1 + k for k in order)))
        return _Sized(call, tuple(self.sizes[k] for k in order))


def plan_kernel(kernel: Kernel, extent: Extent) -> KernelPlan:
    """Return the calls that compute a kernel at a place.

    Args:
        kernel: The kernel.
        extent: Channels, height and width of the place.

    Raises:
        SearchError: The kernel cannot fill the place.
    """
    kernel.check(extent)
    graph, place = kernel.graph, _Place(kernel.groups, extent)
    last_reader = [max(readers, default=len(graph.nodes)) for readers in graph.consumers]
    names, lines, weights = ["x"], [], []
    for position, node in enumerate(graph.nodes[1:], 1):
        if _is_convolved(graph, position):
            names.append(names[node.inputs[0]])
            continue
        primitive, sources = node.primitive, list(node.inputs)
        lowering: Callable[..., _Sized] = _LOWERINGS[type(primitive)]
        argument: Primitive = primitive
        if isinstance(primitive, Fc) and _is_convolved(graph, sources[0]):
            lowering, argument = _fc_of_windows, graph.nodes[sources[0]].primitive
            sources = list(graph.nodes[sources[0]].inputs)
        read = [_Sized(Name(names[k]), place.wide(graph.shapes[k])) for k in sources]
        if primitive.weighted:
            weights.append(_weight(len(weights), position, primitive, place.numbers(graph.weight(position))))
            read.append(_Sized(Name(f"self.{weights[-1].name}"), weights[-1].sizes))
        made = lowering(place, argument, [graph.shapes[k] for k in sources], *read)
        made = made.reshaped(*place.wide(graph.shapes[position]))
        if isinstance(made.expression, Name):
            names.append(made.expression.text)
            continue
        held = {names[k] for k in range(position) if last_reader[k] > position}
        freed = [names[k] for k in node.inputs if names[k] not in held]
        names.append(freed[0] if freed else next(f"y{k}" for k in range(position) if f"y{k}" not in held))
        lines.append(Line(names[-1], made.expression, f"t{position}: {graph.shapes[position]}"))
    return KernelPlan(tuple(lines), tuple(weights), names[-1])


def _is_convolved(graph: Graph, position: int) -> bool:
    """Whether a node is an Unfold that only an Fc of its channels reads, and that is the only window they hold."""
    unfold, readers = graph.nodes[position].primitive, graph.consumers[position]
    if not isinstance(unfold, Unfold) or len(readers) != 1:
        return False
    reader, (shape,) = graph.nodes[readers[0]].primitive, graph.input_shapes(position)
    channel = shape.metas[shape.channel or 0]
    assert isinstance(channel, Channel)
    return isinstance(reader, Fc) and reader.meta == shape.channel and channel.kh.is_one and channel.kw.is_one


def _weight(index: int, position: int, primitive: Primitive, sizes: tuple[int, ...]) -> Weight:
    return Weight(f"w{index}", sizes, _deviation(primitive, sizes), f"t{position} = {primitive}")


def _deviation(primitive: Primitive, sizes: tuple[int, ...]) -> float | None:
    """Return 1 / sqrt of the terms of the sum that a weight is in (fan-in); none for a weight that is in no sum."""
    if isinstance(primitive, Scale):
        return None
    if isinstance(primitive, Mix):
        terms = prod(sizes[len(primitive.dims) :])
    elif isinstance(primitive, Convolution) and primitive.channels is None:
        terms = prod(sizes[1:])
    else:
        terms = prod(sizes[2:])
    return 1 / sqrt(terms)


class _Place(NamedTuple):
    """What gives sizes their numbers."""

    groups: int
    extent: Extent

    def numbers(self, sizes: Sequence[Variable]) -> tuple[int, ...]:
        """Return sizes as numbers."""
        return tuple(int(size.value(self.extent, self.groups)) for size in sizes)

    def number(self, size: Variable) -> int:
        """Return a size as a number."""
        return int(size.value(self.extent, self.groups))

    def wide(self, shape: Shape | MetaShape) -> tuple[int, ...]:
        """Return the sizes of the dims that are wider than 1."""
        return self.numbers([size for size in shape.sizes if not size.is_one])


def _axis(shape: Shape, dim: DimName) -> int:
    """Return the position of a wide dim in a tensor, the batch counted."""
    return 1 + shape.wide_dims.index(dim)


def _axes(shape: Shape, dims: Sequence[DimName]) -> tuple[int, ...]:
    return tuple(_axis(shape, dim) for dim in dims)


def _number_or_all(numbers: tuple[int, ...]) -> int | tuple[int, ...]:
    return numbers[0] if len(numbers) == 1 else numbers


def _fc(place: _Place, fc: Fc, inputs: Sequence[Shape], x: _Sized, weight: _Sized) -> _Sized:
    (groups, out, per_group), other = weight.sizes, place.wide(inputs[0].metas[1 - fc.meta])
    if fc.meta == 0:
        rest = other if len(other) in (1, 2) else (prod(other),)
        matrix = Call("reshape", (weight.expression, groups * out, per_group, *(1 for _ in rest)))
        x = x.reshaped(groups * per_group, *rest)
        options = (("groups", groups),) if groups > 1 else ()
        return _Sized(Call(f"F.conv{len(rest)}d", (x.expression, matrix), options), (groups * out, *rest))
    if groups == 1:
        matrix = Call("flatten", (weight.expression, 0, 1))
        return _Sized(Call("F.linear", (x.reshaped(*other, per_group).expression, matrix)), (*other, out))
    x = x.reshaped(prod(other), groups, per_group)
    call = Call("torch.einsum", ("npgi,goi->npgo", x.expression, weight.expression))
    return _Sized(call, (prod(other), groups, out))


def _convolution(place: _Place, convolution: Convolution, inputs: Sequence[Shape], x: _Sized, weight: _Sized) -> _Sized:
    window, dilation = (convolution.kernel, convolution.kernel), convolution.dilation
    if convolution.channels is None:
        channels = weight.sizes[0]
        taps = _Sized(Call("unsqueeze", (weight.expression, 1)), (channels, 1, *window))
        return _convolved(place, inputs[0], x, taps, channels, dilation)
    groups, out, per_group = weight.sizes[:3]
    taps = _Sized(Call("flatten", (weight.expression, 0, 1)), (groups * out, per_group, *window))
    return _convolved(place, inputs[0], x, taps, groups, dilation)


def _fc_of_windows(place: _Place, unfold: Unfold, inputs: Sequence[Shape], x: _Sized, weight: _Sized) -> _Sized:
    """Return an Fc of the windows of x as a convolution, which does not make them."""
    groups, out, per_group = weight.sizes
    window = tuple(unfold.kernel if name in unfold.over else 1 for name in "HW")
    sizes = (groups * out, per_group // prod(window), *window)
    taps = _Sized(Call("reshape", (weight.expression, *sizes)), sizes)
    return _convolved(place, inputs[0], x, taps, groups, unfold.dilation)


def _convolved(place: _Place, shape: Shape, x: _Sized, taps: _Sized, groups: int, dilation: int) -> _Sized:
    """Return the convolution of a shape of channels and space, in any order, with taps [out, in / groups, KH, KW]."""
    position = shape.channel
    assert position is not None
    channels = place.number(shape.metas[position].numel)
    space = place.numbers(shape.metas[1 - position].sizes)
    x = x.reshaped(channels, *space) if position == 0 else x.reshaped(*space, channels).permuted(2, 0, 1)
    beside = tuple(dilation * (size // 2) for size in taps.sizes[2:])
    options = [("padding", beside[0] if beside[0] == beside[1] else beside)]
    options += [("dilation", dilation)] if dilation > 1 else []
    options += [("groups", groups)] if groups > 1 else []
    y = _Sized(Call("F.conv2d", (x.expression, taps.expression), tuple(options)), (taps.sizes[0], *space))
    return y if position == 0 else y.permuted(1, 2, 0)


def _mix(place: _Place, mix: Mix, inputs: Sequence[Shape], x: _Sized, weight: _Sized) -> _Sized:
    shape, letters = inputs[0], iter(_LETTERS)
    old = {dim: next(letters) for dim in shape.wide_dims}
    new = {dim: next(letters) for dim, size in zip(mix.dims, mix.sizes, strict=True) if not size.is_one}
    output = mix.shape((shape,))
    read = "".join([*new.values(), *(old[dim] for dim in mix.dims if dim in old)])
    written = "".join((new if dim in mix.dims else old)[dim] for dim in output.wide_dims)
    matrix, sizes = weight.expression, place.wide(output)
    if len(read) < len(weight.sizes):
        kept = [size for size in mix.weight((shape,)) if not size.is_one]
        matrix = Call("reshape", (matrix, *place.numbers(kept)))
    equation = f"n{''.join(old.values())},{read}->n{written}"
    return _Sized(Call("torch.einsum", (equation, x.expression, matrix)), sizes)


def _scale(_: _Place, scale: Scale, inputs: Sequence[Shape], x: _Sized, weight: _Sized) -> _Sized:
    axes = _axes(inputs[0], scale.dims)
    sizes = [n if axis in axes else 1 for axis, n in enumerate(x.sizes, 1)][axes[0] - 1 :]
    factor = weight.expression if tuple(sizes) == weight.sizes else Call("reshape", (weight.expression, *sizes))
    return _Sized(Call("*", (x.expression, factor)), x.sizes)


def _fold(_: _Place, fold: Fold, inputs: Sequence[Shape], x: _Sized) -> _Sized:
    axes = _axes(inputs[0], fold.dims)
    left = tuple(n for axis, n in enumerate(x.sizes, 1) if axis not in axes)
    return _Sized(Call(_FOLDS[fold.kind], (x.expression, _number_or_all(axes))), left)


def _unfold(place: _Place, unfold: Unfold, inputs: Sequence[Shape], x: _Sized) -> _Sized:
    shape, output = inputs[0], unfold.shape((inputs[0],))
    position = shape.channel
    assert position is not None
    axes = _axes(shape, [DimName(1 - position, name) for name in unfold.over])
    beside = unfold.dilation * (unfold.kernel // 2)
    pads = [beside if axis in axes else 0 for axis in range(len(x.sizes), axes[0] - 1, -1)]
    windows: Expression = Call("F.pad", (x.expression, tuple(pad for pad in pads for _ in range(2))))
    for axis in axes:
        windows = Call("unfold", (windows, axis, 2 * beside + 1, 1))
        if unfold.dilation > 1:
            windows = Call("every", (windows, unfold.dilation))
    dims = [*shape.wide_dims, *(DimName(position, f"K{name}") for name in unfold.over)]
    made = _Sized(windows, tuple(place.number(output.size(dim)) for dim in dims))
    return made.permuted(*(dims.index(dim) for dim in output.wide_dims))


def _shift(_: _Place, shift: Shift, inputs: Sequence[Shape], x: _Sized) -> _Sized:
    axes = _axes(inputs[0], shift.dims)
    distances = tuple(shift.distance for _ in axes)
    return _Sized(Call("roll", (x.expression, _number_or_all(distances), _number_or_all(axes))), x.sizes)


def _softmax(_: _Place, softmax: Softmax, inputs: Sequence[Shape], x: _Sized) -> _Sized:
    return _Sized(Call("softmax", (x.expression, _axis(inputs[0], softmax.dim))), x.sizes)


def _activation(_: _Place, activation: Activation, __: Sequence[Shape], x: _Sized) -> _Sized:
    return _Sized(Call(_ACTIVATIONS[activation.kind], (x.expression,)), x.sizes)


def _elementwise(_: _Place, elementwise: Elementwise, __: Sequence[Shape], x: _Sized) -> _Sized:
    if elementwise.kind == "sqrt":
        inside = Call("+", (Call("abs", (x.expression,)), SQRT_EPSILON))
        return _Sized(Call("sqrt", (inside,)), x.sizes)
    method = "square" if elementwise.kind == "sqr" else elementwise.kind
    return _Sized(Call(method, (x.expression,)), x.sizes)


def _group(_: _Place, __: Group, ___: Sequence[Shape], x: _Sized) -> _Sized:
    return x


def _broadcast(place: _Place, broadcast: Broadcast, inputs: Sequence[Shape], left: _Sized, right: _Sized) -> _Sized:
    stretch = broadcast.stretch((inputs[0], inputs[1]))
    if stretch.multiplier.is_one:
        left = left.reshaped(*right.sizes)
    else:
        wide = [size for size in inputs[1].sizes if not size.is_one]
        head, tail = _leading(wide, stretch.prefix), len(wide) - _leading(wide[::-1], stretch.suffix)
        before, after = right.sizes[:head], right.sizes[tail:]
        if stretch.middle.is_one:
            left = left.reshaped(*before, *(1 for _ in range(head, tail)), *after)
        else:
            times, middle = place.numbers((stretch.multiplier, stretch.middle))
            right = right.reshaped(*before, times, middle, *after)
            left = left.reshaped(*before, 1, middle, *after)
    return _Sized(Call(_BROADCASTS[broadcast.kind], (left.expression, right.expression)), right.sizes)


def _leading(sizes: Sequence[Variable], total: Variable) -> int:
    """Return how many of the first sizes have a product."""
    return next(k for k in range(len(sizes) + 1) if product(sizes[:k]) == total)


def _bmm(place: _Place, bmm: Bmm, inputs: Sequence[Shape], left: _Sized, right: _Sized) -> _Sized:
    matrices = []
    for tensor, shape, is_turned in zip((left, right), inputs, (bmm.transpose_left, bmm.transpose_right), strict=True):
        rows, columns = place.numbers([meta.numel for meta in shape.metas])
        matrix = tensor.reshaped(rows, columns)
        if is_turned:
            matrix = _Sized(Call("transpose", (matrix.expression, 1, 2)), (columns, rows))
        matrices.append(matrix)
    (rows, inner), (_, columns) = (matrix.sizes for matrix in matrices)
    y = Call("@", tuple(matrix.expression for matrix in matrices))
    if bmm.softmax:
        y = Call("softmax", (Call("/", (y, sqrt(inner))), -1))
    return _Sized(y, (rows, columns))


def _output(place: _Place, _: Output, inputs: Sequence[Shape], x: _Sized) -> _Sized:
    (shape,) = inputs
    if shape.channel == 1:
        space, channels = (len(place.wide(meta)) for meta in shape.metas)
        return x.permuted(*range(space, space + channels), *range(space))
    return x


_LOWERINGS: dict[type[Primitive], Callable[..., _Sized]] = {
    Fc: _fc,
    Convolution: _convolution,
    Mix: _mix,
    Scale: _scale,
    Fold: _fold,
    Unfold: _unfold,
    Group: _group,
    Shift: _shift,
    Softmax: _softmax,
    Activation: _activation,
    Elementwise: _elementwise,
    Broadcast: _broadcast,
    Bmm: _bmm,
    Output: _output,
}
