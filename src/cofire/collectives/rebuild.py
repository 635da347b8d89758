"""Who is left after a failure agrees on a new group.

A group that lost a rank cannot go on; its survivors meet through the store, number themselves anew in their old order,
and make another. The store must be kept by a process that is none of the ranks, as torchrun's agent or a file. Our
addition to HFReduce, whose failure handling is not published. Left out: new ranks that join.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, Store

from cofire.errors import CollectiveError

_POLL_S = 0.05


@dataclass(frozen=True)
class Survivors:
    """The ranks that go on.

    Attributes:
        ranks: Their old numbers, ascending.
        rank: This one's new number.
        store: Of the new group alone.
    """

    ranks: tuple[int, ...]
    rank: int
    store: Store

    @property
    def world_size(self) -> int:
        """How many they are."""
        return len(self.ranks)


def find_survivors(
    store: Store, rank: int, world_size: int, name: str, settle_s: float = 3.0, timeout_s: float = 60.0
) -> Survivors:
    """Wait until no more survivors come, and agree on who they are; all of them call it.

    Args:
        store: That all ranks of the old group share.
        rank: This one's old number.
        world_size: Ranks of the old group.
        name: Of this attempt, the same on all survivors and never used before.
        settle_s: How long nobody has come before the list is closed; longer than the old group's failure takes to
            reach everybody. Nobody waits once all old ranks are there.
        timeout_s: For everything.

    Raises:
        CollectiveError: This rank came after the list was closed, or the store does not answer.
    """
    here = PrefixStore(f"rebuild/{name}", store)
    try:
        here.set(f"here/{rank}", "1")
        present = _wait_until_settled(here, world_size, settle_s, time.monotonic() + timeout_s)
        # Whoever writes first closes the list; what the others saw does not count.
        text = bytes(here.compare_set("members", "", " ".join(map(str, present)))).decode()
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(
            f"the store does not answer ({str(error).splitlines()[0]}); keep it outside the ranks, as torchrun does"
        ) from None
    ranks = tuple(int(number) for number in text.split())
    if rank not in ranks:
        raise CollectiveError(
            f"rank {rank} came after ranks {text} went on as {name!r}; give settle_s more than it has"
        )
    return Survivors(ranks, ranks.index(rank), PrefixStore("group", here))


def _wait_until_settled(here: Store, world_size: int, settle_s: float, end_s: float) -> list[int]:
    present: list[int] = []
    since_s = time.monotonic()
    while True:
        now = [rank for rank in range(world_size) if here.check([f"here/{rank}"])]
        if now != present:
            present, since_s = now, time.monotonic()
        settled = len(present) == world_size or time.monotonic() - since_s >= settle_s or here.check(["members"])
        if settled or time.monotonic() > end_s:
            return present
        time.sleep(_POLL_S)


def rebuild_default_group(survivors: Survivors, timeout_s: float = 1800.0) -> None:
    """Replace the default group of torch.distributed by one of the survivors, with the backend ``hfreduce``.

    Sub-groups of the old group are gone; make them again.

    Args:
        survivors: From :func:`find_survivors`.
        timeout_s: Of the new group's operations.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group(
        "hfreduce",
        store=survivors.store,
        rank=survivors.rank,
        world_size=survivors.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
