"""What serving costs: time per token and to the first token, batch, throughput and price of a model on a cluster.

DeepSeek-V3 technical report (arXiv 2412.19437), section 3.4, and arXiv 2505.09343, section 2.3. A layer has two
stages: computation (attention, then experts) and exchange (dispatch and combine). With dual micro-batch overlap one
half of the batch computes while the other half exchanges, so a layer takes twice the longer of the two; without, it
takes their sum over the whole batch. Computation is a roofline: the longer of operations and bytes, and what its
kernels cost beside. With no latency and no computation this is the papers' bound, :func:`expert_parallel_limit`.

Every figure of the cluster that is used has an interval. Results are computed three times: as given, with all figures
at their favourable and at their unfavourable end; their label is that of the weakest figure used.

Left out: queueing, contention between exchanges (``all_to_all_fraction`` takes it from a flow simulation), prompts
that share a prefix, activations in memory, and the transfer of caches from prefill to decode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from cofire.errors import PlanError
from cofire.plan.flops import decode_attention_flops_per_layer, default_decode_form
from cofire.plan.inference import exchange_bytes, mtp_speed_up
from cofire.plan.kv_cache import kv_bytes_per_token
from cofire.plan.memory import FORMAT_BYTES
from cofire.plan.parameters import ParameterCount, attention_matrix_parameters, count_parameters
from cofire.spec.figure import Figure, Label, weakest
from cofire.spec.hardware import ClusterSpec, PositiveFloat
from cofire.spec.model import GQASpec, ModelSpec
from cofire.spec.spec_type import NonNegative, Positive, Spec

Binding = Literal["compute", "memory bandwidth", "network bandwidth", "network latency", "kernel latency", "capacity"]
End = Literal["value", "best", "worst"]
Parts = dict[Binding, float]

_ENDS: tuple[End, ...] = ("value", "best", "worst")

# Kernels of a layer when small ones are fused: norm and down-projections, up-projections, core, output; and router,
# two products of the experts and the activation between. *Assumed*.
_ATTENTION_KERNELS, _FEED_FORWARD_KERNELS = 5, 4
# FP8 weights carry one FP32 scale per 128 x 128 block.
_FP8_BYTES = 1 + 4 / (128 * 128)


class ServingSpec(Spec):
    """How a model is served by one instance of ``num_devices`` devices.

    Attention is split over ``tp`` devices and replicated over ``num_devices / tp`` groups; routed experts and their
    redundant replicas are spread over all devices. ``route_shared`` sends tokens to shared experts like to routed
    ones (DeepSeek-V3's decoding), and some of the ``num_redundant_experts`` slots then hold them; otherwise every
    device has the shared experts.
    """

    kind: Literal["serving"] = "serving"
    phase: Literal["prefill", "decode"] = "decode"
    num_devices: Positive = 320
    tp: Positive = 4
    sequences_per_device: PositiveFloat = Field(
        default=32, description="decoded (or prefilled) together, both micro-batches, divided by devices"
    )
    context_length: Positive = Field(default=4096, description="tokens attended to; in prefill the prompt")
    num_redundant_experts: NonNegative = 0
    route_shared: bool = False
    overlap: bool = Field(default=True, description="two micro-batches: one computes, the other exchanges")
    forward_in_node: bool = Field(
        default=False, description="send a token once to a node, and on over the fast links (prefill)"
    )
    weight_format: Literal["fp32", "bf16", "fp8"] = "fp8"
    cache_bytes_per_number: PositiveFloat = 2
    dispatch_bytes_per_number: PositiveFloat = 1
    combine_bytes_per_number: PositiveFloat = 2
    expert_imbalance: Figure = Field(
        default=Figure(value=1.1, low=1.0, high=1.3, source="rule of thumb"),
        description="largest over mean load of a device, as expert placement gives it",
    )
    all_to_all_fraction: Figure = Field(
        default=Figure(value=1.0, low=0.9, high=1.0, source="a network without oversubscription"),
        description="part of a port's reachable bandwidth that an all-to-all keeps on this network",
    )
    destinations_per_token: PositiveFloat | None = Field(
        default=None, description="copies of a token sent; none: distinct other devices expected under even routing"
    )
    mtp_acceptance: Annotated[Figure | None, Field(description="of one drafted token; none: nothing is drafted")] = None


class ServingPlan(Spec):
    """One way of serving, with what it costs and what binds it.

    ``step_s`` is one pass of the whole batch. ``tpot_s`` is per output token of a sequence (decode), ``ttft_s`` from
    the start of a prompt's pass to its first token (prefill). ``parts_s`` splits ``step_s`` by resource, without what
    overlap hides; ``stages_s`` are the stages of one mixture layer and one micro-batch, hidden or not.
    """

    serving: ServingSpec
    step_s: Figure
    tpot_s: Figure | None
    ttft_s: Figure | None
    tokens_per_s_per_device: Figure
    usd_per_million_tokens: Figure | None
    parts_s: dict[str, float]
    stages_s: dict[str, float]
    binds: Binding
    expert_slots_per_device: int
    tokens_per_expert: float
    destinations_per_token: float
    weights_bytes_per_device: float
    cache_bytes_per_sequence: float
    max_sequences_per_device: float


class _Reader:
    """Reads figures at one end of their intervals, and keeps their labels."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.labels: set[Label] = set()

    def more(self, figure: Figure) -> float:
        """A figure of which more is better."""
        self.labels.add(figure.label)
        return {"value": figure.value, "best": figure.high, "worst": figure.low}[self.end]

    def less(self, figure: Figure) -> float:
        """A figure of which less is better."""
        self.labels.add(figure.label)
        return {"value": figure.value, "best": figure.low, "worst": figure.high}[self.end]


@dataclass(frozen=True)
class _Layout:
    """Counts that follow from model, cluster and serving alone."""

    model: ModelSpec
    cluster: ClusterSpec
    serving: ServingSpec
    count: ParameterCount
    slots: int  # of experts, in all
    most_slots: int  # on the fullest device
    choices: int  # experts that a token is sent to
    domain: int  # devices on the same fast links

    @property
    def skew(self) -> float:
        """Load of a device with most slots over the mean; 1 where slots divide evenly."""
        return self.most_slots * self.serving.num_devices / self.slots if self.slots else 1.0


def plan_serving(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec | None = None) -> ServingPlan:
    """Plan one way of serving a model.

    Args:
        model: The model; a dense one is served without experts' exchange.
        cluster: Where; one instance takes ``serving.num_devices`` of it.
        serving: How; none: :class:`ServingSpec` as it is.

    Returns:
        Times, throughput, price and capacity.

    Raises:
        PlanError: The instance does not fit the cluster, or weights and caches do not fit its devices.
    """
    serving = ServingSpec() if serving is None else serving
    layout = _lay_out(model, cluster, serving)
    weights, per_sequence, most = _capacity(layout)
    if serving.sequences_per_device > most:
        raise PlanError(
            f"sequences_per_device = {serving.sequences_per_device:g} of {serving.context_length} tokens do not fit "
            f"beside {weights / 1e9:.1f} GB of weights; at most {most:g} do"
        )
    readers: dict[End, _Reader] = {end: _Reader(end) for end in _ENDS}
    timed = {end: _step(layout, reader) for end, reader in readers.items()}
    parts, stages = timed["value"]
    seconds: dict[End, float] = {end: math.fsum(timed[end][0].values()) for end in _ENDS}
    gains = {end: _accepted(layout, reader) for end, reader in readers.items()}
    # A prompt yields its tokens at once, a decoding step one token, or one and the accepted draft.
    per_pass = serving.context_length if serving.phase == "prefill" else 1
    each: dict[End, float] = {end: seconds[end] / gains[end] for end in _ENDS}
    tokens: dict[End, float] = {end: serving.sequences_per_device * per_pass / each[end] for end in _ENDS}
    label = weakest(readers["value"].labels)
    price = None
    if cluster.device_hour_usd is not None:
        rent = {end: reader.less(cluster.device_hour_usd) for end, reader in readers.items()}
        usd: dict[End, float] = {end: rent[end] / 3600 / tokens[end] * 1e6 for end in _ENDS}
        price = _figure(usd, weakest(readers["value"].labels))
    per_token = _figure(each, label)
    full = serving.sequences_per_device + 1 / serving.tp > most
    return ServingPlan(
        serving=serving,
        step_s=_figure(seconds, label),
        tpot_s=per_token if serving.phase == "decode" else None,
        ttft_s=per_token if serving.phase == "prefill" else None,
        tokens_per_s_per_device=_figure(tokens, label),
        usd_per_million_tokens=price,
        parts_s={str(name): value for name, value in parts.items()},
        stages_s=stages,
        binds="capacity" if full else max(parts, key=lambda part: parts[part]),
        expert_slots_per_device=layout.most_slots,
        tokens_per_expert=_tokens_per_slot(layout, _micro_batch(layout)[0]),
        destinations_per_token=sum(_messages(layout)),
        weights_bytes_per_device=weights,
        cache_bytes_per_sequence=per_sequence,
        max_sequences_per_device=most,
    )


def sweep_batch(
    model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec, sequences_per_device: Iterable[float] | None = None
) -> list[ServingPlan]:
    """Plan several batch sizes: those given, or powers of two and the largest that fits.

    Raises:
        PlanError: See :func:`plan_serving`; not even the smallest batch fits.
    """
    if sequences_per_device is None:
        most = _capacity(_lay_out(model, cluster, serving))[2]
        if most <= 0:
            raise PlanError(
                f"no sequence of {serving.context_length} tokens fits beside the weights on num_devices = "
                f"{serving.num_devices}; take more devices or a shorter context_length"
            )
        sizes = [2.0**power for power in range(int(math.log2(most)) + 1)] if most >= 1 else []
        sequences_per_device = sorted({*sizes, most})
    return [
        plan_serving(model, cluster, serving.model_copy(update={"sequences_per_device": size}))
        for size in sequences_per_device
    ]


def largest_batch(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec, limit_s: float) -> ServingPlan:
    """Return the plan with the largest batch whose time per token (or to the first token) is at most ``limit_s``.

    Raises:
        PlanError: Not even one sequence per group of ``tp`` devices keeps the limit.
    """
    layout = _lay_out(model, cluster, serving)
    low, high = 0, round(_capacity(layout)[2] * serving.tp)
    while low < high:
        middle = (low + high + 1) // 2
        if _token_s(model, cluster, serving, middle / serving.tp) <= limit_s:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        least = _token_s(model, cluster, serving, 1 / serving.tp)
        raise PlanError(f"limit_s = {limit_s:g} is not reached by any batch; the smallest takes {least:.4g} s")
    return plan_serving(model, cluster, serving.model_copy(update={"sequences_per_device": low / serving.tp}))


def _token_s(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec, sequences: float) -> float:
    plan = plan_serving(model, cluster, serving.model_copy(update={"sequences_per_device": sequences}))
    found = plan.tpot_s or plan.ttft_s
    return math.inf if found is None else found.value


def _figure(ends: dict[End, float], label: Label) -> Figure:
    return Figure(value=ends["value"], low=min(ends.values()), high=max(ends.values()), label=label, source="modelled")


# -- the layout ----------------------------------------------------------------------------------------------------


def _lay_out(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec) -> _Layout:
    devices, domain = serving.num_devices, min(cluster.scale_up_size, serving.num_devices)
    if devices > cluster.num_devices:
        raise PlanError(
            f"num_devices = {devices} must be at most the {cluster.num_devices} of {cluster.name}; "
            f"take {cluster.num_devices}"
        )
    if devices % serving.tp or (serving.tp > 1 and serving.tp > domain):
        fits = max(tp for tp in range(1, domain + 1) if devices % tp == 0)
        raise PlanError(
            f"tp = {serving.tp} must divide num_devices = {devices} and be at most the {domain} device(s) on the "
            f"fast links of {cluster.name}; the largest such: {fits}"
        )
    if model.moe is not None and devices > domain and cluster.network is None:
        raise PlanError(
            f"num_devices = {devices} do not reach each other on {cluster.name}, which has no network; take {domain}"
        )
    if serving.mtp_acceptance is not None and model.mtp is None:
        raise PlanError(f"mtp_acceptance is given, but {model.name} has no multi-token prediction; leave it out")
    slots, choices = 0, 0
    if model.moe is not None:
        slots = model.moe.num_routed_experts + serving.num_redundant_experts
        choices = model.moe.num_experts_per_token
        if serving.route_shared:
            choices += model.moe.num_shared_experts
            if serving.num_redundant_experts < model.moe.num_shared_experts:
                raise PlanError(
                    f"num_redundant_experts = {serving.num_redundant_experts} must be at least the "
                    f"{model.moe.num_shared_experts} shared expert(s) that route_shared gives slots"
                )
    return _Layout(model, cluster, serving, count_parameters(model), slots, -(-slots // devices), choices, domain)


def _bytes_per_weight(weight_format: str) -> float:
    return _FP8_BYTES if weight_format == "fp8" else FORMAT_BYTES[weight_format]


def _capacity(layout: _Layout) -> tuple[float, float, float]:
    """Bytes of weights on the fullest device, of one sequence's cache, and sequences per device that fit."""
    model, serving, count, device = layout.model, layout.serving, layout.count, layout.cluster.device
    drafting = count.mtp.depth if serving.mtp_acceptance is not None else 0
    # Embedding, head, router and norms stay in BF16 beside FP8.
    each, plain = _bytes_per_weight(serving.weight_format), max(2, FORMAT_BYTES[serving.weight_format])
    split = count.attention + count.dense_ffn
    layers = model.num_moe_layers
    if drafting:
        split += count.mtp.attention + count.mtp.dense_ffn + count.mtp.projection
        layers += drafting if count.mtp.routed_experts else 0
    experts = layout.most_slots
    if model.moe is not None and not serving.route_shared:
        experts += model.moe.num_shared_experts
    weights = each * (split / serving.tp + experts * count.expert * layers)
    weights += plain * ((count.embedding + count.head) / serving.tp + count.router + count.norms)
    free = device.memory_bytes - device.reserved_bytes - weights
    if free <= 0:
        raise PlanError(
            f"{weights / 1e9:.1f} GB of weights do not fit {device.name} of {device.memory_bytes / 1e9:.0f} GB on "
            f"num_devices = {serving.num_devices}; take more devices, or a smaller format than {serving.weight_format}"
        )
    per_token = kv_bytes_per_token(model, serving.cache_bytes_per_number, include_mtp=bool(drafting))
    per_sequence = per_token * serving.context_length / _cache_split(layout)
    # A sequence's cache is on every device of its group: whole with MLA, by heads with GQA.
    return weights, per_sequence, math.floor(free / per_sequence) / serving.tp


def _cache_split(layout: _Layout) -> int:
    attention = layout.model.attention
    return min(layout.serving.tp, attention.num_key_value_heads) if isinstance(attention, GQASpec) else 1


# -- time ----------------------------------------------------------------------------------------------------------


def _accepted(layout: _Layout, reader: _Reader) -> float:
    """Tokens that a step yields per sequence, after what drafting costs."""
    acceptance = layout.serving.mtp_acceptance
    if acceptance is None or layout.serving.phase == "prefill":
        return 1.0
    return mtp_speed_up(reader.more(acceptance), layout.model.num_layers)


def _micro_batch(layout: _Layout) -> tuple[float, float]:
    """Tokens and sequences of a micro-batch, per device."""
    serving = layout.serving
    sequences = serving.sequences_per_device / (2 if serving.overlap else 1)
    if serving.phase == "prefill":
        return sequences * serving.context_length, sequences
    # A drafted token is checked in the same pass as the token before it.
    return sequences * (1 if serving.mtp_acceptance is None else 2), sequences


def _step(layout: _Layout, reader: _Reader) -> tuple[Parts, dict[str, float]]:
    """Seconds of a pass by resource, and of the stages of one mixture layer and micro-batch."""
    model, passes = layout.model, 2 if layout.serving.overlap else 1
    tokens, sequences = _micro_batch(layout)
    attention = _attention(layout, reader, tokens, sequences)
    stages = {"attention": sum(attention.values())}
    total: Parts = {}
    if model.num_dense_layers:
        dense = _products(layout, reader, tokens, layout.count.dense_ffn_per_layer, layout.serving.tp)
        total = _sum(attention, dense, times=model.num_dense_layers * passes)
    if model.num_moe_layers:
        experts = _experts(layout, reader, tokens)
        dispatch = _exchange(layout, reader, tokens, layout.serving.dispatch_bytes_per_number)
        combine = _exchange(layout, reader, tokens, layout.serving.combine_bytes_per_number)
        both = [_sum(attention, experts), _sum(dispatch, combine)]
        if layout.serving.overlap:
            both = [max(both, key=lambda parts: sum(parts.values()))]
        total = _sum(total, _sum(*both, times=model.num_moe_layers * passes))
        stages["experts"] = sum(experts.values())
        stages["dispatch"] = sum(dispatch.values())
        stages["combine"] = sum(combine.values())
    # Prefill needs the logits of each prompt's last token only.
    heads = sequences if layout.serving.phase == "prefill" else tokens
    head = model.vocab_size * model.hidden_size
    head_format = "bf16" if "bf16" in layout.cluster.device.peak_flops_per_s else layout.serving.weight_format
    last = _products(layout, reader, heads, head, layout.serving.tp, 1, head_format)
    return _sum(total, _sum(last, times=passes)), stages


def _sum(*parts: Parts, times: float = 1) -> Parts:
    total: Parts = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + seconds * times
    return total


def _roofline(layout: _Layout, reader: _Reader, flops_s: float, size_bytes: float, kernels: int) -> Parts:
    device = layout.cluster.device
    read_s = size_bytes / (device.memory_bandwidth_bytes_per_s * reader.more(device.memory_efficiency))
    extra = kernels * reader.less(device.kernel_latency_s)
    if flops_s >= read_s:
        return {"compute": flops_s, "kernel latency": extra}
    return {"memory bandwidth": read_s, "kernel latency": extra}


def _rate(layout: _Layout, number_format: str) -> float:
    peaks = layout.cluster.device.peak_flops_per_s
    peak = {str(name): value for name, value in peaks.items()}.get(number_format)
    if peak is None:
        raise PlanError(
            f"device {layout.cluster.device.name!r} has no peak for {number_format} (known: {', '.join(peaks)}); "
            "set weight_format to one it has"
        )
    return peak


def _product_rate(layout: _Layout, reader: _Reader, number_format: str) -> float:
    device = layout.cluster.device
    efficiency = device.matrix_efficiency
    if number_format == "fp8" and device.fp8_matrix_efficiency is not None:
        efficiency = device.fp8_matrix_efficiency
    return _rate(layout, number_format) * reader.more(efficiency) * _left_to_compute(layout, reader)


def _left_to_compute(layout: _Layout, reader: _Reader) -> float:
    """Part of a device's units that compute while kernels of the other micro-batch forward tokens inside the node.

    Without forwarding the network's ports move the tokens alone, as DeepSeek-V3's decoding does.
    """
    serving = layout.serving
    if layout.model.moe is None or not (serving.overlap and serving.forward_in_node):
        return 1.0
    return 1 - reader.less(layout.cluster.device.communication_share)


def _products(
    layout: _Layout,
    reader: _Reader,
    tokens: float,
    parameters: float,
    split: int,
    kernels: int = _FEED_FORWARD_KERNELS,
    number_format: str | None = None,
) -> Parts:
    """Matrix products of ``tokens`` per device with ``parameters`` weights that ``split`` devices share."""
    form = number_format or layout.serving.weight_format
    rate = _product_rate(layout, reader, form)
    return _roofline(
        layout, reader, 2 * tokens * parameters / rate, parameters * _bytes_per_weight(form) / split, kernels
    )


def _attention(layout: _Layout, reader: _Reader, tokens: float, sequences: float) -> Parts:
    """Projections, core and the exchange of a tensor-parallel group, for one layer and micro-batch."""
    model, serving, device = layout.model, layout.serving, layout.cluster.device
    matrices = attention_matrix_parameters(model)
    if serving.phase == "prefill":
        # On average a token of a prompt attends to half of it, with keys and values expanded.
        context, form = max(serving.context_length // 2, 1), "full"
    else:
        context, form = serving.context_length, default_decode_form(model)
    core = decode_attention_flops_per_layer(model, context, form) - 2 * matrices
    # Attention stays in BF16 where the device has it.
    core_format = "bf16" if "bf16" in device.peak_flops_per_s else serving.weight_format
    rate = _rate(layout, core_format) * reader.more(device.attention_efficiency) * _left_to_compute(layout, reader)
    core_s = tokens * core / rate
    cached = sequences * serving.context_length * model.attention.cache_width * serving.cache_bytes_per_number
    cached *= serving.tp / _cache_split(layout)
    parts = _products(layout, reader, tokens, matrices, serving.tp, _ATTENTION_KERNELS - 1)
    parts = _sum(parts, _roofline(layout, reader, core_s, cached, 1))
    links = layout.cluster.scale_up
    if serving.tp > 1 and links is not None:
        # Reduce-scatter after the output projection, all-gather before the next, in BF16.
        size = 2 * (serving.tp - 1) * tokens * model.hidden_size * 2
        rate = links.bandwidth_bytes_per_s * reader.more(links.efficiency)
        latency = 2 * reader.less(links.latency_s)
        parts = _sum(parts, {"network bandwidth": size / rate, "network latency": latency})
    return parts


def _tokens_per_slot(layout: _Layout, tokens: float) -> float:
    return tokens * layout.serving.num_devices * layout.choices / layout.slots if layout.slots else 0.0


def _experts(layout: _Layout, reader: _Reader, tokens: float) -> Parts:
    """Experts of the fullest device for one micro-batch; weights of experts that nobody chose are not read."""
    serving, count, moe = layout.serving, layout.count, layout.model.moe
    if moe is None:
        return {}
    received = _tokens_per_slot(layout, tokens) * layout.most_slots * reader.less(serving.expert_imbalance)
    everywhere = tokens * serving.num_devices
    read = layout.most_slots * (1 - (1 - layout.choices / layout.slots) ** everywhere)
    if not serving.route_shared:
        received += tokens * moe.num_shared_experts
        read += moe.num_shared_experts
    rate = _product_rate(layout, reader, serving.weight_format)
    size = read * count.expert * _bytes_per_weight(serving.weight_format) + 2 * count.router_per_layer
    # Each token is read and written once around the experts, in the formats it travels in.
    size += received * layout.model.hidden_size * (serving.dispatch_bytes_per_number + serving.combine_bytes_per_number)
    return _roofline(layout, reader, 2 * received * count.expert / rate, size, _FEED_FORWARD_KERNELS)


def _messages(layout: _Layout) -> tuple[float, float]:
    """Copies of a token that travel over the fast links and over the network."""
    serving, devices, domain = layout.serving, layout.serving.num_devices, layout.domain
    if layout.model.moe is None or devices == 1:
        return 0.0, 0.0
    near = (domain - 1) / (devices - 1)
    if serving.destinations_per_token is not None:
        return serving.destinations_per_token * near, serving.destinations_per_token * (1 - near)
    fewer, more = layout.slots // devices, layout.slots % devices
    chosen = more * _hit(layout, fewer + 1) + (devices - more) * _hit(layout, fewer)
    away = chosen * (devices - 1) / devices
    if not serving.forward_in_node or devices == domain:
        return away * near, away * (1 - near)
    nodes = devices / domain
    reached = nodes * _hit(layout, round(layout.slots / nodes))
    if nodes <= layout.model.moe.num_expert_groups:
        reached = min(reached, layout.model.moe.num_limited_groups)
    # Every copy takes the fast links at the node where it arrives, but those for the device it arrives at.
    return away * (domain - 1) / domain, reached * (nodes - 1) / nodes


def _hit(layout: _Layout, slots: int) -> float:
    """Probability that a token chooses at least one of ``slots`` slots: 1 - C(S - s, k) / C(S, k)."""
    missed = 1.0
    for drawn in range(layout.choices):
        missed *= max(layout.slots - slots - drawn, 0) / max(layout.slots - drawn, 1)
    return 1 - missed


def _exchange(layout: _Layout, reader: _Reader, tokens: float, bytes_per_number: float) -> Parts:
    """Dispatch or combine of one micro-batch: fast links and network at once, the longer one counts."""
    serving, cluster = layout.serving, layout.cluster
    near, far = _messages(layout)
    # The fullest device receives more than the mean.
    busy = layout.skew * reader.less(serving.expert_imbalance)
    hidden = layout.model.hidden_size
    paths: list[tuple[float, float]] = [(0.0, 0.0)]
    if near and cluster.scale_up is not None:
        links = cluster.scale_up
        rate = links.bandwidth_bytes_per_s * reader.more(links.efficiency)
        size = exchange_bytes(tokens * busy, near, hidden, bytes_per_number)
        paths.append((size / rate, reader.less(links.latency_s)))
    if far and cluster.network is not None:
        size = exchange_bytes(tokens * busy, far, hidden, bytes_per_number)
        paths.append((size / _port_rate(layout, reader), reader.less(_network_latency(layout))))
    transfer, latency = max(paths, key=sum)
    if serving.forward_in_node and len(paths) > 2:
        latency = sum(path[1] for path in paths)
    return {"network bandwidth": transfer, "network latency": latency}


def _port_rate(layout: _Layout, reader: _Reader) -> float:
    """Bytes per second that one device gets out of its node's ports in an all-to-all."""
    network = layout.cluster.network
    assert network is not None
    ports = network.nics_per_node / layout.cluster.devices_per_node
    rate = network.bandwidth_bytes_per_s * ports * reader.more(network.efficiency)
    rate *= reader.more(layout.serving.all_to_all_fraction)
    return rate if _one_leaf(layout) else rate / network.oversubscription


def _network_latency(layout: _Layout) -> Figure:
    network = layout.cluster.network
    assert network is not None
    return network.same_leaf_latency_s if _one_leaf(layout) else network.cross_leaf_latency_s


def _one_leaf(layout: _Layout) -> bool:
    """Whether an instance's nodes hang on the same leaves: with a plane per port, a leaf serves half its ports."""
    network = layout.cluster.network
    assert network is not None
    nodes = -(-layout.serving.num_devices // layout.cluster.devices_per_node)
    per_leaf = network.nics_per_node / network.num_planes
    if network.topology == "multi_rail":
        per_leaf = 1
    return nodes * per_leaf <= network.switch_ports // 2
