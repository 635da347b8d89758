"""``cofire spec``: list, show, check, compare and describe specs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption, SetOption, complete_kind, complete_preset
from cofire.cli.output import console, print_json

if TYPE_CHECKING:
    from cofire.spec import Spec

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE", help="A preset's name, or a .toml or .json file.", autocompletion=complete_preset
    ),
]


def register(app: typer.Typer) -> None:
    """Add ``cofire spec ...``."""
    spec = typer.Typer(no_args_is_help=True, help="List, show, check and compare specs of models, clusters and runs.")
    spec.command("list")(list_presets)
    spec.command("show")(show)
    spec.command("validate")(validate)
    spec.command("diff")(compare)
    spec.command("schema")(schema)
    app.add_typer(spec, name="spec")


def list_presets(
    kind: Annotated[
        str | None,
        typer.Argument(help="Only presets of this kind: model, cluster or run.", autocompletion=complete_kind),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the presets."""
    from cofire.spec import load, preset_names
    from cofire.spec.io import known_kind

    names = preset_names(None if kind is None else known_kind(kind))
    rows = [{"name": name, **_summary(load(name))} for name in names]
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "kind", "total", "activated", "description"):
        number = column in ("total", "activated")
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "description")
    for row in sorted(rows, key=lambda row: (row["kind"], row["name"])):
        sizes = [_count_text(row[size]) for size in ("total", "activated_head_only")]
        table.add_row(row["name"], row["kind"], *sizes, row["description"])
    console().print(table)


def show(
    source: SourceArgument,
    as_json: JsonOption = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the spec as a TOML file and nothing else.")] = False,
    overrides: SetOption = None,
) -> None:
    """Show one spec, and for a model or a run how many parameters it has."""
    from cofire.spec import dump, load

    if as_json and as_toml:
        raise typer.BadParameter("--json and --toml exclude each other; leave one out")
    spec = load(source, overrides or ())
    if as_json:
        print_json({"spec": spec.model_dump(mode="json"), **_sizes(spec)})
        return
    sys.stdout.write(dump(spec))
    if not as_toml:
        sizes = _sizes(spec)
        if sizes:
            sys.stdout.write("\n" + "\n".join(_size_lines(sizes)) + "\n")


def validate(source: SourceArgument, as_json: JsonOption = False, overrides: SetOption = None) -> None:
    """Check one spec; the exit code is 2 and one line says what to mend if it breaks a rule."""
    from cofire.spec import load

    spec = load(source, overrides or ())
    summary = {"source": source, "valid": True, **_summary(spec)}
    if as_json:
        print_json(summary)
    else:
        sys.stdout.write(f"{source}: valid {summary['kind']} spec\n")


def compare(
    left: SourceArgument,
    right: SourceArgument,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Show the fields in which two specs differ; --set changes the second one."""
    from cofire.spec import diff, load

    rows = diff(load(left), load(right, overrides or ()))
    if as_json:
        print_json([{"path": path, "left": a, "right": b} for path, a, b in rows])
        return
    if not rows:
        sys.stdout.write("no field differs\n")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("field", left, right):
        table.add_column(Text(column), overflow="fold")
    for path, a, b in rows:
        table.add_row(path, Text(_value_text(a)), Text(_value_text(b)))
    console().print(table)


def schema(
    kind: Annotated[
        str,
        typer.Argument(
            help="model, cluster, run, workload, operator, search, kernel or kernels.", autocompletion=complete_kind
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Print the JSON schema of a kind of spec, for an editor or another program (always JSON)."""
    from cofire.spec import json_schema

    print_json(json_schema(kind))


def _summary(spec: Spec) -> dict[str, Any]:
    """Kind, description, and the sizes of the model if there is one."""
    sizes = _sizes(spec).get("parameters", {})
    return {
        "kind": getattr(spec, "kind", None),
        "total": sizes.get("total"),
        "activated_head_only": sizes.get("activated_head_only"),
        "description": getattr(spec, "description", ""),
    }


def _sizes(spec: Spec) -> dict[str, Any]:
    from cofire.plan import count_parameters, kv_bytes_per_token
    from cofire.spec import ModelSpec, RunSpec

    model = spec.model if isinstance(spec, RunSpec) else spec
    if not isinstance(model, ModelSpec):
        return {}
    return {
        "parameters": count_parameters(model).model_dump(mode="json"),
        "kv_bytes_per_token": kv_bytes_per_token(model),
    }


def _size_lines(sizes: dict[str, Any]) -> list[str]:
    count = sizes["parameters"]
    lines = {
        "parameters, total": count["total"],
        "activated, both embeddings": count["activated_with_both_embeddings"],
        "activated, head only": count["activated_head_only"],
        "activated, no embeddings": count["activated_without_embeddings"],
        "MTP modules, apart": count["mtp"]["total"],
        "KV cache, bytes/token in BF16": sizes["kv_bytes_per_token"],
    }
    return [f"# {label:<30} {number:>20,}" for label, number in lines.items()]


def _count_text(number: int | None) -> str:
    from cofire.spec.units import format_count

    return "" if number is None else format_count(number)


def _value_text(value: Any) -> str:
    return "-" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
