"""The schedule of a pipeline in time, as one path a kind of span, with a compact list of the spans for the mouse.

A schedule with more spans than :data:`MAX_SPANS` is merged: neighbours on a rank become one mark that says how many
chunks it stands for. Left out: zooming; the Perfetto trace of ``cofire plan pipeline`` is for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cofire.plan.page.figures import TimeLine, TimeSpan
from cofire.plan.page.scale import Scale, shown
from cofire.plan.page.svg import WIDTH, colour, drawing, legend, line, number, table, tag, words

MAX_SPANS = 4000
MAX_RANKS = 64

_MAX_LETTERS = 2500
_LEFT = 64.0
_TICKS = 10_000_000
# A part keeps its colour from page to page.
_COLOURS = {"F": 0, "B": 1, "I": 4, "W": 2, "F&B": 3, "F&I": 3}


@dataclass(frozen=True)
class Mark:
    """What is drawn for one span, or for several that are merged: each kind with its share of the time.

    ``tip`` is what the script says under the mouse: ``part,stage,micro-batch``, joined by ``&``, or words.
    """

    rank: int
    kind: str
    start_s: float
    end_s: float
    tip: str
    letter: str
    shares: tuple[tuple[str, float], ...]


def marks(timeline: TimeLine) -> list[Mark]:
    """Return what is drawn, by rank and start: at most about :data:`MAX_SPANS`."""
    rows: list[list[TimeSpan]] = [[] for _ in range(min(timeline.num_ranks, MAX_RANKS))]
    for span in timeline.spans:
        if span.rank < len(rows):
            rows[span.rank].append(span)
    for row in rows:
        row.sort(key=lambda span: (span.start_s, span.end_s))
    if sum(map(len, rows)) <= MAX_SPANS:
        return [_mark(span) for row in rows for span in row]
    # Two neighbouring groups together are wider than this, or they would be one: at most two groups to a width.
    width_s = 2 * timeline.makespan_s * len(rows) / MAX_SPANS
    return [merged for row in rows for merged in _merge(row, width_s)]


def _mark(span: TimeSpan) -> Mark:
    number_ = str(span.chunks[0][2]) if len(span.chunks) == 1 else ""
    tip = "&".join(f"{part},{stage},{batch}" for part, stage, batch in span.chunks)
    return Mark(span.rank, span.kind, span.start_s, span.end_s, tip, f"{span.kind}{number_}", ((span.kind, 1.0),))


def _merge(row: list[TimeSpan], width_s: float) -> list[Mark]:
    groups: list[list[TimeSpan]] = []
    for span in row:
        if groups and span.end_s - groups[-1][0].start_s <= width_s:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [_merged(group) for group in groups]


def _merged(group: list[TimeSpan]) -> Mark:
    if len(group) == 1:
        return _mark(group[0])
    counts, times = Counter(span.kind for span in group), _times(group)
    kind = max(sorted(times), key=lambda name: times[name])
    tip = f"{len(group)} slots: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    start_s, end_s = group[0].start_s, group[-1].end_s
    length_s = end_s - start_s
    shares = tuple((name, time_s / length_s if length_s else 1 / len(times)) for name, time_s in sorted(times.items()))
    return Mark(group[0].rank, kind, start_s, end_s, tip, "", shares)


def _times(spans: Iterable[TimeSpan]) -> dict[str, float]:
    times: dict[str, float] = {}
    for span in spans:
        times[span.kind] = times.get(span.kind, 0.0) + span.end_s - span.start_s
    return times


def kind_colours(drawn: list[Mark]) -> dict[str, int]:
    """Return a colour for each kind that is drawn."""
    known = {kind for mark in drawn for kind, _ in mark.shares}
    colours = {kind: index for kind, index in _COLOURS.items() if kind in known}
    for kind in sorted(known - set(colours)):
        colours[kind] = next(index for index in range(5, 100) if index not in colours.values())
    return colours


def row_height(num_ranks: int) -> float:
    """Pixels of a rank's row."""
    return min(max(640.0 / num_ranks, 8.0), 24.0)


def draw_timeline(timeline: TimeLine) -> tuple[str, dict[str, object]]:
    """Draw a schedule.

    Returns:
        The HTML, and what the script needs to say which span is under the mouse.
    """
    drawn = marks(timeline)
    ranks = min(timeline.num_ranks, MAX_RANKS)
    height, colours = row_height(ranks), kind_colours(drawn)
    scale = Scale(0.0, timeline.makespan_s, _LEFT, WIDTH - 8)
    bottom = 6 + ranks * height
    body = [_axes(scale, ranks, height, bottom)]
    for kind, index in colours.items():
        path = "".join(_box(mark, kind, scale, height) for mark in drawn)
        body.append(tag("path", d=path, class_=f"bar {colour(index)}"))
    body.append(_letters(drawn, scale, height, colours))
    body.append(tag("rect", class_="cursor", visibility="hidden"))
    entries = [(colour(index), _NAMES.get(kind, kind)) for kind, index in colours.items()]
    about = f"{len(timeline.spans)} slots of {timeline.num_ranks} ranks in {shown(timeline.makespan_s, 's')}"
    svg = drawing(timeline.title, about, bottom + 24, "".join(body))
    return legend(entries) + tag("div", svg, class_="timeline"), _hover(timeline, drawn, height, scale)


