"""Operators built by hand with the same functions written with torch, and operators built at random.

Sizes are small and all different where the operator allows it, so that no dim hides another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.search import Assembler, Operator, Symbols
from cofire.search.primitives import Reduction

Function = Callable[..., Tensor]


@dataclass
class Case:
    """An operator and the function that it is, of the input and the weights in the operator's layout."""

    operator: Operator
    function: Function


def begin(primary: str, coefficient: str = "", **numbers: int) -> Assembler:
    return Assembler(Symbols.of(primary.split(), coefficient.split(), [numbers]))


def linear() -> Case:
    build = begin("B L C D", B=2, L=3, C=5, D=4)
    b, s, d = build.output("B", "L", "D")
    (c,) = build.reduce("C")
    (c,) = build.contract([c], [d])
    return Case(build.finish(b, s, c), lambda x, w: F.linear(x, w.T))


def convolution_1d(k: int) -> Case:
    build = begin("B C D H", "k", B=2, C=3, D=4, H=9, k=k)
    b, d, h = build.output("B", "D", "H")
    c, a = build.reduce("C", "k") if k > 1 else (*build.reduce("C"), None)
    if a is None:
        (c,) = build.contract([c], [d])
        return Case(build.finish(b, c, h), lambda x, w: F.conv1d(x, w.T[:, :, None]))
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(h, a))
    return Case(operator, lambda x, w: F.conv1d(x, w.permute(2, 0, 1), padding=k // 2))


def convolution_2d(k: int) -> Case:
    build = begin("B C D H W", "k", B=2, C=3, D=2, H=7, W=8, k=k)
    b, d, h, w = build.output("B", "D", "H", "W")
    if k == 1:
        (c,) = build.reduce("C")
        (c,) = build.contract([c], [d])
        return Case(build.finish(b, c, h, w), lambda x, w: F.conv2d(x, w.T[:, :, None, None]))
    c, i, j = build.reduce("C", "k", "k")
    c, i, j = build.contract([c, i, j], [d])
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))
    return Case(operator, lambda x, w: F.conv2d(x, w.permute(3, 0, 1, 2), padding=k // 2))


def grouped_convolution() -> Case:
    build = begin("B C D H W", "k g", B=2, C=6, D=4, H=5, W=6, k=3, g=2)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, d = build.merge(d, "D/g")
    c, i, j = build.reduce("C/g", "k", "k")
    group, c, i, j = build.contract([group, c, i, j], [d])
    operator = build.finish(b, build.split(group, c), build.unfold(h, i), build.unfold(w, j))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w.permute(0, 4, 1, 2, 3).flatten(0, 1), padding=1, groups=2)

    return Case(operator, function)


def depthwise_convolution() -> Case:
    build = begin("B C H W", "k", B=2, C=3, H=5, W=6, k=3)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    c, i, j = build.contract([c, i, j])
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))
    return Case(operator, lambda x, w: F.conv2d(x, w[:, None], padding=1, groups=3))


def depthwise_separable_convolution() -> Case:
    build = begin("B C D H W", "k", B=2, C=3, D=4, H=5, W=6, k=3)
    b, d, h, w = build.output("B", "D", "H", "W")
    c, i, j = build.reduce("C", "k", "k")
    (c,) = build.contract([c], [d])
    c, i, j = build.contract([c, i, j])
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))

    def function(x: Tensor, point: Tensor, depth: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, depth[:, None], padding=1, groups=3), point.T[:, :, None, None])

    return Case(operator, function)


