"""Published figures of serving that the planner must give, or come near without being fitted to them.

Sources: [ISCA] arXiv 2505.09343, [V3] arXiv 2412.19437, [DeepEP] the low-latency table of that library's README (H800,
one 400 Gbit/s port per device, 128 tokens, FP8 dispatch, BF16 combine), [overview] DeepSeek's published statistics of
its inference service of March 2025.
"""

from __future__ import annotations

import pytest

from cofire.plan.inference import expert_parallel_limit, mtp_speed_up
from cofire.plan.serving import ServingPlan, ServingSpec, largest_batch, plan_serving
from cofire.spec import ClusterSpec, ModelSpec, load_as
from cofire.spec.figure import Figure
from cofire.spec.hardware import DeviceSpec, NetworkSpec, ScaleUpSpec

EXACT = Figure(value=1, low=1, high=1, label="measured")
NOTHING = Figure(value=0, low=0, high=0, label="measured")
# A device that computes in no time, so that only the exchange is left.
INSTANT = DeviceSpec(
    name="instant",
    memory_bytes=1e30,
    memory_bandwidth_bytes_per_s=1e30,
    peak_flops_per_s={"bf16": 1e40, "fp8": 1e40},
    kernel_latency_s=NOTHING,
)


def exchange_only(bandwidth: float, links: bool) -> ClusterSpec:
    """320 devices with nothing but bandwidth, over the network or, as NVL72 is scaled, over fast links alone."""
    if links:
        fast = ScaleUpSpec(bandwidth_bytes_per_s=bandwidth, efficiency=EXACT, latency_s=NOTHING, domain_size=320)
        return ClusterSpec(name="links", num_nodes=40, device=INSTANT, scale_up=fast)
    network = NetworkSpec(
        bandwidth_bytes_per_s=bandwidth, efficiency=EXACT, same_leaf_latency_s=NOTHING, cross_leaf_latency_s=NOTHING
    )
    return ClusterSpec(name="network", num_nodes=40, device=INSTANT, network=network)


# -- the limits of table-less section 2.3.2 [ISCA] ------------------------------------------------------


@pytest.mark.parametrize(
    ("bandwidth", "hidden", "links", "communication_us", "layer_us", "token_ms", "rate"),
    [
        (50e9, 7000, False, 120.960, 241.920, 14.757, 67.76),
        (900e9, 7000, True, 6.720, 13.440, 0.8198, 1219.8),
        (50e9, 7168, False, 123.863, 247.726, 15.111, 66.18),
        (40e9, 7000, False, 151.200, 302.400, 18.446, 54.21),
        (900e9, 7168, True, 6.881, 13.763, 0.8395, 1191.2),
    ],
)
def test_without_latency_and_compute_a_plan_is_the_papers_limit(
    bandwidth: float, hidden: int, links: bool, communication_us: float, layer_us: float, token_ms: float, rate: float
) -> None:
    model = load_as(ModelSpec, "deepseek-v3", [f"hidden_size={hidden}", "moe.num_first_dense_layers=0"])
    serving = ServingSpec(
        num_devices=320,
        tp=1,
        sequences_per_device=64,
        num_redundant_experts=64,
        route_shared=True,
        destinations_per_token=9,
        expert_imbalance=EXACT,
        all_to_all_fraction=EXACT,
    )
    plan = plan_serving(model, exchange_only(bandwidth, links), serving)
    assert plan.tpot_s is not None
    exchange = plan.stages_s["dispatch"] + plan.stages_s["combine"]
    assert exchange * 1e6 == pytest.approx(communication_us, abs=6e-4)
    assert 2 * exchange * 1e6 == pytest.approx(layer_us, abs=1e-3)
    assert plan.tpot_s.value * 1e3 == pytest.approx(token_ms, abs=6e-4)
    assert 1 / plan.tpot_s.value == pytest.approx(rate, abs=0.06)
    assert plan.binds == "network bandwidth"
    assert plan.tpot_s.value == pytest.approx(expert_parallel_limit(hidden, 61, bandwidth).time_per_token_s, rel=1e-9)


