"""The key-value cache: one tensor for all layers, all sequences and all positions.

Its shape is [layers, slots, capacity, C]: main layers first, then MTP modules; C is what the attention caches
per token, for MLA exactly ``kv_lora_rank + qk_rope_head_dim`` numbers (DeepSeek-V3 technical report, section 2.1.1).
The active sequences lie in slots 0 to B - 1, so what a layer reads is a view: when a sequence ends, the last
one moves into its slot. Slots and capacity double when they run out, up to their limits.

An entry is overwritten in place when its position is written again. That is all that rejected drafts need: a query
at position p sees positions up to p, and every one of them is written before such a query runs. Positions not yet
written hold zeros or an earlier sequence's entries: finite numbers, which a weight of zero cancels.

Left out: pages shared between sequences with a common prefix, and eviction to slower memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.errors import ServeError
from cofire.spec import ModelSpec

_CAPACITY_FIRST = 128

# oneDNN compiles a kernel for each new shape, which costs more than a decoding step's product (measured:
# docs/lab/LOG.md): what is read grows in steps of so many positions.
_READ_STEP = 64


class _Rows:
    """Where a call's entries go in a layer's cache seen as [slots * capacity, C]; found once for all layers."""

    def __init__(self, first: int, count: int, capacity: int, device: torch.device) -> None:
        self.offset = (torch.arange(first, first + count, device=device) * capacity).unsqueeze(1)
        self.positions: Tensor | None = None
        self.flat = self.offset

    def of(self, positions: Tensor) -> Tensor:
        if positions is not self.positions:
            self.flat = (self.offset + positions).reshape(-1)
            self.positions = positions
        return self.flat


class LayerView:
    """One layer's entries of consecutive slots; implements ``cofire.model.attention.LayerCache``."""

    __slots__ = ("_entries", "_flat", "_rows")

    def __init__(self, layer: Tensor, first: int, count: int, rows: _Rows) -> None:
        self._entries = layer[first : first + count]
        self._flat = layer.view(-1, layer.shape[-1])
        self._rows = rows

    def write(self, entries: Tensor, positions: Tensor) -> None:
        """Store ``entries`` [B, T, C] at ``positions`` [B, T]."""
        self._flat.index_copy_(0, self._rows.of(positions), entries.flatten(0, 1).to(self._flat.dtype))

    def read(self, length: int) -> Tensor:
        """Return [B, S, C], a view of positions 0 to S - 1: ``length``, or up to the next multiple of 64."""
        return self._entries[:, : -(-length // _READ_STEP) * _READ_STEP]


class KVCache:
    """Entries of every layer for up to ``slots_max`` sequences of up to ``capacity_max`` tokens.

    Args:
        spec: The model.
        slots_max: Largest number of sequences.
        capacity_max: Largest number of positions of a sequence.
        dtype: Of the entries.
        device: Where they lie.
        mtp: Whether MTP modules have entries too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots_max: int,
        capacity_max: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mtp: bool = True,
    ) -> None:
        self.slots_max, self.capacity_max = slots_max, capacity_max
        layers = spec.num_layers + (spec.mtp.depth if mtp and spec.mtp is not None else 0)
        shape = (layers, 1, min(_CAPACITY_FIRST, capacity_max), spec.attention.cache_width)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self._views: dict[tuple[int, int], list[LayerView]] = {}

    @property
    def slots(self) -> int:
        """Sequences that fit now."""
        return self.storage.shape[1]

    @property
    def capacity(self) -> int:
        """Positions per sequence that fit now."""
        return self.storage.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.storage.untyped_storage().nbytes()

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for ``slots`` sequences of ``capacity`` positions; entries are kept.

        Raises:
            ServeError: The cache may not grow so far, or the memory is not there.
        """
        if slots > self.slots_max or capacity > self.capacity_max:
            raise ServeError(
                f"{slots} sequences of {capacity} positions exceed the cache's limit of {self.slots_max} sequences "
                f"of {self.capacity_max}; send fewer or shorter requests"
            )
        slots = _grown(self.slots, slots, self.slots_max)
        capacity = _grown(self.capacity, capacity, self.capacity_max)
        if (slots, capacity) == (self.slots, self.capacity):
            return
        layers, old_slots, old_capacity, width = self.storage.shape
        try:
            storage = self.storage.new_zeros(layers, slots, capacity, width)
        except RuntimeError as error:  # torch's way of saying that memory ran out
            needed = layers * slots * capacity * width * self.storage.element_size()
            raise ServeError(
                f"the cache needs {needed / 1e9:.2f} GB for {slots} sequences of {capacity} positions, which cannot "
                "be allocated; allow fewer sequences at a time"
            ) from error
        storage[:, :old_slots, :old_capacity] = self.storage
        self.storage = storage
        self._views.clear()

    def views(self, first: int, count: int) -> list[LayerView]:
        """Return every layer's view of slots ``first`` to ``first + count - 1``, MTP modules last."""
        key = (first, count)
        if key not in self._views:
            rows = _Rows(first, count, self.capacity, self.storage.device)
            self._views[key] = [LayerView(layer, first, count, rows) for layer in self.storage]
        return self._views[key]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of slot ``source`` to slot ``target``."""
        if source != target:
            self.storage[:, target, :length] = self.storage[:, source, :length]


def _grown(size: int, needed: int, limit: int) -> int:
    while size < needed:
        size *= 2
    return min(size, limit)
