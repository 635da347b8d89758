"""The type of every spec: a frozen pydantic model that names the nearest known key for an unknown one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A small, frozen, self-validating value. Two specs are equal when their fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
