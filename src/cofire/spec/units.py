"""Quantities as people read and write them.

Inside Cofire every quantity is in SI units (seconds, bytes, FLOP, dollars); this module is the only
place that turns them into text. Prefixes are decimal, as in the papers: 1 KB = 1000 bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from cofire.errors import SpecError

BYTES: Mapping[str, float] = {"": 1.0} | {
    f"{prefix}{binary}B": (1024.0 if binary else 1000.0) ** power
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for binary in (("", "i") if prefix else ("",))
}
SECONDS: Mapping[str, float] = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_quantity(value: float, unit: str = "", digits: int = 4) -> str:
    """Return ``value`` with a decimal prefix, for example ``format_quantity(70272, "B") == "70.27 kB"``.

    Args:
        value: The quantity in SI units.
        unit: Appended after the prefix.
        digits: Significant digits kept.
    """
    magnitude = abs(value)
    for factor, prefix in _PREFIXES:
        if magnitude >= factor:
            return f"{value / factor:.{digits}g} {prefix}{unit}".rstrip()
    return f"{value:.{digits}g} {unit}".rstrip()


def format_count(value: float) -> str:
    """Return a count as the field writes it: ``671.0B``, ``36.6B``, ``19.3M``, ``512``."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Return a duration as ``1h02m``, ``3m20s``, ``12.3s`` or ``4.1ms``."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    if seconds >= 1:
        return f"{seconds:.1f}s"
    return f"{seconds * 1e3:.3g}ms"


def parse_quantity(text: str, units: Mapping[str, float], name: str, example: str) -> float:
    """Read a number with a unit, case aside.

    Args:
        text: Such as ``64MiB``.
        units: Factor of each unit, :data:`BYTES` or :data:`SECONDS`.
        name: Of the option that has it.
        example: A right one, for the error.

    Raises:
        SpecError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    known = {unit.upper(): factor for unit, factor in units.items()}
    value = float(match[1]) * known[match[2].upper()] if match and match[2].upper() in known else math.nan
    if not math.isfinite(value):
        raise SpecError(
            f"--{name} {text!r} is not a number with one of {', '.join(filter(None, units))}; write {example}"
        )
    return value
