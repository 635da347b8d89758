"""Triton kernels of precision for GPUs with FP8 conversions; the package ``triton`` is an optional extra.

Importing this package does not import Triton; its modules do. Callers ask :func:`runs_on` first and import the module
that they need inside the function that needs it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# Ada and Hopper convert FP32 to E4M3 in one instruction; Triton refuses E4M3 below.
CAPABILITY_MIN = (8, 9)


def runs_on(device: torch.device) -> bool:
    """Return whether Triton is installed and its kernels here run on a device."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and _is_capable(device.index)


@functools.cache
def _is_capable(index: int | None) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= CAPABILITY_MIN
