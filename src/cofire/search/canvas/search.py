"""Searching Canvas's kernels as Syno's operators are searched: by tree search and at random, from the same base.

- A step is one primitive applied: its kind is chosen first, then its arguments and inputs. The rules are asked for
  what is picked and for nothing else.
- The plan is the first step, the number of primitives being its kind, groups and whether a Bmm is due its arguments.
  All rules ask the plan: with it in the state, what may follow a state is settled and what is spent can be closed, and
  the tree learns which plans pay. The width is the greatest allowed, since narrower plans reach no other kernel.
- States are known again by their plan and the digest of their graph. RAVE's name of a step is the primitive with the
  colours of its inputs, whatever else the graph has.
- Results are solved kernels that pass all filters. How often each rule and filter has refused is counted by its name.

Canvas itself draws kernels at random and has no tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import islice, pairwise
from math import gcd, sqrt
from random import Random
from typing import Any, ClassVar

from cofire.errors import SearchError
from cofire.search.baselines import AbstractRandomSearch
from cofire.search.canvas.actions import (
    RULES_AFTER,
    RULES_BEFORE,
    WEIGHTED,
    Action,
    Limits,
    Plan,
    State,
    candidates,
    kinds,
    refusal,
)
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.sampler import MAX_GROUPS
from cofire.search.canvas.solver import Target
from cofire.search.canvas.variables import Extent
from cofire.search.mcts import AbstractTreeSearch, TreeTrace
from cofire.search.searcher import FINISH, AbstractSearcher, Trace, Walk

Filter = Callable[[Kernel], bool]
Reward = Callable[[Kernel], float]

_SOLVER = "solver"  # what refuses a graph that closes to no kernel
_MOST_ENDS = 16  # kernels that one graph is closed to
_MOST_WALKS = 8  # of one completion; each ends at its first dead end, since to go back costs more than to begin anew
_ATTEMPTS = 250  # completions that may fail in a row before a search gives up: 2000 walks, as the sampler's
_CACHED = 1 << 12  # states whose kernels are kept


def within(count: Callable[[Kernel, Extent], int], bounds: Mapping[Extent, tuple[float, float]]) -> Filter:
    """Return a filter: whether a count of a kernel is within bounds at each of some places.

    Args:
        count: What is counted, ``Kernel.multiply_adds`` (for one example) or ``Kernel.parameters``.
        bounds: Least and most for every place, both allowed.

    Raises:
        SearchError: Nothing is between two bounds.
    """
    for extent, (least, most) in bounds.items():
        if least > most:
            place = ", ".join(map(str, extent))
            raise SearchError(f"bounds {least} to {most} at C, H, W = {place} hold nothing; give the least first")
    return lambda kernel: all(least <= count(kernel, extent) <= most for extent, (least, most) in bounds.items())


@dataclass(frozen=True)
class KernelSpace:
    """Which kernels are searched.

    Attributes:
        extents: Channels, height and width of every place that a kernel must fill.
        limits: What kernels may be.
        filters: What a finished kernel must pass, by name, asked in this order.
    """

    extents: tuple[Extent, ...]
    limits: Limits = field(default_factory=Limits)
    filters: Mapping[str, Filter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check places and names.

        Raises:
            SearchError: There is no place, one has a number below 1, or a filter has a rule's name.
        """
        object.__setattr__(self, "extents", Target(tuple(Extent(*extent) for extent in self.extents)).extents)
        for name in self.filters:
            if name in (*RULES_BEFORE, *RULES_AFTER, "count", "shape", _SOLVER):
                raise SearchError(f"a filter has the name of rule {name!r} and would be counted with it; rename it")

    def plan_sizes(self) -> range:
        """Return the numbers of primitives that plans may have."""
        least, most = self.limits.primitives
        return range(next(n for n in range(least, most + 1) if self.limits.can_weigh(n)), most + 1)

    def plans(self, num_primitives: int) -> tuple[Plan, ...]:
        """Return the plans of so many primitives: every number of groups, with and without a Bmm that is due.

        Groups are powers of 2 that divide the channels of all places; where nothing is grouped there is 1.
        """
        limits = self.limits
        shared = gcd(*(extent.c for extent in self.extents), MAX_GROUPS) if "group" in limits.kinds else 1
        share = limits.bmm_share if "bmm" in limits.kinds else 0.0
        dues = [due for due in (False, True) if (share > 0 if due else share < 1)]
        return tuple(
            Plan(Target(self.extents, 1 << power), limits, num_primitives, limits.width[1], due)
            for power in range(shared.bit_length())
            for due in dues
        )