@pytest.mark.parametrize(("acceptance", "gain"), [(0.80, 1.771), (0.85, 1.820), (0.90, 1.869)])
def test_drafting_gains_what_the_paper_says_where_tokens_are_free(acceptance: float, gain: float) -> None:
    model = load_as(ModelSpec, "deepseek-v3", [])
    # Latency alone: a second token in the pass costs nothing, which is the closed formula's case.
    network = NetworkSpec(bandwidth_bytes_per_s=1e30)
    cluster = ClusterSpec(name="latency", num_nodes=40, device=INSTANT, network=network)
    plain = ServingSpec(tp=1, sequences_per_device=8)
    accepted = Figure(value=acceptance, low=acceptance, high=acceptance)
    drafted = plan_serving(model, cluster, plain.model_copy(update={"mtp_acceptance": accepted})).tpot_s
    alone = plan_serving(model, cluster, plain).tpot_s
    assert drafted is not None
    assert alone is not None
    assert alone.value / drafted.value == pytest.approx(gain, abs=5e-4)
    assert gain == pytest.approx(mtp_speed_up(acceptance, 61), abs=5e-4)


# -- measured exchanges, not fitted [DeepEP] ------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "dispatch_us", "combine_us"), [(32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)]
)
def test_exchange_on_h800_is_within_13_percent_of_measured_kernels(
    devices: int, dispatch_us: float, combine_us: float
) -> None:
    cluster = load_as(ClusterSpec, "h800-2048", [])
    serving = ServingSpec(
        num_devices=devices,
        tp=1,
        sequences_per_device=128,
        context_length=1,
        overlap=False,
        expert_imbalance=EXACT,
        # Those kernels send a copy per expert; one in ``devices`` stays where it is. FP8 travels with its scales.
        destinations_per_token=8 * (devices - 1) / devices,
        dispatch_bytes_per_number=7392 / 7168,
    )
    plan = plan_serving(load_as(ModelSpec, "deepseek-v3", []), cluster, serving)
    assert plan.stages_s["dispatch"] * 1e6 == pytest.approx(dispatch_us, rel=0.13)
    assert plan.stages_s["combine"] * 1e6 == pytest.approx(combine_us, rel=0.13)


# -- how DeepSeek-V3 was deployed: plausible, not exact -------------------------------------------------


def deployed(serving: ServingSpec) -> ServingPlan:
    return plan_serving(load_as(ModelSpec, "deepseek-v3", []), load_as(ClusterSpec, "h800-2048", []), serving)


def test_prefill_of_the_report_has_nine_experts_per_device() -> None:
    serving = ServingSpec(
        phase="prefill", num_devices=32, tp=4, sequences_per_device=1, num_redundant_experts=32, forward_in_node=True
    )
    plan = deployed(serving)
    assert plan.expert_slots_per_device == 9
    assert plan.ttft_s is not None
    assert plan.ttft_s.low < plan.ttft_s.value < plan.ttft_s.high
    # 73.7 thousand tokens per second and node, 56.3 % of them from a cache, over a day of changing load.
    served = 73.7e3 * (1 - 0.563) / 8
    assert served < plan.tokens_per_s_per_device.value < 3 * served


def test_decoding_of_the_report_has_one_expert_per_device() -> None:
    plan = deployed(ServingSpec(num_devices=320, tp=4, num_redundant_experts=64, route_shared=True))
    assert plan.expert_slots_per_device == 1
    assert plan.tokens_per_expert == pytest.approx(16 * 9)
    assert plan.tpot_s is not None
    assert 0.01 < plan.tpot_s.low < plan.tpot_s.high < 0.05


def test_decoding_at_the_published_rate_allows_more_than_was_served_and_not_thrice_as_much() -> None:
    # [overview]: 144 devices with two routed experts and a shared one each, 4989 tokens of context on average,
    # 20 to 22 tokens per second for a user, 14.8 thousand output tokens per second and node.
    model, cluster = load_as(ModelSpec, "deepseek-v3", []), load_as(ClusterSpec, "h800-2048", [])
    serving = ServingSpec(num_devices=144, tp=1, num_redundant_experts=32, context_length=4989)
    plan = largest_batch(model, cluster, serving, limit_s=1 / 21)
    served = 14.8e3 / 8
    assert plan.expert_slots_per_device == 2
    assert served < plan.tokens_per_s_per_device.value < 3 * served
