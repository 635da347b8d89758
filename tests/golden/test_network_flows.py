"""Flows over the papers' networks: planes against rails, a dead plane, ECMP, in-cast, zones, experts.

Sources: arXiv 2505.09343 (5.1, 5.2, figures 5 to 8), arXiv 2412.19437 (2.1.2, 3.2.2), arXiv 2408.14158 (III, VI).
"""

from __future__ import annotations

import numpy as np
import pytest

from cofire.network.builders import LinkSpeed, build, build_network
from cofire.network.collective_time import Group, Wire, collective_time_s
from cofire.network.collectives import double_tree_all_reduce, hierarchical_all_reduce
from cofire.network.double_tree import zoned_double_tree
from cofire.network.expert_traffic import dispatch_token_bytes, expert_traffic, sample_experts
from cofire.network.flowsim import (
    LANE_SHARES,
    Failure,
    FlowResult,
    Flows,
    SendControl,
    links_at,
    simulate_flows,
)
from cofire.network.patterns import Pattern, all_to_all, expert_pattern, place
from cofire.network.routing import route
from cofire.network.shapes import FatTree, TwoZone
from cofire.network.topology import Network
from cofire.spec import load_as
from cofire.spec.hardware import ClusterSpec

# H800 nodes: 160 GB/s of NVLink and 42.5 of 50 GB/s of a port are reached.
SPEED = LinkSpeed(42.5e9, 2.8e-6, 3.7e-6, 160e9, 3.3e-6)


def network(planes: int, nodes: int = 16, switch_ports: int = 16) -> Network:
    """Nodes of eight ports: eight planes of two layers, or one plane of three with leaves by rail."""
    layers = 2 if planes > 1 else 3
    return build(FatTree(nodes * 8, switch_ports, layers, 1.0, planes, 8, planes == 1), SPEED, bundle=True)


def run(built: Network, pattern: Pattern) -> FlowResult:
    return simulate_flows(built, pattern.routes, pattern.flows)


def test_eight_planes_equal_one_plane_of_eight_rails_in_all_to_all_within_one_percent():
    times = [run(net, all_to_all(net, 1e6)).makespan_s for net in (network(8), network(1))]
    assert times[0] == pytest.approx(times[1], rel=0.01)
    group = Group(16, 8, Wire(3.3e-6, 160e9), Wire(3.7e-6, 42.5e9))
    assert times[0] == pytest.approx(collective_time_s("all_to_all", 128e6, group, "forwarded"), rel=0.01)


def test_eight_planes_equal_one_plane_of_eight_rails_in_all_reduce_within_one_percent():
    messages = hierarchical_all_reduce(16, 8, 1e9)
    times = [run(net, place(net, messages)).makespan_s for net in (network(8), network(1))]
    assert times[0] == pytest.approx(times[1], rel=0.01)
    group = Group(16, 8, Wire(3.3e-6, 160e9), Wire(3.7e-6, 42.5e9))
    assert times[0] == pytest.approx(collective_time_s("all_reduce", 1e9, group, "hierarchical"), rel=0.01)


@pytest.mark.parametrize("planes", [2, 4, 8])
def test_a_dead_plane_leaves_the_others_share_of_the_bandwidth(planes: int):
    net = build(FatTree(16 * planes, 16, 2, 1.0, planes, planes), SPEED, bundle=True)
    whole, less = (run(net, all_to_all(net, 1e7, failed_planes=dead)).makespan_s for dead in ((), (0,)))
    assert whole / less == pytest.approx((planes - 1) / planes, rel=0.01)


def test_a_plane_that_dies_halfway_slows_down_the_second_half_alone():
    net = network(8)
    before, after = all_to_all(net, 1e7), all_to_all(net, 1e7, failed_planes=(0,))
    whole = run(net, before).makespan_s
    dead = links_at(net, planes=(0,))
    failure = Failure(whole / 2, dead, after.routes)
    result = simulate_flows(net, before.routes, before.flows, failures=(failure,))
    assert result.makespan_s == pytest.approx(whole * (0.5 + 0.5 * 8 / 7), rel=0.01)
    assert not np.isfinite(
        simulate_flows(net, before.routes, before.flows, failures=(Failure(whole / 2, dead),)).makespan_s
    )


def test_ecmp_collides_where_static_and_adaptive_routing_do_not():
    """Rings between leaves, as all-gather and reduce-scatter send (ISCA'25, figure 8)."""
    net = build(FatTree(128, 16, 2, 1.0, 1, 1), SPEED)
    source = np.arange(128)
    flows = Flows(np.full(128, 1e8))
    times = {}
    for routing in ("ecmp", "static", "adaptive"):
        routes = route(net, source, (source + 8) % 128, routing)
        times[routing] = simulate_flows(net, routes, flows).makespan_s
    alone = 1e8 / 42.5e9 + 3.7e-6
    assert times["static"] == pytest.approx(alone, rel=0.01)
    assert times["adaptive"] == pytest.approx(alone, rel=0.01)
    assert times["ecmp"] >= 1.9 * alone


