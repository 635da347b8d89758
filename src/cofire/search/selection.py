"""Which of several operators are worth an evaluation: limits of cost, and the k best of an interface (Syno, finalise).

One interface may end as many operators, one for each way to give its dims to the input's positions. Those within the
limits are ranked by the variance of their weights' sizes, lowest first, then by multiply-adds, and the best k are kept.
Under several mappings multiply-adds, parameters and variances add up, for each place has weights of its own, and of
tensor bytes the most of any place counts.

Refusals are counted by the limit that refused, so that a search that finds nothing can say why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil, floor, prod
from typing import Any

from cofire.errors import SearchError
from cofire.search.cost import Cost, costs
from cofire.search.graph import Operator


@dataclass(frozen=True)
class Limits:
    """What an operator may cost; none: any.

    Attributes:
        min_multiply_adds: Least multiply-adds of the cheapest staging, over all mappings.
        max_multiply_adds: Most.
        max_parameters: Most elements of all weights, over all mappings.
        max_tensor_bytes: Most bytes of input, output, weights and the largest intermediate, in any mapping.
        element_bytes: Bytes of one number; 4 for FP32.
    """

    min_multiply_adds: int | None = None
    max_multiply_adds: int | None = None
    max_parameters: int | None = None
    max_tensor_bytes: int | None = None
    element_bytes: int = 4

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SearchError: One is negative, or the least multiply-adds are more than the most.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 0:
                raise SearchError(f"{each.name} = {value} is negative; give a count, or none for no limit")
        least, most = self.min_multiply_adds, self.max_multiply_adds
        if least is not None and most is not None and least > most:
            raise SearchError(f"min_multiply_adds = {least} is above max_multiply_adds = {most}; no operator fits")

    @classmethod
    def of_ratio(cls, baseline: Operator, least: float | None = None, most: float | None = None, **more: Any) -> Limits:
        """Build with multiply-adds in units of a baseline's, such as the operator that is to be replaced.

        Args:
            baseline: An operator over the same mappings.
            least: Least ratio; none: any.
            most: Most.
            more: Other attributes.

        Raises:
            SearchError: As the class.
        """
        total = sum(found.multiply_adds for found in costs(baseline))
        return cls(
            min_multiply_adds=None if least is None else ceil(least * total),
            max_multiply_adds=None if most is None else floor(most * total),
            **more,
        )

    def broken(self, found: tuple[Cost, ...]) -> str | None:
        """Return the name of the first limit that a cost, one per mapping, breaks, or none."""
        multiply_adds = sum(one.multiply_adds for one in found)
        bytes_needed = max(one.tensor_bytes(self.element_bytes) for one in found)
        parameters = sum(one.parameters for one in found)
        if self.min_multiply_adds is not None and multiply_adds < self.min_multiply_adds:
            return "min_multiply_adds"
        if self.max_multiply_adds is not None and multiply_adds > self.max_multiply_adds:
            return "max_multiply_adds"
        if self.max_parameters is not None and parameters > self.max_parameters:
            return "max_parameters"
        if self.max_tensor_bytes is not None and bytes_needed > self.max_tensor_bytes:
            return "max_tensor_bytes"
        return None


def weight_variance(operator: Operator) -> Fraction:
    """Return the variance of the number of elements over an operator's weights, summed over mappings.

    With at most one weight it is 0. Weights of like size share the work evenly (Syno, finalise).
    """
    total = Fraction(0)
    for mapping in range(len(operator.symbols.mappings)):
        elements = [prod(size.value(mapping) for size in shape) for shape in operator.weight_shapes]
        if elements:
            mean = Fraction(sum(elements), len(elements))
            total += sum(((n - mean) * (n - mean) for n in elements), Fraction(0)) / len(elements)
    return total


class Selector:
    """Keeps the best operators within limits and counts what it refused.

    Attributes:
        limits: What an operator may cost.
        keep: How many of one call are kept.
        seen: Operators looked at so far.
        refused: How many each limit refused so far; ``"keep"``: within the limits, but others were better.
    """

    def __init__(self, limits: Limits | None = None, keep: int = 2) -> None:
        if keep < 1:
            raise SearchError(f"keep = {keep} keeps no operator; keep at least 1")
        self.limits = limits or Limits()
        self.keep = keep
        self.seen = 0
        self.refused: dict[str, int] = {}

    def select(self, operators: Iterable[Operator]) -> list[Operator]:
        """Return the best ``keep`` operators within the limits, best first; one given twice counts once.

        Args:
            operators: Over the same symbols; their order does not matter.

        Raises:
            SearchError: An operator has more weights than its cost is found for.
        """
        ranked = []
        for operator in dict.fromkeys(operators):
            self.seen += 1
            found = costs(operator)
            name = self.limits.broken(found)
            if name is None:
                multiply_adds = sum(one.multiply_adds for one in found)
                ranked.append((weight_variance(operator), multiply_adds, operator.digest, operator))
            else:
                self._refuse(name, 1)
        best = [operator for *_, operator in sorted(ranked, key=lambda entry: entry[:3])]
        self._refuse("keep", len(best) - self.keep)
        return best[: self.keep]

    def _refuse(self, name: str, count: int) -> None:
        if count > 0:
            self.refused[name] = self.refused.get(name, 0) + count
