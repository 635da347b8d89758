"""Programs of all nodes, run by a pure interpreter in random order, against plain sums and the planner's simulator."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.collectives.schedule import (
    NodeProgram,
    all_reduce_program,
    all_reduce_round,
    busiest_node_bytes,
    choose_algorithm,
    modelled_time_s,
    node_program,
    rooted_program,
)
from cofire.errors import CollectiveError, PlanError
from cofire.network.collectives import (
    double_tree_all_reduce,
    hierarchical_all_reduce,
    paired_host_all_reduce,
    rooted_tree,
)
from cofire.network.double_tree import depths, double_tree
from cofire.network.flowsim import simulate_flows
from cofire.network.host import HostReduceBounds, host_reduce_bounds
from cofire.network.routing import Routes
from cofire.network.topology import Network
from cofire.spec.figure import Figure
from cofire.spec.hardware import HostSpec

# Source, target, chunk of the round, whether it goes down.
Way = tuple[int, int, int, bool]


class Interpreter:
    """All nodes' programs on integers: each node has an up and a down loop, and a ring of ``window`` buffers.

    A loop blocks as the runtime's does: on a message that has not come, and on a buffer whose last chunk is not
    published yet, those before it included.
    """

    def __init__(self, programs: list[NodeProgram], num_chunks: int, window: int, seed: int, apart: int = 0):
        self.programs, self.num_chunks, self.window, self.rng = programs, num_chunks, window, random.Random(seed)
        self.period = programs[0].period
        self.sent: Counter[tuple[int, int]] = Counter()
        self.results: list[list[int | None]] = [[None] * num_chunks for _ in programs]
        self.published = [0] * len(programs)
        self.arrived: defaultdict[Way, deque[int]] = defaultdict(deque)
        self.flying: defaultdict[Way, deque[int]] = defaultdict(deque)
        self.loops = {
            (node, is_down): deque(
                program.broadcast_steps(num_chunks, apart) if is_down else program.reduce_steps(num_chunks, apart)
            )
            for node, program in enumerate(programs)
            for is_down in (False, True)
        }

    def value(self, node: int, chunk: int) -> int:
        return (node + 1) * 1009**2 + chunk * 31 * (node + 3)

    def run(self) -> None:
        ways: list[Way] = []
        ready = [loop for loop in self.loops if self.can_go(*loop)]
        while ready or ways:
            if ready and (not ways or self.rng.random() < 0.5):
                node, is_down = self.rng.choice(ready)
                ways += self.go(node, is_down)
            else:
                # Any message may arrive first, but those of one way between two nodes keep their order.
                way = ways.pop(self.rng.randrange(len(ways)))
                self.arrived[way].append(self.flying[way].popleft())
                node = way[1]
            ready = [loop for loop in ready if loop[0] != node]
            ready += [(node, is_down) for is_down in (False, True) if self.can_go(node, is_down)]
        assert not any(self.loops.values()), "nodes wait for each other"
        assert not any(self.arrived.values()), "a message that nobody takes"

    def froms(self, is_down: bool, chunk: int, node: int, step: Any) -> list[Way]:
        peers = (step.receive_from,) if is_down else step.receive_from
        return [(peer, node, chunk % self.period, is_down) for peer in peers]

    def can_go(self, node: int, is_down: bool) -> bool:
        if not self.loops[node, is_down]:
            return False
        chunk, step = self.loops[node, is_down][0]
        if chunk - self.window >= self.published[node] and not (is_down and self.programs[node].adds):
            return False
        return all(self.arrived[way] for way in self.froms(is_down, chunk, node, step))

    def go(self, node: int, is_down: bool) -> list[Way]:
        chunk, step = self.loops[node, is_down].popleft()
        came = [self.arrived[way].popleft() for way in self.froms(is_down, chunk, node, step)]
        if is_down:
            return self.end(node, chunk, came[0], step.send_to)
        total = self.value(node, chunk) + sum(came)
        if step.send_to is None:
            return self.end(node, chunk, total, step.result_to)
        if not self.programs[node].shares:
            self.end(node, chunk, total, ())
        return [self.send(node, step.send_to, chunk, False, total)]

    def end(self, node: int, chunk: int, value: int, listeners: tuple[int, ...]) -> list[Way]:
        results = self.results[node]
        assert results[chunk] is None, "twice"
        results[chunk] = value
        while self.published[node] < self.num_chunks and results[self.published[node]] is not None:
            self.published[node] += 1
        return [self.send(node, peer, chunk, True, value) for peer in listeners]

    def send(self, node: int, peer: int, chunk: int, is_down: bool, value: int) -> Way:
        self.sent[node, peer] += 1
        way = (node, peer, chunk % self.period, is_down)
        self.flying[way].append(value)
        return way


SHAPES = st.tuples(st.integers(1, 24) | st.sampled_from([31, 32, 33, 48, 63, 64]), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(["double_tree", "ring", "zoned"]), st.integers(0, 10**6), st.integers(0, 4))
def test_every_node_ends_with_every_sum_in_any_order_of_arrival_with_the_fewest_buffers(shape, name, seed, apart):
    num_nodes, num_chunks = shape
    zones = tuple("ab"[node % 3 == 1] for node in range(num_nodes)) if name == "zoned" else ()
    algorithm = "ring" if name == "ring" else "double_tree"
    programs = [all_reduce_program(algorithm, num_nodes, node, zones) for node in range(num_nodes)]
    period = programs[0].period
    run = Interpreter(programs, num_chunks, (1 + 2 * apart) * period, seed, apart)
    run.run()
    for chunk in range(num_chunks):
        expected = sum(run.value(node, chunk) for node in range(num_nodes))
        assert [results[chunk] for results in run.results] == [expected] * num_nodes
    assert sum(run.sent.values()) == 2 * (num_nodes - 1) * num_chunks
    for node in range(num_nodes):
        whole = num_chunks + (-num_chunks) % period
        for end in (0, 1):
            assert sum(n for edge, n in run.sent.items() if edge[end] == node) <= 2 * whole


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(["reduce", "broadcast"]), st.integers(0, 10**6), st.data())
def test_a_reduce_ends_at_its_root_and_a_broadcast_begins_there(shape, kind, seed, data):
    num_nodes, num_chunks = shape
    root = data.draw(st.integers(0, num_nodes - 1))
    programs = [rooted_program(kind, num_nodes, node, root) for node in range(num_nodes)]
    run = Interpreter(programs, num_chunks, 1, seed)
    run.run()
    for chunk in range(num_chunks):
        if kind == "reduce":
            assert run.results[root][chunk] == sum(run.value(node, chunk) for node in range(num_nodes))
        else:
            assert all(results[chunk] == run.value(root, chunk) for results in run.results)
    assert sum(run.sent.values()) == (num_nodes - 1) * num_chunks


def test_fewer_buffers_than_a_round_has_chunks_may_stand_still():
    programs = [all_reduce_program("ring", 5, node) for node in range(5)]
    with pytest.raises(AssertionError, match="wait for each other"):
        Interpreter(programs, 5, 1, 0).run()


def test_a_list_of_all_chunks_sends_them_the_way_the_rounds_do():
    for num_nodes, pieces in ((2, 3), (5, 4), (8, 2)):
        messages = double_tree_all_reduce(num_nodes, 1.0, pieces)
        for node in range(num_nodes):
            short = all_reduce_program("double_tree", num_nodes, node)
            # The list numbers its chunks tree by tree, a program in the order of time.
            ways = {
                (tree + 2 * piece, is_down, int(s), int(t))
                for s, t, c, is_down in zip(
                    messages.source, messages.target, messages.chunk, ~messages.adds, strict=True
                )
                for tree, piece in [divmod(int(c), pieces)]
                if node in (s, t)
            }
            found = set()
            for chunk, step in short.reduce_steps(2 * pieces):
                found |= {(chunk, False, peer, node) for peer in step.receive_from}
                found |= {(chunk, False, node, step.send_to)} if step.send_to is not None else set()
                found |= {(chunk, True, node, peer) for peer in step.result_to}
            for chunk, step in short.broadcast_steps(2 * pieces):
                found |= {(chunk, True, step.receive_from, node)} | {(chunk, True, node, peer) for peer in step.send_to}
            assert found == ways


def test_children_are_added_in_the_order_of_their_numbers():
    for num_nodes in (3, 8, 100, 512):
        trees = double_tree(num_nodes)
        for node in (0, num_nodes // 2, num_nodes - 2, num_nodes - 1):
            program = all_reduce_program("double_tree", num_nodes, node)
            for step in program.reduce:
                children = [child for child in range(num_nodes) if trees[step.chunk][child] == node]
                assert list(step.receive_from) == children


def test_two_zones_share_one_edge_per_tree_however_their_nodes_are_numbered():
    zones = tuple(random.Random(7).choices("ab", k=23))
    for way in (0, 1):
        crossings = 0
        for node in range(23):
            step = next(s for s in all_reduce_program("double_tree", 23, node, zones).reduce if s.chunk == way)
            crossings += step.send_to is not None and zones[node] != zones[step.send_to]
        assert crossings == 1


def test_a_message_of_several_chunks_is_no_step():
    with pytest.raises(CollectiveError, match="holds 2 chunks"):
        node_program(hierarchical_all_reduce(2, 2, 1.0), 0)
    with pytest.raises(CollectiveError, match="3 zones of 4 nodes"):
        all_reduce_program("double_tree", 4, 0, ("a", "b", "a"))
    with pytest.raises(CollectiveError, match="bandwidth 0"):
        choose_algorithm(4, 1e6, 0, 1e-5)


def ports(
    num_nodes: int, rate: float, latency_s: float, source: np.ndarray, target: np.ndarray
) -> tuple[Network, Routes]:
    """Each node has one wire out and one in; nothing else is ever short."""
    zero = np.zeros(2 * num_nodes, np.int64)
    network = Network(
        "ports", 0, 0, zero, zero, np.full(2 * num_nodes, rate), np.zeros(2 * num_nodes), zero, zero, zero
    )
    link = np.stack([source, target + num_nodes], axis=1)
    ends = 2 * np.arange(len(source) + 1)
    return network, Routes(ends, link.ravel(), np.ones(link.size), np.full(len(source), latency_s))


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 8, 16])
def test_the_simulator_agrees_with_the_model_for_large_messages(num_nodes: int):
    size, rate, latency = 1e9, 1e8, 1e-5
    tree = double_tree_all_reduce(num_nodes, size, 256)
    found = simulate_flows(*ports(num_nodes, rate, latency, tree.source, tree.target), tree.flows()).makespan_s
    expected = modelled_time_s("double_tree", num_nodes, size, rate, latency)
    # The pipeline fills while the first pieces rise and empties while the last come down.
    assert expected * 0.999 <= found <= expected * 1.08
    around = all_reduce_round("ring", num_nodes, size)
    found = simulate_flows(*ports(num_nodes, rate, latency, around.source, around.target), around.flows()).makespan_s
    assert found == pytest.approx(modelled_time_s("ring", num_nodes, size, rate, latency), rel=1e-6)


def test_no_wire_carries_more_than_twice_the_data_and_two_nodes_once():
    for num_nodes in range(1, 513, 7):
        busiest = busiest_node_bytes(all_reduce_round("double_tree", num_nodes, 1.0))
        assert busiest == (0 if num_nodes == 1 else 1 if num_nodes == 2 else 1.5 if num_nodes == 3 else 2), num_nodes
    for num_nodes in (1, 2, 5, 64):
        busiest = busiest_node_bytes(all_reduce_round("ring", num_nodes, 1.0))
        assert busiest == pytest.approx(2 * (num_nodes - 1) / num_nodes)


def test_small_messages_take_the_tree_and_large_ones_in_few_nodes_the_ring():
    wire = {"bandwidth_bytes_per_s": 125e6, "latency_s": 1e-4}
    assert choose_algorithm(8, 4096, **wire) == "double_tree"
    assert choose_algorithm(8, 1 << 30, **wire) == "ring"
    assert choose_algorithm(2, 1 << 30, **wire) == "double_tree"
    assert choose_algorithm(512, 1 << 20, **wire) == "double_tree"
    assert choose_algorithm(1, 1 << 20, **wire) == "double_tree"


def test_the_tree_waits_for_its_depth_and_the_ring_for_its_length():
    for num_nodes in (2, 16, 100):
        depth = max(int(depths(tree).max()) for tree in double_tree(num_nodes))
        assert modelled_time_s("double_tree", num_nodes, 0, 1.0, 1e-3) == pytest.approx(2e-3 * depth)
        assert modelled_time_s("ring", num_nodes, 0, 1.0, 1e-3) == pytest.approx(2e-3 * (num_nodes - 1))


def test_the_rooted_tree_refuses_what_it_has_not():
    with pytest.raises(PlanError, match="root = 4 is not below num_ranks = 4"):
        rooted_tree("reduce", 4, 4, 1.0)
    with pytest.raises(PlanError, match="has no root"):
        rooted_tree("all_reduce", 4, 0, 1.0)


@pytest.mark.parametrize("kind", ["reduce", "broadcast"])
def test_a_rooted_tree_takes_the_time_of_its_busiest_wire(kind: str):
    # The plain tree's inner nodes have two children: one wire carries the data twice.
    tree = rooted_tree(kind, 8, 3, 1e9, 256)
    found = simulate_flows(*ports(8, 1e8, 0.0, tree.source, tree.target), tree.flows()).makespan_s
    assert found == pytest.approx(busiest_node_bytes(tree) / 1e8, rel=0.03)
    assert busiest_node_bytes(tree) == pytest.approx(2e9)


# --- the variant with bridges, inside a node

DEVICES, SIZE = 8, 1e9


def host(bridge: float, slot: float, shared: float | None) -> tuple[HostSpec, HostReduceBounds]:
    ports = ((5, 6),) if shared else ()
    spec = HostSpec(
        memory_bandwidth_bytes_per_s=1e15,
        pcie_bandwidth_bytes_per_s=slot,
        bridge_bandwidth_bytes_per_s=bridge,
        root_ports=ports,
        shared_port_bandwidth_bytes_per_s=shared,
    )
    return spec, host_reduce_bounds(spec, 0.0, DEVICES, 1, paired=True, duplex=Figure(value=1.0, label="assumed"))


def inside(spec: HostSpec) -> tuple[Network, Routes, np.ndarray]:
    """Links by number: each device's bridge, its slot to the host and from it, and the shared port both ways."""
    messages = paired_host_all_reduce(DEVICES, SIZE, 64)
    shared = spec.root_ports[0] if spec.root_ports else ()
    links, ends = [], [0]
    for source, target in zip(messages.source, messages.target, strict=True):
        if DEVICES not in (source, target):
            links += [int(source)]
        else:
            device, down = (int(source), 0) if target == DEVICES else (int(target), 1)
            links += [DEVICES * (1 + down) + device] + ([3 * DEVICES + down] if device in shared else [])
        ends.append(len(links))
    capacity = np.full(3 * DEVICES + 2, spec.pcie_bandwidth_bytes_per_s)
    capacity[:DEVICES] = spec.bridge_bandwidth_bytes_per_s
    capacity[3 * DEVICES :] = spec.shared_port_bandwidth_bytes_per_s or 1e15
    zero = np.zeros(len(capacity), np.int64)
    network = Network("inside", 0, 0, zero, zero, capacity, np.zeros(len(capacity)), zero, zero, zero)
    routes = Routes(np.array(ends), np.array(links), np.ones(len(links)), np.zeros(messages.num_messages))
    return network, routes, np.bincount(links, np.repeat(messages.chunk_bytes, len(links)), len(capacity))


