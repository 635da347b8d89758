"""Search by sampling: moves of a space tried one at a time, and random completions.

A walk takes two choices a step, the kind of primitive and then its arguments (Syno, search algorithm). Validity is
lazy: a child is picked first and the bound on what is left is asked for it alone, so that a walk asks about as often as
it has steps and not for every child it might have had. An interface found to have no child that can end is remembered
as dead, and steps that seldom led to an operator are taken seldom.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from math import ceil
from random import Random
from typing import Any

from cofire.errors import SearchError
from cofire.search import searcher
from cofire.search.distance import INFINITE
from cofire.search.enumeration import Synthesis
from cofire.search.graph import Operator
from cofire.search.interface import Interface, Step, may_be_outer
from cofire.search.primitives import Dim, MergeMajor, Reduction, Share, Shift, Split
from cofire.search.searcher import FINISH, AbstractSearcher, Trace, Walk
from cofire.search.space import Guidance, Space

KINDS: tuple[Step, ...] = ("contract", "expand", "merge", "shift", "split", "stride", "unfold")
Reward = Callable[[Operator], float]
Found = searcher.Found[Operator]

_CACHED = 1 << 15  # interfaces whose moves are kept; a random walk passes the lower ones again and again
_RECENT = 100  # completions that the success rate is taken over (Syno)
_EARLY = 0.5  # how often a walk tries a reduction first while it may, and then a contraction until it has a weight
_DIRECT = 0.7  # how often a step is sought that lowers the distance
_DETOUR = 0.25  # how often one is taken all the same that leaves it a step longer than it could be
_LEAST = 0.05  # of the promise of a step
_DEFERRED = 6  # children that do not, before the nearest of them is taken after all
_MOST_TRIALS = 6  # of one start: below a tree most starts lead nowhere
_BACKTRACKS = 4  # of one completion; a new start is worth more than going further back


_Put = tuple[int, ...]


def _put(before: Interface, after: Interface) -> _Put:
    """Return what tells a step from others on whatever interface: the dims that it puts on."""
    return tuple(dim.digest for dim in after.dims if dim not in before.dims)


def step_key(before: Interface, after: Interface) -> str:
    """Return a name of the step between two interfaces, equal wherever the same primitive is applied to the same dims.

    Args:
        before: The interface it was applied to.
        after: What it led to.
    """
    weight = after.weights[-1] if len(after.weights) > len(before.weights) else ()
    expanded = [dim.digest for dim in after.expansions if dim not in before.expansions]
    parts = (_put(before, after), [dim.digest for dim in weight], expanded)
    text = "|".join(",".join(f"{d:x}" for d in part) for part in parts)
    return blake2b(text.encode(), digest_size=12).hexdigest()


class Moves(Synthesis):
    """The moves of a space, by kind and unchecked, so that a sampler can test what it picks and nothing else."""

    def __init__(self, space: Space, depth: int, guidance: Guidance = "exact") -> None:
        super().__init__(space, depth, guidance)
        self._children: dict[tuple[int, Step], tuple[Interface, ...]] = {}
        self._ends: dict[int, tuple[Operator, ...]] = {}
        self._ahead: dict[int, int] = {}
        self._dead: set[int] = set()
        self._tally: dict[_Put, list[int]] = {}
        self._walks = [0, 0]
        self._recent: deque[bool] = deque(maxlen=_RECENT)

    @property
    def root(self) -> Interface:
        """The output's iterators; reductions come as the first steps, in the order of their sizes."""
        return Interface(tuple(sorted(self.space.free_iterators)), (), (), (), self.space.allowance)

    def may_begin(self) -> bool:
        """Whether some choice of reductions can end, fewest first."""
        states = [self.root]
        while states:
            if any(self.may_end(state) for state in states):
                return True
            states = [after for state in states for after in self._reduces(state)]
        return False

    def _is_open(self, state: Interface) -> bool:
        """Whether an interface may take another reduction: nothing else was done, and there is room for it."""
        reductions = len(state.reductions)
        return reductions == state.depth < self.depth and reductions < self.space.max_reductions

    def _reduces(self, state: Interface) -> Generator[Interface, None, None]:
        if not self._is_open(state):
            return
        least = self._domains.index(state.reductions[-1].size) if state.reductions else 0
        for size in self._domains[least:]:
            made = Reduction(size, len(state.reductions))
            allowance, reductions = state.allowance.charge(size), (*state.reductions, made)
            if allowance is not None and self._fits_reductions(dim.size for dim in reductions):
                yield replace(state.step("reduce", (), (made,), allowance), reductions=reductions)

    def kinds(self, state: Interface) -> list[str]:
        """Return the kinds of move that may exist; ``reduce`` last and ``finish`` first."""
        kinds = [FINISH] if self.ends(state) else []
        if not self._is_open(state):
            return [*kinds, *KINDS] if state.depth < self.depth else kinds
        return [*kinds, *KINDS, "reduce"] if self.may_end(state) else [*kinds, "reduce"]

    def candidates(self, state: Interface, kind: Step) -> tuple[Interface, ...]:
        """Return what the rules admit after one step of a kind, whether or not it can still end."""
        key = (state.digest, kind)
        if key not in self._children:
            if len(self._children) >= _CACHED:
                self._children.clear()
            self._children[key] = tuple(self._generate(state, kind))
        return self._children[key]

    def _generate(self, state: Interface, kind: Step) -> Generator[Interface, None, None]:
        if kind == "reduce":
            return self._reduces(state)
        makers = {
            "contract": self._contractions,
            "expand": self._expands,
            "merge": self._merges,
            "shift": self._shifts,
            "split": self._splits,
            "stride": self._strides,
            "unfold": self._unfolds,
        }
        dims = [dim for dim in state.dims if dim.chain < self.space.max_chain]
        if kind in ("expand", "merge", "shift", "stride"):
            dims = [dim for dim in dims if state.is_latest(dim)]
        return makers[kind](state, dims)

    def ends(self, state: Interface) -> tuple[Operator, ...]:
        """Return the operators that an interface is."""
        if state.digest not in self._ends:
            if len(self._ends) >= _CACHED:
                self._ends.clear()
            self._ends[state.digest] = tuple(self.finish(state))
        return self._ends[state.digest]

    def keeps(self, state: Interface) -> bool:
        """Whether an interface may still end: by the guidance, and as far as walks have learnt."""
        return state.digest not in self._dead and self.ahead(state) < INFINITE

    def ahead(self, state: Interface) -> int:
        """Return how many steps an interface still needs as far as the guidance sees, INFINITE where it cannot end.

        Where a reduction must come first it is one more than after the first that can.
        """
        digest = state.digest
        if digest not in self._ahead:
            if len(self._ahead) >= _CACHED:
                self._ahead.clear()
            steps = INFINITE
            if self._may_weigh(state) and self.may_end(state):
                steps = self.distance(state) if self.guidance != "none" else 0
            elif self._is_open(state) and not self.is_hopeless(state):
                reduced = (1 + self.ahead(after) for after in self.candidates(state, "reduce"))
                steps = min(INFINITE, next((steps for steps in reduced if steps < INFINITE), INFINITE))
            self._ahead[digest] = steps
        return self._ahead[digest]

    def _may_weigh(self, state: Interface) -> bool:
        """Whether the weight that an operator needs can still come; unguided, nothing is looked at.

        Both its outer dim, an iterator or part of a Merge, and its inner one are there already and the allowance covers
        both, or a Merge comes first: other views only make dims that cost more. That a Split is shifted, which alone
        lets a Merge come above it, needs a minor side that rule V11 calls small.
        """
        left = self.depth - state.depth
        if self.guidance == "none" or state.weights or not self.space.needs_weight:
            return True
        if left < 1 or self.space.max_tensors < 2:
            return False
        if not self.space.needs_matmul:
            return True
        dims = [dim for dim in state.dims if dim.chain < self.space.max_chain and not dim.discards]
        allowance = state.allowance
        for outer in dims:
            after = allowance.charge(outer.size.primary_part) if may_be_outer(outer, self.space.low_rank) else None
            if after and any(d is not outer and after.charge(d.size.primary_part) for d in dims):
                return True
        if left < 2 or not self._left(self.space.max_merges, state, "merge"):
            return False
        if left > 3 and any(dim.size.largest <= self.space.max_reshape_over_shift for dim in dims):
            return True
        cut = [dim for dim in dims if self._may_be_cut(dim, state, left)]
        return any(
            allowance.charge_merge(dim.size, block) is not None for dim in cut for block in self._divisors_of(dim.size)
        )

    def _may_be_cut(self, dim: Dim, state: Interface, left: int) -> bool:
        """Whether a Merge may come above a dim, directly or in two steps above what rules R1, R4, V2 and V8 let."""
        if isinstance(dim, (Reduction, Share)):
            return False
        if left == 2:
            return not isinstance(dim, (Split, MergeMajor))
        return not isinstance(dim, Split) or self._admits(Shift(dim, 1), state)

    def bury(self, state: Interface) -> None:
        """Remember that an interface has no child that can end."""
        self._dead.add(state.digest)

    def walk(self, state: Interface, random: Random, backtracks: int = 0) -> Walk[Operator] | None:
        """Complete an interface at random, or return none where that fails.

        Guided, a walk mostly seeks a step that lowers the distance, and takes reductions and the first weight early;
        nothing that can end is out of its reach.

        Args:
            state: Where to start.
            random: The source of all choices.
            backtracks: How many dead ends are left by the step that led there; the next one ends the walk.
        """
        passed, tried = [state], list[_Put]()
        while passed:
            after = self._pick(passed[-1], random)
            if isinstance(after, Operator):
                self.remember(tried, {_put(before, then) for before, then in pairwise(passed)})
                keys = [step_key(before, then) for before, then in pairwise(passed)]
                return Walk(after, (*keys, f"{after.digest:x}"))
            if after is not None:
                tried.append(_put(passed[-1], after))
                passed.append(after)
                continue
            if backtracks <= 0:
                break
            backtracks -= 1
            passed.pop()
        self.remember(tried, set())
        return None

    def remember(self, tried: list[_Put], ended: set[_Put]) -> None:
        """Count a walk's steps, and those that were on the way to an end; steps are tried by what came of them.

        Args:
            tried: What each step put on the interface.
            ended: What those did that led to an operator.
        """
        if len(self._tally) >= _CACHED:
            self._tally.clear()
        for put in tried:
            count = self._tally.setdefault(put, [0, 0])
            count[0] += 1
            count[1] += put in ended
        self._walks[0] += 1
        self._walks[1] += bool(ended)

    def _promise(self, before: Interface, after: Interface) -> float:
        """Return how much more often than all walks those end that take a step, at most 1 and never nothing."""
        walks, ended = self._walks
        tried, reached = self._tally.get(_put(before, after), (0, 0))
        return max(_LEAST, min(1.0, (reached + 1) * (walks + 1) / (tried * (ended + 1) + walks + 1)))

    def _pick(self, state: Interface, random: Random) -> Interface | Operator | None:
        kinds = self.kinds(state)
        random.shuffle(kinds)
        early = "reduce" if "reduce" in kinds else "contract"
        if early in kinds and not state.weights and random.random() < _EARLY:
            kinds.remove(early)
            kinds.insert(0, early)
        aims = self.guidance != "none" and random.random() < _DIRECT
        next_to = min(self.ahead(state), self.depth - state.depth) - 1
        deferred: list[tuple[int, int, Interface]] = []
        for kind in kinds:
            if kind == FINISH:
                return random.choice(self.ends(state))
            children = list(self.candidates(state, kind))
            while children:
                k = random.randrange(len(children))
                children[k], children[-1] = children[-1], children[k]
                child = children.pop()
                if not self.keeps(child):
                    continue
                excess = max(0, self.ahead(child) - next_to) if aims else 0
                if random.random() < _DETOUR**excess * self._promise(state, child):
                    return child
                deferred.append((excess, len(deferred), child))
                if len(deferred) == _DEFERRED:
                    return min(deferred)[-1]
        if not deferred:
            self.bury(state)
        return min(deferred)[-1] if deferred else None

    def complete(self, state: Interface, random: Random) -> Walk[Operator] | None:
        """Walk until one walk ends, as often as recent success makes it likely (Syno, adaptive rollouts), or give up.

        Args:
            state: Where to start.
            random: The source of all choices.
        """
        successes = sum(self._recent)
        trials = min(_MOST_TRIALS, ceil((len(self._recent) + 1) / (successes + 1)) + 1)
        for _ in range(trials):
            found = self.walk(state, random, _BACKTRACKS)
            self._recent.append(found is not None)
            if found is not None:
                return found
            if not self.keeps(state):
                return None
        return None

    def key(self, before: Interface, after: Interface) -> str:
        """Return the name of a step, ``step_key``."""
        return step_key(before, after)


class Searcher(AbstractSearcher[Interface, Operator, Trace]):
    """A searcher of a space of operators; how it searches, its subclasses say.

    Attributes:
        space: The search space.
        depth: Most steps of an operator.
    """

    def __init__(self, space: Space, depth: int, reward: Reward, seed: int = 0) -> None:
        """Start a search.

        Args:
            space: The search space.
            depth: Most steps of an operator.
            reward: What an operator is worth.
            seed: Where all random choices come from.

        Raises:
            SearchError: No interface of the space can end within ``depth`` steps.
        """
        self.space, self.depth = space, depth
        super().__init__(reward, seed)

    def _new_moves(self) -> Moves:
        moves = Moves(self.space, self.depth)
        if not moves.may_begin():
            raise SearchError(f"no choice of reductions can reach the input in {self.depth} steps; raise depth")
        return moves

    def _settings(self) -> dict[str, Any]:
        return {"depth": self.depth}
