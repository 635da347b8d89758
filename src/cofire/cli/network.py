"""``cofire network``: what a cluster's network is and costs, beside others, and what traffic makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption, SetOption, complete_cluster
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cofire.network.cost import PriceList
    from cofire.network.scenario import Simulation, Traffic
    from cofire.spec import ClusterSpec, Spec

# An asynchronous event each; a viewer still opens a file of this size.
_TRACE_FLOWS_MAX = 100_000


def _complete_routing(incomplete: str) -> list[str]:
    from cofire.network.survey import ROUTINGS

    return [name for name in ROUTINGS if name.startswith(incomplete)]


def _complete_pattern(incomplete: str) -> list[str]:
    from cofire.network.scenario import PATTERN_ALGORITHMS

    return [name for name in PATTERN_ALGORITHMS if name.startswith(incomplete)]


def _complete_algorithm(incomplete: str) -> list[str]:
    from cofire.network.scenario import PATTERN_ALGORITHMS

    names = dict.fromkeys(name for names in PATTERN_ALGORITHMS.values() for name in names)
    return [name for name in ("auto", *names) if name.startswith(incomplete)]


def _complete_prices(incomplete: str) -> list[str]:
    from cofire.network.cost import price_lists

    return [name for name in price_lists() if name.startswith(incomplete)]


ClusterArgument = Annotated[
    str,
    typer.Argument(
        metavar="CLUSTER", help="A cluster preset, or a .toml or .json file.", autocompletion=complete_cluster
    ),
]
NodesOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Nodes; none: those of the cluster.", show_default=False)
]
PricesOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="A price list by name, a .toml file with one, or FILE:NAME of several.",
        autocompletion=_complete_prices,
    ),
]
RoutingOption = Annotated[
    str | None,
    typer.Option(
        metavar="ecmp|static|adaptive", help="Instead of the cluster's own.", autocompletion=_complete_routing
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="Of hashed paths.")]


def register(app: typer.Typer) -> None:
    """Add ``cofire network ...``."""
    group = typer.Typer(
        no_args_is_help=True, help="Show a cluster's network, compare topologies and routings, simulate traffic."
    )
    group.command("show")(show)
    group.command("compare")(compare)
    group.command("simulate")(simulate)
    group.command("route")(route)
    group.command("host")(host)
    app.add_typer(group, name="network")


def show(
    cluster: ClusterArgument,
    nodes: NodesOption = None,
    prices: PricesOption = "isca25",
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Count switches and links, bound an all-to-all and an all-reduce, and add up cost and power."""
    from cofire.network.report import survey_note
    from cofire.network.survey import survey

    found = survey(_load(cluster, overrides), nodes, _prices(prices))
    _print(found, survey_note, as_json)


