"""A plan's page: the verdict first, then where time, memory and money go, and how sure each number is.

:func:`plan_page` turns a :class:`~cofire.plan.report.Plan` into the records that ``cofire.plan.page`` draws. With a
cluster the page is about training on it; without one, about what the model itself costs. The last section holds the
planner against published runs. Left out: serving beyond its bound, and the Pareto plot of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator

from cofire.errors import PlanError
from cofire.network.analytical import analyse_cluster
from cofire.network.cost import cluster_network_cost
from cofire.plan.layouts import describe
from cofire.plan.memory import MemoryEstimate
from cofire.plan.page.figures import (
    Cell,
    Comparison,
    ErrorTable,
    Fact,
    Formula,
    FormulaList,
    Item,
    MemoryBar,
    MemoryStack,
    PlanPage,
    Section,
    SortableTable,
    Value,
)
from cofire.plan.page.scale import shown
from cofire.plan.plan_figures import (
    ROLE_NAMES,
    KernelSum,
    draw_network,
    draw_rank_memory,
    draw_roofline,
    draw_schedule,
    draw_sensitivity,
    draw_step_parts,
    kernel_sums,
    network_nodes,
    work_shares,
)
from cofire.plan.published import predictions
from cofire.plan.report import Plan
from cofire.plan.step import StepEstimate, StepModel
from cofire.plan.training import TrainingPlan
from cofire.plan.training_note import verdict
from cofire.spec.figure import weakest
from cofire.spec.hardware import ClusterSpec
from cofire.spec.units import format_count

_ROLES = ("weights", "gradients", "optimizer", "activations")
_LISTED = 0.01  # of the kernels' time; what is shorter is summed up


def plan_page(plan: Plan) -> PlanPage:
    """Return the page of a plan.

    Args:
        plan: With a cluster, and a layout that can be taken, the page shows the training on it.

    Returns:
        The page's values; equal plans give equal pages.
    """
    subject = f"run {plan.run.name} of {plan.model.name}" if plan.run else plan.model.name
    if plan.cluster is None:
        return _model_page(plan, subject)
    title = f"{subject} on {plan.cluster.name}"
    subtitle = f"{plan.cluster.num_devices:,} x {plan.cluster.device.name}"
    if plan.training is None:
        headline = f"No plan to train {subject} on {plan.cluster.name}"
        why = plan.training_refused
        said = (headline, f"{why[:1].upper()}{why[1:]}.") if why else (headline,)
        sections = (_memory_section(plan), *_network_sections(plan.cluster), *_cost_sections(plan))
        return PlanPage(title, subtitle, said, tuple(_model_facts(plan)), sections, tuple(_remarks(plan)))
    training, cluster = plan.training, plan.cluster
    steps = StepModel(plan.model, cluster, training.workload)
    sections = (
        *_time_sections(training, steps, cluster),
        Section("What is known, and how well", tuple(_tornados(training)), (_SURE,)),
        *_network_sections(cluster),
        *_layout_sections(training),
        _formula_section(training),
        *_cost_sections(plan),
        _evidence(),
    )
    said = (_headline(plan, training, cluster), *verdict(training, cluster))
    return PlanPage(title, subtitle, said, tuple(_training_facts(training, cluster)), sections, tuple(_remarks(plan)))


_SURE = "The interval of a result takes its figures as independent: the root of the sum of squares of their effects."


def _headline(plan: Plan, training: TrainingPlan, cluster: ClusterSpec) -> str:
    step = training.estimate
    devices = f"{step.num_devices:,} {cluster.device.name}"
    if not step.fits:
        need, room = shown(step.peak_memory_bytes, "B"), shown(cluster.device.memory_bytes, "B")
        return (
            f"{plan.model.name} does not fit on {devices} this way: rank {step.peak_memory_rank} needs {need} of {room}"
        )
    rate = f"{format_count(step.tokens_per_s)} tokens/s"
    text = f"{devices} train {plan.model.name} with {rate}, a step in {shown(step.step_s, 's')}"
    if training.usd is not None:
        text += f", for {shown(training.usd.value, '$')} per 1e12 tokens"
    return text


# -- tiles ----------------------------------------------------------------------------------------------------


def _training_facts(training: TrainingPlan, cluster: ClusterSpec) -> Iterator[Fact]:
    step, time = training.estimate, training.step
    label, total = time.label, time.value
    yield Fact("step", Value(total, "s", label, "modelled", time.low, time.high), f"{step.tokens_per_step:,} tokens")

    def per_time(value: float, unit: str) -> Value:
        """A figure that is as large as the step is short."""
        return Value(value, unit, label, "modelled", value * total / time.high, value * total / time.low)

    yield Fact("tokens per second", per_time(step.tokens_per_s, ""))
    yield Fact("MFU", per_time(step.mfu, "%"), "causal FLOP over the 16-bit peak")
    if training.usd is not None:
        usd = training.usd
        yield Fact(
            "per 1e12 tokens", Value(usd.value, "$", usd.label, "modelled", usd.low, usd.high), "rent of devices"
        )
    else:
        hours = step.device_hours_per_trillion_tokens
        value = Value(hours, "", label, "modelled", hours * time.low / total, hours * time.high / total)
        yield Fact("device hours per 1e12 tokens", value)
    share = f"{step.peak_memory_bytes / cluster.device.memory_bytes:.0%} of rank {step.peak_memory_rank}'s device"
    yield Fact("fullest rank", Value(step.peak_memory_bytes, "B", "assumed", "modelled"), share)
    yield Fact("devices", f"{step.num_devices:,}", describe(step.layout))


def _model_facts(plan: Plan) -> Iterator[Fact]:
    count, length = plan.parameters, plan.training_flops.sequence_length
    yield Fact("parameters", Value(count.total))
    yield Fact("activated", Value(count.activated_head_only), "per token, output head included")
    yield Fact("training", Value(plan.training_flops.main, "FLOP"), f"per token, {length:,} tokens long")
    yield Fact(
        "decoding", Value(plan.decode_flops.total, "FLOP"), f"per token, {plan.decode_flops.context_length:,} cached"
    )
    yield Fact("key-value cache", Value(plan.kv_cache.bytes_per_token, "B"), "per token")
    yield Fact("training memory", Value(plan.training_memory.total, "B", None, "modelled"), "of one device with it all")


# -- training -------------------------------------------------------------------------------------------------


def _time_sections(training: TrainingPlan, steps: StepModel, cluster: ClusterSpec) -> Iterator[Section]:
    step = training.estimate
    yield Section("Where the time goes", (draw_step_parts(training, steps, cluster),), (_bound_sentence(step),))
    yield Section("Where the memory goes", (draw_rank_memory(step, cluster),))
    drawn = draw_schedule(step, steps)
    if drawn is not None:
        share = f"Ranks idle for up to {step.bubble_fraction:.1%} of the pipeline's {shown(step.pipeline_s, 's')}."
        yield Section("The schedule", (drawn,), (share,))
    sums = kernel_sums(step, steps)
    shares = work_shares(sums)
    said = (
        f"Of the kernels' time {shares['matrix']:.0%} is matrix products, {shares['attention']:.0%} attention and "
        f"{shares['memory']:.0%} passes over memory."
    )
    yield Section("What the devices compute", (draw_roofline(step, steps), _kernel_table(sums)), (said,))


def _bound_sentence(step: StepEstimate) -> str:
    share = step.part_s(step.binds) / step.step_s
    return (
        f"{step.binds.capitalize()} take {share:.0%} of a step of {step.num_micro_batches} micro-batches per pipeline; "
        "hatched parts rest on assumed figures."
    )


def _kernel_table(sums: list[KernelSum]) -> SortableTable:
    total = sum(each.time_s for each in sums)
    long = [each for each in sums if each.time_s >= _LISTED * total]
    rest = sum(each.time_s for each in sums[len(long) :])
    rows = tuple(
        (
            each.name,
            each.work if each.work == "memory" else f"{each.work}, {each.number_format}",
            Value(each.flops, "FLOP"),
            Value(each.size_bytes, "B"),
            Value(each.time_s, "s"),
            Value(each.time_s / total, "%"),
        )
        for each in long
    )
    caption = "Through the whole model, forward and backward, recomputation apart; modelled."
    if len(long) < len(sums):
        caption += f" {len(sums) - len(long)} more take {rest / total:.1%} together."
    return SortableTable(
        "Kernels of one micro-batch",
        ("kernel", "work", "FLOP", "bytes", "time", "share"),
        rows,
        caption,
    )


def _tornados(training: TrainingPlan) -> Iterator[Item]:
    for title, result, unit in (
        ("Step time", training.step, "s"),
        ("Cost of 1e12 tokens", training.usd, "$"),
    ):
        drawn = None if result is None else draw_sensitivity(title, result, unit)
        if drawn is not None:
            yield drawn


def _layout_sections(training: TrainingPlan) -> Iterator[Section]:
    items, said = [], []
    ranking = training.ranking
    if ranking is not None:
        said.append(
            f"{ranking.num_considered:,} layouts were tried, {ranking.num_fitting:,} fit, and the fastest was taken."
        )
        if ranking.refused:
            reasons = "; ".join(f"{reason}: {number:,}" for reason, number in ranking.refused.items())
            said.append(f"Not taken: {reasons}.")
        items.append(_ranking_table(ranking.best))
    if training.neighbours:
        items.append(_neighbour_table(training))
    yield Section("Layouts", tuple(items), tuple(said))


def _ranking_table(best: tuple[StepEstimate, ...]) -> SortableTable:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            describe(step.layout),
            Value(step.step_s, "s"),
            Value(step.mfu, "%"),
            Value(step.peak_memory_bytes, "B"),
            Value(step.bubble_fraction, "%"),
            step.binds,
        )
        for step in best
    )
    columns = ("layout", "step", "MFU", "memory", "idle", "binds")
    return SortableTable("The best layouts", columns, rows, "Modelled. A column's name sorts.", chosen=0)


def _neighbour_table(training: TrainingPlan) -> SortableTable:
    rows = []
    for near in training.neighbours:
        if near.step_ratio is None:
            rows.append((near.change, "cannot be taken", near.reason))
            continue
        grew = "more" if near.step_ratio >= 1 else "less"
        rows.append((near.change, f"{100 * (near.step_ratio - 1):+.1f} % time", f"{grew} {near.part}"))
    caption = "Time per token with one field of the layout changed; dp takes up what the other degrees leave."
    return SortableTable("One step away", ("change", "result", "why"), tuple(rows), caption)


def _formula_section(training: TrainingPlan) -> Section:
    rows = tuple(Formula(row.name, row.formula, row.numbers, row.result) for row in training.formulas)
    return Section("Formulas, with the numbers in", (FormulaList("How the figures come about", rows),))


# -- network --------------------------------------------------------------------------------------------------


def _network_sections(cluster: ClusterSpec) -> Iterator[Section]:
    if cluster.network is None:
        return
    try:
        nodes = network_nodes(cluster)
        drawn, cost = draw_network(cluster, nodes), cluster_network_cost(cluster, nodes)
        facts = analyse_cluster(cluster, nodes)
    except PlanError as error:
        yield Section("The network", (), (f"It cannot be drawn: {error}.",))
        return
    label = weakest({cost.label})
    bisection = facts.bisection_bytes_per_s
    rows: tuple[tuple[Cell, ...], ...] = (
        ("endpoints", Value(cost.endpoints)),
        ("switches", Value(cost.switches)),
        ("links between switches", Value(cost.optical_links + cost.electrical_links)),
        ("price", Value(cost.total, "$", label)),
        ("price per endpoint", Value(cost.per_endpoint, "$", label)),
        ("power of switches", Value.of(cost.watts, "W")),
        ("bandwidth across the middle", Value(bisection, "B/s", None if facts.exact else "assumed")),
        ("links of a path, at most", Value(facts.diameter_links)),
    )
    said = [f"Prices: {cost.source}. Cables between a NIC and its switch are not counted."]
    if nodes is not None:
        bought = cluster.network.num_endpoints
        said.append(f"Drawn for {nodes:,} nodes: its switches cannot be wired for num_endpoints = {bought}.")
    yield Section("The network", (drawn, SortableTable("What it takes", ("", "number"), rows)), tuple(said))


# -- what the model costs --------------------------------------------------------------------------------------


def _model_page(plan: Plan, subject: str) -> PlanPage:
    count, work = plan.parameters, plan.workload
    headline = (
        f"{subject} has {format_count(count.total)} parameters, {format_count(count.activated_head_only)} of them "
        "activated per token"
    )
    said = f"Training it takes {shown(plan.training_flops.main, 'FLOP')} per token at {work.sequence_length:,} tokens."
    if plan.run_cost is not None:
        cost = plan.run_cost
        said += f" The run of {format_count(cost.tokens)} tokens takes {shown(cost.flops, 'FLOP')}."
    subtitle = f"{work.micro_batch_size} x {work.sequence_length:,} tokens in {work.recipe}"
    more = "Add a cluster, for example --cluster h800-2048, for its step time, layout and price."
    sections = (_memory_section(plan), *_cost_sections(plan))
    facts = tuple(_model_facts(plan))
    return PlanPage(subject, subtitle, (headline, said, more), facts, sections, tuple(_remarks(plan)))


def _memory_section(plan: Plan) -> Section:
    chosen = plan.workload.recompute
    pair = {chosen: plan.training_memory, ("none" if chosen == "full" else "full"): plan.training_memory_other}
    bars = tuple(_memory_bar({"none": "no recomputation", "full": "full recomputation"}[k], v) for k, v in pair.items())
    caption = "Tensors of training on one device; the framework and its allocator come on top."
    stack = MemoryStack("Training, the whole model on one device", bars, None, caption=caption)
    serving, work = plan.inference_memory, plan.workload
    what = f"{work.batch_size} x {work.context_length:,} tokens of cache, weights in {work.weight_format}"
    parts = (("weights", float(serving.weights)), ("cache", float(serving.cache)))
    decode = MemoryStack("Decoding", (MemoryBar("decoding", parts),), None, caption=f"{what}.")
    return Section("Memory", (stack, decode))


def _memory_bar(name: str, memory: MemoryEstimate) -> MemoryBar:
    return MemoryBar(name, tuple((ROLE_NAMES.get(role, role), float(getattr(memory, role))) for role in _ROLES))


def _cost_sections(plan: Plan) -> Iterator[Section]:
    items: list[Item] = [_parameter_table(plan), _operation_table(plan), _cache_table(plan)]
    if plan.bounds is not None:
        items.append(_decode_table(plan))
    yield Section("What the model costs", tuple(items))


def _parameter_table(plan: Plan) -> SortableTable:
    count = plan.parameters
    rows: list[tuple[Cell, ...]] = [
        (role.replace("_", " "), Value(number), Value(number / count.total, "%"))
        for role, number in count.by_role().items()
        if number
    ]
    rows.append(("all", Value(count.total), Value(1.0, "%")))
    rows.append(
        ("activated per token", Value(count.activated_head_only), Value(count.activated_head_only / count.total, "%"))
    )
    if count.mtp.depth:
        rows.append(("MTP modules, apart", Value(count.mtp.total), Value(count.mtp.total / count.total, "%")))
    return SortableTable("Parameters", ("role", "number", "share"), tuple(rows), "Activated: with the output head.")


def _operation_table(plan: Plan) -> SortableTable:
    training, decode = plan.training_flops, plan.decode_flops
    rows: list[tuple[Cell, ...]] = [
        ("training, matrix products", Value(training.matrices, "FLOP"), "6 x activated parameters"),
        ("training, attention core", Value(training.attention, "FLOP"), "causal" if training.causal else "full square"),
        ("training, main model", Value(training.main, "FLOP"), "what MFU counts"),
    ]
    if training.mtp:
        rows.append(("training, MTP modules", Value(training.mtp, "FLOP"), "head passes included"))
    rows.append(("decoding", Value(decode.total, "FLOP"), f"{decode.context_length:,} cached, {decode.form} attention"))
    if plan.run_cost is not None:
        cost = plan.run_cost
        rows.append(("the whole run", Value(cost.flops, "FLOP"), f"{format_count(cost.tokens)} tokens"))
    return SortableTable("Operations per token", ("", "FLOP", ""), tuple(rows))


def _cache_table(plan: Plan) -> SortableTable:
    cache = plan.kv_cache
    numbers = f"{plan.model.num_layers} layers x {cache.width} numbers x {cache.bytes_per_number:g} B"
    rows: list[tuple[Cell, ...]] = [("as stored", Value(cache.bytes_per_token, "B"), numbers)]
    if plan.parameters.mtp.depth:
        rows.append(("with MTP modules", Value(cache.bytes_per_token_with_mtp, "B"), "for speculative decoding"))
    ratio = cache.bytes_per_token_expanded / cache.bytes_per_token
    if ratio > 1:
        rows.append(("if every head were cached", Value(cache.bytes_per_token_expanded, "B"), f"{ratio:.1f} times"))
    return SortableTable("Key-value cache per token", ("", "bytes", ""), tuple(rows))


def _decode_table(plan: Plan) -> SortableTable:
    assert plan.bounds is not None
    decode = plan.bounds.decode
    read = f"{decode.experts_read:.1f} experts read per layer" if plan.model.moe else "all weights read"
    rows: tuple[tuple[Cell, ...], ...] = (
        ("step", Value(decode.step_s, "s"), f"{decode.binds} binds"),
        ("set by compute", Value(decode.compute_s, "s"), "at the peak"),
        ("set by memory bandwidth", Value(decode.bandwidth_s, "s"), read),
        ("all sequences", Value(decode.tokens_per_s, "token/s"), f"{plan.workload.batch_size} at a time"),
    )
    title = f"Decoding at best, {decode.num_devices} device{'s' * (decode.num_devices > 1)}"
    return SortableTable(title, ("", "at best", ""), rows, "Peaks of the data sheet, no communication.")


# -- evidence and remarks --------------------------------------------------------------------------------------


def _evidence() -> Section:
    rows = tuple(
        Comparison(
            each.point.name,
            Value(each.value, "s" if each.point.quantity == "step_s" else "", None, "modelled"),
            Value(
                each.point.value, "s" if each.point.quantity == "step_s" else "", "measured", source=each.point.source
            ),
            each.point.fitted,
        )
        for each in predictions()
    )
    assumed = {each.point.assumed for each in predictions() if each.point.assumed}
    caption = f"Fire-Flyer's layouts are published in part; assumed: {'; '.join(sorted(assumed))}."
    said = "The same planner on runs that others published; their clusters are presets."
    return Section("Held against published runs", (ErrorTable("Seconds of a step", rows, caption),), (said,))


def _remarks(plan: Plan) -> list[str]:
    remarks = ["Parameters, cache and operations are exact counts over the spec."]
    if plan.training is not None:
        remarks += [
            "Left out of a step: contention between axes of communication, stragglers, failures and restarts, reading "
            "of data, and checkpoints.",
            "Memory leaves out what an allocator fragments.",
        ]
    if plan.cluster is not None:
        remarks.append("Dollars are the rent of the devices alone.")
        needed = plan.bounds.decode.num_devices if plan.bounds is not None else 0
        if needed > plan.cluster.num_devices:
            remarks.append(f"Decoding needs {needed} devices; {plan.cluster.name} has {plan.cluster.num_devices}.")
    return remarks
