"""An operator as a PyTorch module that owns its weights and starts them with the right spread."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.gather import GatherKernel
from cofire.search.lowering.optimised import OptimisedKernel
from cofire.search.lowering.steps import inverse, storage_order

Backend = Literal["gather", "optimised"]
_KERNELS = {"gather": GatherKernel, "optimised": OptimisedKernel}

COMPILE_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"layout_optimization": False}
"""Options for ``torch.compile`` of an operator.

On a CPU Inductor else turns all data to channels last around every convolution (torch 2.13), which made Syno's
operator 2 take two to three times as long, and the backward pass of a convolution of 512 channels 1.4 times.
"""


class LoweredOperator(nn.Module):
    """An operator at the sizes of one mapping.

    Two modules of the same operator and state dict are the same function: nothing is drawn but the weights. A weight
    has the operator's order of dims; in memory it lies as the convolution that reads it wants it, for turning it in
    every call took half as long as a convolution of 512 channels on 7 x 7 places itself.

    Attributes:
        weights: One parameter per weight, normal with :func:`initial_deviations`.
        kernel: What computes the output.
    """

    def __init__(
        self, operator: Operator, mapping: int = 0, backend: Backend = "optimised", contiguous_weights: bool = False
    ) -> None:
        super().__init__()
        if backend not in _KERNELS:
            raise SearchError(f"backend {backend!r} is not among {', '.join(sorted(_KERNELS))}; pick one of these")
        self.kernel = _KERNELS[backend](operator, mapping)
        is_laid_out = isinstance(self.kernel, OptimisedKernel) and not contiguous_weights
        steps = self.kernel.plan.steps if is_laid_out else ()
        bound = Bound(operator, mapping)
        weights = []
        for k, (shape, deviation) in enumerate(zip(bound.weight_shapes, initial_deviations(bound), strict=True)):
            order = storage_order(steps, f"w{k}", len(shape))
            drawn = torch.randn(shape) * deviation
            weights.append(drawn.permute(order).contiguous().permute(inverse(order)))
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output.

        Args:
            x: The input, of the operator's input shape; free dims such as the batch may have any size.

        Raises:
            SearchError: The shape is not the operator's.
        """
        return self.kernel(x, list(self.weights))


def lower(
    operator: Operator, mapping: int = 0, backend: Backend = "optimised", contiguous_weights: bool = False
) -> LoweredOperator:
    """Return an operator as a module.

    Args:
        operator: The operator.
        mapping: Which of the operator's mappings gives the sizes.
        backend: ``optimised`` is fast, ``gather`` is its reference.
        contiguous_weights: Whether weights lie in memory in the operator's order of dims, which FSDP2 and safetensors
            require, and not as their convolution reads them.

    Raises:
        SearchError: There is no such mapping or backend.
    """
    return LoweredOperator(operator, mapping, backend, contiguous_weights)


def initial_deviations(bound: Bound) -> tuple[float, ...]:
    """Return the standard deviation of each weight with which the output varies as much as the input.

    The variance of a sum of N uncorrelated products is N times theirs, so the weights that a reduction of size N
    indexes share a factor 1/N of variance, and all weights share it where it indexes none (fan-in initialisation, with
    the fan-in counted per reduction). A sum that only repeats its terms counts as N squared. Zero padding is left out.
    """
    factors = bound.operator.weight_coordinates
    variances = [1.0] * len(factors)
    read = [{i for dim in dims for i in dim.iterators} for dims in (bound.input, *factors)]
    for reduction in bound.reductions:
        holders = [k for k, iterators in enumerate(read[1:]) if reduction in iterators] or list(range(len(factors)))
        terms = bound.size(reduction) ** (1 if any(reduction in iterators for iterators in read) else 2)
        for k in holders:
            variances[k] /= terms ** (1 / len(holders))
    return tuple(sqrt(variance) for variance in variances)
