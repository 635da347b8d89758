"""Hugging Face folders: logits equal transformers' both ways, and damage is one line.

transformers is the independent implementation; where it is not installed these tests are skipped.
"""

import json

import pytest
import torch

from cofire.errors import ServeError, SpecError
from cofire.model import build, huggingface
from cofire.precision.quantize import BLOCK, quantize
from cofire.spec import ModelSpec, load_as

transformers = pytest.importorskip("transformers")

V2 = (
    "moe.score_function=softmax",
    "moe.selection_bias=false",
    "moe.balance.bias_rule=none",
    "moe.group_score=max",
    "moe.normalize_gates=false",
    "moe.routed_scaling_factor=3.0",
    "mtp=none",
)
YARN = ("rope.yarn.factor=4.0", "rope.yarn.original_length=32", "rope.yarn.mscale=1.0", "rope.yarn.mscale_all_dim=1.0")
UNGROUPED = ("moe.num_expert_groups=1", "moe.num_limited_groups=1")
CASES = {
    "v3": ("mtp=none",),
    "v3 with MTP": (),
    "v3 full-rank queries, no groups": ("attention.q_lora_rank=none", *UNGROUPED),
    "v3 with YaRN": YARN,
    "v3 unequal head widths": ("attention.v_head_dim=8", "moe.num_shared_experts=2", "moe.routed_scaling_factor=2.5"),
    "v2": V2,
    "v2-lite": (*V2, "attention.q_lora_rank=none", *UNGROUPED),
    "v2 with YaRN": (*V2, *YARN),
}  # fmt: skip


def _tokens(spec: ModelSpec) -> torch.Tensor:
    return torch.randint(0, spec.vocab_size, (2, 60), generator=torch.Generator().manual_seed(3))


def _peer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(decoder, tokens):
    return decoder.eval().logits(decoder(tokens).hidden)


