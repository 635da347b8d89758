"""FP8 linear layers: each product against operands that a test quantises by itself, and a whole decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.model import build
from cofire.model.fp8 import use_fp8
from cofire.model.linear import Linear
from cofire.model.moe import MoELayer, silu_product
from cofire.precision.codec import GRADIENT_FLOOR, E5M6Codec
from cofire.precision.linear import (
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_linear,
    fp8_swiglu_linear,
    swiglu,
)
from cofire.precision.quantize import BLOCK, COLUMN_TILE, TILE, ScaleFormat, quantize
from cofire.precision.recipe import FP8Recipe
from cofire.spec import ModelSpec, load_as


def kept_bytes(call: Callable[[], object]) -> int:
    """Return the bytes of what a call keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(t.nbytes for t in kept)


def rounded(x: Tensor, tile, scale_format: ScaleFormat = "fp32", floor: float = 1e-4) -> Tensor:
    return quantize(x, tile, scale_format=scale_format, amax_floor=floor).dequantize().double()


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + inputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    return x, weight, torch.randn(rows, outputs, generator=generator) * 1e-6


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    scale = expected.abs().max().item()
    assert (found.double() - expected).abs().max().item() <= terms * 2.0**-23 * scale


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 128, 128), (130, 200, 300), (256, 64, 48), (3, 5, 7)])
@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_three_products_take_operands_in_tiles_and_blocks(rows, inputs, outputs, scales):
    x, weight, grad = operands(rows, inputs, outputs)
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_linear(x, weight, None, FP8Recipe(input_scale=scales, gradient_scale=scales))
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    kept = rounded(x.detach(), TILE, scales)
    matrix = rounded(weight.detach(), BLOCK)
    close(y.detach(), kept @ matrix.t(), inputs)
    close(x.grad, rounded(grad, TILE, scales, GRADIENT_FLOOR) @ matrix, outputs)
    columns = rounded(kept.float(), COLUMN_TILE, scales)
    close(weight.grad, rounded(grad, COLUMN_TILE, scales, GRADIENT_FLOOR).t() @ columns, rows)


@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [0, 0, 3], [256, 128]])
def test_experts_have_tiles_of_their_own(counts):
    rows = sum(counts)
    x, _, grad = operands(rows, 192, 160)
    weight = torch.randn(len(counts), 160, 192, generator=torch.Generator().manual_seed(5)) * 0.02
    both = [t.clone().requires_grad_() for t in (x, weight)]
    y = fp8_grouped_linear(both[0], both[1], torch.tensor(counts), FP8Recipe())
    y.backward(grad)
    alone = [t.clone().requires_grad_() for t in (x, weight)]
    first = 0
    for expert, count in enumerate(counts):
        part = slice(first, first + count)
        first += count
        if count:
            one = fp8_linear(alone[0][part], alone[1][expert], None, FP8Recipe())
            torch.testing.assert_close(y[part], one)
            one.backward(grad[part])
    for found, expected in zip(both, alone, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, torch.zeros_like(found) if expected.grad is None else expected.grad)


def test_gradients_far_below_the_floor_of_activations_are_kept():
    x, weight, grad = operands(128, 128, 128)
    x.requires_grad_()
    fp8_linear(x, weight, None, FP8Recipe()).backward(grad * 1e-9)
    assert x.grad is not None
    exact = grad.double() @ weight.double() * 1e-9
    assert ((x.grad - exact).norm() / exact.norm()).item() < 0.06


def test_what_is_kept_for_the_backward_pass_is_a_quarter_in_bytes():
    x, weight, _ = operands(256, 256, 256)
    kept = kept_bytes(lambda: fp8_linear(x.requires_grad_(), weight.requires_grad_(), None, FP8Recipe()))
    assert kept <= (x.nbytes + weight.nbytes) * 0.26


