"""Specs of kernels and of searches for them: their spaces and windows are what they say, and wrong ones say why."""

from __future__ import annotations

import pickle
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from canvas_by_hand import CASES
from torch.utils.flop_counter import FlopCounterMode

from cofire.errors import SearchError, SpecError
from cofire.search.canvas import Extent, Kernel, Limits, Sampler
from cofire.search.canvas.actions import KINDS
from cofire.search.canvas.from_spec import (
    BOUNDS,
    dense_multiply_adds,
    kernel_of,
    reward_of,
    space_of,
    to_spec,
    total_multiply_adds,
    total_parameters,
)
from cofire.search.canvas.lowering import lower
from cofire.search.canvas.receptive import receptive_size
from cofire.search.canvas.sampler import MAX_GROUPS
from cofire.spec import KernelSpec, KernelsSpec, diff, load, load_as, parse, preset_names, save
from cofire.spec.kernels import KernelLimitsSpec, KernelPrimitiveName

PLACES = (Extent(16, 8, 8), Extent(32, 4, 4))


def kernels(*overrides: str, preset: str = "small_kernels") -> KernelsSpec:
    return load_as(KernelsSpec, preset, overrides)


def sampled(count: int, seed: int = 0) -> list[Kernel]:
    limits = kernels().limits.model_dump(exclude={"max_groups"})
    sampler = Sampler(PLACES, Limits(**limits), seed)
    return [sampler.sample() for _ in range(count)]


def counted(kernel: Kernel, extent: Extent) -> int:
    """Return the parameters of a kernel's module."""
    return sum(weight.numel() for weight in lower(kernel, extent).parameters())