def dilated_convolution(k: int, s: int) -> Case:
    build = begin("B C D H", "k s", B=2, C=3, D=4, H=11, k=k, s=s)
    b, d, h = build.output("B", "D", "H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(h, build.stride(a, "s")))
    left = s * k // 2
    pads = (left, s * (k - 1) - left)
    return Case(operator, lambda x, w: F.conv1d(F.pad(x, pads), w.permute(2, 0, 1), dilation=s))


def local_convolution() -> Case:
    """A weight per place: the window cannot become a convolution."""
    build = begin("B C H", "k", B=2, C=3, H=6, k=3)
    b, c, h = build.output("B", "C", "H")
    (a,) = build.reduce("k")
    h, a = build.contract([h, a])
    operator = build.finish(b, c, build.unfold(h, a))
    return Case(operator, lambda x, w: torch.einsum("bcha,ha->bch", F.pad(x, (1, 1)).unfold(2, 3, 1), w))


def one_filter_for_all_channels() -> Case:
    """Batch and channels are both free: no size of theirs may be baked in."""
    build = begin("B C H", "k", B=2, C=3, H=6, k=3)
    b, c, h = build.output("B", "C", "H")
    (a,) = build.reduce("k")
    (a,) = build.contract([a])
    operator = build.finish(b, c, build.unfold(h, a))
    return Case(operator, lambda x, w: F.conv1d(x.flatten(0, 1)[:, None], w[None, None], padding=1).view(x.shape))


def convolution_along_height() -> Case:
    build = begin("B C D H W", "k", B=2, C=3, D=4, H=5, W=6, k=3)
    b, d, h, w = build.output("B", "D", "H", "W")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(h, a), w)
    return Case(operator, lambda x, w: F.conv2d(x, w.permute(2, 0, 1)[..., None], padding=(1, 0)))


def window_of_even_size() -> Case:
    build = begin("B C D H", "k", B=2, C=3, D=4, H=7, k=4)
    b, d, h = build.output("B", "D", "H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(h, a))
    return Case(operator, lambda x, w: F.conv1d(F.pad(x, (2, 1)), w.permute(2, 0, 1)))


def convolution_with_stride() -> Case:
    build = begin("B C D H", "k s", B=2, C=3, D=4, H=5, k=3, s=2)
    b, d, h = build.output("B", "D", "H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(build.stride(h, "s"), a))
    return Case(operator, lambda x, w: F.conv1d(x, w.permute(2, 0, 1), padding=1, stride=2))


def average_pooling() -> Case:
    build = begin("B C H W", "k", B=2, C=3, H=4, W=5, k=2)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    operator = build.finish(b, c, build.split(h, i), build.split(w, j))
    return Case(operator, lambda x: F.avg_pool2d(x, 2) * 4)


def sliding_average_pooling() -> Case:
    build = begin("B C H W", "k", B=2, C=3, H=4, W=5, k=3)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))
    return Case(operator, lambda x: F.avg_pool2d(x, 3, stride=1, padding=1) * 9)


def pixel_shuffle() -> Case:
    build = begin("B C H W", "s", B=2, C=2, H=3, W=4, s=2)
    b, c, h, w = build.output("B", "C", "s*H", "s*W")
    h, i = build.merge(h, "s")
    w, j = build.merge(w, "s")
    operator = build.finish(b, build.split(c, build.split(i, j)), h, w)
    return Case(operator, lambda x: F.pixel_shuffle(x, 2))


def pixel_unshuffle() -> Case:
    build = begin("B C H W", "s", B=2, C=2, H=3, W=4, s=2)
    b, c, h, w = build.output("B", "s^2*C", "H", "W")
    c, ij = build.merge(c, "s^2")
    i, j = build.merge(ij, "s")
    operator = build.finish(b, c, build.split(h, i), build.split(w, j))
    return Case(operator, lambda x: F.pixel_unshuffle(x, 2))


def nearest_upsampling() -> Case:
    build = begin("B C H W", "s", B=2, C=2, H=3, W=4, s=2)
    b, c, h, w = build.output("B", "C", "s*H", "s*W")
    h, i = build.merge(h, "s")
    w, j = build.merge(w, "s")
    build.expand(i, j)
    return Case(build.finish(b, c, h, w), lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))


def tiling() -> Case:
    build = begin("B H", "s", B=2, H=3, s=2)
    b, h = build.output("B", "s*H")
    i, h = build.merge(h, "H")
    build.expand(i)
    return Case(build.finish(b, h), lambda x: x.repeat(1, 2))


def patch_embedding() -> Case:
    build = begin("B C D H W", "p", B=2, C=3, D=5, H=3, W=4, p=2)
    b, d, h, w = build.output("B", "D", "H", "W")
    c, i, j = build.reduce("C", "p", "p")
    c, i, j = build.contract([c, i, j], [d])
    operator = build.finish(b, c, build.split(h, i), build.split(w, j))
    return Case(operator, lambda x, w: F.conv2d(x, w.permute(3, 0, 1, 2), stride=2))


def outer_product() -> Case:
    build = begin("M N", M=3, N=4)
    m, n = build.output("M", "N")
    build.contract([], [n])
    return Case(build.finish(m), torch.outer)


