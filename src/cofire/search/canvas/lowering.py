"""A kernel of Canvas as a PyTorch module, and as plain source to paste into any project.

Both are the calls of one plan, in one order; the source written for a kernel has the module's state dict, and the same
seed gives both the same weights. Unlike Canvas, nothing but weights is drawn when a module is made.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.lowering_calls import Call, Expression, Name, reads
from cofire.search.canvas.lowering_plan import Line, Weight, plan_kernel
from cofire.search.canvas.variables import Extent

_LINE_LENGTH = 120
_INDENT = " " * 8
_TEMPLATE = '''\
"""A kernel found by search.

{graph}
"""

{imports}


class {name}(nn.Module):
    """Maps [any, {c}, {h}, {w}] to the same shape: C = {c}, H = {h}, W = {w}, G = {groups}."""

    def __init__(self) -> None:
        super().__init__()
{weights}
    def forward(self, x: Tensor) -> Tensor:
{body}
        return {result}
'''


class LoweredKernel(nn.Module):
    """A kernel at one place, from [N, C, H, W] to [N, C, H, W] with any N.

    Two modules of a kernel that have the same state dict are the same function. Weights are the parameters ``w0``,
    ``w1``, .. in the order of the nodes that read them, indexed as the primitive's formula says. They begin as normal
    numbers whose variance is one over the terms of the sum they are in, so that a contraction keeps the variance of
    uncorrelated data (fan-in initialisation), and those of a Scale as ones. What activations do to the variance is left
    out.

    Attributes:
        kernel: The kernel.
        extent: Channels, height and width of the place.
        plan: The calls it makes.
    """

    def __init__(self, kernel: Kernel, extent: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.extent = kernel, Extent(*extent)
        self.plan = plan_kernel(kernel, self.extent)
        for weight in self.plan.weights:
            self.register_parameter(weight.name, nn.Parameter(_drawn(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output.

        Args:
            x: The input, [N, C, H, W].

        Raises:
            SearchError: The input has other channels, height or width than the place.
        """
        if tuple(x.shape[1:]) != self.extent:
            raise SearchError(
                f"an input of shape {list(x.shape)} is not [N, {', '.join(map(str, self.extent))}]; "
                f"lower the kernel at the place that it is to fill"
            )
        tensors = {"x": x}
        tensors |= {f"self.{name}": weight for name, weight in self.named_parameters()}
        for line in self.plan.lines:
            tensors[line.target] = line.expression.value(tensors)
        return tensors[self.plan.result]

    def extra_repr(self) -> str:
        """Return the kernel as text, for ``repr``."""
        return str(self.kernel)


def lower(kernel: Kernel, extent: tuple[int, int, int]) -> LoweredKernel:
    """Return a kernel as a module.

    Args:
        kernel: The kernel.
        extent: Channels, height and width of the place that it is to fill.

    Raises:
        SearchError: The kernel cannot fill the place.
    """
    return LoweredKernel(kernel, extent)


def write_source(kernel: Kernel, extent: tuple[int, int, int], name: str = "CanvasKernel") -> str:
    """Return the source of a module that computes a kernel by the lowered module's calls, and imports PyTorch alone.

    Args:
        kernel: The kernel.
        extent: Channels, height and width of the place that it is to fill.
        name: Name of the class.

    Raises:
        SearchError: The kernel cannot fill the place, or the name cannot be a class's.
    """
    if not name.isidentifier():
        raise SearchError(f"{name!r} cannot name a class; use letters, digits and _")
    c, h, w = extent
    plan = plan_kernel(kernel, Extent(c, h, w))
    weights = "".join(map(_weight_source, plan.weights))
    body = "\n".join(map(_line_source, plan.lines))
    modules = {"torch.": "import torch", "F.": "import torch.nn.functional as F"}
    imports = [text for prefix, text in modules.items() if prefix in weights + body]
    return _TEMPLATE.format(
        graph=kernel.graph,
        imports="\n".join([*imports, "from torch import Tensor, nn"]),
        name=name,
        c=c,
        h=h,
        w=w,
        groups=kernel.groups,
        weights=weights,
        body=body,
        result=plan.result,
    )


def _drawn(weight: Weight) -> Tensor:
    if weight.deviation is None:
        return torch.ones(weight.sizes)
    return torch.randn(weight.sizes) * weight.deviation


def _weight_source(weight: Weight) -> str:
    sizes = ", ".join(map(str, weight.sizes))
    made = f"torch.ones({sizes})" if weight.deviation is None else f"torch.randn({sizes}) * {weight.deviation!r}"
    return _commented(f"self.{weight.name} = nn.Parameter({made})", weight.note) + "\n"


def _line_source(line: Line) -> str:
    *before, last = _statements(line.target, line.expression)
    return "\n".join([*(f"{_INDENT}{statement}" for statement in before), _commented(last, line.note)])


def _commented(statement: str, comment: str) -> str:
    joined = f"{_INDENT}{statement}  # {comment}"
    return joined if len(joined) <= _LINE_LENGTH else f"{_INDENT}# {comment}\n{_INDENT}{statement}"


def _statements(target: str, expression: Expression) -> list[str]:
    """Return an assignment; where it is too long and may be, as several in the order in which Python computes it."""
    statement = f"{target} = {expression}"
    if len(_INDENT + statement) <= _LINE_LENGTH or isinstance(expression, Name):
        return [statement]
    first, *rest = expression.arguments
    if not isinstance(first, Call) or any(reads(part, target) for part in rest):
        return [statement]
    outer = replace(expression, arguments=(Name(target), *rest))
    return [*_statements(target, first), f"{target} = {outer}"]