_NAMES = {
    "F": "F: forward",
    "B": "B: backward",
    "I": "I: input gradient",
    "W": "W: weight gradient",
    "F&B": "F&B: overlapped",
    "F&I": "F&I: overlapped",
}


def _axes(scale: Scale, ranks: int, height: float, bottom: float) -> str:
    every = 1 if height >= 13 else 4
    labels = "".join(
        words(_LEFT - 8, 6 + (rank + 0.5) * height + 4, f"rank {rank}", "tick", "end")
        for rank in range(0, ranks, every)
    )
    rows = "".join(
        tag("rect", x=scale.start, y=7 + rank * height, width=scale.end - scale.start, height=height - 2, class_="idle")
        for rank in range(ranks)
    )
    ticks = "".join(
        line(scale.at(tick), 6, scale.at(tick), bottom + 3, "grid")
        + words(scale.at(tick), bottom + 16, shown(tick, "s"), "tick", "middle" if scale.at(tick) < 1090 else "end")
        for tick in scale.ticks(8)
    )
    return rows + ticks + labels


def _box(mark: Mark, kind: str, scale: Scale, height: float) -> str:
    """Return a kind's part of a mark: as tall as its share of the time, the kinds of a merged mark above each other."""
    below = 0.0
    for name, share in mark.shares:
        if name == kind:
            x, width = scale.at(mark.start_s), scale.at(mark.end_s) - scale.at(mark.start_s)
            gap = 0.6 if width > 3 and len(mark.shares) == 1 else 0.0
            w, tall = number(max(width - gap, 0.3)), (height - 2) * share
            y = 7 + mark.rank * height + (height - 2) * (1 - below - share)
            return f"M{number(x)} {number(y)}h{w}v{number(tall)}h-{w}z"
        below += share
    return ""


def _letters(drawn: list[Mark], scale: Scale, height: float, colours: dict[str, int]) -> str:
    """Write each kind on its spans, with the micro-batch where all spans of the kind have room for it."""
    named = [mark for mark in drawn if mark.letter]
    if height < 13 or len(named) > _MAX_LETTERS:
        return ""
    widths = [scale.at(mark.end_s) - scale.at(mark.start_s) for mark in named]
    narrow = {mark.kind for mark, width in zip(named, widths, strict=True) if width < 6.6 * len(mark.letter) + 3}
    labels = []
    for mark, width in zip(named, widths, strict=True):
        letter = mark.kind if mark.kind in narrow else mark.letter
        if width >= 6.6 * len(letter) + 2:
            x, y = scale.at((mark.start_s + mark.end_s) / 2), 7 + (mark.rank + 0.5) * height + 2.5
            labels.append(words(x, y, letter, f"t{colour(colours[mark.kind])}"))
    return tag("g", "".join(labels), class_="letters")


def _hover(timeline: TimeLine, drawn: list[Mark], height: float, scale: Scale) -> dict[str, object]:
    """Return spans as whole numbers: start, length and text of each, in ticks of the makespan."""
    tick = timeline.makespan_s / _TICKS
    ranks: list[list[object]] = [[] for _ in range(min(timeline.num_ranks, MAX_RANKS))]
    for mark in drawn:
        ranks[mark.rank] += [round(mark.start_s / tick), round((mark.end_s - mark.start_s) / tick), mark.tip]
    size = timeline.makespan_s
    factor, unit = next(
        (f, u) for f, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")) if size >= f or f < 1e-8
    )
    return {
        "rows": ranks,
        "left": scale.start,
        "width": scale.end - scale.start,
        "top": 6,
        "height": height,
        "scale": size / factor / _TICKS,
        "unit": unit,
        "ticks": _TICKS,
    }


def timeline_note(timeline: TimeLine) -> str:
    """Return what a reader must know of what is not drawn; nothing where all is."""
    notes = []
    if timeline.num_ranks > MAX_RANKS:
        notes.append(f"The first {MAX_RANKS} of {timeline.num_ranks} ranks.")
    if len(marks(timeline)) < sum(1 for span in timeline.spans if span.rank < MAX_RANKS):
        notes.append(
            f"{len(timeline.spans):,} slots are more than a page can show: neighbours are merged, each part as tall as "
            "its share of their time."
        )
    return " ".join(notes)


def timeline_table(timeline: TimeLine) -> str:
    """Return busy time by rank and part, and the rest."""
    kinds = list(kind_colours(marks(timeline)))
    kinds += sorted({span.kind for span in timeline.spans} - set(kinds))
    spans: list[list[TimeSpan]] = [[] for _ in range(timeline.num_ranks)]
    for span in timeline.spans:
        spans[span.rank].append(span)
    rows = []
    for rank, times in enumerate(map(_times, spans)):
        idle = max(timeline.makespan_s - sum(times.values()), 0.0) / timeline.makespan_s
        rows.append([f"{rank}", *(shown(times.get(kind, 0.0), "s") for kind in kinds), shown(idle, "%")])
    return table(["rank", *kinds, "idle"], rows)
