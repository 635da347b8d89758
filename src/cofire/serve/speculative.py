"""Speculative decoding with the model's own MTP modules (DeepSeek-V3 technical report, section 5.4.3).

Drafts for the next D tokens come from the D MTP modules; the main model then runs once over 1 + D tokens and says
how many of them it would have chosen itself. Greedy rows keep a draft iff it is the main model's most probable token.
Sampled rows follow speculative sampling (arXiv 2211.17192, algorithm 1): a draft x from q is kept with probability
min(1, p(x) / q(x)); the first one that is not is replaced by a draw from max(p - q, 0), renormalised; after D kept
drafts one more token comes from p. The tokens then have exactly the main model's distribution.

What "equal to plain decoding" means: the main model computes the same sums for a token whether it runs over one
token or over 1 + D, but matrix kernels may add in another order, so the last bits of the logits can differ. Greedy
output is the same token for token unless two logits, or two experts' scores, are that close: in FP64 and FP32 this is
rare (no case in the tests); in BF16, where logits have 8 bits, equal or nearly equal logits are common and outputs do
part. Plain decoding in batches of different sizes has the same property.

Left out: drafting trees, and separate draft models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cofire.serve.sampling import ACCEPT, TOKEN, BatchSampler, draw


class Verdict(NamedTuple):
    """``tokens`` [B, 1 + D], of which row b's first ``accepted[b] + 1`` count; ``accepted`` [B]: kept drafts."""

    tokens: Tensor
    accepted: Tensor


def verify(
    logits: Tensor, drafts: Tensor, draft_probabilities: Tensor | None, sampler: BatchSampler, index: np.ndarray
) -> Verdict:
    """Decide which drafts stay and what follows them.

    Args:
        logits: [B, 1 + D, V] of the main model, after the last token and after each draft.
        drafts: [B, D].
        draft_probabilities: [B, D, V] they were drawn from; needed unless all rows are greedy.
        sampler: Of these rows.
        index: [B, 1 + D], places of the new tokens in their sequences.
    """
    if sampler.all_greedy:
        tokens = logits.argmax(-1)
        return Verdict(tokens, _leading(tokens[:, :-1] == drafts))
    assert draft_probabilities is not None
    target = sampler.distribution(logits)
    p = target[:, :-1].gather(2, drafts.unsqueeze(-1)).squeeze(-1)
    q = draft_probabilities.gather(2, drafts.unsqueeze(-1)).squeeze(-1)
    # u q < p, not u < p / q: a draft has q > 0, but the quotient may overflow.
    accepted = _leading(sampler.uniforms(index[:, :-1], ACCEPT) * q < p)
    residual = (target[:, :-1] - draft_probabilities).clamp_(min=0)
    # p = q exactly leaves no residual, and such a draft is never refused; p keeps the draw defined.
    empty = residual.sum(-1, keepdim=True) <= 0
    residual = torch.where(empty, target[:, :-1], residual)
    last = torch.cat((residual, target[:, -1:]), dim=1)
    rows = torch.arange(len(drafts), device=drafts.device)
    final = draw(last[rows, accepted], sampler.uniforms(index, TOKEN)[rows, accepted])
    tokens = torch.cat((drafts, drafts.new_zeros(len(drafts), 1)), dim=1)
    tokens[rows, accepted] = final
    return Verdict(tokens, accepted)


def _leading(kept: Tensor) -> Tensor:
    """Return how many entries of each row are true before the first false one."""
    return kept.to(torch.int64).cumprod(1).sum(1)
