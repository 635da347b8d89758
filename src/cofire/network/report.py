"""What the network commands found, as an engineer's note for a rich console.

Every note ends with what its numbers are: counted, by formula, simulated or fitted, and how well the figures behind
them are known. Left out: the values themselves, which ``cofire.network.survey`` and ``scenario`` compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofire.network.cost import NetworkCost
from cofire.network.scenario import TrafficRun
from cofire.network.survey import HostSurvey, NetworkSurvey, RoutingSurvey, TopologyComparison, TopologyRow
from cofire.spec.figure import Figure
from cofire.spec.units import format_quantity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_NAMES = {
    "fat_tree2": "fat tree, 2 layers",
    "fat_tree3": "fat tree, 3 layers",
    "multi_plane": "multi-plane",
    "multi_rail": "multi-rail",
    "two_zone": "two zones",
    "dragonfly": "dragonfly",
    "slim_fly": "Slim Fly",
    "torus": "torus",
    "fully_connected": "fully connected",
}


def survey_note(found: NetworkSurvey) -> RenderableType:
    """Return a cluster's network as a note."""
    facts, cost = found.facts, found.cost
    counts = _table("Network", "", "", "")
    counts.add_row("shape", _NAMES[found.topology], found.shape)
    counts.add_row("ports", f"{facts.endpoints:,}", f"{found.num_nodes:,} nodes of {found.ports_per_node} in use")
    counts.add_row("switches", f"{facts.switches:,}", "")
    counts.add_row("links between switches", f"{facts.links:,}", "cables to nodes not counted")
    longest = found.longest_latency_s
    counts.add_row("diameter", f"{facts.diameter_links} links", f"at most {_interval(longest, 's')} one way")
    counts.add_row("mean path", f"{facts.mean_links:.2f} links", "between ports that reach each other")
    counts.add_row("latency, same leaf", _seconds(found.same_leaf_latency_s.value), _origin(found.same_leaf_latency_s))
    counts.add_row(
        "latency, other leaf", _seconds(found.cross_leaf_latency_s.value), _origin(found.cross_leaf_latency_s)
    )

    limits = _table("What it carries", "", "", "")
    port = found.port_bytes_per_s
    limits.add_row("a port, one way", format_quantity(port.value, "B/s"), f"{_interval(port, 'B/s')}, {_origin(port)}")
    half = facts.bisection_bytes_per_s
    share = half / (facts.endpoints * port.value)
    limits.add_row(
        "bisection, one way", format_quantity(half, "B/s"), f"{share:.2f} ports' worth per port; 0.5 is full"
    )
    limits.add_row("load, all-to-all", f"{facts.all_to_all_load:.2f}", _load_text(facts.all_to_all_load))
    limits.add_row("load, all-reduce", f"{facts.all_reduce_load:.2f}", "a ring per port number, nodes in order")
    every = found.all_to_all_bytes_per_s
    limits.add_row("all-to-all, of a port", format_quantity(every.value, "B/s"), _interval(every, "B/s"))
    if found.scale_up_bytes_per_s is not None:
        fast = found.scale_up_bytes_per_s
        ratio = fast.value * found.devices_per_node / (port.value * found.ports_per_node)
        text = f"{ratio:.1f} times what the ports of a node carry; {_origin(fast)}"
        limits.add_row("fast links, of a device", format_quantity(fast.value, "B/s"), text)
    remarks = [f"An all-to-all waits for {found.binds}."]
    if not facts.exact:
        remarks.append("Places are left empty or links join unevenly: mean path, bisection and loads are estimates.")
    remarks.append("Counts are exact, loads and bisection closed forms; routing may lose more (cofire network route).")
    return _group(
        f"{found.cluster}: {found.network}, {found.routing} routing", counts, limits, _cost_table(cost), remarks
    )


def _cost_table(cost: NetworkCost) -> Table:
    table = _table("What it costs", "", "", "")
    table.add_row("switches", _money(cost.switches_price, cost.unit), f"{cost.switches:,}")
    links = f"{cost.optical_links:,} optical, {cost.electrical_links:,} electrical"
    table.add_row("links", _money(cost.links_price, cost.unit), links)
    table.add_row("network", _money(cost.total, cost.unit), f"prices {cost.label}: {cost.source}")
    table.add_row("per port", _money(cost.per_endpoint, cost.unit), "without NIC and the cable to it")
    watts = cost.watts
    table.add_row("power", format_quantity(watts.value, "W"), f"{_interval(watts, 'W')}, {_origin(watts)}")
    return table


