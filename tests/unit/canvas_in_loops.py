"""A slow interpreter of Canvas's kernels: loops over elements that read the formulas of the primitives word by word.

It knows nothing of the lowering: tensors are of one example, [all dims of the shape], those of size 1 too.
"""

from __future__ import annotations

from itertools import product as pairs
from math import erf, exp, prod, sqrt, tanh

import numpy as np

from cofire.search.canvas import Extent, Kernel

ACTIVATIONS = {
    "gelu": lambda v: v * (1 + erf(v / sqrt(2))) / 2,
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + exp(-v)),
    "tanh": tanh,
}
ELEMENTWISE = {
    "abs": abs,
    "exp": exp,
    "neg": lambda v: -v,
    "sin": np.sin,
    "sqrt": lambda v: sqrt(abs(v) + 1e-6),
    "sqr": lambda v: v * v,
}
BROADCASTS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
}


def run(kernel: Kernel, extent: Extent, x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Return the output [C, H, W] for one example [C, H, W]."""
    graph, left = kernel.graph, list(weights)

    def numbers(sizes) -> tuple[int, ...]:
        return tuple(int(size.value(extent, kernel.groups)) for size in sizes)

    found = [x]
    for position, node in enumerate(graph.nodes[1:], 1):
        shapes = graph.input_shapes(position)
        inputs = [found[k].reshape(numbers(shape.sizes)) for k, shape in zip(node.inputs, shapes, strict=True)]
        made = np.zeros(numbers(graph.shapes[position].sizes))
        arguments = [node.primitive, shapes, inputs, made]
        arguments += [left.pop(0)] if node.primitive.weighted else []
        if node.primitive.name in ("broadcast", "bmm"):
            arguments.append(numbers)
        made = globals()[f"_{node.primitive.name}"](*arguments)
        found.append(made)
    assert not left
    return found[-1].reshape(extent)


def _fc(fc, _, inputs, y, weight):
    (x,), (groups, out, terms) = inputs, weight.shape
    before, after = (1, prod(x.shape[4:])) if fc.meta == 0 else (prod(x.shape[:-4]), 1)
    rows = x.reshape(before, groups, terms, after)
    new = np.zeros((before, groups, out, after))
    for p, g, o, q in np.ndindex(new.shape):
        new[p, g, o, q] = sum(weight[g, o, i] * rows[p, g, i, q] for i in range(terms))
    return new.reshape(y.shape)


def _images(shape, x):
    """Return [channels, H, W], channels row by row, and how to go back."""
    if shape.channel == 0:
        return x.reshape(-1, *x.shape[4:])
    return np.moveaxis(x.reshape(*x.shape[:2], -1), -1, 0)


def _convolution(convolution, shapes, inputs, y, weight):
    x = _images(shapes[0], inputs[0])
    (height, width), k, d = x.shape[1:], convolution.kernel, convolution.dilation
    if convolution.channels is None:
        weight = weight[:, None, None]
    groups, out, terms = weight.shape[:3]
    new = np.zeros((groups * out, height, width))
    for (g, o, a, b), h, w in pairs(np.ndindex(groups, out, k, k), range(height), range(width)):
        row, column = h + d * (a - k // 2), w + d * (b - k // 2)
        if 0 <= row < height and 0 <= column < width:
            new[g * out + o, h, w] += weight[g, o, :, a, b] @ x[g * terms : (g + 1) * terms, row, column]
    return (new if shapes[0].channel == 0 else np.moveaxis(new, 0, -1)).reshape(y.shape)


def _mix(mix, shapes, inputs, y, weight):
    (x,), axes = inputs, [shapes[0].dims.index(dim) for dim in mix.dims]
    for new in np.ndindex(y.shape):
        for old in pairs(*(range(x.shape[axis]) for axis in axes)):
            source = list(new)
            for axis, index in zip(axes, old, strict=True):
                source[axis] = index
            y[new] += weight[(*(new[axis] for axis in axes), *old)] * x[tuple(source)]
    return y


def _scale(scale, shapes, inputs, y, weight):
    axes = [shapes[0].dims.index(dim) for dim in scale.dims]
    for p in np.ndindex(y.shape):
        y[p] = weight[tuple(p[axis] for axis in axes)] * inputs[0][p]
    return y


def _fold(fold, shapes, inputs, y):
    axes = [shapes[0].dims.index(dim) for dim in fold.dims]
    for p in np.ndindex(y.shape):
        values = inputs[0][tuple(slice(None) if axis in axes else k for axis, k in enumerate(p))].ravel()
        y[p] = sum(values) / len(values) if fold.kind == "avg" else max(values)
    return y


def _unfold(unfold, shapes, inputs, y):
    (x,), position = inputs, shapes[0].channel
    first = 0 if position == 0 else 2  # of the channels; the height comes 4 after or 2 before
    height = 4 if position == 0 else 0
    k, d = unfold.kernel, unfold.dilation
    for p in np.ndindex(y.shape):
        source = list(p)
        for name, window, axis in (("H", first + 2, height), ("W", first + 3, height + 1)):
            if name in unfold.over:
                source[axis] += d * (p[window] - k // 2)
                source[window] = 0
        if all(0 <= index < size for index, size in zip(source, x.shape, strict=True)):
            y[p] = x[tuple(source)]
    return y


def _group(group, shapes, inputs, y):
    (x,) = inputs
    axis = 0 if group.meta == 0 else y.ndim - 4
    for p in np.ndindex(y.shape):
        source = list(p)
        source[axis], source[axis + 1] = 0, p[axis] * y.shape[axis + 1] + p[axis + 1]
        y[p] = x[tuple(source)]
    return y


def _shift(shift, shapes, inputs, y):
    axes = [shapes[0].dims.index(dim) for dim in shift.dims]
    for p in np.ndindex(y.shape):
        moved = [(k - shift.distance) % y.shape[axis] if axis in axes else k for axis, k in enumerate(p)]
        y[p] = inputs[0][tuple(moved)]
    return y


def _softmax(softmax, shapes, inputs, y):
    (x,), axis = inputs, shapes[0].dims.index(softmax.dim)
    for p in np.ndindex(y.shape):
        total = sum(exp(x[(*p[:axis], j, *p[axis + 1 :])]) for j in range(x.shape[axis]))
        y[p] = exp(x[p]) / total
    return y


def _activation(activation, _, inputs, y):
    return np.vectorize(ACTIVATIONS[activation.kind], otypes=[float])(inputs[0]).reshape(y.shape)


def _elementwise(elementwise, _, inputs, y):
    return np.vectorize(ELEMENTWISE[elementwise.kind], otypes=[float])(inputs[0]).reshape(y.shape)


def _broadcast(broadcast, shapes, inputs, y, numbers):
    """Strip what is equal at both ends, dims of size 1 left out, and repeat what is left of the left one."""
    left, right = ([size for size in shape.sizes if not size.is_one] for shape in shapes)
    head, tail = [], []
    while left and right and left[0] == right[0]:
        head.append(left.pop(0))
        right.pop(0)
    while left and right and left[-1] == right[-1]:
        tail.insert(0, left.pop())
        right.pop()
    before, middle, wide, after = (prod(numbers(sizes)) for sizes in (head, left, right, tail))
    one, other = inputs[0].reshape(before, middle, after), inputs[1].reshape(before, wide, after)
    new = np.zeros(other.shape)
    for p, i, q in np.ndindex(new.shape):
        new[p, i, q] = BROADCASTS[broadcast.kind](one[p, i % middle, q], other[p, i, q])
    return new.reshape(y.shape)


def _bmm(bmm, shapes, inputs, y, numbers):
    left, right = (
        x.reshape(numbers(meta.numel for meta in shape.metas)) for x, shape in zip(inputs, shapes, strict=True)
    )
    left = left.T if bmm.transpose_left else left
    right = right.T if bmm.transpose_right else right
    new = np.zeros((len(left), right.shape[1]))
    for a, b in np.ndindex(new.shape):
        new[a, b] = sum(left[a, k] * right[k, b] for k in range(len(right)))
    if bmm.softmax:
        for row in new:
            powers = [exp(v / sqrt(len(right))) for v in row]
            row[:] = [power / sum(powers) for power in powers]
    return new.reshape(y.shape)


def _output(_, shapes, inputs, y):
    (x,) = inputs
    if shapes[0].channel == 1:
        x = np.moveaxis(x, (0, 1), (-2, -1))
    return x.reshape(y.shape)
