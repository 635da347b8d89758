"""How to serve a model on a cluster when nobody says: devices, tensor parallelism, replicas, batch.

DeepSeek-V3 technical report (arXiv 2412.19437), section 3.4: decoding takes one expert per device and a quarter more
devices for shared and redundant experts (320 for 256), prefilling an eighth of the devices' number of experts with as
many redundant ones (32 devices), both with attention over 4 devices. That is the choice for mixtures of 256 experts and
more where the cluster is as large; elsewhere it is the smallest power of two of devices on which the weights fit.

Left out: a search for the best way of serving; :func:`cofire.plan.serving.sweep_batch` varies the batch of one.
"""

from __future__ import annotations

from typing import Any

from cofire.errors import PlanError
from cofire.plan.serving import ServingPlan, ServingSpec, largest_batch, plan_serving
from cofire.spec.figure import Figure
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import parse
from cofire.spec.model import ModelSpec
from cofire.spec.spec_type import Spec

_MANY_EXPERTS = 256  # a device for each pays; DeepSeek-V2's 160 were served on one node
_TP = 4
_SEQUENCES = 32  # per device, the default of ServingSpec
# So fast that it takes no time; a figure has to be finite.
_BOUNDLESS = 1e30


def choose_serving(model: ModelSpec, cluster: ClusterSpec, given: dict[str, Any]) -> ServingSpec:
    """Fill what is not given of a way of serving with what suits model and cluster.

    Args:
        model: The model.
        cluster: The cluster.
        given: Fields of :class:`cofire.plan.serving.ServingSpec`; they stay as they are.

    Returns:
        A way of serving whose weights fit. Where no batch is given, it is 32 sequences per device (two prompts per
        group of ``tp`` devices in prefill), or as many as fit. Where nobody says whether micro-batches overlap, they
        do if that makes a pass of this batch shorter: with little to hide, reading all weights twice costs more.

    Raises:
        SpecError: A field breaks a rule.
        PlanError: The weights fit on no number of devices, or the given numbers do not fit each other.
    """
    own = dict(given)
    own.setdefault("context_length", min(4096, model.max_sequence_length))
    own.setdefault("weight_format", _smallest_format(cluster))
    asked = parse(ServingSpec, own, "serving")
    if asked.context_length > model.max_sequence_length:
        raise PlanError(
            f"context_length = {asked.context_length} must be at most the {model.max_sequence_length} tokens that "
            f"{model.name} is made for; set serving.context_length={model.max_sequence_length} or max_sequence_length"
        )
    base = _as_published(model, cluster, asked, given)
    if base is None:
        base = {**own, **_smallest(model, cluster, own)}
    room = _probe(model, cluster, base).max_sequences_per_device
    if "sequences_per_device" not in own:
        wish = _SEQUENCES if asked.phase == "decode" else 2 / base["tp"]
        base["sequences_per_device"] = min(wish, room)
    chosen = parse(ServingSpec, base, "serving")
    if "overlap" in given or chosen.sequences_per_device > room:
        return chosen
    return plan_faster(model, cluster, chosen).serving


def plan_faster(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec) -> ServingPlan:
    """Plan a batch with overlap of micro-batches and without, and return the plan of the shorter pass.

    One sequence per group of ``tp`` devices is not split into two micro-batches.

    Raises:
        PlanError: See :func:`cofire.plan.serving.plan_serving`.
    """
    plans = [plan_serving(model, cluster, each) for each in _both(serving) if not each.overlap or _splits(each)]
    return min(plans, key=lambda plan: plan.step_s.value)


def plan_within(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec, limit_s: float) -> ServingPlan:
    """Return the plan with most throughput within a time per token (to the first token), with overlap or without.

    Raises:
        PlanError: Not even one sequence per group of ``tp`` devices keeps the limit.
    """
    plans: list[ServingPlan] = []
    refusal: PlanError | None = None
    for each in _both(serving):
        try:
            found = largest_batch(model, cluster, each, limit_s)
            if not each.overlap or _splits(found.serving):
                plans.append(found)
        except PlanError as error:
            # Without overlap the smallest batch is the faster one: its refusal is the one that counts.
            refusal = refusal or error
    if not plans:
        assert refusal is not None
        raise refusal
    return max(plans, key=lambda plan: plan.tokens_per_s_per_device.value)


def _both(serving: ServingSpec) -> list[ServingSpec]:
    return [serving.model_copy(update={"overlap": overlap}) for overlap in (False, True)]


def _splits(serving: ServingSpec) -> bool:
    """Whether a group's batch makes two micro-batches."""
    return serving.sequences_per_device * serving.tp > 2 - 1e-9


