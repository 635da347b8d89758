"""MLA in its two forms, GQA, and what a cache holds, against a loop over heads and queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model import Decoder, build
from cofire.model.attention import GQA, MLA
from cofire.model.rope import inverse_frequencies, softmax_scale
from cofire.spec import GQASpec, MLASpec, ModelSpec, RopeSpec, YarnSpec

F64 = torch.float64
YARN = RopeSpec(yarn=YarnSpec(factor=40.0, original_length=16, mscale=1.0, mscale_all_dim=1.0))


class SlotCache:
    """One layer's cache as a plain tensor."""

    def __init__(self, batch: int, capacity: int, width: int, dtype: torch.dtype = F64) -> None:
        self.entries = torch.full((batch, capacity, width), float("nan"), dtype=dtype)

    def write(self, entries: torch.Tensor, positions: torch.Tensor) -> None:
        self.entries[torch.arange(len(positions))[:, None], positions] = entries

    def read(self, length: int) -> torch.Tensor:
        return self.entries[:, :length].nan_to_num(1e3)  # a slot nobody wrote must not be looked at


def mla_spec(**changes: Any) -> ModelSpec:
    shape: dict[str, Any] = {
        "num_heads": 3, "q_lora_rank": 12, "kv_lora_rank": 10,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    }  # fmt: skip
    rope = changes.pop("rope", RopeSpec())
    return ModelSpec(
        name="a", vocab_size=31, hidden_size=16, num_layers=2, intermediate_size=24, init_std=0.3, rope=rope,
        attention=MLASpec(**(shape | changes)),
    )  # fmt: skip


def gqa_spec(heads: int, key_value_heads: int, bias: bool = True, interleaved: bool = False) -> ModelSpec:
    return ModelSpec(
        name="g", vocab_size=31, hidden_size=16, num_layers=2, intermediate_size=24, init_std=0.3,
        rope=RopeSpec(interleaved=interleaved),
        attention=GQASpec(num_heads=heads, num_key_value_heads=key_value_heads, head_dim=6, qkv_bias=bias),
    )  # fmt: skip


def slow_turn(x: torch.Tensor, position: int, rope: RopeSpec, frequencies: torch.Tensor) -> torch.Tensor:
    z = torch.polar(torch.ones_like(frequencies), position * frequencies)
    pairs = x.view(-1, 2) if rope.interleaved else x.view(2, -1).t()
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * z)
    return turned.flatten() if rope.interleaved else turned.t().flatten()


def slow_attend(
    queries: list[torch.Tensor], keys: list[torch.Tensor], values: list[torch.Tensor], scale: float
) -> torch.Tensor:
    rows = []
    for t, query in enumerate(queries):
        weights = torch.stack([(query * keys[j]).sum() * scale for j in range(t + 1)]).softmax(0)
        rows.append(sum((weights[j] * values[j] for j in range(t + 1)), torch.zeros_like(values[0])))
    return torch.stack(rows)


