"""``cofire network`` as a user types it: against figures worked out by hand, published ones, and what always holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Context
from typer.main import get_command

from cofire.cli.main import build_app, main
from cofire.network.flowsim import simulate_flows
from cofire.network.scenario import PATTERN_ALGORITHMS, Traffic, TrafficRun, simulate_traffic
from cofire.network.survey import NetworkSurvey, RoutingSurvey, TopologyComparison
from cofire.spec import ClusterSpec, load_as

# What an H800 node reaches: 85 % of 50 GB/s at a port, 80 % of 200 GB/s over the fast links; latencies in a leaf.
PORT, FAST, PORT_S, FAST_S = 42.5e9, 160e9, 2.8e-6, 3.3e-6


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["network", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> TrafficRun:
    return TrafficRun.model_validate(run_json(capsys, "simulate", *words))


def seconds(result: TrafficRun) -> float:
    assert result.makespan_s is not None
    return result.makespan_s.value


# -- show, compare, route, host -----------------------------------------------------------------------


def test_the_network_of_h800_nodes_has_table_3s_switches_and_says_what_binds(capsys: pytest.CaptureFixture[str]):
    found = NetworkSurvey.model_validate(run_json(capsys, "show", "h800-2048"))
    assert (found.facts.switches, found.facts.links, found.facts.endpoints) == (96, 2_048, 2_048)
    assert found.cost.per_endpoint == pytest.approx(4_390, abs=11)
    assert found.port_bytes_per_s.label == "measured"
    assert found.binds.startswith("the ports")
    code, out, _ = run(capsys, "show", "h800-2048")
    assert code == 0
    for word in ("8 planes of 2 layers", "calibrated", "124.8 kW", "An all-to-all waits for the ports"):
        assert word in out


def test_fire_flyers_zones_bind_where_everybody_talks_to_everybody(capsys: pytest.CaptureFixture[str]):
    found = run_json(capsys, "show", "fire-flyer-2", "--prices", "fire-flyer")
    assert found["facts"]["switches"] == 122
    assert found["cost"]["total"] == pytest.approx(350, rel=0.05)
    assert found["binds"].startswith("the links that join the zones")


def test_a_file_of_prices_replaces_the_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    price = "switch = 10.0\noptical_link = 1.0\nelectrical_link = 1.0\nsource = 'mine'\nswitch_watts = 100.0\n"
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f"[mine]\n{price}")
    two.write_text(f"[mine]\n{price}\n[theirs]\n{price.replace('10.0', '20.0')}")
    assert run_json(capsys, "show", "h800-2048", "--prices", str(one))["cost"]["total"] == 96 * 10 + 2_048
    assert run_json(capsys, "show", "h800-2048", "--prices", f"{two}:theirs")["cost"]["total"] == 96 * 20 + 2_048
    code, _, err = run(capsys, "show", "h800-2048", "--prices", str(two))
    assert code == 2
    assert "holds 2 price lists: mine, theirs" in err


def test_table_3_comes_out_as_printed(capsys: pytest.CaptureFixture[str]):
    found = TopologyComparison.model_validate(run_json(capsys, "compare", "--table3"))
    assert [row.name for row in found.rows] == ["FT2", "MPFT", "FT3", "SF", "DF"]
    for row in found.rows:
        assert row.facts is not None
        assert row.cost is not None
        assert row.printed is not None
        assert (row.facts.endpoints, row.facts.switches, row.facts.links) == (
            row.printed.endpoints,
            row.printed.switches,
            row.printed.links,
        )
        assert round(row.cost.total / 1e6) == row.printed.million_usd
        assert row.cost.per_endpoint / 1e3 == pytest.approx(row.printed.thousand_usd_per_endpoint, abs=0.05)
    out = run(capsys, "compare", "--table3")[1]
    assert out.count("same counts") == 5


def test_at_16384_ports_planes_are_cheapest_and_two_layers_say_why_they_cannot(capsys: pytest.CaptureFixture[str]):
    found = TopologyComparison.model_validate(run_json(capsys, "compare"))
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.cheapest] == ["multi_plane"]
    assert "take three layers or more planes" in rows["fat_tree2"].refused
    assert rows["torus"].ports_used == 7
    out = run(capsys, "compare")[1]
    assert "Cheapest that carries an exchange of all ports at full rate: multi-plane: 4,381 USD per port" in out
    assert "fat tree, 2 layers: cannot be built" in out


def test_trees_of_equal_price_share_the_first_place_and_oversubscription_loses_it(capsys: pytest.CaptureFixture[str]):
    words = ["compare", "--endpoints", "2048", "--switch-ports", "64"]
    found = TopologyComparison.model_validate(run_json(capsys, *words))
    assert {row.name for row in found.cheapest} >= {"fat_tree2", "multi_plane", "multi_rail"}
    thin = TopologyComparison.model_validate(run_json(capsys, *words, "--set", "oversubscription=3"))
    loads = {row.name: row.facts.all_to_all_load for row in thin.rows if row.facts is not None}
    assert loads["fat_tree2"] == pytest.approx(3, rel=0.1)
    assert "fat_tree2" not in {row.name for row in thin.cheapest}


def test_a_shift_collides_under_ecmp_alone(capsys: pytest.CaptureFixture[str]):
    found = RoutingSurvey.model_validate(run_json(capsys, "route", "h800-2048"))
    rows = {row.routing: row for row in found.rows}
    assert rows["static"].largest == rows["adaptive"].largest == 1.0
    assert rows["ecmp"].largest >= 3.0
    for row in found.rows:
        # Every one of 2,048 flows goes up once and down once, over 2,048 cables.
        assert row.mean == pytest.approx(1.0)
        assert sum(row.links_by_load.values()) == 4_096
    assert sum(load * links for load, links in rows["ecmp"].links_by_load.items()) == 4_096
    only = run_json(capsys, "route", "h800-2048", "--routing", "static", "--nodes", "64", "--shift", "1")
    assert [row["routing"] for row in only["rows"]] == ["static"]


def test_the_shared_root_port_binds_a_fire_flyer_host_and_bridges_lift_it(capsys: pytest.CaptureFixture[str]):
    found = run_json(capsys, "host", "fire-flyer-2")
    first, second, third = found["variants"]
    assert [first["bounds"]["passes"][step] for step in ("device_to_host", "reduce", "network")] == [8, 9, 5]
    assert first["bounds"]["binds"] == "shared root port"
    assert first["bounds"]["ceiling_bytes_per_s"]["low"] <= 8.1e9 <= first["bounds"]["ceiling_bytes_per_s"]["high"]
    assert second["bounds"]["bounds_bytes_per_s"]["host memory"] == pytest.approx(320e9 / 30)
    assert "bridge_bandwidth_bytes_per_s" in third["refused"]
    words = ["host", "fire-flyer-2", "--nodes", "2", "--set", "cluster.host.bridge_bandwidth_bytes_per_s=300e9"]
    paired = run_json(capsys, *words)["variants"][2]["bounds"]["ceiling_bytes_per_s"]
    assert paired["low"] <= 19.18e9 <= paired["high"]
    assert "A ring of PCIe peers" in run(capsys, *words)[1]


# -- simulate -----------------------------------------------------------------------------------------


def test_an_all_to_all_takes_what_leaves_a_node_over_its_ports(capsys: pytest.CaptureFixture[str]):
    result = simulated(capsys, "h800-2048", "--nodes", "4", "--size", "320MB")
    assert (result.algorithm, result.num_ranks, result.routing) == ("forwarded", 32, "adaptive")
    assert seconds(result) == pytest.approx(0.75 * 320e6 / PORT + PORT_S + FAST_S, rel=1e-9)
    assert result.algorithm_bytes_per_s == pytest.approx(320e6 / seconds(result))
    assert result.bus_bytes_per_s == pytest.approx(320e6 * 31 / 32 / seconds(result))
    assert result.bottlenecks[0].link == "port 0 of node 0 -> leaf 0 of plane 0"
    assert result.bottlenecks[0].alike == 32
    assert result.bottlenecks[0].carried_bytes == pytest.approx(240e6)


def test_a_ring_of_four_nodes_takes_six_steps(capsys: pytest.CaptureFixture[str]):
    # One port per node, 85 % of 25 GB/s, all four below one leaf or two.
    result = simulated(capsys, "fire-flyer-2", "--nodes", "2", "--pattern", "ring", "--size", "186MiB")
    assert (result.num_ranks, result.devices_per_rank) == (2, 8)
    sent = 186 * 2**20
    assert seconds(result) == pytest.approx(sent / 21.25e9, rel=0.01)
    assert result.limit_s == pytest.approx(sent / 21.25e9)


def test_a_dead_plane_costs_an_eighth_from_the_time_of_its_death_on(capsys: pytest.CaptureFixture[str]):
    words = ["h800-2048", "--nodes", "8", "--size", "8GB"]
    whole = seconds(simulated(capsys, *words))
    dead = seconds(simulated(capsys, *words, "--fail-plane", "3"))
    late = simulated(capsys, *words, "--fail-plane", "3@50ms")
    assert dead == pytest.approx(whole * 8 / 7, rel=0.001)
    assert seconds(late) == pytest.approx(0.05 + (whole - 0.05) * 8 / 7, rel=0.001)
    assert "Plane 3 was down after 50 ms." in run(capsys, "simulate", *words, "--fail-plane", "3@0.05")[1]
    assert "(after the end: nothing was lost)" in run(capsys, "simulate", *words, "--fail-plane", "3@9s")[1]


def test_an_in_cast_shares_the_last_link_and_a_receiver_may_count_senders(capsys: pytest.CaptureFixture[str]):
    words = ["h200-1024-roce", "--nodes", "16", "--pattern", "incast", "--size", "4MB"]
    free = simulated(capsys, *words)
    asked = simulated(capsys, *words, "--set", "traffic.senders_max=4")
    assert (free.senders_peak, asked.senders_peak) == (15, 4)
    assert seconds(free) == pytest.approx(15 * 4e6 / 40e9 + 5.6e-6, rel=1e-6)
    assert free.bottlenecks[0].link == "leaf 0 of plane 0 -> port 0 of node 0"


def test_ecmp_slows_down_a_shift_and_static_routing_does_not(capsys: pytest.CaptureFixture[str]):
    words = ["h200-1024-roce", "--pattern", "shift", "--size", "100MB"]
    for routing, least, most in (("static", 1.0, 1.01), ("adaptive", 1.0, 1.01), ("ecmp", 1.9, 10)):
        result = simulated(capsys, *words, "--routing", routing)
        assert least <= seconds(result) / result.limit_s <= most
        assert result.routing == routing


def test_experts_of_another_model_are_dispatched_and_combined(capsys: pytest.CaptureFixture[str]):
    words = ["h800-2048", "--nodes", "4", "--pattern", "experts", "--set", "traffic.experts.tokens_per_device=512"]
    dispatch = simulated(capsys, *words)
    combine = simulated(capsys, *words, "--algorithm", "combine")
    # 1 byte and a scale of 4 per 128 numbers against 2 bytes.
    assert seconds(combine) / seconds(dispatch) == pytest.approx(2 / (1 + 4 / 128), rel=0.01)
    small = simulated(capsys, *words, "--set", "traffic.model=deepseek-v2-lite")
    assert small.traffic.experts.hidden_size == 2048
    assert small.traffic.experts.num_routed_experts == 64
    assert seconds(small) < seconds(dispatch)


def test_keeping_rates_for_a_while_makes_times_late_by_less_than_a_percent_and_never_early():
    question = Traffic.model_validate({"pattern": "experts", "experts": {"tokens_per_device": 128}})
    kept = simulate_traffic(load_as(ClusterSpec, "h800-2048"), question, 4)
    exact = simulate_flows(kept.network, kept.pattern.routes, kept.pattern.flows)
    assert 1 - 1e-9 <= seconds(kept.run) / (exact.makespan_s) < 1.01
    assert kept.run.num_events < exact.num_events


@pytest.mark.parametrize("pattern", PATTERN_ALGORITHMS)
@pytest.mark.parametrize("name", ["h800-2048", "h200-1024-roce", "fire-flyer-2"])
def test_nothing_is_faster_than_the_links_at_devices_allow(name: str, pattern: str):
    cluster = load_as(ClusterSpec, name)
    for algorithm in PATTERN_ALGORITHMS[pattern]:
        if algorithm == "zoned_double_tree" and name != "fire-flyer-2":
            continue
        if algorithm == "forwarded" and name == "fire-flyer-2":
            continue
        question = {"pattern": pattern, "algorithm": algorithm, "experts": {"tokens_per_device": 64}}
        result = simulate_traffic(cluster, Traffic.model_validate(question), 4).run
        time = seconds(result)
        assert time >= result.limit_s
        # Closed forms know no collisions, skew or sharing; they are within a factor all the same.
        assert 0.6 < time / result.formula_s.value < 2.0
        assert all(0 <= use.mean <= use.busiest <= 1 + 1e-9 for use in result.uses)
        assert result.makespan_s is not None
        assert result.makespan_s.low <= time <= result.makespan_s.high


def test_zone_aware_trees_beat_plain_ones_between_two_zones(capsys: pytest.CaptureFixture[str]):
    words = ["fire-flyer-2", "--nodes", "96", "--pattern", "double_tree", "--size", "186MiB"]
    plain, zoned = (simulated(capsys, *words, "--algorithm", name) for name in ("double_tree", "zoned_double_tree"))
    assert seconds(zoned) < seconds(plain)
    assert plain.bottlenecks[0].kind in ("leaf to joining switch", "joining switch to leaf")


def test_a_trace_has_a_span_per_flow(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "flows.json"
    words = ["h800-2048", "--nodes", "2", "--pattern", "all_reduce", "--trace", str(path)]
    result = simulated(capsys, *words)
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    ends = [event["ts"] for event in events if event["ph"] == "e"]
    assert len(ends) == result.num_flows
    assert max(ends) == pytest.approx(1e6 * seconds(result))
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} >= {"node 0, port 0", "node 1, port 15"}


def test_the_note_of_a_simulation_says_how_it_knows(capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "simulate", "h800-2048", "--nodes", "2", "--pattern", "all_reduce")
    assert (code, err) == (0, "")
    for word in (
        "simulated",
        "closed form",
        "least, by the devices' links",
        "Full longest",
        "measured (arXiv",
        "classes",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["show", "h100-8"], "h100-8 has no network; add a [network] table"),
        (["show", "h800-2049"], "'h800-2049' is neither a preset nor a .toml or .json file; nearest: h800-2048"),
        (["show", "h800-2048", "--set", "network.switch_port=3"], "nearest: network.switch_ports"),
        (["compare", "--endpoints", "0"], "endpoints = 0: a network joins 1 or more"),
        (["compare", "--prices", "nope"], "price list 'nope' is not one of isca25, fire-flyer"),
        (["compare", "--prices", "/nope.toml"], "/nope.toml: no price file can be read here"),
        (
            ["route", "h800-2048", "--routing", "magic"],
            "network.routing = 'magic' is not one of ecmp, static, adaptive",
        ),
        (["route", "h100-8", "--routing", "ecmp"], "h100-8 has no network"),
        (["route", "h800-2048", "--nodes", "4", "--shift", "4"], "sends each node to itself; take 1 to 3"),
        (["host", "h800-2048", "--set", "host=none"], "h800-2048 has no host; add a [host] table"),
        (["simulate", "h800-2048", "--pattern", "al_to_all"], "is not one of all_to_all, all_reduce"),
        (["simulate", "h800-2048", "--size", "3XB"], "--size '3XB' is not a number with one of B, KB, KiB"),
        (["simulate", "h800-2048", "--size", "0"], "size_bytes = 0.0 must be greater than 0"),
        (["simulate", "h800-2048", "--algorithm", "rign", "--pattern", "all_reduce"], "or auto; nearest: ring"),
        (
            ["simulate", "h800-2048", "--fail-plane", "9", "--nodes", "2"],
            "failed plane 9 does not exist; take one of 0",
        ),
        (["simulate", "h800-2048", "--pattern", "experts", "--size", "1MB"], "set traffic.experts.tokens_per_device"),
        (["simulate", "h800-2048", "--set", "traffic.experts=3"], "experts = 3 must be"),
        (["simulate", "h800-2048", "--set", "traffic.experts=3", "--set", "traffic.model=tiny"], "'model'"),
        (["simulate", "h800-2048", "--fail-plane", "x"], "is not a plane's number"),
        (["simulate", "h800-2048", "--fail-plane", "1", "--fail-plane", "2@1ms"], "names 2 times"),
        (
            ["simulate", "h800-2048", "--pattern", "experts"],
            "256 experts do not lie evenly on 2048 ports; take 32 nodes",
        ),
        (["simulate", "h800-2048", "--pattern", "ring"], "ring over 2048 ports has up to 67,076,096 flows"),
        (["simulate", "h800-2048", "--pattern", "incast", "--nodes", "1"], "incast needs 2 nodes or more, not 1"),
        (["simulate", "h800-2048", "--set", "traffic.model=llama3.1-405b"], "has no experts to dispatch to"),
        (["simulate", "h800-2048", "--set", "traffic.shfit=2"], "unknown key 'shfit'; nearest: shift"),
        (["simulate", "h800-2048", "--trace", "/nowhere/x.json"], "in a trace the most is 100,000; take 108 nodes"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str], text: str):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1


def test_a_trace_must_be_json(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "simulate", "h800-2048", "--trace", "x.txt")
    assert code == 2
    assert "must end in .json" in err


def test_shells_are_offered_presets_patterns_routings_and_prices():
    group = get_command(build_app()).commands["network"]
    context = Context(group)

    def offered(command: str, parameter: str, typed: str) -> list[str]:
        known = {param.name: param for param in group.commands[command].params}
        return [item.value for item in known[parameter].shell_complete(context, typed)]

    assert offered("show", "cluster", "h800") == ["h800-2048"]
    assert offered("simulate", "pattern", "all_") == ["all_to_all", "all_reduce", "all_gather"]
    assert offered("simulate", "algorithm", "d") == ["direct", "double_tree", "dispatch"]
    assert offered("route", "routing", "") == ["ecmp", "static", "adaptive"]
    assert offered("compare", "prices", "fire") == ["fire-flyer"]
