"""Flows in time: against linear programs, a slow simulator of single flows, and what max-min fairness promises."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.network.builders import LinkSpeed, build
from cofire.network.flowsim import (
    LANE_SHARES,
    LANES,
    Failure,
    Flows,
    SendControl,
    _uses,
    link_name,
    links_at,
    simulate_flows,
    trace_events,
)
from cofire.network.max_min import Uses, max_min_rates, shared_rates
from cofire.network.routing import Routes, device_routes, route
from cofire.network.shapes import FatTree
from cofire.network.topology import Network


def links_only(capacity: list[float] | np.ndarray) -> Network:
    """A network of which only the capacities matter, since routes name links."""
    num = len(capacity)
    zero = np.zeros(num, np.int64)
    return Network("links", 0, 0, zero, zero, np.asarray(capacity, float), np.zeros(num), zero, zero, zero)


def rows(paths: list[dict[int, float]], latency_s: float | list[float] = 0.0) -> Routes:
    start = np.cumsum([0, *(len(path) for path in paths)])
    link = np.array([link for path in paths for link in path], np.int64)
    fraction = np.array([part for path in paths for part in path.values()], float)
    return Routes(start, link, fraction, np.broadcast_to(np.asarray(latency_s, float), (len(paths),)).copy())


def leaf_spine(leaves: int, hosts: int, spines: int, latency_s: float = 0.0) -> tuple[Network, Routes, np.ndarray]:
    """All pairs of a leaf-spine network over adaptive paths; hosts' links 50, links between switches 50, in bytes/s."""
    num = leaves * hosts
    up_host, down_host = np.arange(num), num + np.arange(num)
    up = 2 * num + np.arange(leaves * spines).reshape(leaves, spines)
    down = up + leaves * spines
    pairs = np.array([(a, b) for a in range(num) for b in range(num) if a != b])
    paths = []
    for a, b in pairs:
        path = {int(up_host[a]): 1.0, int(down_host[b]): 1.0}
        if a // hosts != b // hosts:
            path |= {int(link): 1 / spines for link in (*up[a // hosts], *down[b // hosts])}
        paths.append(path)
    return links_only([50.0] * int(down.max() + 1)), rows(paths, latency_s), pairs


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[dict[int, float]]]:
    num = draw(st.integers(1, 6))
    capacity = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 7.5]), min_size=num, max_size=num))
    part = st.sampled_from([1.0, 0.5, 0.25])
    paths = draw(st.lists(st.dictionaries(st.integers(0, num - 1), part, min_size=1), min_size=1, max_size=8))
    return capacity, paths


def lexicographic(capacity: list[float], paths: list[dict[int, float]]) -> np.ndarray:
    """Max-min rates as a sequence of linear programs: raise the least rate, fix who cannot rise, go on."""
    optimize = pytest.importorskip("scipy.optimize")
    matrix = np.zeros((len(capacity), len(paths) + 1))
    for flow, path in enumerate(paths):
        for link, part in path.items():
            matrix[link, flow] = part
    fixed: dict[int, float] = {}

    def solve(goal: int, level: float | None) -> float:
        bounds = [(fixed.get(f, level or 0), fixed.get(f)) for f in range(len(paths))] + [(0, None)]
        above = [f for f in range(len(paths)) if f not in fixed]
        least = np.zeros((len(above), len(paths) + 1))
        if level is None:
            for row, flow in enumerate(above):
                least[row, [flow, -1]] = -1, 1
        cost = np.zeros(len(paths) + 1)
        cost[goal] = -1
        limits = np.concatenate([capacity, np.zeros(len(above))])
        found = optimize.linprog(cost, np.vstack([matrix, least]), limits, bounds=bounds, method="highs")
        assert found.status == 0, found.message
        return -found.fun

    while len(fixed) < len(paths):
        level = solve(len(paths), None)
        stuck = [f for f in range(len(paths)) if f not in fixed and solve(f, level * (1 - 1e-9)) <= level * (1 + 1e-6)]
        assert stuck
        fixed |= dict.fromkeys(stuck, level)
    return np.array([fixed[flow] for flow in range(len(paths))])


