"""The published figures that the formulas must give, and the published figures that they must not.

Sources: [ISCA] arXiv 2505.09343, [V3] arXiv 2412.19437, [DSMoE] arXiv 2401.06066, [LFB] arXiv 2408.15664, and the
configurations released with the models.
"""

from __future__ import annotations

import pytest

from cofire.plan import (
    count_parameters,
    decode_attention_flops_per_layer,
    decode_core_intensity,
    deepseekmoe_flops_per_token,
    expanded_kv_bytes_per_token,
    expert_parallel_limit,
    ffn_units,
    kv_bytes_per_token,
    mtp_speed_up,
    training_flops_per_token,
)
from cofire.spec import ModelSpec, RunSpec, load_as, parse


def model(name: str, *changes: str) -> ModelSpec:
    return load_as(ModelSpec, name, changes)


# -- parameters: the ledger of the released configurations --------------------------------------------

LEDGER = {
    "deepseek-v3": {
        "attention_per_layer": 187_107_328,
        "expert": 44_040_192,
        "dense_ffn_per_layer": 396_361_728,
        "router_per_layer": 1_835_264,
        "embedding": 926_679_040,
        "head": 926_679_040,
        "attention": 11_413_547_008,
        "routed_experts": 653_908_770_816,
        "shared_experts": 2_554_331_136,
        "dense_ffn": 1_189_085_184,
        "norms": 881_664,
        "total": 671_026_419_200,
        "activated_with_both_embeddings": 37_552_297_472,
        "activated_head_only": 36_625_618_432,
        "activated_without_embeddings": 35_698_939_392,
    },
    "deepseek-v2": {
        "attention_per_layer": 149_227_520,
        "expert": 23_592_960,
        "dense_ffn_per_layer": 188_743_680,
        "router_per_layer": 819_200,
        "embedding": 524_288_000,
        "head": 524_288_000,
        "attention": 8_953_651_200,
        "routed_experts": 222_717_542_400,
        "shared_experts": 2_783_969_280,
        "dense_ffn": 188_743_680,
        "norms": 619_520,
        "total": 235_741_434_880,
        "activated_with_both_embeddings": 21_375_800_320,
        "activated_head_only": 20_851_512_320,
        "activated_without_embeddings": 20_327_224_320,
    },
    "deepseek-v2-lite": {
        "attention_per_layer": 13_763_072,
        "expert": 8_650_752,
        "dense_ffn_per_layer": 67_239_936,
        "router_per_layer": 131_072,
        "embedding": 209_715_200,
        "head": 209_715_200,
        "attention": 371_602_944,
        "routed_experts": 14_394_851_328,
        "shared_experts": 449_839_104,
        "dense_ffn": 67_239_936,
        "norms": 112_640,
        "total": 15_706_484_224,
        "activated_with_both_embeddings": 2_661_150_208,
        "activated_head_only": 2_451_435_008,
        "activated_without_embeddings": 2_241_719_808,
    },
}


@pytest.mark.parametrize(("name", "item"), [(name, item) for name, rows in LEDGER.items() for item in rows])
def test_ledger_of_released_configurations_is_exact(name: str, item: str) -> None:
    assert getattr(count_parameters(model(name)), item) == LEDGER[name][item]


def test_selection_bias_of_deepseek_v3_is_14848_of_its_numbers() -> None:
    count = count_parameters(model("deepseek-v3"))
    assert count.router_bias == 58 * 256
    assert count.total_without_router_bias == 671_026_404_352


def test_dense_comparators_have_their_released_totals() -> None:
    assert count_parameters(model("qwen2.5-72b")).total == 72_706_203_648
    assert count_parameters(model("llama3.1-405b")).total == 405_853_388_800


def test_deepseekmoe_16b_total_and_activated() -> None:
    count = count_parameters(model("deepseekmoe-16b"))
    assert count.total == 16_375_728_128
    assert count.activated_with_both_embeddings == 2_828_650_496
    assert count.activated_head_only == pytest.approx(2.619e9, rel=1e-3)


