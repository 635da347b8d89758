"""Canvas lowered to PyTorch: equal to loops over elements and to torch's modules, in values and gradients.

``canvas_by_hand`` holds kernels that use every primitive in every layout, ``canvas_in_loops`` is the oracle.
"""

from __future__ import annotations

import ast
from functools import cache
from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from canvas_by_hand import CASES, HALF, SPACE_FIRST, build
from canvas_in_loops import run
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.canvas import DimName, Extent, Kernel, Limits, Sampler
from cofire.search.canvas.lowering import LoweredKernel, lower, write_source
from cofire.search.canvas.primitives import (
    ACTIVATIONS,
    BROADCASTS,
    ELEMENTWISE,
    FOLDS,
    PRIMITIVES,
    Activation,
    Bmm,
    Broadcast,
    Convolution,
    Fc,
    Fold,
    Group,
    Mix,
    Scale,
    Shift,
    Unfold,
)
from cofire.search.canvas.variables import ONE, C, G, H, W, number

TINY = Extent(4, 4, 3)
PLACES = ((16, 8, 8), (32, 4, 4), (48, 6, 2))
SMALL_PLACES = ((4, 3, 3), (8, 4, 2))
HEIGHT, WIDTH = DimName(1, "H"), DimName(1, "W")
WINDOW = (DimName(0, "KH"), DimName(0, "KW"))

every_case = pytest.mark.parametrize("kernel", CASES.values(), ids=list(CASES))


@cache
def samples(count: int, small: bool = False) -> tuple[Kernel, ...]:
    places, most = (SMALL_PLACES, 10) if small else (PLACES, 12)
    sampler = Sampler(places, Limits(primitives=(4, most), bmm_share=0.3), 11)
    return tuple(sampler.sample() for _ in range(count))


def module(kernel: Kernel, extent: tuple[int, int, int] = TINY, seed: int = 0) -> LoweredKernel:
    """Return a module in double precision whose weights, those of Scale too, are random."""
    torch.manual_seed(seed)
    lowered = lower(kernel, extent).double()
    with torch.no_grad():
        for weight in lowered.parameters():
            if bool((weight == 1).all()):
                weight.normal_()
    return lowered


def data(extent: tuple[int, int, int] = TINY, batch: int = 2) -> Tensor:
    return torch.randn(batch, *extent, dtype=torch.float64, requires_grad=True)


def written(kernel: Kernel, extent: tuple[int, int, int]) -> nn.Module:
    """Return the module that the written source makes, in a namespace of its own."""
    namespace: dict[str, type[nn.Module]] = {}
    exec(compile(write_source(kernel, extent), "<written>", "exec"), namespace)
    return namespace["CanvasKernel"]()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= tolerance * scale


def assert_equals_loops(kernel: Kernel, extent: Extent) -> None:
    lowered, x = module(kernel, extent), data(extent)
    weights = [weight.detach().numpy() for weight in lowered.parameters()]
    loops = [run(kernel, extent, example.detach().numpy(), weights) for example in x]
    assert_close(lowered(x), torch.from_numpy(np.stack(loops)))


# The oracle


@every_case
def test_lowering_equals_loops_over_elements(kernel):
    assert_equals_loops(kernel, TINY)


def test_samples_equal_loops_over_elements():
    for kernel in samples(60, small=True):
        for place in SMALL_PLACES:
            assert_equals_loops(kernel, Extent(*place))


def test_cases_use_every_primitive_and_every_kind():
    nodes = [node.primitive for kernel in CASES.values() for node in kernel.graph.nodes]
    assert {primitive.name for primitive in nodes} == set(PRIMITIVES)
    kinds = {primitive.arguments().get("kind") for primitive in nodes} - {None}
    assert kinds == {*ACTIVATIONS, *ELEMENTWISE, *BROADCASTS, *FOLDS}
    products = {(p.transpose_left, p.transpose_right) for p in nodes if isinstance(p, Bmm)}
    assert products == {(False, False), (False, True), (True, False), (True, True)}


