"""How sure a result is: every figure it is made of is moved to both ends of its interval, one at a time.

The result's own interval takes figures as independent: the root of the sum of squares of what each moves it, up and
down apart. Its label is that of the weakest figure that moves it by more than a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from cofire.spec.figure import Figure, Label, weakest
from cofire.spec.spec_type import Spec

_MATTERS = 1e-3  # of the result


class Sensitivity(Spec):
    """One figure, and the result at both ends of it.

    ``path`` is the figure's place in the spec it was found in; ``at_low`` and ``at_high`` are results.
    """

    path: str
    value: float
    low: float
    high: float
    label: Label
    source: str
    at_low: float
    at_high: float

    @property
    def swing(self) -> float:
        """Between the two results."""
        return abs(self.at_high - self.at_low)


class Interval(Spec):
    """A result with its interval; ``sensitivities`` come from the largest swing to the smallest."""

    value: float
    low: float
    high: float
    label: Label
    sensitivities: tuple[Sensitivity, ...] = ()


def figures(spec: Spec, prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """Yield the path and value of each figure in a spec, depth first; tables of measured rates are left out."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        path = f"{prefix}{name}"
        if isinstance(value, Figure):
            yield path, value
        elif isinstance(value, Spec):
            yield from figures(value, f"{path}.")


def with_figure(spec: Spec, path: str, figure: Figure) -> Spec:
    """Return a spec in which one figure is another."""
    name, _, rest = path.partition(".")
    value = with_figure(getattr(spec, name), rest, figure) if rest else figure
    return spec.model_copy(update={name: value})


def interval(specs: dict[str, Spec], result: Callable[[dict[str, Spec]], float]) -> Interval:
    """Return a result with its interval.

    Args:
        specs: Specs by name, for example ``{"cluster": cluster, "workload": workload}``; their figures are moved.
        result: The result as a function of such specs.
    """
    value = result(specs)
    rows, up, down = [], 0.0, 0.0
    for name, spec in specs.items():
        for path, figure in figures(spec):
            ends = []
            for end in (figure.low, figure.high):
                moved = with_figure(spec, path, figure.at(end))
                ends.append(value if end == figure.value else result({**specs, name: moved}))
            up += max(0.0, *(end - value for end in ends)) ** 2
            down += max(0.0, *(value - end for end in ends)) ** 2
            rows.append(
                Sensitivity(
                    path=f"{name}.{path}",
                    value=figure.value,
                    low=figure.low,
                    high=figure.high,
                    label=figure.label,
                    source=figure.source,
                    at_low=ends[0],
                    at_high=ends[1],
                )
            )
    rows = [row for row in rows if row.swing > 0]
    rows.sort(key=lambda row: -row.swing)
    return Interval(
        value=value,
        low=value - math.sqrt(down),
        high=value + math.sqrt(up),
        label=weakest({row.label for row in rows if row.swing > _MATTERS * abs(value)}),
        sensitivities=tuple(rows),
    )