def test_deepseekmoe_2b_experts_are_those_of_the_paper() -> None:
    count = count_parameters(model("deepseekmoe-2b"))
    experts = count.routed_experts + count.shared_experts
    activated = 9 * 8 * count.expert
    assert experts == pytest.approx(1.887e9, rel=1e-3)
    assert activated == pytest.approx(0.236e9, rel=2e-3)
    assert count.total == pytest.approx(1.967e9, rel=1e-3)


def test_deepseekmoe_145b_lies_within_its_unprinted_dense_width() -> None:
    count = count_parameters(model("deepseekmoe-145b"))
    assert 144.45e9 < count.total < 144.6e9
    assert 22.05e9 < count.activated_with_both_embeddings < 22.19e9


def test_gshard_2b_has_as_many_expert_parameters_as_deepseekmoe_2b() -> None:
    gshard, deepseek = count_parameters(model("gshard-2b")), count_parameters(model("deepseekmoe-2b"))
    fine = deepseek.routed_experts + deepseek.shared_experts
    assert gshard.routed_experts == pytest.approx(fine, rel=1e-3)
    assert gshard.total == pytest.approx(1.967e9, rel=1e-3)


# -- trap 6: three ways to count what a token activates ----------------------------------------------


def test_the_printed_36_7b_activated_is_neither_counting_rule() -> None:
    count = count_parameters(model("deepseek-v3"))
    assert abs(count.activated_with_both_embeddings - 36.7e9) > 0.8e9
    assert abs(count.activated_head_only - 36.7e9) > 0.07e9


def test_the_printed_mtp_sizes_leave_out_the_projection() -> None:
    mtp = count_parameters(model("deepseek-v3")).mtp
    assert mtp.total == 11_610_068_224
    assert mtp.activated_with_both_embeddings == 2_541_458_688
    assert mtp.projection == 102_760_448
    assert round((mtp.total - mtp.projection) / 1e9, 1) == 11.5
    assert round((mtp.activated_with_both_embeddings - mtp.projection) / 1e9, 1) == 2.4
    assert round(mtp.total / 1e9, 1) != 11.5


# -- key-value cache [ISCA, table 1] -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deepseek-v3", 70_272),
        ("qwen2.5-72b", 327_680),
        ("llama3.1-405b", 516_096),
        ("deepseek-v2", 69_120),
        ("deepseek-v2-lite", 31_104),
    ],
)
def test_kv_cache_bytes_per_token(name: str, size: int) -> None:
    assert kv_bytes_per_token(model(name)) == size


def test_llama_405b_caches_7_344_times_deepseek_v3_and_not_the_printed_7_28() -> None:
    ratio = kv_bytes_per_token(model("llama3.1-405b")) / kv_bytes_per_token(model("deepseek-v3"))
    assert ratio == pytest.approx(7.344, abs=5e-4)
    assert round(ratio, 2) != 7.28


def test_qwen_72b_caches_4_66_times_deepseek_v3() -> None:
    assert round(kv_bytes_per_token(model("qwen2.5-72b")) / kv_bytes_per_token(model("deepseek-v3")), 2) == 4.66


def test_deepseek_v3_without_the_latent_would_cache_every_head() -> None:
    assert expanded_kv_bytes_per_token(model("deepseek-v3")) == 4_997_120
    plain = 'attention={kind="gqa",num_heads=128,num_key_value_heads=128,head_dim=128}'
    assert kv_bytes_per_token(model("deepseek-v3", plain)) == 3_997_696


# -- training FLOP per token [ISCA, table 2] ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "matrices", "attention", "main"),
    [("deepseek-v2", 125.109, 30.199, 155.308), ("deepseek-v3", 219.754, 30.702, 250.456)],
)
def test_training_gflop_per_token_at_4096(name: str, matrices: float, attention: float, main: float) -> None:
    flops = training_flops_per_token(model(name), 4096)
    assert (flops.matrices / 1e9, flops.attention / 1e9, flops.main / 1e9) == pytest.approx(
        (matrices, attention, main), abs=5e-4
    )


