"""Collectives as data: executed on real vectors in random order, and sent over wires against their formulas."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from cofire.errors import PlanError
from cofire.network.collective_time import ALGORITHMS, Group, Wire, collective_time_s
from cofire.network.collectives import (
    Messages,
    all_to_all,
    double_tree_all_reduce,
    forwarded_all_to_all,
    hierarchical_all_reduce,
    port_rings,
    port_trees,
    ring,
)
from cofire.network.double_tree import zoned_double_tree
from cofire.network.flowsim import simulate_flows
from cofire.network.routing import Routes
from cofire.network.topology import Network


def execute(messages: Messages, held: np.ndarray, seed: int) -> np.ndarray:
    """Run the messages one by one on ``held [num_ranks, num_chunks]``, in a random order that the waits allow.

    A message reads when it starts and writes when it arrives; between the two others may run.
    """
    random = np.random.default_rng(seed)
    held = held.copy()
    arrive = {m: [] for m in range(messages.num_messages)}
    leave = {m: [] for m in range(messages.num_messages)}
    waits = np.zeros(messages.num_messages, int)
    for before, after, queued in zip(messages.before, messages.after, messages.queued, strict=True):
        (leave if queued else arrive)[int(before)].append(int(after))
        waits[after] += 1
        if queued:
            assert messages.source[before] == messages.source[after], "a queue of two senders"
        else:
            assert messages.target[before] == messages.source[after], "waits for what it does not hold"
    ready = [int(m) for m in np.flatnonzero(waits == 0)]
    flying: list[tuple[int, np.ndarray, np.ndarray]] = []
    done = 0

    def release(followers: list[int]) -> None:
        for follower in followers:
            waits[follower] -= 1
            if waits[follower] == 0:
                ready.append(follower)

    while ready or flying:
        if ready and (not flying or random.random() < 0.5):
            m = ready.pop(int(random.integers(len(ready))))
            chunks = messages.chunk[m] + messages.stride[m] * np.arange(messages.count[m])
            flying.append((m, chunks, held[messages.source[m], chunks].copy()))
            release(leave[m])
            continue
        # Messages of one sender to one receiver arrive in the order of sending.
        at = int(random.integers(len(flying)))
        pair = (messages.source[flying[at][0]], messages.target[flying[at][0]])
        at = next(i for i, (m, _, _) in enumerate(flying) if (messages.source[m], messages.target[m]) == pair)
        m, chunks, data = flying.pop(at)
        if messages.adds[m]:
            held[messages.target[m], chunks] += data
        else:
            held[messages.target[m], chunks] = data
        done += 1
        release(arrive[m])
    assert done == messages.num_messages, "messages wait for each other"
    return held


def numbers(messages: Messages) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, (messages.num_ranks, messages.num_chunks)).astype(float)


ALL_REDUCES = [
    *(ring("all_reduce", n, 1.0) for n in (1, 2, 3, 8)),
    *(double_tree_all_reduce(n, 1.0, pieces=p) for n, p in ((1, 2), (2, 3), (3, 1), (7, 2), (8, 4), (20, 3))),
    double_tree_all_reduce(12, 1.0, 3, zoned_double_tree(5, 7)),
    *(hierarchical_all_reduce(n, p, 1.0) for n, p in ((1, 1), (1, 4), (4, 1), (2, 2), (3, 4))),
    *(port_rings("all_reduce", n, p, 1.0) for n, p in ((1, 3), (4, 1), (2, 2), (3, 4))),
    *(port_trees(n, p, 1.0, 2) for n, p in ((1, 3), (4, 1), (2, 2), (3, 4))),
]


@pytest.mark.parametrize("messages", ALL_REDUCES, ids=lambda m: f"{m.num_ranks}-{m.num_chunks}")
def test_every_rank_ends_an_all_reduce_with_the_sum_in_any_order_that_the_waits_allow(messages: Messages):
    held = numbers(messages)
    for seed in range(5):
        after = execute(messages, held, seed)
        np.testing.assert_array_equal(after, np.broadcast_to(held.sum(0), held.shape))


def test_a_ring_scatters_sums_and_gathers_parts():
    messages = ring("reduce_scatter", 5, 1.0)
    held = numbers(messages)
    assert (execute(messages, held, 0).diagonal() == held.sum(0)).all()
    gather = ring("all_gather", 5, 1.0)
    assert (execute(gather, np.diag(held.diagonal()), 0) == held.diagonal()).all()


@pytest.mark.parametrize(
    "messages",
    [all_to_all(1, 1.0), all_to_all(6, 1.0), forwarded_all_to_all(3, 2, 1.0), forwarded_all_to_all(2, 4, 1.0)],
)
def test_every_block_of_an_all_to_all_reaches_its_target(messages: Messages):
    n = messages.num_ranks
    blocks = np.random.default_rng(0).random((n, n))
    held = np.full((n, n * n), np.nan)
    for source in range(n):
        held[source, source * n : source * n + n] = blocks[source]
    after = execute(messages, held, 1)
    for target in range(n):
        assert (after[target, target::n] == blocks[:, target]).all()


def wired(messages: Messages, per_node: int, fast: Wire, slow: Wire) -> tuple[Network, Routes]:
    """Each rank has a port to the network and one to its node's fast links; neither is ever short inside."""
    num = messages.num_ranks
    same = messages.source // per_node == messages.target // per_node
    link = np.stack([messages.source, messages.target + num], axis=1) + np.where(same, 0, 2 * num)[:, None]
    capacity = np.repeat([fast.bandwidth_bytes_per_s, slow.bandwidth_bytes_per_s], 2 * num)
    zero = np.zeros(4 * num, np.int64)
    network = Network("ports", 0, 0, zero, zero, capacity, np.zeros(4 * num), zero, zero, zero)
    latency = np.where(same, fast.latency_s, slow.latency_s)
    ends = 2 * np.arange(messages.num_messages + 1)
    return network, Routes(ends, link.ravel(), np.ones(link.size), latency)