def scale_per_channel() -> Case:
    build = begin("B C H", B=2, C=3, H=4)
    b, c, h = build.output("B", "C", "H")
    (c,) = build.contract([c])
    return Case(build.finish(b, c, h), lambda x, w: x * w[:, None])


def shift(distance: int) -> Case:
    build = begin("B H", B=2, H=5)
    b, h = build.output("B", "H")
    return Case(build.finish(b, build.shift(h, distance)), lambda x: x.roll(-distance, 1))


def shift_after_window() -> Case:
    """The window's zeros come first and are rolled with the data where the Shift lies nearer the input."""
    build = begin("B H", "k", B=2, H=5, k=3)
    b, h = build.output("B", "H")
    (a,) = build.reduce("k")
    operator = build.finish(b, build.shift(build.unfold(h, a), 1))
    return Case(operator, lambda x: F.avg_pool1d(x.roll(-1, 1), 3, stride=1, padding=1) * 3)


def window_of_a_repeat() -> Case:
    """A dim of ones, windowed: the borders see fewer of them."""
    build = begin("B H", "k", B=2, H=5, k=3)
    b, h = build.output("B", "H")
    (a,) = build.reduce("k")
    build.expand(build.unfold(h, a))
    operator = build.finish(b)
    return Case(operator, lambda x: x[:, None] * torch.tensor([2.0, 3, 3, 3, 2], dtype=x.dtype))


def sum_of_repeats() -> Case:
    build = begin("B H", "k", B=2, H=5, k=3)
    b, h = build.output("B", "H")
    build.expand(*build.reduce("k"))
    return Case(build.finish(b, h), lambda x: 3 * x)


def weight_on_half_a_merge() -> Case:
    """The weight holds the minor half and the input the major one; the input's minor half is repeated."""
    build = begin("B H", "s", B=2, H=3, s=2)
    b, h = build.output("B", "s*H")
    h, i = build.merge(h, "s")
    build.contract([], [i])
    return Case(build.finish(b, h), lambda x, w: torch.einsum("bh,i->bhi", x, w).flatten(1))


def weight_on_a_window() -> Case:
    """The weight is indexed by the windowed coordinate itself, before the window is taken."""
    build = begin("B H", "k", B=2, H=5, k=3)
    b, h = build.output("B", "H")
    (a,) = build.reduce("k")
    (u,) = build.contract([build.unfold(h, a)])
    return Case(build.finish(b, u), lambda x, w: F.avg_pool1d(x * w, 3, stride=1, padding=1) * 3)


def weights_that_stand_in_each_others_way() -> Case:
    """One weight holds a coordinate, another the join of it with a second one, a third the second one."""
    build = begin("B H C", "s", B=2, H=3, C=2, s=2)
    b, h, c = build.output("B", "H", "C")
    (i,) = build.reduce("s")
    (h,) = build.contract([h])
    (joined,) = build.contract([build.split(h, i)], [c])
    return Case(
        build.finish(b, joined),
        lambda x, u, v: torch.einsum("bhi,h,hic->bhc", x.unflatten(1, (3, 2)), u, v.unflatten(0, (3, 2))),
    )


def weight_read_on_its_diagonal() -> Case:
    build = begin("B C H", "k", B=2, C=3, H=6, k=3)
    b, c, h = build.output("B", "C", "H")
    (a,) = build.reduce("k")
    weight = build.weight()
    a = build.share(build.share(a, weight), weight)
    operator = build.finish(b, c, build.unfold(h, a))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(x.flatten(0, 1)[:, None], w.diagonal()[None, None], padding=1).view(x.shape)

    return Case(operator, function)


def taps_shared_by_two_weights(s: int) -> Case:
    """The offset of a window, with a stride, in both weights: neither alone is a convolution's."""
    build = begin("B C D H", "k R s", B=2, C=3, D=4, H=9, k=3, R=2, s=s)
    b, d, h = build.output("B", "D", "H")
    c, a, rank = build.reduce("C", "k", "R")
    a, rank = build.contract([a, rank], [d])
    c, a = build.contract([c, a], [rank])
    operator = build.finish(b, c, build.unfold(h, build.stride(a, "s") if s > 1 else a))
    left = s * 3 // 2

    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (left, 2 * s - left)), torch.einsum("ard,car->dca", w1, w2), dilation=s)

    return Case(operator, function)