def test_non_causal_attention_of_deepseek_v3_is_twice_the_causal_one() -> None:
    flops = training_flops_per_token(model("deepseek-v3"), 4096, causal=False)
    assert flops.attention / 1e9 == pytest.approx(61.405, abs=5e-4)
    assert flops.main / 1e9 == pytest.approx(281.158, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "ours", "printed", "tolerance"),
    [("qwen2.5-72b", 444.869, 394, 0.14), ("llama3.1-405b", 2473.247, 2448, 0.015)],
)
def test_dense_rows_of_the_paper_are_met_only_with_a_wide_tolerance(
    name: str, ours: float, printed: float, tolerance: float
) -> None:
    flops = training_flops_per_token(model(name), 4096).main / 1e9
    assert flops == pytest.approx(ours, abs=5e-4)
    assert flops == pytest.approx(printed, rel=tolerance)
    assert flops > printed


def test_a_training_step_of_deepseek_v3_also_pays_for_its_mtp_module() -> None:
    flops = training_flops_per_token(model("deepseek-v3"), 4096)
    block = 6 * (688_100_608 + 926_679_040) + flops.attention // 61
    assert flops.mtp == block
    assert flops.total == flops.main + flops.mtp
    assert training_flops_per_token(model("deepseek-v3", "mtp=none"), 4096).mtp == 0


# -- FLOPs as DeepSeekMoE counts them [DSMoE, tables 1, 3 and 6] --------------------------------------

_UNIT_1408 = 1408 * 3 / 8 / 4096  # an expert of 1408 in units of a standard feed-forward part of width 4096


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "units", "vocab", "tokens", "rule", "printed"),
    [
        ("Dense 0.2B", 9, 1280, 9, 8192, 2048, 2.883, 2.9),
        ("GShard 2B and DeepSeekMoE 2B", 9, 1280, 18, 8192, 2048, 4.333, 4.3),
        ("GShard x1.5", 9, 1280, 27, 8192, 2048, 5.782, 5.8),
        ("Dense x16", 9, 1280, 144, 8192, 2048, 24.626, 24.6),
        ("DeepSeek 7B", 30, 4096, 30, 102400, 4096, 183.481, 183.5),
        ("LLaMA2 7B", 32, 4096, 32, 32000, 4096, 187.939, 187.9),
        ("DeepSeekMoE 16B", 28, 2048, 56, 102400, 4096, 74.423, 74.4),
        ("DeepSeek 67B", 95, 8192, 95, 102400, 4096, 2057.461, 2057.5),
        ("GShard 137B", 62, 4096, 124, 102400, 4096, 572.708, 572.7),
        ("DeepSeekMoE 145B", 62, 4096, 62 * 16 * _UNIT_1408, 102400, 4096, 585.490, 585.6),
        ("142B half-activated", 62, 4096, 62 * 8 * _UNIT_1408, 102400, 4096, 374.590, 374.6),
    ],
)
def test_tflop_of_deepseekmoe_tables(
    name: str, layers: int, hidden: int, units: float, vocab: int, tokens: int, rule: float, printed: float
) -> None:
    tflop = deepseekmoe_flops_per_token(layers, hidden, units, vocab, tokens) * tokens / 1e12
    assert tflop == pytest.approx(rule, abs=6e-4)
    assert tflop == pytest.approx(printed, abs=0.15)


def test_feed_forward_units_come_from_the_spec() -> None:
    assert ffn_units(model("deepseekmoe-2b")) == pytest.approx(18, rel=1e-3)
    assert ffn_units(model("gshard-2b")) == pytest.approx(18, rel=1e-3)
    assert ffn_units(model("deepseekmoe-145b")) == pytest.approx(62 * 16 * _UNIT_1408)


