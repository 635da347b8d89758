"""How much memory there is."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def available_memory_bytes(device: torch.device) -> float:
    """Return the memory that can still be allocated; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)