def test_request_to_send_bounds_in_cast_and_loses_no_throughput():
    """A client reads from 60 storage nodes; it lets 8 send at once."""
    net = build(FatTree(64, 16, 2, 1.0, 1, 1), SPEED, bundle=True)
    source = np.arange(1, 61)
    routes = route(net, source, np.zeros_like(source), "static")
    flows = Flows(np.full(60, 4e6), receiver=np.zeros(60, np.int64))
    free = simulate_flows(net, routes, flows)
    asked = simulate_flows(net, routes, flows, control=SendControl(8, grant_s=5.6e-6))
    assert (free.senders_peak, asked.senders_peak) == (60, 8)
    assert free.makespan_s == pytest.approx(60 * 4e6 / 42.5e9, rel=0.01)
    assert asked.makespan_s == pytest.approx(free.makespan_s, rel=0.01)
    # The cost is a longer wait for a single answer, the gain that the first answers come early.
    assert asked.finish_s.mean() < 0.6 * free.finish_s.mean()


def test_a_lane_keeps_storage_from_slowing_down_an_all_reduce():
    """In-cast at the port of a rank: with classes the reduction keeps its share, without it gets a 31st."""
    net = build(FatTree(64, 16, 2, 1.0, 1, 1), SPEED, bundle=True)
    source = np.arange(1, 32)
    routes = route(net, source, np.zeros_like(source), "static")
    flows = Flows(np.full(31, 1e8), lane=np.array([0] + [2] * 30))
    alone = 1e8 / 42.5e9
    shared = (LANE_SHARES[0] + LANE_SHARES[2]) / LANE_SHARES[0]
    with_lanes = simulate_flows(net, routes, flows, lane_shares=LANE_SHARES)
    assert with_lanes.finish_s[0] == pytest.approx(alone * shared, rel=0.01)
    assert simulate_flows(net, routes, flows).finish_s[0] == pytest.approx(31 * alone, rel=0.01)
    assert with_lanes.makespan_s == pytest.approx(31 * alone, rel=0.01)


def test_zone_aware_trees_put_the_data_once_each_way_between_two_zones():
    shape = TwoZone(90, 2, 16, 12, 8, 2, 2)
    net = build(shape, LinkSpeed(25e9), bundle=True)
    joining = net.level == 3
    crossing = {}
    for name, trees in (("plain", None), ("zoned", zoned_double_tree(90, 90))):
        messages = double_tree_all_reduce(180, 1e8, 8, trees)
        routes = route(net, messages.source, messages.target, "adaptive")
        result = simulate_flows(net, routes, messages.flows())
        crossing[name] = result.link_bytes[joining[net.head]].sum()
    # Up and down half the data per tree: twice half into the joining switches each way.
    assert crossing["zoned"] == pytest.approx(2 * 1e8)
    assert crossing["plain"] >= 3 * crossing["zoned"]


@pytest.fixture(scope="module")
def h800() -> ClusterSpec:
    return load_as(ClusterSpec, "h800-2048")


def test_an_all_to_all_on_h800_nodes_is_in_the_range_that_deepep_reports(h800: ClusterSpec):
    """A sanity check and no prediction: the port's efficiency comes from the same figure (ISCA'25: > 40 GB/s)."""
    net = build_network(h800, 32)
    time = run(net, all_to_all(net, 1e6)).makespan_s
    assert 40e9 < 31 * 8 * 1e6 / time < 50e9


# Dispatch and combine over 4 to 16 nodes, read off figure 7. Two nodes are left out: there 43.05 and 42.47 are reported
# and 59 simulated: with half of the copies staying in the node, what binds is nothing that is modelled here.
DEEPEP = [(4, 58.02e9, 56.96e9), (8, 50.58e9, 48.54e9), (16, 45.34e9, 41.60e9)]


@pytest.mark.parametrize(("nodes", "dispatch", "combine"), DEEPEP)
def test_experts_traffic_is_near_the_logical_bandwidth_that_deepep_reports(
    h800: ClusterSpec, nodes: int, dispatch: float, combine: float
):
    """DeepEP also counts copies that stay in the node. A sanity check, as above; 256 of 4096 tokens of each device."""
    net = build_network(h800, nodes)
    index = np.stack([sample_experts(256, 256, 8, 8, 4, seed=d) for d in range(8 * nodes)])
    traffic = expert_traffic(index, 256, 8)
    reached = np.mean([len(set(row // (256 // nodes))) for row in index.reshape(-1, 8)]) * 256
    for back, token_bytes, reported in ((False, dispatch_token_bytes(7168), dispatch), (True, 14336.0, combine)):
        time = run(net, expert_pattern(net, traffic, token_bytes, back)).makespan_s
        assert reached * token_bytes / time == pytest.approx(reported, rel=0.1)
