"""``cofire bench precision``: what number formats lose by distribution, and what a tensor core's accumulators lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2a78d6", "#e0622b", "#158a4f", "#c8478b")
_INPUTS = {"positive": "uniform, positive", "normal": "N(0, 1)"}


def precision(
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of 1,024 values of each distribution.")] = 512,
    k: Annotated[int, typer.Option(metavar="N", min=1, help="Elements that a product of the ladder adds.")] = 4096,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the values.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw both tables here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show signal over noise by number format and distribution, and the error of FP8's accumulation by interval.

    Formats are rounded to exactly; the accumulators are a model, bit by bit, of Hopper's (DeepSeek-V3, 3.3.2).
    """
    from dataclasses import asdict

    from cofire.precision.accumulate import error_ladder
    from cofire.precision.survey import noise_table

    check_suffix(plot, ".png", "--plot")
    found: dict[str, Any] = {
        "question": {"rows": rows, "k": k, "seed": seed},
        "formats": [asdict(row) for row in noise_table(rows, seed)],
        "ladder": {
            inputs: [asdict(row) for row in error_ladder(k, seed=seed, inputs=inputs)]
            for inputs in ("positive", "normal")
        },
    }
    if plot is not None:
        _draw(found, plot)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _by_format(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["formats"]:
        table.setdefault(row["format"], {})[row["distribution"]] = row
    return table


def _interval(row: dict[str, Any]) -> str:
    return "never" if row["interval"] is None else f"{row['interval']:,}"


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    formats = _by_format(found)
    distributions = list(next(iter(formats.values())))
    table = Table(title="Signal over noise in dB", title_justify="left")
    table.add_column("format")
    table.add_column("bits a value", justify="right")
    for name in distributions:
        table.add_column(name, justify="right")
    for name, row in formats.items():
        table.add_row(name, f"{row[distributions[0]]['bits']:.2f}", *(f"{row[d]['snr_db']:.2f}" for d in distributions))
    out = console()
    out.print(table)
    out.print("Bits count scales. outlier: one channel 20,000 times as large, which is not counted itself.")
    ladder = Table(title=f"Error of adding {found['question']['k']:,} products of FP8, modelled", title_justify="left")
    ladder.add_column("promoted every", justify="right")
    for name in found["ladder"]:
        ladder.add_column(f"{_INPUTS[name]}: largest", justify="right")
        ladder.add_column("mean", justify="right")
    for rows in zip(*found["ladder"].values(), strict=True):
        errors = [f"{row[key]:.2e}" for row in rows for key in ("max_relative_error", "mean_relative_error")]
        ladder.add_row(_interval(rows[0]), *errors)
    out.print(ladder)
    out.print(
        "Relative to the mean magnitude of the exact sums of the same operands: the error of the accumulators alone."
    )


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from cofire.errors import PrecisionError

    canvas = Figure(figsize=(10.5, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    formats, ladder = canvas.subplots(1, 2, width_ratios=(5, 4))
    _draw_formats(found, formats)
    _draw_ladder(found, ladder)
    for axes in (formats, ladder):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    try:
        canvas.savefig(path, dpi=140)
    except OSError as error:
        raise PrecisionError(f"cannot write {str(path)!r}: {error.strerror}; name a folder that is there") from None


def _draw_formats(found: dict[str, Any], axes: Axes) -> None:
    table = _by_format(found)
    names = sorted(table, key=lambda name: table[name]["gaussian"]["snr_db"])
    for distribution, colour, marker in zip(table[names[0]], _COLOURS, "os^D", strict=True):
        values = [table[name][distribution]["snr_db"] for name in names]
        axes.plot(values, range(len(names)), marker, color=colour, label=distribution, markersize=6)
    axes.set_yticks(range(len(names)), [f"{name} ({table[name]['gaussian']['bits']:.2f} bits)" for name in names])
    axes.set_xlabel("signal over noise, dB")
    axes.set_title("What a format keeps", loc="left", fontsize=11)
    axes.legend(loc="lower right", frameon=True, framealpha=1.0, edgecolor="none")


def _draw_ladder(found: dict[str, Any], axes: Axes) -> None:
    rows: list[dict[str, Any]] = []
    for (name, rows), colour, marker in zip(found["ladder"].items(), _COLOURS, "os", strict=False):
        errors = [row["mean_relative_error"] for row in rows]
        axes.semilogy(range(len(rows)), errors, f"{marker}-", color=colour, label=_INPUTS[name], linewidth=1.6)
    axes.set_xticks(range(len(rows)), [_interval(row) for row in rows])
    axes.set_xlabel("elements between promotions to FP32")
    axes.set_ylabel("mean error over mean sum")
    axes.set_title(f"What adding {found['question']['k']:,} products loses, modelled", loc="left", fontsize=11)
    axes.legend(loc="upper right", frameon=True, framealpha=1.0, edgecolor="none")
