"""``cofire search kernels`` and ``cofire search kernel``: Canvas's kernels sampled, and one of them shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption, SetOption, complete_kernel, complete_kernels
from cofire.cli.output import console, print_json, print_note
from cofire.cli.plan_question import check_suffix
from cofire.cli.search_progress import print_evaluated, progress, search_document, so_far_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from cofire.search.canvas import Extent, Kernel
    from cofire.search.canvas.description import NodeFigures
    from cofire.search.discovery import Discovery
    from cofire.search.searcher import Found
    from cofire.spec import KernelsSpec

_RULES_SHOWN = 5


# -- kernels -----------------------------------------------------------------------------------------


def kernels(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SPEC", help="A preset or a file of a search for kernels.", autocompletion=complete_kernels
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state, the best kernels and their code here, and go on from it."),
    ] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Search for kernels of coarse primitives that fill all places of a network: tree search or random walks.

    Rewards are modelled; nothing is trained. The same command again goes on with the search in DIR, after Ctrl-C or a
    crash too. Paths to set: sampling. (algorithm, reward, seed, budget, workers, keep), window., limits., places.
    """
    from cofire.search.canvas.discovery import discover_kernels
    from cofire.spec import KernelsSpec, load_as

    spec = load_as(KernelsSpec, source, overrides or ())
    start = time.monotonic()
    try:
        with progress("evaluated", spec.sampling.budget) as tell:
            found, refused = discover_kernels(spec, out, lambda so_far: tell(so_far.evaluated, so_far_text(so_far)))
    except KeyboardInterrupt:
        if out is not None:
            print_note(f"the state is in {out}; the same command goes on with it")
        raise
    took_s = time.monotonic() - start
    rows = [_figures(one, spec) for one in found.best]
    if as_json:
        kept = None if out is None else str(out)
        print_json({**search_document(found), "refused": refused, "took_s": took_s, "folder": kept, "kernels": rows})
        return
    _print_sampled(console(), found, refused, rows, took_s, out)


def _figures(found: Found[Kernel], spec: KernelsSpec) -> dict[str, Any]:
    """Return what is said of a kernel that was found; multiply-adds and parameters are summed over all places."""
    from cofire.search.canvas.from_spec import (
        dense_multiply_adds,
        extents_of,
        to_spec,
        total_multiply_adds,
        total_parameters,
    )
    from cofire.search.canvas.receptive import receptive_size

    kernel, extents = found.operator, extents_of(spec)
    dense = sum(dense_multiply_adds(extent, spec.window.dense_kernel) for extent in extents)
    count = total_multiply_adds(kernel, extents)
    return {
        "digest": f"{kernel.digest:032x}",
        "reward": found.reward,
        "evaluation": found.evaluation,
        "primitives": kernel.graph.num_primitives,
        "multiply_adds": count,
        "dense_ratio": count / dense,
        "parameters": total_parameters(kernel, extents),
        "receptive_size": receptive_size(kernel, *spec.window.receptive_map),
        "text": str(kernel),
        "spec": to_spec(kernel, places=spec.places).model_dump(mode="json"),
    }


def _print_sampled(
    shown: Console,
    found: Discovery[KernelsSpec, Kernel],
    refused: dict[str, int],
    rows: list[dict[str, Any]],
    took_s: float,
    out: Path | None,
) -> None:
    sampling, window = found.spec.sampling, found.spec.window
    print_evaluated(shown, found, took_s, "kernels")
    most = ", ".join(f"{count} by {name}" for name, count in list(refused.items())[:_RULES_SHOWN])
    shown.print(f"On the way {sum(refused.values())} were turned down; most {most}.", soft_wrap=True, markup=False)
    reward = "the first" if sampling.reward == "none" else f"the best by {sampling.reward}"
    title = f"{len(rows)} kernels, {reward} ({found.label}, {sampling.algorithm}, seed {sampling.seed})"
    shown.print(_kernel_table(title, rows, window.receptive_map))
    if out is not None:
        shown.print(f"kernels: {out / 'kernels'}", markup=False, soft_wrap=True)


def _kernel_table(title: str, rows: list[dict[str, Any]], map_size: tuple[int, int]) -> Table:
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_count

    heads = ("digest", "reward", "primitives", "multiply-adds", "of dense", "parameters", "sees", "weights and joins")
    table = new_table(title, *heads)
    table.columns[-1].overflow = "fold"
    places = map_size[0] * map_size[1]
    for row in rows:
        numbers = (f"{row['reward']:.4g}", str(row["primitives"]), format_count(row["multiply_adds"]))
        seen = f"{row['receptive_size']}/{places}"
        weights = _main_primitives(row["spec"]["primitives"])
        table.add_row(
            row["digest"][:12], *numbers, f"{row['dense_ratio']:.1%}", format_count(row["parameters"]), seen, weights
        )
    return table


