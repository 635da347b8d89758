"""The fast lowering: views, strided windows, rolls, convolutions and einsums, as ``planner`` orders them.

Nothing is gathered, windows are read as strided views or by torch's convolutions, and free dims such as the batch keep
their size from the call. ``torch.compile(fullgraph=True)`` takes it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cofire.search.graph import Operator
from cofire.search.lowering.planner import Plan, plan


class OptimisedKernel(nn.Module):
    """An operator at the sizes of one mapping, by its plan; the weights are arguments.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.
        steps: Another of the operator's plans than that of least work; see :func:`planner.plans`.

    Raises:
        SearchError: There is no such mapping.
    """

    def __init__(self, operator: Operator, mapping: int = 0, steps: Plan | None = None) -> None:
        super().__init__()
        self.plan = plan(operator, mapping) if steps is None else steps
        self._signature = self.plan.bound.signature
        self._masks = self.plan.bound.shape(self.plan.bound.masks)

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the output, of the type of ``x``.

        Args:
            x: The input, of the operator's input shape; free dims may have any size.
            weights: One tensor per weight, in the operator's order.

        Raises:
            SearchError: Shapes are not the operator's.
        """
        self._signature.check(x.shape, [weight.shape for weight in weights])
        tensors = {"x": x}
        tensors |= {f"w{k}": weight for k, weight in enumerate(weights)}
        tensors |= {f"m{k}": x.new_ones(size) for k, size in enumerate(self._masks)}
        for step in self.plan.steps:
            tensors[step.name] = step.apply(tensors)
        return tensors["x"]
