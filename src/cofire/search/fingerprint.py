"""Semantic fingerprints: which operators compute the same function up to a re-indexing of their weights.

Canonical forms work on the graph and leave duplicates (seen in Syno's space: two equal reductions swapped; a
weight indexed by a bijection of a reduction; a Shift that commutes with a tower of reshapes). A fingerprint works on
the function instead, at small *probe sizes* and in exact arithmetic over the integers modulo 2**31 - 1.

An operator maps weights W to a linear map F(W) from inputs X to outputs Y; F is a sum of monomials in W. Three
invariants of the set of all F(W) make the fingerprint:

1. The linear span of that set, which the coefficients B_m of the monomials span; with one weight it *is* the set. It is
   applied to random inputs x_1 .. x_2t and the rows (B_m x_1, .., B_m x_2t) are brought to reduced echelon form, which
   the span alone determines. t is the least power of two at which the rank over x_1 .. x_t is that over x_1 .. x_2t:
   then no element of the span vanishes on the inputs, and two spans differ in the form if they differ at all, but for
   a chance of about 1 in 2**31 per dimension.
2. With two weights and more, the rank of the Jacobian dF/dW at a random W, on a fixed number of random inputs.
3. The same rank where the input is zero but at one position of one dim, or the output is read at one position of one
   dim, or both: it tells which weight has which coordinate.

Of an output with many elements a few per dim are looked at: runs at the start, in the middle and at the end, the longer
the fewer dims there are. With at most one weight, equal fingerprints mean equal functions at these outputs. With more,
they are necessary and not sufficient. Operators with different numbers of weights always differ: a product of two
weights may reach the same maps as a single one, but trains otherwise. Left out: functions that differ at large sizes
only, though windows and shifts are kept within dims.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product as cartesian
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Shift, Split, Stride, Unfold, without_shares
from cofire.search.sizes import Size, SizeKind, Symbols

Ints = NDArray[np.int64]

PRIME = 2**31 - 1  # a product of two residues fits int64
MAX_POINTS = 2**22  # so many residues add up exactly in float64, which bincount sums in
SPAN_OUTPUTS = 1024  # outputs at which a span is compared
RANK_OUTPUTS = 128  # outputs at which the Jacobian's rank is compared
RANK_COLUMNS = 256  # outputs times inputs at which it is


class WeightRank(NamedTuple):
    """How many of an operator's parameters matter.

    Attributes:
        rank: Rank of the Jacobian at a random point: the dimension of the set of functions.
        parameters: Elements of all weights, at the same sizes.
    """

    rank: int
    parameters: int


# --- probe sizes ---


def probe_sizes(operators: Sequence[Operator]) -> dict[str, int]:
    """Return a small number for every symbol, at which fingerprints of these operators are compared.

    Symbols get different primes, so that different monomials are different sizes: 2 to the smallest coefficient that is
    even in some mapping, odd ones to the other coefficients. A primary is also multiplied by the coefficients that
    divide it in some operator; it exceeds the windows that slide over it, 2 where it is shifted, and, where an operator
    has several weights, every coefficient, since a pair of low rank must stay one. A symbol is 1 if no operator names
    it, or if all read it, like a batch, at a bare iterator of the output and nowhere else.

    Args:
        operators: Operators over the same symbols, at least one.

    Raises:
        SearchError: There is none, or their symbols differ.
    """
    if not operators:
        raise SearchError("no operators to choose probe sizes for; pass at least one")
    symbols = operators[0].symbols
    if any(operator.symbols != symbols for operator in operators):
        raise SearchError("operators over different symbols have no common sizes; compare those of one search")
    dims = {dim for operator in operators for dim in _dims_of(operator)}
    used = [k for k in range(len(symbols.names)) if any(dim.size.exponents[k] for dim in dims)]
    used = [k for k in used if not all(_is_untouched(operator, k) for operator in operators)]
    first = len(symbols.primary)
    chosen = [1] * len(symbols.names)
    small = sorted((k for k in used if k >= first), key=lambda k: max(row[k] for row in symbols.mappings))
    even = next((k for k in small if any(row[k] % 2 == 0 for row in symbols.mappings)), None)
    for k in small:
        chosen[k] = 2 if k == even else _next_prime(2, chosen)
    factors = _forced_factors(symbols, dims, chosen)
    bases = list(chosen)
    least = max(chosen[first:], default=1) if any(len(operator.weights) > 1 for operator in operators) else 1
    for k in used:
        if k < first:
            bases[k] = _next_prime(least, bases)
            chosen[k] = bases[k] * factors[k]
    ordered = sorted(dims)
    while (short := next((dim for dim in ordered if _is_short(dim, chosen)), None)) is not None:
        k = max(k for k in range(first) if short.size.exponents[k] > 0)
        bases[k] = _next_prime(bases[k], bases)
        chosen[k] = bases[k] * factors[k]
    return dict(zip(symbols.names, chosen, strict=True))


def _dims_of(operator: Operator) -> set[Dim]:
    """Return every coordinate of an operator and what it is built on, Shares left out."""
    ends = (*operator.input, *(dim for weight in operator.weights for dim in weight), *operator.expansions)
    walked = {node for end in ends for node in without_shares(end).walk()}
    return walked | {*operator.output, *operator.reductions}


def _is_untouched(operator: Operator, symbol: int) -> bool:
    """Say whether a symbol occurs in one iterator alone, which the input is read at and nothing else."""
    having = [dim for dim in _dims_of(operator) if dim.size.exponents[symbol]]
    if len(having) != 1 or having[0] not in operator.output or symbol >= len(operator.symbols.primary):
        return False
    others = (*(dim for weight in operator.weight_coordinates for dim in weight), *operator.expansions)
    reads = sum(having[0] in dim.iterators for dim in (*operator.input_coordinates, *others))
    return reads == 1 and having[0] in operator.input_coordinates


def _next_prime(above: int, taken: Sequence[int]) -> int:
    number = above + 1
    while number in taken or any(number % d == 0 for d in range(2, number)):
        number += 1
    return number


def _forced_factors(symbols: Symbols, dims: set[Dim], chosen: Sequence[int]) -> list[int]:
    """Return what each primary must be a multiple of for the sizes of all dims to be whole."""
    first = len(symbols.primary)
    powers = [[0] * len(symbols.names) for _ in range(first)]
    for size in {dim.size for dim in dims if dim.size.kind is SizeKind.GENERAL}:
        above = [k for k in range(first) if size.exponents[k] > 0]
        for c in range(first, len(symbols.names)):
            if size.exponents[c] >= 0:
                continue
            divided = (k for k in above if all(row[k] % row[c] == 0 for row in symbols.mappings))
            k = next(divided, above[0])
            powers[k][c] = max(powers[k][c], -(size.exponents[c] // size.exponents[k]))
    return [prod(n**e for n, e in zip(chosen, row, strict=True)) for row in powers]


def _number(size: Size, chosen: Sequence[int]) -> int:
    powers = list(zip(chosen, size.exponents, strict=True))
    above, below = prod(n**e for n, e in powers if e > 0), prod(n**-e for n, e in powers if e < 0)
    if above % below:
        raise SearchError(f"size {size} is {above}/{below} at the probe sizes; take those of probe_sizes([operator])")
    return above // below


def _is_short(dim: Dim, chosen: Sequence[int]) -> bool:
    """Say whether a primary dim is too short to tell a Shift from its inverse, or windows from smaller ones."""
    if dim.size.kind is not SizeKind.GENERAL or not isinstance(dim, (Shift, Unfold)):
        return False
    reach = sum(_number(node.window.size, chosen) for node in dim.walk() if isinstance(node, Unfold))
    return _number(dim.size, chosen) <= max(reach, 2)


# --- points ---


@dataclass(frozen=True)
class _Points:
    """The points of an operator's loops at which every tensor is read inside its domain.

    Attributes:
        out: Flat index of the output at each point.
        x: Flat index of the input at each point.
        weights: Flat index of each weight at each point.
        output_shape: Shape of the output.
        kept: Coordinates looked at, per dim of the output.
        input_shape: Shape of the input.
        weight_sizes: Elements of each weight.
    """

    out: Ints
    x: Ints
    weights: tuple[Ints, ...]
    output_shape: tuple[int, ...]
    kept: tuple[int, ...]
    input_shape: tuple[int, ...]
    weight_sizes: tuple[int, ...]

    def where(self, kept: NDArray[np.bool_]) -> _Points:
        """Return some of the points."""
        weights = tuple(index[kept] for index in self.weights)
        shapes = self.output_shape, self.kept, self.input_shape, self.weight_sizes
        return _Points(self.out[kept], self.x[kept], weights, *shapes)


def _run_lengths(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Return how many coordinates of each dim to look at, the same of each as far as it has them, ``limit`` in all."""
    most = next(c for c in range(max(shape, default=1), 0, -1) if c == 1 or prod(min(n, c) for n in shape) <= limit)
    return tuple(min(n, most) for n in shape)