def slow_mla(module: MLA, x: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """One head and one query at a time (technical report, eq. 1-11); x [T, D]."""
    a = module.attention
    freq = inverse_frequencies(spec.rope, a.qk_rope_head_dim)
    query = module.query(x) if a.q_lora_rank is None else module.query_up(module.query_norm(module.query_down(x)))
    down = module.kv_down(x)
    latent, shared = module.kv_norm(down[:, : a.kv_lora_rank]), down[:, a.kv_lora_rank :]
    up = latent @ module.kv_up.weight.t()
    steps, heads = range(len(x)), []
    for h in range(a.num_heads):
        q = query[:, h * a.qk_head_dim : (h + 1) * a.qk_head_dim]
        kv = up[:, h * (a.qk_nope_head_dim + a.v_head_dim) : (h + 1) * (a.qk_nope_head_dim + a.v_head_dim)]
        n = a.qk_nope_head_dim
        queries = [torch.cat((q[t, :n], slow_turn(q[t, n:], t, spec.rope, freq))) for t in steps]
        keys = [torch.cat((kv[t, :n], slow_turn(shared[t], t, spec.rope, freq))) for t in steps]
        heads.append(slow_attend(queries, keys, [kv[t, n:] for t in steps], softmax_scale(spec.rope, a.qk_head_dim)))
    return module.output(torch.cat(heads, -1))


def slow_gqa(module: GQA, x: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    a = module.attention
    freq = inverse_frequencies(spec.rope, a.head_dim)
    query, key, value = (m(x).unflatten(-1, (-1, a.head_dim)) for m in (module.query, module.key, module.value))
    heads = []
    for h in range(a.num_heads):
        g = h // (a.num_heads // a.num_key_value_heads)
        queries = [slow_turn(query[t, h], t, spec.rope, freq) for t in range(len(x))]
        keys = [slow_turn(key[t, g], t, spec.rope, freq) for t in range(len(x))]
        heads.append(slow_attend(queries, keys, [value[t, g] for t in range(len(x))], a.head_dim**-0.5))
    return module.output(torch.cat(heads, -1))


def caches_for(decoder: Decoder, batch: int, capacity: int, dtype: torch.dtype = F64) -> list[SlotCache]:
    return [SlotCache(batch, capacity, decoder.spec.attention.cache_width, dtype) for _ in decoder.layers]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_mla_equals_a_loop_over_heads_and_queries(q_lora_rank: int | None, form: Any, interleaved: bool) -> None:
    spec = mla_spec(q_lora_rank=q_lora_rank, rope=YARN.model_copy(update={"interleaved": interleaved}))
    decoder = build(spec, dtype=F64, seed=1)
    module = decoder.layers[0].attention
    assert isinstance(module, MLA)
    x = torch.randn(2, 7, 16, dtype=F64)
    with torch.no_grad():
        positions = torch.arange(7).expand(2, -1)
        y = module(x, decoder.context((2, 7), positions, form, x.device))
        for b in range(2):
            assert relative(y[b], slow_mla(module, x[b], spec)) < 1e-13


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_gqa_equals_a_loop_over_heads_and_queries(heads: tuple[int, int], interleaved: bool) -> None:
    spec = gqa_spec(*heads, interleaved=interleaved)
    decoder = build(spec, dtype=F64, seed=1)
    module = decoder.layers[1].attention
    assert isinstance(module, GQA)
    with torch.no_grad():
        for linear in (module.query, module.key, module.value):
            linear.bias.normal_()
        x = torch.randn(2, 5, 16, dtype=F64)
        y = module(x, decoder.context((2, 5), None, "auto", x.device))
        for b in range(2):
            assert relative(y[b], slow_gqa(module, x[b], spec)) < 1e-13


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), heads=st.integers(1, 5), rank=st.none() | st.integers(1, 9), latent=st.integers(1, 12),
    nope=st.integers(1, 9), value=st.integers(1, 12), length=st.integers(1, 12), yarn=st.booleans(),
)  # fmt: skip
def test_absorbed_equals_expanded_over_the_same_weights(
    seed: int, heads: int, rank: int | None, latent: int, nope: int, value: int, length: int, yarn: bool
) -> None:
    spec = mla_spec(
        num_heads=heads, q_lora_rank=rank, kv_lora_rank=latent, qk_nope_head_dim=nope, v_head_dim=value,
        rope=YARN if yarn else RopeSpec(),
    )  # fmt: skip
    decoder = build(spec, dtype=F64, seed=seed)
    tokens = torch.randint(0, 31, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expanded = decoder(tokens, form="expanded").hidden
        positions = torch.arange(length).expand(2, -1)
        assert relative(decoder(tokens, positions, form="absorbed").hidden, expanded) < 1e-12
        assert relative(decoder(tokens, form="absorbed").hidden, expanded) < 1e-12


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("chunks", [[13], [9, 1, 1, 1, 1], [4, 5, 4], [1] * 13])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_a_cached_run_in_any_chunks_equals_one_pass(kind: str, chunks: list[int], form: Any) -> None:
    decoder = build(mla_spec() if kind == "mla" else gqa_spec(4, 2), dtype=F64, seed=2)
    tokens = torch.randint(0, 31, (2, 13))
    caches, out, start = caches_for(decoder, 2, 16), [], 0
    with torch.no_grad():
        whole = decoder(tokens).hidden
        for size in chunks:
            positions = torch.arange(start, start + size).expand(2, -1)
            out.append(decoder(tokens[:, start : start + size], positions, caches, form=form).hidden)
            start += size
    assert relative(torch.cat(out, 1), whole) < 1e-12


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
def test_a_ragged_batch_equals_its_sequences_alone(kind: str, form: Any) -> None:
    """Sequences of different age decode together: key j is seen from position p iff j <= p."""
    decoder = build(mla_spec() if kind == "mla" else gqa_spec(4, 2), dtype=F64, seed=3)
    tokens = torch.randint(0, 31, (3, 12))
    ages = [1, 5, 9]
    caches = caches_for(decoder, 3, 16)
    with torch.no_grad():
        for i, age in enumerate(ages):
            alone = [SlotCache(1, 16, c.entries.shape[-1]) for c in caches]
            decoder(tokens[i : i + 1, :age], torch.arange(age)[None], alone)
            for cache, own in zip(caches, alone, strict=True):
                cache.entries[i] = own.entries[0]
        for new in (1, 2):
            positions = torch.stack([torch.arange(age, age + new) for age in ages])
            together = decoder(tokens.gather(1, positions), positions, caches, form=form).hidden
            for i, age in enumerate(ages):
                whole = decoder(tokens[i : i + 1, : age + new]).hidden[:, age:]
                assert relative(together[i : i + 1], whole) < 1e-12


def test_prompts_of_different_length_can_be_padded_at_the_right() -> None:
    decoder = build(mla_spec(), dtype=F64, seed=4)
    tokens = torch.randint(0, 31, (2, 8))
    caches = caches_for(decoder, 2, 16)
    with torch.no_grad():
        decoder(tokens, torch.arange(8).expand(2, -1), caches)  # sequence 0 is only 5 long; its last 3 are padding
        positions = torch.tensor([[5], [8]])
        y = decoder(torch.tensor([[7], [9]]), positions, caches).hidden
        short = decoder(torch.cat((tokens[:1, :5], torch.tensor([[7]])), 1)).hidden[:, -1:]
    assert relative(y[:1], short) < 1e-12


def test_mla_caches_the_normalised_latent_and_the_rotated_key_and_nothing_else() -> None:
    """Released code caches the latent after its norm (facts A.8): kv_lora_rank + qk_rope_head_dim numbers."""
    spec = mla_spec()
    decoder = build(spec, dtype=F64, seed=5)
    caches = caches_for(decoder, 1, 8)
    tokens = torch.randint(0, 31, (1, 6))
    with torch.no_grad():
        block: Any = decoder.layers[0]
        module = block.attention
        module.kv_norm.weight.normal_()
        decoder(tokens, torch.arange(6)[None], caches)
        down = module.kv_down(block.attention_norm(decoder.embedding(tokens)))
    entries = caches[0].entries[:, :6]
    assert entries.shape[-1] == spec.attention.cache_width == 14
    torch.testing.assert_close(entries[..., :10], module.kv_norm(down[..., :10]).detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(entries[:, 0, 10:], down[:, 0, 10:], rtol=1e-13, atol=1e-14)  # position 0: no turn
    torch.testing.assert_close(entries[..., 10:].norm(dim=-1), down[..., 10:].norm(dim=-1), rtol=1e-12, atol=0)
    assert relative(entries[:, 5, 10:], down[:, 5, 10:]) > 1e-3


def test_a_later_token_changes_nothing_before_it() -> None:
    decoder = build(mla_spec(), dtype=F64, seed=6)
    tokens = torch.randint(0, 31, (1, 9))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 31
    for form in ("expanded", "absorbed"):
        a, b = decoder(tokens, form=form).hidden, decoder(changed, form=form).hidden
        assert torch.equal(a[:, :6], b[:, :6])
        assert (a[:, 6:] - b[:, 6:]).abs().amax() > 1e-6


@pytest.mark.parametrize("length", [5, 70, 200])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_training_attention_has_the_gradients_of_plain_softmax(kind: str, length: int) -> None:
    decoder = build(mla_spec() if kind == "mla" else gqa_spec(4, 2), dtype=F64, seed=7)
    tokens = torch.randint(0, 31, (2, length))
    grads = []
    for form in ("expanded", "absorbed") if kind == "mla" else ("expanded", "cached"):
        decoder.zero_grad()
        if form == "cached":  # positions given and shifted: the masked path instead of the causal one
            positions = torch.arange(3, length + 3).expand(2, -1)
            y = _masked_gqa(decoder, tokens, positions)
        else:
            y = decoder(tokens, form=form).hidden
        y.pow(2).sum().backward()
        grads.append({n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        scale = max(grad.abs().max().item(), 1e-3)
        assert (grad - grads[1][name]).abs().max().item() / scale < 1e-9, name


def _masked_gqa(decoder: Decoder, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    context = decoder.context(tuple(tokens.shape), None, "auto", tokens.device)
    visible = (context.positions[:, :, None] >= context.positions[:, None, :]).expand(len(tokens), -1, -1)
    masked = type(context)(context.positions, context.turn, context.length, False, visible, "auto")
    x = decoder.embedding(tokens)
    for layer in decoder.layers:
        x = layer(x, masked)[0]
    return decoder.norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_narrow_types_follows_the_one_pass_result(dtype: torch.dtype) -> None:
    decoder = build(mla_spec(), dtype=dtype, seed=8)
    tokens = torch.randint(0, 31, (2, 10))
    caches = caches_for(decoder, 2, 16, dtype)
    with torch.no_grad():
        whole = y = decoder(tokens).hidden.float()
        for t in range(10):
            y = decoder(tokens[:, t : t + 1], torch.full((2, 1), t), caches).hidden.float()
    assert relative(y, whole[:, -1:]) < (1e-5 if dtype == torch.float32 else 8e-2)
