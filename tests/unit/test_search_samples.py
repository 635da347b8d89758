"""Random samples of four spaces, each under two mappings, are sound operators.

"No input is discarded" means: every element of the input reaches some output element at a point of the loops where no
window leaves its domain. With positive weights and inputs and an upstream of ones, the gradient of the input is then
positive everywhere, and that of a weight exactly where some such point reads it. Where each tensor is read is worked
out here anew, from the primitives' definitions in NumPy, and compared with the gradients that torch finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from random import Random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cofire.search import Allowance, Assembler, Operator, Space, Symbols
from cofire.search.lowering import GatherKernel, OptimisedKernel
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Share,
    Shift,
    Split,
    Stride,
    Unfold,
    without_shares,
)
from cofire.search.sampling import Moves
from cofire.search.sizes import Size

Ints = NDArray[np.int64]


def in_one_dim(**changes) -> Space:
    """[N, Ci, H] -> [N, Co, H] with windows, groups and dilation."""
    small = {"N": 2, "Ci": 8, "Co": 4, "H": 12, "k": 3, "g": 2}
    large = {"N": 1, "Ci": 6, "Co": 12, "H": 30, "k": 5, "g": 3}
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k", "g"], [small, large])
    n, ci, co, h = map(symbols.size, symbols.primary)
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2, "g": 2})
    return Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),), **changes)


def in_two_dims() -> Space:
    """[N, Ci, H, W] -> [N, Co, H, W], channels unordered, three tensors; one mapping is square, the other is not."""
    square = {"N": 1, "Ci": 4, "Co": 8, "H": 7, "W": 7, "k": 3, "g": 2}
    oblong = {"N": 2, "Ci": 8, "Co": 4, "H": 11, "W": 6, "k": 3, "g": 2}
    symbols = Symbols.of(["N", "Ci", "Co", "H", "W"], ["k", "g"], [square, oblong])
    n, ci, co, h, w = map(symbols.size, symbols.primary)
    return Space(
        (n, ci, h, w),
        (n, co, h, w),
        Allowance.of(symbols, {"Ci": 2, "Co": 2, "k": 2, "g": 2}),
        fixed=((0, 0),),
        unordered_input=frozenset({1}),
        unordered_output=frozenset({1}),
        max_tensors=3,
        max_reductions=3,
        max_chain=6,
        max_splits=1,
        max_merges=1,
        max_shifts=2,
        max_strides=0,
    )


def projection() -> Space:
    """[N, L, C] -> [N, L, t*C], as the projection to queries, keys and values of GPT-2."""
    short = {"N": 2, "L": 7, "C": 8, "t": 3, "k": 3, "g": 2}
    long = {"N": 1, "L": 8, "C": 16, "t": 5, "k": 3, "g": 4}
    symbols = Symbols.of(["N", "L", "C"], ["t", "k", "g"], [short, long])
    n, length, c = map(symbols.size, symbols.primary)
    return Space(
        (n, length, c),
        (n, length, symbols.size("t*C")),
        Allowance.of(symbols, {"C": 4, "t": 2, "k": 2, "g": 2}),
        fixed=((0, 0),),
        unordered_input=frozenset({2}),
        max_tensors=3,
        max_reductions=3,
        max_splits=2,
        max_merges=2,
        max_shifts=2,
        max_strides=0,
    )


def with_few_weights() -> Space:
    """The first space with pooling, repeats and per-channel weights."""
    return in_one_dim(needs_matmul=False, needs_weight=False, max_repeat=4)


# Space, most steps, samples.
SPACES = {
    "one dim": (in_one_dim, 6, 600),
    "two dims": (in_two_dims, 8, 600),
    "projection": (projection, 6, 20),
    "few weights": (with_few_weights, 5, 400),
}
every_space = pytest.mark.parametrize("name", list(SPACES))


@cache
def samples(name: str) -> tuple[Operator, ...]:
    make, depth, count = SPACES[name]
    moves, random = Moves(make(), depth), Random(0)
    found: list[Operator] = []
    while len(found) < count:
        walk = moves.walk(moves.root, random, backtracks=40)
        found += [] if walk is None else [walk.operator]
    return tuple(found)


def cases(name: str) -> list[tuple[Operator, int]]:
    """Each operator once under every mapping."""
    mappings = range(len(SPACES[name][0]().allowance.symbols.mappings))
    return [(operator, mapping) for operator in dict.fromkeys(samples(name)) for mapping in mappings]


def numbers(sizes: Sequence[Size], mapping: int) -> tuple[int, ...]:
    """Sizes from their exponents, past what the package evaluates."""
    row = sizes[0].symbols.mappings[mapping] if sizes else ()
    values = []
    for size in sizes:
        above = prod(n**e for n, e in zip(row, size.exponents, strict=True) if e > 0)
        below = prod(n**-e for n, e in zip(row, size.exponents, strict=True) if e < 0)
        assert above % below == 0
        values.append(above // below)
    return tuple(values)


def coordinate(dim: Dim, grid: dict[Dim, Ints], mapping: int, valid: list[NDArray[np.bool_]]) -> Ints:
    """The coordinate at all points of the loops; ``valid`` takes where each window stays inside."""
    if isinstance(dim, Iterator):
        return grid[dim]
    first, *rest = [coordinate(child, grid, mapping, valid) for child in dim.below]
    (n,) = numbers([dim.size], mapping)
    match dim:
        case Share():
            return first
        case Split():
            return first * numbers([dim.minor.size], mapping)[0] + rest[0]
        case MergeMajor():
            return first // numbers([dim.block], mapping)[0]
        case MergeMinor():
            return first % n
        case Shift():
            return (first + dim.distance) % n
        case Stride():
            return first * numbers([dim.stride], mapping)[0]
        case Unfold():
            index = first + rest[0] - numbers([dim.window.size], mapping)[0] // 2
            valid.append((index >= 0) & (index < n))
            return index
    raise AssertionError(dim)


def reads(operator: Operator, mapping: int) -> list[NDArray[np.bool_]]:
    """Which elements of the input and of each weight are read where no window leaves its domain."""
    iterators = (*operator.output, *operator.reductions)
    shape = numbers([dim.size for dim in iterators], mapping)
    grid: dict[Dim, Ints] = dict(zip(iterators, np.ix_(*map(np.arange, shape)), strict=True))
    valid: list[NDArray[np.bool_]] = []
    indices = [
        [coordinate(without_shares(dim), grid, mapping, valid) for dim in dims]
        for dims in (operator.input, *operator.weights, operator.expansions)
    ]
    inside = np.ones(shape, dtype=bool)
    for part in valid:
        inside &= part
    found = []
    for dims, index in zip((operator.input, *operator.weights), indices[:-1], strict=True):
        there = np.zeros(numbers([dim.size for dim in dims], mapping), dtype=bool)
        there[tuple(np.broadcast_to(part, shape)[inside] for part in index)] = True
        found.append(there)
    return found


def positive(shape: Sequence[int]) -> torch.Tensor:
    return (torch.rand(tuple(shape), dtype=torch.float64) + 0.5).requires_grad_()


def values_and_gradients(kernel: torch.nn.Module, x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    y = kernel(x, weights)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *weights])]


def test_more_than_a_thousand_samples_hold_hundreds_of_operators_of_every_make():
    drawn = {name: samples(name) for name in SPACES}
    assert sum(map(len, drawn.values())) > 1000
    assert sum(len(set(operators)) for operators in drawn.values()) >= 250
    weights = {len(operator.weights) for operators in drawn.values() for operator in operators}
    kinds = {type(d) for o in drawn["one dim"] for end in o.input for d in end.walk()}
    assert weights == {0, 1, 2}
    assert kinds >= {Split, MergeMajor, MergeMinor, Shift, Unfold, Share}


@every_space
def test_a_sample_has_the_shape_of_its_space_and_finite_gradients_under_every_mapping(name):
    torch.manual_seed(0)
    space = SPACES[name][0]()
    for operator, mapping in cases(name):
        x = positive(numbers(space.input, mapping))
        weights = [positive(numbers([dim.size for dim in dims], mapping)) for dims in operator.weights]
        found = values_and_gradients(OptimisedKernel(operator, mapping), x, weights)
        assert found[0].shape == numbers(space.output, mapping), str(operator)
        for one, read in zip(found[1:], reads(operator, mapping), strict=True):
            assert bool(torch.isfinite(one).all()), str(operator)
            assert bool(one.count_nonzero()), str(operator)
            assert np.array_equal((one > 0).numpy(), read), str(operator)
        for one, other in zip(found, values_and_gradients(GatherKernel(operator, mapping), x, weights), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=str(operator))


@every_space
def test_a_sample_reads_every_element_of_its_input(name):
    for operator, mapping in cases(name):
        assert reads(operator, mapping)[0].all(), f"{operator} under mapping {mapping}"


def test_a_stride_that_no_window_takes_up_is_seen_to_discard():
    symbols = Symbols.of(["N", "H"], ["s"], [{"N": 2, "H": 6, "s": 2}])
    build = Assembler(symbols)
    n, h = build.output("N", "H/s")
    read = reads(build.finish(n, build.stride(h, "s")), 0)[0]
    assert read[:, ::2].all()
    assert not read[:, 1::2].any()


def test_a_weight_that_has_position_and_tap_is_not_read_where_a_window_is_outside():
    symbols = Symbols.of(["H"], ["k"], [{"H": 6, "k": 3}])
    build = Assembler(symbols)
    (h,) = build.output("H")
    position, tap = build.contract([h, *build.reduce("k")])
    read = reads(build.finish(build.unfold(position, tap)), 0)[1]
    assert read.shape == (6, 3)
    assert [tuple(map(int, where)) for where in np.argwhere(~read)] == [(0, 0), (5, 2)]
