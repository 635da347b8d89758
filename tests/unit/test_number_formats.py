"""A run's precision spec in its decoder: FP8 products, and codecs between tokens and experts."""

from __future__ import annotations

import pytest
import torch

from cofire.model import build
from cofire.model.moe import LocalDispatcher, MoELayer
from cofire.precision.codec import EXACT
from cofire.precision.health import Watch
from cofire.precision.quantize import BLOCK
from cofire.spec import ModelSpec, PrecisionSpec, load_as
from cofire.train.number_formats import set_formats


def tiny():
    return build(load_as(ModelSpec, "tiny"), device=torch.device("cpu"), seed=0)


def loss_of(decoder) -> float:
    tokens = torch.randint(0, 250, (2, 33), generator=torch.Generator().manual_seed(0))
    return decoder.loss(tokens).loss.item()


def test_fp8_is_emulated_on_a_cpu_in_the_tiles_that_are_asked_for():
    decoder = tiny()
    assert set_formats(decoder, PrecisionSpec(recipe="fp8", gradient_tile="block"), "fp8", Watch()) == "emulated"
    recipes = [module.fp8 for module in decoder.modules() if isinstance(module, MoELayer)]
    assert recipes
    assert all(recipe.gradient_tile == BLOCK and recipe.backend is None for pair in recipes for recipe in pair)


def test_other_recipes_change_nothing():
    decoder = tiny()
    before = loss_of(decoder)
    assert set_formats(decoder, PrecisionSpec(), "fp32", Watch()) == "fp32"
    assert loss_of(decoder) == before


@pytest.mark.parametrize("combine", ["bf16", "e4m3", "e5m2", "logfmt6", "logfmt8", "logfmt10"])
def test_the_combine_moves_the_loss_by_its_formats_noise(combine):
    decoder = tiny()
    before = loss_of(decoder)
    set_formats(decoder, PrecisionSpec(combine=combine), "fp32", Watch())
    layers = [module for module in decoder.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        assert isinstance(layer.dispatcher, LocalDispatcher)
        assert layer.dispatcher.codecs.dispatch is None
        assert layer.dispatcher.codecs != EXACT
    assert 0 < abs(loss_of(decoder) - before) < 1e-3


def test_moments_are_bf16_with_fp8_unless_the_spec_says_otherwise():
    assert PrecisionSpec().moment_format == "fp32"
    assert PrecisionSpec(recipe="fp8").moment_format == "bf16"
    assert PrecisionSpec(recipe="fp8", moments="fp32").moment_format == "fp32"
