"""Multi-token prediction: which token each depth predicts, and what its loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.model import Decoder, build
from cofire.spec import ModelSpec, load_as


def tiny(depth: int, *changes: str) -> Decoder:
    spec = load_as(ModelSpec, "tiny", ["init_std=0.2", "vocab_size=61", f"mtp.depth={depth}", *changes])
    return build(spec, dtype=torch.float64, seed=depth)


def slow_mtp_losses(decoder: Decoder, tokens: torch.Tensor) -> list[float]:
    """Eq. 21-25 position by position, over tokens [T + 1]: depth k predicts t_{i+k+1} from h_i and t_{i+k}."""
    length, losses = len(tokens) - 1, []
    hidden = decoder(tokens[None, :-1]).hidden[0]
    modules: list[Any] = list(decoder.mtp)
    for k, module in enumerate(modules, start=1):
        usable = length - k
        hidden, total = hidden[:usable], 0.0
        rows = []
        for i in range(usable):
            embedded = module.embedding_norm(decoder.embedding.weight[tokens[i + k]])
            rows.append(module.projection(torch.cat((embedded, module.hidden_norm(hidden[i])))))
        context = decoder.context((1, usable), None, "expanded", tokens.device)
        hidden = module.norm(module.block(torch.stack(rows)[None], context)[0])[0]
        for i in range(usable):
            total += F.cross_entropy(decoder.logits(hidden[i]), tokens[i + k + 1]).item()
        losses.append(total / length)
    return losses


@settings(max_examples=12, deadline=None)
@given(depth=st.integers(1, 3), length=st.integers(4, 12), batch=st.integers(1, 3), seed=st.integers(0, 1000))
def test_depth_k_is_summed_over_t_minus_k_positions_and_divided_by_t(
    depth: int, length: int, batch: int, seed: int
) -> None:
    """A.10 and trap 6's neighbour: T - k usable positions, but the divisor stays T (eq. 24)."""
    decoder = tiny(depth)
    tokens = torch.randint(0, 61, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = decoder.loss(tokens).mtp_losses.tolist()
        expected = [slow_mtp_losses(decoder, row) for row in tokens]
    for k in range(depth):
        assert found[k] == pytest.approx(sum(e[k] for e in expected) / batch, rel=1e-11)


def test_an_even_guess_costs_log_v_times_the_usable_share() -> None:
    """With a head of zeros each usable position costs log V exactly: (T - k) / T of it remains."""
    decoder = tiny(2)
    with torch.no_grad():
        decoder.head.weight.zero_()
        out = decoder.loss(torch.randint(0, 61, (2, 9)))
    log_v = torch.log(torch.tensor(61.0, dtype=torch.float64)).item()
    assert out.main_loss.item() == pytest.approx(log_v, rel=1e-12)
    assert out.mtp_losses.tolist() == pytest.approx([log_v * 7 / 8, log_v * 6 / 8], rel=1e-12)


def test_the_loss_adds_lambda_times_the_mean_over_depths() -> None:
    decoder = tiny(3, "mtp.loss_weight=0.7")
    out = decoder.loss(torch.randint(0, 61, (2, 9)))
    expected = out.main_loss + 0.7 / 3 * out.mtp_losses.sum() + out.balance_loss
    torch.testing.assert_close(out.loss, expected, rtol=1e-13, atol=0)


def test_a_prediction_never_sees_the_token_it_predicts() -> None:
    """Depth 1 at position i may look at t_0 .. t_{i+1}; changing t_{i+2} moves its target, not its output."""
    decoder = tiny(1)
    tokens = torch.randint(0, 61, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    outs = []
    for row in (tokens, changed):
        hidden = decoder(row[:, :-1]).hidden
        outs.append(decoder.draft(0, hidden[:, :-1], row[:, 1:-1], torch.arange(8)[None]))
    change = (outs[0] - outs[1]).abs().amax(-1)[0]  # sorting by expert regroups sums, so equal up to rounding
    assert (change[:5] < 1e-12).all()
    assert (change[5:] > 1e-4).all()


def test_the_embedding_comes_first_in_the_projection() -> None:
    """A.10: paper and released code differ; ours is the released order, [embedding; hidden]."""
    decoder = tiny(1)
    module: Any = decoder.mtp[0]
    hidden, embedded = torch.randn(2, 1, 4, 64, dtype=torch.float64)
    context = decoder.context((1, 4), None, "expanded", hidden.device)
    with torch.no_grad():
        module.projection.weight[:, :64] = 0  # blind to the first half
        assert torch.equal(module(hidden, embedded, context)[0], module(hidden, embedded * -3, context)[0])
        assert not torch.allclose(module(hidden, embedded, context)[0], module(-hidden, embedded, context)[0])


def test_embedding_and_head_are_shared_with_the_main_model() -> None:
    decoder = tiny(2)
    names = [name for name, _ in decoder.mtp.named_parameters()]
    assert not [n for n in names if "embedding.weight" in n or "head" in n]
    assert decoder.head.weight.shape == decoder.embedding.weight.shape == (61, 64)
    for name in ("embedding", "head"):
        decoder.zero_grad()
        out = decoder.loss(torch.randint(0, 61, (2, 9)))
        out.mtp_losses.sum().backward()
        assert getattr(decoder, name).weight.grad.abs().sum() > 0


def test_each_depth_takes_the_previous_depths_normed_output() -> None:
    decoder = tiny(2)
    tokens = torch.randint(0, 61, (1, 8))
    with torch.no_grad():
        first = decoder.draft(0, decoder(tokens[:, :-1]).hidden[:, :-1], tokens[:, 1:-1], torch.arange(6)[None])
        second = decoder.draft(1, first[:, :-1], tokens[:, 2:-1], torch.arange(5)[None])
        loss = F.cross_entropy(decoder.logits(second)[0], tokens[0, 3:], reduction="sum") / 7
        torch.testing.assert_close(decoder.loss(tokens).mtp_losses[1], loss, rtol=1e-12, atol=0)


def test_drafting_token_by_token_with_a_cache_equals_one_pass() -> None:
    decoder = tiny(1)
    tokens = torch.randint(0, 61, (2, 11))

    class Slots:
        entries = torch.zeros(2, 16, decoder.spec.attention.cache_width, dtype=torch.float64)

        def write(self, entries: torch.Tensor, positions: torch.Tensor) -> None:
            self.entries[torch.arange(2)[:, None], positions] = entries

        def read(self, length: int) -> torch.Tensor:
            return self.entries[:, :length]

    with torch.no_grad():
        hidden, cache = decoder(tokens[:, :-1]).hidden, Slots()
        positions = torch.arange(10).expand(2, -1)
        whole = decoder.draft(0, hidden, tokens[:, 1:], positions)
        for t in range(10):
            y = decoder.draft(0, hidden[:, t : t + 1], tokens[:, t + 1 : t + 2], positions[:, t : t + 1], cache)
            torch.testing.assert_close(y[:, 0], whole[:, t], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2])
def test_a_depth_without_usable_positions_costs_nothing(length: int) -> None:
    decoder = tiny(2)
    out = decoder.loss(torch.randint(0, 61, (2, length + 1)))
    assert out.mtp_losses[-1].item() == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())
    assert out.expert_counts[-1].sum() == 0
