"""One question about traffic, asked by name and answered by simulation: who sends what over which cluster.

A traffic's pattern becomes flows (``patterns``, ``collectives``), these are simulated (``flowsim``), and the result
stands beside the closed form (``collective_time``) and beside what the ports alone would need. Bandwidths are named as
in nccl-tests: the algorithm's is the size over the time, the bus bandwidth is comparable between numbers of ranks.

Left out: several collectives at once, computation beside them, and what the host adds (``cofire.network.host``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cofire.errors import PlanError
from cofire.network import patterns
from cofire.network.builders import build_network
from cofire.network.collective_time import Algorithm, Group, Kind, Wire, collective_time_s
from cofire.network.collectives import Messages, double_tree_all_reduce, hierarchical_all_reduce, port_rings, port_trees
from cofire.network.double_tree import zoned_double_tree
from cofire.network.expert_traffic import (
    ExpertTraffic,
    dispatch_token_bytes,
    expert_exchange_time_s,
    expert_traffic,
    groups_reached,
    sample_experts,
)
from cofire.network.flowsim import Failure, FlowResult, Flows, SendControl, link_name, links_at, simulate_flows
from cofire.network.patterns import Pattern
from cofire.network.routing import device_routes
from cofire.network.topology import Ints, Network
from cofire.spec.figure import Figure, Label, weakest
from cofire.spec.hardware import ClusterSpec, Routing
from cofire.spec.messages import nearest
from cofire.spec.spec_type import NonNegative, Positive, Spec

PatternName = Literal[
    "all_to_all",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "ring",
    "double_tree",
    "experts",
    "incast",
    "shift",
]

# The first that fits is taken where none is named; ring and double_tree are all-reduces.
PATTERN_ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_to_all": ("forwarded", "direct"),
    "all_reduce": ("hierarchical", "ring", "double_tree", "zoned_double_tree"),
    "reduce_scatter": ("ring",),
    "all_gather": ("ring",),
    "ring": ("ring",),
    "double_tree": ("double_tree", "zoned_double_tree"),
    "experts": ("dispatch", "combine"),
    "incast": ("direct",),
    "shift": ("direct",),
}

# What fits into the memory of a small machine: entries of flows by links.
_ENTRIES_MAX = 40_000_000
# Flows that wait for each other, if hardly two of them fare alike: a minute.
_UNLIKE_MAX = 60_000
# Tokens whose experts are drawn, over all devices.
_SAMPLED_TOKENS = 131_072
# Where many flows of different sizes wait for nobody, rates stay for this part of the least time.
_STEP = 1e-3

PositiveSize = Annotated[float, Field(gt=0)]


class ExpertLoad(Spec):
    """What a mixture-of-experts layer dispatches; the defaults are DeepSeek-V3's."""

    num_routed_experts: Positive = 256
    num_experts_per_token: Positive = 8
    num_expert_groups: Positive = 8
    num_limited_groups: Positive | None = 4
    hidden_size: Positive = 7168
    tokens_per_device: Positive = 4096
    dispatch_bytes: PositiveSize = Field(default=1.0, description="per number; FP8")
    combine_bytes: PositiveSize = Field(default=2.0, description="per number; BF16")


class Traffic(Spec):
    """What is sent.

    ``size_bytes`` is the whole data of a rank, as in ``collective_time_s``: of an in-cast and of a shift what each
    sender sends; experts count in tokens instead. ``shift`` counts nodes. Planes in ``failed_planes`` are down from
    ``fail_at_s`` on; what is on its way then goes on over the others.
    """

    pattern: PatternName
    algorithm: str = "auto"
    size_bytes: PositiveSize = 1e9
    experts: ExpertLoad = ExpertLoad()
    shift: Positive | None = None
    senders_max: Positive | None = None
    failed_planes: tuple[NonNegative, ...] = ()
    fail_at_s: Annotated[float, Field(ge=0)] = 0.0
    seed: NonNegative = 0


class LinkUse(Spec):
    """How links of one kind were used: part of the capacity, mean over time, and the longest that one was full."""

    kind: str
    num_links: int
    mean: float
    busiest: float
    full_share: float