def _as_published(
    model: ModelSpec, cluster: ClusterSpec, asked: ServingSpec, given: dict[str, Any]
) -> dict[str, Any] | None:
    """DeepSeek-V3's way of serving, with what is given; none where it does not suit."""
    if model.moe is None or model.moe.num_routed_experts < _MANY_EXPERTS or "num_devices" in given or "tp" in given:
        return None
    experts, shared = model.moe.num_routed_experts, model.moe.num_shared_experts
    prefill = asked.phase == "prefill"
    spare = given.get("num_redundant_experts", experts // 8 if prefill else experts // 4)
    devices = experts // 8 if prefill else experts + spare
    if devices > cluster.num_devices or cluster.scale_up_size < _TP or devices % _TP:
        return None
    if cluster.network is None and devices > cluster.scale_up_size:
        return None
    found = {
        "num_devices": devices,
        "tp": _TP,
        "num_redundant_experts": spare,
        "route_shared": not prefill and 0 < shared <= spare,
        "forward_in_node": prefill and cluster.scale_up_size < devices,
        "context_length": asked.context_length,
        "weight_format": asked.weight_format,
        **given,
    }
    try:
        _probe(model, cluster, found)
    except PlanError:
        return None
    return found


def _smallest(model: ModelSpec, cluster: ClusterSpec, own: dict[str, Any]) -> dict[str, int]:
    """Return the fewest devices, and the degree of tensor parallelism, with which the weights fit."""
    reach = cluster.num_devices if cluster.network is not None else cluster.scale_up_size
    if cluster.network is None and cluster.scale_up is None:
        reach = 1
    counts = sorted({2**power for power in range(reach.bit_length()) if 2**power <= reach} | {reach})
    if "num_devices" in own:
        counts = [own["num_devices"]]
    refusal: PlanError | None = None
    for devices in counts:
        for tp in _tensor_degrees(cluster, devices, own):
            try:
                _probe(model, cluster, {**own, "num_devices": devices, "tp": tp})
            except PlanError as error:
                refusal = error
            else:
                return {"num_devices": devices, "tp": tp}
    if refusal is None:
        raise PlanError(f"tp = {own.get('tp')} divides no number of devices of {cluster.name}; take tp = 1")
    if "num_devices" in own or "tp" in own:
        raise refusal
    what = str(refusal).partition(";")[0]
    if model.moe is None:
        raise PlanError(
            f"{what}; a dense model is split over tp alone, at most the {cluster.scale_up_size} device(s) on the fast "
            f"links of {cluster.name}: take devices with more memory or a smaller weight_format"
        )
    more = "a larger cluster.num_nodes" if cluster.network is not None else "a cluster with a network"
    raise PlanError(f"{what}; one instance has at most {counts[-1]} device(s) of {cluster.name}: take {more}")


def _tensor_degrees(cluster: ClusterSpec, devices: int, own: dict[str, Any]) -> list[int]:
    """Degrees to try: the papers' 4 first, then larger ones, then smaller ones; those that divide the devices."""
    if "tp" in own:
        # A count of devices that was given is left to the planner's own check, which says what would fit.
        return [own["tp"]] if devices % own["tp"] == 0 or "num_devices" in own else []
    most = min(devices, cluster.scale_up_size)
    powers = [2**power for power in range(most.bit_length()) if 2**power <= most and devices % 2**power == 0]
    return sorted(powers, key=lambda tp: (tp < _TP, tp if tp >= _TP else -tp))


def _probe(model: ModelSpec, cluster: ClusterSpec, fields: dict[str, Any]) -> ServingPlan:
    """Plan the smallest batch there is: one sequence on a group of ``tp`` devices."""
    tp = fields.get("tp", 1)
    return plan_serving(model, cluster, parse(ServingSpec, {**fields, "sequences_per_device": 1 / tp}, "serving"))


def _smallest_format(cluster: ClusterSpec) -> str:
    """Return the smallest format of weights in which the device computes."""
    peaks = {str(name) for name in cluster.device.peak_flops_per_s}
    return next((name for name in ("fp8", "bf16", "fp32") if name in peaks), "bf16")


class NetworkLimit(Spec):
    """What the network alone allows, and how far a plan is from it.

    ``step_s`` is the pass of the same batch with no computation, no latency, even experts and every link at its whole
    bandwidth; ``times_over`` is the planned pass over it. ``per_token_s`` is the bound on ``tpot_s`` (``ttft_s``).
    """

    step_s: float
    per_token_s: float
    times_over: float


def network_limit(model: ModelSpec, cluster: ClusterSpec, plan: ServingPlan) -> NetworkLimit | None:
    """Return the bound of arXiv 2505.09343, section 2.3.2, for a plan's own devices, batch and destinations.

    With a mixture in every layer and all copies on the network it is
    :func:`cofire.plan.inference.expert_parallel_limit`; here dense layers exchange nothing, and copies for devices on
    the same fast links take those.

    Returns:
        The bound; none where no experts are exchanged.
    """
    if plan.destinations_per_token == 0:
        return None
    exact = Figure(value=1, low=1, high=1, label="measured")
    none = exact.at(0)
    device = cluster.device.model_copy(
        update={
            "peak_flops_per_s": dict.fromkeys(cluster.device.peak_flops_per_s, _BOUNDLESS),
            "memory_bandwidth_bytes_per_s": _BOUNDLESS,
            "kernel_latency_s": none,
            "communication_share": none,
        }
    )
    links, network = cluster.scale_up, cluster.network
    if links is not None:
        links = links.model_copy(update={"efficiency": exact, "latency_s": none})
    if network is not None:
        network = network.model_copy(
            update={"efficiency": exact, "same_leaf_latency_s": none, "cross_leaf_latency_s": none}
        )
    ideal = cluster.model_copy(update={"device": device, "scale_up": links, "network": network})
    serving = plan.serving.model_copy(update={"expert_imbalance": exact, "all_to_all_fraction": exact})
    alone = plan_serving(model, ideal, serving)
    step = alone.parts_s.get("network bandwidth", 0.0)
    if step <= 0:
        return None
    token = alone.tpot_s or alone.ttft_s
    assert token is not None
    return NetworkLimit(step_s=step, per_token_s=token.value, times_over=plan.step_s.value / step)
