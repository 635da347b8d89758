"""A decoder whose experts get and return what codecs make of their rows, in FP32 and in FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cofire.errors import PrecisionError
from cofire.model import build
from cofire.model.decoder import Decoder
from cofire.model.fp8 import use_codecs, use_fp8
from cofire.model.linear import Linear
from cofire.model.moe import LocalDispatcher, MoELayer
from cofire.model.router import Routing
from cofire.precision.codec import EXACT, GRADIENT_FLOOR, BF16Codec, ExpertCodecs, FP8Codec, LogFMTCodec
from cofire.precision.quantize import TILE, round_values
from cofire.precision.recipe import FP8Recipe
from cofire.spec import ModelSpec, load_as

TINY = load_as(ModelSpec, "tiny")


def decoder_with(codecs: ExpertCodecs | None, fp8: bool = True) -> Decoder:
    decoder = build(TINY, seed=1).train()
    if fp8:
        use_fp8(decoder)
    if codecs is not None:
        use_codecs(decoder, codecs)
    return decoder


def loss_and_gradients(decoder: Decoder) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(0, TINY.vocab_size, (2, 65), generator=torch.Generator().manual_seed(7))
    loss = decoder.loss(tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def test_the_dispatch_in_fp8_is_what_the_experts_product_does_to_its_input_anyway() -> None:
    """Technical report, 3.3.3: powers of two make the dispatched activation the operand of Fprop."""
    plain = loss_and_gradients(decoder_with(None))
    sent = loss_and_gradients(decoder_with(ExpertCodecs(combine=None, gradient=None)))
    assert plain[0] == sent[0]
    for name, grad in plain[1].items():
        assert torch.equal(grad, sent[1][name]), name


def test_the_gradient_that_is_dispatched_in_fp8_is_the_operand_of_dgrad() -> None:
    plain = loss_and_gradients(decoder_with(None))
    sent = loss_and_gradients(decoder_with(ExpertCodecs(dispatch=None, combine=None)))
    assert plain[0] == sent[0]
    for name, grad in plain[1].items():
        # Wgrad of the experts' second matrix takes it to tiles of 128 x 1, where the smallest numbers may change.
        torch.testing.assert_close(grad, sent[1][name], rtol=0, atol=1e-4 * grad.abs().max().item() * ("down" in name))


@pytest.mark.parametrize("combine", [BF16Codec(), LogFMTCodec(8), LogFMTCodec(10)], ids=["bf16", "8", "10"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_combine_of_few_bits_has_nearly_the_loss_and_gradient_of_the_exact_one(combine: Any, fp8: bool) -> None:
    plain = loss_and_gradients(decoder_with(None, fp8))
    sent = loss_and_gradients(decoder_with(ExpertCodecs(combine=combine), fp8))
    assert sent[0] != plain[0]
    assert sent[0] == pytest.approx(plain[0], rel=2e-3)
    both = [torch.cat([grads[name].flatten() for name in sorted(grads)]) for _, grads in (plain, sent)]
    assert torch.nn.functional.cosine_similarity(both[0], both[1], dim=0).item() > 0.98


def test_the_defaults_are_those_of_the_technical_report() -> None:
    codecs = ExpertCodecs()
    assert codecs == ExpertCodecs(FP8Codec("ue8m0"), BF16Codec(), FP8Codec("ue8m0", GRADIENT_FLOOR))
    decoder = build(TINY, seed=0)
    layers = [module for module in decoder.modules() if isinstance(module, MoELayer)]
    assert all(isinstance(m.dispatcher, LocalDispatcher) and m.dispatcher.codecs == EXACT for m in layers)
    assert use_codecs(decoder) == len(layers) > 0
    assert all(isinstance(m.dispatcher, LocalDispatcher) and m.dispatcher.codecs == codecs for m in layers)


def test_rows_and_gradients_pass_through_the_codecs_of_their_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(40, 6, generator=generator).topk(2, -1).indices
    gates = torch.rand(40, 2, generator=generator)
    routing = Routing(index, gates, gates)
    x = torch.randn(40, 200, generator=generator).requires_grad_()
    dispatcher = LocalDispatcher(6, ExpertCodecs(FP8Codec(), LogFMTCodec(8), FP8Codec(amax_floor=GRADIENT_FLOOR)))
    sent = dispatcher.dispatch(x, routing)
    sent.rows.retain_grad()
    outputs = (sent.rows * 1.7).detach().requires_grad_()
    y = dispatcher.combine(outputs, sent, routing)
    grad = torch.randn(40, 200, generator=generator) * 1e-7
    y.backward(grad)
    assert outputs.grad is not None
    sent.rows.backward(outputs.grad)
    assert x.grad is not None
    token = sent.state[0] // 2
    arrived = round_values(x.detach(), TILE, scale_format="ue8m0")
    assert torch.equal(sent.rows, arrived[token])
    log = LogFMTCodec(8)
    back = log.decode(log.encode(outputs.detach()), 200)
    expected = torch.zeros(40, 200).index_add_(0, token, back * gates.flatten()[sent.state[0]][:, None])
    torch.testing.assert_close(y.detach(), expected)
    to_experts = grad[token] * gates.flatten()[sent.state[0]][:, None]
    assert torch.equal(outputs.grad, round_values(to_experts, TILE, scale_format="ue8m0", amax_floor=GRADIENT_FLOOR))
    to_tokens = log.decode(log.encode(outputs.grad), 200)
    torch.testing.assert_close(x.grad, torch.zeros(40, 200).index_add_(0, token, to_tokens))


def test_a_handful_of_tokens_goes_through_the_codecs_too() -> None:
    """Inference of a few tokens takes a shorter way, past the dispatcher, only where nothing is sent."""
    decoder = decoder_with(None, fp8=False).eval()
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        exact = decoder(tokens).hidden
        use_codecs(decoder, ExpertCodecs(combine=LogFMTCodec(4)))
        assert not torch.equal(decoder(tokens).hidden, exact)
        use_codecs(decoder, EXACT)
        assert torch.equal(decoder(tokens).hidden, exact)


def test_no_tokens_are_dispatched_and_combined_to_none() -> None:
    dispatcher = LocalDispatcher(4, ExpertCodecs())
    none = torch.zeros(0, 2, dtype=torch.int64)
    routing = Routing(none, torch.zeros(0, 2), torch.zeros(0, 4))
    sent = dispatcher.dispatch(torch.zeros(0, 16, requires_grad=True), routing)
    assert dispatcher.combine(sent.rows, sent, routing).shape == (0, 16)


def test_a_dispatcher_that_really_sends_has_codecs_of_its_own() -> None:
    class Remote(LocalDispatcher):
        pass

    decoder = build(TINY, seed=0)
    layers = [module for module in decoder.modules() if isinstance(module, MoELayer)]
    layers[-1].dispatcher = Remote(4)
    with pytest.raises(PrecisionError, match="a Remote really sends its rows"):
        use_codecs(decoder)
    assert isinstance(layers[0].dispatcher, LocalDispatcher)
    assert layers[0].dispatcher.codecs == EXACT


def test_a_recipe_of_ones_own_keeps_the_exceptions_of_the_report() -> None:
    decoder = build(TINY, seed=0)
    use_fp8(decoder, FP8Recipe(gradient_scale="ue8m0"))
    recipes = {name: m.fp8 for name, m in decoder.named_modules() if isinstance(m, Linear) and m.fp8 is not None}
    assert all(recipe.gradient_scale == "ue8m0" for recipe in recipes.values())
    after = {name for name, recipe in recipes.items() if (recipe.kept, recipe.input_scale) == ("e5m6", "ue8m0")}
    assert after == {name for name in recipes if name.endswith("attention.output")}
    for layer in (module for module in decoder.modules() if isinstance(module, MoELayer)):
        assert layer.fp8 is not None
        up, down = layer.fp8
        assert (up.input_scale, down.input_scale, down.gradient_scale) == ("ue8m0", "fp32", "ue8m0")


def test_experts_may_have_a_backend_of_their_own():
    decoder = build(TINY, device=torch.device("cpu"), seed=0)
    use_fp8(decoder, FP8Recipe(backend="reference"), expert_backend="cpu")
    pairs = [module.fp8 for module in decoder.modules() if isinstance(module, MoELayer)]
    assert pairs
    assert {recipe.backend for pair in pairs if pair for recipe in pair} == {"cpu"}
    assert {m.fp8.backend for m in decoder.modules() if isinstance(m, Linear) and m.fp8} == {"reference"}