def _main_primitives(rows: Sequence[dict[str, Any]]) -> str:
    """Return the names of the primitives that have a weight or join two tensors, in order."""
    from cofire.search.canvas.actions import WEIGHTED

    names = [row["primitive"] for row in rows]
    return " ".join(name for name in names if name in (*WEIGHTED, "bmm", "broadcast"))


# -- kernel ------------------------------------------------------------------------------------------


def show_kernel(
    source: Annotated[
        str,
        typer.Argument(metavar="KERNEL", help="A preset or a file of a kernel.", autocompletion=complete_kernel),
    ],
    place: Annotated[
        str | None,
        typer.Option(metavar="C,H,W", help="Channels, height and width to show it at; the file's first unless said."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write the kernel's page.")] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print the kernel as a PyTorch module and nothing else.")
    ] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Show a kernel: primitives, shapes and costs at a place, its receptive field, and its graph as Graphviz text."""
    check_suffix(html, ".html", "--html")
    from cofire.errors import SpecError
    from cofire.search.canvas.from_spec import extents_of, kernel_of
    from cofire.spec import KernelSpec, load_as

    spec = load_as(KernelSpec, source, overrides or ())
    kernel = kernel_of(spec)
    extents = extents_of(spec) if place is None else (_read_place(place),)
    if not extents:
        raise SpecError(f"{source} names no place; give one, for example --place 64,56,56")
    kernel.check(extents[0])
    if html is not None:
        from cofire.search.canvas.page import write_page

        write_page(kernel, extents, html)
    if as_json:
        print_json(_document(kernel, extents, code))
    elif code:
        sys.stdout.write(_code(kernel, extents[0]))
    else:
        _print_kernel(console(), kernel, extents)


def _read_place(text: str) -> Extent:
    from cofire.errors import SpecError
    from cofire.search.canvas import Extent

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise SpecError(f"--place {text!r} must be three whole numbers from 1 up, such as 64,56,56")
    return Extent(*map(int, parts))


def _code(kernel: Kernel, extent: Extent) -> str:
    from cofire.search.canvas.lowering import write_source

    return write_source(kernel, extent)


def _document(kernel: Kernel, extents: tuple[Extent, ...], code: bool) -> dict[str, Any]:
    from cofire.search.canvas.description import MAP_SIDE, node_figures, place_figures, shown_field

    document = {
        "digest": f"{kernel.digest:032x}",
        "groups": kernel.groups,
        "text": str(kernel),
        "nodes": [node._asdict() for node in node_figures(kernel, extents[0])],
        "costs": [{"label": "modelled", **place_figures(kernel, extent)._asdict()} for extent in extents],
        "receptive_map": [MAP_SIDE, MAP_SIDE],
        "receptive_size": len(shown_field(kernel, extents[0])),
        "graphviz": kernel.graph.graphviz(),
    }
    return {**document, "code": _code(kernel, extents[0])} if code else document


def _print_kernel(shown: Console, kernel: Kernel, extents: tuple[Extent, ...]) -> None:
    from cofire.plan.training_note import new_table
    from cofire.search.canvas.description import DENSE_KERNEL, MAP_SIDE, node_figures, place_figures, shown_field
    from cofire.spec.units import format_count

    shown.print(f"digest {kernel.digest:032x}, groups G = {kernel.groups}\n")
    shown.print(_node_table(node_figures(kernel, extents[0]), extents[0]))
    dense = f"of dense {DENSE_KERNEL} x {DENSE_KERNEL}"
    table = new_table("Cost for one example (modelled)", "C, H, W", "parameters", "multiply-adds", dense, "")
    for cost in (place_figures(kernel, extent) for extent in extents):
        counts = format_count(cost.parameters), format_count(cost.multiply_adds)
        table.add_row(", ".join(map(str, cost.place)), *counts, f"{cost.dense_ratio:.1%}", "")
    shown.print(table)
    seen = len(shown_field(kernel, extents[0]))
    shown.print(f"Sees {seen} of {MAP_SIDE**2} places of a map of {MAP_SIDE} x {MAP_SIDE}.\n")
    shown.print(kernel.graph.graphviz(), markup=False, soft_wrap=True)


def _node_table(nodes: tuple[NodeFigures, ...], extent: Extent) -> Table:
    from rich.text import Text

    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_count

    heads = ("", "sizes", "weight", "multiply-adds", "shape", "primitive")
    table = new_table(f"Primitives at C, H, W = {', '.join(map(str, extent))}", *heads)
    table.columns[-1].overflow = "fold"
    for position, node in enumerate(nodes):
        sizes, weight = (" x ".join(map(str, numbers)) or "-" for numbers in (node.sizes, node.weight))
        count = format_count(node.multiply_adds) if node.multiply_adds else "-"
        applied = " ".join([node.primitive, *(f"t{k}" for k in node.inputs)])
        table.add_row(f"t{position}", sizes, weight, count, Text(node.shape), Text(applied))
    return table
