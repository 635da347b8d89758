"""Monte Carlo tree search over primitive graphs (Syno, search algorithm), or over whatever else has moves.

- A node is an interface or another state, found again by its digest whatever order its primitives came in. It holds
  two-step choices: an edge for each kind of primitive, and under it an edge for each set of arguments.
- Edges are chosen by UCB1-tuned over rewards scaled to [0, 1]:
  mean + c * sqrt(ln N / n * min(1/4, variance + sqrt(2 ln N / n))) - 0.3 * virtual loss; untried ones come first.
- Progressive widening: floor(N ^ 0.8) children of a kind are revealed. Which comes next is RAVE's word: what this step
  was worth wherever it was made below this node, (1 - b) * local + b * global with b = 3 / (3 + n), each
  mean + deviation - 1 / n, mixed 70 to 30 with noise. Only a child that is revealed is tested for validity.
- A new leaf is completed at random. A failed one counts as a visit worth the mean of its parent's rewards.
- What has nothing new below it is closed, so that a small space is exhausted and no operator comes from the tree twice.

Unlike Syno, the local RAVE is not spread over all orders of the same primitives: the digest already joins these orders.
The constant c is sqrt(2) by default and not 4 * sqrt(2), which searches all but uniformly for the first thousands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor, inf, log, sqrt
from typing import ClassVar, Generic, TypeVar

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.interface import Interface
from cofire.search.sampling import Reward, Searcher
from cofire.search.searcher import FINISH, AbstractSearcher, Result, State
from cofire.search.space import Space

_WIDENING = 0.8
_RAVE_BIAS = 3.0
_RAVE_SHARE = 0.7
_VIRTUAL_LOSS = 0.3
_SHORTLIST = 64  # hidden children that RAVE chooses among; a kind can have hundreds
_SETTLED = 30  # an edge with more rewards than this, all equal, is left until the others are too (Syno)


@dataclass
class Statistics:
    """Count, mean and spread of rewards, by Welford's update.

    Attributes:
        count: Rewards.
        mean: Their mean.
        squares: Sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, reward: float) -> None:
        """Take in one reward."""
        self.count += 1
        before = reward - self.mean
        self.mean += before / self.count
        self.squares += before * (reward - self.mean)

    @property
    def variance(self) -> float:
        """Mean squared deviation; 0 of less than two rewards."""
        return self.squares / self.count if self.count else 0.0


@dataclass
class _Edge:
    """A choice: its rewards, completions that failed, and leaves in flight below it."""

    stats: Statistics = field(default_factory=Statistics)
    failures: int = 0
    flying: int = 0

    @property
    def visits(self) -> int:
        return self.stats.count + self.failures


@dataclass
class _Child(_Edge, Generic[State, Result]):
    """A choice of arguments and where it leads: a node, or a result."""

    key: str = ""
    node: _Node[State, Result] | None = None
    operator: Result | None = None


@dataclass
class _Kind(_Edge, Generic[State, Result]):
    """A choice of a kind: children revealed, and the rest with keys, as generated; none: not generated.

    What is hidden is a state that was not tested, or a child that is a result.
    """

    name: str = ""
    revealed: list[_Child[State, Result]] = field(default_factory=list)
    hidden: list[tuple[str, State | _Child[State, Result]]] | None = None


AnyEdge = TypeVar("AnyEdge", bound=_Edge)


class _Node(Generic[State, Result]):
    """A state in the tree."""

    __slots__ = ("closed", "kinds", "rave", "state", "stats")

    def __init__(self, state: State, kinds: list[str]) -> None:
        self.state = state
        self.kinds: dict[str, _Kind[State, Result]] = {kind: _Kind(name=kind) for kind in kinds}
        self.stats = Statistics()
        self.rave: dict[str, Statistics] = {}
        self.closed = False


@dataclass
class TreeTrace(Generic[State, Result]):
    """The way to a sample: edges passed with their nodes, and the names of all steps, those of the completion too."""

    nodes: list[_Node[State, Result]]
    edges: list[_Edge]
    keys: list[str]


