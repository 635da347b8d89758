"""Sizes of Canvas: a rational number times powers of G, C, H, W and of dynamic variables x0 to x15 (Canvas, variables).

G is the number of groups, C, H and W are the channels, height and width of the place a kernel is to fill. A dynamic
variable is a size left open, until a solver puts a static one in its place.

This is no ``cofire.search.sizes.Size``: that has no rational factor and at most eight symbols of a kind, and stands for
numbers from the moment it is made, which an unknown that is to be solved for does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from math import gcd, lcm, prod
from typing import NamedTuple

from cofire.errors import SearchError

STATIC = ("G", "C", "H", "W")
MAX_DYNAMIC = 16
_COUNT = len(STATIC)
_FACTOR = re.compile(r"(?:([GCHW]|x\d+)(?:\^(\d+))?|(\d+))")


class Extent(NamedTuple):
    """What a place gives: number of channels, height and width."""

    c: int
    h: int
    w: int


@dataclass(frozen=True, slots=True)
class Variable:
    """One size, normalised when made, so that equal sizes compare equal.

    Attributes:
        powers: Exponents of G, C, H, W, x0, x1 and so on; trailing zeros are dropped.
        numerator: Of the rational factor, at least 1.
        denominator: Of the rational factor, at least 1.
    """

    powers: tuple[int, ...] = ()
    numerator: int = 1
    denominator: int = 1

    def __post_init__(self) -> None:
        """Bring into normal form.

        Raises:
            SearchError: A factor below 1, or too many dynamic variables.
        """
        if self.numerator < 1 or self.denominator < 1:
            raise SearchError(f"factor {self.numerator}/{self.denominator} of a size must be above 0")
        powers = self.powers
        if powers and not powers[-1]:
            end = len(powers)
            while end and not powers[end - 1]:
                end -= 1
            powers = powers[:end]
            object.__setattr__(self, "powers", powers)
        if len(powers) > _COUNT + MAX_DYNAMIC:
            raise SearchError(f"x{len(powers) - _COUNT - 1} is beyond the {MAX_DYNAMIC} dynamic variables")
        if self.denominator > 1:
            shared = gcd(self.numerator, self.denominator)
            object.__setattr__(self, "numerator", self.numerator // shared)
            object.__setattr__(self, "denominator", self.denominator // shared)

    @classmethod
    def parse(cls, text: str) -> Variable:
        """Read what ``str`` writes, such as ``"3*C*x0/G/2"`` or ``"H^2"``.

        Raises:
            SearchError: The text is no monomial.
        """
        total = ONE
        for k, part in enumerate(text.replace(" ", "").split("/")):
            for factor in part.split("*"):
                found = _FACTOR.fullmatch(factor)
                if found is None:
                    raise SearchError(f"size {text!r}: {factor!r} is no number, G, C, H, W or x0; write 3*C/G")
                name, power, number = found.groups()
                one = cls((), int(number)) if number else _symbol(name, int(power or 1))
                total = total / one if k else total * one
        return total

    def __mul__(self, other: Variable) -> Variable:
        return Variable(
            tuple(a + b for a, b in zip_longest(self.powers, other.powers, fillvalue=0)),
            self.numerator * other.numerator,
            self.denominator * other.denominator,
        )

    def __truediv__(self, other: Variable) -> Variable:
        return Variable(
            tuple(a - b for a, b in zip_longest(self.powers, other.powers, fillvalue=0)),
            self.numerator * other.denominator,
            self.denominator * other.numerator,
        )

    def __pow__(self, exponent: int) -> Variable:
        if exponent < 0:
            return ONE / self**-exponent
        return Variable(tuple(p * exponent for p in self.powers), self.numerator**exponent, self.denominator**exponent)

    def __str__(self) -> str:
        names = [*STATIC, *(f"x{k}" for k in range(len(self.powers) - _COUNT))]
        above = [str(self.numerator)] if self.numerator > 1 else []
        below = []
        for name, power in zip(names, self.powers, strict=False):
            if power:
                text = name if abs(power) == 1 else f"{name}^{abs(power)}"
                (above if power > 0 else below).append(text)
        if self.denominator > 1:
            below.append(str(self.denominator))
        return "/".join(["*".join(above) or "1", *below])

    @property
    def is_one(self) -> bool:
        """Whether this is the number 1."""
        return self == ONE

    @property
    def is_static(self) -> bool:
        """Whether no dynamic variable is in it."""
        return len(self.powers) <= _COUNT

    @property
    def dynamic(self) -> tuple[int, ...]:
        """Indices of the dynamic variables in it, ascending."""
        return tuple(k for k, power in enumerate(self.powers[_COUNT:]) if power)

    @property
    def linear(self) -> tuple[int, ...]:
        """Indices of the dynamic variables whose exponent is 1 or -1, which an equation can be solved for."""
        return tuple(k for k, power in enumerate(self.powers[_COUNT:]) if abs(power) == 1)

    @property
    def divisor(self) -> Variable:
        """What is below the line, as a size of its own."""
        return Variable(tuple(max(0, -power) for power in self.powers), self.denominator)

    def power(self, name: str) -> int:
        """Return the exponent of G, C, H, W or x0 to x15.

        Raises:
            SearchError: Another name.
        """
        position = _position(name)
        return self.powers[position] if position < len(self.powers) else 0

    @property
    def may_be_whole(self) -> bool:
        """Whether it may be the size of a dim, as far as can be told without numbers (Canvas, variables).

        At most one dynamic variable above the line and one below, of exponent 1. One above can make anything whole.
        Without it H and W must not be below, and what G or a number divides must hold C, which is a multiple of both.
        """
        dynamic = [power for power in self.powers[_COUNT:] if power]
        if dynamic and (max(map(abs, dynamic)) > 1 or dynamic.count(1) > 1 or dynamic.count(-1) > 1):
            return False
        if 1 in dynamic:
            return True
        g, c, h, w, *_ = (*self.powers[:_COUNT], 0, 0, 0, 0)
        whole = min(c, h, w, g + c) >= 0 and (self.denominator == 1 or c > 0)
        return whole and not (dynamic and max(g, c, h, w, self.numerator - 1) <= 0)

    def substitute(self, index: int, by: Variable) -> Variable:
        """Return this with x<index> replaced."""
        power = self.powers[_COUNT + index] if _COUNT + index < len(self.powers) else 0
        return self * (by / dynamic_variable(index)) ** power if power else self

    def value(self, extent: Extent, groups: int = 1) -> Fraction:
        """Return its number at a place.

        Args:
            extent: Numbers of C, H and W.
            groups: Number of G.

        Raises:
            SearchError: A dynamic variable is in it.
        """
        if not self.is_static:
            raise SearchError(f"size {self} has no number while x{self.dynamic[0]} is open; solve the kernel first")
        above, below = self.numerator, self.denominator
        for number, power in zip((groups, *extent), self.powers, strict=False):
            if power > 0:
                above *= number**power
            elif power < 0:
                below *= number**-power
        return Fraction(above, below)


def _position(name: str) -> int:
    if name in STATIC:
        return STATIC.index(name)
    if name[:1] == "x" and name[1:].isdigit() and int(name[1:]) < MAX_DYNAMIC:
        return _COUNT + int(name[1:])
    raise SearchError(f"{name!r} is no variable; there are G, C, H, W and x0 to x{MAX_DYNAMIC - 1}")


def _symbol(name: str, power: int = 1) -> Variable:
    return Variable((*([0] * _position(name)), power))


def dynamic_variable(index: int) -> Variable:
    """Return x<index>.

    Raises:
        SearchError: An index beyond 15.
    """
    return _symbol(f"x{index}")


ONE = Variable()
G, C, H, W = (_symbol(name) for name in STATIC)


def number(value: int) -> Variable:
    """Return a number as a size."""
    return Variable((), value)


def product(variables: Iterable[Variable]) -> Variable:
    """Return the product; of none, 1."""
    return prod(variables, start=ONE)


def common_divisor(variables: Iterable[Variable]) -> Variable:
    """Return the greatest monomial that divides all: least exponents, gcd of numerators over lcm of denominators.

    Args:
        variables: At least one.
    """
    listed = list(variables)
    columns = zip_longest(*(variable.powers for variable in listed), fillvalue=0)
    return Variable(
        tuple(min(column) for column in columns),
        gcd(*(variable.numerator for variable in listed)),
        lcm(*(variable.denominator for variable in listed)),
    )


def common_multiple(variables: Iterable[Variable]) -> Variable:
    """Return the least monomial that all divide; of none, 1."""
    return ONE / common_divisor([ONE / variable for variable in (*variables, ONE)])


def solve_for_one(ratio: Variable, index: int) -> Variable:
    """Return what x<index> must be for ``ratio`` to equal 1 (Canvas, shape-matching solver).

    Raises:
        SearchError: Its exponent in the ratio is not 1 or -1.
    """
    if index not in ratio.linear:
        raise SearchError(f"{ratio} = 1 is not linear in x{index}; solve it for a variable of exponent 1 or -1")
    unknown = dynamic_variable(index)
    return unknown / ratio if ratio.power(f"x{index}") == 1 else unknown * ratio
