"""Sizes of dims: monomials in named symbols, read under several mappings at once.

A symbol is *primary* (large: channels, height; exponents never negative) or a *coefficient* (small: window, stride,
groups; a negative exponent is allowed beside a primary). A mapping gives every symbol a number; one symbolic operator
must hold under the mappings of all the places it is to fill (Syno, size algebra).

A monomial is one Python integer, eight bits per exponent with a bias of 64, so that a product is a sum and a quotient a
difference. Left out: padding of sizes that do not divide; here a size is legal only if it is whole under all mappings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from functools import cached_property
from math import prod

from cofire.errors import SearchError

_BITS = 8
_BIAS = 64
_MASK = (1 << _BITS) - 1
MAX_SYMBOLS = 8  # of each kind
MAX_EXPONENT = 31  # so that the product of any two sizes still fits eight bits


class SizeKind(Enum):
    """The classes of the size algebra; ``COEFFICIENT`` and ``GENERAL`` may be the size of a dim."""

    ONE = "one"
    COEFFICIENT = "coefficient"
    ILLEGAL = "illegal"
    GENERAL = "general"


@dataclass(frozen=True)
class Symbols:
    """The symbols of a search and the numbers they stand for.

    Attributes:
        primary: Names of primary symbols, at most 8.
        coefficient: Names of coefficient symbols, at most 8.
        mappings: One row per mapping: the number of every symbol, primary ones first.
    """

    primary: tuple[str, ...]
    coefficient: tuple[str, ...]
    mappings: tuple[tuple[int, ...], ...]
    _interned: dict[int, Size] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check names and mappings.

        Raises:
            SearchError: Too many symbols, a name twice, no mapping, or a number below 1.
        """
        names = self.names
        if max(len(self.primary), len(self.coefficient)) > MAX_SYMBOLS:
            raise SearchError(f"{len(names)} symbols; at most {MAX_SYMBOLS} primary and {MAX_SYMBOLS} coefficient ones")
        for name in names:
            if not name.isidentifier():
                raise SearchError(f"symbol {name!r} is not a name; use letters, digits and _")
            if names.count(name) > 1:
                raise SearchError(f"symbol {name!r} is declared twice; a symbol is primary or a coefficient")
        if not self.mappings:
            raise SearchError("no mapping gives the symbols numbers; pass at least one")
        for row in self.mappings:
            if len(row) != len(names):
                raise SearchError(f"a mapping gives {len(row)} numbers to {len(names)} symbols; give one to each")
            for name, value in zip(names, row, strict=True):
                if value < 1:
                    raise SearchError(f"{name} = {value} in a mapping; a size must be at least 1")

    @classmethod
    def of(
        cls,
        primary: Iterable[str],
        coefficient: Iterable[str] = (),
        mappings: Iterable[Mapping[str, int]] = (),
    ) -> Symbols:
        """Build from mappings by name.

        Args:
            primary: Names of primary symbols.
            coefficient: Names of coefficient symbols.
            mappings: The number of each symbol, once for every place the operator is to fill.

        Raises:
            SearchError: A mapping lacks a symbol or has one more, or a check of the class fails.
        """
        big, small = tuple(primary), tuple(coefficient)
        names = (*big, *small)
        rows = []
        for mapping in mappings:
            for name in names:
                if name not in mapping:
                    raise SearchError(f"a mapping has no number for {name}; give one to each of {', '.join(names)}")
            for name in mapping:
                if name not in names:
                    raise SearchError(f"a mapping has a number for {name}, which is not among {', '.join(names)}")
            rows.append(tuple(mapping[name] for name in names))
        return cls(big, small, tuple(rows))

    def __reduce__(self) -> tuple[object, ...]:
        """Leave out the sizes made so far: a search makes more while a result of it is on its way to a process."""
        return Symbols, (self.primary, self.coefficient, self.mappings)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, primary ones first."""
        return self.primary + self.coefficient

    @cached_property
    def _zero(self) -> int:
        return sum(_BIAS << (_BITS * k) for k in range(len(self.names)))

    def _intern(self, packed: int) -> Size:
        size = self._interned.get(packed)
        if size is None:
            size = Size(self, packed)
            self._interned[packed] = size
        return size

    def size(self, text: str = "1", **exponents: int) -> Size:
        """Return a monomial, from text such as ``"C*k/g"`` or from exponents by name.

        Raises:
            SearchError: An unknown symbol, or an exponent beyond 31.
        """
        counts = dict.fromkeys(self.names, 0)
        for name, power in [*_parse(text), *exponents.items()]:
            if name not in counts:
                raise SearchError(f"size {text!r} names {name!r}, which is not among {', '.join(self.names)}")
            counts[name] += power
        return self.from_exponents(counts.values())

    def from_exponents(self, exponents: Iterable[int]) -> Size:
        """Return the monomial with these exponents, in the order of ``names``.

        Raises:
            SearchError: An exponent beyond 31, or not one exponent per symbol.
        """
        powers = tuple(exponents)
        if len(powers) != len(self.names):
            raise SearchError(f"{len(powers)} exponents for {len(self.names)} symbols; give one to each")
        for name, power in zip(self.names, powers, strict=True):
            if abs(power) > MAX_EXPONENT:
                raise SearchError(f"exponent {power} of {name} is beyond {MAX_EXPONENT}; sizes are small monomials")
        return self._intern(sum((power + _BIAS) << (_BITS * k) for k, power in enumerate(powers)))

    @property
    def one(self) -> Size:
        """The empty product."""
        return self._intern(self._zero)


def _parse(text: str) -> list[tuple[str, int]]:
    """Read ``A*B^2/g`` as pairs of symbol and exponent."""
    found = []
    for k, part in enumerate(text.replace(" ", "").split("/")):
        for factor in part.split("*"):
            name, _, power = factor.partition("^")
            if name == "1":
                continue
            try:
                count = int(power) if power else 1
            except ValueError:
                raise SearchError(f"size {text!r}: exponent {power!r} is not a whole number; write H^2*k/g") from None
            found.append((name, count if k == 0 else -count))
    return found


class Size:
    """One monomial; made by :class:`Symbols` only, which interns it, so that equal sizes are the same object."""

    __slots__ = ("exponents", "is_legal", "kind", "largest", "packed", "smallest", "symbols", "text", "values")

    def __init__(self, symbols: Symbols, packed: int) -> None:
        self.symbols = symbols
        self.packed = packed
        count = len(symbols.names)
        self.exponents = tuple(((packed >> (_BITS * k)) & _MASK) - _BIAS for k in range(count))
        above = [_power(n, e) for n, e in zip(symbols.names, self.exponents, strict=True) if e > 0]
        below = [_power(n, -e) for n, e in zip(symbols.names, self.exponents, strict=True) if e < 0]
        self.text = "/".join(["*".join(above) or "1", *below])
        self.kind = _kind(self.exponents[: len(symbols.primary)], self.exponents[len(symbols.primary) :])
        self.values = tuple(_value(row, self.exponents) for row in symbols.mappings)
        self.smallest, self.largest = min(self.values), max(self.values)
        whole = self.smallest >= 1 and all(isinstance(value, int) for value in self.values)
        self.is_legal = self.kind in (SizeKind.COEFFICIENT, SizeKind.GENERAL) and whole

    def __reduce__(self) -> tuple[object, ...]:
        """Be made by the symbols again, so that equal sizes are one object there too."""
        return _interned, (self.symbols, self.packed)

    def __mul__(self, other: Size) -> Size:
        return self.symbols._intern(self.packed + other.packed - self.symbols._zero)

    def __truediv__(self, other: Size) -> Size:
        return self.symbols._intern(self.packed - other.packed + self.symbols._zero)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Size) and self.packed == other.packed and self.symbols == other.symbols
        )

    def __hash__(self) -> int:
        return hash(self.packed)

    def __lt__(self, other: Size) -> bool:
        return self.exponents < other.exponents

    def __repr__(self) -> str:
        return f"Size({self})"

    def __str__(self) -> str:
        return self.text

    @property
    def is_one(self) -> bool:
        """Whether this is the empty product."""
        return self.kind is SizeKind.ONE

    @property
    def degree(self) -> int:
        """Sum of the absolute exponents."""
        return sum(abs(e) for e in self.exponents)

    @property
    def primary_part(self) -> Size:
        """The factor in primary symbols."""
        symbols, bits = self.symbols, _BITS * len(self.symbols.primary)
        return symbols._intern((self.packed & ((1 << bits) - 1)) | (symbols._zero >> bits << bits))

    def value(self, mapping: int = 0) -> int:
        """Return the number of elements under a mapping.

        Raises:
            SearchError: It is not a whole number.
        """
        number = self.values[mapping]
        if number.denominator != 1:
            raise SearchError(f"size {self} is {number} under mapping {mapping}; sizes must divide exactly")
        return number.numerator


def _interned(symbols: Symbols, packed: int) -> Size:
    return symbols._intern(packed)


def _value(numbers: tuple[int, ...], exponents: tuple[int, ...]) -> int | Fraction:
    """Return a monomial's number, an int where it is whole: comparing fractions takes ten times as long."""
    above = prod(n**e for n, e in zip(numbers, exponents, strict=True) if e > 0)
    below = prod(n**-e for n, e in zip(numbers, exponents, strict=True) if e < 0)
    whole, rest = divmod(above, below)
    return Fraction(above, below) if rest else whole