@pytest.mark.parametrize(
    ("bridge", "slot", "shared", "binds"),
    [(30e9, 27e9, None, "bridge"), (300e9, 27e9, None, "PCIe slot"), (300e9, 27e9, 37.5e9, "shared root port")],
)
def test_bridged_pairs_take_the_time_of_the_resource_that_binds(bridge, slot, shared, binds):
    spec, bounds = host(bridge, slot, shared)
    assert bounds.binds == binds
    network, routes, sent = inside(spec)
    # Half the data each way to add over the bridge, half to gather; half over the slot, each way.
    assert sent[:DEVICES] == pytest.approx(SIZE)
    assert sent[DEVICES : 3 * DEVICES] == pytest.approx(SIZE / 2)
    if shared:
        assert sent[3 * DEVICES :] == pytest.approx(SIZE)
    found = simulate_flows(network, routes, paired_host_all_reduce(DEVICES, SIZE, 64).flows())
    assert found.makespan_s == pytest.approx(SIZE / bounds.ceiling_bytes_per_s.value, rel=0.06)


def test_bridged_pairs_end_with_the_sum_on_every_device_and_halve_what_the_host_sees():
    messages = paired_host_all_reduce(6, 1.0, 3)
    held = np.random.default_rng(0).integers(1, 100, (7, 6))
    held[6] = 0
    expected = held.sum(0)
    # In the order of the list each message finds what it waits for; the waits themselves are tried below.
    done = np.zeros(messages.num_messages, bool)
    held = held.copy()
    while not done.all():
        waiting = np.zeros(messages.num_messages, bool)
        np.logical_or.at(waiting, messages.after, ~done[messages.before])
        ready = np.flatnonzero(~done & ~waiting)
        assert len(ready), "messages wait for each other"
        m = int(ready[len(ready) // 2])
        source, target, chunk = messages.source[m], messages.target[m], messages.chunk[m]
        held[target, chunk] = held[source, chunk] + (held[target, chunk] if messages.adds[m] else 0)
        done[m] = True
    assert (held[:6] == expected).all()
    to_host = messages.target == 6
    assert to_host.sum() * messages.chunk_bytes == pytest.approx(6 / 2)
    with pytest.raises(PlanError, match="3 devices do not pair"):
        paired_host_all_reduce(3, 1.0)