@every_case
def test_gradients_are_those_of_finite_differences(kernel):
    extent = Extent(2, 4, 3)
    lowered, x = module(kernel, extent), data(extent, batch=1)
    names = [name for name, _ in lowered.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(lowered, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *lowered.parameters()))


def test_hundreds_of_samples_have_the_right_shape_and_finite_gradients_at_every_place():
    for kernel in samples(200):
        for place in PLACES:
            torch.manual_seed(0)
            lowered, x = lower(kernel, place), torch.randn(2, *place, requires_grad=True)
            y = lowered(x)
            assert y.shape == x.shape
            assert sum(weight.numel() for weight in lowered.parameters()) == kernel.parameters(Extent(*place))
            gradients = torch.autograd.grad(y.sum(), (x, *lowered.parameters()))
            assert all(bool(value.isfinite().all()) for value in (y, *gradients))


# Known kernels


def test_depthwise_separable_convolution_is_torchs():
    kernel = build(Convolution(3), Activation("relu"), Fc(C))
    lowered, x = module(kernel, (6, 5, 4)), data((6, 5, 4))
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False).double()
    pointwise = nn.Conv2d(6, 6, 1, bias=False).double()
    lowered.load_state_dict({"w0": depthwise.weight[:, 0], "w1": pointwise.weight[None, :, :, 0, 0]})
    assert_close(lowered(x), nn.Sequential(depthwise, nn.ReLU(), pointwise)(x))


def test_inverted_bottleneck_is_torchs():
    kernel = build(
        *(Fc(C * number(4)), Activation("gelu"), Convolution(5), Activation("gelu"), Fc(C), (Broadcast("add"), 0, 5))
    )
    lowered, x = module(kernel, (6, 5, 4)), data((6, 5, 4))
    layers = nn.Sequential(
        nn.Conv2d(6, 24, 1, bias=False),
        nn.GELU(),
        nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
        nn.GELU(),
        nn.Conv2d(24, 6, 1, bias=False),
    ).double()
    wide, depthwise, narrow = (weight.detach() for weight in layers.parameters())
    lowered.load_state_dict({"w0": wide[None, :, :, 0, 0], "w1": depthwise[:, 0], "w2": narrow[None, :, :, 0, 0]})
    assert_close(lowered(x), x + layers(x))


def test_large_kernel_attention_is_torchs():
    kernel = build(Convolution(5), Convolution(7, 3), Fc(C), (Broadcast("mul"), 0, 3))
    lowered, x = module(kernel, (4, 9, 8)), data((4, 9, 8))
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False),
        nn.Conv2d(4, 4, 7, padding=9, dilation=3, groups=4, bias=False),
        nn.Conv2d(4, 4, 1, bias=False),
    ).double()
    near, far, point = (weight.detach() for weight in layers.parameters())
    lowered.load_state_dict({"w0": near[:, 0], "w1": far[:, 0], "w2": point[None, :, :, 0, 0]})
    assert_close(lowered(x), x * layers(x))


def test_self_attention_is_torchs():
    lowered, x = module(CASES["attention"], (8, 3, 5)), data((8, 3, 5))
    attention = nn.MultiheadAttention(8, 1, bias=False, batch_first=True).double()
    attention.out_proj.weight.data = torch.eye(8, dtype=torch.float64)
    weights = attention.in_proj_weight.detach().unflatten(0, (3, 1, 8))
    lowered.load_state_dict({f"w{k}": weight for k, weight in enumerate(weights)})
    sequence = x.flatten(2).mT
    expected, _ = attention(sequence, sequence, sequence)
    assert_close(lowered(x), expected.mT.reshape(x.shape))


def test_involution_is_a_sum_over_windows_whose_weights_a_1x1_convolution_makes_at_each_place():
    kernel = build(Fc(G * number(9)), (Unfold("HW", 3), 0), (Broadcast("mul"), 1, 2), Fold("avg", WINDOW))
    lowered, x = module(kernel, (6, 5, 4)), data((6, 5, 4))
    taps = F.conv2d(x, lowered.get_parameter("w0")[0, :, :, None, None]).reshape(2, 1, 2, 9, 5, 4)
    windows = F.unfold(x, 3, padding=1).reshape(2, 3, 2, 9, 5, 4)  # every other channel has the same taps
    assert_close(lowered(x), (taps * windows).mean(3).reshape(x.shape))