def by_hand(gate_up: Tensor, weight: Tensor, grad: Tensor, recipe: FP8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Return output and both gradients of SwiGLU and the layer behind it, from quantised operands in FP64."""
    matrix = rounded(weight, BLOCK)
    y = rounded(swiglu(gate_up), TILE, recipe.input_scale) @ matrix.t()
    halves = [quantize(half.contiguous()).dequantize() for half in gate_up.chunk(2, -1)]
    again = torch.cat(halves, -1)
    columns = rounded(swiglu(again), COLUMN_TILE, recipe.input_scale)
    scale = recipe.gradient_scale
    grad_weight = rounded(grad, COLUMN_TILE, scale, GRADIENT_FLOOR).t() @ columns
    wide = again.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    (gate * gate.sigmoid() * up).backward(rounded(grad, TILE, scale, GRADIENT_FLOOR) @ matrix)
    assert wide.grad is not None
    return y, wide.grad, grad_weight


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 128, 128), (130, 100, 300), (256, 64, 48), (3, 5, 7)])
@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_swiglu_and_the_layer_behind_it_equal_their_quantised_operands(rows, width, outputs, scales):
    gate_up, weight, grad = operands(rows, 2 * width, outputs)
    weight, recipe = weight[:, :width].contiguous(), FP8Recipe(input_scale=scales, gradient_scale=scales)
    expected = by_hand(gate_up, weight, grad, recipe)
    y = fp8_swiglu_linear(gate_up.requires_grad_(), weight.requires_grad_(), recipe)
    y.backward(grad)
    assert gate_up.grad is not None
    assert weight.grad is not None
    close(y.detach(), expected[0], width)
    close(gate_up.grad, expected[1], outputs)
    close(weight.grad, expected[2], rows)


@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [0, 0, 3], [256, 128], [0, 0]])
def test_swiglu_of_experts_equals_theirs_one_by_one(counts):
    rows, width, outputs = sum(counts), 96, 160
    gate_up, _, grad = operands(rows, 2 * width, outputs)
    weight = torch.randn(len(counts), outputs, width, generator=torch.Generator().manual_seed(5)) * 0.02
    both = [t.clone().requires_grad_() for t in (gate_up, weight)]
    y = fp8_grouped_swiglu_linear(both[0], both[1], torch.tensor(counts), FP8Recipe(gradient_scale="ue8m0"))
    y.backward(grad)
    assert both[0].grad is not None
    assert both[1].grad is not None
    first = 0
    for expert, count in enumerate(counts):
        part = slice(first, first + count)
        first += count
        if not count:
            assert not both[1].grad[expert].any()
            continue
        expected = by_hand(gate_up[part], weight[expert], grad[part], FP8Recipe(gradient_scale="ue8m0"))
        for found, wanted in zip((y.detach()[part], both[0].grad[part], both[1].grad[expert]), expected, strict=True):
            close(found, wanted, max(count, outputs))


def test_swiglu_keeps_its_input_in_fp8_and_its_output_is_exact():
    """Technical report, 3.3.3: two FP8 numbers a token instead of three, for every number of SwiGLU's width."""
    rows, width = 256, 384
    gate_up, weight, _ = operands(rows, 2 * width, 128)
    weight = weight[:, :width].contiguous().requires_grad_()
    hidden = silu_product(gate_up).requires_grad_()
    of_weight = weight.numel() + 4 * 3
    before = quantize(gate_up).num_bytes + kept_bytes(lambda: fp8_linear(hidden, weight, None, FP8Recipe()))
    after = kept_bytes(lambda: fp8_swiglu_linear(gate_up.clone().requires_grad_(), weight, FP8Recipe()))
    assert (before - of_weight) / rows == 3 * width * (1 + 4 / 128)
    assert (after - of_weight) / rows == 2 * width * (1 + 4 / 128)
    experts = weight.detach()[None].requires_grad_()
    of_experts = kept_bytes(
        lambda: fp8_grouped_swiglu_linear(gate_up.clone().requires_grad_(), experts, torch.tensor([rows]), FP8Recipe())
    )
    assert of_experts == after
    y = fp8_swiglu_linear(gate_up, weight, FP8Recipe())
    assert torch.equal(y, fp8_linear(hidden, weight, None, FP8Recipe()))


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same():
    gate_up, weight, _ = operands(40, 256, 64)
    weight.requires_grad_()
    for kept in ("fp8", "e5m6"):
        recipe = FP8Recipe(kept=kept)
        expected = fp8_linear(gate_up, weight, None, recipe), fp8_swiglu_linear(gate_up, weight[:, :128], recipe)
        with torch.no_grad():
            found = fp8_linear(gate_up, weight, None, recipe), fp8_swiglu_linear(gate_up, weight[:, :128], recipe)
        assert torch.equal(found[0], expected[0].detach())
        assert torch.equal(found[1], expected[1].detach())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 128, 128), (130, 200, 300), (3, 5, 7)])
