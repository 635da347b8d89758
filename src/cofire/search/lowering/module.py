"""An operator as a PyTorch module that owns its weights and starts them with the right spread."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.gather import GatherKernel
from cofire.search.lowering.optimised import OptimisedKernel

Backend = Literal["gather", "optimised"]
_KERNELS = {"gather": GatherKernel, "optimised": OptimisedKernel}


class LoweredOperator(nn.Module):
    """An operator at the sizes of one mapping.

    Two modules of the same operator and state dict are the same function: nothing is drawn but the weights.

    Attributes:
        weights: One parameter per weight, normal with :func:`initial_deviations`.
        kernel: What computes the output.
    """

    def __init__(self, operator: Operator, mapping: int = 0, backend: Backend = "optimised") -> None:
        super().__init__()
        if backend not in _KERNELS:
            raise SearchError(f"backend {backend!r} is not among {', '.join(sorted(_KERNELS))}; pick one of these")
        bound = Bound(operator, mapping)
        spreads = zip(bound.weight_shapes, initial_deviations(bound), strict=True)
        self.weights = nn.ParameterList([torch.randn(shape) * deviation for shape, deviation in spreads])
        self.kernel = _KERNELS[backend](operator, mapping)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output.

        Args:
            x: The input, of the operator's input shape; free dims such as the batch may have any size.

        Raises:
            SearchError: The shape is not the operator's.
        """
        return self.kernel(x, list(self.weights))


def lower(operator: Operator, mapping: int = 0, backend: Backend = "optimised") -> LoweredOperator:
    """Return an operator as a module.

    Args:
        operator: The operator.
        mapping: Which of the operator's mappings gives the sizes.
        backend: ``optimised`` is fast, ``gather`` is its reference.

    Raises:
        SearchError: There is no such mapping or backend.
    """
    return LoweredOperator(operator, mapping, backend)


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