@settings(max_examples=40, deadline=None)
@given(problems())
def test_rates_equal_a_sequence_of_linear_programs(problem: tuple[list[float], list[dict[int, float]]]):
    capacity, paths = problem
    rate = max_min_rates(_uses(rows(paths)), np.array(capacity), len(paths))
    np.testing.assert_allclose(rate, lexicographic(capacity, paths), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_every_flow_is_among_the_fastest_of_a_full_link_and_no_link_is_overfull(
    problem: tuple[list[float], list[dict[int, float]]],
):
    capacity, paths = problem
    uses = _uses(rows(paths))
    rate = max_min_rates(uses, np.array(capacity), len(paths))
    load = uses.on_links(rate, len(capacity))
    assert (load <= np.array(capacity) * (1 + 1e-9)).all()
    for flow, path in enumerate(paths):
        full = [link for link in path if load[link] >= capacity[link] * (1 - 1e-9)]
        assert any(
            rate[flow] >= max(rate[f] for f, other in enumerate(paths) if link in other) * (1 - 1e-9) for link in full
        )


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_lanes_never_overfill_a_link_keep_their_share_and_waste_nothing(
    problem: tuple[list[float], list[dict[int, float]]], data: st.DataObject
):
    capacity, paths = problem
    lane = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths))))
    shares = (0.5, 0.3, 0.2)
    uses = _uses(rows(paths))
    rate = shared_rates(uses, np.array(capacity), len(paths), lane, shares)
    load = uses.on_links(rate, len(capacity))
    assert (load <= np.array(capacity) * (1 + 1e-9)).all()
    for path in paths:
        assert any(load[link] >= capacity[link] * (1 - 1e-6) for link in path), "a flow that could be faster"
        # A lane alone on its part of every link is the floor of what it may get.
    for own in range(3):
        mine = lane[uses.flow] == own
        floor = max_min_rates(uses.of(mine), np.array(capacity) * shares[own], len(paths))
        assert (rate[lane == own].min(initial=np.inf)) >= floor[lane == own].min(initial=np.inf) * (1 - 1e-9)


def test_a_lane_with_many_flows_takes_no_more_than_its_share():
    rate = shared_rates(
        _uses(rows([{0: 1.0}] * 101)), np.array([100.0]), 101, np.array([0] + [2] * 100), (0.6, 0.3, 0.4)
    )
    assert rate[0] == pytest.approx(60)
    assert rate[1:] == pytest.approx(0.4)


def test_what_a_lane_leaves_goes_to_the_others():
    paths = [{0: 1.0}] * 5 + [{0: 1.0, 1: 1.0}]
    rate = shared_rates(_uses(rows(paths)), np.array([10.0, 2.0]), 6, np.array([0] * 5 + [1]), (1.0, 1.0))
    assert rate == pytest.approx([1.6] * 5 + [2.0])


def test_fire_flyers_four_classes_isolate_a_reduction_from_storage():
    """One reduction beside 50 storage flows on a link: without classes it gets a 51st."""
    flows = Flows(np.full(51, 1e9), lane=np.array([0] + [2] * 50))
    network, routes = links_only([1e9]), rows([{0: 1.0}] * 51)
    assert len(LANES) == len(LANE_SHARES)
    assert sum(LANE_SHARES) == pytest.approx(1)
    alone = 1e9 * (LANE_SHARES[0] + LANE_SHARES[2]) / LANE_SHARES[0] / 1e9
    assert simulate_flows(network, routes, flows, lane_shares=LANE_SHARES).finish_s[0] == pytest.approx(alone)
    assert simulate_flows(network, routes, flows).finish_s[0] == pytest.approx(51)


