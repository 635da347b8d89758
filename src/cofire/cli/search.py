"""``cofire search``: operators of a space counted, sampled, walked to by hand and shown, and kernels."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption, SetOption, complete_operator, complete_search
from cofire.cli.output import console, print_json, print_note
from cofire.cli.plan_question import check_suffix
from cofire.cli.search_explore import explore
from cofire.cli.search_kernels import kernels, show_kernel
from cofire.cli.search_operator import operator_document, print_operator
from cofire.cli.search_progress import print_evaluated, progress, search_document, so_far_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cofire.search import Operator
    from cofire.search.discovery import Discovery
    from cofire.spec import SearchSpec

SearchArgument = Annotated[
    str,
    typer.Argument(metavar="SPEC", help="A preset or a file of a search.", autocompletion=complete_search),
]


def register(app: typer.Typer) -> None:
    """Add ``cofire search ...``."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Search for linear operators and for kernels: count a space, sample it, walk it, show what was found.",
    )
    group.command("enumerate")(enumerate_space)
    group.command("sample")(sample)
    group.command("explore")(explore)
    group.command("show")(show)
    group.command("kernels")(kernels)
    group.command("kernel")(show_kernel)
    app.add_typer(group, name="search")


# -- enumerate ---------------------------------------------------------------------------------------


def enumerate_space(
    source: SearchArgument,
    depth: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most steps; that of the spec unless said.")
    ] = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Keep one operator of each function, up to the layout of its weights.")
    ] = False,
    top: Annotated[
        int, typer.Option(metavar="N", min=0, help="Operators to show, those with the fewest multiply-adds.")
    ] = 20,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Count every operator of a space, depth by depth, and show them.

    --set guidance=compat prunes as Syno does and loses some; guidance=none prunes nothing.
    """
    from cofire.search.enumeration import enumerate_operators
    from cofire.search.fingerprint import distinct as groups_of
    from cofire.search.from_spec import check_solvable, space_of
    from cofire.spec import SearchSpec, load_as

    spec = load_as(SearchSpec, source, overrides or ())
    space, most = space_of(spec), depth or spec.depth
    if spec.guidance != "compat":  # Syno's distance misses operators that exist
        check_solvable(space, most)
    counts: list[dict[str, Any]] = []
    operators: list[Operator] = []
    with progress("depth", most) as tell:
        for steps in range(1, most + 1):
            start = time.monotonic()
            operators = enumerate_operators(space, steps, spec.guidance)
            counts.append({"depth": steps, "operators": len(operators), "took_s": time.monotonic() - start})
            tell(steps, f"{len(operators)} operators")
    groups = groups_of(operators) if distinct else [[operator] for operator in operators]
    rows = sorted(((group, _figures(group[0])) for group in groups), key=lambda row: row[1]["multiply_adds"])
    if as_json:
        listed = [
            {**figures, "same_function": [f"{other.digest:032x}" for other in group[1:]]} for group, figures in rows
        ]
        head = {"search": spec.name, "guidance": spec.guidance, "distinct": distinct, "depths": counts}
        print_json({**head, "functions": len(groups) if distinct else None, "operators": listed})
        return
    shown = console()
    shown.print(_counts_table(f"{spec.name}, guidance {spec.guidance}", counts))
    if distinct:
        folded = len(operators) - len(groups)
        shown.print(f"{len(operators)} operators are {len(groups)} functions: {folded} fell together with another.")
    if rows and top:
        title = f"{min(top, len(rows))} of {len(rows)} with the fewest multiply-adds (modelled)"
        shown.print(_operator_table(title, [figures for _, figures in rows[:top]]))


def _counts_table(title: str, counts: list[dict[str, Any]]) -> Table:
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_duration

    table = new_table(title, "depth", "operators", "took")
    for row in counts:
        table.add_row(str(row["depth"]), f"{row['operators']:,}", format_duration(row["took_s"]))
    return table


def _figures(operator: Operator) -> dict[str, Any]:
    """Return what a table says of an operator; multiply-adds and parameters are summed over all mappings."""
    from cofire.search.cost import costs

    found = costs(operator)
    return {
        "digest": f"{operator.digest:032x}",
        "formula": operator.formula(),
        "multiply_adds": sum(one.multiply_adds for one in found),
        "parameters": sum(one.parameters for one in found),
    }


def _operator_table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_count

    rewarded = bool(rows) and "reward" in rows[0]
    heads = ["digest", *(["reward"] if rewarded else []), "multiply-adds", "parameters", "operator"]
    table = new_table(title, *heads)
    table.columns[-1].overflow = "fold"
    for row in rows:
        reward = [f"{row['reward']:.4g}"] if rewarded else []
        numbers = [format_count(row["multiply_adds"]), format_count(row["parameters"])]
        table.add_row(row["digest"][:12], *reward, *numbers, Text(row["formula"]))
    return table


# -- sample ------------------------------------------------------------------------------------------


def sample(
    source: SearchArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the state and the best operators here, and go on from it.")
    ] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Search a space for the operators that are worth most: tree search, random walks or a beam.

    Rewards are modelled, but for proxy_accuracy, which trains a small network of each operator. The same command again
    goes on with the search in DIR, after Ctrl-C or a crash too. Paths to set: sampling. (algorithm, reward, seed,
    budget, workers, keep), window., limits., depth.
    """
    from cofire.search.discovery import discover
    from cofire.spec import SearchSpec, load_as

    spec = load_as(SearchSpec, source, overrides or ())
    start = time.monotonic()
    try:
        with progress("evaluated", spec.sampling.budget) as tell:
            found = discover(spec, out, lambda so_far: tell(so_far.evaluated, so_far_text(so_far)))
    except KeyboardInterrupt:
        if out is not None:
            print_note(f"the state is in {out}; the same command goes on with it")
        raise
    took_s = time.monotonic() - start
    rows = [{"reward": one.reward, "evaluation": one.evaluation, **_figures(one.operator)} for one in found.best]
    if as_json:
        kept = None if out is None else str(out)
        print_json({**search_document(found), "took_s": took_s, "folder": kept, "operators": rows})
        return
    _print_sampled(console(), found, rows, took_s, out)


