"""The oracle: an operator as the loops that its formula says, one point at a time.

out[i] = Sum_r x[e(i, r)] * Prod_w W_w[c_w(i, r)], with a tensor read outside an Unfold's domain counted as zero (Syno's
formal model). Nothing is shared with the other lowerings but the operator itself. Slow: for tests at tiny sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering.bound import Bound
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Shift, Split, Stride, Unfold

Array = NDArray[np.floating]
Point = Mapping[Dim, int]

# Some ten seconds a million.
MAX_POINTS = 2_000_000


def coordinate(dim: Dim, point: Point, mapping: int = 0) -> int | None:
    """Return the value of a coordinate at one point of the loops; none where an Unfold leaves its domain.

    Args:
        dim: The coordinate, without Shares.
        point: The value of each iterator.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: The dim is of no known primitive.
    """
    if isinstance(dim, Iterator):
        return point[dim]
    below = [coordinate(child, point, mapping) for child in dim.below]
    if any(value is None for value in below):
        return None
    first, *rest = [value for value in below if value is not None]
    match dim:
        case Split():
            return first * dim.minor.size.value(mapping) + rest[0]
        case MergeMajor():
            return first // dim.block.value(mapping)
        case MergeMinor():
            return first % dim.block.value(mapping)
        case Shift():
            return (first + dim.distance) % dim.size.value(mapping)
        case Stride():
            return first * dim.stride.value(mapping)
        case Unfold():
            value = first + rest[0] - dim.window.size.value(mapping) // 2
            return value if 0 <= value < dim.size.value(mapping) else None
    raise SearchError(f"{type(dim).__name__} is not a primitive that can be lowered; use those of the assembler")


def loop_nest(operator: Operator, x: Array, weights: Sequence[Array], mapping: int = 0) -> Array:
    """Return the output, summed in double precision.

    Args:
        operator: The operator.
        x: The input, of the operator's input shape.
        weights: One array per weight, in the operator's order.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: Shapes are not the operator's, or the loops have more than 2,000,000 points.
    """
    bound = _checked(operator, x, weights, mapping)
    out = np.zeros(bound.output_shape)
    for place, sites in _points(bound):
        if all(site is not None for site in sites):
            out[place] += prod(_values((x, *weights), sites))
    return out


def loop_nest_gradients(
    operator: Operator, x: Array, weights: Sequence[Array], upstream: Array, mapping: int = 0
) -> tuple[Array, ...]:
    """Return the gradients of ``sum(out * upstream)`` to the input and to every weight.

    Args:
        operator: The operator.
        x: The input, of the operator's input shape.
        weights: One array per weight, in the operator's order.
        upstream: The gradient to the output, of its shape.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: Shapes are not the operator's, or the loops have more than 2,000,000 points.
    """
    bound = _checked(operator, x, weights, mapping)
    tensors = (x, *weights)
    gradients = tuple(np.zeros(tensor.shape) for tensor in tensors)
    for place, sites in _points(bound):
        if any(site is None for site in sites):
            continue
        values = _values(tensors, sites)
        for k, gradient in enumerate(gradients):
            others = prod(values[:k]) * prod(values[k + 1 :])
            gradient[sites[k]] += float(upstream[place]) * others
    return gradients


def _checked(operator: Operator, x: Array, weights: Sequence[Array], mapping: int) -> Bound:
    bound = Bound(operator, mapping)
    if tuple(x.shape) != bound.input_shape:
        raise SearchError(f"an input of shape {list(x.shape)}; the loops need {list(bound.input_shape)}, batch and all")
    bound.signature.check(x.shape, [weight.shape for weight in weights])
    points = prod(bound.shape((*bound.output, *bound.reductions)))
    if points > MAX_POINTS:
        raise SearchError(f"{points} points in the loops, more than {MAX_POINTS}; take smaller sizes")
    return bound


def _points(bound: Bound) -> Iterable[tuple[tuple[int, ...], list[tuple[int, ...] | None]]]:
    """Yield each point's place in the output and where it reads the input, the weights and the masks."""
    iterators = (*bound.output, *bound.reductions)
    for values in product(*(range(bound.size(iterator)) for iterator in iterators)):
        point: Point = dict(zip(iterators, values, strict=True))
        sites = [_site(dims, point, bound.mapping) for dims in (bound.input, *bound.factors)]
        yield values[: len(bound.output)], sites


def _values(tensors: Sequence[Array], sites: Sequence[tuple[int, ...] | None]) -> list[float]:
    """Return what is read at one point; masks come last among the sites and have no tensor."""
    return [float(tensor[site]) for tensor, site in zip(tensors, sites, strict=False) if site is not None]


def _site(dims: Sequence[Dim], point: Point, mapping: int) -> tuple[int, ...] | None:
    found = [coordinate(dim, point, mapping) for dim in dims]
    site = tuple(value for value in found if value is not None)
    return site if len(site) == len(found) else None