@dataclass(frozen=True, eq=False)
class Stage:
    """A state on the way to a kernel, worked out only when it is asked for.

    Attributes:
        before: The state before; none: there was none.
        choice: What was done there, or the plan; none: there is no plan yet.
    """

    before: State | None = None
    choice: Plan | Action | None = None

    @cached_property
    def state(self) -> State | None:
        """The unfinished kernel; none: there is no plan yet.

        Raises:
            SearchError: The action does not apply.
        """
        if isinstance(self.choice, Action):
            assert self.before is not None
            return self.before.apply(self.choice)
        return State.start(self.choice) if self.choice is not None else None

    @cached_property
    def digest(self) -> int:
        """96 bits that name plan and graph, whatever order the graph's nodes came in."""
        state = self.state
        if state is None:
            return 0
        return int(_name(*_plan_parts(state.plan), state.graph.digest), 16)


def _plan_parts(plan: Plan) -> tuple[object, ...]:
    return plan.num_primitives, plan.target.groups, plan.needs_bmm


def _name(*parts: object) -> str:
    return blake2b("|".join(map(str, parts)).encode(), digest_size=12).hexdigest()


class CanvasMoves:
    """The moves of a space of kernels.

    Attributes:
        space: The space.
        refused: How often each rule and each filter has refused what was picked; ``solver``: graphs without a kernel.
    """

    def __init__(self, space: KernelSpace) -> None:
        self.space = space
        self.refused: Counter[str] = Counter()
        self._dead: set[int] = set()
        self._ends: dict[int, tuple[Kernel, ...]] = {}

    @property
    def root(self) -> Stage:
        """The stage that has no plan yet."""
        return Stage()

    def kinds(self, state: Stage) -> list[str]:
        """Return numbers of primitives at the root, then names of primitives that may apply, ``FINISH`` at the end."""
        if state.state is None:
            return [f"{count} primitives" for count in self.space.plan_sizes()]
        if not state.state.left:
            return [FINISH] if self.ends(state) else []
        return list(kinds(state.state))

    def candidates(self, state: Stage, kind: str) -> tuple[Stage, ...]:
        """Return plans of a number of primitives, or applications of a primitive; rules are not asked."""
        now = state.state
        if now is None:
            return tuple(Stage(None, plan) for plan in self.space.plans(int(kind.split()[0])))
        return tuple(Stage(now, action) for action in candidates(now, kind))

    def keeps(self, state: Stage) -> bool:
        """Whether no rule refuses a stage, and no walk has found it dead."""
        if isinstance(state.choice, Action):
            assert state.before is not None
            reason = refusal(state.before, state.choice)
            if reason is not None:
                self.refused[reason] += 1
                return False
        return state.digest not in self._dead

    def ends(self, state: Stage) -> tuple[Kernel, ...]:
        """Return the kernels that a stage closes to and that pass the filters."""
        now = state.state
        if now is None or now.left:
            return ()
        if state.digest not in self._ends:
            if len(self._ends) >= _CACHED:
                self._ends.clear()
            closed = {kernel.digest: kernel for kernel in islice(now.kernels(), _MOST_ENDS)}
            self.refused[_SOLVER] += not closed
            self._ends[state.digest] = tuple(kernel for kernel in closed.values() if self._passes(kernel))
        return self._ends[state.digest]

    def _passes(self, kernel: Kernel) -> bool:
        for name, passes in self.space.filters.items():
            if not passes(kernel):
                self.refused[name] += 1
                return False
        return True

    def key(self, before: Stage, after: Stage) -> str:
        """Return a name of a step: the plan's, or the primitive with the colours of its inputs."""
        choice = after.choice
        if isinstance(choice, Plan):
            return _name("plan", *_plan_parts(choice))
        assert choice is not None
        assert before.state is not None
        colours = before.state.graph.colours
        return _name(choice.primitive, choice.substitution, *(colours[k] for k in choice.inputs))

    def complete(self, state: Stage, random: Random) -> Walk[Kernel] | None:
        """Walk at random until one walk ends, or give up after a few.

        As in Canvas's sampler, a coin says whether a primitive has a weight, and all kinds are equally likely.
        At the root a Bmm is due in the share of walks that the limits say.

        Args:
            state: Where to start.
            random: The source of all choices.
        """
        for _ in range(_MOST_WALKS):
            found = self._walk(state, random)
            if found is not None or not self.keeps(state):
                return found
        return None

    def _walk(self, start: Stage, random: Random) -> Walk[Kernel] | None:
        passed = [start]
        while (after := self._pick(passed[-1], random)) is not None:
            if isinstance(after, Kernel):
                keys = [self.key(before, then) for before, then in pairwise(passed)]
                return Walk(after, (*keys, f"{after.digest:x}"))
            passed.append(after)
        self._dead.add(passed[-1].digest)
        return None

    def _pick(self, stage: Stage, random: Random) -> Stage | Kernel | None:
        """Return a legal step of the class that a coin says, or of the other if that has none; none: a dead end."""
        now = stage.state
        if now is None:
            return self._draw(random)
        if not now.left:
            ends = self.ends(stage)
            return random.choice(ends) if ends else None
        there = kinds(now)
        classes = [[kind for kind in there if (kind in WEIGHTED) is side] for side in (True, False)]
        random.shuffle(classes)
        for names in classes:
            random.shuffle(names)
            for kind in names:
                found = list(self.candidates(stage, kind))
                random.shuffle(found)
                for after in found:
                    if self.keeps(after):
                        return after
        return None

    def _draw(self, random: Random) -> Stage | None:
        """Return a plan that is not known to be dead; of one size, those with the Bmm that chance says come first."""
        due = random.random() < self.space.limits.bmm_share
        sizes = list(self.space.plan_sizes())
        random.shuffle(sizes)
        for size in sizes:
            found = list(self.space.plans(size))
            random.shuffle(found)
            for plan in sorted(found, key=lambda plan: plan.needs_bmm is not due):
                stage = Stage(None, plan)
                if self.keeps(stage):
                    return stage
        return None