def _runs(size: int, kept: int) -> Ints:
    """Return coordinates of a dim, ascending: a third each from its start, its middle and its end."""
    side = kept // 3
    middle = kept - 2 * side
    start = size // 2 - middle // 2
    if kept == size:
        return np.arange(size)
    return np.r_[:side, start : start + middle, size - side : size]


def _points(operator: Operator, sizes: Mapping[str, int] | None, limit: int) -> _Points:
    given = probe_sizes([operator]) if sizes is None else sizes
    if set(given) != set(operator.symbols.names):
        raise SearchError(f"sizes for {', '.join(given)}; give one to each of {', '.join(operator.symbols.names)}")
    chosen = [given[name] for name in operator.symbols.names]
    iterators: tuple[Dim, ...] = (*operator.output, *operator.reductions)
    full = tuple(_number(dim.size, chosen) for dim in iterators)
    dims_out = len(operator.output)
    kept = _run_lengths(full[:dims_out], limit)
    shape = (*kept, *full[dims_out:])
    if prod(shape) > MAX_POINTS:
        raise SearchError(f"{prod(shape)} points at the probe sizes, more than {MAX_POINTS}; pass smaller sizes")
    axes = np.ix_(*(_runs(n, count) for n, count in zip(full, shape, strict=True)))
    grid: dict[Dim, Ints] = dict(zip(iterators, axes, strict=True))
    valid = np.ones(shape, dtype=bool)

    def flat(dims: Sequence[Dim]) -> tuple[Ints, tuple[int, ...]]:
        nonlocal valid
        index, lengths = np.zeros((), dtype=np.int64), tuple(_number(dim.size, chosen) for dim in dims)
        for dim, length in zip(dims, lengths, strict=True):
            value, inside = _coordinate(dim, grid, chosen)
            index, valid = index * length + value, valid & inside
        return np.broadcast_to(index, shape).ravel(), lengths

    out, output_shape = flat(operator.output)
    x, input_shape = flat(operator.input_coordinates)
    weights = [flat(dims) for dims in operator.weight_coordinates]
    flat([without_shares(dim) for dim in operator.expansions])  # a window that is repeated over still cuts
    sizes_of_weights = tuple(prod(lengths) for _, lengths in weights)
    every = _Points(out, x, tuple(index for index, _ in weights), output_shape, kept, input_shape, sizes_of_weights)
    return every.where(valid.ravel())