def comparison_note(found: TopologyComparison) -> RenderableType:
    """Return topologies side by side as a note."""
    rows = [row for row in found.rows if row.facts is not None]
    unit = next((row.cost.unit for row in rows if row.cost is not None), "")
    table = _table("", "topology", "ports", "switches", "links", "diameter", "bisection", "load", f"{unit} per port")
    printed = any(row.printed for row in rows)
    if printed:
        table.add_column("printed", justify="right")
    else:
        table.add_column("shape", justify="left", overflow="fold")
    for row in rows:
        table.add_row(*_topology_cells(row, found))
    remarks = [f"{_NAMES.get(row.name, row.name)}: cannot be built: {row.refused}" for row in found.rows if row.refused]
    best = found.cheapest
    if not printed and best and best[0].cost is not None:
        names = ", ".join(_NAMES[row.name] for row in best)
        price = _money(best[0].cost.per_endpoint, unit)
        remarks.append(f"Cheapest that carries an exchange of all ports at full rate: {names}: {price} per port.")
    remarks += _comparison_remarks(found, rows)
    title = "Table 3 of arXiv 2505.09343, computed" if printed else f"{found.endpoints:,} ports or a few more"
    return _group(f"{title}; switches of {found.switch_ports} ports", table, remarks)


def _topology_cells(row: TopologyRow, found: TopologyComparison) -> list[str]:
    facts, cost = row.facts, row.cost
    assert facts is not None
    assert cost is not None
    share = facts.bisection_bytes_per_s / facts.endpoints / found.bandwidth_bytes_per_s
    about = "" if facts.exact else "~"
    load = max(facts.all_to_all_load, facts.all_reduce_load)
    cells = [
        _NAMES.get(row.name, row.name),
        f"{facts.endpoints:,}",
        f"{facts.switches:,}",
        f"{facts.links:,}",
        str(facts.diameter_links),
        f"{about}{share:.2f}",
        f"{about}{load:.2f}",
        f"{cost.per_endpoint:,.4g}" if cost.per_endpoint < 1000 else f"{cost.per_endpoint:,.0f}",
    ]
    if row.printed is not None:
        paper = row.printed
        same = (paper.endpoints, paper.switches, paper.links) == (facts.endpoints, facts.switches, facts.links)
        verdict = "same counts" if same else f"{paper.endpoints:,}, {paper.switches:,}, {paper.links:,}"
        cells.append(f"{verdict}; {paper.million_usd:,.0f} M$, {paper.thousand_usd_per_endpoint:g} k$ per port")
    elif any(other.printed for other in found.rows):
        cells.append("")
    else:
        spare = f"; {row.ports_used} of {found.switch_ports} ports used" if row.ports_used < found.switch_ports else ""
        cells.append(f"{row.shape}{spare}")
    return cells


def _comparison_remarks(found: TopologyComparison, rows: list[TopologyRow]) -> list[str]:
    remarks = [
        "Bisection: ports' worth per port, 0.5 is full. Load: the larger of all-to-all and all-reduce on the busiest "
        "link between switches; up to 1 the network keeps up. By closed forms; ~ where they are estimates."
    ]
    cost = next((row.cost for row in rows if row.cost is not None), None)
    if cost is not None:
        remarks.append(f"Prices are {cost.label}: {cost.source}. NICs and the cables to them are not in.")
    if any(row.ports_used < found.switch_ports for row in rows):
        remarks.append("A switch is paid for in full where it uses a part of its ports.")
    return remarks


