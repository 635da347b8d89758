"""Writes an operator as a PyTorch module in plain source, to paste into any project: it imports nothing of Cofire."""

from __future__ import annotations

from dataclasses import replace

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering.module import initial_deviations
from cofire.search.lowering.planner import Plan, plan
from cofire.search.lowering.steps import Contract, Convolve, Step, inverse, storage_order

_LINE_LENGTH = 120
_TEMPLATE = '''\
"""{formula}

A coordinate in square brackets counts as zero outside its dim.
"""

{imports}


class {name}(nn.Module):
    """Maps [{inputs}] to [{outputs}], with {sizes}."""

    def __init__(self) -> None:
        super().__init__()
{weights}
    def forward(self, x: Tensor) -> Tensor:
{body}
        return x
'''


def write_source(operator: Operator, mapping: int = 0, name: str = "Operator") -> str:
    """Return the source of a module that computes the operator by the optimised lowering's steps.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.
        name: Name of the class.

    Raises:
        SearchError: There is no such mapping, or the name cannot be a class's.
    """
    if not name.isidentifier():
        raise SearchError(f"{name!r} cannot name a class; use letters, digits and _")
    found = plan(operator, mapping)
    bound, symbols = found.bound, operator.symbols
    body = _body(found)
    numbers = zip(symbols.names, symbols.mappings[mapping], strict=True)
    return _TEMPLATE.format(
        formula=operator.formula(),
        imports=_imports(body, bool(bound.weight_shapes)),
        name=name,
        inputs=", ".join("any" if k in bound.free else str(n) for k, n in enumerate(bound.input_shape)),
        outputs=", ".join("any" if bound.is_free(i) else str(bound.size(i)) for i in bound.output),
        sizes=", ".join(f"{symbol} = {number}" for symbol, number in numbers),
        weights="".join(_weights(found)),
        body=body,
    )


def _imports(body: str, has_weights: bool) -> str:
    lines = ["import torch"] if has_weights or "torch." in body else []
    lines += ["import torch.nn.functional as F"] if "F." in body else []
    return "\n".join([*lines, "from torch import Tensor, nn"])


def _weights(found: Plan) -> list[str]:
    """Return the lines that make the weights, each drawn in the order of dims that its convolution reads."""
    bound = found.bound
    rows = zip(bound.operator.weight_coordinates, bound.weight_shapes, initial_deviations(bound), strict=True)
    lines = []
    for k, (dims, shape, deviation) in enumerate(rows):
        order = storage_order(found.steps, f"w{k}", len(shape))
        made = f"torch.randn({', '.join(str(shape[dim]) for dim in order)}) * {deviation:.6g}"
        if order != tuple(range(len(order))):
            made = f"({made}).permute({', '.join(map(str, inverse(order)))})"
        lines.append(f"        # [{', '.join(map(str, dims))}]\n        self.w{k} = nn.Parameter({made})\n")
    return lines


def _body(found: Plan) -> str:
    bound = found.bound
    lines = [f"        # x: [{', '.join(map(str, bound.input))}]"]
    lines += [f"        m{k} = x.new_ones({bound.size(dim)})  # [{dim}]" for k, dim in enumerate(bound.masks)]
    for step, labels in zip(found.steps, found.labels, strict=True):
        owned, indent = _owned(step), " " * 8
        statement, comment = f"{indent}{step.name} = {owned.code()}", f"# [{', '.join(labels)}]"
        if len(statement) > _LINE_LENGTH and isinstance(owned, Convolve):
            lines.append(f"{indent}kernel = {owned.kernel()}")
            statement = f"{indent}{step.name} = {owned.call('kernel')}"
        fits = len(statement) + 2 + len(comment) <= _LINE_LENGTH
        lines += [f"{statement}  {comment}"] if fits else [f"{indent}{comment}", statement]
    return "\n".join(lines)


def _owned(step: Step) -> Step:
    """Return the step with its weight, if it has one, as an attribute of the module."""
    if isinstance(step, Contract | Convolve) and step.other.startswith("w"):
        return replace(step, other=f"self.{step.other}")
    return step
