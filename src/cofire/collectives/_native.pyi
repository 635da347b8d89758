"""Types of the native core that ``csrc/bindings`` makes; numbers are those of ``elements.py`` and ``shm.py``.

Addresses are of memory on the CPU that the caller keeps alive; times are in seconds, sizes in bytes.
"""

from collections.abc import Sequence

def reduce(
    isa: int, element: int, op: int, target: int, sources: Sequence[int], count: int, divisor: float = 1.0
) -> None:
    """Write the reduction of ``count`` elements at each source to ``target``, with the GIL released.

    Raises:
        ValueError: A number is unknown, the type has no such operation, or memory is missing or overlaps.
    """

def element_size(element: int) -> int:
    """Return the bytes of one element; 0 for an unknown type."""

def is_supported(element: int, op: int) -> bool:
    """Return whether the operation makes sense for the type."""

def has_isa(isa: int) -> bool:
    """Return whether this processor runs the instruction set."""

def best_isa() -> int:
    """Return the widest instruction set that this processor runs."""

class CollectiveFailure(RuntimeError):
    """Ranks cannot finish together; the message says who and why."""

class Call:
    """One collective as a rank states it; see ``Call`` of ``csrc/segment/segment.h``."""

    def __init__(
        self,
        kind: int,
        element: int = 0,
        op: int = 0,
        count: int = 0,
        root: int = 0,
        divisor: float = 1.0,
        input: int = 0,
        output: int = 0,
        timeout_s: float = 1800.0,
        chunk_bytes: int = 0,
        num_lanes: int = 1,
        network: bool = False,
        sends: bool = False,
    ) -> None: ...

class Segment:
    """One rank's part in the shared memory of its node; waits release the GIL and raise CollectiveFailure."""

    def __init__(
        self,
        file: int,
        rank: int,
        num_lanes: int,
        num_slots: int,
        slot_bytes: int,
        names: Sequence[int],
        spin_s: float,
    ) -> None: ...
    def run(self, call: Call) -> None:
        """Take part in one collective; all ranks of the node call it."""

    def begin(self, call: Call) -> int:
        """Start a collective that goes step by step; return its first step."""

    def wait_free(self, call: Call, chunk: int) -> None:
        """Wait until this rank's slot of the chunk may be written."""

    def mark_published(self, chunk: int) -> None:
        """Say that this rank's data of the chunk is in its slot."""

    def wait_published(self, call: Call, chunk: int) -> None:
        """Wait for all ranks' data; the first chunk checks that the ranks agree."""

    def combine(self, call: Call, chunk: int, count: int) -> None:
        """Reduce this rank's part of the chunk's ``count`` elements into the result slot."""

    def mark_reduced(self, chunk: int) -> None:
        """Say that this rank's part is in the result slot."""

    def wait_reduced(self, chunk: int, timeout_s: float) -> None:
        """Wait until all ranks of the node have reduced their parts."""

    def mark_exchanged(self, chunk: int) -> None:
        """Say that the result slot holds the result over all nodes."""

    def wait_result(self, call: Call, chunk: int) -> None:
        """Wait until the result slot holds the result."""

    def mark_consumed(self, chunk: int) -> None:
        """Say that this rank needs the chunk's slots no more."""

    def mark_sent(self, chunk: int) -> None:
        """Say that the result slot was sent to the other nodes."""

    def end(self, num_chunks: int) -> None:
        """End a collective that went step by step."""

    def abort(self, message: str) -> None:
        """Make every rank's waits raise, now and later; the first message stays."""

    @property
    def aborted(self) -> bool:
        """Whether a rank has given up."""

    @property
    def abort_message(self) -> str:
        """Why."""

    @property
    def first_step(self) -> int:
        """Chunks that went through the first lane before this collective."""

    def is_alive(self, rank: int) -> bool:
        """Return whether a rank's process is there."""

    def slot(self, step: int, rank: int) -> int:
        """Return the address of a rank's slot of the first lane."""

    def result(self, step: int) -> int:
        """Return the address of a result slot of the first lane."""

    @staticmethod
    def total_bytes(num_ranks: int, num_lanes: int, num_slots: int, slot_bytes: int) -> int:
        """Return the bytes of a segment."""
