"""Every preset is a valid spec of the kind and the name it is listed under."""

from __future__ import annotations

import pytest

from cofire.spec import ModelSpec, RunSpec, load, load_as, preset_names

MODELS = {
    "deepseek-v3",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseekmoe-2b",
    "deepseekmoe-16b",
    "deepseekmoe-145b",
    "gshard-2b",
    "qwen2.5-72b",
    "llama3.1-405b",
    "tiny",
    "small",
}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_as_its_file_and_described(name: str) -> None:
    spec = load(name)
    assert getattr(spec, "name", None) == name
    assert getattr(spec, "description", "")


def test_the_models_of_the_papers_are_there() -> None:
    assert set(preset_names("model")) >= MODELS


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_can_be_trained_as_a_run(name: str) -> None:
    assert load_as(RunSpec, name).model == load(name)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_small_presets_have_every_mechanism_of_deepseek_v3_on(name: str) -> None:
    spec, large = load_as(ModelSpec, name), load_as(ModelSpec, "deepseek-v3")
    assert spec.moe is not None
    assert large.moe is not None
    assert spec.attention.kind == large.attention.kind == "mla"
    # The update rate differs: the paper's 1e-3 cannot even out a run of a few hundred steps.
    rate = {"bias_update_rate": large.moe.balance.bias_update_rate}
    assert spec.moe.balance.model_copy(update=rate) == large.moe.balance
    assert spec.mtp == large.mtp
    for switch in ("score_function", "group_score", "normalize_gates", "selection_bias"):
        assert getattr(spec.moe, switch) == getattr(large.moe, switch)
    assert 1 < spec.moe.num_limited_groups < spec.moe.num_expert_groups