def test_half_activated_142b_activates_13_6b_and_not_the_printed_12_2b() -> None:
    half = model("deepseekmoe-145b", "moe.num_shared_experts=2", "moe.num_experts_per_token=6")
    activated = count_parameters(half).activated_with_both_embeddings
    flops = deepseekmoe_flops_per_token(62, 4096, ffn_units(half), 102400, 4096)
    implied = (flops - 12 * 62 * 4096 * 4096) / 6 + 102400 * 4096
    assert flops * 4096 / 1e12 == pytest.approx(374.6, abs=0.05)
    assert implied == pytest.approx(13.6e9, rel=2e-3)
    assert activated == pytest.approx(13.6e9, rel=6e-3)


# -- decoding [V3 eq. 1-11] --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "recompute", "absorbed", "full"),
    [(1024, 34.78, 0.659, 0.458), (4096, 138.1, 1.515, 0.710), (32768, 1102.5, 9.50, 3.06)],
)
def test_decode_gflop_per_layer_of_deepseek_v3(context: int, recompute: float, absorbed: float, full: float) -> None:
    spec = model("deepseek-v3")
    found = [decode_attention_flops_per_layer(spec, context, form) / 1e9 for form in ("recompute", "absorbed", "full")]
    assert found == pytest.approx([recompute, absorbed, full], rel=1.2e-3)


def test_absorbed_attention_of_deepseek_v3_does_241_8_flop_per_cached_byte() -> None:
    assert decode_core_intensity(model("deepseek-v3")) == pytest.approx(241.8, abs=0.05)


@pytest.mark.parametrize(
    ("bandwidth", "hidden", "communication_us", "layer_us", "token_ms", "rate"),
    [
        (50e9, 7000, 120.960, 241.920, 14.757, 67.76),
        (900e9, 7000, 6.720, 13.440, 0.8198, 1219.8),
        (50e9, 7168, 123.863, 247.726, 15.111, 66.18),
        (40e9, 7000, 151.200, 302.400, 18.446, 54.21),
        (900e9, 7168, 6.881, 13.763, 0.8395, 1191.2),
    ],
)
def test_network_bound_of_decoding_takes_the_hidden_size_as_an_argument(
    bandwidth: float, hidden: int, communication_us: float, layer_us: float, token_ms: float, rate: float
) -> None:
    limit = expert_parallel_limit(hidden, num_layers=61, bandwidth_bytes_per_s=bandwidth)
    assert limit.communication_s * 1e6 == pytest.approx(communication_us, abs=6e-4)
    assert limit.layer_s * 1e6 == pytest.approx(layer_us, abs=6e-4)
    assert limit.time_per_token_s * 1e3 == pytest.approx(token_ms, abs=6e-4)
    assert limit.tokens_per_s == pytest.approx(rate, abs=0.06)


def test_the_printed_67_tokens_per_second_is_rounded_down() -> None:
    rate = expert_parallel_limit(7000, num_layers=61, bandwidth_bytes_per_s=50e9).tokens_per_s
    assert int(rate) == 67
    assert round(rate) == 68


@pytest.mark.parametrize(("acceptance", "gain"), [(0.80, 1.771), (0.85, 1.820), (0.90, 1.869)])
def test_one_drafted_token_gives_about_1_8_times_the_rate(acceptance: float, gain: float) -> None:
    assert mtp_speed_up(acceptance, num_layers=61) == pytest.approx(gain, abs=5e-4)


# -- trap 5: tokens by steps [LFB, appendix] ---------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "steps", "tokens", "said"), [(1152, 40_000, 94.37e9, 100e9), (1728, 56_514, 200.0e9, 300e9)]
)
def test_tokens_of_the_loss_free_runs_follow_from_their_steps(
    batch: int, steps: int, tokens: float, said: float
) -> None:
    spec = model("small")
    run = parse(
        RunSpec,
        {
            "model": spec,
            "data": {"sequence_length": 2048},
            "batch_size": batch,
            "micro_batch_size": batch,
            "steps": steps,
        },
    )
    assert run.training_tokens == pytest.approx(tokens, rel=1e-3)
    assert abs(run.training_tokens - said) > 0.05 * said
