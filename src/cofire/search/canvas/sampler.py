"""Kernels by rejection: a plan is drawn, primitives are applied at random, and what does not close is thrown away.

At each step a coin says whether the primitive has a weight, then its kind is drawn and then one of its applications. In
Canvas all applications are equally likely; here kinds are, because a convolution has 27 choices of arguments and a
softmax a handful (Canvas, sampler). All that is drawn follows from the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import gcd
from random import Random

from cofire.errors import SearchError
from cofire.search.canvas.actions import WEIGHTED, Action, Limits, Plan, State, candidates, kinds, refusal
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.solver import REDUCTIONS, Target
from cofire.search.canvas.variables import Extent

MAX_GROUPS = 1 << 10
_MOST_TRIES = 2000


class Sampler:
    """Draws kernels that fill all of some places.

    Attributes:
        extents: Channels, height and width of every place.
        limits: What kernels may be.
        random: Source of all that is drawn.
        tries: Plans that were drawn.
        refused: How often each rule has refused an application or a finished graph.
    """

    def __init__(self, extents: Iterable[tuple[int, int, int]], limits: Limits | None = None, seed: int = 0) -> None:
        """Begin.

        Args:
            extents: Channels, height and width of every place.
            limits: What kernels may be; none: Canvas's.
            seed: Of everything that is drawn.

        Raises:
            SearchError: There is no place, or one has a number below 1.
        """
        self.extents = Target(tuple(Extent(*extent) for extent in extents)).extents
        self.limits = limits or Limits()
        self.random = Random(seed)
        self.tries = 0
        self.refused: Counter[str] = Counter()

    def sample(self, max_tries: int = _MOST_TRIES) -> Kernel:
        """Return the next kernel.

        Args:
            max_tries: Plans drawn before it gives up.

        Raises:
            SearchError: No plan led to a kernel; the message names the rule that refused most.
        """
        before = Counter(self.refused)
        for _ in range(max_tries):
            self.tries += 1
            kernel = self._attempt(self.draw())
            if kernel is not None:
                return kernel
        here = self.refused - before
        rule, count = max(here.items(), key=lambda item: (item[1], item[0]), default=("none", 0))
        raise SearchError(
            f"no kernel in {max_tries} tries; rule {rule!r} refused most, {count} of {here.total()}: "
            f"widen the limits or allow more tries"
        )

    def draw(self) -> Plan:
        """Return a plan within the limits; its groups are a power of 2 that divides the channels of all places."""
        limits = self.limits
        shared = gcd(*(extent.c for extent in self.extents), MAX_GROUPS)
        groups = self.random.choice([1 << i for i in range(shared.bit_length())])
        least = next(n for n in range(limits.primitives[0], limits.primitives[1] + 1) if limits.can_weigh(n))
        return Plan(
            target=Target(self.extents, groups),
            limits=limits,
            num_primitives=self.random.randint(least, limits.primitives[1]),
            max_width=self.random.randint(*limits.width),
            needs_bmm=self.random.random() < limits.bmm_share and "bmm" in limits.kinds,
        )

    def _attempt(self, plan: Plan) -> Kernel | None:
        state = State.start(plan)
        while state.left:
            action = self._pick(state)
            if action is None:
                return None
            state = state.apply(action)
        reductions = tuple(self.random.sample(REDUCTIONS, len(REDUCTIONS)))
        kernel = next(state.kernels(reductions), None)
        if kernel is None:
            self.refused["solver"] += 1
        return kernel

    def _pick(self, state: State) -> Action | None:
        """Return a legal action: of the class that a coin says, or of the other if that has none."""
        there = kinds(state)
        classes = [[kind for kind in there if (kind in WEIGHTED) is side] for side in (True, False)]
        self.random.shuffle(classes)
        for names in classes:
            self.random.shuffle(names)
            for kind in names:
                found = list(candidates(state, kind))
                self.random.shuffle(found)
                for action in found:
                    reason = refusal(state, action)
                    if reason is None:
                        return action
                    self.refused[reason] += 1
        return None
