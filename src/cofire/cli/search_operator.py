"""How commands print an operator: formula, tensors, cost, stages, and its graph as Graphviz text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table

    from cofire.search import Operator
    from cofire.search.cost import Cost, Stage
    from cofire.search.primitives import Dim


def operator_document(operator: Operator, code: bool = False) -> dict[str, Any]:
    """Return what a command says of an operator, ready for JSON.

    Args:
        operator: The operator.
        code: Also its stand-alone PyTorch module, for which torch is needed.
    """
    from cofire.search.cost import costs
    from cofire.search.operator_io import to_spec

    document = {
        "digest": f"{operator.digest:032x}",
        "formula": operator.formula(),
        "latex": operator.formula(latex=True),
        "spec": to_spec(operator).model_dump(mode="json"),
        "costs": [_cost_document(operator, found) for found in costs(operator)],
        "graphviz": operator.graphviz(),
    }
    if code:
        from cofire.search.lowering import write_source

        document["code"] = write_source(operator)
    return document


def _cost_document(operator: Operator, found: Cost) -> dict[str, Any]:
    return {
        "label": "modelled",
        "parameters": found.parameters,
        "naive_multiply_adds": found.naive_multiply_adds,
        "multiply_adds": found.multiply_adds,
        "tensor_bytes_fp32": found.tensor_bytes(),
        "stages": [
            {
                "factor": _factor(operator, stage),
                "loops": [dim.formula() for dim in stage.loops],
                "summed": [dim.formula() for dim in stage.summed],
                "multiply_adds": stage.multiply_adds,
                "result_elements": stage.result_elements,
            }
            for stage in found.stages
        ],
    }


def print_operator(shown: Console, operator: Operator, graph: bool = True) -> None:
    """Print an operator for a reader; stages are those of the first mapping.

    Args:
        shown: Where it is printed.
        operator: The operator.
        graph: Whether its primitive graph is printed too, as Graphviz text.
    """
    from rich.text import Text

    from cofire.search.cost import costs

    found = costs(operator)
    shown.print(Text(operator.formula(), style="bold"), soft_wrap=True)
    shown.print(f"digest {operator.digest:032x}\n")
    for table in (_tensors(operator), _costs(found), _stages(operator, found[0])):
        shown.print(table)
    if graph:
        shown.print(operator.graphviz(), markup=False, soft_wrap=True)


def _tensors(operator: Operator) -> Table:
    from cofire.plan.training_note import new_table

    mappings = range(len(operator.symbols.mappings))
    table = new_table("Tensors", "", *(f"mapping {k}" for k in mappings), "shape")
    shapes = [("y", operator.output), ("x", operator.input)]
    shapes += [(f"W{k}", weight) for k, weight in enumerate(operator.weights)]
    for name, dims in shapes:
        numbers = (" x ".join(str(dim.size.value(k)) for dim in dims) for k in mappings)
        table.add_row(name, *numbers, f"({', '.join(str(dim.size) for dim in dims)})")
    return table


def _costs(found: Iterable[Cost]) -> Table:
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_count, format_quantity

    heads = ("parameters", "multiply-adds", "in one loop nest", "tensors in FP32", "")
    table = new_table("Cost (modelled)", "mapping", *heads)
    for k, one in enumerate(found):
        counts = (format_count(n) for n in (one.parameters, one.multiply_adds, one.naive_multiply_adds))
        table.add_row(str(k), *counts, format_quantity(one.tensor_bytes(), "B"), "")
    return table


def _stages(operator: Operator, found: Cost) -> Table:
    from rich.text import Text

    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_count

    table = new_table("Stages, cheapest order", "times", "multiply-adds", "result", "sums", "loops")
    table.columns[-1].overflow = "fold"
    for stage in found.stages:
        counts = format_count(stage.multiply_adds), format_count(stage.result_elements)
        table.add_row(_factor(operator, stage), *counts, *(Text(_names(d)) for d in (stage.summed, stage.loops)))
    return table


def _factor(operator: Operator, stage: Stage) -> str:
    if stage.factor is None:
        return "-"
    weights = len(operator.weights)
    return f"W{stage.factor}" if stage.factor < weights else f"mask {stage.factor - weights}"


def _names(dims: Iterable[Dim]) -> str:
    return ", ".join(dim.formula() for dim in dims) or "-"
