"""Makes PyTorch know the backend ``hfreduce`` without an import of Cofire (entry point ``torch.backends``).

PyTorch calls :func:`register` at the end of ``import torch``, so it must be quick and must not fail.
"""

from __future__ import annotations


def register() -> None:
    """Register the backend with torch.distributed."""
