"""The receptive field of a kernel of Canvas: known ones, and all against the derivatives of the lowered kernel."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from itertools import product as pairs

import pytest
import torch
from canvas_by_hand import CASES, build

from cofire.errors import SearchError
from cofire.search.canvas import DimName, Extent, Kernel, Limits, Sampler
from cofire.search.canvas.actions import KINDS
from cofire.search.canvas.lowering import lower
from cofire.search.canvas.primitives import (
    Activation,
    Bmm,
    Broadcast,
    Convolution,
    Fc,
    Fold,
    Group,
    Mix,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.receptive import min_receptive_size, receptive_field, receptive_size
from cofire.search.canvas.variables import C, G, H, number

HEIGHT, WIDTH = DimName(1, "H"), DimName(1, "W")
LARGE_KERNEL_ATTENTION = build(Convolution(5), Convolution(7, 3), Fc(C), (Broadcast("mul"), 0, 3))


LOCAL = ("fc", "convolution", "unfold", "group", "shift", "scale", "activation", "elementwise", "broadcast")


@cache
def samples(count: int, kinds: tuple[str, ...] = KINDS) -> tuple[Kernel, ...]:
    sampler = Sampler([(8, 6, 4), (4, 5, 7)], Limits(primitives=(4, 12), bmm_share=0.0, kinds=kinds), 7)
    return tuple(sampler.sample() for _ in range(count))


def chooses(kernel: Kernel) -> bool:
    """Whether data can make a derivative zero: by a maximum, a minimum, a cut at 0 or a softmax that underflows."""
    found = [node.primitive for node in kernel.graph.nodes]
    kinds = {primitive.arguments().get("kind") for primitive in found}
    return bool(kinds & {"max", "min", "relu"}) or any("softmax" in str(primitive) for primitive in found)


def derivatives(
    kernel: Kernel, extent: Extent, place: tuple[int, int], expected: tuple[tuple[int, int], ...] = (), draws: int = 3
) -> tuple[tuple[int, int], ...]:
    """Return the offsets at which the derivative of a place's output is not zero in some draw of weights and data.

    It draws until they are the expected ones, but no more often than it may.
    """
    found, offsets = torch.zeros(extent.h, extent.w, dtype=torch.bool), ()
    for seed in range(draws):
        torch.manual_seed(seed)
        lowered = lower(kernel, extent).double()
        with torch.no_grad():
            for weight in lowered.parameters():
                weight.normal_()
        x = torch.randn(1, *extent, dtype=torch.float64, requires_grad=True)
        y = lowered(x)[0, :, place[0], place[1]]
        (gradient,) = torch.autograd.grad(y @ torch.randn_like(y), x)
        found |= (gradient[0] != 0).any(0)
        offsets = tuple((h - place[0], w - place[1]) for h, w in found.nonzero().tolist())
        if offsets == expected:
            break
    return offsets


def square(radius: int, pitch: int = 1) -> set[tuple[int, int]]:
    side = range(-radius, radius + 1, pitch)
    return set(pairs(side, side))


# Known fields


def test_large_kernel_attention_sees_a_full_square():
    """5 x 5 places reach 2 to each side, 5 x 5 and 7 x 7 places 3 apart reach 6 and 9."""
    narrow = build(Convolution(5), Convolution(5, 3), Fc(C), (Broadcast("mul"), 0, 3))
    assert receptive_size(narrow, 32, 32) == 17 * 17
    assert set(receptive_field(narrow, Extent(1, 32, 32))) == square(8)
    assert receptive_size(LARGE_KERNEL_ATTENTION, 32, 32) == 23 * 23
    assert set(receptive_field(LARGE_KERNEL_ATTENTION, Extent(1, 32, 32))) == square(11)
    unfolded = build(
        *(Fc(C), Activation("gelu"), Unfold("HW", 5), Group(C), Fc(C), Convolution(7, 3), Fc(C)),
        *((Broadcast("mul"), 7, 2), Fc(C), (Broadcast("add"), 0, 9)),
    )
    assert set(receptive_field(unfolded, Extent(2, 32, 32))) == square(11)


@pytest.mark.parametrize(
    ("primitives", "expected"),
    [
        ((Fc(C),), {(0, 0)}),
        ((Convolution(3),), square(1)),
        ((Convolution(5, 2, C),), square(4, 2)),
        ((Convolution(3), Convolution(3, 1, C)), square(2)),
        ((Unfold("H", 7, 2), Fc(C)), {(h, 0) for h in range(-6, 7, 2)}),
        ((Unfold("W", 3), Fold("avg", (DimName(0, "KW"),))), {(0, -1), (0, 0), (0, 1)}),
        ((Shift((HEIGHT, WIDTH), 2),), {(-2, -2)}),
        ((Shift((HEIGHT,), 3), Convolution(3)), {(h - 3, w) for h, w in square(1)}),
        ((Fold("avg", (WIDTH,)), (Broadcast("add"), 1, 0)), {(0, w) for w in range(-10, 10)}),
        ((Mix((HEIGHT,), (H,)),), {(h, 0) for h in range(-10, 10)}),
        ((Softmax(WIDTH),), {(0, w) for w in range(-10, 10)}),
        (((Bmm(transpose_left=True), 0, 0), (Bmm(), 0, 1)), set(pairs(range(-10, 10), repeat=2))),
        (
            (Fc(C), (Convolution(3), 0), (Shift((WIDTH,)), 0), (Broadcast("max"), 1, 2), (Broadcast("mul"), 4, 3)),
            square(1),
        ),
    ],
)
def test_fields_that_one_can_tell_by_hand(primitives, expected):
    assert set(receptive_field(build(*primitives), Extent(4, 20, 20))) == expected


def test_a_fold_that_keeps_one_side_of_a_window_sees_it_all_and_a_shift_of_windows_moves_what_is_seen_nowhere():
    seen = receptive_field(build(Unfold("HW", 3), Shift((DimName(0, "KH"),)), Fc(C)), Extent(2, 9, 9))
    assert set(seen) == square(1)


def test_on_a_torus_the_field_goes_around_and_beside_zeros_it_ends():
    kernel, extent = build(Convolution(5)), Extent(1, 7, 9)
    assert set(receptive_field(kernel, extent, (0, 8))) == square(2)
    assert receptive_field(kernel, extent, (0, 8), torus=False) == tuple(pairs((0, 1, 2), (-2, -1, 0)))
    assert receptive_size(kernel, 3, 4) == 12


# Derivatives


@pytest.mark.parametrize("kernel", CASES.values(), ids=list(CASES))
def test_the_field_is_where_a_derivative_is_not_zero(kernel):
    extent = Extent(4, 4, 3)
    for place in ((0, 0), (2, 1), (3, 2)):
        expected = receptive_field(kernel, extent, place, torus=False)
        assert derivatives(kernel, extent, place, expected, draws=300) == expected


def test_the_field_of_samples_is_where_a_derivative_is_not_zero():
    num_exact = 0
    for kernel, extent in pairs(samples(120), (Extent(8, 6, 4), Extent(4, 5, 7))):
        for place in ((0, 0), (extent.h // 2, extent.w // 2)):
            field = receptive_field(kernel, extent, place, torus=False)
            found = derivatives(kernel, extent, place, field)
            assert set(found) <= set(field)
            if not chooses(kernel):
                assert found == field
                num_exact += 1
    assert num_exact >= 40


def test_the_field_at_the_middle_of_a_large_map_is_that_on_the_torus():
    extent = Extent(2, 25, 25)
    for kernel in (LARGE_KERNEL_ATTENTION, build(Group(G), Convolution(7, 3, C), Shift((HEIGHT, WIDTH), 3))):
        field = receptive_field(kernel, extent)
        assert derivatives(kernel, extent, (12, 12)) == field


def test_the_field_on_a_torus_is_that_on_a_large_map_of_which_the_torus_is_a_tile():
    torus, plane = Extent(4, 5, 4), Extent(4, 45, 44)
    for kernel in samples(20, LOCAL):
        field = receptive_field(kernel, torus)
        on_plane = derivatives(kernel, plane, (22, 22), draws=1 if not chooses(kernel) else 6)
        found = {((dh + 2) % 5 - 2, (dw + 2) % 4 - 2) for dh, dw in on_plane}
        assert found == set(field)


def test_on_a_torus_all_places_see_the_same_where_nothing_looks_at_all_of_a_side():
    for kernel in samples(40, LOCAL):
        fields = {receptive_field(kernel, Extent(4, 5, 4), place) for place in pairs(range(5), range(4))}
        assert len(fields) == 1


# Sizes and the filter


def test_the_size_does_not_hang_on_the_number_of_channels():
    for kernel in samples(60):
        assert receptive_size(kernel, 6, 4) == len(receptive_field(kernel, Extent(16, 6, 4)))


def test_the_fewest_channels_that_fit_are_found():
    kernel = build(Fc(C / number(12)), Fc(C), Group(G), Fc(C), groups=8)
    assert receptive_size(kernel, 4, 4) == 1
    with pytest.raises(SearchError, match=r"no number of channels up to 1024 .* a map of 4 x 4"):
        receptive_size(build(Fc(C / number(2000)), Fc(C), groups=1), 4, 4)


def test_the_filter_keeps_what_sees_enough():
    kernels = [build(Fc(C)), build(Convolution(3)), build(Convolution(5, 2)), LARGE_KERNEL_ATTENTION]
    assert list(filter(min_receptive_size(25, 20, 20), kernels)) == kernels[2:]
    assert list(filter(min_receptive_size(26, 20, 20), kernels)) == kernels[3:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: receptive_field(build(Fc(C)), Extent(4, 5, 6), (5, 0)), "place 5, 0 is not on a map of 5 x 6"),
        (lambda: receptive_field(build(Fc(C / number(2)), Fc(C)), Extent(5, 5, 6)), "C/2 of the kernel is 5/2"),
        (lambda: min_receptive_size(26, 5, 5), "26 is more than the 5 x 5 places"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(make, message):
    with pytest.raises(SearchError, match=message):
        make()


def test_the_analysis_needs_no_torch():
    script = "import sys, cofire.search.canvas.receptive; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
