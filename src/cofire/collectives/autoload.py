"""Makes PyTorch know the backend ``hfreduce`` without an import of Cofire (entry point ``torch.backends``).

PyTorch calls :func:`register` at the end of ``import torch``, so it must be quick and must not fail: what the backend
needs is imported when a group is made. Where ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, a program imports
``cofire.collectives.backend`` itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

NAME = "hfreduce"


def register() -> None:
    """Register the backend with torch.distributed; once is enough, twice does no harm."""
    # Whoever imports torch did not ask for this backend: it is missing then, and init_process_group says so.
    with contextlib.suppress(Exception):
        from torch import distributed

        if distributed.is_available() and NAME not in distributed.Backend.backend_list:
            distributed.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])


def _create(group: Any, options: Any) -> Any:
    """Make a group as torch.distributed asks for it.

    Args:
        group: Its store, rank, size and timeout.
        options: ``pg_options`` of the program: ``HFReduceOptions``, or None for what the environment says.
    """
    from cofire.collectives.backend import HFReduceGroup

    return HFReduceGroup(group.store, group.group_rank, group.group_size, group.timeout, options)
