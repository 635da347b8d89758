"""``cofire bench``: how fast ranks on this machine, or of a torchrun group, reduce; and what bounds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.bench_precision import precision
from cofire.cli.options import JsonOption, complete_cluster
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix

if TYPE_CHECKING:
    from cofire.collectives.measure import ReduceQuestion, ReduceSample
    from cofire.network.host import HostReduceBounds

_SIZES = "4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,186MiB"
_COLOURS = ("#2a78d6", "#e0622b", "#158a4f", "#c8478b")


def register(app: typer.Typer) -> None:
    """Add ``cofire bench ...``."""
    group = typer.Typer(no_args_is_help=True, help="Measure collectives on this machine, and number formats.")
    group.callback()(lambda: None)
    group.command("reduce")(reduce)
    group.command("precision")(precision)
    app.add_typer(group, name="bench")


def reduce(
    ranks: Annotated[int, typer.Option(metavar="N", min=1, help="Processes to start; torchrun's own count.")] = 2,
    sizes: Annotated[str, typer.Option(metavar="BYTES,...", help="Data of a rank: 4KiB,16MB.")] = _SIZES,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="fp32, fp64, fp16, bf16, e4m3 or e5m2.")] = "fp32",
    op: Annotated[str, typer.Option(metavar="NAME", help="sum, average, min, max or product.")] = "sum",
    backend: Annotated[str, typer.Option(metavar="NAME,...", help="Backends, taking turns.")] = "hfreduce,gloo",
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Samples of each size and backend.")] = 7,
    chunk: Annotated[str | None, typer.Option(metavar="BYTES", help="Of hfreduce; none: its own choice.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER", help="Also bound all-reduces in its hosts' memory.", autocompletion=complete_cluster
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw bandwidth over size here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time all-reduces: algorithm and bus bandwidth, beside a copy of the same data measured in turns with them.

    Under torchrun the ranks are torchrun's, and rank 0 prints.
    """
    from cofire.collectives.measure import ReduceQuestion, in_torchrun, measure
    from cofire.network.host import cluster_host_reduce_bounds
    from cofire.spec import ClusterSpec, load_as, parse
    from cofire.spec.units import BYTES, parse_quantity

    check_suffix(plot, ".png", "--plot")
    bounds = None if cluster is None else cluster_host_reduce_bounds(load_as(ClusterSpec, cluster))
    table = {
        "num_ranks": ranks,
        "sizes_bytes": [round(parse_quantity(word, BYTES, "sizes", "4KiB,16MB")) for word in sizes.split(",")],
        "dtype": dtype,
        "op": op,
        "backends": [word.strip() for word in backend.split(",")],
        "repeats": repeats,
        "chunk_bytes": 0 if chunk is None else round(parse_quantity(chunk, BYTES, "chunk", "256KiB")),
    }
    question = parse(ReduceQuestion, table | ({"num_ranks": _world_size()} if in_torchrun() else {}), "bench reduce")
    samples = measure(question)
    if not samples:
        return
    found = {"question": question.model_dump(mode="json"), "rows": _rows(question, samples)}
    found["cluster"] = None if bounds is None else {"name": cluster, **bounds.model_dump(mode="json")}
    if plot is not None:
        _draw(found, plot)
    if as_json:
        print_json(found)
    else:
        _print(found, bounds)


def _world_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def _rows(question: ReduceQuestion, samples: list[ReduceSample]) -> list[dict[str, Any]]:
    """Return a row for each backend and size, beside the copy of that size and what the flags cost at least."""
    from cofire.collectives.measure import COPY, HOT_BYTES_MAX, bus_factor
    from cofire.collectives.tuning import available_cores, load_calibration

    known = load_calibration()
    crowded = question.num_ranks > available_cores()
    # Nobody has the result before having seen all others' data: one hand-over, whatever the size.
    flag_s = (known.wake_up_s if crowded else known.hand_over_s).value if question.num_ranks > 1 else 0.0
    copies = {row.size_bytes: row for row in samples if row.backend == COPY}
    found = []
    for row in samples:
        if row.backend == COPY:
            continue
        bound_s = copies[row.size_bytes].time_s.value
        least_s, rate = max(bound_s, flag_s), row.size_bytes / row.time_s.value
        found.append(
            {
                "backend": row.backend,
                "size_bytes": row.size_bytes,
                "time_s": row.time_s.model_dump(mode="json"),
                "algorithm_bytes_per_s": rate,
                "bus_bytes_per_s": rate * bus_factor(question.num_ranks),
                "cpu_s": row.cpu_s,
                "copy_s": bound_s,
                "ceiling_bytes_per_s": row.size_bytes / least_s,
                "ratio": least_s / row.time_s.value,
                "binds": "hand-over" if flag_s > bound_s else "cache" if row.size_bytes <= HOT_BYTES_MAX else "memory",
            }
        )
    return found