class Bottleneck(Spec):
    """A link that was full for ``full_s``; ``alike`` links of its kind were as long."""

    link: str
    kind: str
    carried_bytes: float
    full_s: float
    alike: int


class TrafficRun(Spec):
    """What came out; times that never end are none.

    ``makespan_s`` is simulated, its interval is that of the closed form. ``limit_s`` is what the links at the devices
    need at least for the data alone, however it is sent. Logical bandwidth counts what stays in a node, as DeepEP does.
    """

    cluster: str
    traffic: Traffic
    algorithm: str
    routing: Routing
    num_nodes: int
    num_ranks: int
    devices_per_rank: float
    makespan_s: Figure | None
    formula_s: Figure
    limit_s: float
    algorithm_bytes_per_s: float | None
    bus_bytes_per_s: float | None
    logical_bytes_per_s: float | None
    inputs: dict[str, Figure]
    uses: tuple[LinkUse, ...]
    bottlenecks: tuple[Bottleneck, ...]
    senders_peak: int
    num_flows: int
    num_flow_classes: int
    num_link_classes: int
    num_events: int
    resolution_s: float
    build_s: float
    simulate_s: float

    @property
    def label(self) -> Label:
        """Of the weakest figure that went in."""
        return weakest({figure.label for figure in self.inputs.values()})


@dataclass(frozen=True, eq=False)
class Simulation:
    """A run with what it was made of, for a trace or a closer look."""

    run: TrafficRun
    network: Network
    pattern: Pattern
    result: FlowResult


@dataclass(frozen=True, eq=False)
class _Stage:
    """What every pattern needs: the network, who is on it, and how fast it is."""

    cluster: ClusterSpec
    traffic: Traffic
    algorithm: str
    network: Network
    num_nodes: int
    width: int
    routing: Routing

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.width

    def messages(self) -> Messages:
        """Return the messages of a collective."""
        name, size = self.traffic.pattern, self.traffic.size_bytes
        if self.algorithm == "ring":
            kind = name if name in ("reduce_scatter", "all_gather") else "all_reduce"
            return port_rings(kind, self.num_nodes, self.width, size)
        if self.algorithm == "double_tree":
            return port_trees(self.num_nodes, self.width, size)
        if self.algorithm == "zoned_double_tree":
            near = int((self.network.plane[: self.num_ranks] == self.network.plane[0]).sum())
            trees = zoned_double_tree(near, self.num_ranks - near) if near < self.num_ranks else None
            return double_tree_all_reduce(self.num_ranks, size, trees=trees)
        return hierarchical_all_reduce(self.num_nodes, self.width, size)


