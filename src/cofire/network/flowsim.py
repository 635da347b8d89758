"""Flows that share a network, in time: who finishes when, and which links bind.

Between two events (a flow starts, has sent its last byte, or a link fails) every flow sends at its max-min fair rate
(``cofire.network.max_min``). A flow that has sent its last byte arrives ``latency_s`` later, and what waits for it may
start then. Flows that fare alike are simulated once (``cofire.network.symmetry``).

Fire-Flyer (arXiv 2408.14158): traffic classes with shares of each link (VI-A), and request-to-send, where a receiver
lets only so many senders send at once (VI-B). Left out: packets, queues, pauses and losses, so that in-cast costs
nothing here beyond the shared last link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError
from cofire.network.max_min import Uses, shared_rates
from cofire.network.routing import Routes
from cofire.network.symmetry import Classes, Values, quotient, refine, single, spans
from cofire.network.topology import Floats, Ints, Network

# Fire-Flyer's traffic classes. The paper does not publish their shares; these are ours.
LANES = ("hfreduce", "nccl", "3fs", "other")
LANE_SHARES = (0.4, 0.3, 0.25, 0.05)

# Flows that end within this part of a step of each other end together.
_TIE = 1e-9


def _no_ints() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Flows:
    """What is sent; row f goes over row f of the routes.

    Attributes:
        size_bytes: ``[num_flows]``.
        start_s: ``[num_flows]``, not earlier than this; empty: 0.
        before: ``[num_waits]``, a flow that must have arrived ...
        after: ``[num_waits]``, ... before this one starts.
        queued: ``[num_waits]``, true where it is enough that the first has left, as in a sender's queue; empty: never.
        lane: ``[num_flows]``, traffic class; empty: all in one.
        receiver: ``[num_flows]``, who receives, for request-to-send; empty: nobody counts senders.
    """

    size_bytes: Floats
    start_s: Floats = field(default_factory=lambda: np.zeros(0))
    before: Ints = field(default_factory=_no_ints)
    after: Ints = field(default_factory=_no_ints)
    queued: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    lane: Ints = field(default_factory=_no_ints)
    receiver: Ints = field(default_factory=_no_ints)

    @property
    def num_flows(self) -> int:
        """Rows."""
        return len(self.size_bytes)

    @property
    def is_queued(self) -> NDArray[np.bool_]:
        """``queued``, also where none is given."""
        return self.queued if len(self.queued) else np.zeros(len(self.before), bool)


@dataclass(frozen=True, eq=False)
class Failure:
    """Links that stop at a time, and the routes from then on; none: flows over these links stop for ever."""

    time_s: float
    links: Ints
    routes: Routes | None = None


@dataclass(frozen=True)
class SendControl:
    """Request-to-send: a receiver grants ``senders_max`` flows at once, first come first served.

    ``grant_s`` is what asking adds to each flow's latency.
    """

    senders_max: int
    grant_s: float = 0.0

    def __post_init__(self) -> None:
        if self.senders_max < 1:
            raise PlanError(f"senders_max = {self.senders_max} lets nobody send; the least is 1")


@dataclass(frozen=True, eq=False)
class FlowResult:
    """How the flows went.

    Attributes:
        begin_s: ``[num_flows]``, when a flow began to send; infinite: never.
        finish_s: ``[num_flows]``, when its last byte arrived; infinite: never.
        link_bytes: ``[num_links]``, sent over each link.
        link_peak: ``[num_links]``, largest load as a part of the capacity.
        link_full_s: ``[num_links]``, how long each link was full.
        capacity_bytes_per_s: ``[num_links]``, at the start.
        senders_peak: Most flows that sent to one receiver at once; 0 where no receivers are given.
        num_flow_classes: Flows that were simulated.
        num_link_classes: Links that were simulated.
        num_events: Times at which rates were computed.
    """

    begin_s: Floats
    finish_s: Floats
    link_bytes: Floats
    link_peak: Floats
    link_full_s: Floats
    capacity_bytes_per_s: Floats
    senders_peak: int
    num_flow_classes: int
    num_link_classes: int
    num_events: int

    @property
    def makespan_s(self) -> float:
        """When the last flow arrived; infinite where one never did."""
        return float(self.finish_s.max(initial=0.0))

    @property
    def link_mean(self) -> Floats:
        """``[num_links]``, load as a part of the capacity, mean over the makespan."""
        able = self.capacity_bytes_per_s * self.makespan_s
        return np.divide(self.link_bytes, able, out=np.zeros_like(able), where=able > 0)

    def bottlenecks(self, count: int = 10) -> Ints:
        """Return the links that were full longest, the longest first; at most ``count``, none that never was."""
        order = np.argsort(-self.link_full_s, kind="stable")[:count]
        return order[self.link_full_s[order] > 0]


def simulate_flows(
    network: Network,
    routes: Routes,
    flows: Flows,
    *,
    lane_shares: tuple[float, ...] = (),
    control: SendControl | None = None,
    failures: tuple[Failure, ...] = (),
    merge: bool = True,
    resolution_s: float = 0.0,
) -> FlowResult:
    """Run flows over a network.

    Args:
        network: Capacities.
        routes: One row per flow.
        flows: Sizes, starts and who waits for whom.
        lane_shares: Of each traffic class; empty: classes do not matter.
        control: Request-to-send at the flows' receivers. Then flows are not merged, since a queue tells them apart.
        failures: In any order.
        merge: Simulate flows that fare alike once.
        resolution_s: Rates stay for at least this long, so that flows of many sizes cost few events. What a flow
            leaves is then given to others up to that much later: results are never too early, bytes stay exact.

    Raises:
        PlanError: Sizes do not agree, a lane has no share, or flows wait for each other in a circle.
    """
    failures = tuple(sorted(failures, key=lambda failure: failure.time_s))
    _check(routes, flows, lane_shares, control, failures)
    stages = [_uses(routes)]
    latencies = [routes.latency_s]
    for failure in failures:
        stages.append(stages[-1] if failure.routes is None else _uses(failure.routes))
        latencies.append(latencies[-1] if failure.routes is None else failure.routes.latency_s)
    start = flows.start_s if len(flows.start_s) else np.zeros(flows.num_flows)
    lane = flows.lane if len(flows.lane) else np.zeros(flows.num_flows, np.int64)
    if merge and control is None and flows.num_flows:
        dead: list[Values] = [np.bincount(f.links, minlength=network.num_links) for f in failures]
        values: list[Values] = [flows.size_bytes, start, lane, *latencies]
        distinct = [uses for at, uses in enumerate(stages) if not at or uses is not stages[at - 1]]
        waits = flows.before, flows.after, flows.is_queued
        classes = refine(distinct, values, [network.capacity_bytes_per_s, *dead], waits)
    else:
        classes = single(flows.num_flows), single(network.num_links)
    run = _Run(network, flows, classes, stages, latencies, start, lane)
    return run.go(lane_shares, control, failures, resolution_s)


def _uses(routes: Routes) -> Uses:
    flow = np.repeat(np.arange(routes.num_flows), np.diff(routes.start))
    return Uses(flow, routes.link, routes.fraction)


def _check(
    routes: Routes,
    flows: Flows,
    lane_shares: tuple[float, ...],
    control: SendControl | None,
    failures: tuple[Failure, ...],
) -> None:
    for rows in (routes, *(failure.routes for failure in failures if failure.routes is not None)):
        if rows.num_flows != flows.num_flows:
            raise PlanError(f"{flows.num_flows} flows need as many routes, not {rows.num_flows}")
    for name, values in (("start_s", flows.start_s), ("lane", flows.lane), ("receiver", flows.receiver)):
        if len(values) not in (0, flows.num_flows):
            raise PlanError(f"{name} has {len(values)} values; {flows.num_flows} flows need as many, or none")
    if len(flows.size_bytes) and flows.size_bytes.min() < 0:
        raise PlanError(f"size_bytes = {flows.size_bytes.min():g} is negative; the least is 0")
    if any(share <= 0 for share in lane_shares):
        raise PlanError(f"lane_shares = {lane_shares}: each must be above 0")
    if lane_shares and len(flows.lane) and flows.lane.max() >= len(lane_shares):
        raise PlanError(f"lane {flows.lane.max()} has no share; {len(lane_shares)} are given, add one for it")
    if control is not None and not len(flows.receiver):
        raise PlanError("request-to-send needs the flows' receivers; give Flows.receiver, or no control")


class _Run:
    """The state of a simulation over classes; a class of one where nothing is merged."""

    def __init__(
        self,
        network: Network,
        flows: Flows,
        classes: tuple[Classes, Classes],
        stages: list[Uses],
        latencies: list[Floats],
        start: Floats,
        lane: Ints,
    ) -> None:
        self.flows, self.classes = flows, classes
        mine, links = classes
        self.num, self.num_links = len(mine.first), len(links.first)
        self.stages: list[Uses] = []
        for at, uses in enumerate(stages):
            same = at > 0 and uses is stages[at - 1]
            self.stages.append(self.stages[-1] if same else quotient(uses, mine, links))
        self.latencies = [latency[mine.first] for latency in latencies]
        self.capacity = network.capacity_bytes_per_s[links.first].astype(np.float64)
        self.capacity_at_first = network.capacity_bytes_per_s.astype(np.float64)
        self.left = flows.size_bytes[mine.first].astype(np.float64)
        self.release = start[mine.first].astype(np.float64)
        self.lane = lane[mine.first]
        self.begin = np.full(self.num, np.inf)
        self.finish = np.full(self.num, np.inf)
        self.sent = np.zeros(self.num, bool)
        self.granted = np.zeros(self.num, bool)
        self.link_bytes, self.link_peak, self.link_full = (np.zeros(self.num_links) for _ in range(3))
        self.senders_peak = self.num_events = 0
        # Who waits for a class: rows of a sparse matrix, each predecessor class once.
        stands = np.zeros(flows.num_flows, bool)
        stands[mine.first] = True
        own = stands[flows.after]
        before, after = mine.of[flows.before[own]], mine.of[flows.after[own]]
        rows = np.unique(np.stack([before, after, flows.is_queued[own]], axis=1), axis=0)
        before, self.follower, self.queued = rows[:, 0], rows[:, 1], rows[:, 2] > 0
        self.follower_start = np.searchsorted(before, np.arange(self.num + 1))
        self.waits = np.bincount(self.follower, minlength=self.num)

    def go(
        self,
        lane_shares: tuple[float, ...],
        control: SendControl | None,
        failures: tuple[Failure, ...],
        resolution_s: float,
    ) -> FlowResult:
        """Step from event to event until every flow has arrived or can never arrive."""
        now, stage, dead = 0.0, 0, 0
        uses = self.stages[0]
        while not self.sent.all():
            while dead < len(failures) and failures[dead].time_s <= now:
                self.capacity[self.classes[1].of[failures[dead].links]] = 0.0
                dead, stage = dead + 1, stage + 1
                uses = self.stages[stage]
            active = self._active(now, control)
            if len(self.flows.receiver):
                self._count_senders(active)
            sending = uses.of(active[uses.flow])
            rate = shared_rates(sending, self.capacity, self.num, self.lane, lane_shares)
            rate[~active] = 0.0
            self.num_events += 1
            with np.errstate(divide="ignore", invalid="ignore"):
                need = np.where(active, np.where(self.left > 0, self.left / rate, 0.0), np.inf)
            ahead = (self.waits == 0) & ~self.sent & (self.release > now)
            until = min(now + need.min(initial=np.inf), self.release[ahead].min(initial=np.inf))
            until = max(until, now + resolution_s)
            if dead < len(failures):
                until = min(until, failures[dead].time_s)
            if not np.isfinite(until):
                break
            # The second part holds where the step is lost in the rounding of the clock.
            done = active & ((need <= (until - now) * (1 + _TIE)) | (now + need <= until))
            self._advance(sending, rate, np.where(done, need, until - now), until - now)
            self._arrive(done, now + need, self.latencies[stage] + (control.grant_s if control else 0.0))
            now = until
        if (self.waits[~self.sent] > 0).all() and not self.sent.all():
            stuck = int(self.classes[0].size[~self.sent].sum())
            raise PlanError(f"{stuck} flows wait for each other in a circle; break it")
        return self._result()

    def _active(self, now: float, control: SendControl | None) -> NDArray[np.bool_]:
        able = (self.waits == 0) & ~self.sent & (self.release <= now)
        if control is not None:
            asking = np.flatnonzero(able & ~self.granted)
            receiver = self.flows.receiver
            order = asking[np.lexsort((asking, self.release[asking], receiver[asking]))]
            rows = receiver[order]
            place = np.arange(len(order)) - np.searchsorted(rows, rows)
            busy = np.bincount(receiver[able & self.granted], minlength=int(receiver.max()) + 1)
            self.granted[order[busy[rows] + place < control.senders_max]] = True
            able &= self.granted
        self.begin[able & np.isinf(self.begin)] = now
        return able

    def _count_senders(self, active: NDArray[np.bool_]) -> None:
        busy = np.bincount(self.flows.receiver[active[self.classes[0].of]])
        self.senders_peak = max(self.senders_peak, int(busy.max(initial=0)))

    def _advance(self, sending: Uses, rate: Floats, busy_s: Floats, step_s: float) -> None:
        finite = np.where(np.isfinite(rate), rate, 0.0)
        moved = finite * np.where(finite > 0, busy_s, 0.0)
        self.link_bytes += sending.on_links(moved, self.num_links)
        if step_s > 0:
            load = sending.on_links(finite, self.num_links)
            part = np.divide(load, self.capacity, out=np.zeros_like(load), where=self.capacity > 0)
            self.link_peak = np.maximum(self.link_peak, part)
            self.link_full += np.where(part >= 1 - _TIE, step_s, 0.0)
        self.left = np.maximum(self.left - moved, 0.0)

    def _arrive(self, done: NDArray[np.bool_], at: Floats, latency: Floats) -> None:
        self.sent |= done
        self.left[done] = 0.0
        self.finish[done] = at[done] + latency[done]
        before, rows = spans(self.follower_start, np.flatnonzero(done))
        followers = self.follower[rows]
        self.waits -= np.bincount(followers, minlength=self.num)
        np.maximum.at(self.release, followers, np.where(self.queued[rows], at[before], self.finish[before]))

    def _result(self) -> FlowResult:
        mine, links = self.classes
        return FlowResult(
            begin_s=self.begin[mine.of],
            finish_s=self.finish[mine.of],
            link_bytes=self.link_bytes[links.of],
            link_peak=self.link_peak[links.of],
            link_full_s=self.link_full[links.of],
            capacity_bytes_per_s=self.capacity_at_first,
            senders_peak=self.senders_peak,
            num_flow_classes=self.num,
            num_link_classes=self.num_links,
            num_events=self.num_events,
        )


def trace_events(result: FlowResult, track: Ints, names: list[str] | None = None) -> list[dict[str, object]]:
    """Return the flows that arrived as events of the Chrome trace format, which Perfetto opens.

    Args:
        result: Of a simulation.
        track: ``[num_flows]``, the line that a flow is drawn on, such as its source; flows of a line may overlap.
        names: Of each flow; none: their numbers.
    """
    events: list[dict[str, object]] = []
    for flow in np.flatnonzero(np.isfinite(result.finish_s)):
        begin, end = float(result.begin_s[flow]), float(result.finish_s[flow])
        shared: dict[str, object] = {"cat": "flow", "id": int(flow), "pid": 0, "tid": int(track[flow])}
        shared["name"] = names[flow] if names else f"flow {flow}"
        # Flows of one source overlap, which only asynchronous events may.
        events.append({"ph": "b", "ts": begin * 1e6, **shared})
        events.append({"ph": "e", "ts": end * 1e6, **shared})
    return events


def links_at(network: Network, switches: tuple[int, ...] = (), planes: tuple[int, ...] = ()) -> Ints:
    """Return the links that end with some switches (vertices) or planes, both ways, for a :class:`Failure`."""
    dead = np.isin(network.plane, planes) & (network.level > 0)
    dead[list(switches)] = True
    return np.flatnonzero(dead[network.tail] | dead[network.head])


def link_name(network: Network, link: int) -> str:
    """Return what a link joins, for people: ``leaf 3 of plane 1 -> spine 0 of plane 1``.

    Switches are counted within their plane and level.
    """
    return f"{_vertex_name(network, int(network.tail[link]))} -> {_vertex_name(network, int(network.head[link]))}"


def _vertex_name(network: Network, vertex: int) -> str:
    level, plane = int(network.level[vertex]), int(network.plane[vertex])
    if level == 0:
        node = int(network.node[vertex])
        return f"port {int((network.node[:vertex] == node).sum())} of node {node}"
    alike = (network.level == level) & (network.plane == plane)
    alike[: network.num_endpoints] = False
    number = int(alike[:vertex].sum())
    if level < 0:
        return f"fast links {number}"
    return f"{('leaf', 'spine', 'core')[min(level, 3) - 1]} {number} of plane {plane}"