def slow_finish(network: Network, paths: list[dict[int, float]], latency: list[float], flows: Flows) -> list[float]:
    """One flow at a time, one bottleneck at a time, in plain Python."""
    num = len(paths)
    left = [float(size) for size in flows.size_bytes]
    finish: list[float | None] = [None] * num
    sent = [False] * num
    now = 0.0
    start = flows.start_s if len(flows.start_s) else np.zeros(num)
    while not all(sent):
        ready = []
        later = []
        for flow in range(num):
            needs = [int(b) for b, a in zip(flows.before, flows.after, strict=True) if a == flow]
            if sent[flow] or any(finish[need] is None for need in needs):
                continue
            at = max([float(start[flow]), *(finish[need] for need in needs)])
            (ready if at <= now else later).append(flow if at <= now else at)
        rate = {}
        room = [float(c) for c in network.capacity_bytes_per_s]
        open_flows = list(ready)
        while open_flows:
            fair = {}
            for link in range(len(room)):
                want = sum(paths[f].get(link, 0.0) for f in open_flows)
                if want:
                    fair[link] = room[link] / want
            tight = min(fair, key=lambda link: fair[link])
            for flow in [f for f in open_flows if tight in paths[f]]:
                rate[flow] = fair[tight]
                open_flows.remove(flow)
                for link, part in paths[flow].items():
                    room[link] -= part * fair[tight]
        until = min([now + left[f] / rate[f] for f in ready] + later)
        for flow in ready:
            left[flow] -= rate[flow] * (until - now)
            if left[flow] <= 1e-9 * flows.size_bytes[flow]:
                sent[flow], finish[flow] = True, until + latency[flow]
        now = until
    return [float(f) for f in finish if f is not None]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[float], list[dict[int, float]], list[float], Flows]:
    capacity, paths = draw(problems())
    num = len(paths)

    def each(values: list[float]) -> list[float]:
        return draw(st.lists(st.sampled_from(values), min_size=num, max_size=num))

    waits = draw(st.sets(st.tuples(st.integers(0, num - 1), st.integers(0, num - 1)), max_size=6))
    waits = {(min(pair), max(pair)) for pair in waits if pair[0] != pair[1]}
    before, after = (np.array([pair[i] for pair in sorted(waits)], np.int64) for i in (0, 1))
    flows = Flows(np.array(each([1.0, 2.0, 10.0])), np.array(each([0.0, 0.0, 1.5])), before, after)
    return capacity, paths, each([0.0, 0.25]), flows


@settings(max_examples=150, deadline=None)
@given(runs())
def test_finish_times_equal_the_slow_simulator_merged_or_not(
    run: tuple[list[float], list[dict[int, float]], list[float], Flows],
):
    capacity, paths, latency, flows = run
    network, routes = links_only(capacity), rows(paths, latency)
    slow = slow_finish(network, paths, latency, flows)
    for merge in (True, False):
        result = simulate_flows(network, routes, flows, merge=merge)
        np.testing.assert_allclose(result.finish_s, slow, rtol=1e-9)
        sent = np.zeros(len(capacity))
        for size, path in zip(flows.size_bytes, paths, strict=True):
            for link, part in path.items():
                sent[link] += size * part
        np.testing.assert_allclose(result.link_bytes, sent, rtol=1e-9)
        assert result.link_peak.max() <= 1 + 1e-9


def test_random_sizes_over_a_leaf_spine_network_equal_the_slow_simulator():
    network, routes, pairs = leaf_spine(3, 3, 2, latency_s=1e-3)
    some = np.random.default_rng(1).permutation(len(pairs))[:24]
    paths = [
        {int(routes.link[e]): float(routes.fraction[e]) for e in range(int(routes.start[f]), int(routes.start[f + 1]))}
        for f in some
    ]
    flows = Flows(np.random.default_rng(2).uniform(10, 100, len(paths)))
    slow = slow_finish(network, paths, [1e-3] * len(paths), flows)
    np.testing.assert_allclose(simulate_flows(network, rows(paths, 1e-3), flows).finish_s, slow, rtol=1e-9)


