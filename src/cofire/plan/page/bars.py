"""Figures of the plan's page that are rows of bars: memory by role, a step's parts, and the tornado.

A bar whose number is assumed is hatched. Each function returns the legend and the drawing as HTML, and the table of
the same numbers is beside it. Left out: negative parts; the records refuse them.
"""

from __future__ import annotations

import math

from cofire.plan.page.figures import MEMORY_ROLES, MemoryStack, Sensitivity, SensitivityRow, StepBreakdown, StepPart
from cofire.plan.page.scale import Scale, fit, interval, shown, shown_value
from cofire.plan.page.svg import (
    WIDTH,
    clipped,
    colour,
    drawing,
    known,
    legend,
    line,
    rect,
    table,
    text_width,
    words,
)

MAX_BARS = 64

_ROW = 26.0
_TOP = 24.0


def draw_memory(stack: MemoryStack) -> str:
    """Draw memory by role as stacked bars, with a line at the capacity, where there is one."""
    bars = stack.bars[:MAX_BARS]
    roles = memory_roles(stack)
    left = min(max(text_width(bar.name) for bar in bars) + 14, 300.0)
    capacity = math.inf if stack.capacity_bytes is None else stack.capacity_bytes
    high = max([bar.total_bytes for bar in bars] + ([capacity] if math.isfinite(capacity) else [])) * 1.04
    scale = Scale(0.0, high, left, WIDTH - 118)
    bottom = _TOP + _ROW * len(bars)
    parts = [_grid(scale, _TOP - 4, bottom, "B")]
    for row, bar in enumerate(bars):
        y, reached = _TOP + row * _ROW, 0.0
        parts.append(words(left - 8, y + 16, clipped(bar.name, left - 8), "name", "end"))
        for role, size_bytes in bar.parts:
            if size_bytes > 0:
                x, width = scale.at(reached), scale.at(reached + size_bytes) - scale.at(reached)
                tip = f"{bar.name}: {role}\n{shown(size_bytes, 'B')}, {_share(size_bytes, bar.total_bytes)}"
                parts.append(rect(x, y + 3, width, _ROW - 7, f"bar {colour(roles.index(role))}", tip))
            reached += size_bytes
        over = bar.total_bytes > capacity
        total = shown(bar.total_bytes, "B") + (" does not fit" if over else "")
        x = scale.at(bar.total_bytes if over or math.isinf(capacity) else capacity) + 8
        parts.append(words(x, y + 16, total, "value bad" if over else "value"))
    about = f"{len(bars)} bars of memory by role"
    if math.isfinite(capacity):
        at, name = scale.at(capacity), f"{stack.capacity_name} {shown(capacity, 'B')}"
        parts.append(line(at, _TOP - 6, at, bottom, "level"))
        parts.append(words(at, 12, name, "leveltext", "end" if at > WIDTH - 240 else "middle"))
        about += f"; the line is {name}"
    seen = {role for bar in bars for role, size_bytes in bar.parts if size_bytes > 0}
    entries = [(colour(index), role) for index, role in enumerate(roles) if role in seen]
    return legend(entries) + drawing(stack.title, about, bottom + 24, "".join(parts))


def memory_roles(stack: MemoryStack) -> list[str]:
    """Return the roles of a stack, the known ones first and in their order, so that a role keeps its colour."""
    return list(dict.fromkeys([*MEMORY_ROLES, *(role for bar in stack.bars for role, _ in bar.parts)]))


def memory_table(stack: MemoryStack) -> str:
    """Return the numbers of :func:`draw_memory`."""
    roles = memory_roles(stack)
    rows = []
    for bar in stack.bars:
        sizes = dict.fromkeys(roles, 0.0)
        for role, size_bytes in bar.parts:
            sizes[role] += size_bytes
        rows.append([bar.name, *(shown(sizes[role], "B") for role in roles), shown(bar.total_bytes, "B")])
    return table(["", *roles, "total"], rows)


