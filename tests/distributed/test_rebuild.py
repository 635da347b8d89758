"""The survivors of a killed rank make a new group and go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore, TCPStore

from cofire.collectives.rebuild import find_survivors, rebuild_default_group
from cofire.errors import CollectiveError

_SPAWN = multiprocessing.get_context("spawn")
NUM_RANKS, VICTIM = 3, 0


def work(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=60))
    distributed.init_process_group(
        "hfreduce", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=30)
    )
    results.put((rank, "ready"))
    try:
        while True:
            distributed.all_reduce(torch.ones(1000))
    except CollectiveError as error:
        told = str(error)
    left = find_survivors(store, rank, NUM_RANKS, "first", settle_s=3.0)
    rebuild_default_group(left, timeout_s=30)
    x = torch.tensor([10.0**rank])
    distributed.all_reduce(x)
    results.put((rank, (told, left.ranks, left.rank, x.item())))
    results.close()
    results.join_thread()
    os._exit(0)


def test_survivors_number_themselves_anew_and_reduce_without_the_dead_rank() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    results = _SPAWN.Queue()
    ranks = [_SPAWN.Process(target=work, args=(rank, store.port, results), daemon=True) for rank in range(NUM_RANKS)]
    try:
        for process in ranks:
            process.start()
        assert {results.get(timeout=90)[1] for _ in ranks} == {"ready"}
        time.sleep(0.3)
        os.kill(ranks[VICTIM].pid or 0, signal.SIGKILL)
        got = dict(results.get(timeout=90) for _ in range(NUM_RANKS - 1))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert {rank: value[1:] for rank, value in got.items()} == {1: ((1, 2), 0, 110.0), 2: ((1, 2), 1, 110.0)}
    assert all("rank 0 has gone during all_reduce" in value[0] for value in got.values())


def test_a_rank_that_comes_after_the_list_was_closed_is_told_so() -> None:
    store = HashStore()
    left = find_survivors(store, 1, 3, "again", settle_s=0.1)
    assert (left.ranks, left.rank, left.world_size) == ((1,), 0, 1)
    with pytest.raises(CollectiveError, match=r"rank 2 came after ranks 1 went on as 'again'"):
        find_survivors(store, 2, 3, "again", settle_s=0.1)
