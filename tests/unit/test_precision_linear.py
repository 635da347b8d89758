"""FP8 linear layers: each product against operands that a test quantises by itself, and a whole decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cofire.model import build
from cofire.model.fp8 import use_fp8
from cofire.model.linear import Linear
from cofire.model.moe import MoELayer, silu_product
from cofire.precision.linear import GRADIENT_FLOOR, FP8Recipe, fp8_grouped_linear, fp8_linear
from cofire.precision.quantize import BLOCK, COLUMN_TILE, TILE, quantize
from cofire.spec import ModelSpec, load_as


def rounded(x: Tensor, tile, scale_format="fp32", floor: float = 1e-4) -> Tensor:
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
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight, _ = operands(256, 256, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fp8_linear(x.requires_grad_(), weight.requires_grad_(), None, FP8Recipe())
    assert sum(t.nbytes for t in kept) <= (x.nbytes + weight.nbytes) * 0.26


def test_swiglu_keeps_its_input_in_fp8_and_its_output_is_exact():
    gate_up = torch.randn(64, 512, generator=torch.Generator().manual_seed(6))
    exact, kept = gate_up.clone().requires_grad_(), gate_up.clone().requires_grad_()
    silu_product(exact).sum().backward()
    y = silu_product(kept, keeps_fp8=True)
    y.sum().backward()
    assert torch.equal(y, silu_product(gate_up))
    reread = quantize(gate_up).dequantize().requires_grad_()
    silu_product(reread).sum().backward()
    assert kept.grad is not None
    assert exact.grad is not None
    assert reread.grad is not None
    assert torch.equal(kept.grad, reread.grad)
    assert not torch.equal(kept.grad, exact.grad)


def test_a_decoder_keeps_embedding_head_router_and_norms_out_of_fp8():
    spec = load_as(ModelSpec, "tiny")
    decoder = build(spec, seed=0)
    in_fp8 = use_fp8(decoder)
    names = {name for name, module in decoder.named_modules() if isinstance(module, Linear) and module.fp8 is None}
    assert names == {"head"}
    total = sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
    routers = sum(m.router.weight.numel() for m in decoder.modules() if isinstance(m, MoELayer))
    assert in_fp8 == total - decoder.embedding.weight.numel() - decoder.head.weight.numel() - routers
    scales = {name: m.fp8.input_scale for name, m in decoder.named_modules() if isinstance(m, Linear) and m.fp8}
    assert {name for name, scale in scales.items() if scale == "ue8m0"} == {
        name for name in scales if name.endswith("attention.output")
    }


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