# Source


@every_case
def test_source_makes_the_same_module_from_the_same_seed(kernel):
    assert_source_is_module(kernel, TINY)


def test_source_of_samples_makes_the_same_module():
    for kernel in samples(200)[:60]:
        for place in PLACES:
            assert_source_is_module(kernel, place)


def assert_source_is_module(kernel: Kernel, place: tuple[int, int, int]) -> None:
    torch.manual_seed(3)
    lowered = lower(kernel, place)
    torch.manual_seed(3)
    pasted = written(kernel, place)
    assert list(pasted.state_dict()) == list(lowered.state_dict())
    x = torch.randn(2, *place)
    assert torch.equal(pasted(x), lowered(x))


@every_case
def test_source_imports_what_it_uses_of_torch_alone_and_keeps_within_the_line(kernel):
    for extent in (TINY, Extent(512, 56, 56)):
        source = write_source(kernel, extent)
        assert max(map(len, source.splitlines())) <= 120
        tree = ast.parse(source)
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert imported <= {"torch", "F", "Tensor", "nn"}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert imported <= used
        assert used <= imported | {"self", "super", "x", *(f"y{k}" for k in range(9))}


def test_source_reads_like_this():
    kernel = build(Convolution(3, 2), Activation("relu"), (Group(G), 0), (Fc(C), 3), (Broadcast("add"), 2, 4))
    assert write_source(kernel, (8, 6, 6), "Block") == BLOCK


BLOCK = '''\
"""A kernel found by search.

t0 = input(): [C=C | H=H W=W]
t1 = convolution(kernel=3, dilation=2) t0: [C=C | H=H W=W]
t2 = activation(kind=relu) t1: [C=C | H=H W=W]
t3 = group(factor=G, meta=0) t0: [G=G C=C/G | H=H W=W]
t4 = fc(channels=C, meta=0) t3: [C=C | H=H W=W]
t5 = broadcast(kind=add) t2 t4: [C=C | H=H W=W]
t6 = output() t5: [C=C | H=H W=W]
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Maps [any, 8, 6, 6] to the same shape: C = 8, H = 6, W = 6, G = 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w0 = nn.Parameter(torch.randn(8, 3, 3) * 0.3333333333333333)  # t1 = convolution(kernel=3, dilation=2)
        self.w1 = nn.Parameter(torch.randn(2, 4, 4) * 0.5)  # t4 = fc(channels=C, meta=0)

    def forward(self, x: Tensor) -> Tensor:
        y0 = F.conv2d(x, self.w0.unsqueeze(1), padding=2, dilation=2, groups=8)  # t1: [C=C | H=H W=W]
        y0 = F.relu(y0)  # t2: [C=C | H=H W=W]
        x = x.reshape(-1, 2, 4, 6, 6)  # t3: [G=G C=C/G | H=H W=W]
        x = F.conv2d(x.reshape(-1, 8, 6, 6), self.w1.reshape(8, 4, 1, 1), groups=2)  # t4: [C=C | H=H W=W]
        y0 = y0 + x  # t5: [C=C | H=H W=W]
        return y0
'''


# State and calls


def test_state_alone_restores_the_function():
    for kernel in (CASES["shifts"], CASES["shift of a window"], *samples(200)[:20]):
        place = PLACES[0]
        first, second = (module(kernel, place, seed) for seed in (1, 2))
        second.load_state_dict(first.state_dict())
        x = data(place)
        assert torch.equal(first(x), second(x))


@every_case
def test_examples_of_a_batch_do_not_meet_and_it_may_have_any_size(kernel):
    lowered, x = module(kernel), data(batch=5)
    assert_close(lowered(x), torch.cat([lowered(example[None]) for example in x]))
    assert lowered(x[:0]).shape == (0, *TINY)