def _coordinate(dim: Dim, grid: Mapping[Dim, Ints], chosen: Sequence[int]) -> tuple[Ints, NDArray[np.bool_]]:
    """Return a coordinate at all points, and where it lies in every Unfold's domain."""
    if isinstance(dim, Iterator):
        return grid[dim], np.ones((), dtype=np.bool_)
    (first, valid), *rest = [_coordinate(child, grid, chosen) for child in dim.below]
    if rest:
        valid = valid & rest[0][1]
    match dim:
        case Split():
            return first * _number(dim.minor.size, chosen) + rest[0][0], valid
        case MergeMajor():
            return first // _number(dim.block, chosen), valid
        case MergeMinor():
            return first % _number(dim.block, chosen), valid
        case Shift():
            return (first + dim.distance) % _number(dim.size, chosen), valid
        case Stride():
            return first * _number(dim.stride, chosen), valid
        case Unfold():
            index = first + rest[0][0] - _number(dim.window.size, chosen) // 2
            return index, valid & (index >= 0) & (index < _number(dim.size, chosen))
    raise SearchError(f"{type(dim).__name__} is not a primitive that can be evaluated; use those of the assembler")


# --- linear algebra over the field ---


@dataclass(frozen=True)
class _Entries:
    """A family of linear maps from input to output: sum over entries with one ``row`` of coefficient * x.

    Attributes:
        row: Which map, per entry.
        out: Flat index of the output.
        x: Flat index of the input.
        coefficient: Residues.
    """

    row: Ints
    out: Ints
    x: Ints
    coefficient: Ints

    def where(self, kept: Ints) -> _Entries:
        """Return some of the entries."""
        return _Entries(self.row[kept], self.out[kept], self.x[kept], self.coefficient[kept])


