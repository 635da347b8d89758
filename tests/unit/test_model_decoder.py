"""The decoder as a whole: loss, recomputation, dtypes, compilation, initial weights."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

from cofire.model import Decoder, build
from cofire.model.router import Router
from cofire.spec import ModelSpec, load_as
from cofire.testing.strategies import model_specs


def tiny(*changes: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    return build(load_as(ModelSpec, "tiny", list(changes)), dtype=dtype, seed=seed)


def tokens_for(decoder: Decoder, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, decoder.spec.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_specs())
def test_every_valid_spec_trains_a_step(spec: ModelSpec) -> None:
    decoder = build(spec, dtype=torch.float64, seed=0)
    tokens = tokens_for(decoder, 2, 9)
    out = decoder.loss(tokens)
    out.loss.backward()
    with torch.no_grad():
        logits = decoder.logits(decoder(tokens[:, :-1]).hidden)
    plain = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert out.main_loss.item() == pytest.approx(plain.item(), rel=1e-11)
    depth = 0 if spec.mtp is None else spec.mtp.depth
    k = 0 if spec.moe is None else spec.moe.num_experts_per_token
    rows = [2 * 8] * spec.num_moe_layers + [2 * (8 - d) for d in range(1, depth + 1) if spec.moe is not None]
    assert out.expert_counts.sum(-1).tolist() == [n * k for n in rows]
    assert len(decoder.moe_routers()) == len(out.expert_counts)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_a_fresh_model_guesses_evenly() -> None:
    decoder = tiny()
    assert decoder.loss(tokens_for(decoder, 4, 65)).main_loss.item() == pytest.approx(math.log(512), rel=0.02)


def test_a_few_steps_learn_a_repeated_sample() -> None:
    decoder = tiny()
    tokens = tokens_for(decoder, 2, 17)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        decoder.loss(tokens).loss.backward()
        optimizer.step()
    out = decoder.loss(tokens)
    assert out.main_loss.item() < 0.5
    assert out.mtp_losses[0].item() < 1.0


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_neither_gradients_nor_counts(autocast: bool) -> None:
    """D (torchtitan PR 1593): counts doubled under full recomputation."""
    decoder = tiny("mtp.depth=2")
    tokens, seen = tokens_for(decoder, 2, 33), []
    for mode in ("none", "full"):
        decoder.recompute = mode  # type: ignore[assignment]
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = decoder.loss(tokens)
        out.loss.backward()
        seen.append((out, gradients(decoder)))
    assert torch.equal(seen[0][0].expert_counts, seen[1][0].expert_counts)
    assert torch.equal(seen[0][0].loss, seen[1][0].loss)
    for name, grad in seen[0][1].items():
        assert torch.equal(grad, seen[1][1][name]), name


def test_recomputation_keeps_fewer_numbers() -> None:
    decoder, kept = tiny(), {}
    own = {p.data_ptr() for p in decoder.parameters()}
    for mode in ("none", "full"):
        decoder.recompute = mode  # type: ignore[assignment]
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor, into: dict[int, int] = storages) -> torch.Tensor:
            if t.data_ptr() not in own:
                into[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = decoder.loss(tokens_for(decoder, 4, 257))
        kept[mode] = sum(storages.values())
        del out
    assert kept["full"] < 0.6 * kept["none"]


def test_micro_batches_add_up_to_the_batch() -> None:
    """Means over equal micro-batches; balance losses are per sequence, so they add up too."""
    decoder = tiny("init_std=0.1", dtype=torch.float64)
    tokens = tokens_for(decoder, 4, 17)
    whole = decoder.loss(tokens)
    whole.loss.backward()
    expected, counts = gradients(decoder), torch.zeros_like(whole.expert_counts)
    decoder.zero_grad()
    for part in tokens.split(1):
        out = decoder.loss(part)
        (out.loss / 4).backward()
        counts += out.expert_counts
    assert torch.equal(counts, whole.expert_counts)
    for name, grad in gradients(decoder).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-11, msg=name)


def test_autocast_stays_near_fp32() -> None:
    decoder = tiny()
    tokens = tokens_for(decoder, 4, 65)
    exact = decoder.loss(tokens)
    exact.loss.backward()
    reference = gradients(decoder)
    decoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder.loss(tokens)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=2e-3)
    for name in (
        "embedding.weight",
        "head.weight",
        "layers.1.attention.kv_up.weight",
        "layers.0.feed_forward.down.weight",
    ):
        a, b = gradients(decoder)[name].flatten(), reference[name].flatten()
        assert F.cosine_similarity(a, b, dim=0) > 0.99, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_runs_and_keeps_its_biases_in_fp32(dtype: torch.dtype) -> None:
    decoder = tiny(dtype=dtype)
    out = decoder.loss(tokens_for(decoder, 2, 17))
    out.loss.backward()
    assert out.loss.isfinite()
    assert {p.dtype for p in decoder.parameters()} == {dtype}
    for router in decoder.moe_routers():
        assert router.bias is not None
        assert router.bias.dtype == torch.float32
    assert decoder(tokens_for(decoder, 2, 5)).hidden.dtype == dtype


def test_counts_of_a_forward_pass_are_those_of_the_main_layers() -> None:
    decoder = tiny()
    tokens = tokens_for(decoder, 2, 10)
    counts = decoder(tokens).expert_counts
    assert counts.shape == (2, 8)
    assert counts.sum(-1).tolist() == [2 * 10 * 2] * 2
    whole = decoder.loss(torch.cat((tokens, tokens[:, :1]), 1)).expert_counts
    assert torch.equal(whole[:2], counts)


def test_routers_come_in_the_order_of_the_rows_of_counts() -> None:
    decoder = tiny("mtp.depth=2")
    for i, router in enumerate(decoder.moe_routers()):  # router i sends everything to experts 2i and 2i + 1
        assert router.bias is not None
        router.bias.fill_(-100.0)
        router.bias[[2 * i, 2 * i + 1]] = 100.0
    counts = decoder.loss(tokens_for(decoder, 1, 9)).expert_counts
    assert counts.argmax(-1).tolist() == [0, 2, 4, 6]
    assert (counts > 0).sum(-1).tolist() == [2] * 4


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    a, b, c = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    torch.manual_seed(99)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


def test_without_a_seed_the_global_generator_decides_and_is_not_reseeded() -> None:
    spec = load_as(ModelSpec, "tiny")
    torch.manual_seed(5)
    first, after = build(spec), torch.rand(3)
    torch.manual_seed(5)
    second, again = build(spec), torch.rand(3)
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert torch.equal(after, again)
    assert not torch.equal(build(spec).embedding.weight, second.embedding.weight)


def test_initial_weights_have_the_specs_deviation_and_norms_are_one() -> None:
    decoder = tiny("init_std=0.05", "attention={kind='gqa',num_heads=4,num_key_value_heads=2,head_dim=8,qkv_bias=true}")
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            deviation = parameter.std().item()
            assert deviation == pytest.approx(0.05, rel=5 / math.sqrt(parameter.numel())), name


def test_tied_embeddings_are_one_tensor_through_casts_and_training() -> None:
    decoder = tiny("tie_embeddings=true").to(torch.float64)
    assert decoder.head.weight is decoder.embedding.weight
    decoder.loss(tokens_for(decoder, 2, 9)).loss.backward()
    untied = tiny("tie_embeddings=true").to(torch.float64)
    untied.head.weight = torch.nn.Parameter(untied.embedding.weight.detach().clone())
    untied.loss(tokens_for(decoder, 2, 9)).loss.backward()
    total = untied.head.weight.grad + untied.embedding.weight.grad  # type: ignore[operator]
    torch.testing.assert_close(decoder.head.weight.grad, total, rtol=1e-10, atol=1e-14)


def test_a_meta_model_allocates_nothing() -> None:
    decoder = build(load_as(ModelSpec, "deepseek-v3"), device="meta")
    assert {p.device.type for p in decoder.parameters()} == {"meta"}
    total = sum(p.numel() for p in decoder.parameters()) - sum(p.numel() for p in decoder.mtp.parameters())
    biases = sum(r.bias.numel() for r in decoder.moe_routers()[:58] if r.bias is not None)
    assert total + biases == 671_026_419_200


def test_state_survives_a_save_and_a_load() -> None:
    decoder, other = tiny(seed=1), tiny(seed=2)
    for router in decoder.moe_routers():
        assert router.bias is not None
        router.bias.normal_()
    other.load_state_dict(copy.deepcopy(decoder.state_dict()))
    tokens = tokens_for(decoder, 2, 9)
    assert torch.equal(decoder.loss(tokens).loss, other.loss(tokens).loss)


def test_two_runs_give_the_same_bits() -> None:
    decoder = tiny()
    tokens, seen = tokens_for(decoder, 2, 33), []
    for _ in range(2):
        decoder.zero_grad()
        decoder.loss(tokens).loss.backward()
        seen.append(gradients(decoder))
    assert all(torch.equal(a, seen[1][name]) for name, a in seen[0].items())


@pytest.mark.slow
def test_the_model_compiles_to_the_same_loss() -> None:
    decoder = tiny("num_layers=2")
    tokens = tokens_for(decoder, 2, 17)
    expected = decoder.loss(tokens)
    expected.loss.backward()
    reference = gradients(decoder)
    decoder.zero_grad()
    out = torch.compile(decoder.loss, backend="aot_eager")(tokens)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.equal(out.expert_counts, expected.expert_counts)
    for name, grad in gradients(decoder).items():
        torch.testing.assert_close(grad, reference[name], rtol=1e-3, atol=1e-5, msg=name)


def test_importing_the_package_leaves_torch_unimported_until_the_model_is() -> None:
    code = "import sys, cofire; assert 'torch' not in sys.modules; from cofire.model import build, Decoder"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_router_found_in_the_decoder_is_the_routers_own() -> None:
    decoder = tiny()
    found: list[Any] = [m for m in decoder.modules() if isinstance(m, Router)]
    assert {id(m) for m in found} == {id(r) for r in decoder.moe_routers()}
