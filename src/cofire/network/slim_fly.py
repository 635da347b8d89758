"""The graphs of McKay, Miller and Siran behind Slim Fly, over finite fields of prime-power order.

Routers are (0, x, y) and (1, m, c) with x, y, m, c in GF(q), q = 4 w + delta. (0, x, y) and (0, x, y') are joined where
y - y' is in X, (1, m, c) and (1, m, c') where c - c' is in X', and (0, x, y) and (1, m, c) where y = m x + c. X and X'
are built from powers of a primitive element (Besta and Hoefler, "Slim Fly", SC'14, section II). Left out: fields too
large to tabulate; q here is that of a network, some dozens.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from cofire.errors import PlanError
from cofire.network.topology import Ints


class Field:
    """GF(q): elements are 0 .. q - 1, whose digits in base p are the coefficients of a polynomial.

    Attributes:
        order: q, a power of the prime p.
        powers: ``[q - 1]``, the powers of a primitive element, from the zeroth.
    """

    def __init__(self, order: int) -> None:
        prime, degree = _prime_power(order)
        self.order = order
        self._weights = prime ** np.arange(degree)
        digits = np.arange(order)[:, None] // self._weights % prime
        self._add = ((digits[:, None] + digits[None, :]) % prime) @ self._weights
        self._negative = (-digits % prime) @ self._weights
        self.powers = _primitive_powers(prime, degree)
        exponent = np.zeros(order, np.int64)
        exponent[self.powers] = np.arange(order - 1)
        self._multiply = self.powers[(exponent[:, None] + exponent[None, :]) % (order - 1)]
        self._multiply[0, :] = self._multiply[:, 0] = 0

    def add(self, a: Ints, b: Ints) -> Ints:
        """Return ``a + b``, element by element."""
        return self._add[a, b]

    def subtract(self, a: Ints, b: Ints) -> Ints:
        """Return ``a - b``, element by element."""
        return self._add[a, self._negative[b]]

    def multiply(self, a: Ints, b: Ints) -> Ints:
        """Return ``a b``, element by element."""
        return self._multiply[a, b]


def slim_fly_edges(q: int) -> tuple[Ints, Ints]:
    """Return both ends of every link of the graph over GF(q).

    Returns:
        ``[q^2 k']`` each: (0, x, y) is router ``x q + y``, (1, m, c) is router ``q^2 + m q + c``.

    Raises:
        PlanError: q is no prime power, or 4 w + 2.
    """
    field = Field(q)
    own, other = _generators(field)
    first, second = np.divmod(np.arange(q * q), q)
    ends: list[tuple[Ints, Ints]] = []
    for half, generators in enumerate((own, other)):
        low, high = np.triu_indices(q, 1)
        joined = np.isin(field.subtract(high, low), generators)
        rows = half * q * q + np.arange(q)[:, None] * q
        ends.append(((rows + low[joined]).ravel(), (rows + high[joined]).ravel()))
    # (0, x, m x + c) - (1, m, c) for all x, m and c
    x = np.repeat(np.arange(q), q * q)
    m, c = np.tile(first, q), np.tile(second, q)
    ends.append((x * q + field.add(field.multiply(m, x), c), q * q + m * q + c))
    return np.concatenate([tail for tail, _ in ends]), np.concatenate([head for _, head in ends])


def _generators(field: Field) -> tuple[Ints, Ints]:
    """Return X and X', each closed under negation."""
    q, powers = field.order, field.powers
    if q % 4 == 2:
        raise PlanError(f"q = {q} is not 4 w - 1, 4 w or 4 w + 1; nearest: {q + 1}")
    exponents = np.arange(q - 1)
    if q % 4 == 1:
        own, other = exponents[::2], exponents[1::2]
    elif q % 4 == 0:
        own, other = exponents[::2], np.arange(1, q, 2)
    else:
        w = (q + 1) // 4
        own = np.concatenate([np.arange(0, 2 * w, 2), np.arange(2 * w - 1, 4 * w - 2, 2)])
        other = own + 1
    return powers[own], powers[other % (q - 1)]


def _prime_power(order: int) -> tuple[int, int]:
    prime = next((p for p in range(2, order + 1) if order % p == 0), 0)
    degree = round(np.log(order) / np.log(prime)) if prime else 0
    if order < 2 or prime**degree != order:
        nearest = min(
            (q for q in range(3, order + 8) if q % 4 != 2 and _is_prime_power(q)), key=lambda q: abs(q - order)
        )
        raise PlanError(f"q = {order} is no prime power, so there is no such field; nearest: {nearest}")
    return prime, degree


def _is_prime_power(order: int) -> bool:
    prime = next(p for p in range(2, order + 1) if order % p == 0)
    while order % prime == 0:
        order //= prime
    return order == 1


def _primitive_powers(prime: int, degree: int) -> Ints:
    """Return the powers of x modulo the first monic polynomial for which they run through all non-zero elements.

    Then every non-zero element has an inverse, so that the polynomial is irreducible and x primitive.
    """
    order = prime**degree
    weights = prime ** np.arange(degree)
    for low in product(range(prime), repeat=degree):
        element, seen = np.eye(degree, dtype=np.int64)[0], [1]
        for _ in range(order - 2):
            # times x: shift up, and x^degree = -(low coefficients)
            carry = element[-1]
            element = (np.concatenate([[0], element[:-1]]) - carry * np.asarray(low)) % prime
            code = int(element @ weights)
            if code in (0, 1):
                break
            seen.append(code)
        if len(set(seen)) == order - 1:
            return np.asarray(seen, np.int64)
    raise AssertionError(f"GF({order}) has a primitive element")  # every finite field has one
