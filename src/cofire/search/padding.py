"""Padding: the least larger values of primary symbols under which every size is whole (Syno, padding solver).

A place that an operator is to fill may have sizes that its blocks do not divide, such as 62 channels in groups of 4.
Primaries are then padded up; coefficients are part of the operator and stay.

A size is whole if, for every prime r, the powers of r in its primaries make up for those that its coefficients divide
by. The solver gives primaries factors that they must hold, each starting at 1, and pads a primary to the next multiple.
Where a size is not whole for want of a prime, one of its primaries must hold one factor of it more: these are the
branches. Padding never shrinks along a branch, so that, best first, the first state with whole sizes alone is the best.
Syno is greedy and stops at the prime 29; here only more states than a limit are met greedily.

Left out: cutting the padded part off again, which is the placeholder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from math import gcd, prod

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.sizes import Size, Symbols

MAX_STATES = 20_000

Values = tuple[int, ...]


def sizes_of(operator: Operator) -> tuple[Size, ...]:
    """Return every size that must be whole for an operator to exist, each once, in ascending order."""
    ends = (*operator.input, *(dim for weight in operator.weights for dim in weight), *operator.expansions)
    dims = {node for end in ends for node in end.walk()} | {*operator.output, *operator.reductions}
    return tuple(sorted({dim.size for dim in dims}))


def pad(
    symbols: Symbols,
    mapping: Mapping[str, int],
    sizes: Iterable[Size],
    tensors: Iterable[Size] = (),
    *,
    max_states: int = MAX_STATES,
) -> dict[str, int]:
    """Return a mapping with primaries padded so that every size is a whole number.

    Args:
        symbols: Tells primaries from coefficients; its own mappings are not read.
        mapping: A number for every symbol.
        sizes: What must be whole, such as ``sizes_of(operator)``.
        tensors: Sizes of tensors whose elements are to grow least, in sum. None: the product of all primaries is.
        max_states: After so many states the rest is greedy, and the result may not be the least.

    Returns:
        A number for every symbol. Of equally good paddings, the one with the smaller first primaries.

    Raises:
        SearchError: The mapping is wrong, a size is of other symbols, or no padding makes a size whole.
    """
    row = Symbols.of(symbols.primary, symbols.coefficient, [mapping]).mappings[0]
    count = len(symbols.primary)
    start = row[:count]
    demands = _demands(symbols, row, sizes)
    grown = [_powers(symbols, size) for size in tensors] or [(1,) * count + (0,) * (len(row) - count)]

    def elements(values: Values) -> Fraction:
        full = (*values, *row[count:])
        return sum((_monomial(full, exponents) for exponents in grown), Fraction(0))

    held: Values = (1,) * count
    values = start
    queue: list[tuple[Fraction, Values, Values]] = [(elements(start), values, held)]
    seen: set[Values] = {held}
    while queue:
        _, values, held = heappop(queue)
        wanted = _wanted(demands, values)
        if wanted is None:
            break
        if max_states <= 0:
            queue.clear()
            seen.clear()
        max_states -= 1
        for more in _branches(held, *wanted):
            if more not in seen:
                seen.add(more)
                padded = tuple(-(-n // factor) * factor for n, factor in zip(start, more, strict=True))
                heappush(queue, (elements(padded), padded, more))
    return dict(zip(symbols.names, (*values, *row[count:]), strict=True))


def _powers(symbols: Symbols, size: Size) -> Values:
    """Return the exponents of a size after checking that padding can only make it larger."""
    if size.symbols.names != symbols.names:
        raise SearchError(f"size {size} is of other symbols than {', '.join(symbols.names)}; pass sizes of these")
    if min(size.exponents[: len(symbols.primary)], default=0) < 0:
        raise SearchError(f"size {size} divides by a primary symbol, which no padding makes whole; leave it out")
    return size.exponents


def _demands(symbols: Symbols, row: Values, sizes: Iterable[Size]) -> list[tuple[Values, int]]:
    """Return, per size, the exponents of its primaries and what their monomial must be divisible by."""
    count = len(symbols.primary)
    found: dict[tuple[Values, int], None] = {}
    for size in sizes:
        powers = _powers(symbols, size)
        divisor = _monomial(row[count:], powers[count:]).denominator
        if divisor > 1 and not any(powers[:count]):
            raise SearchError(f"size {size} has no primary to pad and is not whole; choose coefficients that divide")
        if divisor > 1:
            found[powers[:count], divisor] = None
    return list(found)


def _monomial(values: Sequence[int], exponents: Sequence[int]) -> Fraction:
    return prod((Fraction(n) ** e for n, e in zip(values, exponents, strict=True)), start=Fraction(1))


def _wanted(demands: list[tuple[Values, int]], values: Values) -> tuple[Values, int] | None:
    """Return the exponents of a size that is not whole and a prime that it wants; none if all are whole."""
    for exponents, divisor in demands:
        left = divisor // gcd(divisor, prod(n**e for n, e in zip(values, exponents, strict=True)))
        if left > 1:
            return exponents, next(r for r in range(2, left + 1) if left % r == 0)
    return None


def _branches(held: Values, exponents: Values, prime: int) -> Iterator[Values]:
    """Yield the factors with one prime more at each primary of the size."""
    for k, exponent in enumerate(exponents):
        if exponent > 0:
            yield (*held[:k], held[k] * prime, *held[k + 1 :])