def draw_step(step: StepBreakdown) -> str:
    """Draw the parts of a step one after another, each from where the one before ends."""
    left = min(max(text_width(part.name) for part in step.parts) + 14, 260.0)
    left = max(left, text_width("total") + 20)
    ends, reached = [step.total.high or step.total.value], 0.0
    for part in step.parts:
        ends.append(reached + (part.time.high or part.time.value))
        reached += part.time.value
    scale = Scale(0.0, max(*ends, reached) * 1.02, left, WIDTH - 266)
    bottom = _TOP + _ROW * (len(step.parts) + 1) + 6
    body, reached = [_grid(scale, _TOP - 4, bottom, "s")], 0.0
    for row, part in enumerate(step.parts):
        y = _TOP + row * _ROW
        body.append(_step_row(part, row, reached, y, scale, step.total.value))
        reached += part.time.value
        if row + 1 < len(step.parts):
            body.append(line(scale.at(reached), y + _ROW - 4, scale.at(reached), y + _ROW + 3, "guide"))
    y = bottom - _ROW
    body.append(line(0, y - 3, WIDTH, y - 3, "guide"))
    tip = f"{step.title}\n{shown_value(step.total)}\n{known(step.total)}"
    body.append(words(left - 8, y + 16, "total", "name strong", "end"))
    body.append(rect(scale.at(0), y + 3, scale.at(step.total.value) - scale.at(0), _ROW - 7, "bar total", tip))
    body.append(_whisker(step.total.low, step.total.high, 0.0, y + 12, scale))
    body.append(_columns(y + 16, shown_value(step.total), "100.0 %", _marks(step.total.basis, step.total.label)))
    about = f"{len(step.parts)} parts of a step that add up to {shown_value(step.total)}"
    return _step_legend(step) + drawing(step.title, about, bottom + 24, "".join(body))


def _step_row(part: StepPart, row: int, start_s: float, y: float, scale: Scale, total_s: float) -> str:
    time = part.time
    tip = f"{part.name}\n{shown_value(time)}, {_share(time.value, total_s)} of the step\n{known(time)}"
    if part.hidden_s:
        tip += f"\n{shown(part.hidden_s, 's')} more hidden behind other work"
    if part.remark:
        tip += f"\n{part.remark}"
    body = [words(scale.start - 8, y + 16, clipped(part.name, scale.start - 8), "name", "end")]
    x, width = scale.at(start_s), scale.at(start_s + time.value) - scale.at(start_s)
    if part.hidden_s:
        # What is hidden runs beside the parts to its left; where there is not enough of these it starts at 0.
        begin = max(start_s - part.hidden_s, 0.0)
        hidden = scale.at(begin + part.hidden_s) - scale.at(begin)
        body.append(rect(scale.at(begin), y + 5, hidden, _ROW - 11, "hollow", tip))
    if width > 0:
        body.append(rect(x, y + 3, max(width, 1.0), _ROW - 7, f"bar {colour(row)}", tip))
    if time.label == "assumed" and width > 0:
        body.append(rect(x, y + 3, max(width, 1.0), _ROW - 7, "hatch"))
    body.append(_whisker(time.low, time.high, start_s, y + 12, scale))
    body.append(_columns(y + 16, shown_value(time), _share(time.value, total_s), _marks(time.basis, time.label)))
    return "".join(body)


def _step_legend(step: StepBreakdown) -> str:
    from_kinds = [("hatchkey", "hatched: assumed")] if any(p.time.label == "assumed" for p in step.parts) else []
    if any(part.hidden_s for part in step.parts):
        from_kinds.append(("hollowkey", "hollow: hidden behind other work"))
    if any(interval(value) for value in (step.total, *(part.time for part in step.parts))):
        from_kinds.append(("whiskerkey", "thin line: interval"))
    keys = "".join(f'<span><i class="swatch {key}"></i>{name}</span>' for key, name in from_kinds)
    return f'<div class="legend">{keys}</div>' if keys else ""


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _marks(basis: str | None, label: str | None) -> str:
    return ", ".join(mark for mark in (basis, label) if mark)


def _columns(y: float, value: str, share: str, marks: str) -> str:
    return (
        words(WIDTH - 190, y, value, "value", "end")
        + words(WIDTH - 132, y, share, "soft value", "end")
        + words(WIDTH - 118, y, marks, "soft small")
    )


def _whisker(low: float | None, high: float | None, start: float, y: float, scale: Scale) -> str:
    if low is None or high is None or low == high:
        return ""
    x1, x2 = scale.at(start + low), scale.at(start + high)
    ends = "".join(line(x, y - 4, x, y + 4, "whisker") for x in (x1, x2))
    return line(x1, y, x2, y, "whisker") + ends


