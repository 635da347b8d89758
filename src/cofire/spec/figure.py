"""A number that says how well it is known: its value, an interval, and where it comes from.

``measured``: read off the hardware itself, here or by whoever published it. ``calibrated``: fitted so that a model
reproduces a measured run. ``assumed``: from a data sheet, a rule of thumb, or nothing better. In a file a plain number
stands for an assumed figure, uncertain by a tenth either way.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from cofire.spec.spec_type import Spec

Label = Literal["measured", "calibrated", "assumed"]

# From the strongest to the weakest: a result is known as well as the weakest figure that it is made of.
LABELS: tuple[Label, ...] = ("measured", "calibrated", "assumed")

_PLAIN_SPREAD = 0.1


class Figure(Spec):
    """A value in SI units with its interval and origin.

    ``low`` and ``high`` bound the value; where one is left out it is a tenth away from the value.
    """

    value: float
    low: float
    high: float
    label: Label = "assumed"
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, table: Any) -> Any:
        if isinstance(table, int | float) and not isinstance(table, bool):
            table = {"value": table}
        if isinstance(table, dict) and isinstance(table.get("value"), int | float):
            value = float(table["value"])
            spread = _PLAIN_SPREAD * abs(value)
            return {"low": value - spread, "high": value + spread, **table}
        return table

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value = {self.value:g} must lie between low = {self.low:g} and high = {self.high:g}")
        return self

    def at(self, value: float) -> Figure:
        """Return the figure as if it were known to be ``value``."""
        return self.model_copy(update={"value": value, "low": value, "high": value})


def weakest(labels: set[Label]) -> Label:
    """Return the label of a result that is made of figures with these labels; of none: ``measured``."""
    for label in reversed(LABELS):
        if label in labels:
            return label
    return "measured"
