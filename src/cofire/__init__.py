"""Cofire: design a mixture-of-experts language model and its cluster together, train it and run it.

Names are loaded when first used (PEP 562): importing ``cofire`` imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BalanceSpec": "cofire.spec",
    "ClusterSpec": "cofire.spec",
    "DataSpec": "cofire.spec",
    "GQASpec": "cofire.spec",
    "MLASpec": "cofire.spec",
    "MTPSpec": "cofire.spec",
    "MoESpec": "cofire.spec",
    "ModelSpec": "cofire.spec",
    "OperatorSpec": "cofire.spec",
    "ParallelSpec": "cofire.spec",
    "PrecisionSpec": "cofire.spec",
    "RunSpec": "cofire.spec",
    "SearchSpec": "cofire.spec",
    "dump": "cofire.spec",
    "load": "cofire.spec",
    "CofireError": "cofire.errors",
    "CollectiveError": "cofire.errors",
    "JobError": "cofire.errors",
    "PlanError": "cofire.errors",
    "PrecisionError": "cofire.errors",
    "SearchError": "cofire.errors",
    "ServeError": "cofire.errors",
    "SpecError": "cofire.errors",
    "StorageError": "cofire.errors",
    "TrainError": "cofire.errors",
    "Plan": "cofire.plan",
    "estimate": "cofire.plan",
    "discover": "cofire.search.discovery",
    "build": "cofire.model",
    "RunResult": "cofire.train",
    "fit": "cofire.train",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cofire' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