def makespan(messages: Messages, per_node: int, fast: Wire, slow: Wire) -> float:
    return simulate_flows(*wired(messages, per_node, fast, slow), messages.flows()).makespan_s


FAST, SLOW = Wire(3e-6, 160e9), Wire(4e-6, 40e9)


@pytest.mark.parametrize("size_bytes", [1e4, 1e8])
@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather", "all_reduce"])
def test_the_time_of_a_ring_is_the_formula(kind: Literal["reduce_scatter"], size_bytes: float):
    for n in (2, 5, 16):
        time = collective_time_s(kind, size_bytes, Group(n, 1, None, SLOW), "ring")
        assert makespan(ring(kind, n, size_bytes), 1, FAST, SLOW) == pytest.approx(time, rel=1e-9)


@pytest.mark.parametrize("size_bytes", [1e5, 1e8])
def test_the_time_of_the_hierarchical_all_reduce_is_the_formula(size_bytes: float):
    for nodes, ranks in ((1, 8), (4, 1), (4, 8), (7, 4)):
        time = collective_time_s("all_reduce", size_bytes, Group(nodes, ranks, FAST, SLOW), "hierarchical")
        simulated = makespan(hierarchical_all_reduce(nodes, ranks, size_bytes), ranks, FAST, SLOW)
        assert simulated == pytest.approx(time, rel=1e-9)


@pytest.mark.parametrize(("nodes", "ranks"), [(4, 8), (6, 2), (2, 4)])
def test_rings_on_all_ports_change_nodes_between_devices_of_one_number_and_load_each_port_once(nodes: int, ranks: int):
    messages = port_rings("all_gather", nodes, ranks, 1.0)
    (near, out), (far, into) = (divmod(rank, ranks) for rank in (messages.source, messages.target))
    crosses = near != far
    assert (out == into)[crosses].all()
    rings = np.bincount(messages.source[crosses], minlength=nodes * ranks)
    assert set(rings) == {nodes * ranks - 1}


