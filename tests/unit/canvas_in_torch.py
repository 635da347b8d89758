"""Runs a Canvas kernel on tensors of real sizes, so that PyTorch says which shapes fit and what is multiplied."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cofire.search.canvas import Extent, Kernel
from cofire.search.canvas.primitives import Bmm, Broadcast, Convolution, Fc, Fold, Mix, Unfold


class Runner:
    """Runs a kernel on zeros and counts what PyTorch counts."""

    def __init__(self, kernel: Kernel, extent: Extent) -> None:
        self.kernel, self.extent, self.parameters = kernel, extent, 0
        counter = FlopCounterMode(display=False)
        with counter:
            self.output = self.run()
        self.multiply_adds = counter.get_total_flops() // 2

    def numbers(self, sizes) -> list[int]:
        found = [size.value(self.extent, self.kernel.groups) for size in sizes]
        assert all(value.denominator == 1 for value in found)
        return [value.numerator for value in found]

    def run(self) -> torch.Tensor:
        graph, found = self.kernel.graph, [torch.zeros(1, *self.extent)]
        for position, node in enumerate(graph.nodes[1:], 1):
            inputs = graph.input_shapes(position)
            weight = torch.zeros(self.numbers(graph.weight(position))) if node.primitive.weighted else None
            self.parameters += 0 if weight is None else weight.numel()
            tensors = [
                found[k].reshape(1, *self.numbers(shape.sizes)) for k, shape in zip(node.inputs, inputs, strict=True)
            ]
            made = self.apply(node.primitive, inputs, tensors, weight)
            found.append(made.reshape(1, *self.numbers(graph.shapes[position].sizes)))
        return found[-1].reshape(1, *self.extent)

    def apply(self, primitive, inputs, tensors, weight) -> torch.Tensor:
        x, shape = tensors[0], inputs[0]
        if isinstance(primitive, Fc):
            first, second = self.numbers(meta.numel for meta in shape.metas)
            x = x.reshape(1, first, second)
            y = F.conv1d(x if primitive.meta == 0 else x.mT, weight.flatten(0, 1)[:, :, None], groups=len(weight))
            return y if primitive.meta == 0 else y.mT
        if isinstance(primitive, Convolution | Unfold):
            return self.windows(primitive, shape, x, weight)
        if isinstance(primitive, Mix):
            places = [1 + shape.dims.index(dim) for dim in primitive.dims]
            moved = x.movedim(places, list(range(-len(places), 0)))
            new = weight.shape[: len(places)]
            y = (
                moved.flatten(-len(places)).reshape(-1, prod(weight.shape[len(places) :]))
                @ weight.reshape(prod(new), -1).T
            )
            return y.reshape(*moved.shape[: -len(places)], *new).movedim(list(range(-len(places), 0)), places)
        if isinstance(primitive, Fold):
            return x.amax([1 + shape.dims.index(dim) for dim in primitive.dims], keepdim=True)
        if isinstance(primitive, Broadcast):
            p, times, middle, s = self.numbers(primitive.stretch(inputs))
            return x.reshape(p, 1, middle, s) + tensors[1].reshape(p, times, middle, s)
        if isinstance(primitive, Bmm):
            left, right = (
                t.reshape(1, *self.numbers(m.numel for m in s.metas)) for t, s in zip(tensors, inputs, strict=True)
            )
            return torch.bmm(
                left.mT if primitive.transpose_left else left, right.mT if primitive.transpose_right else right
            )
        return x

    def windows(self, primitive, shape, x, weight) -> torch.Tensor:
        channels, height, width = self.numbers(
            (shape.metas[shape.channel].numel, *shape.metas[1 - shape.channel].sizes)
        )
        x = x.reshape(1, channels, height, width) if shape.channel == 0 else x.reshape(1, height, width, channels)
        x = x if shape.channel == 0 else x.permute(0, 3, 1, 2)
        k, d = primitive.kernel, primitive.dilation
        if isinstance(primitive, Unfold):
            kh, kw = (k if name in primitive.over else 1 for name in "HW")
            y = F.unfold(x, (kh, kw), dilation=d, padding=(d * (kh // 2), d * (kw // 2)))
        else:
            groups = channels if primitive.channels is None else len(weight)
            kernel = weight[:, None] if primitive.channels is None else weight.flatten(0, 1)
            y = F.conv2d(x, kernel, dilation=d, padding=d * (k // 2), groups=groups).flatten(2)
        return y if shape.channel == 0 else y.mT