def _print_sampled(
    shown: Console, found: Discovery[SearchSpec, Operator], rows: list[dict[str, Any]], took_s: float, out: Path | None
) -> None:
    sampling = found.spec.sampling
    print_evaluated(shown, found, took_s, "operators")
    if rows:
        title = f"The best {len(rows)} by {sampling.reward} ({found.label}, {sampling.algorithm}, seed {sampling.seed})"
        shown.print(_operator_table(title, rows))
    else:
        print_note(f"no operator that was found lies within the window; {_nearest_limit(found)}")
    if out is not None:
        shown.print(f"operators: {out / 'operators'}", markup=False, soft_wrap=True)


def _nearest_limit(found: Discovery[SearchSpec, Operator]) -> str:
    if not found.failed:
        return "raise sampling.budget"
    most = max(sorted(found.failed), key=lambda name: found.failed[name])
    return "take another sampling.reward" if most == "reward" else f"most are refused by {most}, so widen that first"


# -- show --------------------------------------------------------------------------------------------


def show(
    source: Annotated[
        str,
        typer.Argument(metavar="OPERATOR", help="A preset or a file of an operator.", autocompletion=complete_operator),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write the operator's page.")] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print the operator as a PyTorch module and nothing else.")
    ] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Show an operator: its formula, what it costs and in which stages, and its primitive graph as Graphviz text."""
    check_suffix(html, ".html", "--html")
    from cofire.search.operator_io import from_spec
    from cofire.spec import OperatorSpec, load_as

    operator = from_spec(load_as(OperatorSpec, source, overrides or ()))
    if html is not None:
        from cofire.search.page import write_page

        write_page(operator, html)
    if as_json:
        print_json(operator_document(operator, code))
    elif code:
        from cofire.search.lowering import write_source

        sys.stdout.write(write_source(operator))
    else:
        print_operator(console(), operator)
