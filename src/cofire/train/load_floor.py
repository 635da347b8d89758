"""The MaxVio that perfectly even routing still shows: the sampling floor of a batch.

MaxVio of a layer is (max load - mean load) / mean load (Loss-Free Balancing, arXiv 2408.15664, section 4.1).
If every token chose its experts evenly at random, some expert would still get more than the mean, and the fewer
the tokens the more. At 2,048 tokens, top-6 of 64, that floor is about 0.17: a measured MaxVio says little
without it.

Even routing here means independent, identically distributed scores that go through the model's own selection
(best groups first, then the best experts in them). Left out: tokens that are alike, which is why
a perfectly balanced router can lie above this floor but hardly below it.
"""

from __future__ import annotations

import functools

import numpy as np

from cofire.spec import MoESpec

_TOKENS_SIMULATED_MAX = 8192
_REPEATS = 24
_SEED = 20240828


def sampling_floor(moe: MoESpec, num_tokens: int) -> float:
    """Return the mean MaxVio of even routing, by Monte Carlo with a fixed seed (about 1% of noise).

    Above 8,192 tokens the value there is scaled by 1/sqrt(num_tokens), as sums of independent choices scale.

    Args:
        moe: The layer.
        num_tokens: Tokens over which the load is counted, at least 1.
    """
    return _floor(
        moe.num_routed_experts,
        moe.num_experts_per_token,
        moe.num_expert_groups,
        moe.num_limited_groups,
        moe.group_score,
        max(1, num_tokens),
    )


@functools.cache
def _floor(experts: int, chosen: int, groups: int, limited: int, group_score: str, num_tokens: int) -> float:
    rng = np.random.default_rng(_SEED)
    simulated = min(num_tokens, _TOKENS_SIMULATED_MAX)
    violations = []
    for _ in range(_REPEATS):
        scores = rng.random((simulated, experts), dtype=np.float32)
        if limited < groups:
            scores = _keep_best_groups(scores, groups, limited, group_score)
        index = np.argpartition(scores, experts - chosen, axis=1)[:, experts - chosen :]
        counts = np.bincount(index.ravel(), minlength=experts)
        violations.append(counts.max() / counts.mean() - 1.0)
    return float(np.mean(violations) * np.sqrt(simulated / num_tokens))


def _keep_best_groups(scores: np.ndarray, groups: int, limited: int, group_score: str) -> np.ndarray:
    """Set the scores of all but each token's ``limited`` best groups to minus infinity."""
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, experts // groups)
    best = 1 if group_score == "max" else 2
    totals = np.sort(grouped, axis=2)[:, :, -best:].sum(axis=2)
    kept = np.argpartition(totals, groups - limited, axis=1)[:, groups - limited :]
    mask = np.zeros((tokens, groups, 1), dtype=bool)
    np.put_along_axis(mask, kept[:, :, None], True, axis=1)
    return np.where(mask, grouped, np.float32(-np.inf)).reshape(tokens, experts)