class AbstractTreeSearch(AbstractSearcher[State, Result, TreeTrace[State, Result]]):
    """Monte Carlo tree search; see the module.

    Attributes:
        exploration: c of UCB1-tuned.
        attempts: How many completions may fail in a row before the search gives up.
    """

    patience: ClassVar[int] = 20_000
    attempts: ClassVar[float] = inf
    exploration: float = sqrt(2.0)

    def _begin(self) -> None:
        if self.exploration < 0:
            raise SearchError(f"exploration = {self.exploration} would seek the worst known; give 0 or more")
        super()._begin()
        self._nodes: dict[int, _Node[State, Result]] = {}
        self._rave: dict[str, Statistics] = {}
        root = self.moves.root
        self._top: _Node[State, Result] = _Node(root, self.moves.kinds(root))

    def _sample(self) -> tuple[Result, TreeTrace[State, Result]] | None:
        failed = 0
        while not self._top.closed and failed < self.attempts:
            trace = TreeTrace[State, Result]([], [], [])
            leaf = self._descend(trace)
            if leaf is None:
                continue
            if leaf.operator is not None:
                self._fly(trace, 1)
                return leaf.operator, trace
            assert leaf.node is not None
            walk = self.moves.complete(leaf.node.state, self.random)
            if walk is not None:
                trace.keys += walk.keys
                self._fly(trace, 1)
                return walk.operator, trace
            failed += 1
            for edge in trace.edges:
                edge.failures += 1
        return None

    def _descend(self, trace: TreeTrace[State, Result]) -> _Child[State, Result] | None:
        """Follow the tree to a new node or a result; none: a node on the way closed, and it is to be tried again."""
        node = self._top
        while True:
            kind = self._choose_kind(node)
            child = self._choose_child(node, kind) if kind is not None else None
            if kind is None:
                node.closed = True
                return None
            if child is None:
                self._drop_kind(node, kind)
                continue
            trace.nodes.append(node)
            trace.edges += (kind, child)
            trace.keys.append(child.key)
            if child.operator is not None:
                kind.revealed.remove(child)
                return child
            assert child.node is not None
            if child.visits == 0 and child.flying == 0:
                return child
            node = child.node

    def _drop_kind(self, node: _Node[State, Result], gone: _Kind[State, Result]) -> None:
        node.kinds = {name: kind for name, kind in node.kinds.items() if kind is not gone}
        if not node.kinds:
            node.closed = True

    def _choose_kind(self, node: _Node[State, Result]) -> _Kind[State, Result] | None:
        """Return an untried kind, else the best by UCB; none: the node is closed."""
        kinds = list(node.kinds.values())
        return self._best(node.stats, kinds) if kinds else None

    def _choose_child(self, node: _Node[State, Result], kind: _Kind[State, Result]) -> _Child[State, Result] | None:
        """Return the child of a kind to follow, after widening; none: the kind has none left."""
        kind.revealed = [child for child in kind.revealed if child.node is None or not child.node.closed]
        hidden = self._hidden(node, kind)
        wanted = max(1, floor((kind.visits + kind.flying) ** _WIDENING))
        while hidden and len(kind.revealed) < wanted:
            shown = range(len(hidden))
            if len(hidden) > _SHORTLIST:
                shown = self.random.sample(shown, _SHORTLIST)
            self._reveal(kind, *hidden.pop(max(shown, key=lambda k: self._promise(node, hidden[k][0]))))
        return self._best(kind.stats, kind.revealed) if kind.revealed else None

    def _hidden(
        self, node: _Node[State, Result], kind: _Kind[State, Result]
    ) -> list[tuple[str, State | _Child[State, Result]]]:
        if kind.hidden is None:
            before = node.state
            if kind.name == FINISH:
                ends = [(f"{end.digest:x}", end) for end in self.moves.ends(before)]
                kind.hidden = [(key, _Child(key=key, operator=end)) for key, end in ends]
            else:
                children = self.moves.candidates(before, kind.name)
                kind.hidden = [(self.moves.key(before, child), child) for child in children]
        return kind.hidden

    def _reveal(self, kind: _Kind[State, Result], key: str, target: State | _Child[State, Result]) -> None:
        """Add a child if it can end; this is the only place where the tree asks whether it can."""
        if isinstance(target, _Child):
            kind.revealed.append(target)
        elif self.moves.keeps(target):
            node = self._nodes.get(target.digest)
            if node is None:
                node = self._nodes[target.digest] = _Node(target, self.moves.kinds(target))
            if not node.closed:
                kind.revealed.append(_Child(key=key, node=node))

    def _best(self, parent: Statistics, edges: list[AnyEdge]) -> AnyEdge:
        """Return an edge that was never tried, else the best by UCB1-tuned."""
        untried = [edge for edge in edges if not edge.visits and not edge.flying]
        if untried:
            return self.random.choice(untried)
        spread = log(max(2, sum(edge.visits + edge.flying for edge in edges)))
        return max(edges, key=lambda edge: self._bound(parent, edge, spread))

    def _bound(self, parent: Statistics, edge: _Edge, log_total: float) -> float:
        count = max(1, edge.visits)
        variance = edge.stats.variance * self._scale**2
        if edge.stats.count > _SETTLED and variance <= 1e-6:
            return -1.0
        stats = edge.stats if edge.stats.count else parent
        mean = self.scaled(stats.mean) if stats.count else 0.5
        width = min(0.25, variance + sqrt(2 * log_total / count))
        return mean + self.exploration * sqrt(log_total / count * width) - _VIRTUAL_LOSS * edge.flying

    @property
    def _scale(self) -> float:
        return 1 / (self.highest - self.lowest) if self.highest > self.lowest else 0.0

    def _promise(self, node: _Node[State, Result], key: str) -> float:
        """Return how much RAVE expects of a step below a node, mixed with noise."""
        local = node.rave.get(key)
        bias = _RAVE_BIAS / (_RAVE_BIAS + (local.count if local else 0))
        expected = (1 - bias) * self._optimism(local) + bias * self._optimism(self._rave.get(key))
        return _RAVE_SHARE * expected + (1 - _RAVE_SHARE) * self.random.random()

    def _optimism(self, stats: Statistics | None) -> float:
        if stats is None or not stats.count:
            return 0.0
        return self.scaled(stats.mean) + self._scale * sqrt(stats.variance) - 1 / stats.count

    def _fly(self, trace: TreeTrace[State, Result], change: int) -> None:
        for edge in trace.edges:
            edge.flying += change

    def _learn(self, trace: TreeTrace[State, Result], reward: float | None) -> None:
        self._fly(trace, -1)
        for edge in trace.edges:
            if reward is None:
                edge.failures += 1
            else:
                edge.stats.add(reward)
        if reward is None:
            return
        for key in trace.keys:
            self._rave.setdefault(key, Statistics()).add(reward)
        for k, node in enumerate(trace.nodes):
            node.stats.add(reward)
            for key in trace.keys[k:]:
                node.rave.setdefault(key, Statistics()).add(reward)


class TreeSearch(AbstractTreeSearch[Interface, Operator], Searcher[TreeTrace[Interface, Operator]]):
    """Monte Carlo tree search over the operators of a space; see the module."""

    def __init__(
        self, space: Space, depth: int, reward: Reward, seed: int = 0, *, exploration: float = sqrt(2.0)
    ) -> None:
        """Start a search.

        Args:
            space: The search space.
            depth: Most steps of an operator.
            reward: What an operator is worth; scaled by the best and the worst so far.
            seed: Where all random choices come from.
            exploration: c of UCB1-tuned; Syno takes 4 * sqrt(2).

        Raises:
            SearchError: Exploration below 0, or a space that cannot end within ``depth`` steps.
        """
        self.exploration = exploration
        super().__init__(space, depth, reward, seed)