def step_table(step: StepBreakdown) -> str:
    """Return the numbers of :func:`draw_step`."""
    rows = [
        [
            part.name,
            shown_value(part.time),
            _share(part.time.value, step.total.value),
            interval(part.time),
            shown(part.hidden_s, "s") if part.hidden_s else "",
            _marks(part.time.basis, part.time.label),
            part.time.source,
        ]
        for part in step.parts
    ]
    rows.append(["total", shown_value(step.total), "100.0 %", interval(step.total), "", "", step.total.source])
    return table(["part", "time", "share", "interval", "hidden", "known as", "source"], rows)


def ranked(sensitivity: Sensitivity) -> list[SensitivityRow]:
    """Return the rows, those that move the result most first."""
    base = sensitivity.result.value
    return sorted(sensitivity.rows, key=lambda row: -max(abs(row.result_at_low - base), abs(row.result_at_high - base)))


def draw_sensitivity(sensitivity: Sensitivity) -> str:
    """Draw the tornado: each input's two results as bars from the result as planned."""
    rows = ranked(sensitivity)[:MAX_BARS]
    base, unit = sensitivity.result.value, sensitivity.result.unit
    left = min(max(text_width(row.name) for row in rows) + 14, 260.0)
    low, high = fit([base, *(end for row in rows for end in (row.result_at_low, row.result_at_high))], pad=0.02)
    # Room for the inputs' values beside the bars.
    room = min(max(text_width(end, 11) for row in rows for end in (row.low_input, row.high_input)) + 12, 130.0)
    scale = Scale(low, high, left + room, WIDTH - 250 - room)
    bottom = _TOP + _ROW * len(rows)
    body = [_grid(scale, _TOP - 4, bottom, unit)]
    for index, row in enumerate(rows):
        y = _TOP + index * _ROW
        body.append(words(left - 8, y + 16, clipped(row.name, left - 8), "name", "end"))
        for end, given, other, series in (
            (row.result_at_low, row.low_input, row.result_at_high, "c0"),
            (row.result_at_high, row.high_input, row.result_at_low, "c1"),
        ):
            tip = f"{row.name} = {given}\n{shown(end, unit)}, {_change(end, base)}\n{row.label}"
            tip += f"\n{row.source}" if row.source else ""
            x1, x2 = sorted((scale.at(base), scale.at(end)))
            body.append(rect(x1, y + 3, max(x2 - x1, 1.0), _ROW - 7, f"bar {series}", tip))
            # With both results on one side only the farther one has room for its text.
            if (end - base) * (other - base) <= 0 or abs(end - base) > abs(other - base):
                down = end < base or (end == base and other > base)
                place = scale.at(end) + (-6 if down else 6)
                body.append(words(place, y + 16, clipped(given, room, 11), "soft small", "end" if down else None))
        body.append(words(WIDTH - 236, y + 16, row.label, f"small {row.label}text"))
        body.append(words(WIDTH - 168, y + 16, clipped(row.source, 168, 11), "soft small"))
    at = scale.at(base)
    body.append(line(at, _TOP - 6, at, bottom, "level"))
    body.append(words(at, 12, f"as planned: {shown(base, unit)}", "leveltext", "middle"))
    about = f"{shown(base, unit)} as planned, and with {len(rows)} inputs at either end of their intervals"
    keys = legend([("c0", "input at its low end"), ("c1", "input at its high end")])
    return keys + drawing(sensitivity.title, about, bottom + 24, "".join(body))


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %" if base else "as planned 0"


def sensitivity_table(sensitivity: Sensitivity) -> str:
    """Return the numbers of :func:`draw_sensitivity`."""
    base, unit = sensitivity.result.value, sensitivity.result.unit
    rows = [
        [
            row.name,
            row.low_input,
            f"{shown(row.result_at_low, unit)} ({_change(row.result_at_low, base)})",
            row.high_input,
            f"{shown(row.result_at_high, unit)} ({_change(row.result_at_high, base)})",
            row.label,
            row.source,
        ]
        for row in ranked(sensitivity)
    ]
    return table(["input", "low", "result", "high", "result", "known as", "source"], rows)


def _grid(scale: Scale, top: float, bottom: float, unit: str) -> str:
    ticks = scale.ticks(6)
    return "".join(
        line(scale.at(tick), top, scale.at(tick), bottom, "grid")
        + words(scale.at(tick), bottom + 15, shown(tick, unit), "tick", "middle")
        for tick in ticks
    )
