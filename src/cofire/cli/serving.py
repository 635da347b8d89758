"""``cofire plan serving``: time per token, throughput, price and capacity of a model that a cluster serves."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from cofire.cli.option_group import given, option_group
from cofire.cli.options import JsonOption, SetOption, complete_cluster, complete_model
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import read_question

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cofire.plan.serving import ServingPlan, ServingSpec
    from cofire.plan.serving_choice import NetworkLimit
    from cofire.spec import ClusterSpec, ModelSpec
    from cofire.spec.figure import Figure

_BAR_WIDTH, _SWEEP_BAR_WIDTH = 28, 12
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIX = "serving."

# Short forms of fields of ServingSpec.
_SERVING_OPTIONS = {
    "phase": Annotated[
        Literal["prefill", "decode"] | None, typer.Option("--phase", help="What the instance does; decode unless said.")
    ],
    "num_devices": Annotated[int | None, typer.Option("--devices", help="Devices of one instance.")],
    "tp": Annotated[int | None, typer.Option("--tp", help="Devices that attention is split over.")],
    "context_length": Annotated[
        int | None, typer.Option("--context", help="Tokens that a sequence attends to; in prefill the prompt.")
    ],
    "num_redundant_experts": Annotated[
        int | None, typer.Option("--redundant", help="Slots for further replicas of loaded experts.")
    ],
    "overlap": Annotated[
        bool | None,
        typer.Option("--overlap/--no-overlap", show_default=False, help="Two micro-batches: one computes, one sends."),
    ],
}


@option_group(_SERVING_OPTIONS)
def serving(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset or a file of a model.", autocompletion=complete_model)
    ],
    cluster: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The cluster that serves.", autocompletion=complete_cluster)
    ],
    sequences: Annotated[float | None, typer.Option(help="Sequences in flight per device.")] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="TIME", help="Take the largest batch within this time, such as 50ms.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show every batch size up to the largest that fits.")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    **options: Any,
) -> None:
    """Plan how a cluster serves a model: time per token, throughput, price, capacity, and what binds.

    What is not given is chosen: DeepSeek-V3's deployment for 256 experts and more where the cluster is as large, else
    the fewest devices (a power of two) on which the weights fit. Paths to set: serving. (weight_format, route_shared,
    forward_in_node, mtp_acceptance, expert_imbalance, all_to_all_fraction ...), cluster., and those of the model.
    """
    if sum((sequences is not None, limit is not None, sweep)) > 1:
        raise typer.BadParameter("exclude each other; keep one", param_hint="--sequences, --limit and --sweep")
    limit_s = None if limit is None else parse_duration(limit)
    fields = given(options)
    if sequences is not None:
        fields["sequences_per_device"] = sequences
    question = _read(source, cluster, fields, overrides or ())
    plans = _plans(question, limit_s, sweep)
    model, machine = question.model, question.cluster
    if as_json:
        print_json(_document(model, machine, plans, sweep))
        return
    parts = _sweep_note(model, machine, plans) if sweep else _plan_note(model, machine, plans[0])
    out = console()
    for part in parts:
        out.print(part)
        out.print()


def parse_duration(text: str) -> float:
    """Return the seconds of ``50ms``, ``0.05s``, ``800us`` or ``0.05``.

    Raises:
        PlanError: The text is no time above 0.
    """
    from cofire.errors import PlanError

    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(us|ms|s)?", text.strip(), re.ASCII)
    value = float(match[1]) * _UNITS_S[match[2] or "s"] if match else 0.0
    if not 0 < value < math.inf:
        raise PlanError(f"--limit {text!r} is no time above 0; write it as 50ms or 0.05s")
    return value


def knee(plans: list[ServingPlan]) -> int:
    """Return the index of the plan with the most throughput per time that a token takes.

    Where a step is a fixed cost and a cost per sequence, that is where both are equal: before it, more sequences cost
    little time; after it, time grows faster than throughput.
    """
    rates = [plan.tokens_per_s_per_device.value / _token_time(plan).value for plan in plans]
    return rates.index(max(rates))


class _Question(NamedTuple):
    """``free`` says whether micro-batches may overlap or not, whichever is faster."""

    model: ModelSpec
    cluster: ClusterSpec
    serving: ServingSpec
    free: bool


def _plans(question: _Question, limit_s: float | None, sweep: bool) -> list[ServingPlan]:
    """Plan what is asked: a sweep of batches, the largest within a limit, or the one batch."""
    from cofire.plan.serving import largest_batch, plan_serving
    from cofire.plan.serving_choice import plan_faster, plan_within

    model, cluster, serving, free = question
    plan = plan_faster if free else plan_serving
    if limit_s is not None:
        return [(plan_within if free else largest_batch)(model, cluster, serving, limit_s)]
    first = plan(model, cluster, serving)
    if not sweep:
        return [first]
    return [plan(model, cluster, serving.model_copy(update={"sequences_per_device": size})) for size in _sizes(first)]


def _read(source: str, cluster: str, fields: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> _Question:
    """Load what the command names, with each override where it belongs; an option wins over the same field set."""
    from cofire.errors import PlanError
    from cofire.plan.serving_choice import choose_serving
    from cofire.spec.io import override

    own: dict[str, Any] = {}
    for item in overrides:
        if item.startswith(_PREFIX):
            override(own, item.removeprefix(_PREFIX))
        elif item.startswith(("parallel.", "workload.")):
            raise PlanError(f"--set {item} is of training; serving has serving.tp, serving.context_length and others")
    question = read_question(source, cluster, [item for item in overrides if not item.startswith(_PREFIX)])
    assert question.cluster is not None
    given_fields = {**own, **fields}
    serving = choose_serving(question.model, question.cluster, given_fields)
    return _Question(question.model, question.cluster, serving, "overlap" not in given_fields)


def _sizes(plan: ServingPlan) -> list[float]:
    """Return batches from one sequence per group of ``tp`` devices, doubling, to the largest that fits."""
    size, most = 1 / plan.serving.tp, plan.max_sequences_per_device
    sizes = []
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def _token_time(plan: ServingPlan) -> Figure:
    time = plan.tpot_s or plan.ttft_s
    assert time is not None
    return time


def _document(model: ModelSpec, cluster: ClusterSpec, plans: list[ServingPlan], sweep: bool) -> dict[str, Any]:
    from cofire.plan.serving_choice import network_limit

    head = {"model": model.name, "cluster": cluster.name}
    rows = [plan.model_dump(mode="json") for plan in plans]
    if sweep:
        return {**head, "plans": rows, "knee": knee(plans)}
    bound = network_limit(model, cluster, plans[0])
    return {**head, "plan": rows[0], "network_limit": None if bound is None else bound.model_dump(mode="json")}


# -- the note --------------------------------------------------------------------------------------


def _plan_note(model: ModelSpec, cluster: ClusterSpec, plan: ServingPlan) -> list[RenderableType]:
    from rich.text import Text

    from cofire.plan.serving_choice import network_limit

    return [
        Text(_title(model, cluster, plan.serving), style="bold"),
        Text("\n".join(_verdict(plan, network_limit(model, cluster, plan)))),
        _answers(plan),
        _parts(plan),
        _stages(plan),
        _capacity(plan, cluster),
        Text("Modelled. Left out: queueing, contention between exchanges, sharing of prompts.", style="dim"),
    ]


def _title(model: ModelSpec, cluster: ClusterSpec, spec: ServingSpec, with_overlap: bool = True) -> str:
    words = [f"{spec.num_devices} x {cluster.device.name}", f"tp {spec.tp}", spec.weight_format]
    if spec.num_redundant_experts:
        words.append(f"{spec.num_redundant_experts} redundant experts")
    if spec.route_shared:
        words.append("shared experts routed")
    if with_overlap:
        words.append("two micro-batches overlap" if spec.overlap else "no overlap")
    verb = "Prefilling" if spec.phase == "prefill" else "Decoding"
    return f"{verb} {model.name} on {cluster.name}: {', '.join(words)}; {spec.context_length:,} tokens of context"


def _verdict(plan: ServingPlan, bound: NetworkLimit | None) -> list[str]:
    share = max(plan.parts_s.values()) / plan.step_s.value
    largest = max(plan.parts_s, key=lambda part: plan.parts_s[part])
    lines = [f"{plan.binds.capitalize()} binds: {share:.0%} of a pass of {_time(plan.step_s.value)}."]
    if plan.binds == "capacity":
        lines[0] = f"Capacity binds: no further sequence fits. {largest.capitalize()} is {share:.0%} of a pass."
    if bound is None:
        lines.append("No experts are exchanged, so that the network sets no limit of its own.")
    else:
        lines.append(
            f"The network alone would allow {_time(bound.per_token_s)} (no computation, no latency, even experts, all "
            f"of the bandwidth); the plan takes {bound.times_over:.3g} times that."
        )
    return lines


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _span(figure: Figure, factor: float = 1.0) -> str:
    value, low, high = (_number(end * factor) for end in (figure.value, figure.low, figure.high))
    return f"{value}  [{low}, {high}]"


def _answers(plan: ServingPlan) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("What it gives", "", "modelled", "known as", "")
    name, what = ("TPOT", "per output token of a sequence")
    if plan.ttft_s is not None:
        name, what = "TTFT", "from the start of a prompt's pass to its first token; waiting is not counted"
    time, rate = _token_time(plan), plan.tokens_per_s_per_device
    table.add_row(name, f"{_span(time, 1e3)} ms", time.label, what)
    if plan.tpot_s is not None:
        table.add_row("of one sequence", f"{1 / time.value:.4g} token/s", time.label, "1 / TPOT")
    table.add_row("throughput per device", f"{_span(rate)} token/s", rate.label, "")
    whole = rate.value * plan.serving.num_devices
    table.add_row("of the instance", f"{whole:,.0f} token/s", rate.label, f"{plan.serving.num_devices} devices")
    price = plan.usd_per_million_tokens
    if price is None:
        table.add_row("price", "-", "", "the cluster has no cluster.device_hour_usd")
    else:
        table.add_row("price of 1e6 tokens", f"${_span(price)}", price.label, "rent of the devices")
    return table


def _parts(plan: ServingPlan) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("Where a pass goes, without what overlap hides", "part", "time", "share", "")
    for name, seconds in sorted(plan.parts_s.items(), key=lambda row: -row[1]):
        share = seconds / plan.step_s.value
        table.add_row(name, _time(seconds), f"{share:.1%}", "#" * round(share * _BAR_WIDTH))
    return table


def _stages(plan: ServingPlan) -> Table:
    from cofire.plan.training_note import new_table

    table = new_table("One mixture layer and micro-batch, hidden or not", "stage", "time", "")
    notes = {
        "experts": f"{plan.expert_slots_per_device} per device, {plan.tokens_per_expert:.3g} tokens each",
        "dispatch": f"each token to {plan.destinations_per_token:.3g} other devices",
    }
    for name, seconds in plan.stages_s.items():
        table.add_row(name, _time(seconds), notes.get(name, ""))
    return table


def _capacity(plan: ServingPlan, cluster: ClusterSpec) -> Table:
    from cofire.plan.training_note import new_table
    from cofire.spec.units import format_quantity

    device, used = cluster.device, plan.serving.sequences_per_device
    # A sequence's cache lies on each device of its group.
    caches = used * plan.serving.tp * plan.cache_bytes_per_sequence
    rows = {
        "weights": (plan.weights_bytes_per_device, ""),
        "caches": (caches, f"{used:g} sequences per device of at most {plan.max_sequences_per_device:g}"),
        "reserved": (device.reserved_bytes, "context, kernels and communication library"),
    }
    rows["free"] = (device.memory_bytes - sum(size for size, _ in rows.values()), "")
    table = new_table(f"Memory of the fullest {device.name}", "role", "bytes", "of the device", "")
    for name, (size, note) in rows.items():
        table.add_row(name, format_quantity(size, "B"), f"{size / device.memory_bytes:.1%}", note)
    return table


def _sweep_note(model: ModelSpec, cluster: ClusterSpec, plans: list[ServingPlan]) -> list[RenderableType]:
    from rich.text import Text

    from cofire.plan.training_note import new_table

    best = knee(plans)
    name = "TPOT" if plans[0].tpot_s is not None else "TTFT"
    columns = ("batch", name, "interval", "overlap", "token/s", "$ per 1e6", "binds", "")
    table = new_table(f"{name} against throughput; sequences and token/s are per device", *columns)
    table.columns[0].justify, table.columns[-1].no_wrap = "right", True
    most = max(plan.tokens_per_s_per_device.value for plan in plans)
    for index, plan in enumerate(plans):
        time, rate, price = _token_time(plan), plan.tokens_per_s_per_device, plan.usd_per_million_tokens
        bar = "#" * max(1, round(rate.value / most * _SWEEP_BAR_WIDTH))
        table.add_row(
            f"{plan.serving.sequences_per_device:g}",
            _time(time.value),
            f"{_time(time.low)} - {_time(time.high)}",
            "yes" if plan.serving.overlap else "no",
            _number(rate.value),
            "-" if price is None else f"{price.value:.3g}",
            plan.binds,
            bar + (" knee" if index == best else ""),
        )
    size = plans[best].serving.sequences_per_device
    verdict = (
        f"The knee is at a batch of {size:g} per device, where throughput over {name} is largest. "
        f"All times are modelled; the weakest figure in them is {_token_time(plans[best]).label}."
    )
    title = Text(_title(model, cluster, plans[0].serving, with_overlap=False), style="bold")
    return [title, table, Text(verdict)]