def _print(found: dict[str, Any], bounds: HostReduceBounds | None) -> None:
    from rich.table import Table

    from cofire.spec.units import format_quantity

    question = found["question"]
    title = f"All-reduce ({question['op']}) of {question['dtype']} by {question['num_ranks']} ranks, measured"
    table = Table(title=title, title_justify="left")
    for column in ("size", "backend", "time", "fastest to slowest", "algorithm", "bus", "ceiling", "ratio", "binds"):
        table.add_column(column, justify="left" if column in ("backend", "binds") else "right")
    previous = None
    for row in found["rows"]:
        time_s = row["time_s"]
        table.add_row(
            "" if row["size_bytes"] == previous else _binary(row["size_bytes"]),
            row["backend"],
            _short(time_s["value"]),
            f"{_short(time_s['low'])} to {_short(time_s['high'])}",
            *(format_quantity(row[f"{name}_bytes_per_s"], "B/s", 3) for name in ("algorithm", "bus", "ceiling")),
            f"{row['ratio']:.1%}",
            row["binds"],
        )
        previous = row["size_bytes"]
    out = console()
    out.print(table)
    out.print("Ceiling: every rank reads and writes its data once, all at once, as a copy measured in turns did it.")
    if bounds is None:
        return
    hosts = Table(
        title=f"All-reduce in the memory of {found['cluster']['name']}'s hosts, modelled", title_justify="left"
    )
    hosts.add_column("resource")
    hosts.add_column("bound", justify="right")
    for resource, value in sorted(bounds.bounds_bytes_per_s.items(), key=lambda item: item[1]):
        binds = " (binds)" if resource == bounds.binds else ""
        hosts.add_row(f"{resource}{binds}", format_quantity(value, "B/s", 3))
    out.print(hosts)


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _draw(found: dict[str, Any], path: Path) -> None:
    """Draw algorithm bandwidth over size, both logarithmic, with the ceiling and the spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from cofire.errors import CollectiveError

    question, rows = found["question"], found["rows"]
    canvas = Figure(figsize=(7.6, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for backend, colour in zip(question["backends"], _COLOURS * len(rows), strict=False):
        own = [row for row in rows if row["backend"] == backend]
        sizes = [row["size_bytes"] for row in own]
        axes.plot(sizes, [row["algorithm_bytes_per_s"] / 1e9 for row in own], "o-", color=colour, label=backend)
        low, high = ([row["size_bytes"] / row["time_s"][end] / 1e9 for row in own] for end in ("high", "low"))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    ceiling = {row["size_bytes"]: row["ceiling_bytes_per_s"] / 1e9 for row in rows}
    axes.plot(list(ceiling), list(ceiling.values()), color="#5d6068", linestyle="--", label="ceiling: a copy, measured")
    if found["cluster"] is not None:
        limit = found["cluster"]["ceiling_bytes_per_s"]["value"] / 1e9
        name = f"{found['cluster']['name']}: {found['cluster']['binds']} (modelled)"
        axes.axhline(limit, color="#8a3b12", linestyle=":", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ceiling))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("data of a rank")
    axes.set_ylabel("algorithm bandwidth, GB/s")
    title = f"All-reduce ({question['op']}) of {question['dtype']}, {question['num_ranks']} ranks"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(True, color="#e6e6e3")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    try:
        canvas.savefig(path, dpi=144, metadata={"Software": None})
    except OSError as error:
        raise CollectiveError(f"cannot write {str(path)!r}: {error.strerror}; name a folder that is there") from None


def _binary(value: float) -> str:
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g} B"
