"""From logits to tokens: temperature, top-k, top-p, and reproducible random numbers.

The order is that of most libraries: divide by the temperature, keep the ``top_k`` most probable tokens, and of these
the smallest set whose renormalised probabilities reach ``top_p`` (nucleus sampling, arXiv 1904.09751). Temperature 0
takes the most probable token, the lowest id among equals.

Random numbers are a function of (seed, index of the token in its sequence, purpose), not a stream: whatever else
runs in the batch, and however many draws other requests make, a request with a seed gives the same text. The function
is the output permutation of SplitMix64 (Steele, Lea and Flood 2014), applied three times.

Left out: penalties for repetition, beam search, and grammars.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cofire.errors import ServeError

# What a random number is for; a token's draws for different purposes are independent.
TOKEN, DRAFT, ACCEPT = 0, 1, 2

_TEMPERATURE_MAX = 100.0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _fresh_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class SamplingParameters:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 for the most probable token.
        top_p: Probability mass that is kept, in (0, 1].
        top_k: Number of tokens that are kept; 0: all.
        seed: Of the random numbers, taken modulo 2**64; drawn if not given.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = field(default_factory=_fresh_seed)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= _TEMPERATURE_MAX):
            raise ServeError(f"temperature = {self.temperature} must be between 0 and {_TEMPERATURE_MAX:g}; try 0.8")
        if not 0 < self.top_p <= 1:
            raise ServeError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if self.top_k < 0:
            raise ServeError(f"top_k = {self.top_k} must be at least 0; 0 keeps every token")


def _mix(x: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output permutation of uint64 values."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, index: np.ndarray, purpose: int) -> np.ndarray:
    """Return numbers in [0, 1) that depend on nothing but the arguments.

    Args:
        seeds: uint64, one per sequence.
        index: Position of the token in its sequence; broadcast against ``seeds``.
        purpose: ``TOKEN``, ``DRAFT`` or ``ACCEPT``.

    Returns:
        float64; multiples of 2**-52, so that a product with a positive total stays below the total.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) + _GOLDEN)
        state = _mix(state + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        state = _mix(state + np.uint64(purpose + 1) * _GOLDEN)
    return (state >> np.uint64(12)).astype(np.float64) * 2.0**-52


class BatchSampler:
    """The sampling parameters of the sequences of a batch, as tensors.

    Args:
        parameters: One per sequence.
        device: Where the logits are.
    """

    def __init__(self, parameters: Sequence[SamplingParameters], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seeds = np.array([p.seed % 2**64 for p in parameters], dtype=np.uint64)
        self.all_greedy = all(p.temperature == 0 for p in parameters)
        self.filters = any(p.temperature and (p.top_k or p.top_p < 1) for p in parameters)
        if self.all_greedy:
            return
        self.greedy = torch.tensor([p.temperature == 0 for p in parameters], device=device)
        self.temperature = torch.tensor([p.temperature or 1.0 for p in parameters], device=device)
        self.top_p = torch.tensor([p.top_p for p in parameters], dtype=torch.float64, device=device)
        self.top_k = torch.tensor([p.top_k or 2**31 for p in parameters], device=device)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probabilities [B, ..., V] float64 from which tokens are drawn; one-hot for greedy rows."""
        extra = (1,) * (logits.dim() - 1)
        wide = logits.to(torch.float64)
        # The largest logit is subtracted first: a small temperature would overflow otherwise.
        scaled = (wide - wide.amax(-1, keepdim=True)) / self.temperature.view(-1, *extra)
        probabilities = scaled.softmax(-1)
        if self.filters:
            probabilities = _filter(probabilities, self.top_k.view(-1, *extra), self.top_p.view(-1, *extra))
        if bool(self.greedy.any()):
            best = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            probabilities = torch.where(self.greedy.view(-1, *extra), best.to(torch.float64), probabilities)
        return probabilities

    def uniforms(self, index: np.ndarray, purpose: int) -> Tensor:
        """Return one number per entry of ``index`` [B, ...]; see :func:`uniforms`."""
        seeds = self.seeds.reshape(-1, *(1,) * (index.ndim - 1))
        return torch.from_numpy(uniforms(seeds, index, purpose)).to(self.device)

    def choose(self, logits: Tensor, index: np.ndarray) -> Tensor:
        """Return the tokens [B] chosen for ``logits`` [B, V]; ``index`` [B] is their place in the sequences."""
        if self.all_greedy:
            return logits.argmax(-1)
        return draw(self.distribution(logits), self.uniforms(index, TOKEN))


def _filter(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the ``top_k`` most probable tokens and of them the smallest set that reaches ``top_p``."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    # Where everything is to be kept, rounding in the sum must not drop the last tokens.
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens [...] at which the cumulative sum of ``probabilities`` [..., V] passes ``uniform`` [...].

    A token of probability zero is never drawn. The probabilities need not sum to one.
    """
    cumulative = probabilities.to(torch.float64).cumsum(-1)
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