def test_compiled_whole_it_is_the_same_at_any_batch():
    names = ("convolution after space", "fold of windows", "attention", "shifts")
    place = PLACES[0]
    for kernel in (*map(CASES.__getitem__, names), *samples(200)[:2]):
        lowered = module(kernel, place)
        torch._dynamo.reset()
        compiled = torch.compile(lowered, fullgraph=True, dynamic=True, backend="eager")
        for batch in (2, 5):
            x = data(place, batch)
            assert_close(compiled(x), lowered(x))


def test_windows_are_views_of_the_padded_tensor():
    lowered, x = module(CASES["fold of windows"], (4, 6, 5)), data((4, 6, 5))
    windows = lowered.plan.lines[0].expression.value({"x": x})
    assert windows.shape == (2, 4, 3, 3, 6, 5)
    assert windows.untyped_storage().nbytes() == 8 * 2 * 4 * 8 * 7


@pytest.mark.parametrize("over", ["H", "W", "HW"])
@pytest.mark.parametrize("before", [(Activation("tanh"),), (Group(G),), SPACE_FIRST], ids=["flat", "groups", "turned"])
def test_an_fc_of_windows_is_a_convolution_that_makes_no_windows(over, before):
    kernel = build(*before, Unfold(over, 3, 2), Fc(C, meta=int(before == SPACE_FIRST)))
    lowered = module(kernel)
    assert sum("F.conv2d" in str(line.expression) for line in lowered.plan.lines) == 1
    assert not any("unfold" in str(line.expression) for line in lowered.plan.lines)
    assert_equals_loops(kernel, TINY)


def test_windows_that_something_else_reads_too_are_made():
    both = build(Unfold("H", 3), (Fc(C), 1), (Fold("avg", WINDOW[:1]), 1), (Broadcast("add"), 2, 3))
    twice = build(Unfold("W", 3), Unfold("H", 3), Fc(C))
    for kernel in (both, twice):
        assert any("unfold" in str(line.expression) for line in lower(kernel, TINY).plan.lines)
        assert_equals_loops(kernel, TINY)


def test_memory_is_freed_when_a_tensor_is_read_no_more():
    chain = build(Convolution(3), Activation("relu"), Fc(C), Shift((HEIGHT,)), Convolution(3, 1, C))
    assert {line.target for line in lower(chain, TINY).plan.lines} == {"x"}


@pytest.mark.parametrize(
    "primitives",
    [
        (Fc(C),),
        (Group(G), Fc(C)),
        (Convolution(3),),
        (Convolution(5, 1, C),),
        (Mix((DimName(0, "C"), HEIGHT), (HALF, H)), Mix((DimName(0, "C"), WIDTH), (C, W))),
        (Scale((DimName(0, "C"),)),),
        (Unfold("HW", 3), Mix((DimName(0, "C"), *WINDOW), (C, ONE, ONE))),
    ],
)
def test_weights_begin_so_that_the_spread_of_data_stays(primitives):
    torch.manual_seed(0)
    extent = (64, 16, 16)
    lowered, x = lower(build(*primitives, groups=4), extent), torch.randn(8, *extent)
    y = lowered(x)[:, :, 3:-3, 3:-3] if not isinstance(primitives[0], Mix) else lowered(x)
    assert sqrt(0.8) < float(y.detach().std()) < sqrt(1.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lower(CASES["fc"], TINY)(torch.zeros(2, 4, 3, 4)), r"shape \[2, 4, 3, 4\] is not \[N, 4, 4, 3\]"),
        (lambda: lower(CASES["fc"], TINY)(torch.zeros(4, 4, 3)), r"is not \[N, 4, 4, 3\]"),
        (lambda: lower(CASES["fc narrower and wider"], (5, 4, 4)), "C/2 of the kernel is 5/2"),
        (lambda: write_source(CASES["fc"], TINY, "a kernel"), "'a kernel' cannot name a class"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(make, message):
    with pytest.raises(SearchError, match=message):
        make()
