"""Serving plans against sums made by hand, a simulated draw of experts, and what must hold for any plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError
from cofire.plan.serving import ServingPlan, ServingSpec, largest_batch, plan_serving, sweep_batch
from cofire.spec import ClusterSpec, ModelSpec, load_as
from cofire.spec.figure import Figure
from cofire.spec.hardware import DeviceSpec, NetworkSpec, ScaleUpSpec

V3 = load_as(ModelSpec, "deepseek-v3", [])
QWEN = load_as(ModelSpec, "qwen2.5-72b", [])
# The rates are written out, so that a better-known preset changes no sum made by hand.
H800 = ClusterSpec(
    name="h800-2048",
    num_nodes=256,
    device=DeviceSpec(
        name="H800 SXM",
        memory_bytes=80e9,
        memory_bandwidth_bytes_per_s=3.35e12,
        peak_flops_per_s={"bf16": 989e12, "fp8": 1979e12},
        matrix_efficiency=Figure(value=0.7, low=0.6, high=0.8),
        attention_efficiency=Figure(value=0.5, low=0.4, high=0.6),
        memory_efficiency=Figure(value=0.8, low=0.7, high=0.9),
        kernel_latency_s=Figure(value=4e-6, low=2e-6, high=8e-6),
    ),
    scale_up=ScaleUpSpec(
        bandwidth_bytes_per_s=200e9,
        efficiency=Figure(value=0.8, low=0.75, high=0.85, label="measured"),
        latency_s=Figure(value=3.3e-6, low=2e-6, high=6e-6),
    ),
    network=NetworkSpec(
        topology="multi_plane",
        num_planes=8,
        bandwidth_bytes_per_s=50e9,
        efficiency=Figure(value=0.85, low=0.8, high=0.95, label="measured"),
        same_leaf_latency_s=Figure(value=2.8e-6, low=2e-6, high=4e-6),
        cross_leaf_latency_s=Figure(value=3.7e-6, low=3e-6, high=6e-6),
    ),
    device_hour_usd=Figure(value=2, low=1.5, high=3),
)
EXACT = Figure(value=1, low=1, high=1, label="measured")


def decode(**changes: object) -> ServingPlan:
    fields = {"num_devices": 144, "tp": 1, "num_redundant_experts": 32} | changes
    return plan_serving(V3, H800, ServingSpec(**fields))  # pyright: ignore[reportArgumentType]


def rack(**changes: float) -> ClusterSpec:
    """One NVL72 rack: 72 devices on the same fast links, and no network."""
    links = ScaleUpSpec(bandwidth_bytes_per_s=900e9, domain_size=72)
    device = H800.device.model_copy(update={"memory_bytes": 192e9, "memory_bandwidth_bytes_per_s": 8e12} | changes)
    return ClusterSpec(name="nvl72", num_nodes=18, devices_per_node=4, device=device, scale_up=links)


# -- times ----------------------------------------------------------------------------------------------


def test_parts_sum_to_the_step_and_the_step_lies_in_its_interval() -> None:
    for phase, overlap in itertools.product(("prefill", "decode"), (True, False)):
        plan = decode(phase=phase, overlap=overlap, sequences_per_device=2)
        assert sum(plan.parts_s.values()) == pytest.approx(plan.step_s.value)
        assert plan.step_s.low < plan.step_s.value < plan.step_s.high
        assert plan.step_s.label == "assumed"


def test_a_step_is_the_sum_of_its_stages_with_overlap_the_longer_half() -> None:
    dense = {"num_layers": 58, "moe": V3.moe.model_copy(update={"num_first_dense_layers": 0})} if V3.moe else {}
    model = V3.model_copy(update=dense)
    serving = ServingSpec(num_devices=144, tp=1, num_redundant_experts=32, sequences_per_device=64)
    paired = plan_serving(model, H800, serving)
    plain = plan_serving(model, H800, serving.model_copy(update={"overlap": False}))
    head_s = paired.step_s.value
    compute = paired.stages_s["attention"] + paired.stages_s["experts"]
    exchange = paired.stages_s["dispatch"] + paired.stages_s["combine"]
    head_s -= 58 * 2 * max(compute, exchange)
    assert 0 < head_s < 0.1 * paired.step_s.value
    last = plain.step_s.value - 58 * sum(plain.stages_s.values())
    assert 0 < last <= head_s
    # Halves send half, so that only latency and what is read twice differ.
    assert exchange < plain.stages_s["dispatch"] + plain.stages_s["combine"] < 2 * exchange


def test_the_times_of_one_layer_equal_a_sum_made_by_hand() -> None:
    plan = decode(sequences_per_device=128, overlap=False, expert_imbalance=EXACT)
    peak, reach, memory = 1979e12 * 0.7, 989e12 * 0.5, 3.35e12 * 0.8
    matrices = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    projections = max(2 * 128 * matrices / peak, matrices * (1 + 4 / 16384) / memory)
    core = max(128 * 2 * 4096 * 128 * (576 + 512) / reach, 128 * 4096 * 576 * 2 / memory)
    assert plan.stages_s["attention"] == pytest.approx(projections + core + 5 * 4e-6)
    expert = 3 * 7168 * 2048
    tokens = 128 * 144 * 8 / 288 * 2 + 128
    read = (3 * (1 + 4 / 16384) * expert + 2 * 1_835_264 + tokens * 7168 * 3) / memory
    assert plan.stages_s["experts"] == pytest.approx(max(2 * tokens * expert / peak, read) + 4 * 4e-6, rel=1e-6)
    away = plan.destinations_per_token
    network = 128 * away * 136 / 143 * 7168 / (50e9 * 0.85) + 2.8e-6
    assert plan.stages_s["dispatch"] == pytest.approx(network)


def test_memory_bound_and_compute_bound_ends_are_named() -> None:
    assert decode(sequences_per_device=1).binds == "memory bandwidth"
    assert decode(sequences_per_device=128).binds == "compute"
    slow = H800.model_copy(
        update={"network": H800.network and H800.network.model_copy(update={"bandwidth_bytes_per_s": 1e9})}
    )
    serving = ServingSpec(num_devices=144, tp=1, num_redundant_experts=32, sequences_per_device=16)
    assert plan_serving(V3, slow, serving).binds == "network bandwidth"
    late = Figure(value=1e-2, low=1e-2, high=1e-2)
    far = H800.model_copy(
        update={"network": H800.network and H800.network.model_copy(update={"same_leaf_latency_s": late})}
    )
    assert plan_serving(V3, far, serving).binds == "network latency"
    full = decode(sequences_per_device=decode().max_sequences_per_device)
    assert full.binds == "capacity"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
def test_a_larger_batch_takes_longer_and_yields_more_tokens(
    sequences: int, tp: int, overlap: bool, route_shared: bool
) -> None:
    fields = {"tp": tp, "overlap": overlap, "route_shared": route_shared, "context_length": 2048}
    small, large = (decode(sequences_per_device=size, **fields) for size in (sequences, sequences + 1))
    assert small.step_s.value < large.step_s.value
    assert small.tokens_per_s_per_device.value < large.tokens_per_s_per_device.value
    assert small.usd_per_million_tokens is not None
    assert large.usd_per_million_tokens is not None
    assert small.usd_per_million_tokens.value > large.usd_per_million_tokens.value


def test_fp8_products_have_their_own_efficiency_and_forwarding_kernels_take_units() -> None:
    serving = ServingSpec(phase="prefill", num_devices=144, tp=1, num_redundant_experts=32, sequences_per_device=2)
    forwarding = serving.model_copy(update={"forward_in_node": True})
    plain = plan_serving(V3, H800, forwarding)
    changes = {"fp8_matrix_efficiency": EXACT.at(0.35), "communication_share": EXACT.at(0.2)}
    slow = H800.model_copy(update={"device": H800.device.model_copy(update=changes)})
    kernels = 4 * 4e-6
    ratio = (plan_serving(V3, slow, forwarding).stages_s["experts"] - kernels) / (plain.stages_s["experts"] - kernels)
    assert ratio == pytest.approx(0.7 / 0.35 / 0.8)
    ratio = (plan_serving(V3, slow, serving).stages_s["experts"] - kernels) / (plain.stages_s["experts"] - kernels)
    assert ratio == pytest.approx(0.7 / 0.35)


def test_price_is_rent_over_throughput_with_the_ends_turned() -> None:
    plan = decode()
    price, rate = plan.usd_per_million_tokens, plan.tokens_per_s_per_device
    assert price is not None
    assert price.value == pytest.approx(2.0 / 3600 / rate.value * 1e6)
    assert price.low == pytest.approx(1.5 / 3600 / rate.high * 1e6)
    assert price.high == pytest.approx(3.0 / 3600 / rate.low * 1e6)
    free = plan_serving(V3, H800.model_copy(update={"device_hour_usd": None}), plan.serving)
    assert free.usd_per_million_tokens is None


def test_a_label_is_that_of_the_weakest_figure_used() -> None:
    known = dict.fromkeys(("matrix_efficiency", "attention_efficiency", "memory_efficiency"), EXACT)
    device = H800.device.model_copy(update=known | {"kernel_latency_s": EXACT.at(4e-6)})
    alone = ClusterSpec(name="measured", devices_per_node=8, device=device)
    dense = ServingSpec(num_devices=8, tp=1, sequences_per_device=1, weight_format="fp8")
    plan = plan_serving(QWEN.model_copy(update={"num_layers": 20}), alone, dense)
    assert plan.step_s.label == "measured"
    assert plan.step_s.low == plan.step_s.high
    fitted = device.model_copy(update={"memory_efficiency": EXACT.model_copy(update={"label": "calibrated"})})
    plan = plan_serving(QWEN.model_copy(update={"num_layers": 20}), alone.model_copy(update={"device": fitted}), dense)
    assert plan.step_s.label == "calibrated"


def test_checking_a_draft_costs_a_second_token_per_sequence() -> None:
    accepted = Figure(value=0.85, low=0.8, high=0.9, label="measured")
    drafted, doubled = decode(sequences_per_device=32, mtp_acceptance=accepted), decode(sequences_per_device=64)
    alone = decode(sequences_per_device=32)
    assert alone.step_s.value < drafted.step_s.value <= doubled.step_s.value
    assert drafted.tpot_s is not None
    assert alone.tpot_s is not None
    assert 1 < alone.tpot_s.value / drafted.tpot_s.value < 1.82
    assert drafted.cache_bytes_per_sequence == pytest.approx(alone.cache_bytes_per_sequence * 62 / 61)


# -- where tokens go ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "redundant"), [(32, 0), (64, 0), (72, 32), (72, 0), (256, 0)])
def test_destinations_are_the_distinct_other_devices_of_a_simulated_draw(devices: int, redundant: int) -> None:
    cluster = rack() if devices == 72 else H800
    serving = ServingSpec(num_devices=devices, tp=1, num_redundant_experts=redundant, sequences_per_device=1)
    found = plan_serving(V3, cluster, serving).destinations_per_token
    rng, slots, trials = np.random.default_rng(0), 256 + redundant, 20_000
    chosen = rng.random((trials, slots)).argpartition(8, axis=1)[:, :8]
    # Slots are dealt out, so that devices differ by one slot where they do not divide.
    held = np.sort(chosen % devices, axis=1)
    home = rng.integers(0, devices, trials)
    distinct = 1 + (np.diff(held, axis=1) > 0).sum(1) - (held == home[:, None]).any(1)
    assert found == pytest.approx(distinct.mean(), rel=0.005)


def test_a_token_is_sent_once_to_a_node_when_it_is_forwarded_there() -> None:
    fields = {"num_devices": 64, "num_redundant_experts": 0, "sequences_per_device": 16, "expert_imbalance": EXACT}
    direct, forwarded = decode(**fields), decode(**fields, forward_in_node=True)
    # Four of eight groups at most, of which one in eight is at home: at most 3.5 copies over the network.
    network = 50e9 * 0.85
    copies = (forwarded.stages_s["dispatch"] - 2.8e-6 - 3.3e-6) * network / (8 * 7168)
    assert copies == pytest.approx(3.5, rel=1e-6)
    assert forwarded.stages_s["combine"] < direct.stages_s["combine"]


def test_nvl72_holds_several_experts_per_device_and_says_how_uneven_that_is() -> None:
    serving = ServingSpec(num_devices=72, tp=1, sequences_per_device=64, expert_imbalance=EXACT)
    uneven = plan_serving(V3, rack(), serving)
    even = plan_serving(V3, rack(), serving.model_copy(update={"num_redundant_experts": 32}))
    assert uneven.expert_slots_per_device == even.expert_slots_per_device == 4
    # 256 experts on 72 devices: those with four have 4 x 72 / 256 of the mean.
    assert uneven.tokens_per_expert == pytest.approx(32 * 8 * 72 / 256)
    assert even.tokens_per_expert == pytest.approx(32 * 8 / 4)
    latency = 3.3e-6
    ratio = (uneven.stages_s["dispatch"] - latency) / (even.stages_s["dispatch"] - latency)
    assert ratio == pytest.approx(72 * 4 / 256 * uneven.destinations_per_token / even.destinations_per_token)
    assert uneven.tpot_s is not None
    # The paper's 0.82 ms is a bandwidth bound of one expert per device; four of them have weights to read.
    assert uneven.tpot_s.value > 0.8198e-3 * 2


def test_a_dense_model_exchanges_nothing() -> None:
    plan = plan_serving(QWEN, H800, ServingSpec(num_devices=8, tp=8, sequences_per_device=4))
    assert set(plan.stages_s) == {"attention"}
    assert plan.destinations_per_token == 0
    assert plan.expert_slots_per_device == 0


# -- capacity -------------------------------------------------------------------------------------------


def test_latent_cache_is_whole_on_each_device_of_a_group_and_keys_are_split_by_heads() -> None:
    one, four = decode(tp=1), decode(tp=4)
    assert one.cache_bytes_per_sequence == four.cache_bytes_per_sequence == 61 * 576 * 2 * 4096
    assert four.max_sequences_per_device < one.max_sequences_per_device / 2
    keys = [
        plan_serving(QWEN, H800, ServingSpec(num_devices=16, tp=tp, sequences_per_device=1)).cache_bytes_per_sequence
        for tp in (2, 4, 8)
    ]
    assert keys == [327_680 * 4096 / tp for tp in (2, 4, 8)]


def test_weights_and_caches_of_the_largest_batch_fill_the_device_and_no_more() -> None:
    plan = decode()
    used = plan.weights_bytes_per_device + plan.max_sequences_per_device * plan.cache_bytes_per_sequence
    assert used <= 80e9 - 2e9 < used + plan.cache_bytes_per_sequence
    share = 58 * 3 * 7168 * 2048 * 3 * (1 + 4 / 16384)
    assert plan.weights_bytes_per_device > share
    with pytest.raises(PlanError, match=r"sequences_per_device = 999 of 4096 tokens do not fit .* at most"):
        decode(sequences_per_device=999)


def test_a_sweep_ends_at_the_largest_batch_and_time_per_token_only_grows() -> None:
    serving = ServingSpec(num_devices=144, tp=1, num_redundant_experts=32)
    plans = sweep_batch(V3, H800, serving)
    sizes = [plan.serving.sequences_per_device for plan in plans]
    assert sizes[0] == 1
    assert sizes[-1] == plans[0].max_sequences_per_device
    times = [plan.step_s.value for plan in plans]
    assert times == sorted(times)
    assert plans[-1].binds == "capacity"


def test_the_largest_batch_under_a_limit_is_the_last_that_keeps_it() -> None:
    serving = ServingSpec(num_devices=144, tp=1, num_redundant_experts=32)
    plan = largest_batch(V3, H800, serving, limit_s=0.03)
    above = decode(sequences_per_device=plan.serving.sequences_per_device + 1)
    assert plan.tpot_s is not None
    assert above.tpot_s is not None
    assert plan.tpot_s.value <= 0.03 < above.tpot_s.value
    with pytest.raises(PlanError, match=r"limit_s = 0\.001 is not reached by any batch; the smallest takes 0\.0"):
        largest_batch(V3, H800, serving, limit_s=0.001)


# -- what cannot be planned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_devices": 4096}, "num_devices = 4096 must be at most the 2048 of h800-2048"),
        ({"num_devices": 144, "tp": 16}, "tp = 16 must divide num_devices = 144 .* at most the 8 .* largest such: 8"),
        ({"num_devices": 144, "tp": 5}, "tp = 5 must divide num_devices = 144"),
        ({"num_devices": 8, "tp": 1}, "GB of weights do not fit H800 SXM of 80 GB on num_devices = 8"),
        ({"num_devices": 256, "route_shared": True}, "num_redundant_experts = 0 must be at least the 1 shared"),
    ],
)
def test_a_layout_that_does_not_fit_says_which_number(fields: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_serving(V3, H800, ServingSpec(**fields))
    assert "\n" not in str(caught.value)


def test_devices_without_a_network_and_formats_without_a_peak_are_refused() -> None:
    with pytest.raises(PlanError, match=r"num_devices = 144 do not reach each other .* take 8"):
        plan_serving(V3, H800.model_copy(update={"network": None}), ServingSpec(num_devices=144, tp=1))
    a100 = H800.model_copy(update={"device": H800.device.model_copy(update={"peak_flops_per_s": {"bf16": 312e12}})})
    with pytest.raises(PlanError, match=r"has no peak for fp8 .* set weight_format"):
        plan_serving(V3, a100, ServingSpec(num_devices=144, tp=1))
    with pytest.raises(PlanError, match="has no multi-token prediction"):
        plan_serving(QWEN, H800, ServingSpec(num_devices=8, tp=8, mtp_acceptance=EXACT.at(0.8)))