def test_an_input_in_e5m6_is_multiplied_in_e4m3(rows, inputs, outputs):
    x, weight, grad = operands(rows, inputs, outputs)
    exact = x.clone()
    recipe = FP8Recipe(input_scale="ue8m0", kept="e5m6")
    kept = kept_bytes(lambda: fp8_linear(x.requires_grad_(), weight.requires_grad_(), None, recipe))
    of_weight = weight.numel() + 4 * math.ceil(outputs / 128) * math.ceil(inputs / 128)
    assert kept - of_weight == rows * (math.ceil(1.5 * inputs) + math.ceil(inputs / 128))
    y = fp8_linear(x, weight, None, recipe)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    matrix = rounded(weight.detach(), BLOCK)
    close(y.detach(), rounded(exact, TILE, "ue8m0") @ matrix.t(), inputs)
    close(x.grad, rounded(grad, TILE, floor=GRADIENT_FLOOR) @ matrix, outputs)
    copy = E5M6Codec().decode(E5M6Codec().encode(exact), inputs)
    columns = rounded(copy, COLUMN_TILE, "ue8m0")
    close(weight.grad, rounded(grad, COLUMN_TILE, floor=GRADIENT_FLOOR).t() @ columns, rows)


def test_powers_of_two_take_an_input_to_other_tiles_without_error():
    """Technical report, 3.3.3: only what is below a tile's smallest value can change, at most half of that."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(8))
    kept = quantize(x, TILE, scale_format="ue8m0").dequantize()
    columns = quantize(kept, COLUMN_TILE, scale_format="ue8m0")
    changed = columns.dequantize() != kept
    smallest = columns.scale.float().repeat_interleave(128, 0) * 2.0**-9
    assert changed.float().mean() < 0.01
    assert ((columns.dequantize() - kept).abs() <= smallest / 2).all()
    in_fp32 = quantize(x, TILE).dequantize()
    assert (quantize(in_fp32, COLUMN_TILE).dequantize() != in_fp32).float().mean() > 0.9


SPECIAL = {"nan": math.nan, "infinity": math.inf, "minus infinity": -math.inf}


@pytest.mark.parametrize("bad", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("kept", ["fp8", "e5m6"])
def test_what_is_not_finite_breaks_its_row_and_its_columns_and_nothing_else(bad, kept):
    x, weight, grad = operands(200, 256, 64)
    x[3, 130] = bad
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_linear(x, weight, None, FP8Recipe(kept=kept))
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    broken = torch.zeros(200, dtype=torch.bool)
    broken[3] = True
    assert y[3].isnan().all()
    assert y[~broken].isfinite().all()
    assert x.grad.isfinite().all()
    assert weight.grad[:, :128].isfinite().all()
    assert weight.grad[:, 128:].isnan().all()  # the tile of 1 x 128 went into tiles of 128 x 1


def test_a_broken_gradient_stays_with_its_expert():
    x, _, grad = operands(300, 128, 64)
    weight = torch.randn(3, 64, 128) * 0.02
    grad[120, 5] = math.nan
    for layer, inputs in ((fp8_grouped_linear, x), (fp8_grouped_swiglu_linear, torch.cat((x, x), 1))):
        both = [t.clone().requires_grad_() for t in (inputs, weight)]
        layer(both[0], both[1], torch.tensor([100, 50, 150]), FP8Recipe()).backward(grad)
        assert both[0].grad is not None
        assert both[1].grad is not None
        assert both[0].grad.isnan().any(1).nonzero().flatten().tolist() == [120]
        assert both[1].grad.isnan().flatten(1).any(1).tolist() == [False, True, False]
        assert both[1].grad[1, 5].isnan().all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e-30])
def test_zeros_and_numbers_far_below_the_floor_multiply_to_zero(value):
    weight = torch.randn(64, 128) * 0.02
    x = torch.full((40, 128), value, requires_grad=True)
    grad = torch.zeros(40, 64)
    fp8_linear(x, weight.requires_grad_(), None, FP8Recipe()).backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()
    y = fp8_swiglu_linear(torch.full((40, 256), value), torch.zeros(64, 128), FP8Recipe(kept="e5m6"))
    assert not y.any()


@pytest.mark.parametrize("kept", ["fp8", "e5m6"])
def test_no_rows_have_an_output_and_gradients_of_zero(kept):
    for shape in ((0, 128), (3, 0, 128)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.randn(64, 128, requires_grad=True)
        y = fp8_linear(x, weight, None, FP8Recipe(kept=kept))
        y.sum().backward()
        assert y.shape == (*shape[:-1], 64)
        assert x.grad is not None
        assert weight.grad is not None
        assert x.grad.shape == shape
        assert not weight.grad.any()
        assert fp8_swiglu_linear(x, weight[:, :64], FP8Recipe()).shape == (*shape[:-1], 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_sixteen_bits_come_back_in_their_type_and_weights_get_fp32(dtype):
    x, weight, grad = operands(64, 128, 96)
    layers = (
        lambda x, w: fp8_linear(x, w, torch.ones(96), FP8Recipe(kept="e5m6")),
        lambda x, w: fp8_swiglu_linear(x, w[:, :64], FP8Recipe()),
    )
    for layer in layers:
        a, w = x.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        y = layer(a, w)
        y.backward((grad * 1e3).to(dtype))
        assert a.grad is not None
        assert w.grad is not None
        assert (y.dtype, a.grad.dtype, w.grad.dtype) == (dtype, dtype, torch.float32)


def test_operands_that_do_not_fit_are_refused_in_one_line():
    x, weight, counts = torch.zeros(6, 128), torch.zeros(2, 64, 128), torch.tensor([2, 4])
    meta = torch.zeros(64, 128, device="meta")
    recipe = FP8Recipe()
    calls = (
        (lambda: fp8_linear(x.double(), weight[0], None, recipe), "not quantised"),
        (lambda: fp8_linear(x, weight[0].double(), None, recipe), "not quantised"),
        (lambda: fp8_linear(x.int(), weight[0], None, recipe), "not quantised"),
        (lambda: fp8_linear(x, weight[0, :, :100], None, recipe), "does not take"),
        (lambda: fp8_linear(x, weight, None, recipe), r"must be \[O, I\]"),
        (lambda: fp8_linear(torch.zeros(()), weight[0], None, recipe), "does not take"),
        (lambda: fp8_linear(torch.zeros(6, 0), torch.zeros(64, 0), None, recipe), "does not take"),
        (lambda: fp8_linear(x, meta, None, recipe), "move one"),
        (lambda: fp8_linear(x, weight[0], torch.zeros(63), recipe), "bias"),
        (lambda: fp8_grouped_linear(x, weight[0], counts, recipe), r"must be \[E, O, I\]"),
        (lambda: fp8_grouped_linear(x[None], weight, counts, recipe), "flatten"),
        (lambda: fp8_grouped_linear(x, weight, torch.tensor([2, 3, 1]), recipe), "experts"),
        (lambda: fp8_grouped_linear(x, weight, counts.float(), recipe), "experts"),
        (lambda: fp8_grouped_linear(x, weight, torch.tensor([2, 3]), recipe), "sum to 5"),
        (lambda: fp8_grouped_linear(x, weight, torch.tensor([-1, 7]), recipe), ">= 0"),
        (lambda: fp8_swiglu_linear(x[:, :127], weight[0], recipe), "halves"),
        (lambda: fp8_swiglu_linear(x, weight[0], recipe), "does not take"),
        (lambda: fp8_grouped_swiglu_linear(x, weight[..., :64], torch.tensor([6]), recipe), "experts"),
        (lambda: FP8Recipe(kept="e5m2"), "neither"),  # type: ignore[arg-type]
        (lambda: FP8Recipe(input_scale="e8m0"), "input_scale"),  # type: ignore[arg-type]
        (lambda: FP8Recipe(gradient_scale="bf16"), "gradient_scale"),  # type: ignore[arg-type]
    )
    for call, match in calls:
        with pytest.raises(PrecisionError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


OUTSIDE = {"embedding.weight", "head.weight", "mtp.0.projection.weight"}


def test_a_decoder_keeps_embedding_head_router_and_norms_out_of_fp8():
    spec = load_as(ModelSpec, "tiny")
    decoder = build(spec, seed=0)
    in_fp8 = use_fp8(decoder)
    names = {name for name, module in decoder.named_modules() if isinstance(module, Linear) and module.fp8 is None}
    assert names == {"head", "mtp.0.projection"}
    total = sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
    routers = sum(m.router.weight.numel() for m in decoder.modules() if isinstance(m, MoELayer))
    outside = sum(p.numel() for n, p in decoder.named_parameters() if n in OUTSIDE)
    assert in_fp8 == total - routers - outside
    scales = {name: m.fp8.input_scale for name, m in decoder.named_modules() if isinstance(m, Linear) and m.fp8}
    kept = {name for name, m in decoder.named_modules() if isinstance(m, Linear) and m.fp8 and m.fp8.kept == "e5m6"}
    assert {name for name, scale in scales.items() if scale == "ue8m0"} == kept
    assert kept == {name for name in scales if name.endswith("attention.output")}


def test_a_decoder_in_fp8_has_nearly_the_loss_and_gradient_of_fp32():
    spec = load_as(ModelSpec, "tiny")
    tokens = torch.randint(0, spec.vocab_size, (2, 65), generator=torch.Generator().manual_seed(7))
    losses, gradients = [], []
    for fp8 in (False, True):
        decoder = build(spec, seed=1).train()
        if fp8:
            use_fp8(decoder)
        loss = decoder.loss(tokens).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0).item() > 0.99


def passes(recipe: FP8Recipe, grouped: bool, swiglu_first: bool) -> list[Tensor]:
    """Return a layer's output and gradients for one set of operands."""
    inputs = 2 * 200 if swiglu_first else 200
    x, _, _ = operands(300, inputs, 1)
    _, weight, grad = operands(300, 200, 150)
    weight = weight * 50
    if grouped:
        weight = torch.stack([weight, weight.flip(0), -weight])
    x.requires_grad_()
    weight.requires_grad_()
    counts = (torch.tensor([130, 0, 170]),) if grouped else ()
    if grouped:
        y = (fp8_grouped_swiglu_linear if swiglu_first else fp8_grouped_linear)(x, weight, *counts, recipe)
    elif swiglu_first:
        y = fp8_swiglu_linear(x, weight, recipe)
    else:
        y = fp8_linear(x, weight, None, recipe)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("swiglu_first", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("gradient_tile", [TILE, BLOCK])
@pytest.mark.parametrize("kept", ["fp8", "e5m6"])
def test_products_of_scaled_operands_are_those_of_their_values(grouped, swiglu_first, gradient_tile, kept):
    recipe = FP8Recipe(gradient_tile=gradient_tile, kept=kept)
    expected = passes(recipe, grouped, swiglu_first)
    found = passes(replace(recipe, backend="cpu"), grouped, swiglu_first)
    for exact, other in zip(expected, found, strict=True):
        close(other, exact.double(), 400)


def test_a_layer_runs_on_the_model_of_a_tensor_cores_accumulators():
    expected = passes(FP8Recipe(), grouped=False, swiglu_first=False)
    found = passes(FP8Recipe(backend="reference"), grouped=False, swiglu_first=False)
    for exact, other in zip(expected, found, strict=True):
        error = ((other - exact).norm() / exact.norm()).item()
        assert 1e-7 < error < 2e-3, "14 bits are kept over 128 products"


def test_a_backend_that_cannot_run_here_is_one_line():
    with pytest.raises(PrecisionError, match=r"backend 'hopper' is not one of reference, cpu, torch, triton, or None"):
        FP8Recipe(backend="hopper")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PrecisionError, match="needs a CUDA device"):
        fp8_linear(torch.ones(2, 128), torch.ones(3, 128), None, FP8Recipe(backend="triton"))