def compare(
    endpoints: Annotated[int, typer.Option(metavar="N", help="NIC ports to join, in whole nodes.")] = 16_384,
    switch_ports: Annotated[int, typer.Option(metavar="K", help="Ports of every switch.")] = 64,
    planes: Annotated[int, typer.Option(metavar="P", help="Planes of the multi-plane tree.")] = 8,
    prices: PricesOption = "isca25",
    table3: Annotated[
        bool, typer.Option("--table3", help="The five networks of arXiv 2505.09343, table 3, beside what it prints.")
    ] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Compare topologies of one size: counts, diameter, bisection, load and cost per port.

    Paths to set: nics_per_node (8), oversubscription, bandwidth_bytes_per_s (50e9) and the rest of a cluster's network.
    """
    from cofire.network.report import comparison_note
    from cofire.network.survey import compare_table_3, compare_topologies
    from cofire.spec.hardware import NetworkSpec
    from cofire.spec.io import override, parse

    if table3:
        _print(compare_table_3(_prices(prices)), comparison_note, as_json)
        return
    table: dict[str, Any] = {
        "bandwidth_bytes_per_s": 50e9,
        "switch_ports": switch_ports,
        "num_planes": planes,
        "nics_per_node": max(8, planes),
    }
    for item in overrides or ():
        override(table, item.removeprefix("cluster.").removeprefix("network."))
    found = compare_topologies(parse(NetworkSpec, table, "network"), endpoints, _prices(prices))
    _print(found, comparison_note, as_json)


def simulate(
    cluster: ClusterArgument,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="all_to_all, all_reduce, reduce_scatter, all_gather, ring, double_tree, experts, incast or shift.",
            autocompletion=_complete_pattern,
        ),
    ] = "all_to_all",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Whole data of a rank: 1000000, 64MB, 186MiB; none: 1GB. Experts have none."
        ),
    ] = None,
    nodes: NodesOption = None,
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="forwarded or direct (all_to_all); hierarchical, ring, double_tree or zoned_double_tree "
            "(all_reduce); dispatch or combine (experts).",
            autocompletion=_complete_algorithm,
        ),
    ] = "auto",
    routing: RoutingOption = None,
    fail_plane: Annotated[
        list[str] | None,
        typer.Option(metavar="P[@S]", help="A plane that is down, from the start or from S on: 3@5ms. Repeat it."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write a trace for Perfetto here.")] = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Simulate traffic as flows: time, bandwidth, use of links and bottlenecks, beside the closed form.

    A rank is a NIC port, node by node. --pattern ring and double_tree are all-reduces. The size of an in-cast or a
    shift is what each sender sends. Paths under traffic. set the rest: shift (nodes from sender to receiver),
    senders_max (that an in-cast's receiver lets send at once), model (whose experts; DeepSeek-V3's if none),
    experts.tokens_per_device, experts.num_routed_experts ..., and seed. All others change the cluster.
    """
    from cofire.network.report import traffic_note
    from cofire.network.scenario import simulate_traffic

    check_suffix(trace, ".json", "--trace")
    planes, fail_at_s = _failures(fail_plane or [])
    named = {"pattern": pattern, "algorithm": algorithm, "failed_planes": planes, "fail_at_s": fail_at_s}
    traffic = _traffic(named, size, overrides or [])
    machine = _load(cluster, [item for item in overrides or () if not item.startswith("traffic.")], routing)
    with _progress() as say:
        done = simulate_traffic(machine, traffic, nodes, None if trace is None else _TRACE_FLOWS_MAX, say)
    if trace is not None:
        _write_trace(trace, done)
    _print(done.run, traffic_note, as_json)


def route(
    cluster: ClusterArgument,
    routing: RoutingOption = None,
    shift: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Nodes from sender to receiver; none: half of all.")
    ] = None,
    nodes: NodesOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Send from every port to the node N further on and show the busiest links; without --routing under all three."""
    from cofire.network.report import routing_note
    from cofire.network.survey import ROUTINGS, survey_routing

    machine = _load(cluster, overrides, routing)
    own = machine.network.routing if machine.network is not None else "adaptive"
    found = survey_routing(machine, nodes, shift, ROUTINGS if routing is None else (own,), seed)
    _print(found, routing_note, as_json)


def host(
    cluster: ClusterArgument, nodes: NodesOption = None, as_json: JsonOption = False, overrides: SetOption = None
) -> None:
    """Bound the reduction of gradients in host memory (HFReduce), and say which part of the host binds."""
    from cofire.network.report import host_note
    from cofire.network.survey import survey_host

    _print(survey_host(_load(cluster, overrides), nodes), host_note, as_json)


def _load(cluster: str, overrides: list[str] | None, routing: str | None = None) -> ClusterSpec:
    """Load a cluster; paths to set may start with ``cluster.``, as ``cofire plan`` has them.

    Raises:
        PlanError: A routing is named for a cluster without a network.
        SpecError: The cluster cannot be read, or breaks a rule.
    """
    from cofire.errors import PlanError
    from cofire.spec import ClusterSpec, load_as

    changes = [item.removeprefix("cluster.") for item in overrides or ()]
    machine = load_as(ClusterSpec, cluster, changes)
    if routing is None:
        return machine
    if machine.network is None:
        raise PlanError(f"{machine.name} has no network; add a [network] table, or name another cluster")
    return load_as(ClusterSpec, cluster, [*changes, f"network.routing={routing}"])


def _prices(source: str) -> PriceList:
    """Return a price list by its name, or from a file.

    Raises:
        PlanError: There is none, or the file has several and none is named.
    """
    from cofire.errors import PlanError
    from cofire.network.cost import price_list, price_lists

    path, mark, name = source.rpartition(".toml:")
    if mark:
        return price_list(name, f"{path}.toml")
    if not source.endswith(".toml"):
        return price_list(source)
    lists = price_lists(source)
    if len(lists) > 1:
        raise PlanError(
            f"{source} holds {len(lists)} price lists: {', '.join(lists)}; write {source}:{next(iter(lists))}"
        )
    return price_list(path=source)


def _traffic(named: dict[str, Any], size: str | None, overrides: list[str]) -> Traffic:
    """Join what options name and what paths under ``traffic.`` set.

    Raises:
        PlanError: Experts have a size, or the model has no experts.
        SpecError: The size is no number, or a path or a value breaks a rule.
    """
    from cofire.errors import PlanError
    from cofire.network.scenario import Traffic
    from cofire.spec import parse
    from cofire.spec.io import override
    from cofire.spec.units import BYTES, parse_quantity

    if named["pattern"] == "experts" and size is not None:
        raise PlanError(f"--size {size} counts no experts; set traffic.experts.tokens_per_device instead")
    table: dict[str, Any] = {"traffic": {}}
    for item in overrides:
        if item.startswith("traffic."):
            override(table, item)
    question = table["traffic"]
    if "model" in question and isinstance(question.get("experts", {}), dict):
        question["experts"] = {**_expert_load(question.pop("model")), **question.get("experts", {})}
    question |= named
    question["size_bytes"] = parse_quantity(size or "1GB", BYTES, "size", "64MB or 186MiB")
    return parse(Traffic, question, "traffic")


def _failures(words: list[str]) -> tuple[list[int], float]:
    """Read planes and when they go down, ``3`` or ``3@5ms``.

    Raises:
        PlanError: A word is neither, or two planes go down at different times.
    """
    from cofire.errors import PlanError
    from cofire.spec.units import SECONDS, parse_quantity

    planes, times = [], set()
    for word in words:
        plane, _, when = word.partition("@")
        if not plane.isdigit():
            raise PlanError(f"--fail-plane {word!r} is not a plane's number, with or without a time; write 3 or 3@5ms")
        planes.append(int(plane))
        times.add(parse_quantity(when or "0", SECONDS, "fail-plane", "3@0.005 or 3@5ms"))
    if len(times) > 1:
        raise PlanError(f"--fail-plane names {len(times)} times; let all planes go down at one")
    return planes, max(times, default=0.0)


def _expert_load(table: Any) -> dict[str, Any]:
    """Return what the layers of experts of a model dispatch, given as ``--set`` read it.

    Raises:
        PlanError: It is no model, or one without experts.
        SpecError: It breaks a rule.
    """
    from cofire.errors import PlanError
    from cofire.spec import ModelSpec, parse

    if not isinstance(table, dict) or table.get("kind", "model") != "model":
        raise PlanError("--set traffic.model names no model; take a preset or a file, such as deepseek-v3")
    model = parse(ModelSpec, table, "traffic.model")
    if model.moe is None:
        raise PlanError(f"{model.name} has no experts to dispatch to; take a model with some, such as deepseek-v3")
    fields = ("num_routed_experts", "num_experts_per_token", "num_expert_groups", "num_limited_groups")
    return {name: getattr(model.moe, name) for name in fields} | {"hidden_size": model.hidden_size}


def _print(found: Spec, note: Callable[[Any], RenderableType], as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        console().print(note(found))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield what shows a stage on a terminal's standard error, with the time that it takes."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage: bar.update(task, description=stage)


def _write_trace(path: Path, done: Simulation) -> None:
    """Write a line per sending port, a span per flow."""
    from cofire.network.flowsim import trace_events
    from cofire.sim.trace import span_events, write_trace

    source, target = done.pattern.source, done.pattern.target
    node = done.network.node
    lines = {int(port): f"node {node[port]}, port {port}" for port in sorted(set(source.tolist()))}
    names = [f"to port {port} of node {node[port]}" for port in target.tolist()]
    write_trace(path, [*span_events([], lines), *trace_events(done.result, source, names)])
