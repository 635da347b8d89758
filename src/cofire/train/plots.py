"""PNG files of a run's figures, by matplotlib without a display.

Draws the values of ``charts.py``; decides colours and layout only. Each file appears whole or not at all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from cofire.train.atomic import replace_file
from cofire.train.charts import Chart, Curve, Figure, HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Also the light scheme of report_page/page.css; "ramp" runs from the first layer to the last.
COLOURS = {
    "ink": "#1c1d20",
    "blue": "#2a78d6",
    "orange": "#e0622b",
    "green": "#158a4f",
    "magenta": "#c8478b",
    "violet": "#5a4bb5",
    "ramp1": "#9cc3f0",
    "ramp2": "#7eb0ea",
    "ramp3": "#5f9ce3",
    "ramp4": "#4388d9",
    "ramp5": "#2f73c2",
    "ramp6": "#225ca3",
    "ramp7": "#174682",
}
_GREY, _GRID, _LEVEL = "#5d6068", "#e6e6e3", "#8a3b12"
_HEAT = ("#1f5fae", "#8fbbe8", "#f1f0ec", "#f0a48a", "#b3261e")
_HEAT_COLUMNS = 3


def write_plots(figures: list[Figure], folder: Path) -> list[Path]:
    """Draw each figure as ``folder/<key>.png``.

    Returns:
        The files written, in the order of ``figures``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(_draw(figure), folder / f"{figure.key}.png") for figure in figures]


def _write(canvas: Canvas, path: Path) -> Path:
    with replace_file(path) as file:
        # Without the program's version the same run gives the same bytes.
        canvas.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return path


def _draw(figure: Figure) -> Canvas:
    return _draw_heat_map(figure) if isinstance(figure, HeatMap) else _draw_chart(figure)


def _draw_chart(chart: Chart) -> Canvas:
    canvas = _canvas(7.2, 4.0)
    axes = canvas.subplots()
    _title(canvas, chart.title, chart.caption)
    for curve in chart.curves:
        _draw_curve(axes, curve)
    for level in chart.levels:
        axes.axhline(level.value, color=_LEVEL, linewidth=1.2, linestyle=(0, (5, 3)), label=level.label)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_number)
        axes.yaxis.set_minor_formatter(_minor_number(axes))
    _frame(axes, "step", chart.unit)
    if len(chart.curves) + len(chart.levels) > 1:
        columns = 2 if len(chart.curves) > 5 else 1
        axes.legend(frameon=False, fontsize=8, labelcolor=_GREY, ncols=columns, loc="best")
    return canvas


def _draw_curve(axes: Axes, curve: Curve) -> None:
    values = [math.nan if value is None else value for value in curve.values]
    colour = COLOURS[curve.colour]
    axes.plot(
        curve.steps,
        values,
        color=colour,
        label=curve.label,
        alpha=0.3 if curve.role == "faint" else 1.0,
        linewidth=2.0 if curve.role in ("main", "points") else 1.1,
        marker="o" if curve.role == "points" else None,
        markersize=4.5,
    )


def _draw_heat_map(heat: HeatMap) -> Canvas:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    columns = min(_HEAT_COLUMNS, len(heat.layers))
    rows = -(-len(heat.layers) // columns)
    canvas = _canvas(7.2 if columns > 1 else 4.8, 0.9 + 1.7 * rows)
    grid = canvas.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    _title(canvas, heat.title, heat.caption)
    colours = LinearSegmentedColormap.from_list("load", _HEAT)
    norm = LogNorm(0.25, 4.0, clip=True)
    image = None
    for place, axes in enumerate(grid.flat):
        if place >= len(heat.layers):
            axes.axis("off")
            continue
        cells = [[max(load, 1e-3) for load in column] for column in heat.loads[place]]
        by_expert = list(zip(*cells, strict=True))
        first, last = heat.steps[0], heat.steps[-1]
        extent = (first, last if last > first else first + 1, len(by_expert) - 0.5, -0.5)
        image = axes.imshow(by_expert, aspect="auto", cmap=colours, norm=norm, extent=extent, interpolation="nearest")
        axes.set_title(heat.layers[place], fontsize=9, color=_GREY, loc="left")
        _frame(axes, "step" if place + columns >= len(heat.layers) else "", "expert" if place % columns == 0 else "")
        axes.grid(False)
    if image is not None:
        bar = canvas.colorbar(image, ax=grid, fraction=0.03, pad=0.02, ticks=[0.25, 0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"], fontsize=8, color=_GREY)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)  # type: ignore[operator]
    return canvas


def _canvas(width: float, height: float) -> Canvas:
    # Figure itself, not pyplot: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    return canvas


def _title(canvas: Canvas, title: str, caption: str) -> None:
    import textwrap

    width = 95 if canvas.get_figwidth() > 6 else 62
    canvas.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=COLOURS["ink"])
    canvas.supxlabel("\n".join(textwrap.wrap(caption, width)), x=0.01, ha="left", fontsize=8, color=_GREY)


def _frame(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=9, color=_GREY)
    axes.set_ylabel(y_label, fontsize=9, color=_GREY)
    axes.tick_params(colors=_GREY, labelsize=8, length=0, which="both")
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _plain_number(value: float, _place: object = None) -> str:
    return f"{value:g}"


def _minor_number(axes: Axes):
    """Label 2 and 5 between powers of ten, where the axis spans less than two of them."""

    def label(value: float, _place: object = None) -> str:
        low, high = axes.get_ylim()
        first_digit = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:g}" if high < 100 * low and first_digit in (2, 5) else ""

    return label
