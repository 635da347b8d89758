"""Quantities as people read and write them.

Inside Cofire every quantity is in SI units (seconds, bytes, FLOP, dollars); this module is the only
place that turns them into text. Prefixes are decimal, as in the papers: 1 KB = 1000 bytes.
"""

from __future__ import annotations

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
