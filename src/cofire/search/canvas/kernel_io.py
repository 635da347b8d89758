"""Kernels of Canvas as plain tables: what a file holds.

``{"groups": 4, "primitives": [{"primitive": "input", "inputs": []}, {"primitive": "fc", "inputs": [0], "channels": "C",
"meta": 0}, ..]}``; sizes are text such as ``"C/2"`` and dims such as ``"0.C"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from cofire.errors import SearchError, SpecError
from cofire.search.canvas.graph import Graph, Kernel, Node
from cofire.search.canvas.primitive import Primitive
from cofire.search.canvas.primitives import PRIMITIVES
from cofire.search.canvas.shapes import DimName
from cofire.search.canvas.variables import Variable


def to_dict(kernel: Kernel) -> dict[str, Any]:
    """Return a kernel as numbers, strings, lists and tables."""
    rows = [
        {"primitive": node.primitive.name, "inputs": list(node.inputs), **node.primitive.arguments()}
        for node in kernel.graph.nodes
    ]
    return {"groups": kernel.groups, "primitives": rows}


def from_dict(table: Mapping[str, Any]) -> Kernel:
    """Return the kernel that ``to_dict`` wrote.

    Raises:
        SpecError: A table has a field it should not have, lacks one, or has one of the wrong type.
        SearchError: The tables are well formed, but are no kernel.
    """
    _check_names("kernel", table, ("groups", "primitives"), ("groups", "primitives"))
    rows = table["primitives"]
    if not isinstance(rows, list):
        raise SpecError(f"primitives = {rows!r} of a kernel must be a list of tables")
    groups = _whole("groups", table["groups"])
    return Kernel(Graph(tuple(_node(f"primitives.{k}", row) for k, row in enumerate(rows))), groups)


def _node(where: str, row: Any) -> Node:
    if not isinstance(row, Mapping):
        raise SpecError(f"{where} = {row!r} must be a table with primitive and inputs")
    kind = PRIMITIVES.get(str(row.get("primitive")))
    if kind is None:
        raise SpecError(f"{where}.primitive = {row.get('primitive')!r} is none of {', '.join(PRIMITIVES)}")
    inputs = row.get("inputs")
    if not isinstance(inputs, list):
        raise SpecError(f"{where}.inputs = {inputs!r} must be a list of positions")
    return Node(_primitive(where, kind, row), tuple(_whole(f"{where}.inputs", k) for k in inputs))


def _primitive(where: str, kind: type[Primitive], row: Mapping[str, Any]) -> Primitive:
    known = fields(kind)  # pyright: ignore[reportArgumentType]
    names = tuple(field.name for field in known)
    needed = tuple(field.name for field in known if field.default is MISSING)
    _check_names(where, row, ("primitive", "inputs", *names), needed)
    arguments = {name: _READERS[name](f"{where}.{name}", row[name]) for name in names if name in row}
    return kind(**arguments)


def _check_names(where: str, table: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    for name in table:
        if name not in known:
            raise SpecError(f"{where}: {name!r} is no field; there are {', '.join(known)}")
    for name in needed:
        if name not in table:
            raise SpecError(f"{where}: {name} is missing; add it")


def _whole(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{where} = {value!r} must be a whole number")
    return value


def _truth(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{where} = {value!r} must be true or false")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SpecError(f"{where} = {value!r} must be text")
    return value


def _variable(where: str, value: Any) -> Variable:
    return _parsed(Variable.parse, where, value)


def _dim(where: str, value: Any) -> DimName:
    return _parsed(DimName.parse, where, value)


def _parsed(parse: Callable[[str], Any], where: str, value: Any) -> Any:
    try:
        return parse(_text(where, value))
    except SearchError as error:
        raise SpecError(f"{where}: {error}") from None


def _several(read: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    def read_all(where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise SpecError(f"{where} = {value!r} must be a list")
        return tuple(read(where, part) for part in value)

    return read_all


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "channels": _variable,
    "factor": _variable,
    "sizes": _several(_variable),
    "dims": _several(_dim),
    "dim": _dim,
    **dict.fromkeys(("kernel", "dilation", "meta", "distance"), _whole),
    **dict.fromkeys(("kind", "over"), _text),
    **dict.fromkeys(("transpose_left", "transpose_right", "softmax"), _truth),
}
