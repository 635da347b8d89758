"""What an operator is worth, by name: rewards that a spec can ask for.

A reward is a function of an operator; higher is better, and a number that is not finite fails the operator, as do the
limits of the spec's window, which are looked at first. Two need no training and are *modelled*: they say what an
operator costs or could hold, not how well it learns. The third is *measured*.

- ``multiply_adds``: one minus its multiply-adds over those of the baseline; where there is none, over the most that the
  window admits.
- ``capacity``: its independent parameters, per parameter of the baseline where there is one. They are its parameters
  times the rank of the Jacobian to the weights over their number, at the sizes of ``fingerprint.probe_sizes``: of two
  windows over one dim only the taps that differ count. The most that fits the window is what a search for it seeks.
- ``proxy_accuracy``: how well a small network of the operator learns drawn pictures (``evaluate``); seconds each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import nan

from cofire.errors import SearchError
from cofire.search.cost import costs
from cofire.search.fingerprint import redundant_weights
from cofire.search.from_spec import baseline_of, space_of, total_multiply_adds
from cofire.search.graph import Operator
from cofire.search.sampling import Reward
from cofire.search.selection import Limits
from cofire.spec.messages import nearest
from cofire.spec.search import SearchSpec


def limits_of(spec: SearchSpec, baseline: Operator | None) -> Limits:
    """Return the limits of a spec's window: where multiply-adds are bounded both ways, the narrower bounds.

    Args:
        spec: Its ratios and its absolute bounds.
        baseline: What ratios are measured against.

    Raises:
        SearchError: Ratios and absolute bounds leave nothing between them.
    """
    window = spec.window
    limits = Limits(max_parameters=window.max_parameters, max_tensor_bytes=window.max_tensor_bytes)
    if baseline is not None:
        ratios = Limits.of_ratio(baseline, window.min_ratio, window.max_ratio)
        limits = replace(limits, min_multiply_adds=ratios.min_multiply_adds, max_multiply_adds=ratios.max_multiply_adds)
    low = max((n for n in (limits.min_multiply_adds, window.min_multiply_adds) if n is not None), default=None)
    high = min((n for n in (limits.max_multiply_adds, window.max_multiply_adds) if n is not None), default=None)
    if low is not None and high is not None and low > high:
        raise SearchError(
            f"the window begins at {low:,} multiply-adds and ends at {high:,}: nothing fits; leave out the ratios or "
            "the absolute bounds"
        )
    return replace(limits, min_multiply_adds=low, max_multiply_adds=high)


@dataclass(frozen=True)
class Within:
    """A reward of the operators within limits; the others fail.

    Attributes:
        limits: The limits.
        reward: The reward.
    """

    limits: Limits
    reward: Reward

    def __call__(self, operator: Operator) -> float:
        """Return the reward, or a number that is not finite."""
        return nan if self.limits.broken(costs(operator)) else self.reward(operator)


@dataclass(frozen=True)
class FewMultiplyAdds:
    """The reward ``multiply_adds``; see the module.

    Attributes:
        whole: Multiply-adds that are worth nothing.
    """

    whole: int

    def __call__(self, operator: Operator) -> float:
        """Return the part of the multiply-adds that is saved; negative above the baseline."""
        return 1.0 - total_multiply_adds(operator) / self.whole


@dataclass(frozen=True)
class Capacity:
    """The reward ``capacity``; see the module.

    Attributes:
        unit: Parameters that are worth one.
    """

    unit: int

    def __call__(self, operator: Operator) -> float:
        """Return the independent parameters in units; an operator too large to be probed fails."""
        try:
            found = redundant_weights(operator)
        except SearchError:
            return nan
        return total_parameters(operator) / self.unit * found.rank / max(1, found.parameters)


def total_parameters(operator: Operator) -> int:
    """Return the elements of all weights, summed over all mappings."""
    return sum(found.parameters for found in costs(operator))


def _few_multiply_adds(spec: SearchSpec, baseline: Operator | None) -> Reward:
    whole = spec.window.max_multiply_adds if baseline is None else total_multiply_adds(baseline)
    if not whole:
        raise SearchError(
            "reward = 'multiply_adds' is measured against a baseline; name one in window.operator, or give "
            "window.max_multiply_adds"
        )
    return FewMultiplyAdds(whole)


def _capacity(spec: SearchSpec, baseline: Operator | None) -> Reward:
    return Capacity(1 if baseline is None else max(1, total_parameters(baseline)))


def _proxy_accuracy(spec: SearchSpec, baseline: Operator | None) -> Reward:
    from cofire.search.evaluate import proxy_accuracy  # needs torch

    return proxy_accuracy(spec, baseline)


REWARDS: dict[str, Callable[[SearchSpec, Operator | None], Reward]] = {
    "multiply_adds": _few_multiply_adds,
    "capacity": _capacity,
    "proxy_accuracy": _proxy_accuracy,
}
MEASURED = frozenset({"proxy_accuracy"})  # the others are modelled


def make_reward(spec: SearchSpec) -> Within:
    """Return the reward that a spec names, within its window; it can be sent to other processes.

    Args:
        spec: Names it in ``sampling.reward``; the baseline and the limits are in ``window``.

    Raises:
        SearchError: There is no reward of that name, or its window or baseline do not fit.
    """
    name = spec.sampling.reward
    if name not in REWARDS:
        raise SearchError(f"sampling.reward = {name!r} is not one of {', '.join(REWARDS)}{nearest(name, REWARDS)}")
    baseline = baseline_of(spec, space_of(spec))
    return Within(limits_of(spec, baseline), REWARDS[name](spec, baseline))