def _random_residues(seed: int, size: int) -> Ints:
    """Return fixed pseudo-random residues (splitmix64), which no version of NumPy changes."""
    z = np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B9)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(PRIME)).astype(np.int64)


def _echelon(matrix: Ints) -> tuple[Ints, list[int]]:
    """Return the rows of the reduced echelon form that are not zero, and their pivots' columns; destroys its input."""
    pivots: list[int] = []
    for column in range(matrix.shape[1]):
        rank = len(pivots)
        if rank == len(matrix):
            break
        below = np.flatnonzero(matrix[rank:, column])
        if not len(below):
            continue
        if below[0]:
            matrix[[rank, rank + below[0]]] = matrix[[rank + below[0], rank]]
        pivot = matrix[rank, column:] * pow(int(matrix[rank, column]), -1, PRIME) % PRIME
        others = np.flatnonzero(matrix[:, column])
        others = others[others != rank]
        matrix[others, column:] = (matrix[others, column:] - matrix[others, column, None] * pivot) % PRIME
        matrix[rank, column:] = pivot
        pivots.append(column)
    return matrix[: len(pivots)], pivots


def _compressed(matrix: Ints) -> Ints:
    """Return no more rows than columns with the same span: random combinations, if there were more."""
    rows, columns = matrix.shape
    if rows <= columns:
        return matrix
    mix = _random_residues(7_000_003, columns * rows).reshape(columns, rows)
    (a1, a0), (b1, b0) = ((part >> 16, part & 0xFFFF) for part in (mix, matrix))
    high, low, cross, turned = (
        (left.astype(float) @ right.astype(float)).astype(np.int64) % PRIME
        for left, right in ((a1, b1), (a0, b0), (a1, b0), (a0, b1))
    )
    return (2 * high + (cross + turned) % PRIME * 65536 + low) % PRIME  # 2**32 is 2 modulo the prime


def _components(entries: _Entries) -> list[_Entries]:
    """Split a family into the parts that share neither a row nor an output: the blocks of a block-diagonal matrix."""
    if not len(entries.row):
        return []
    _, row = np.unique(entries.row, return_inverse=True)
    _, out = np.unique(entries.out, return_inverse=True)
    label = np.arange(row.max() + 1)
    while True:
        of_out = np.full(out.max() + 1, len(label))
        np.minimum.at(of_out, out, label[row])
        new = label.copy()
        np.minimum.at(new, row, of_out[out])
        if np.array_equal(new, label):
            break
        label = new
    order = np.argsort(label[row], kind="stable")
    cuts = np.flatnonzero(np.diff(label[row][order])) + 1
    return [entries.where(part) for part in np.split(order, cuts)]