class KernelSearcher(AbstractSearcher[Stage, Kernel, Trace]):
    """A searcher of a space of kernels; how it searches, its subclasses say.

    Attributes:
        space: The search space.
    """

    def __init__(self, space: KernelSpace, reward: Reward, seed: int = 0) -> None:
        """Start a search.

        Args:
            space: The search space.
            reward: What a kernel is worth.
            seed: Where all random choices come from.
        """
        self.space = space
        super().__init__(reward, seed)

    @property
    def refused(self) -> Counter[str]:
        """How often each rule and each filter has refused what was picked."""
        return self._canvas.refused

    def _new_moves(self) -> CanvasMoves:
        self._canvas = CanvasMoves(self.space)
        return self._canvas

    def _settings(self) -> dict[str, Any]:
        return {"space": _name(self.space.extents, self.space.limits, *self.space.filters)}

    def propose(self) -> Kernel | None:
        """Return a kernel that was not proposed before, or none where the searcher finds no other.

        Raises:
            SearchError: No kernel was ever found; the message names the rule or filter that refused most.
        """
        found = super().propose()
        if found is None and not self._known:
            # Rules refuse thousands of steps in every search; a filter refuses kernels, which come after all rules.
            filtered = Counter({name: self.refused[name] for name in self.space.filters if self.refused[name]})
            what, refused = ("filter", filtered) if filtered else ("rule", self.refused)
            name, count = max(refused.items(), key=lambda item: (item[1], item[0]), default=("none", 0))
            raise SearchError(
                f"no kernel was found; {what} {name!r} refused most, {count} of {refused.total()}: "
                f"widen that filter or the limits"
            )
        return found


class KernelTreeSearch(AbstractTreeSearch[Stage, Kernel], KernelSearcher[TreeTrace[Stage, Kernel]]):
    """Monte Carlo tree search over kernels."""

    attempts: ClassVar[float] = _ATTEMPTS

    def __init__(self, space: KernelSpace, reward: Reward, seed: int = 0, *, exploration: float = sqrt(2.0)) -> None:
        """Start a search.

        Args:
            space: The search space.
            reward: What a kernel is worth; scaled by the best and the worst so far.
            seed: Where all random choices come from.
            exploration: c of UCB1-tuned.

        Raises:
            SearchError: Exploration below 0.
        """
        self.exploration = exploration
        super().__init__(space, reward, seed)


class KernelRandomSearch(AbstractRandomSearch[Stage, Kernel], KernelSearcher[None]):
    """Kernels at random, as Canvas's sampler draws them but for the width, which is the greatest allowed."""

    attempts: ClassVar[int] = _ATTEMPTS
