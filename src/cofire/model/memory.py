"""How much memory there is, and how the process keeps what it has."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

import torch

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def available_memory_bytes(device: torch.device) -> float:
    """Return the memory that can still be allocated; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def keep_freed_memory() -> bool:
    """Let glibc keep what large tensors free, so that the next ones need no new pages; return whether it does.

    By default each tensor above 32 MiB at the latest comes from ``mmap`` and goes back with ``munmap``, so that the
    kernel clears its pages again in every step; training in BF16 is then a fifth to a third slower (measured:
    docs/lab/LOG.md). 32 MiB is the highest threshold that glibc takes. The setting is the process's; elsewhere than
    on Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
