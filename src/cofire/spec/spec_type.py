"""The type of every spec: a frozen pydantic model that refuses unknown keys."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")  # Python, and pydantic, would take true for 1
    return value


Positive = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]


class Spec(BaseModel):
    """A small, frozen, self-validating value. Two specs are equal when their fields are.

    TOML has no null: where a field may be empty, the text ``none`` empties it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        return {key: None if value == "none" and cls._may_be_none(key) else value for key, value in table.items()}

    @classmethod
    def _may_be_none(cls, key: Any) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and NoneType in get_args(field.annotation)


def nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of ``number`` that is closest to ``wish``, the smaller one of two equally close."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return min({*small, *(number // d for d in small)}, key=lambda d: (abs(d - wish), d))
