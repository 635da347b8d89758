"""Routes: shortest, complete and alive, against all shortest paths found by a library of graphs."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.network import routing as routing_module
from cofire.network.builders import LinkSpeed, build
from cofire.network.routing import Routes, device_routes, link_loads, route
from cofire.network.shapes import Dragonfly, FatTree, FullyConnected, SlimFly, Torus, TwoZone
from cofire.network.topology import Network

FAST = LinkSpeed(scale_up_bandwidth_bytes_per_s=200e9)
PLANES = FatTree(64, 8, num_planes=4, ports_per_node=4)
SHAPES = [
    FatTree(32, 8),
    FatTree(20, 8),
    FatTree(40, 8, 3),
    FatTree(32, 8, ports_per_node=4, rails=True),
    TwoZone(8, 3, 8, 4, 2, 2, 1),
    Dragonfly(2, 4, 2, 9),
    Dragonfly(1, 4, 2, 4),
    SlimFly(3, 1),
    Torus((4, 3, 2)),
    FullyConnected(5, 3),
]
METHODS = ["ecmp", "static", "adaptive"]


def links_of(routes: Routes, flow: int) -> dict[int, float]:
    entries = slice(routes.start[flow], routes.start[flow + 1])
    return dict(zip(routes.link[entries].tolist(), routes.fraction[entries].tolist(), strict=True))


def directed(network: Network, dead: set[int] = frozenset()) -> nx.MultiDiGraph:
    """Return the network without fast links; a cable between groups or zones weighs three."""
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(range(network.num_vertices))
    for link in range(network.num_links):
        tail, head = int(network.tail[link]), int(network.head[link])
        if min(network.level[tail], network.level[head]) < 0 or link in dead:
            continue
        crosses = min(tail, head) >= network.num_endpoints and network.plane[tail] != network.plane[head]
        graph.add_edge(tail, head, key=link, weight=3 if crosses else 1)
    return graph


def even_shares(graph: nx.MultiDiGraph, source: int, target: int) -> dict[int, float]:
    """Return the part of all shortest paths that takes each link, counting every choice of parallel cables."""
    shares: dict[int, float] = {}
    simple = nx.DiGraph((u, v, {"weight": data["weight"]}) for u, v, data in graph.edges(data=True))
    paths = []
    for walk in nx.all_shortest_paths(simple, source, target, weight="weight"):
        paths += itertools.product(*(list(graph[u][v]) for u, v in itertools.pairwise(walk)))
    for path in paths:
        for link in path:
            shares[link] = shares.get(link, 0.0) + 1 / len(paths)
    return shares


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_adaptive_routing_shares_all_shortest_paths_evenly(shape):
    network = build(shape)
    graph = directed(network)
    rng = np.random.default_rng(1)
    source, target = rng.integers(0, network.num_endpoints, (2, 25))
    routes = route(network, source, target, "adaptive")
    for flow, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        expected = even_shares(graph, s, t) if s != t else {}
        assert links_of(routes, flow) == pytest.approx(expected)
        longest = max(
            (
                sum(network.latency_s[min(graph[u][v])] for u, v in itertools.pairwise(walk))
                for walk in nx.all_shortest_paths(graph, s, t, weight="weight")
            ),
            default=0.0,
        )
        assert routes.latency_s[flow] == pytest.approx(longest)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("method", ["ecmp", "static"])
def test_a_single_path_is_one_of_the_shortest_in_order(shape, method):
    network = build(shape)
    rng = np.random.default_rng(2)
    source, target = rng.integers(0, network.num_endpoints, (2, 25))
    routes, graph = route(network, source, target, method), directed(network)
    for flow, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        path = routes.link[routes.start[flow] : routes.start[flow + 1]]
        assert np.array_equal(network.head[path[:-1]], network.tail[path[1:]])
        assert set(path.tolist()) <= set(even_shares(graph, s, t) if s != t else ())
        assert len(path) == 0 if s == t else (network.tail[path[0]], network.head[path[-1]]) == (s, t)
        assert routes.latency_s[flow] == pytest.approx(network.latency_s[path].sum())


def balance(network: Network, routes: Routes, flow: int) -> np.ndarray:
    """Return what leaves minus what enters every vertex."""
    entries = slice(routes.start[flow], routes.start[flow + 1])
    link, fraction = routes.link[entries], routes.fraction[entries]
    net = np.bincount(network.tail[link], fraction, network.num_vertices)
    return net - np.bincount(network.head[link], fraction, network.num_vertices)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([*SHAPES, PLANES]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 10**6),
    dead_share=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_every_flow_arrives_whole_over_living_links_or_is_refused(shape, method, seed, dead_share):
    network, rng = build(shape, FAST), np.random.default_rng(seed)
    between = np.flatnonzero((network.level[network.tail] > 0) & (network.level[network.head] > 0))
    dead = rng.choice(between, int(dead_share * len(between)), replace=False)
    down = set(dead.tolist()) | set((dead ^ 1).tolist())
    graph = directed(network, down)
    source, target = rng.integers(0, network.num_endpoints, (2, 8))
    reached = [nx.has_path(graph, s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True)]
    if not all(reached):
        lost = f"endpoint {source[reached.index(False)]} "
        with pytest.raises(PlanError, match=f"no path is left from {lost if reached.count(False) == 1 else ''}"):
            route(network, source, target, method, seed, failed_links=dead)
        return
    routes = route(network, source, target, method, seed, failed_links=dead)
    assert not set(routes.link.tolist()) & down
    for flow, (s, t) in enumerate(zip(source, target, strict=True)):
        expected = np.zeros(network.num_vertices)
        expected[s] += 1
        expected[t] -= 1
        assert balance(network, routes, flow) == pytest.approx(expected)


@pytest.mark.parametrize(
    "shape",
    [
        FatTree(32, 8),
        FatTree(128, 8, 3),
        FatTree(32, 16),
        FatTree(64, 8, 3),
        FatTree(64, 8, num_planes=4, ports_per_node=4),
        FatTree(32, 8, ports_per_node=4, rails=True),
    ],
    ids=repr,
)
def test_static_routing_never_collides_on_a_shift(shape):
    network, endpoint = build(shape), np.arange(shape.num_endpoints)
    step = shape.num_planes
    for shift in range(step, shape.num_endpoints, step):
        loads = link_loads(network, route(network, endpoint, (endpoint + shift) % shape.num_endpoints, "static"))
        assert loads.max() == 1.0


def test_hashes_collide_and_depend_on_the_seed_alone():
    network, endpoint = build(FatTree(128, 16)), np.arange(128)
    loads = []
    for seed in (0, 0, 1):
        loads.append(link_loads(network, route(network, endpoint, (endpoint + 17) % 128, "ecmp", seed)))
    assert loads[0].max() > 1.0
    assert np.array_equal(loads[0], loads[1])
    assert not np.array_equal(loads[0], loads[2])


def test_hashes_choose_every_way_about_equally_often():
    network = build(FatTree(128, 16))
    source, target = np.divmod(np.arange(128 * 128), 128)
    loads = link_loads(network, route(network, source, target, "ecmp"))
    up = (network.level[network.tail] == 1) & (network.level[network.head] == 2)
    # 8 x 120 flows over 8 uplinks: a binomial of mean 120 and deviation 10.
    assert abs(loads[up].mean() - 120) < 1e-9
    assert loads[up].std() < 20
    assert loads[up].std() > 3


def test_blocks_of_destinations_give_the_same_routes(monkeypatch):
    network = build(FatTree(128, 8, 3))
    source, target = np.random.default_rng(0).integers(0, 128, (2, 500))
    for method in METHODS:
        whole = route(network, source, target, method)
        with monkeypatch.context() as patch:
            patch.setattr(routing_module, "_TABLE_ENTRIES", 5 * network.num_links)
            parts = route(network, source, target, method)
        assert np.array_equal(whole.start, parts.start)
        assert np.array_equal(whole.link, parts.link)
        assert np.allclose(whole.fraction, parts.fraction)
        assert np.allclose(whole.latency_s, parts.latency_s)


@pytest.mark.parametrize("shape", [FatTree(32, 16), FatTree(20, 8, num_top_switches=3)], ids=repr)
def test_bundled_cables_count_as_often_as_they_are(shape):
    endpoint, loads = np.arange(shape.num_endpoints), []
    for bundle in (False, True):
        network = build(shape, bundle=bundle)
        routes = route(network, np.repeat(endpoint, len(endpoint)), np.tile(endpoint, len(endpoint)), "adaptive")
        between = np.zeros((network.num_vertices, network.num_vertices))
        np.add.at(between, (network.tail, network.head), link_loads(network, routes))
        loads.append(between)
    assert np.allclose(*loads)


# -- devices ------------------------------------------------------------------------------------------


def devices(num_nodes: int, per_node: int = 4) -> tuple[tuple, tuple]:
    """Return all pairs of different devices."""
    source, target = np.divmod(np.arange((num_nodes * per_node) ** 2), num_nodes * per_node)
    source, target = source[source != target], target[source != target]
    return np.divmod(source, per_node), np.divmod(target, per_node)


def test_a_device_forwards_to_the_port_of_the_destinations_plane():
    network = build(PLANES, FAST)
    routes = device_routes(network, ([0, 0, 0], [1, 2, 1]), ([15, 15, 0], [2, 2, 3]), "static")
    walks = [[int(network.tail[link]) for link in routes.link[routes.start[f] : routes.start[f + 1]]] for f in range(3)]
    switch = int(np.flatnonzero(network.level < 0)[0])
    assert walks[0][:3] == [1, switch, 2]
    assert set(network.plane[walks[0][3:]]) == {2}
    assert walks[1][0] == 2
    assert walks[1] == walks[0][2:]
    assert walks[2] == [1, switch]
    assert routes.latency_s == pytest.approx([3.3e-6 + 3.7e-6, 3.7e-6, 3.3e-6])


@pytest.mark.parametrize("method", METHODS)
def test_all_devices_reach_all_over_planes_alone_where_forwarding_helps(method):
    network = build(PLANES, FAST)
    source, target = devices(16)
    routes = device_routes(network, source, target, method)
    rows = np.repeat(np.arange(routes.num_flows), np.diff(routes.start))
    net = np.zeros((routes.num_flows, network.num_vertices))
    np.add.at(net, (rows, network.tail[routes.link]), routes.fraction)
    np.add.at(net, (rows, network.head[routes.link]), -routes.fraction)
    every = np.arange(routes.num_flows)
    net[every, source[0] * 4 + source[1]] -= 1
    net[every, target[0] * 4 + target[1]] += 1
    assert np.abs(net).max() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_plane_is_left_alone_and_everything_still_arrives(method):
    network = build(PLANES, FAST)
    source, target = devices(16)
    routes = device_routes(network, source, target, method, failed_planes=[2])
    ends = np.concatenate([network.tail[routes.link], network.head[routes.link]])
    assert not ((network.plane[ends] == 2) & (network.level[ends] > 0)).any()
    loads = link_loads(network, routes)
    ports = (network.level[network.tail] == 0) & (network.level[network.head] > 0)
    alive = ports & (network.plane[network.tail] != 2)
    assert not loads[ports & ~alive].any()
    # What the dead plane carried is shared by the three others: 60 flows a port before, 80 after.
    assert loads[alive].mean() == pytest.approx(80)
    assert loads[alive].max() <= (80 if method == "adaptive" else 1.1 * 80) + 1e-6
    assert (np.diff(routes.start) > 0).all()


def test_a_dead_port_moves_its_traffic_to_another_plane():
    network = build(PLANES, FAST)
    port_of_device_5 = 2 * 5
    routes = device_routes(network, ([1], [1]), ([9], [1]), "adaptive", failed_links=[port_of_device_5])
    loads = link_loads(network, routes)
    ports = np.flatnonzero((network.level[network.tail] == 0) & (network.level[network.head] > 0) & (loads > 0))
    assert network.tail[ports].tolist() == [4, 6, 7]
    assert loads[ports] == pytest.approx([1 / 3] * 3)
    # All of it leaves the device over the fast links, and reaches the other one so.
    assert loads[(network.tail == 5) & (network.level[network.head] < 0)] == pytest.approx([1.0])
    assert loads[(network.head == 37) & (network.level[network.tail] < 0)] == pytest.approx([1.0])


def test_without_fast_links_planes_do_not_meet():
    network = build(PLANES)
    assert device_routes(network, (0, 1), (3, 1), "static").num_flows == 1
    with pytest.raises(PlanError, match=r"from endpoint 1 \(node 0, plane 1\) to endpoint 14 \(node 3, plane 2\)"):
        device_routes(network, (0, 1), (3, 2), "static")
    with pytest.raises(PlanError, match="no path is left"):
        device_routes(network, (0, 1), (3, 1), "static", failed_planes=[1])


def test_devices_without_a_port_of_their_own_share_the_node_s():
    network = build(TwoZone(8, 3, 8, 4, 2, 2, 1), FAST)
    shared, own = (device_routes(network, (0, index), (12, 7), "static") for index in (5, 0))
    assert np.array_equal(shared.link, own.link)
    # Storage (node 16 on) has a port in each zone: traffic with it never passes the joining switches.
    routes = device_routes(network, ([16, 16, 2, 10], [0, 0, 0, 0]), ([1, 9, 16, 16], [0, 0, 1, 0]), "static")
    joiners = set(range(network.num_vertices - 3 - 2, network.num_vertices - 3))
    assert not joiners & set(network.head[routes.link].tolist())


def test_traffic_inside_a_zone_never_passes_the_joining_switches():
    network = build(TwoZone())
    source, target = np.random.default_rng(3).integers(0, 600, (2, 5000))
    joiners = [network.num_vertices - 1, network.num_vertices - 2]
    for method in METHODS:
        inside = route(network, [*source, *source + 600], [*target, *target + 600], method)
        assert not np.isin(network.head[inside.link], joiners).any()
        across = route(network, source, target + 600, method)
        assert link_loads(network, across)[np.isin(network.head, joiners)].sum() == pytest.approx(5000)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: route(net, 64, 0), "endpoint 64 does not exist; take one of 0 to 63"),
        (lambda net: route(net, [0, 1], [1]), "2 sources and 1 destinations"),
        (lambda net: route(net, 0, 1, "adaptive"), "no path is left from endpoint 0 .* to endpoint 1"),
        (lambda net: route(net, 0, 4, failed_links=[-1]), "failed link -1 does not exist"),
        (lambda net: route(net, 0, 4, failed_switches=[3]), "failed switch 3 does not exist; take one of 64 to"),
        (lambda net: route(net, 0, 4, failed_planes=[4]), "failed plane 4 does not exist; take one of 0 to 3"),
        (lambda net: route(net, 0, 60, failed_planes=[0]), "no path is left from endpoint 0"),
        (lambda net: route(net, 0, 60, failed_switches=[64]), "no path is left from endpoint 0"),
        (lambda net: device_routes(net, (16, 0), (1, 0)), "device 0 of node 16 does not exist"),
    ],
)
def test_a_wrong_question_is_one_line(call, message):
    with pytest.raises(PlanError, match=message) as caught:
        call(build(PLANES, FAST))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["ecmp", "static", "adaptive"])
def test_no_flows_have_no_routes(method: str):
    routes = route(build(FatTree(16, 8)), [], [], method)
    assert (routes.num_flows, len(routes.link)) == (0, 0)
