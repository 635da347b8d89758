"""Axes of the plan's figures: from a quantity to a place, round ticks, and quantities as text.

Left out: dates, and axes that are broken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cofire.plan.page.figures import Value
from cofire.spec.units import format_quantity

_DAY_S = 86_400.0


def shown(value: float, unit: str = "", digits: int = 3) -> str:
    """Return a quantity as text, for example ``4.2 ms``, ``71.3 GB``, ``$5.58 M``, ``12.5 %`` or ``37 B``.

    Args:
        value: In SI units; with unit ``%`` a fraction.
        unit: Its unit. Counts, without one, take the field's suffixes: K, M, B, T.
        digits: Significant digits.
    """
    if unit == "%":
        return f"{_plain(100 * value, digits)} %"
    if unit == "s":
        return _seconds(value, digits)
    if unit == "$" or unit.startswith("$"):
        factor, suffix = _step(abs(value), (("", 1.0), (" K", 1e3), (" M", 1e6), (" B", 1e9)))
        sign = "-" if value < 0 else ""
        return f"{sign}${_plain(abs(value) / factor, digits)}{suffix}{unit[1:]}"
    if not unit:
        factor, suffix = _step(abs(value), (("", 1.0), (" K", 1e4), (" M", 1e6), (" B", 1e9), (" T", 1e12)))
        return f"{_plain(value / (1e3 if suffix == ' K' else factor), digits)}{suffix}"
    if unit in ("B", "B/s", "FLOP", "FLOP/s", "FLOP/B", "b/s", "W", "J"):
        return format_quantity(float(f"{value:.{digits}g}"), unit, max(digits, 3))
    return f"{_plain(value, digits)} {unit}"


def shown_value(value: Value, digits: int = 3) -> str:
    """Return a value as text, without its label."""
    return shown(value.value, value.unit, digits)


def interval(value: Value, digits: int = 3) -> str:
    """Return ``low to high`` of a value, or nothing where it has no interval."""
    if value.low is None and value.high is None:
        return ""
    low = value.value if value.low is None else value.low
    high = value.value if value.high is None else value.high
    return "" if low == high else f"{shown(low, value.unit, digits)} to {shown(high, value.unit, digits)}"


@dataclass(frozen=True)
class Scale:
    """A line or a logarithm from ``low``..``high`` to ``start``..``end`` in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; for a value outside the bounds, beyond the ends."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(value) if self.log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the bounds, about ``count`` of them."""
        return _log_ticks(self.low, self.high, count) if self.log else _ticks(self.low, self.high, count)


def fit(values: Iterable[float], *, log: bool = False, zero: bool = False, pad: float = 0.06) -> tuple[float, float]:
    """Return bounds that hold all values, with some room; ``zero`` starts a linear axis at 0.

    Args:
        values: At least one; positive where ``log``.
        log: For a logarithmic axis.
        zero: The lower bound is 0, unless a value is below.
        pad: Room at an end, as a share of the range.
    """
    known = list(values)
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** pad, 1.08)
        return low / room, high * room
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    if zero and low >= 0:
        return 0.0, high + (high * pad or room)
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10, 20) if f * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        ticks = [d * 10.0**p for p in decades for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= count + 1:
            break
    if len(ticks) > count + 1:
        stride = -(-len(ticks) // (count + 1))
        ticks = ticks[::stride]
    return ticks if len(ticks) >= 2 else _ticks(low, high, count)


def _seconds(value: float, digits: int) -> str:
    size = abs(value)
    if size >= 2 * _DAY_S:
        return f"{_plain(value / _DAY_S, digits)} days"
    if size >= 2 * 3600:
        return f"{_plain(value / 3600, digits)} h"
    if size >= 1 or size == 0:
        return f"{_plain(value, digits)} s"
    # From 1 ns down there is nothing that a plan would time.
    for factor, unit in ((1e-3, "ms"), (1e-6, "us")):
        if size >= factor * 0.9995:
            return f"{_plain(value / factor, digits)} {unit}"
    return f"{_plain(value / 1e-9, digits)} ns"


def _step(size: float, steps: tuple[tuple[str, float], ...]) -> tuple[float, str]:
    chosen = steps[0]
    for step in steps:
        if size >= step[1] * 0.9995:
            chosen = step
    return chosen[1], chosen[0]


def _plain(value: float, digits: int) -> str:
    """Round to significant digits but keep whole numbers whole; groups of thousands; no exponent above 1e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e15:
        return f"{value:.{digits}g}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