def test_rings_on_all_ports_take_the_time_of_the_formula_but_for_latencies_that_they_hide():
    slow, group = Wire(4e-6, 10e9), Group(4, 8, Wire(4e-6, 160e9), Wire(4e-6, 10e9))
    time = collective_time_s("all_reduce", 1e9, group, "ring")
    simulated = makespan(port_rings("all_reduce", 4, 8, 1e9), 8, Wire(4e-6, 160e9), slow)
    assert simulated == pytest.approx(time, rel=0.02)


@pytest.mark.parametrize("pieces", [8, 32])
@pytest.mark.parametrize("size_bytes", [1e5, 1e9])
def test_the_time_of_the_double_tree_is_near_the_formula(size_bytes: float, pieces: int):
    for n in (2, 3, 4, 8, 17, 64):
        time = collective_time_s("all_reduce", size_bytes, Group(n, 1, None, SLOW, pieces), "double_tree")
        simulated = makespan(double_tree_all_reduce(n, size_bytes, pieces), 1, FAST, SLOW)
        assert simulated == pytest.approx(time, rel=0.15), (n, simulated / time)


def test_the_time_of_a_direct_all_to_all_is_the_formula():
    for nodes, ranks in ((1, 4), (5, 1), (4, 4)):
        size, group = 1e7, Group(nodes, ranks, FAST, SLOW)
        simulated = makespan(all_to_all(group.num_ranks, size / group.num_ranks), ranks, FAST, SLOW)
        assert simulated == pytest.approx(collective_time_s("all_to_all", size, group, "direct"), rel=1e-9)


def test_store_and_forward_takes_both_stages_one_after_the_other():
    nodes, ranks, pair = 4, 4, 1e6
    simulated = makespan(forwarded_all_to_all(nodes, ranks, pair), ranks, FAST, SLOW)
    handed = FAST.latency_s + (ranks - 1) * nodes * pair / FAST.bandwidth_bytes_per_s
    crossing = SLOW.latency_s + (nodes - 1) * ranks * pair / SLOW.bandwidth_bytes_per_s
    assert simulated == pytest.approx(handed + crossing, rel=1e-9)
    streamed = collective_time_s("all_to_all", pair * nodes * ranks, Group(nodes, ranks, FAST, SLOW), "forwarded")
    assert streamed == pytest.approx(FAST.latency_s + crossing)


def test_auto_is_the_fastest_of_all_that_fit():
    group = Group(8, 8, FAST, SLOW)
    for kind, names in ALGORITHMS.items():
        times = {name: collective_time_s(kind, 1e7, group, name) for name in names}
        assert collective_time_s(kind, 1e7, group) == min(times.values())


def test_a_message_costs_its_latency_and_its_bytes_and_one_rank_nothing():
    assert collective_time_s("point_to_point", 4e6, Group(2, 1, FAST, SLOW)) == pytest.approx(4e-6 + 1e-4)
    assert collective_time_s("point_to_point", 4e6, Group(1, 2, FAST, SLOW)) == pytest.approx(3e-6 + 2.5e-5)
    assert collective_time_s("all_reduce", 4e6, Group(1, 1)) == 0


def test_mistakes_are_refused_in_a_line_with_the_nearest_fix():
    cases = [
        (lambda: ring("all_to_all", 4, 1.0), "'all_to_all' does not go around a ring; take reduce_scatter"),
        (lambda: ring("all_reduce", 0, 1.0), "0 ranks: a collective needs at least 1"),
        (lambda: double_tree_all_reduce(4, 1.0, pieces=0), "pieces = 0"),
        (lambda: double_tree_all_reduce(4, 1.0, trees=zoned_double_tree(1, 2)), "the tree has 3 ranks"),
        (
            lambda: collective_time_s("all_to_all", 1.0, Group(2, 1, FAST, SLOW), "ring"),
            "'ring' does not do all_to_all",
        ),
        (lambda: collective_time_s("all_reduce", 1.0, Group(2, 1)), "a group of 2 nodes of 1 ranks has no wire"),
    ]
    for call, message in cases:
        with pytest.raises(PlanError, match=message):
            call()
