"""Traffic of models: counted against loops over tokens, and sent through small networks."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.network.builders import LinkSpeed, build
from cofire.network.collective_time import Group, Wire
from cofire.network.collectives import all_to_all as all_to_all_messages
from cofire.network.collectives import forwarded_all_to_all, ring
from cofire.network.expert_traffic import (
    dispatch_token_bytes,
    expected_groups,
    expert_exchange_time_s,
    expert_traffic,
    groups_reached,
    sample_experts,
    sampled_groups,
)
from cofire.network.flowsim import simulate_flows
from cofire.network.patterns import all_to_all, expert_pattern, join_routes, place, ports_of
from cofire.network.shapes import FatTree, TwoZone
from cofire.network.topology import Network

SPEED = LinkSpeed(50e9, 2.8e-6, 3.7e-6, 160e9, 3.3e-6)


def planes(nodes: int, ports: int, switch_ports: int = 8) -> Network:
    return build(FatTree(nodes * ports, switch_ports, 2, 1.0, ports, ports), SPEED, bundle=True)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_expected_groups_equal_the_mean_over_every_choice(groups: int, size: int, chosen: int):
    experts = groups * size
    chosen = min(chosen, experts)
    if comb(experts, chosen) > 2000:
        return
    counts = [len({expert // size for expert in choice}) for choice in combinations(range(experts), chosen)]
    assert expected_groups(experts, chosen, groups) == pytest.approx(np.mean(counts))


@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "mean"),
    [(256, 8, 8, 5.2947), (128, 8, 4, 3.6290), (256, 8, 64, 7.6758)],
)
def test_expected_groups_are_the_known_ones(experts: int, chosen: int, groups: int, mean: float):
    assert expected_groups(experts, chosen, groups) == pytest.approx(mean, abs=5e-5)
    sampled = sampled_groups(sample_experts(20_000, experts, chosen, groups), experts, groups)
    assert sampled == pytest.approx(mean, abs=0.02)


def test_a_limited_token_of_deepseek_v3_reaches_3_954_of_four_nodes():
    index = sample_experts(40_000, 256, 8, 8, 4)
    assert sampled_groups(index, 256, 8) == pytest.approx(3.954, abs=0.005)
    assert max(len(set(row // 32)) for row in index) == 4


def test_limited_routing_equals_a_loop_over_tokens():
    index = sample_experts(50, 12, 4, 4, 2, seed=3)
    score = np.random.default_rng(3).random((50, 12))
    for row, own in zip(index, score, strict=True):
        strength = [sorted(own[g * 3 : g * 3 + 3])[-2:] for g in range(4)]
        kept = sorted(range(4), key=lambda g: sum(strength[g]))[2:]
        able = [expert for g in kept for expert in range(g * 3, g * 3 + 3)]
        assert set(row) == set(sorted(able, key=lambda expert: own[expert])[-4:])


def test_every_expert_may_be_chosen_by_every_token():
    assert sample_experts(2, 4, 4).tolist() == [[0, 1, 2, 3]] * 2


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 2), (2, 2), (3, 2), (2, 4)]), st.integers(1, 2), st.integers(0, 100))
def test_copies_equal_a_loop_over_tokens_with_one_copy_per_node(sizes: tuple[int, int], held: int, seed: int):
    nodes, width = sizes
    devices = nodes * width
    experts = devices * held
    index = np.stack([sample_experts(7, experts, min(3, experts), seed=seed + d) for d in range(devices)])
    traffic = expert_traffic(index, experts, width)
    crossing, handed = np.zeros((nodes, width, nodes), int), np.zeros((nodes, width, width), int)
    for device in range(devices):
        home, number = divmod(device, width)
        for token in index[device]:
            targets = {int(expert) // held for expert in token}
            for node in {target // width for target in targets} - {home}:
                crossing[home, number, node] += 1
            for target in targets:
                if target % width != number:
                    handed[target // width, number, target % width] += 1
    np.testing.assert_array_equal(traffic.crossing, crossing)
    np.testing.assert_array_equal(traffic.handed, handed)


def test_a_token_of_deepseek_v3_travels_in_one_byte_and_a_scale_per_tile():
    assert dispatch_token_bytes(7168) == 7168 + 56 * 4
    assert dispatch_token_bytes(7168, 2) == 14336


def test_dispatch_and_combine_load_every_port_by_its_copies():
    network = planes(4, 2)
    index = np.stack([sample_experts(64, 16, 4, 4, 2, seed=d) for d in range(8)])
    traffic = expert_traffic(index, 16, 2)
    ports = ports_of(network)
    for combine, weight in ((False, 100.0), (True, 200.0)):
        pattern = expert_pattern(network, traffic, weight, combine)
        result = simulate_flows(network, pattern.routes, pattern.flows)
        out = np.zeros(network.num_endpoints)
        wire = (network.level[network.tail] == 0) & (network.level[network.head] == 1)
        out[network.tail[wire]] = result.link_bytes[wire]
        # What dispatch sends, combine receives.
        copies = traffic.crossing.sum(0).T if combine else traffic.crossing.sum(2)
        np.testing.assert_allclose(out[ports], copies * weight)


@pytest.mark.parametrize("limit", [None, 4])
def test_the_time_of_a_dispatch_is_near_its_formula(limit: int | None):
    """Eight nodes of four; the sampled load is uneven by a few percent, and the slowest port counts."""
    network = planes(8, 4)
    index = np.stack([sample_experts(2048, 64, 8, 8, limit, seed=d) for d in range(32)])
    pattern = expert_pattern(network, expert_traffic(index, 64, 4), 7392.0)
    simulated = simulate_flows(network, pattern.routes, pattern.flows).makespan_s
    group = Group(8, 4, Wire(3.3e-6, 160e9), Wire(3.7e-6, 50e9))
    reached = [groups_reached(64, 8, parts, 8, limit) for parts in (8, 32)]
    formula = expert_exchange_time_s(2048, 7392.0, group, *reached)
    assert formula < simulated < 1.08 * formula


def test_fast_links_bound_an_exchange_inside_a_node():
    group = Group(1, 8, Wire(3e-6, 160e9))
    time = expert_exchange_time_s(1000, 8000.0, group, 1.0, 4.0)
    assert time == pytest.approx(3e-6 + 1000 * 4 * 7 / 8 * 8000 / 160e9)


def test_groups_reached_are_the_formula_without_a_limit_and_the_sample_with_one():
    assert groups_reached(256, 8, 8) == expected_groups(256, 8, 8)
    assert groups_reached(256, 8, 8, 8, 8) == expected_groups(256, 8, 8)
    assert groups_reached(256, 8, 8, 8, 4) == pytest.approx(3.954, abs=0.01)


def test_forwarding_crosses_the_network_between_devices_of_one_plane():
    network = planes(4, 4)
    pattern = all_to_all(network, 1e5)
    crosses = network.node[pattern.source] != network.node[pattern.target]
    assert crosses.sum() == 4 * 3 * 4
    assert (network.plane[pattern.source[crosses]] == network.plane[pattern.target[crosses]]).all()
    result = simulate_flows(network, pattern.routes, pattern.flows)
    fast = (network.level[network.tail] == 0) & (network.level[network.head] == -1)
    # To each of three devices of its node: a block for each of three other nodes, and one that stays.
    np.testing.assert_allclose(result.link_bytes[fast], 3 * (3 + 1) * 1e5)
    port = (network.level[network.tail] == 0) & (network.level[network.head] == 1)
    np.testing.assert_allclose(result.link_bytes[port], 3 * 4 * 1e5)
    np.testing.assert_allclose(result.link_bytes.sum(), simulated_alone(network, pattern))


def simulated_alone(network: Network, pattern) -> float:
    routes, sizes = pattern.routes, pattern.flows.size_bytes
    return sum(
        float(routes.fraction[routes.start[f] : routes.start[f + 1]].sum() * sizes[f]) for f in range(len(sizes))
    )


def test_merged_forwarding_loads_links_as_each_devices_own_flows_do():
    network = planes(3, 4)
    merged, single = all_to_all(network, 1e5), all_to_all(network, 1e5, forwarded=False)
    loads = [simulate_flows(network, p.routes, p.flows).link_bytes for p in (merged, single)]
    np.testing.assert_allclose(loads[0], loads[1])


def test_streaming_is_never_slower_than_store_and_forward_and_moves_the_same_bytes():
    network = planes(4, 2)
    streamed, stored = all_to_all(network, 1e6), place(network, forwarded_all_to_all(4, 2, 1e6))
    results = [simulate_flows(network, p.routes, p.flows) for p in (streamed, stored)]
    np.testing.assert_allclose(results[0].link_bytes, results[1].link_bytes)
    assert results[0].makespan_s < results[1].makespan_s


def test_messages_are_placed_node_by_node():
    network = planes(2, 2)
    pattern = place(network, ring("all_gather", 4, 1.0))
    ports = ports_of(network).ravel()
    assert pattern.source.tolist() == ports[[0, 1, 2, 3] * 3].tolist()
    assert pattern.target.tolist() == ports[[1, 2, 3, 0] * 3].tolist()


def test_joined_routes_keep_their_rows():
    network = planes(2, 2)
    first, second = (place(network, all_to_all_messages(n, 1.0)).routes for n in (2, 4))
    joined = join_routes(first, second)
    assert joined.num_flows == first.num_flows + second.num_flows
    tail = joined.start[first.num_flows :]
    assert joined.link[tail[0] :].tolist() == second.link.tolist()
    assert (np.diff(tail) == np.diff(second.start)).all()


def test_mistakes_are_refused_with_the_nearest_fix():
    lone = build(FatTree(8, 8, 2, 1.0, 2, 2), LinkSpeed(50e9))
    cases = [
        (lambda: expected_groups(10, 2, 3), "num_groups = 3 must divide num_experts = 10"),
        (lambda: sample_experts(1, 8, 5, 4, 2), "2 groups have 4 experts, below num_experts_per_token = 5"),
        (lambda: sample_experts(1, 8, 2, 4, 5), "5 of 4 groups"),
        (lambda: groups_reached(10, 2, 3, 2, 1), "num_groups = 3 must divide num_experts = 10"),
        (lambda: expert_traffic(np.zeros((3, 1, 1), int), 4, 1), "3 devices must divide num_experts = 4"),
        (lambda: place(lone, ring("all_gather", 9, 1.0)), "9 ranks do not fit on 8 ports"),
        (lambda: all_to_all(lone, 1.0), "forward"),
        (lambda: ports_of(build(TwoZone(4, 2, 8, 2, 4, 2, 1))), "nodes have 1 to 2 ports"),
    ]
    for call, message in cases:
        with pytest.raises(PlanError, match=message):
            call()


def test_patterns_keep_to_the_nodes_that_compute_where_others_store():
    """Storage nodes of a two-zone network have a port in either zone; the computing ones before them have one."""
    net = build(TwoZone(3, 2, 8, 4, 4, 1, 1), SPEED, bundle=True)
    with pytest.raises(PlanError, match="1 to 2 ports"):
        ports_of(net)
    assert ports_of(net, 6).tolist() == [[port] for port in range(6)]
    for pattern in (
        all_to_all(net, 1e6, "static", num_nodes=6, forwarded=False),
        place(net, ring("all_reduce", 6, 6e6), "static", num_nodes=6),
    ):
        assert set(pattern.source) == set(pattern.target) == set(range(6))
    with pytest.raises(PlanError, match="the network has 8 nodes; take 1 to 8"):
        ports_of(net, 9)


def test_messages_leave_a_dead_plane_alone():
    net = planes(4, 2)
    dead = np.flatnonzero((net.plane[net.head] == 1) & (net.level[net.head] > 0))
    for failed, carried in (((), True), ((1,), False)):
        pattern = place(net, all_to_all_messages(8, 1e6), "adaptive", failed_planes=failed)
        sent = simulate_flows(net, pattern.routes, pattern.flows).link_bytes
        assert bool(sent[dead].any()) is carried