def convolution_of_joined_places() -> Case:
    """The window slides along two dims of the output joined."""
    build = begin("B C D H", "k s", B=2, C=3, D=4, H=5, k=3, s=2)
    b, d, h, i = build.output("B", "D", "H", "s")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(build.split(h, i), a))
    return Case(operator, lambda x, w: F.conv1d(x, w.permute(2, 0, 1), padding=1).unflatten(2, (5, 2)))


def convolution_within_blocks() -> Case:
    """The window slides along half a dim of the output, and sees nothing of the next block."""
    build = begin("B C D H", "k s", B=2, C=3, D=4, H=5, k=3, s=2)
    b, d, h = build.output("B", "D", "s*H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    block, h = build.merge(h, "H")
    operator = build.finish(b, block, c, build.unfold(h, a))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x.transpose(1, 2), w.permute(2, 0, 1)[:, :, None], padding=(0, 1)).flatten(2)

    return Case(operator, function)


def convolution_with_two_batches() -> Case:
    build = begin("B N C D H", "k", B=2, N=3, C=4, D=5, H=6, k=3)
    b, n, d, h = build.output("B", "N", "D", "H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, n, c, build.unfold(h, a))

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.conv1d(x.flatten(0, 1), w.permute(2, 0, 1), padding=1)
        return y.unflatten(0, x.shape[:2])

    return Case(operator, function)


def projection_ahead_of_three_places() -> Case:
    build = begin("B C D H W L", B=2, C=3, D=4, H=2, W=3, L=4)
    b, d, h, w, s = build.output("B", "D", "H", "W", "L")
    (c,) = build.reduce("C")
    (c,) = build.contract([c], [d])
    return Case(build.finish(b, c, h, w, s), lambda x, w: torch.einsum("bchwl,cd->bdhwl", x, w))


def groups_that_share_their_weight() -> Case:
    build = begin("B C D H", "g k", B=2, C=6, D=4, H=9, g=3, k=3)
    b, d, h = build.output("B", "g*D", "H")
    group, d = build.merge(d, "D")
    c, a = build.reduce("C/g", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, build.split(group, c), build.unfold(h, a))
    return Case(operator, lambda x, w: F.conv1d(x, w.permute(2, 0, 1).repeat(3, 1, 1), padding=1, groups=3))


def operator_1(**numbers: int) -> Case:
    sizes = {"B": 2, "C": 4, "D": 3, "H": 4, "W": 5, "g": 2, "k": 3, "R": 2} | numbers
    build = begin("B C D H W", "g k R", **sizes)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, i, j, rank, c = build.reduce("g", "k", "k", "R", "C/g")
    group, i, j, rank = build.contract([group, i, j, rank], [d])
    c, j = build.contract([c, j], [rank])
    operator = build.finish(b, build.split(group, c), build.unfold(h, i), build.unfold(w, j))

    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        kernel = torch.einsum("gijrd,cjr->dgcij", w1, w2).flatten(1, 2)
        return F.conv2d(x, kernel, padding=1)

    return Case(operator, function)


def operator_2(**numbers: int) -> Case:
    sizes = {"B": 2, "C": 4, "D": 3, "H": 4, "W": 5, "g": 2, "k": 3, "R": 2} | numbers
    build = begin("B C D H W", "g k R", **sizes)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, i, rank, c, j = build.reduce("g", "k", "R", "C/g", "k")
    group, i, rank = build.contract([group, i, rank], [d])
    c, j = build.contract([c, j], [rank])
    operator = build.finish(b, build.split(group, c), build.shift(build.unfold(h, i), 1), build.unfold(w, j))

    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        rows = F.pad(x.roll(-1, 2), (0, 0, 1, 1)).unfold(2, 3, 1)
        windows = F.pad(rows, (0, 0, 1, 1)).unfold(3, 3, 1).unflatten(1, (sizes["g"], -1))
        return torch.einsum("bgchwij,girD,cjr->bDhw", windows, w1, w2)

    return Case(operator, function)


def gpt2_operator() -> Case:
    build = begin("B L C", "q p t", B=2, L=3, C=4, q=2, p=3, t=5)
    b, s, out = build.output("B", "L", "p*q*t")
    p, qt = build.merge(out, "q*t")
    q, t = build.merge(qt, "t")
    (c,) = build.reduce("C")
    (c,) = build.contract([c], [p, t])
    operator = build.finish(b, s, build.split(q, c))
    return Case(
        operator,
        lambda x, w: torch.einsum("blqc,cpt->blpqt", x.unflatten(2, (2, 4)), w).flatten(2),
    )


CASES: dict[str, Callable[[], Case]] = {
    "linear": linear,
    **{f"conv1d k={k}": lambda k=k: convolution_1d(k) for k in (1, 3, 5, 7)},
    **{f"conv2d k={k}": lambda k=k: convolution_2d(k) for k in (1, 3, 5, 7)},
    "grouped": grouped_convolution,
    "depthwise": depthwise_convolution,
    "depthwise separable": depthwise_separable_convolution,
    **{f"dilated k={k} s={s}": lambda k=k, s=s: dilated_convolution(k, s) for k, s in ((3, 2), (3, 3), (5, 2), (2, 2))},
    "local": local_convolution,
    "one filter": one_filter_for_all_channels,
    "along height": convolution_along_height,
    "even window": window_of_even_size,
    "strided": convolution_with_stride,
    "average pooling": average_pooling,
    "sliding average pooling": sliding_average_pooling,
    "pixel shuffle": pixel_shuffle,
    "pixel unshuffle": pixel_unshuffle,
    "nearest upsampling": nearest_upsampling,
    "tiling": tiling,
    "patch embedding": patch_embedding,
    "outer product": outer_product,
    "scale per channel": scale_per_channel,
    "shift by 1": lambda: shift(1),
    "shift by -2": lambda: shift(-2),
    "shift after window": shift_after_window,
    "window of a repeat": window_of_a_repeat,
    "sum of repeats": sum_of_repeats,
    "weight on half a merge": weight_on_half_a_merge,
    "weight on a window": weight_on_a_window,
    "weights in the way": weights_that_stand_in_each_others_way,
    "weight on its diagonal": weight_read_on_its_diagonal,
    "shared taps": lambda: taps_shared_by_two_weights(1),
    "shared taps s=2": lambda: taps_shared_by_two_weights(2),
    "joined places": convolution_of_joined_places,
    "within blocks": convolution_within_blocks,
    "two batches": convolution_with_two_batches,
    "three places": projection_ahead_of_three_places,
    "shared groups": groups_that_share_their_weight,
    "operator 1": operator_1,
    "operator 2": operator_2,
    "gpt-2": gpt2_operator,
}


VERBS = ["split", "merge", "shift", "unfold", "stride", "expand", "contract", "convolve"]


def random_operator(seed: int) -> Operator:
    """Apply primitives at random, in combinations that no search would try; windows on a shared offset often."""
    rng = random.Random(seed)
    build = begin("C H", "k s", C=4, H=6, k=3, s=2)
    build.output(*rng.sample(["C", "H", "s*C"], rng.choice([2, 2, 3])))
    build.reduce(*rng.choices(["k", "k", "s", "C/s"], k=rng.randrange(1, 4)))
    for _ in range(rng.randrange(2, 9)):
        apply_at_random(build, rng)
    return build.finish(*rng.sample(build.interface, len(build.interface)))


def apply_at_random(build: Assembler, rng: random.Random) -> None:
    dims = rng.sample(build.interface, len(build.interface))
    if len(dims) < 2:
        return
    verb = rng.choice([*VERBS, "contract", "convolve"])
    if verb in ("split", "unfold"):
        getattr(build, verb)(*dims[:2])
    elif verb == "merge" and (dims[0].size / build.symbols.size("s")).is_legal:
        build.merge(dims[0], "s")
    elif verb == "shift":
        build.shift(dims[0], rng.choice([-1, 1, 2]))
    elif verb == "stride" and rng.random() < 0.3:
        build.stride(dims[0], "s")
    elif verb == "expand" and rng.random() < 0.2:
        build.expand(dims[0])
    elif verb == "contract":
        held = rng.randrange(1, min(3, len(dims)) + 1)
        outer = rng.randrange(held + 1)
        build.contract(dims[outer:held], dims[:outer])
    elif verb == "convolve":
        reductions = [dim for dim in dims if isinstance(dim, Reduction)]
        places = [dim for dim in dims if not isinstance(dim, Reduction)]
        if reductions and places:
            taps, *_ = build.contract(
                [reductions[0], *reductions[1:][: rng.randrange(2)], *places[1 : rng.randrange(3)]]
            )
            build.unfold(places[0], build.stride(taps, "s") if rng.random() < 0.3 else taps)