def _kind(primary: tuple[int, ...], coefficient: tuple[int, ...]) -> SizeKind:
    if any(e < 0 for e in primary):
        return SizeKind.ILLEGAL
    if any(primary):
        return SizeKind.GENERAL
    if any(e < 0 for e in coefficient):
        return SizeKind.ILLEGAL
    return SizeKind.COEFFICIENT if any(coefficient) else SizeKind.ONE


def _power(name: str, exponent: int) -> str:
    return name if exponent == 1 else f"{name}^{exponent}"


def product(symbols: Symbols, sizes: Iterable[Size]) -> Size:
    """Return the product of sizes; of none, the empty product."""
    total = symbols.one
    for size in sizes:
        total = total * size
    return total


@dataclass(frozen=True)
class Allowance:
    """How often each symbol may still be introduced (Syno, allowance).

    Reduce charges its domain, Share the primary part of what is shared, Stride its stride, and Merge what its block
    moves away from zero.

    Attributes:
        symbols: The symbols counted.
        left: Uses left of each symbol, in the order of ``symbols.names``.
    """

    symbols: Symbols
    left: tuple[int, ...]

    @classmethod
    def of(cls, symbols: Symbols, counts: Mapping[str, int]) -> Allowance:
        """Build from counts by name; a symbol that is not named has none.

        Raises:
            SearchError: An unknown symbol or a negative count.
        """
        for name, count in counts.items():
            if name not in symbols.names:
                raise SearchError(f"allowance for {name!r}, which is not among {', '.join(symbols.names)}")
            if count < 0:
                raise SearchError(f"allowance {name}: {count} is negative; 0 forbids the symbol")
        return cls(symbols, tuple(counts.get(name, 0) for name in symbols.names))

    def charge(self, size: Size) -> Allowance | None:
        """Return what is left after introducing ``size``, or none where it does not suffice."""
        return self._take(tuple(abs(e) for e in size.exponents))

    def charge_merge(self, size: Size, block: Size) -> Allowance | None:
        """Return what is left after a Merge of ``size`` into ``size / block`` and ``block``.

        Each symbol is charged ``(|a| + |b| - |a + b|) / 2``, a and b being its exponents in the two parts.
        """
        pairs = zip((size / block).exponents, block.exponents, strict=True)
        return self._take(tuple((abs(a) + abs(b) - abs(a + b)) // 2 for a, b in pairs))

    def _take(self, counts: tuple[int, ...]) -> Allowance | None:
        left = tuple(have - need for have, need in zip(self.left, counts, strict=True))
        return None if min(left, default=0) < 0 else Allowance(self.symbols, left)
