"""An unfinished operator: the dims that a search has arrived at.

The interface alone names the state, whatever order its primitives came in, so a search walks a directed acyclic graph
and not a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from cofire.search.primitives import Dim, MergeMajor, MergeMinor, Reduction, Share
from cofire.search.sizes import Allowance

Step = str  # the kind of a step: "reduce", "contract", "split", "merge", "shift", "stride", "unfold" or "expand"


@dataclass(frozen=True)
class Contraction:
    """One step that multiplies in one new weight: Shares, those of ``outer`` followed by Expand.

    Attributes:
        weight: Number of the new weight.
        inner: Dims shared by the weight and what lies above.
        outer: Dims that only the weight has.
    """

    weight: int
    inner: tuple[Dim, ...]
    outer: tuple[Dim, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """All dims of the weight, outer ones first."""
        return self.outer + self.inner


@dataclass(frozen=True)
class Interface:
    """Dims that are to reach a tensor, and what was spent on the way.

    Attributes:
        dims: Dims that go on towards the input, sorted by digest.
        weights: Coordinates of each weight, in the order of contractions.
        expansions: Dims repeated over, sorted by digest.
        reductions: All reductions, in order.
        allowance: Symbols left.
        steps: Number of steps of each kind, sorted by kind.
    """

    dims: tuple[Dim, ...]
    weights: tuple[tuple[Dim, ...], ...]
    expansions: tuple[Dim, ...]
    reductions: tuple[Reduction, ...]
    allowance: Allowance
    steps: tuple[tuple[Step, int], ...] = ()

    @cached_property
    def digest(self) -> int:
        """128 bits that name the graph, equal in every process."""
        parts = [
            ",".join(f"{d.digest:x}" for d in self.dims),
            *(",".join(f"{d.digest:x}" for d in weight) for weight in self.weights),
            "e" + ",".join(f"{d.digest:x}" for d in self.expansions),
            "r" + ",".join(str(d.size) for d in self.reductions),
        ]
        return int.from_bytes(blake2b("|".join(parts).encode(), digest_size=16).digest(), "big")

    def count(self, step: Step) -> int:
        """Return the number of steps of one kind."""
        return dict(self.steps).get(step, 0)

    @property
    def depth(self) -> int:
        """Number of steps so far."""
        return sum(count for _, count in self.steps)

    def is_latest(self, dim: Dim) -> bool:
        """Whether the dim lies above the latest contraction, or none has been made."""
        return not self.weights or len(self.weights) - 1 in dim.weights

    def step(
        self,
        kind: Step,
        taken: tuple[Dim, ...],
        put: tuple[Dim, ...],
        allowance: Allowance,
        *,
        weight: tuple[Dim, ...] = (),
        expanded: tuple[Dim, ...] = (),
    ) -> Interface:
        """Return the interface after one step.

        Args:
            kind: What the step is.
            taken: Dims that it takes off.
            put: Dims that it puts on.
            allowance: Symbols left after it.
            weight: Coordinates of the weight that it adds; none: no weight.
            expanded: Dims that it repeats over.
        """
        kept = [dim for dim in self.dims if dim not in taken]
        counts = dict(self.steps)
        counts[kind] = counts.get(kind, 0) + 1
        return Interface(
            dims=tuple(sorted((*kept, *put))),
            weights=(*self.weights, tuple(sorted(weight))) if weight else self.weights,
            expansions=tuple(sorted((*self.expansions, *expanded))),
            reductions=self.reductions,
            allowance=allowance,
            steps=tuple(sorted(counts.items())),
        )


def below_shares(dim: Dim) -> Dim:
    """Return the dim below all Shares on top of this one."""
    while isinstance(dim, Share):
        dim = dim.source
    return dim


def may_be_outer(dim: Dim, low_rank: tuple[int, int]) -> bool:
    """Whether a contraction may take a dim for its weight alone (rule C3).

    An iterator of the output or a part of a Merge: an outer product. A reduction that another weight already has: a
    low-rank pair, whose size must lie in ``low_rank``.
    """
    bottom = below_shares(dim)
    if isinstance(bottom, Reduction):
        return bottom is not dim and low_rank[0] <= dim.size.largest <= low_rank[1]
    return bottom.name == "iterator" or isinstance(bottom, (MergeMajor, MergeMinor))