def traffic_note(run: TrafficRun) -> RenderableType:
    """Return a simulation as a note."""
    traffic = run.traffic
    each = "" if run.devices_per_rank == 1 else f" ({run.devices_per_rank:g} devices share one)"
    what = f"{traffic.pattern} ({run.algorithm})" if run.algorithm != traffic.pattern else traffic.pattern
    load = traffic.experts
    size = format_quantity(traffic.size_bytes, "B") + (
        " of each sender" if traffic.pattern == "incast" else " per port"
    )
    if traffic.pattern == "experts":
        size = (
            f"{load.tokens_per_device:,} tokens per port to {load.num_experts_per_token} of "
            f"{load.num_routed_experts} experts"
        )
    title = (
        f"{run.cluster}: {what} over {run.num_nodes:,} nodes, {run.num_ranks:,} ports{each}, {size}; "
        f"{run.routing} routing"
    )
    parts: list[RenderableType | list[str]] = [_times_table(run)]
    if run.uses:
        uses = _table("Links", "kind", "links", "mean use", "busiest", "full, of the time")
        for row in run.uses:
            uses.add_row(
                row.kind, f"{row.num_links:,}", f"{row.mean:.1%}", f"{row.busiest:.1%}", f"{row.full_share:.1%}"
            )
        parts.append(uses)
    if run.bottlenecks:
        slow = _table("Full longest", "link", "full for", "carried", "alike")
        for link in run.bottlenecks:
            full = _seconds(link.full_s)
            slow.add_row(link.link, full, format_quantity(link.carried_bytes, "B"), f"{link.alike:,} of {link.kind}")
        parts.append(slow)
    return _group(title, *parts, _traffic_remarks(run))


def _times_table(run: TrafficRun) -> Table:
    table = _table("Time", "", "", "")
    formula = run.formula_s
    if run.makespan_s is None:
        table.add_row("simulated", "never ends", "flows lost their way")
    else:
        makespan = run.makespan_s
        table.add_row("simulated", _seconds(makespan.value), f"{_interval(makespan, 's')}, from {run.label} figures")
        gap = makespan.value / formula.value - 1
        text = f"simulated is {abs(gap):.1%} {'above' if gap >= 0 else 'below'}; no collisions, failures or skew in it"
        table.add_row("closed form", _seconds(formula.value), text if abs(gap) >= 5e-4 else "the same")
        ratio = f"simulated takes {makespan.value / run.limit_s:.3f} times as long"
        table.add_row("least, by the devices' links", _seconds(run.limit_s), ratio)
    for name, rate, text in (
        ("algorithm bandwidth", run.algorithm_bytes_per_s, "size over time"),
        ("bus bandwidth", run.bus_bytes_per_s, "as nccl-tests count it, per port"),
        ("logical bandwidth", run.logical_bytes_per_s, "copies that stay in a node count too, as in DeepEP"),
    ):
        if rate is not None:
            table.add_row(name, format_quantity(rate, "B/s"), text)
    return table


def _traffic_remarks(run: TrafficRun) -> list[str]:
    traffic, remarks = run.traffic, []
    if traffic.failed_planes:
        planes = ", ".join(str(plane) for plane in traffic.failed_planes)
        end = run.makespan_s.value if run.makespan_s else 0.0
        late = traffic.fail_at_s
        when = f"after {_seconds(late)}" if late else "from the start"
        missed = " (after the end: nothing was lost)" if run.makespan_s and late >= end else ""
        remarks.append(f"Plane {planes} was down {when}{missed}.")
    if run.senders_peak:
        remarks.append(f"At most {run.senders_peak} sent to the receiver at once; packets and losses are not modelled.")
    if traffic.pattern == "experts":
        remarks.append("Experts are drawn from independent even scores, so load differs between devices by chance.")
    step = f", rates kept for {_seconds(run.resolution_s)} at least" if run.resolution_s and run.num_events > 3 else ""
    remarks.append(
        f"{run.num_flows:,} flows in {run.num_flow_classes:,} classes, {run.num_events:,} events{step}; built in "
        f"{run.build_s:.2f} s, simulated in {run.simulate_s:.2f} s."
    )
    known = "; ".join(f"{name} {_value(name, figure)}, {_origin(figure)}" for name, figure in run.inputs.items())
    remarks.append(f"Simulated: max-min fair flows, not packets. Figures: {known}.")
    return remarks


