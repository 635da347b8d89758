"""The exceptions that Cofire raises on purpose.

    CofireError
    +-- SpecError        a spec that cannot be read, or breaks a rule
    +-- PlanError        a question the planner cannot answer
    +-- SearchError      an operator search that cannot go on
    +-- CollectiveError  ranks that cannot finish a collective together
    +-- PrecisionError   numbers that cannot be put into a format
    +-- TrainError       a run that cannot start, resume or go on
    +-- ServeError       a request or a checkpoint that cannot be served
    +-- StorageError     bytes that cannot be stored or read back
    +-- JobError         a job that cannot be scheduled or run

Every message is one line that names the offending value, the rule it broke and the nearest fix.
A command line that ends in one of them prints that line and exits with code 2; any other
exception is a fault of ours and exits with code 1.
"""

from __future__ import annotations

from typing import Literal


class CofireError(Exception):
    """Base of every error that Cofire raises on purpose; the user can act on its message."""


class SpecError(CofireError):
    """A spec cannot be read, or one of its fields breaks a rule."""


class PlanError(CofireError):
    """The planner cannot answer for this spec."""


class SearchError(CofireError):
    """An operator search cannot start or go on."""


class PrecisionError(CofireError):
    """Numbers cannot be put into a format: types, shapes or scales do not fit, or values are not finite."""


class CollectiveError(CofireError, RuntimeError):
    """Ranks cannot finish a collective together: they disagree, one is late or gone, or the type has no kernel.

    It is a RuntimeError too, as programs on torch.distributed expect.
    """


class TrainError(CofireError):
    """A training run cannot start, resume or go on."""


class ServeError(CofireError):
    """A model cannot be loaded for generation, or a request cannot be served.

    Attributes:
        reason: "invalid" where the request or the folder is at fault; "busy" where the same request may come again;
            "stopped" where the server ends or has failed.
    """

    def __init__(self, message: str, reason: Literal["invalid", "busy", "stopped"] = "invalid") -> None:
        super().__init__(message)
        self.reason = reason


class StorageError(CofireError):
    """Bytes cannot be stored or read back."""


class JobError(CofireError):
    """A job cannot be scheduled or run."""
