"""What every searcher shares, whatever it searches: proposals, rewards, and a state to go on from.

A searcher is a state machine: it proposes results and learns their rewards, oldest first. All it does follows from its
seed and these rewards, so its state is the list of events, and restoring replays them without asking for a reward.

What is searched is known by its moves alone (``Moves``): operators of a space (Syno) or kernels (Canvas). How it is
searched is an abstract class as well, ``AbstractTreeSearch`` for one; a searcher joins one of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from random import Random
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from cofire.errors import SearchError

FINISH = "finish"
Event = float | str | None  # a reward, "failed", or none for a proposal

_VERSION = 1


class Named(Protocol):
    """What is known again by its digest."""

    @cached_property
    def digest(self) -> int:
        """Its name, equal in every process."""
        ...


State = TypeVar("State", bound=Named)
Result = TypeVar("Result", bound=Named)
Trace = TypeVar("Trace")
Result_co = TypeVar("Result_co", bound=Named, covariant=True)


@dataclass(frozen=True)
class Walk(Generic[Result_co]):
    """A completed walk.

    Attributes:
        operator: Where it ended, an operator or a kernel.
        keys: Names of its steps, in order; the last is the end itself.
    """

    operator: Result_co
    keys: tuple[str, ...]


class Moves(Protocol[State, Result_co]):
    """How a result comes about, step by step; a step is a choice of a kind and then of one of its candidates."""

    @property
    def root(self) -> State:
        """Where all begins."""
        ...

    def kinds(self, state: State) -> list[str]:
        """Return the kinds of step that may exist; ``FINISH`` where the state is a result."""
        ...

    def candidates(self, state: State, kind: str) -> Sequence[State]:
        """Return what may come after one step of a kind, whether or not it is legal."""
        ...

    def keeps(self, state: State) -> bool:
        """Whether a candidate is legal and may still end; asked of what a searcher picks, and of nothing else."""
        ...

    def ends(self, state: State) -> Sequence[Result_co]:
        """Return the results that a state is."""
        ...

    def key(self, before: State, after: State) -> str:
        """Return a name of a step, equal wherever the same is done to the same."""
        ...

    def complete(self, state: State, random: Random) -> Walk[Result_co] | None:
        """Go on from a state at random; none: that failed."""
        ...


@dataclass(frozen=True)
class Found(Generic[Result_co]):
    """One evaluated result.

    Attributes:
        operator: The result, an operator or a kernel.
        reward: Its reward.
        evaluation: Which evaluation of the search it was, from 0.
    """

    operator: Result_co
    reward: float
    evaluation: int


class AbstractSearcher(ABC, Generic[State, Result, Trace]):
    """Proposes results and learns from their rewards; none is evaluated twice.

    Attributes:
        reward: What a result is worth; higher is better, and a number that is not finite is a failure.
        seed: Where all random choices come from.
        moves: The moves of what is searched.
        patience: How many known results in a row are met before the space counts as spent.
    """

    patience: ClassVar[int] = 1000

    def __init__(self, reward: Callable[[Result], float], seed: int = 0) -> None:
        """Start a search.

        Args:
            reward: What a result is worth.
            seed: Where all random choices come from.

        Raises:
            SearchError: Nothing can be found.
        """
        self.reward, self.seed = reward, seed
        self._begin()

    def _begin(self) -> None:
        self.moves = self._new_moves()
        self.random = Random(self.seed)
        self._events: list[Event] = []
        self._known: dict[int, float | None] = {}  # rewards by digest; none: in flight or failed
        self._flying: deque[tuple[Result, Trace]] = deque()
        self._learnt = 0
        self.lowest, self.highest = inf, -inf

    @abstractmethod
    def _new_moves(self) -> Moves[State, Result]:
        """Return moves that have learnt nothing yet."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return what must be equal in a state and in the search that it is restored to, ready for JSON."""

    @abstractmethod
    def _sample(self) -> tuple[Result, Trace] | None:
        """Return one result, perhaps a known one, and what learning its reward needs; none: the space is spent."""

    @abstractmethod
    def _learn(self, trace: Trace, reward: float | None) -> None:
        """Take in the reward of a sample; none: it failed, or is in flight already."""

    @property
    def in_flight(self) -> tuple[Result, ...]:
        """Results proposed and not yet learnt, oldest first."""
        return tuple(operator for operator, _ in self._flying)

    def propose(self) -> Result | None:
        """Return a result that was not proposed before, or none where the searcher finds no other.

        Known ones met on the way are learnt again, which costs no evaluation.
        """
        self._events.append(None)
        idle = 0
        while idle < self.patience:
            sample = self._sample()
            if sample is None:
                break
            operator, trace = sample
            if operator.digest not in self._known:
                self._known[operator.digest] = None
                self._flying.append((operator, trace))
                return operator
            self._learn(trace, self._known[operator.digest])
            idle += 1
        return None

    def learn(self, reward: float) -> Found[Result] | None:
        """Take in the reward of the oldest proposal in flight; return none where it failed.

        Args:
            reward: Its reward; a number that is not finite is a failure.

        Raises:
            SearchError: No proposal is in flight.
        """
        if not self._flying:
            raise SearchError(f"reward {reward} belongs to no proposal; call propose() first")
        operator, trace = self._flying.popleft()
        evaluation, self._learnt = self._learnt, self._learnt + 1
        if not isfinite(reward):
            self._events.append("failed")
            self._learn(trace, None)
            return None
        reward = float(reward)
        self._events.append(reward)
        self.lowest, self.highest = min(self.lowest, reward), max(self.highest, reward)
        self._known[operator.digest] = reward
        self._learn(trace, reward)
        return Found(operator, reward, evaluation)

    def step(self) -> Found[Result] | None:
        """Evaluate one new result; none: it failed, or the searcher finds no other."""
        if not self._flying and self.propose() is None:
            return None
        return self.learn(self.reward(self._flying[0][0]))

    def run(
        self, budget: int, executor: Executor | None = None, in_flight: int = 1
    ) -> Generator[Found[Result], None, None]:
        """Yield evaluated results that did not fail, until ``budget`` evaluations were made or there is no other.

        Args:
            budget: Evaluations; failed ones count.
            executor: Where rewards are computed; none: here, one after another.
            in_flight: Results evaluated at the same time.

        Raises:
            SearchError: ``in_flight`` is below 1, or above 1 without an executor.
        """
        for _, found in self.evaluate(budget, executor, in_flight):
            if found is not None:
                yield found

    def evaluate(
        self, budget: int, executor: Executor | None = None, in_flight: int = 1
    ) -> Generator[tuple[Result, Found[Result] | None], None, None]:
        """Yield each result and what was found, none where it failed, as :meth:`run` does.

        Results are learnt in the order of proposals, so that the outcome depends on ``in_flight`` but not on timing.

        Args:
            budget: Evaluations; failed ones count.
            executor: Where rewards are computed; none: here, one after another.
            in_flight: Results evaluated at the same time.

        Raises:
            SearchError: ``in_flight`` is below 1, or above 1 without an executor.
        """
        if in_flight < 1 or (in_flight > 1 and executor is None):
            raise SearchError(f"in_flight = {in_flight} needs an executor and at least 1; pass both")
        last = self._learnt + budget
        futures: deque[Future[float]] = deque()
        if executor is not None:
            futures.extend(executor.submit(self.reward, operator) for operator in self.in_flight)
        while self._learnt < last:
            while len(self._flying) < min(in_flight, last - self._learnt):
                operator = self.propose()
                if operator is None:
                    break
                if executor is not None:
                    futures.append(executor.submit(self.reward, operator))
            if not self._flying:
                return
            oldest = self._flying[0][0]
            yield oldest, self.learn(futures.popleft().result() if executor is not None else self.reward(oldest))

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` needs, ready for JSON."""
        return {
            "version": _VERSION,
            "searcher": type(self).__name__,
            **self._settings(),
            "seed": self.seed,
            "events": list(self._events),
            "last": f"{list(self._known)[-1]:x}" if self._known else "",
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved state by replaying its events; no reward is computed, and proposals in flight are so again.

        Args:
            state: What ``state`` returned in a searcher of the same kind, space and options.

        Raises:
            SearchError: The state is another kind of searcher's, or its replay does not lead to the same result.
        """
        expected = {"version": _VERSION, "searcher": type(self).__name__, **self._settings()}
        for name, mine in expected.items():
            if state.get(name) != mine:
                raise SearchError(
                    f"the state has {name} = {state.get(name)!r}, this search {mine!r}; use one that fits"
                )
        self.seed = state["seed"]
        self._begin()
        for event in state["events"]:
            if event is None:
                self.propose()
            else:
                self.learn(float("nan") if event == "failed" else event)
        if self.state()["last"] != state["last"]:
            raise SearchError("the state replays to other results than it holds; give the space that it was saved with")

    def scaled(self, reward: float) -> float:
        """Return a reward between 0, the worst so far, and 1, the best."""
        return (reward - self.lowest) / (self.highest - self.lowest) if self.highest > self.lowest else 0.5
