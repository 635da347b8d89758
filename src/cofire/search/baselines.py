"""What tree search is measured against: random walks, and a beam of the interfaces that led to the best operators.

Both are searchers as MCTS is: the same proposals, rewards and state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.interface import Interface
from cofire.search.sampling import Reward, Searcher
from cofire.search.searcher import FINISH, AbstractSearcher, Result, State
from cofire.search.space import Space


class AbstractRandomSearch(AbstractSearcher[State, Result, None]):
    """Random completions from the root, whatever the rewards.

    Attributes:
        attempts: How many completions may fail in a row before the search gives up.
    """

    attempts: ClassVar[int] = 1000

    def _sample(self) -> tuple[Result, None] | None:
        for _ in range(self.attempts):
            walk = self.moves.complete(self.moves.root, self.random)
            if walk is not None:
                return walk.operator, None
        return None

    def _learn(self, trace: None, reward: float | None) -> None:
        pass


class RandomSearch(AbstractRandomSearch[Interface, Operator], Searcher[None]):
    """Walks from a random choice of reductions, guided by the bound on what is left and by no reward."""


@dataclass
class _Place:
    """An interface in the beam, and its children that were not looked at yet."""

    state: Interface
    reward: float | None
    noise: float
    untried: list[Interface] = field(default_factory=list)


class BeamSearch(Searcher[_Place]):
    """Keeps the interfaces whose random completions were worth most, and looks at one more child of the best each time.

    A place is ranked by ``(1 - noise) * scaled reward + noise * u``, u being drawn once per place (Syno, beam). A place
    whose completions failed ranks as one of the worst reward.

    Attributes:
        width: Most interfaces kept (Syno: 500,000).
        noise: Weight of chance in the ranking, from 0 to 1.
    """

    patience: ClassVar[int] = 5000

    def __init__(
        self, space: Space, depth: int, reward: Reward, seed: int = 0, *, width: int = 256, noise: float = 0.6
    ) -> None:
        """Start a search.

        Args:
            space: The search space.
            depth: Most steps of an operator.
            reward: What an operator is worth.
            seed: Where all random choices come from.
            width: Most interfaces kept.
            noise: Weight of chance in the ranking.

        Raises:
            SearchError: A width below 1, noise outside [0, 1], or a space that cannot end within ``depth`` steps.
        """
        if width < 1:
            raise SearchError(f"width = {width} keeps no interface; give at least 1")
        if not 0 <= noise <= 1:
            raise SearchError(f"noise = {noise} is no weight; give a number from 0 to 1")
        self.width, self.noise = width, noise
        super().__init__(space, depth, reward, seed)

    def _begin(self) -> None:
        super()._begin()
        self._beam: list[_Place] = []
        self._seen: set[int] = set()

    def _sample(self) -> tuple[Operator, _Place] | None:
        while True:
            state = self._next()
            if state is None:
                return None
            if state.digest in self._seen or not self.moves.keeps(state):
                continue
            self._seen.add(state.digest)
            place = _Place(state, None, self.random.random())
            walk = self.moves.complete(state, self.random)
            if walk is not None:
                return walk.operator, place
            if self.moves.keeps(state):
                self._learn(place, None)

    def _next(self) -> Interface | None:
        """Return the root first, then an untried child of the best place; none: the beam is empty."""
        if not self._seen:
            return self.moves.root
        while self._beam:
            best = max(self._beam, key=self._rank)
            if best.untried:
                return best.untried.pop()
            self._beam.remove(best)
        return None

    def _rank(self, place: _Place) -> float:
        worth = 0.0 if place.reward is None else self.scaled(place.reward)
        return (1 - self.noise) * worth + self.noise * place.noise

    def _learn(self, trace: _Place, reward: float | None) -> None:
        trace.reward = reward
        kinds = [kind for kind in self.moves.kinds(trace.state) if kind != FINISH]
        trace.untried = [child for kind in kinds for child in self.moves.candidates(trace.state, kind)]
        self.random.shuffle(trace.untried)
        self._beam.append(trace)
        if len(self._beam) > self.width:
            self._beam.remove(min(self._beam, key=self._rank))