def _applied(part: _Entries, inputs: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return a span of the maps applied to the inputs, of columns [inputs, outputs], and the outputs."""
    rows, row = np.unique(part.row, return_inverse=True)
    outs, out = np.unique(part.out, return_inverse=True)
    flat, size = row * len(outs) + out, len(rows) * len(outs)
    images = [np.bincount(flat, part.coefficient * x[part.x] % PRIME, size).astype(np.int64) % PRIME for x in inputs]
    matrix = np.stack([image.reshape(len(rows), len(outs)) for image in images], axis=1).reshape(len(rows), -1)
    return _compressed(matrix), outs


def _span(entries: _Entries, width: int) -> tuple[int, list[tuple[Ints, Ints, int]]]:
    """Return the span of a family: inputs used, and per component its echelon form, its outputs and its rank.

    Args:
        entries: The family.
        width: Elements of the input.
    """
    parts = _components(entries)
    half = 1
    while True:
        inputs = [_random_residues(seed, width) for seed in range(1, 2 * half + 1)]
        found = []
        for part in parts:
            matrix, outs = _applied(part, inputs)
            form, pivots = _echelon(matrix)
            if pivots and pivots[-1] >= half * len(outs):
                break
            found.append((form, outs, len(pivots)))
        else:
            return 2 * half, found
        half *= 2


def _monomials(points: _Points) -> _Entries:
    """Return the coefficients of the monomials in the weights, one row per monomial."""
    row = np.zeros_like(points.out)
    for index, size in zip(points.weights, points.weight_sizes, strict=True):
        _, row = np.unique(row * size + index, return_inverse=True)
    return _without_repeats(_Entries(row, points.out, points.x, np.ones_like(points.out)))


def _without_repeats(entries: _Entries) -> _Entries:
    """Return one of each map that a family holds several times, as a low-rank dim makes it; told by two residues."""
    if not len(entries.row):
        return entries
    rows, row = np.unique(entries.row, return_inverse=True)
    keys = []
    for seed in (11_000_003, 11_000_027):
        left = _random_residues(seed, int(entries.x.max()) + 1)[entries.x]
        right = _random_residues(seed + 4, int(entries.out.max()) + 1)[entries.out]
        image = entries.coefficient * left % PRIME * right % PRIME
        keys.append(np.bincount(row, image, len(rows)).astype(np.int64) % PRIME)
    _, first = np.unique(keys[0] * 2**31 + keys[1], return_index=True)
    kept = np.zeros(len(rows), dtype=bool)
    kept[first] = True
    return entries.where(np.flatnonzero(kept[row]))


def _jacobian(points: _Points) -> _Entries:
    """Return the derivatives to the weights at random weights, one row per parameter."""
    values = [_random_residues(1_000_003 + k, size)[index] for k, (index, size) in _numbered(points)]
    start, parts = 0, []
    for k, (index, size) in _numbered(points):
        coefficient = np.ones_like(points.out)
        for j, value in enumerate(values):
            coefficient = coefficient if j == k else coefficient * value % PRIME
        parts.append((index + start, coefficient))
        start += size
    times = len(parts)
    return _Entries(
        np.concatenate([row for row, _ in parts]),
        np.tile(points.out, times),
        np.tile(points.x, times),
        np.concatenate([coefficient for _, coefficient in parts]),
    )


def _numbered(points: _Points) -> list[tuple[int, tuple[Ints, int]]]:
    return list(enumerate(zip(points.weights, points.weight_sizes, strict=True)))


# --- fingerprints ---


def _at_middle(index: Ints, shape: tuple[int, ...], dim: int | None) -> NDArray[np.bool_]:
    """Say at which points one coordinate of a flat index is in the middle of its dim; without a dim, at all."""
    if dim is None:
        return np.ones(len(index), dtype=bool)
    return index // prod(shape[dim + 1 :]) % shape[dim] == shape[dim] // 2


def _ranks(points: _Points) -> Generator[int, None, None]:
    """Yield the Jacobian's rank for every choice of a dim of the input and one of the output to restrict, or none."""
    width = prod(points.input_shape)
    ins, outs = ((None, *(d for d, n in enumerate(s) if n > 1)) for s in (points.input_shape, points.output_shape))
    for i, o in cartesian(ins, outs):
        kept = _at_middle(points.x, points.input_shape, i) & _at_middle(points.out, points.output_shape, o)
        columns = prod(n for d, n in enumerate(points.kept) if d != o)
        inputs = [_random_residues(seed, width) for seed in range(1, 1 + max(1, RANK_COLUMNS // columns))]
        parts = _components(_jacobian(points.where(kept)))
        yield sum(len(_echelon(_applied(part, inputs)[0])[1]) for part in parts)


def _span_digest(points: _Points) -> bytes:
    """Return a digest of the span of all maps; of a map without weights, of the map itself, scale and all."""
    entries, width, total = _monomials(points), prod(points.input_shape), prod(points.output_shape)
    rows = []
    if not points.weights:
        inputs = [_random_residues(seed, width) for seed in range(1, 3)]
        found = [(*_applied(part, inputs), 1) for part in [entries] if len(part.row)]
        used = 2
    else:
        used, found = _span(entries, width)
    for form, outs, _ in found:
        columns = (np.arange(used)[:, None] * total + outs).ravel()
        for row in form:
            kept = np.flatnonzero(row)
            rows.append(blake2b(np.stack([columns[kept], row[kept]]).astype("<i8").tobytes(), digest_size=16).digest())
    return b"".join([used.to_bytes(4, "big"), *sorted(rows)])


def fingerprint(operator: Operator, sizes: Mapping[str, int] | None = None) -> int:
    """Return a number that is equal for operators that are equal up to a re-indexing of their weights.

    Args:
        operator: The operator.
        sizes: A number for every symbol; default: ``probe_sizes([operator])``. Fingerprints are compared at the same
            sizes, which are part of them: take ``probe_sizes`` of all operators to be compared, or use ``distinct``.

    Returns:
        128 bits, equal in every process.

    Raises:
        SearchError: A symbol has no size, sizes do not divide, or the loops have more than 4,194,304 points.
    """
    given = probe_sizes([operator]) if sizes is None else sizes
    points = _points(operator, given, SPAN_OUTPUTS)
    shapes = [[str(size) for size in shape] for shape in (operator.input_shape, operator.output_shape)]
    numbers = [(name, given[name]) for name in operator.symbols.names]
    ranks = list(_ranks(_points(operator, given, RANK_OUTPUTS))) if len(points.weights) > 1 else []
    parts = [f"{shapes}|{numbers}|{len(points.weights)}|{ranks}|".encode(), _span_digest(points)]
    return int.from_bytes(blake2b(b"".join(parts), digest_size=16).digest(), "big")


def redundant_weights(operator: Operator, sizes: Mapping[str, int] | None = None) -> WeightRank:
    """Return the rank of the Jacobian to the weights beside the number of parameters; less is redundant.

    Two windows over one dim are an example: their taps overlap, and 7 of 9 matter (measured on Syno: 56 of 72). So is a
    pair of weights that share a low-rank dim, by the matrices that may be put between them.

    Args:
        operator: The operator.
        sizes: A number for every symbol; default: ``probe_sizes([operator])``.

    Raises:
        SearchError: As ``fingerprint``.
    """
    points = _points(operator, sizes, MAX_POINTS)
    if not points.weights:
        return WeightRank(0, 0)
    _, found = _span(_jacobian(points), prod(points.input_shape))
    return WeightRank(sum(rank for _, _, rank in found), sum(points.weight_sizes))


def distinct(operators: Sequence[Operator]) -> list[list[Operator]]:
    """Group operators that compute the same function up to a re-indexing of their weights.

    Args:
        operators: Operators over the same symbols.

    Returns:
        The groups, each with the fewest parameters (over all mappings) first, then by digest; in the order of their
        first operators' digests.

    Raises:
        SearchError: As ``probe_sizes`` and ``fingerprint``.
    """
    if not operators:
        return []
    sizes = probe_sizes(operators)
    groups: dict[int, list[Operator]] = {}
    for operator in operators:
        groups.setdefault(fingerprint(operator, sizes), []).append(operator)
    ranked = [sorted(group, key=lambda operator: (_parameters(operator), operator.digest)) for group in groups.values()]
    return sorted(ranked, key=lambda group: group[0].digest)


def _parameters(operator: Operator) -> int:
    mappings = range(len(operator.symbols.mappings))
    return sum(prod(size.value(m) for size in shape) for shape in operator.weight_shapes for m in mappings)
