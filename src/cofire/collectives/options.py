"""What a user may set of HFReduce: sizes, threads, the network interface, and which ranks share a node.

They come as ``pg_options`` of ``init_process_group`` and ``new_group``, or from the environment: each has a variable
``COFIRE_HFREDUCE_<OPTION>``, but for ``COFIRE_HOST`` and ``COFIRE_ZONE``, which differ from node to node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError

from cofire.errors import CollectiveError
from cofire.spec.spec_type import Spec

Algorithm = Literal["auto", "double_tree", "ring"]

_OWN_NAMES = {"host": "COFIRE_HOST", "zone": "COFIRE_ZONE"}


class HFReduceOptions(Spec):
    """Options of one group; all ranks set the same, but for ``host`` and ``zone``. What is not set is chosen."""

    chunk_bytes: int | None = Field(
        None, ge=4096, le=1 << 28, description="of a chunk; none: by the model of tuning.py"
    )
    num_threads: int | None = Field(None, ge=1, le=64, description="of a rank, for sums; none: by the model")
    num_slots: int | None = Field(
        None, ge=3, le=256, description="chunks on their way at once; none: 4, 8 with CUDA, 16 between nodes"
    )
    num_connections: int = Field(
        1, ge=1, le=16, description="between each two nodes; more where one TCP stream does not fill the wire"
    )
    interface: str | None = Field(
        None, description="network interface between nodes, such as eth0; none: gloo's choice"
    )
    algorithm: Algorithm = Field("auto", description="between nodes")
    host: str | None = Field(None, description="ranks with the same name share a node; none: found out")
    zone: str | None = Field(None, description="network zone of the node; sums cross between two zones once per tree")
    spin_us: float | None = Field(
        None, ge=0, le=1e6, description="before a rank sleeps; none: 50, or 0 with more ranks than cores"
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> HFReduceOptions:
        """Return the options that environment variables set.

        Raises:
            CollectiveError: A variable holds what its option may not be.
        """
        env = os.environ if environment is None else environment
        given = {
            name: env[variable]
            for name in cls.model_fields
            if (variable := _OWN_NAMES.get(name, f"COFIRE_HFREDUCE_{name.upper()}")) in env
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            variable = _OWN_NAMES.get(name, f"COFIRE_HFREDUCE_{name.upper()}")
            raise CollectiveError(f"{variable} = {given.get(name)!r}: {first['msg']}; change or unset it") from None