def _decoder(*overrides: str, bias: float = 0.0):
    decoder = build(load_as(ModelSpec, "tiny", overrides), seed=5)
    generator = torch.Generator().manual_seed(7)
    for router in decoder.moe_routers():
        if router.bias is not None:
            router.bias.copy_(torch.randn(router.bias.shape, generator=generator) + bias)
    return decoder


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bias", [0.0, -5.0], ids=["bias near 0", "bias strongly negative"])
def test_logits_equal_transformers_both_ways(overrides, bias, tmp_path):
    decoder = _decoder(*overrides, bias=bias)
    huggingface.save(decoder, tmp_path / "ours", shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    tokens, peer = _tokens(decoder.spec), _peer(tmp_path / "ours")
    with torch.no_grad():
        wanted = peer(tokens).logits
    assert float((_logits(decoder, tokens) - wanted).abs().max()) < 5e-6
    peer.save_pretrained(tmp_path / "theirs")
    back = huggingface.load(tmp_path / "theirs")
    assert float((_logits(back, tokens) - wanted).abs().max()) < 5e-6


def test_transformers_own_random_weights_load(tmp_path):
    """The other direction from scratch: weights that Cofire never saw."""
    config = transformers.DeepseekV3Config(**{**huggingface.config_from_spec(_decoder("mtp=none").spec)})
    torch.manual_seed(11)
    peer = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    peer.save_pretrained(tmp_path / "peer")
    decoder = huggingface.load(tmp_path / "peer")
    tokens = _tokens(decoder.spec)
    with torch.no_grad():
        wanted = peer(tokens).logits
    assert float((_logits(decoder, tokens) - wanted).abs().max()) < 5e-6


def test_mtp_modules_survive_a_round_trip(tmp_path):
    decoder = _decoder()
    huggingface.save(decoder, tmp_path / "m")
    back = huggingface.load(tmp_path / "m")
    assert back.spec.mtp is not None
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name


def test_the_spec_survives_a_round_trip_through_config_json():
    for overrides in CASES.values():
        spec = load_as(ModelSpec, "tiny", overrides)
        back = huggingface.spec_from_config(json.loads(json.dumps(huggingface.config_from_spec(spec))))
        assert (back.attention, back.rope, back.vocab_size, back.num_layers) == (
            spec.attention,
            spec.rope,
            spec.vocab_size,
            spec.num_layers,
        )
        assert back.moe.model_dump(exclude={"balance"}) == spec.moe.model_dump(exclude={"balance"})


@pytest.mark.parametrize("shape", [(256, 128), (200, 130), (5, 300)])
def test_fp8_blocks_are_widened_as_an_element_by_element_loop_would(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator)
    wide = huggingface.dequantize_blocks(weight, scale)
    for i in range(0, shape[0], 37):
        for j in range(0, shape[1], 41):
            assert float(wide[i, j]) == float(weight[i, j].float() * scale[i // 128, j // 128])


def test_an_fp8_checkpoint_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    decoder = _decoder("mtp=none")
    huggingface.save(decoder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    block = tensors[name].abs().max() / 448
    tensors[name + "_scale_inv"] = block.reshape(1, 1)
    exact = (tensors[name] / block).to(torch.float8_e4m3fn)
    tensors[name] = exact
    save_file(tensors, path)
    back = huggingface.load(tmp_path / "m")
    torch.testing.assert_close(back.layers[0].attention.output.weight.data, exact.float() * block)
    del tensors[name + "_scale_inv"]
    save_file(tensors, path)
    with pytest.raises(ServeError, match="_scale_inv is missing"):
        huggingface.load(tmp_path / "m")


def test_damage_is_one_line(tmp_path):
    decoder = _decoder("mtp=none")
    huggingface.save(decoder, tmp_path / "m", shard_bytes=100_000)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ServeError, match="cannot be read"):
        huggingface.load(tmp_path / "m")
    shard.unlink()
    with pytest.raises(ServeError, match=r"missing|cannot be read"):
        huggingface.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SpecError, match="supported: deepseek_v3, deepseek_v2"):
        huggingface.load(tmp_path / "m")


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    huggingface.save(_decoder("mtp=none"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.surprise": torch.zeros(1)}, path)
    with pytest.raises(ServeError, match=r"unknown tensor model\.surprise"):
        huggingface.load(tmp_path / "m")
    save_file({name: value for name, value in tensors.items() if name != "model.norm.weight"}, path)
    with pytest.raises(ServeError, match=r"lacks model\.norm\.weight"):
        huggingface.load(tmp_path / "m")


def test_a_shape_that_no_deepseek_model_has_is_refused_and_nothing_is_written(tmp_path):
    decoder = build(load_as(ModelSpec, "tiny", ["moe=none", "mtp=none"]), seed=0)
    with pytest.raises(SpecError, match="no experts"):
        huggingface.save(decoder, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_an_fp8_folder_is_read_by_transformers_and_by_us_alike(scales, tmp_path):
    decoder = _decoder("mtp=none")
    huggingface.save(decoder, tmp_path / "m", fp8=scales)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    ).eval()
    ours, tokens = huggingface.load(tmp_path / "m"), _tokens(decoder.spec)
    with torch.no_grad():
        theirs = peer(tokens).logits
    assert torch.allclose(_logits(ours, tokens), theirs, atol=2e-4)
    exact = _logits(decoder, tokens)
    difference = (theirs - exact).norm() / exact.norm()
    assert 0.001 < difference.item() < 0.2


def test_an_fp8_folder_is_a_quarter_in_size_and_keeps_other_weights_as_they_are(tmp_path):
    decoder = _decoder("hidden_size=256", "intermediate_size=512", "moe.expert_intermediate_size=128")
    huggingface.save(decoder, tmp_path / "wide", dtype=torch.float32)
    huggingface.save(decoder, tmp_path / "narrow", dtype=torch.float32, fp8="fp32", shard_bytes=200_000)
    weights = json.loads((tmp_path / "narrow" / "model.safetensors.index.json").read_text())
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("wide", "narrow")
    ]
    assert sizes[1] < 0.45 * sizes[0]
    assert abs(weights["metadata"]["total_size"] - sizes[1]) < 0.05 * sizes[1]
    loaded = dict(huggingface.named_slots(huggingface.load(tmp_path / "narrow")))
    for name, slot in huggingface.named_slots(decoder):
        if name + "_scale_inv" in weights["weight_map"]:
            assert slot.dim() == 2
            expected = quantize(slot.contiguous(), BLOCK, amax_floor=1e-30).dequantize()
            assert torch.equal(loaded[name], expected), name
        else:
            assert torch.equal(loaded[name], slot), name
    kept = {name for name, slot in huggingface.named_slots(decoder) if name + "_scale_inv" not in weights["weight_map"]}
    matrices = {name for name in kept if loaded[name].dim() == 2}
    assert {".".join(name.split(".")[-2:]) for name in matrices} == {
        "embed_tokens.weight",
        "lm_head.weight",
        "gate.weight",
        "eh_proj.weight",
    }