def torch_multiply_adds(module: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2


# -- presets and files -------------------------------------------------------------------------------


def test_presets_of_kernels_are_these():
    assert preset_names("kernels") == ["resnet18_kernels", "small_kernels"]
    assert preset_names("kernel") == ["large_kernel_attention"]


@pytest.mark.parametrize("name", preset_names("kernels"))
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_preset_survives_a_file(name, suffix, tmp_path: Path):
    spec = kernels(preset=name)
    save(spec, tmp_path / f"s.{suffix}")
    assert load(tmp_path / f"s.{suffix}") == spec == parse(KernelsSpec, spec.model_dump(mode="json"))
    assert diff(spec, kernels("sampling.reward=none", preset=name)) == [("sampling.reward", "multiply_adds", "none")]
    save(kernels("sampling.reward=none", preset=name), tmp_path / "none.toml")
    assert load_as(KernelsSpec, tmp_path / "none.toml").sampling.reward == "none"


def test_resnet18_places_are_those_of_its_stages():
    wanted = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    space = space_of(kernels(preset="resnet18_kernels"))
    assert list(space.extents) == wanted
    assert space.limits == Limits()


def test_limits_of_a_spec_are_those_of_canvas():
    defaults = {field.name: field.default for field in fields(Limits)}
    assert KernelLimitsSpec().model_dump() == {**defaults, "max_groups": MAX_GROUPS}
    assert get_args(KernelPrimitiveName) == KINDS


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_kernel_survives_a_file(suffix, tmp_path: Path):
    cases = [*CASES.values(), *sampled(10)]
    for kernel in cases:
        path = tmp_path / f"k.{suffix}"
        save(to_spec(kernel, "k", "a kernel"), path)
        assert kernel_of(load_as(KernelSpec, path)) == kernel


def test_large_kernel_attention_is_what_torch_computes():
    spec = load_as(KernelSpec, "large_kernel_attention")
    extent = Extent(6, 25, 24)
    layer = lower(kernel_of(spec), extent).double()
    x = torch.randn(2, *extent, dtype=torch.float64)
    near, far, across = layer.parameters()
    y = F.conv2d(x, near[:, None], padding=2, groups=6)
    y = F.conv2d(y, far[:, None], padding=9, dilation=3, groups=6)
    torch.testing.assert_close(layer(x), x * F.conv2d(y, across.reshape(6, 6, 1, 1)))
    assert receptive_size(kernel_of(spec), 31, 31) == 23**2  # 5 + 3 * (7 - 1)


# -- windows and rewards -----------------------------------------------------------------------------


@pytest.mark.parametrize(("extent", "window"), [(Extent(4, 6, 5), 3), (Extent(3, 7, 9), 1), (Extent(2, 9, 8), 5)])
def test_a_dense_convolution_has_the_multiply_adds_that_torch_counts(extent, window):
    c = extent.c
    dense = torch.nn.Conv2d(c, c, window, padding="same")
    assert dense_multiply_adds(extent, window) == torch_multiply_adds(dense, torch.randn(1, *extent))


def test_totals_are_those_that_torch_counts():
    for name in ("fc of groups", "dilated convolution", "depthwise convolution", "mix of channels", "fc of a window"):
        kernel, sizes = CASES[name], (Extent(8, 6, 6), Extent(4, 5, 5))
        found = [torch_multiply_adds(lower(kernel, extent), torch.randn(1, *extent)) for extent in sizes]
        assert total_multiply_adds(kernel, sizes) == sum(found), name
        assert total_parameters(kernel, sizes) == sum(counted(kernel, extent) for extent in sizes), name


@pytest.fixture(scope="module")
def many() -> list[Kernel]:
    return sampled(60)


def passing(spec: KernelsSpec, name: str, found: list[Kernel]) -> list[bool]:
    passes = space_of(spec).filters[name]
    return [passes(kernel) for kernel in found]


@pytest.mark.parametrize(
    ("low", "high"), [("none", "0.2"), ("0.2", "none"), ("0.05", "0.5"), ("0", "0.0001"), ("none", "1.0")]
)
def test_the_window_of_multiply_adds_holds_at_every_place(many, low, high):
    spec = kernels(f"window.min_ratio={low}", f"window.max_ratio={high}")
    least, most = (0.0 if low == "none" else float(low)), (inf if high == "none" else float(high))
    ratios = [[k.multiply_adds(e) / (9 * e.c**2 * e.h * e.w) for e in PLACES] for k in many]
    wanted = [least <= min(row) and max(row) <= most for row in ratios]
    assert passing(spec, "multiply_adds", many) == wanted
    assert 0 < sum(wanted) < len(many)


@pytest.mark.parametrize(("low", "high"), [("none", "1000"), ("1000", "none"), ("100", "4000")])
def test_the_window_of_parameters_is_of_all_places_together(many, low, high):
    spec = kernels(f"window.min_parameters={low}", f"window.max_parameters={high}")
    least, most = (0 if low == "none" else int(low)), (inf if high == "none" else int(high))
    wanted = [least <= sum(counted(kernel, extent) for extent in PLACES) <= most for kernel in many]
    assert passing(spec, "parameters", many) == wanted
    assert 0 < sum(wanted) < len(many)


def test_the_least_receptive_size_and_the_most_groups_are_kept(many):
    spec = kernels("window.min_receptive_size=40", "window.receptive_map=[7,6]", "limits.max_groups=4")
    assert passing(spec, "receptive", many) == [receptive_size(kernel, 7, 6) >= 40 for kernel in many]
    assert passing(spec, "groups", many) == [kernel.groups <= 4 for kernel in many]
    for name in ("receptive", "groups"):
        assert 0 < sum(passing(spec, name, many)) < len(many)
    assert set(space_of(kernels("window.max_parameters=9")).filters) == set(BOUNDS)


def test_a_reward_is_the_part_of_a_dense_convolution_that_is_saved(many):
    spec = kernels("window.dense_kernel=5")
    reward = pickle.loads(pickle.dumps(reward_of(spec)))
    whole = sum(25 * e.c**2 * e.h * e.w for e in PLACES)
    for kernel in many:
        assert reward(kernel) == pytest.approx(1 - sum(map(kernel.multiply_adds, PLACES)) / whole)
        assert reward_of(kernels("sampling.reward=none"))(kernel) == 0


# -- what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("places=[]", "places = [] has no place to fill; name one"),
        ("places=[[3,4]]", "places.0 = [3, 4] must be three whole numbers from 1 up"),
        ("places=[[3,4,0]]", "places.0 = [3, 4, 0] must be three whole numbers from 1 up"),
        ("places=[[3,4,4.0]]", "places.0 = [3, 4, 4.0] must be three whole numbers from 1 up"),
        ("places=[[3,4,true]]", "places.0 = [3, 4, True] must be three whole numbers from 1 up"),
        ("places=[[3,4,4],[2,2,2],[3,4,4]]", "places.2 = [3, 4, 4] is there already; name each place once"),
        ("limits.primitives=[9,4]", "limits.primitives = [9, 4] begins above its end; turn it round: [4, 9]"),
        ("limits.width=[0,4]", "must be greater than or equal to 1"),
        ("limits.weighted_ratio=1.5", "limits.weighted_ratio = 1.5 must be less than or equal to 1"),
        ("limits.kinds=['fc','fcc']", "limits.kinds.1 = 'fcc' is not one of fc, convolution"),
        ("limits.kinds=[]", "leave it out for all of them"),
        ("limits.kinds=['fold']", "kinds leave no primitive with a weight; add one of fc"),
        ("limits.kinds=['fc','scale']", "kinds = fc, scale all have a weight, but only 1 of 3 primitives may have one"),
        ("limits.weighted=[6,6]", "6 weights are more than 0.6 of 8 primitives; allow more of either"),
        ("window.min_ratio=3", "window.min_ratio = 3.0 is above max_ratio = 1.0: nothing fits; exchange them"),
        ("window.receptive_map=[2,4]", "is above the 8 places of receptive_map = [2, 4]; take a larger map"),
        ("window.receptive_map=[99,99]", "must be less than or equal to 64"),
        ("window.dense_kernal=5", "unknown key 'window.dense_kernal'; nearest: window.dense_kernel"),
        ("sampling.algorithm=beam", "sampling.algorithm = 'beam' is not one of mcts, random"),
        ("sampling.reward=accuracy", "sampling.reward = 'accuracy' is not one of multiply_adds, none"),
        ("sampling.budget=0", "must be greater than or equal to 1"),
    ],
)
def test_what_a_search_for_kernels_cannot_be_is_said_in_one_line(override, text):
    with pytest.raises((SpecError, SearchError)) as caught:
        space_of(kernels(override))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("primitives=[]", "a graph must begin with an input; put one first"),
        ("primitives=[{inputs=[]}]", "primitives.0.primitive = None is none of input"),
        ("primitives=[{primitive='input'}]", "primitives.0.inputs = None must be a list of positions"),
        ("primitives=[{primitive='input',inputs=[],kernel=3}]", "'kernel' is no field"),
        ("primitives=[{primitive='input',inputs=[]}]", "a kernel ends with input()"),
        ("groups=0", "groups = 0 must be greater than or equal to 1"),
        ("places=[[1,2]]", "places.0 = [1, 2] must be three whole numbers from 1 up"),
    ],
)
def test_what_a_kernel_cannot_be_is_said_in_one_line(override, text):
    with pytest.raises((SpecError, SearchError)) as caught:
        kernel_of(load_as(KernelSpec, "large_kernel_attention", [override]))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kernel_is_refused_where_it_does_not_fill_its_places():
    spec = to_spec(CASES["fc narrower and wider"], places=((6, 2, 2), (3, 2, 2)))
    with pytest.raises(SearchError, match=r"size C/2 of the kernel is 3/2 at C, H, W = 3, 2, 2"):
        kernel_of(spec)