def routing_note(found: RoutingSurvey) -> RenderableType:
    """Return routings under a shift as a note."""
    table = _table("Links between switches", "routing", "busiest", "mean", "time, of a port alone", "links by load")
    for row in found.rows:
        mark = " (its own)" if row.routing == found.own_routing else ""
        loads = ", ".join(f"{load}: {count:,}" for load, count in sorted(row.links_by_load.items()))
        cells = f"{row.largest:.2f}", f"{row.mean:.2f}", f"x {row.slowdown:.2f}", loads
        table.add_row(f"{row.routing}{mark}", *cells)
    parts: list[RenderableType | list[str]] = [table]
    for row in found.rows:
        if row.busiest and (len(found.rows) == 1 or row.routing == found.own_routing):
            busy = _table(f"Busiest under {row.routing}", "link", "load")
            for link in row.busiest:
                busy.add_row(link.link, f"{link.load:.2f}")
            parts.append(busy)
    remarks = [
        "Load: flows at full rate on a link over what it carries. Modelled: paths by hash, by destination or shared "
        "evenly; nothing reacts to load. The cables of a bundle are counted one by one."
    ]
    title = (
        f"{found.cluster}: {found.num_flows:,} ports of {found.num_nodes:,} nodes, each sending to the node "
        f"{found.shift} on"
    )
    return _group(title, *parts, remarks)


def host_note(found: HostSurvey) -> RenderableType:
    """Return the hosts' bounds as a note."""
    known = [(variant.name, variant.bounds) for variant in found.variants if variant.bounds is not None]
    resources = list(dict.fromkeys(name for _, bounds in known for name in bounds.bounds_bytes_per_s))
    table = _table("Reducing in host memory, GB/s", "", "passes", *resources, "at most", "binds")
    for name, bounds in known:
        cells = [
            f"{bounds.bounds_bytes_per_s[part] / 1e9:.1f}" if part in bounds.bounds_bytes_per_s else ""
            for part in resources
        ]
        top = bounds.ceiling_bytes_per_s
        ends = "" if top.low == top.high else f" ({top.low / 1e9:.1f} to {top.high / 1e9:.1f})"
        table.add_row(name, f"{bounds.passes.total:g}", *cells, f"{top.value / 1e9:.1f}{ends}", bounds.binds)
    remarks = [f"{variant.name}: left out: {variant.refused}." for variant in found.variants if variant.refused]
    if found.peer_ring is not None:
        ring = found.peer_ring
        remarks.append(
            f"A ring of PCIe peers over all devices: {ring.value / 1e9:.1f} GB/s at most ({ring.low / 1e9:.1f} to "
            f"{ring.high / 1e9:.1f}), {_origin(ring)}."
        )
    remarks.append(
        "Bounds by formula on the algorithm bandwidth, each device holding the whole gradient; no predictions. Host "
        "figures are data-sheet values; what a shared port gives each way is assumed."
    )
    devices = f"{found.num_nodes:,} nodes of {found.devices_per_node} devices"
    return _group(f"{found.cluster}: HFReduce over {devices}", table, remarks)


def _group(title: str, *parts: RenderableType | list[str]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    items: list[RenderableType] = [Text(title, style="bold"), Text("")]
    for part in parts:
        items.append(Text("\n".join(part), style="dim") if isinstance(part, list) else part)
    return Group(*items)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    plain = not any(columns)
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold cyan",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=not plain,
    )
    for index, column in enumerate(columns):
        words = index == 0 or (plain and index == 2) or column in ("binds", "links by load", "alike")
        table.add_column(column, justify="left" if words else "right", no_wrap=index < 2, overflow="fold")
    return table


def _load_text(load: float) -> str:
    if load <= 1.01:
        return "of the busiest link between switches: it keeps up"
    return f"of the busiest link between switches: {load:.1f} times what it carries"


def _seconds(seconds: float) -> str:
    """Return a duration in its own prefix: ``3.7 us``, ``23.44 ms``, ``1.694 s``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def _interval(figure: Figure, unit: str) -> str:
    if unit == "s":
        return f"{_seconds(figure.low)} to {_seconds(figure.high)}"
    return f"{format_quantity(figure.low, unit, 3)} to {format_quantity(figure.high, unit, 3)}"


def _origin(figure: Figure) -> str:
    return f"{figure.label} ({figure.source})" if figure.source else figure.label


def _value(name: str, figure: Figure) -> str:
    return f"{figure.value:.0%}" if name.endswith("efficiency") else _seconds(figure.value)


def _money(amount: float, unit: str) -> str:
    for factor, prefix in ((1e6, " million"), (1e3, " thousand")):
        if amount >= factor * 10 or (factor == 1e6 and amount >= factor):
            return f"{amount / factor:,.4g}{prefix} {unit}"
    return f"{amount:,.4g} {unit}"