def simulate_traffic(
    cluster: ClusterSpec,
    traffic: Traffic,
    num_nodes: int | None = None,
    flows_max: int | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Simulation:
    """Send traffic over a cluster's network.

    Args:
        cluster: With a network; its ``routing`` counts.
        traffic: What is sent, one rank per NIC port, node by node.
        num_nodes: Nodes that take part, and that the network is built for; none: those of the cluster.
        flows_max: Refuse more flows than this; none: as many as memory holds.
        say: Told what is being done.

    Raises:
        PlanError: The cluster has no network, the pattern does not fit it, or it has too many flows.
    """
    began = time.perf_counter()
    say("building the network")
    stage = _stage(cluster, traffic, num_nodes or cluster.num_nodes)
    _check_size(stage, flows_max)
    say("finding routes")
    loads = _expert_traffic(stage) if traffic.pattern == "experts" else None
    late = traffic.fail_at_s > 0 and bool(traffic.failed_planes)
    pattern = _pattern(stage, loads, () if late else traffic.failed_planes)
    failures: tuple[Failure, ...] = ()
    if late:
        dead = links_at(stage.network, planes=traffic.failed_planes)
        failures = (Failure(traffic.fail_at_s, dead, _pattern(stage, loads, traffic.failed_planes).routes),)
    built = time.perf_counter()
    say(f"simulating {pattern.flows.num_flows:,} flows")
    limit_s = _limit_s(stage, loads)
    resolution_s = 0.0 if len(pattern.flows.before) or traffic.senders_max else _STEP * limit_s
    control = (
        SendControl(traffic.senders_max, 2 * float(pattern.routes.latency_s.max())) if traffic.senders_max else None
    )
    result = simulate_flows(
        stage.network, pattern.routes, pattern.flows, control=control, failures=failures, resolution_s=resolution_s
    )
    done = time.perf_counter()
    run = _summary(stage, pattern, result, limit_s, loads)
    run = run.model_copy(update={"resolution_s": resolution_s, "build_s": built - began, "simulate_s": done - built})
    return Simulation(run, stage.network, pattern, result)


def _stage(cluster: ClusterSpec, traffic: Traffic, num_nodes: int) -> _Stage:
    network = build_network(cluster, num_nodes)
    assert cluster.network is not None  # build_network refuses a cluster without one
    width = patterns.ports_of(network, num_nodes).shape[1]
    fast = bool((network.level < 0).any())
    able = PATTERN_ALGORITHMS[traffic.pattern]
    if cluster.network.topology != "two_zone" or width > 1:
        able = tuple(name for name in able if name != "zoned_double_tree")
    if not fast and width > 1:
        able = tuple(name for name in able if name != "forwarded")
    chosen = able[0] if traffic.algorithm == "auto" else traffic.algorithm
    if chosen not in able:
        raise PlanError(
            f"algorithm {chosen!r} does not do {traffic.pattern} on {cluster.name}; take one of {', '.join(able)}, "
            f"or auto{nearest(chosen, able)}"
        )
    if num_nodes * width < 2:
        raise PlanError(f"{num_nodes} node with {width} port sends nothing; take 2 nodes or more")
    return _Stage(cluster, traffic, chosen, network, num_nodes, width, cluster.network.routing)


def _count_flows(stage: _Stage) -> int:
    nodes, width, ranks = stage.num_nodes, stage.width, stage.num_ranks
    inside, across = nodes * width * (width - 1), nodes * (nodes - 1) * width
    if stage.traffic.pattern in ("incast", "shift"):
        return ranks
    passes = 1 if stage.traffic.pattern in ("reduce_scatter", "all_gather") else 2
    return {
        "forwarded": across + inside,
        "direct": ranks * (ranks - 1),
        "dispatch": across + inside,
        "combine": across + inside,
        "hierarchical": 2 * (across + inside),
        "ring": passes * width * ranks * (ranks - 1),
    }.get(stage.algorithm, 32 * width * (ranks - 1))


def _check_size(stage: _Stage, flows_max: int | None) -> None:
    """Refuse what would not fit into memory, before it is built."""
    network, pattern = stage.network, stage.traffic.pattern
    high = network.level[network.num_endpoints :]
    planes = len(set(network.plane[network.num_endpoints :][high > 0]))
    spread = int((high > 1).sum()) // planes if stage.routing == "adaptive" else 1
    waits = 1 if pattern in ("all_to_all", "experts", "incast", "shift") else 3
    most = _ENTRIES_MAX // (4 + 2 * spread) // waits
    hashed = _UNLIKE_MAX if stage.routing == "ecmp" and waits > 1 else None
    for limit, what in ((most, "in memory"), (hashed, "with ecmp, where no two are alike,"), (flows_max, "in a trace")):
        if limit is None or _count_flows(stage) <= limit:
            continue
        fit = [n for n in range(1, stage.num_nodes) if _count_flows(replace(stage, num_nodes=n)) <= limit]
        lean = [name for name in PATTERN_ALGORITHMS[pattern] if name in ("forwarded", "hierarchical")]
        hint = f", or algorithm {lean[0]}" if lean and stage.algorithm not in lean else ""
        raise PlanError(
            f"{pattern} over {stage.num_ranks} ports has up to {_count_flows(stage):,} flows; {what} the "
            f"most is {limit:,}; {f'take {fit[-1]} nodes or fewer' if fit else 'take a smaller node'}{hint}"
        )


def _pattern(stage: _Stage, loads: ExpertTraffic | None, failed: tuple[int, ...]) -> Pattern:
    traffic, network, nodes = stage.traffic, stage.network, stage.num_nodes
    ways: dict[str, Any] = {"routing": stage.routing, "seed": traffic.seed, "failed_planes": failed}
    if loads is not None:
        combine = stage.algorithm == "combine"
        sampled = traffic.experts.tokens_per_device / _sampled(stage)
        pattern = patterns.expert_pattern(network, loads, _token_bytes(stage) * sampled, combine, **ways)
        return pattern
    if traffic.pattern == "all_to_all":
        pair = traffic.size_bytes / stage.num_ranks
        return patterns.all_to_all(network, pair, **ways, forwarded=stage.algorithm == "forwarded", num_nodes=nodes)
    if traffic.pattern not in ("incast", "shift"):
        return patterns.place(network, stage.messages(), **ways, num_nodes=nodes)
    if nodes < 2:
        raise PlanError(f"{traffic.pattern} needs 2 nodes or more, not {nodes}")
    if traffic.pattern == "incast":
        near, device = np.arange(1, nodes), np.zeros(nodes - 1, np.int64)
        far = np.zeros_like(near)
    else:
        step = nodes // 2 if traffic.shift is None else traffic.shift
        if step % nodes == 0:
            raise PlanError(f"shift = {step} of {nodes} nodes sends each node to itself; take 1 to {nodes - 1}")
        near, device = np.divmod(np.arange(stage.num_ranks), stage.width)
        far = (near + step) % nodes
    routes = device_routes(network, (near, device), (far, device), **ways)
    ports = patterns.ports_of(network, nodes)
    flows = Flows(np.full(len(near), float(traffic.size_bytes)))
    if traffic.pattern == "incast":
        flows = replace(flows, receiver=np.zeros(len(near), np.int64))
    return Pattern(ports[near, device], ports[far, device], flows, routes)


def _sampled(stage: _Stage) -> int:
    return min(stage.traffic.experts.tokens_per_device, max(1, _SAMPLED_TOKENS // stage.num_ranks))


def _token_bytes(stage: _Stage) -> float:
    load = stage.traffic.experts
    if stage.algorithm == "combine":
        return dispatch_token_bytes(load.hidden_size, load.combine_bytes)
    return dispatch_token_bytes(load.hidden_size, load.dispatch_bytes)


def _expert_traffic(stage: _Stage) -> ExpertTraffic:
    load, ranks = stage.traffic.experts, stage.num_ranks
    if load.num_routed_experts % ranks:
        fit = [n for n in range(1, stage.num_nodes + 1) if load.num_routed_experts % (n * stage.width) == 0]
        fix = f"take {fit[-1]} nodes" if fit else f"take a multiple of {stage.width} experts"
        raise PlanError(f"{load.num_routed_experts} experts do not lie evenly on {ranks} ports; {fix}")
    tokens, seed = _sampled(stage), stage.traffic.seed
    index = sample_experts(
        ranks * tokens,
        load.num_routed_experts,
        load.num_experts_per_token,
        load.num_expert_groups,
        load.num_limited_groups,
        seed,
    )
    return expert_traffic(index.reshape(ranks, tokens, -1), load.num_routed_experts, stage.width)


def _limit_s(stage: _Stage, loads: ExpertTraffic | None) -> float:
    """Return the least time in which the data passes the links at devices, however it is sent between them."""
    network, nodes, ranks, traffic = stage.network, stage.num_nodes, stage.num_ranks, stage.traffic
    level, capacity = network.level, network.capacity_bytes_per_s
    fast = level[network.head] < 0
    port = float(capacity[(level[network.tail] == 0) & ~fast].min())
    inner = float(capacity[fast].min()) if fast.any() else 0.0
    if loads is not None:
        token = _token_bytes(stage) * traffic.experts.tokens_per_device / _sampled(stage)
        crossing = max(loads.crossing.sum(2).max(), loads.crossing.sum(0).max())
        handed = max(loads.handed.sum(2).max(), loads.handed.sum(1).max())
        return float(token * max(crossing / port, handed / inner if inner else 0.0))
    size = traffic.size_bytes
    if traffic.pattern == "incast":
        return (nodes - 1) * size / port
    if traffic.pattern == "shift":
        return size / port
    across_s = (nodes - 1) / nodes * size / port
    if traffic.pattern == "all_to_all":
        return across_s if nodes > 1 else (ranks - 1) / ranks * size / (inner or port)
    passes = 1 if traffic.pattern in ("reduce_scatter", "all_gather") else 2
    # All that ranks send, over all that they have; and what leaves a node, over its ports.
    least_s = (ranks - 1) / ranks * size / ((port if nodes > 1 or not inner else 0.0) + inner)
    return passes * max(least_s, across_s / stage.width)


def _wires(stage: _Stage) -> tuple[dict[str, Figure], Callable[[str], Group]]:
    """Return the figures that go in, and the group at their ``value``, their worst (``low``) and best (``high``)."""
    network, fast = stage.cluster.network, stage.cluster.scale_up
    assert network is not None
    above = stage.network.level[stage.network.num_endpoints :] > 0
    switches = stage.network.plane[stage.network.num_endpoints :][above]
    crosses = len(switches) > len(set(switches))
    inputs = {
        "network.efficiency": network.efficiency,
        "network latency": network.cross_leaf_latency_s if crosses else network.same_leaf_latency_s,
    }
    has_fast = fast is not None and stage.width > 1
    if fast is not None and has_fast:
        inputs |= {"scale_up.efficiency": fast.efficiency, "scale_up.latency_s": fast.latency_s}

    def group(end: str) -> Group:
        slow = {"value": "value", "low": "high", "high": "low"}[end]
        port = Wire(
            getattr(inputs["network latency"], slow),
            network.bandwidth_bytes_per_s * getattr(network.efficiency, end),
        )
        inner = None
        if fast is not None and has_fast:
            inner = Wire(getattr(fast.latency_s, slow), fast.bandwidth_bytes_per_s * getattr(fast.efficiency, end))
        return Group(stage.num_nodes, stage.width, inner, port)

    return inputs, group


def _formula_s(stage: _Stage, group: Group) -> float:
    traffic, size = stage.traffic, stage.traffic.size_bytes
    if traffic.pattern == "experts":
        load = traffic.experts
        limits = (load.num_expert_groups, load.num_limited_groups)
        nodes, devices = (
            groups_reached(load.num_routed_experts, load.num_experts_per_token, parts, *limits)
            for parts in (stage.num_nodes, stage.num_ranks)
        )
        return expert_exchange_time_s(load.tokens_per_device, _token_bytes(stage), group, nodes, devices)
    if traffic.pattern == "incast":
        return collective_time_s("point_to_point", size * (stage.num_nodes - 1), group)
    if traffic.pattern == "shift":
        return collective_time_s("point_to_point", size, group)
    kinds: dict[str, Kind] = {
        "all_to_all": "all_to_all",
        "reduce_scatter": "reduce_scatter",
        "all_gather": "all_gather",
    }
    names: dict[str, Algorithm] = {
        "forwarded": "forwarded",
        "direct": "direct",
        "hierarchical": "hierarchical",
        "ring": "ring",
    }
    kind = kinds.get(traffic.pattern, "all_reduce")
    return collective_time_s(kind, size, group, names.get(stage.algorithm, "double_tree"))


def _summary(
    stage: _Stage, pattern: Pattern, result: FlowResult, limit_s: float, loads: ExpertTraffic | None
) -> TrafficRun:
    inputs, group = _wires(stage)
    value, slowest, fastest = (_formula_s(stage, group(end)) for end in ("value", "low", "high"))
    label = weakest({figure.label for figure in inputs.values()})
    formula = Figure(value=value, low=fastest, high=slowest, label=label, source="closed form")
    makespan, traffic = result.makespan_s, stage.traffic
    ends = bool(np.isfinite(makespan))
    ratio = makespan / value if ends else 0.0
    size = None if loads is not None else traffic.size_bytes
    rate = None if size is None or not ends else size / makespan * (stage.num_nodes - 1 if _is_incast(stage) else 1)
    return TrafficRun(
        cluster=stage.cluster.name,
        traffic=traffic,
        algorithm=stage.algorithm,
        routing=stage.routing,
        num_nodes=stage.num_nodes,
        num_ranks=stage.num_ranks,
        devices_per_rank=stage.cluster.devices_per_node / stage.width,
        makespan_s=Figure(
            value=makespan, low=fastest * ratio, high=slowest * ratio, label=label, source="simulated flows"
        )
        if ends
        else None,
        formula_s=formula,
        limit_s=limit_s,
        algorithm_bytes_per_s=rate,
        bus_bytes_per_s=None if rate is None else rate * _bus_factor(stage),
        logical_bytes_per_s=_logical(stage, loads, makespan) if loads is not None and ends else None,
        inputs=inputs,
        uses=_uses(stage, result),
        bottlenecks=_bottlenecks(stage, result),
        senders_peak=result.senders_peak,
        num_flows=pattern.flows.num_flows,
        num_flow_classes=result.num_flow_classes,
        num_link_classes=result.num_link_classes,
        num_events=result.num_events,
        resolution_s=0.0,
        build_s=0.0,
        simulate_s=0.0,
    )


def _is_incast(stage: _Stage) -> bool:
    return stage.traffic.pattern == "incast"


def _bus_factor(stage: _Stage) -> float:
    """Return the factor of nccl-tests from algorithm to bus bandwidth."""
    part = (stage.num_ranks - 1) / stage.num_ranks
    factors = {"all_to_all": part, "reduce_scatter": part, "all_gather": part, "incast": 1.0, "shift": 1.0}
    return factors.get(stage.traffic.pattern, 2 * part)


def _logical(stage: _Stage, loads: ExpertTraffic, makespan: float) -> float:
    """Return a device's bandwidth if every copy to a node counts, those that stay in it too."""
    load = stage.traffic.experts
    limits = (load.num_expert_groups, load.num_limited_groups)
    reached = groups_reached(load.num_routed_experts, load.num_experts_per_token, stage.num_nodes, *limits)
    return load.tokens_per_device * reached * _token_bytes(stage) / makespan


def _kinds(stage: _Stage) -> tuple[Ints, list[str]]:
    """Return the kind of each link as a number, and what the numbers mean."""
    level, network = stage.network.level, stage.network
    topology = stage.cluster.network.topology if stage.cluster.network else ""
    low = "switch" if topology in ("dragonfly", "slim_fly", "torus", "fully_connected") else "leaf"
    names = ["fast links", "port", low, "spine", "joining switch" if topology == "two_zone" else "core"]
    key = (level[network.tail] + 1) * len(names) + level[network.head] + 1
    found, kind = np.unique(key, return_inverse=True)
    return kind, [f"{names[k // len(names)]} to {names[k % len(names)]}" for k in found.tolist()]


def _uses(stage: _Stage, result: FlowResult) -> tuple[LinkUse, ...]:
    kind, names = _kinds(stage)
    if not np.isfinite(result.makespan_s):
        return ()
    mean, full = result.link_mean, result.link_full_s / max(result.makespan_s, 1e-300)
    rows = []
    for number, name in enumerate(names):
        mine = kind == number
        rows.append(
            LinkUse(
                kind=name,
                num_links=int(mine.sum()),
                mean=float(mean[mine].mean()),
                busiest=float(mean[mine].max()),
                full_share=float(full[mine].max()),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.full_share, -row.busiest)))


def _bottlenecks(stage: _Stage, result: FlowResult, count: int = 5) -> tuple[Bottleneck, ...]:
    """Return links that were full longest; of links of a kind that fared alike, one stands for all."""
    kind, names = _kinds(stage)
    full = result.link_full_s
    order = np.argsort(-full, kind="stable")
    order = order[full[order] > 0]
    rows: list[Bottleneck] = []
    seen: set[tuple[int, float]] = set()
    for link in order.tolist():
        key = (int(kind[link]), float(f"{full[link]:.3g}"))
        if key in seen:
            continue
        seen.add(key)
        alike = int(((kind == kind[link]) & (np.abs(full - full[link]) <= 0.005 * full[link])).sum())
        rows.append(
            Bottleneck(
                link=link_name(stage.network, link),
                kind=names[kind[link]],
                carried_bytes=float(result.link_bytes[link]),
                full_s=float(full[link]),
                alike=alike,
            )
        )
        if len(rows) == count:
            break
    return tuple(rows)
