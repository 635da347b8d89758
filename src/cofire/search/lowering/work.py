"""What the steps of a plan cost a machine: multiply-adds, and elements read and written, by tracing shapes alone.

The steps run on tensors of the ``meta`` device, which have shapes and strides but no data, while each kernel that torch
would start is counted: views are free, and copies that torch makes by itself (of a permuted tensor that is flattened,
of the operands of an einsum) are seen where they happen. Only the forward pass is traced; a backward pass has twice its
products and copies of the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cofire.search.lowering.bound import Bound
from cofire.search.lowering.steps import Step, inverse, storage_order

# Matrix units and vector registers take so many numbers at once (AVX-512 in FP32, tensor cores): fewer cost as many.
# Measured: a convolution of 64 channels to 2 takes 2.2 times as long as one of a single tap to 18 with sums behind it.
LANES = 16
# Multiply-adds in the time of an element read or written in FP32: 10 on a core of an AMD EPYC (Zen 5) that convolves at
# 123 G multiply-adds/s and copies at 51 GB/s (benchmarks/bench_lowering.py measures both); 26 on an A100 by its data
# sheet.
ELEMENT = 10
# Multiply-adds in the time that it takes to start a kernel from Python, some 3 microseconds.
KERNEL = 400_000


@dataclass(frozen=True)
class Work:
    """What steps cost.

    Attributes:
        multiply_adds: Multiply-adds of products and convolutions.
        occupied: The same with small channel counts and matrices filled up to 16.
        moved: Elements that kernels read and write.
        kernels: How many kernels are started.
    """

    multiply_adds: int = 0
    occupied: int = 0
    moved: int = 0
    kernels: int = 0

    @property
    def price(self) -> int:
        """One number to compare plans by, in multiply-adds."""
        return self.occupied + ELEMENT * self.moved + KERNEL * self.kernels


def work(bound: Bound, steps: Sequence[Step]) -> Work:
    """Return what a plan's steps cost at the sizes of its mapping.

    Args:
        bound: The operator and the mapping.
        steps: The steps.
    """
    tensors = {"x": _shaped(bound.input_shape, range(len(bound.input_shape)))}
    for k, shape in enumerate(bound.weight_shapes):
        tensors[f"w{k}"] = _shaped(shape, storage_order(steps, f"w{k}", len(shape)))
    tensors |= {f"m{k}": _shaped((size,), (0,)) for k, size in enumerate(bound.shape(bound.masks))}
    ledger = _Ledger()
    with torch.no_grad(), ledger:
        for step in steps:
            tensors[step.name] = step.apply(tensors)
    return Work(ledger.multiply_adds, ledger.occupied, ledger.moved, ledger.kernels)


def _shaped(shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return a tensor of a shape and no data, whose dims lie in memory in an order."""
    laid = torch.empty([shape[k] for k in order], device="meta", dtype=torch.float32)
    return laid.permute(inverse(order))


class _Ledger(TorchDispatchMode):
    """Counts every kernel that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = self.occupied = self.moved = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel and count it."""
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view:
            return result
        self.kernels += 1
        self.moved += sum(tensor.numel() for tensor in (*_tensors(args), *_tensors([result])))
        if func.overloadpacket is torch.ops.aten.convolution:
            self._convolution(result, args[1], groups=args[8])
        elif func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            (rows, inner), columns = args[0].shape[-2:], args[1].shape[-1]
            batch = result.numel() // (rows * columns)
            self._products(batch, (rows, inner, columns))
        return result

    def _convolution(self, result: Tensor, weight: Tensor, groups: int) -> None:
        out, into, taps = weight.shape[0] // groups, weight.shape[1], prod(weight.shape[2:])
        places = result.numel() // weight.shape[0]
        if out == into == 1:
            # Depthwise kernels fill the lanes with groups.
            self.multiply_adds += places * groups * taps
            self.occupied += places * _filled(groups) * taps
        else:
            # The few input channels of a single group, as a first layer has them, are packed closer.
            packed = _filled(into, LANES // 2 if groups == 1 else LANES)
            self.multiply_adds += places * groups * taps * out * into
            self.occupied += places * groups * taps * _filled(out) * packed

    def _products(self, count: int, sides: tuple[int, ...]) -> None:
        self.multiply_adds += count * prod(sides)
        self.occupied += count * prod(map(_filled, sides))


def _filled(size: int, lanes: int = LANES) -> int:
    return -(-size // lanes) * lanes


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments and in the lists among them."""
    found = []
    for argument in arguments:
        found += [argument] if isinstance(argument, Tensor) else []
        found += [one for one in argument if isinstance(one, Tensor)] if isinstance(argument, list | tuple) else []
    return found