def levels(capacity: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Max-min rates by one linear program per level: flows whose least rate has a price cannot rise."""
    optimize = pytest.importorskip("scipy.optimize")
    num = matrix.shape[1]
    rate = np.full(num, np.nan)
    while np.isnan(rate).any():
        open_flows = np.flatnonzero(np.isnan(rate))
        room = capacity - matrix[:, ~np.isnan(rate)] @ rate[~np.isnan(rate)]
        links = np.hstack([matrix[:, open_flows], np.zeros((len(capacity), 1))])
        least = np.hstack([-np.eye(len(open_flows)), np.ones((len(open_flows), 1))])
        limits = np.concatenate([np.maximum(room, 0), np.zeros(len(open_flows))])
        cost = np.zeros(len(open_flows) + 1)
        cost[-1] = -1
        found = optimize.linprog(cost, np.vstack([links, least]), limits, method="highs")
        assert found.status == 0, found.message
        rate[open_flows[found.ineqlin.marginals[len(capacity) :] < -1e-9]] = -found.fun
    return rate


def ecmp(num_flows: int, seed: int) -> tuple[Network, Routes]:
    """Random pairs of 64 endpoints in a fat tree, hashed onto its spines."""
    network = build(FatTree(64, 16, 2, 1.0, 1, 1), LinkSpeed(50.0, 1.0, 2.0))
    random = np.random.default_rng(seed)
    source = random.integers(0, 64, num_flows)
    return network, route(network, source, (source + random.integers(1, 64, num_flows)) % 64, "ecmp", seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rates_of_200_hashed_flows_between_64_endpoints_equal_linear_programs(seed: int):
    network, routes = ecmp(200, seed)
    uses = _uses(routes)
    matrix = np.zeros((network.num_links, 200))
    matrix[uses.link, uses.flow] = uses.load
    rate = max_min_rates(uses, network.capacity_bytes_per_s, 200)
    np.testing.assert_allclose(rate, levels(network.capacity_bytes_per_s, matrix), rtol=1e-6)
    assert len(np.unique(np.round(rate, 6))) > 5


def test_hashed_flows_of_many_sizes_between_64_endpoints_equal_the_slow_simulator():
    network, routes = ecmp(40, 7)
    paths = [dict.fromkeys(map(int, routes.link[routes.start[f] : routes.start[f + 1]]), 1.0) for f in range(40)]
    flows = Flows(np.random.default_rng(5).uniform(10, 1000, 40))
    slow = slow_finish(network, paths, routes.latency_s.tolist(), flows)
    np.testing.assert_allclose(simulate_flows(network, routes, flows).finish_s, slow, rtol=1e-9)


def test_a_coarse_clock_is_never_early_loses_no_bytes_and_saves_events():
    network, routes, pairs = leaf_spine(4, 4, 4)
    flows = Flows(np.random.default_rng(3).uniform(1, 2, len(pairs)))
    exact = simulate_flows(network, routes, flows)
    coarse = simulate_flows(network, routes, flows, resolution_s=exact.makespan_s / 100)
    assert coarse.num_events < exact.num_events / 2
    assert exact.makespan_s <= coarse.makespan_s <= 1.02 * exact.makespan_s
    np.testing.assert_allclose(coarse.link_bytes, exact.link_bytes, rtol=1e-9)
    assert (coarse.link_peak <= 1 + 1e-9).all()


def test_links_of_a_dead_switch_or_plane_are_all_that_touch_it():
    network = build(FatTree(16, 4, 2, 1.0, 2, 2), LinkSpeed(1.0))
    switch = int(network.head[0])
    for found, plane in ((links_at(network, switches=(switch,)), None), (links_at(network, planes=(1,)), 1)):
        for link in range(network.num_links):
            ends = (int(network.tail[link]), int(network.head[link]))
            hit = switch in ends if plane is None else any(network.level[v] > 0 and network.plane[v] == 1 for v in ends)
            assert (link in found) == hit


def test_links_are_named_by_what_they_join():
    network = build(FatTree(16, 4, 2, 1.0, 2, 2), LinkSpeed(1.0, scale_up_bandwidth_bytes_per_s=2.0))
    names = [link_name(network, link) for link in range(network.num_links)]
    assert names[:4] == [
        "port 0 of node 0 -> leaf 0 of plane 0",
        "leaf 0 of plane 0 -> port 0 of node 0",
        "port 1 of node 0 -> leaf 0 of plane 1",
        "leaf 0 of plane 1 -> port 1 of node 0",
    ]
    assert "leaf 3 of plane 1 -> spine 1 of plane 1" in names
    assert names[-1] == "fast links 7 -> port 1 of node 7"


def test_equal_flows_of_all_to_all_are_simulated_once_per_class_with_the_same_result():
    network, routes, pairs = leaf_spine(4, 4, 2)
    flows = Flows(np.full(len(pairs), 8.0))
    merged = simulate_flows(network, routes, flows)
    single = simulate_flows(network, routes, flows, merge=False)
    assert (merged.num_flow_classes, single.num_flow_classes) == (2, 240)
    # Links of hosts and links between switches; up and down look alike.
    assert merged.num_link_classes == 2
    for name in ("begin_s", "finish_s", "link_bytes", "link_peak", "link_full_s"):
        np.testing.assert_allclose(getattr(merged, name), getattr(single, name), rtol=1e-9)
    # Twelve of fifteen flows of a host leave the leaf over half as many links: 4 x 12 x 8 bytes over 2 x 50 bytes/s.
    assert merged.makespan_s == pytest.approx(4 * 12 * 8 / 100)
    assert set(merged.bottlenecks(16)) == set(range(32, 48))


@pytest.mark.parametrize("routing", ["ecmp", "static", "adaptive"])
def test_merged_flows_over_planes_equal_single_ones_with_lanes_waits_and_a_dead_plane(
    routing: Literal["ecmp", "static", "adaptive"],
):
    """Eight nodes of two devices; sizes, lanes, starts and waits follow from the nodes, so some flows are alike."""
    network = build(FatTree(16, 4, 2, 1.0, 2, 2), LinkSpeed(50.0, 1.0, 2.0, 80.0, 1.0), bundle=True)
    near, far = np.divmod(np.arange(16 * 16), 16)
    near, far = near[near != far], far[near != far]
    number = np.full((16, 16), -1)
    number[near, far] = np.arange(len(near))
    ends = [np.divmod(device, 2) for device in (near, far)]
    from_even, to_even = (end[0] % 2 == 0 for end in ends)
    waits = np.flatnonzero(from_even & ~to_even)
    flows = Flows(
        10.0 + 10 * from_even,
        start_s=1.0 * to_even,
        before=number[far[waits], near[waits]],
        after=waits,
        queued=far[waits] % 4 < 2,
        lane=from_even.astype(np.int64),
    )
    routes = device_routes(network, ends[0], ends[1], routing)
    around = device_routes(network, ends[0], ends[1], routing, failed_planes=(1,))
    failure = Failure(2.5, links_at(network, planes=(1,)), around)
    merged, single = (
        simulate_flows(network, routes, flows, lane_shares=(2.0, 1.0), failures=(failure,), merge=merge)
        for merge in (True, False)
    )
    if routing == "adaptive":
        assert merged.num_flow_classes <= 40 < single.num_flow_classes == 240
    for name in ("begin_s", "finish_s", "link_bytes", "link_peak", "link_full_s"):
        np.testing.assert_allclose(getattr(merged, name), getattr(single, name), rtol=1e-8, atol=1e-8)


def test_flows_that_wait_are_told_apart_by_what_they_wait_for():
    """Four equal flows on links of their own; two wait, one for a flow that takes longer."""
    network, routes = links_only([1.0] * 4), rows([{link: 1.0} for link in range(4)])
    flows = Flows(np.array([1.0, 2.0, 1.0, 1.0]), before=np.array([0, 1]), after=np.array([2, 3]))
    assert simulate_flows(network, routes, flows).finish_s.tolist() == [1, 2, 2, 3]


def test_a_queued_flow_starts_when_the_one_before_has_left_and_not_when_it_arrives():
    network, routes = links_only([1.0]), rows([{0: 1.0}] * 3, 5.0)
    flows = Flows(np.ones(3), before=np.array([0, 1]), after=np.array([1, 2]), queued=np.array([True, False]))
    for merge in (True, False):
        assert simulate_flows(network, routes, flows, merge=merge).finish_s.tolist() == [6, 7, 13]


def test_flows_that_wait_are_told_apart_by_how_they_wait():
    network, routes = links_only([1.0] * 4), rows([{link: 1.0} for link in range(4)], 5.0)
    flows = Flows(np.ones(4), before=np.array([0, 1]), after=np.array([2, 3]), queued=np.array([True, False]))
    assert simulate_flows(network, routes, flows).finish_s.tolist() == [6, 6, 7, 12]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 20), min_size=1, max_size=8), st.floats(1, 5), st.floats(1, 4))
def test_more_capacity_of_the_only_link_never_delays_anyone(sizes: list[float], capacity: float, factor: float):
    routes = rows([{0: 1.0}] * len(sizes))
    slow = simulate_flows(links_only([capacity]), routes, Flows(np.array(sizes)))
    fast = simulate_flows(links_only([capacity * factor]), routes, Flows(np.array(sizes)))
    assert (fast.finish_s <= slow.finish_s * (1 + 1e-9)).all()
    assert slow.makespan_s == pytest.approx(sum(sizes) / capacity)
    assert slow.link_mean[0] == pytest.approx(1)


def test_request_to_send_bounds_the_senders_and_loses_no_throughput():
    network, routes = links_only([10.0] + [10.0] * 12), rows([{0: 1.0, 1 + s: 1.0} for s in range(12)], 0.5)
    flows = Flows(np.full(12, 20.0), receiver=np.zeros(12, np.int64))
    free = simulate_flows(network, routes, flows)
    asked = simulate_flows(network, routes, flows, control=SendControl(3, grant_s=0.25))
    assert (free.senders_peak, asked.senders_peak) == (12, 3)
    assert free.makespan_s == pytest.approx(24.5)
    assert asked.makespan_s == pytest.approx(24.75)
    assert asked.link_bytes[0] == 240
    assert asked.link_full_s[0] == pytest.approx(24)
    # The first three arrive after a quarter of the time, where without asking nobody does before the end.
    assert np.sort(asked.finish_s)[:3] == pytest.approx(6.75)
    assert free.finish_s.min() == pytest.approx(24.5)


def test_request_to_send_grants_in_the_order_of_asking():
    network, routes = links_only([1.0]), rows([{0: 1.0}] * 3)
    flows = Flows(np.full(3, 1.0), np.array([0.2, 0.0, 0.1]), receiver=np.zeros(3, np.int64))
    assert simulate_flows(network, routes, flows, control=SendControl(1)).finish_s.tolist() == [3, 1, 2]


def test_a_failed_link_stops_its_flows_unless_there_is_another_way():
    network, routes = links_only([1.0, 1.0]), rows([{0: 1.0}, {1: 1.0}])
    flows = Flows(np.array([4.0, 4.0]))
    dead = Failure(1.0, np.array([0]))
    assert simulate_flows(network, routes, flows, failures=(dead,)).finish_s.tolist() == [np.inf, 4]
    around = Failure(1.0, np.array([0]), rows([{1: 1.0}, {1: 1.0}]))
    for merge in (True, False):
        result = simulate_flows(network, routes, flows, failures=(around,), merge=merge)
        assert result.finish_s.tolist() == [7, 7]
        assert result.link_bytes.tolist() == [1, 7]


def test_flows_without_links_arrive_after_their_latency_and_empty_ones_too():
    result = simulate_flows(links_only([1.0]), rows([{}, {0: 1.0}], [0.5, 0.25]), Flows(np.array([9.0, 0.0])))
    assert result.finish_s.tolist() == [0.5, 0.25]
    assert simulate_flows(links_only([1.0]), rows([]), Flows(np.zeros(0))).makespan_s == 0


def test_a_trace_has_a_begin_and_an_end_for_each_flow_that_arrived():
    flows = Flows(np.array([1.0, 2.0]), np.array([0.0, 3.0]))
    events = trace_events(simulate_flows(links_only([1.0]), rows([{0: 1.0}] * 2), flows), np.array([7, 8]), ["a", "b"])
    assert [(e["ph"], e["ts"], e["tid"], e["name"]) for e in events] == [
        ("b", 0, 7, "a"),
        ("e", 1e6, 7, "a"),
        ("b", 3e6, 8, "b"),
        ("e", 5e6, 8, "b"),
    ]


def test_mistakes_are_refused_in_a_line_that_says_what_to_change():
    network, routes, one = links_only([1.0]), rows([{0: 1.0}]), np.array([1.0])
    circle = Flows(np.array([1.0, 1.0]), before=np.array([0, 1]), after=np.array([1, 0]))
    cases = [
        (lambda: simulate_flows(network, routes, Flows(np.ones(2))), "2 flows need as many routes, not 1"),
        (lambda: simulate_flows(network, routes, Flows(-one)), "size_bytes = -1 is negative"),
        (lambda: simulate_flows(network, routes, Flows(one, lane=np.array([1])), lane_shares=(1.0,)), "lane 1 has no"),
        (lambda: simulate_flows(network, routes, Flows(one), lane_shares=(0.0,)), "each must be above 0"),
        (lambda: simulate_flows(network, routes, Flows(one), control=SendControl(1)), "needs the flows' receivers"),
        (lambda: SendControl(0), "senders_max = 0 lets nobody send"),
        (lambda: simulate_flows(network, rows([{0: 1.0}] * 2), circle), "2 flows wait for each other in a circle"),
        (lambda: simulate_flows(network, routes, Flows(one, start_s=np.zeros(3))), "start_s has 3 values"),
    ]
    for call, message in cases:
        with pytest.raises(PlanError, match=message):
            call()


def test_uses_of_a_subset_keep_their_loads():
    uses = Uses(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([1.0, 0.5, 0.5]))
    assert uses.of(uses.flow == 1).on_links(np.array([9.0, 2.0]), 2).tolist() == [1, 1]
