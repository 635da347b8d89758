"""The built graphs: their counts, degrees, diameters and planes, against closed forms and slow references."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from cofire.errors import PlanError
from cofire.network.analytical import analyse, analyse_cluster
from cofire.network.builders import LinkSpeed, build, build_network
from cofire.network.routing import link_loads, route
from cofire.network.shapes import (
    Dragonfly,
    FatTree,
    FullyConnected,
    SlimFly,
    Torus,
    TwoZone,
    cluster_shape,
    network_shape,
)
from cofire.network.slim_fly import Field, slim_fly_edges
from cofire.network.topology import SCALE_UP, Network
from cofire.spec import ClusterSpec, load_as
from cofire.spec.hardware import NetworkSpec

SHAPES = [
    FatTree(32, 8),
    FatTree(20, 8),
    FatTree(4, 8),
    FatTree(48, 8, oversubscription=3),
    FatTree(128, 8, 3),
    FatTree(40, 8, 3),
    FatTree(64, 8, num_planes=4, ports_per_node=4),
    FatTree(64, 8, num_planes=2, ports_per_node=4),
    FatTree(32, 8, ports_per_node=4, rails=True),
    FatTree(96, 8, 3, ports_per_node=4, rails=True),
    TwoZone(20, 6, 8, 8, 4, 2, 2),
    TwoZone(5, 6, 8, 8, 4, 2, 2, 4),
    Dragonfly(2, 4, 2, 9),
    Dragonfly(2, 4, 2, 6),
    Dragonfly(1, 3, 1, 2),
    Dragonfly(3, 5, 3, 7),
    Dragonfly(2, 4, 2, 5, 33),
    SlimFly(5),
    SlimFly(4, 2, 50),
    Torus((4, 3, 2)),
    Torus((5,), 2),
    FullyConnected(5, 4),
    FullyConnected(1, 4),
]


def graph(network: Network) -> nx.MultiGraph:
    """Return the network as an undirected graph of cables, with the fast links left out."""
    result = nx.MultiGraph()
    result.add_nodes_from(range(network.num_vertices))
    for link in range(0, network.num_links, 2):
        if network.level[network.tail[link]] >= 0 and network.level[network.head[link]] >= 0:
            for _ in range(network.cables[link]):
                result.add_edge(int(network.tail[link]), int(network.head[link]))
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("bundle", [False, True])
def test_the_graph_has_the_counts_of_the_closed_form(shape, bundle):
    network, counts = build(shape, bundle=bundle), shape.counts()
    assert network.num_endpoints == counts.endpoints
    assert network.num_switches == counts.switches
    assert network.cables[::2].sum() - network.num_endpoints == counts.links
    assert np.array_equal(network.tail[::2], network.head[1::2])
    assert np.array_equal(network.head[::2], network.tail[1::2])
    assert np.array_equal(network.capacity_bytes_per_s, 50e9 * network.cables)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if hasattr(shape, "switch_ports")], ids=repr)
def test_no_switch_has_more_cables_than_ports(shape):
    network = build(shape)
    cables = graph(network)
    switches = range(network.num_endpoints, network.num_vertices)
    assert max(cables.degree(v) for v in switches) <= shape.switch_ports
    assert all(cables.degree(e) == 1 for e in range(network.num_endpoints))


def test_the_full_tree_of_64_ports_is_the_one_of_table_3():
    network = build(FatTree(2048))
    degree = np.bincount(network.tail)[network.num_endpoints :]
    assert (network.num_switches, set(degree)) == (96, {64})


def joined_by_switches(shape) -> bool:
    """Say whether ports of different planes (rails, groups) reach each other as any others do."""
    return isinstance(shape, Dragonfly) or (isinstance(shape, FatTree) and shape.rails)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_diameter_and_mean_path_equal_a_search_from_every_endpoint(shape):
    network, facts = build(shape), analyse(shape)
    cables = graph(network)
    plane = np.zeros(network.num_vertices) if joined_by_switches(shape) else network.plane
    lengths = []

    def weight(u, v, _):
        # Minimal routing of a dragonfly leaves a group once: that counts a hundredfold, and as one link below.
        return 100 if isinstance(shape, Dragonfly) and network.plane[u] != network.plane[v] else 1

    for source in range(network.num_endpoints):
        search = nx.single_source_dijkstra_path_length(cables, source, weight=weight)
        lengths += [
            length % 100 + length // 100
            for target, length in search.items()
            if target < network.num_endpoints and target != source and plane[target] == plane[source]
        ]
    if facts.exact:
        assert max(lengths) == facts.diameter_links
        assert np.mean(lengths) == pytest.approx(facts.mean_links)
    else:
        assert max(lengths) <= facts.diameter_links
        assert np.mean(lengths) == pytest.approx(facts.mean_links, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_load_of_a_uniform_exchange_equals_that_of_routes(shape):
    network, facts = build(shape), analyse(shape)
    endpoints = np.arange(network.num_endpoints)
    source, target = (ends.ravel() for ends in np.meshgrid(endpoints, endpoints))
    whole = joined_by_switches(shape) or isinstance(shape, TwoZone)
    kept = (source != target) & ((network.plane[source] == network.plane[target]) | whole)
    source, target = source[kept], target[kept]
    per_source = np.bincount(source)[source]
    loads = link_loads(network, route(network, source, target, "adaptive"), 1 / per_source)
    between = (network.level[network.tail] > 0) & (network.level[network.head] > 0)
    busiest = loads[between].max(initial=0.0)
    if facts.exact:
        # Slim Fly: the closed form is the mean over links.
        tolerance = 0.2 if isinstance(shape, SlimFly) else 1e-9
        assert busiest == pytest.approx(facts.all_to_all_load, rel=tolerance)
    else:
        assert busiest == pytest.approx(facts.all_to_all_load, rel=0.6)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if isinstance(shape, FatTree)], ids=repr)
def test_a_ring_over_the_nodes_loads_a_tree_as_the_formula_says(shape):
    network, facts = build(shape), analyse(shape)
    source = np.arange(network.num_endpoints)
    routes = route(network, source, (source + shape.ports_per_node) % network.num_endpoints, "adaptive")
    between = (network.level[network.tail] > 0) & (network.level[network.head] > 0)
    busiest = link_loads(network, routes)[between].max(initial=0.0)
    assert busiest == pytest.approx(facts.all_reduce_load) if facts.exact else busiest <= facts.all_reduce_load + 1e-9


def brute_bisection(shape) -> int:
    """Return the fewest cables between switch halves over all ways to halve the switches."""
    network = build(shape)
    switches, first = network.num_switches, network.num_endpoints
    between = (network.tail[::2] >= first) & (network.head[::2] >= first)
    tail, head = network.tail[::2][between] - first, network.head[::2][between] - first
    halves = np.arange(1 << (switches - 1))
    sides = halves[:, None] >> np.arange(switches) & 1
    sides = sides[sides.sum(axis=1) == switches // 2]
    return int((sides[:, tail] != sides[:, head]).sum(axis=1).min())


@pytest.mark.parametrize("shape", [Torus((4, 4)), Torus((2, 4)), Torus((2, 2, 2)), Torus((8,)), FullyConnected(6, 9)])
def test_bisection_equals_the_least_cut_over_all_halves(shape):
    wide = Torus(shape.dims, 64) if isinstance(shape, Torus) else shape
    assert analyse(wide, 1.0).bisection_bytes_per_s == brute_bisection(shape)


@pytest.mark.parametrize("shape", [FatTree(32, 8), FatTree(48, 8, oversubscription=3), FatTree(128, 8, 3)], ids=repr)
def test_bisection_of_a_tree_equals_the_flow_between_its_halves(shape):
    network = build(shape)
    flow = nx.DiGraph()
    for link in range(network.num_links):
        flow.add_edge(int(network.tail[link]), int(network.head[link]), capacity=1.0)
    half = network.num_endpoints // 2
    for endpoint in range(network.num_endpoints):
        flow.add_edge("from", endpoint) if endpoint < half else flow.add_edge(endpoint, "to")
    assert analyse(shape, 1.0).bisection_bytes_per_s == nx.maximum_flow_value(flow, "from", "to")


# -- Slim Fly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3, 4, 5, 7, 8, 9, 16, 25, 27])
def test_field_arithmetic_keeps_the_axioms(order):
    field = Field(order)
    a, b, c = (axis.ravel() for axis in np.meshgrid(*[np.arange(order)] * 3))
    assert np.array_equal(field.add(a, b), field.add(b, a))
    assert np.array_equal(field.multiply(a, b), field.multiply(b, a))
    assert np.array_equal(field.add(field.add(a, b), c), field.add(a, field.add(b, c)))
    assert np.array_equal(field.multiply(field.multiply(a, b), c), field.multiply(a, field.multiply(b, c)))
    assert np.array_equal(field.multiply(a, field.add(b, c)), field.add(field.multiply(a, b), field.multiply(a, c)))
    assert np.array_equal(field.add(field.subtract(a, b), b), a)
    table = field.multiply(np.arange(order)[:, None], np.arange(order)[None, :])
    assert all((table[row] == 1).sum() == 1 for row in range(1, order))
    assert set(field.powers) == set(range(1, order))


@pytest.mark.parametrize("q", [3, 4, 5, 7, 8, 9, 11, 13])
def test_slim_fly_is_regular_of_diameter_two_and_near_the_moore_bound(q):
    tail, head = slim_fly_edges(q)
    routers, shape = 2 * q * q, SlimFly(q)
    joined = np.zeros((routers, routers), np.int64)
    np.add.at(joined, (tail, head), 1)
    joined += joined.T
    assert joined.max() == 1
    assert not joined.diagonal().any()
    assert set(joined.sum(axis=1)) == {shape.degree}
    assert ((joined + joined @ joined) > 0).all()
    assert len(tail) == shape.counts().links
    # 8/9 of the bound in the limit; at q = 5 it is the Hoffman-Singleton graph, which meets it.
    assert routers / (1 + shape.degree**2) >= (1.0 if q == 5 else 0.69)
    second = np.linalg.eigvalsh(joined.astype(float))[-2]
    assert analyse(SlimFly(q, 99), 1.0).bisection_bytes_per_s == pytest.approx((shape.degree - second) * routers / 4)


def test_slim_fly_by_formula_needs_no_graph():
    assert SlimFly(28).counts().switches == 1568
    with pytest.raises(PlanError, match="28 is no prime power"):
        build(SlimFly(28))


def test_the_ring_of_a_slim_fly_can_follow_links():
    cables = nx.Graph(zip(*(ends.tolist() for ends in slim_fly_edges(3)), strict=True))
    path, stack = [0], [iter(cables[0])]
    while len(path) < len(cables) or path[0] not in cables[path[-1]]:
        step = next((v for v in stack[-1] if v not in path), None)
        if step is None:
            stack.pop()
            path.pop()
        else:
            path.append(step)
            stack.append(iter(cables[step]))
    assert sorted(path) == list(range(18))


# -- dragonfly, planes, rails, zones ------------------------------------------------------------------


@pytest.mark.parametrize(("p", "a", "h", "g"), [(2, 4, 2, 9), (2, 4, 2, 6), (3, 6, 3, 19), (2, 4, 2, 4)])
def test_dragonfly_joins_all_groups_and_no_routers_are_more_than_three_apart(p, a, h, g):
    network = build(Dragonfly(p, a, h, g))
    cables = graph(network).subgraph(range(network.num_endpoints, network.num_vertices))
    assert nx.diameter(cables) == 3
    group = {v: (v - network.num_endpoints) // a for v in cables}
    pairs = {tuple(sorted((group[u], group[v]))) for u, v in cables.edges() if group[u] != group[v]}
    assert len(pairs) == g * (g - 1) // 2
    assert all(cables.degree(v) == a - 1 + h for v in cables)


def test_planes_are_joined_by_nothing_but_the_fast_links():
    shape = FatTree(64, 8, num_planes=4, ports_per_node=4)
    network = build(shape, LinkSpeed(scale_up_bandwidth_bytes_per_s=200e9))
    port = np.arange(64) % 4
    assert np.array_equal(network.plane[:64], port)
    parts = list(nx.connected_components(graph(network).subgraph(np.flatnonzero(network.level >= 0).tolist())))
    assert sorted({frozenset(network.plane[list(part)].tolist()) for part in parts}, key=min) == [
        frozenset([plane]) for plane in range(4)
    ]
    fast = np.flatnonzero(network.level == SCALE_UP)
    assert len(fast) == 16
    for number, switch in enumerate(fast):
        assert set(network.tail[network.head == switch]) == set(range(4 * number, 4 * number + 4))


def test_ports_of_equal_index_share_a_leaf_on_rails():
    network = build(FatTree(64, 16, ports_per_node=8, rails=True))
    leaf = network.head[:128:2].reshape(8, 8)
    assert all(len(set(leaf[:, rail])) == 1 for rail in range(8))
    assert len(set(leaf[0])) == 8


def test_storage_has_a_port_in_each_zone_and_zones_meet_in_the_joining_switches_alone():
    shape = TwoZone()
    network = build(shape)
    counts = np.bincount(network.node)
    assert (counts == 1).sum() == 1200
    assert (counts == 2).sum() == 180
    storage = network.plane[: network.num_endpoints].reshape(-1)[1200:].reshape(180, 2)
    assert np.array_equal(storage, np.tile([0, 1], (180, 1)))
    cables = graph(network)
    assert nx.is_connected(cables)
    cables.remove_nodes_from(range(network.num_vertices - 2, network.num_vertices))
    parts = sorted(nx.connected_components(cables), key=min)
    assert [len(part) for part in parts] == [780 + 60] * 2
    # Storage is spread evenly over the leaves.
    leaves = network.head[: 2 * network.num_endpoints : 2][1200::2]
    assert set(np.bincount(leaves - network.num_endpoints, minlength=40)[:40]) <= {4, 5}


# -- clusters -----------------------------------------------------------------------------------------


def cluster(**changes) -> ClusterSpec:
    settings = [f"network.{key}={value}" for key, value in changes.items()]
    return load_as(ClusterSpec, "h800-2048", settings)


def test_a_cluster_gets_effective_bandwidths_and_latencies():
    network = build_network(cluster(routing="static"))
    assert (network.num_endpoints, (network.level > 0).sum(), (network.level == SCALE_UP).sum()) == (2048, 96, 256)
    assert sorted(set(network.capacity_bytes_per_s)) == pytest.approx([0.85 * 50e9, 0.8 * 200e9])
    assert set(network.cables) == {1}
    assert route(network, 0, 8, "static").latency_s[0] == pytest.approx(2.8e-6)
    assert route(network, 0, 2040, "static").latency_s[0] == pytest.approx(3.7e-6)


def test_bundles_of_an_adaptive_network_carry_as_much():
    single, bundled = build_network(cluster(), bundle=False), build_network(cluster())
    assert bundled.num_links < single.num_links
    assert bundled.capacity_bytes_per_s.sum() == pytest.approx(single.capacity_bytes_per_s.sum())


@pytest.mark.parametrize(
    "topology",
    ["fat_tree2", "fat_tree3", "multi_plane", "multi_rail", "two_zone", "dragonfly", "slim_fly", "torus"],
)
@pytest.mark.parametrize("nodes", [1, 5, 32])
def test_every_topology_has_a_port_for_every_nic(topology, nodes):
    spec = cluster(topology=topology)
    network = build_network(spec, nodes)
    assert network.num_endpoints >= 8 * nodes
    assert np.array_equal(network.node[: 8 * nodes], np.arange(8 * nodes) // 8)
    ends = np.arange(8 * nodes)
    lasts = route(network, ends, ends[::-1] // 8 * 8 + ends % 8, "ecmp")
    assert (lasts.latency_s[ends // 8 != ends[::-1] // 8] > 0).all()
    assert analyse_cluster(spec, nodes).endpoints == network.num_endpoints


def test_fully_connected_switches_carry_up_to_a_thousand_endpoints():
    assert cluster_shape(cluster(topology="fully_connected"), 132) == FullyConnected(33, 32, 1056)
    with pytest.raises(PlanError, match="carry 1056 endpoints, not 1064"):
        cluster_shape(cluster(topology="fully_connected"), 133)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FatTree(0), "a tree has 1 or more"),
        (lambda: cluster_shape(cluster(), 0), "num_nodes = 0"),
        (lambda: FatTree(4096), "take three layers or more planes"),
        (lambda: FatTree(10, 8, num_planes=4, ports_per_node=4), "nearest: 8 endpoints"),
        (lambda: FatTree(10, 8, layers=4), "layers = 4"),
        (lambda: FatTree(2048, num_top_switches=20), "the fewest is 32"),
        (lambda: Dragonfly(2, 4, 2, 10), "take 1 to 9"),
        (lambda: SlimFly(6), "nearest: 7"),
        (lambda: slim_fly_edges(15), "nearest: 16"),
        (lambda: TwoZone(700), "take 45 leaves"),
        (lambda: Torus((0, 2)), "each must be 1 or more"),
        (lambda: cluster_shape(load_as(ClusterSpec, "h800-2048", ["network=none"])), "has no network"),
        (lambda: cluster_shape(cluster(num_endpoints=64)), "take 2048 or more"),
        (lambda: cluster_shape(cluster(topology="dragonfly", switch_ports=16)), "the most endpoints are 1056"),
    ],
)
def test_a_shape_that_cannot_be_wired_says_what_can(make, message):
    with pytest.raises(PlanError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_hundred_thousand_endpoints_need_no_graph():
    # Five switches of 72 ports per 4 x 324 endpoints; the tree is the same at every size, so a small one is counted.
    facts, small = analyse(FatTree(93_312, 72, 3)), build(FatTree(128, 8, 3))
    assert (facts.endpoints, facts.switches, facts.links) == (93_312, 5 * 72**2 // 4, 72**3 // 2)
    assert (small.num_switches, small.num_links // 2 - 128) == (5 * 8**2 // 4, 8**3 // 2)
    assert facts.bisection_bytes_per_s == 93_312 / 2 * 50e9


@pytest.mark.parametrize(("switch_ports", "nics"), [(64, 8), (40, 1), (5, 3), (7, 1)])
def test_two_zones_that_are_too_large_say_what_fits(switch_ports: int, nics: int):
    spec = NetworkSpec(topology="two_zone", switch_ports=switch_ports, nics_per_node=nics, bandwidth_bytes_per_s=1.0)
    with pytest.raises(PlanError, match=r"(\d+) endpoints fit in both zones") as refusal:
        network_shape(spec, 10**6)
    most = int(str(refusal.value).split()[-6])
    assert analyse(network_shape(spec, most)).endpoints >= most


def test_two_zones_of_one_node_each_have_no_inner_path():
    spec = NetworkSpec(topology="two_zone", switch_ports=5, nics_per_node=1, bandwidth_bytes_per_s=1.0)
    assert analyse(network_shape(spec, 2)).endpoints == 2


def test_the_network_of_fire_flyer_2_has_the_ports_and_switches_that_it_was_bought_with():
    cluster = load_as(ClusterSpec, "fire-flyer-2")
    shape = cluster_shape(cluster)
    assert isinstance(shape, TwoZone)
    assert (shape.counts().switches, shape.num_leaves, shape.num_spines) == (122, 40, 20)
    per_zone = shape.ports_per_zone + shape.num_storage_nodes + shape.num_joining_switches * shape.cross_links
    assert (2 * shape.nodes_per_zone, 2 * per_zone) == (1250, 1600)
    few = cluster.model_copy(update={"num_nodes": 100})
    assert cluster_shape(few).counts().switches == 122
    assert cluster_shape(cluster, 100).counts().switches < 20
