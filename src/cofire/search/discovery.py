"""A search from its spec to its best results: evaluated in this process or in others, saved and resumed.

A folder holds ``search.toml``, the spec; ``state.json``, the searcher's events and the best results so far; and at the
end of each run the best of them, ``operators/01-<digest>.toml`` and on, the best first. Every file is written whole or
not at all.

A searcher does what follows from its seed and the rewards it learnt, so the state is the list of these. A run that was
killed goes on from the last state and ends where it would have ended. The budget may be raised between runs.

``AbstractRun`` is the run of any search; here is that of operators, that of kernels is in ``search.canvas``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from cofire.errors import SearchError, SpecError
from cofire.search.baselines import BeamSearch, RandomSearch
from cofire.search.cost import costs
from cofire.search.from_spec import check_solvable, space_of
from cofire.search.graph import Operator
from cofire.search.mcts import TreeSearch
from cofire.search.operator_io import from_spec, to_spec
from cofire.search.rewards import MEASURED, Within, make_reward
from cofire.search.sampling import Searcher
from cofire.search.searcher import AbstractSearcher, Found, Result
from cofire.spec import KernelsSpec, OperatorSpec, SearchSpec, Spec, load_as, parse, save
from cofire.spec.io import diff, write_text

SEARCHERS: dict[str, type[Searcher[Any]]] = {"mcts": TreeSearch, "random": RandomSearch, "beam": BeamSearch}
STATE_FILE, SPEC_FILE = "state.json", "search.toml"

_VERSION = 1
_MAY_CHANGE = ("name", "description", "sampling.budget", "sampling.save_every")
_SHOWN_LENGTH_MAX = 80
_WRITTEN = re.compile(r"[0-9]{2,}-[0-9a-f]{12}(-[0-9]+x[0-9]+x[0-9]+)?\.(toml|json|py)")

SoughtSpec = TypeVar("SoughtSpec", bound=SearchSpec | KernelsSpec)


@dataclass
class Discovery(Generic[SoughtSpec, Result]):
    """How far a search is.

    Attributes:
        spec: Its spec.
        evaluated: Evaluations so far, those of earlier runs included.
        failed: Those of them that failed, by the limit of the window that refused them; ``"reward"``: they had none.
        resumed: Evaluations of earlier runs.
        spent: Whether nothing is left that the searcher would find.
        best: The best results, best first.
    """

    spec: SoughtSpec
    evaluated: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    spent: bool = False
    best: list[Found[Result]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """How rewards are known: ``measured`` or ``modelled``."""
        return "measured" if self.spec.sampling.reward in MEASURED else "modelled"

    def take(self, found: Found[Result] | None, refused: str = "") -> None:
        """Count one evaluation, and keep what it found if it is among the best; of equals the earlier stays first.

        Args:
            found: What it found; none: it failed.
            refused: Why it failed.
        """
        self.evaluated += 1
        if found is None:
            self.failed[refused] = self.failed.get(refused, 0) + 1
            return
        self.best.append(found)
        self.best.sort(key=lambda one: (-one.reward, one.evaluation))
        del self.best[self.spec.sampling.keep :]


Progress = Callable[[Discovery[SoughtSpec, Result]], None]


def discover(
    spec: SearchSpec, folder: Path | None = None, progress: Progress[SearchSpec, Operator] | None = None
) -> Discovery[SearchSpec, Operator]:
    """Search until the budget is spent or no operator is left.

    Args:
        spec: What is searched, and how.
        folder: Where the state is kept; a search that is there already goes on. None: nothing is kept.
        progress: Called after every evaluation.

    Raises:
        SearchError: The spec has no operator, its guidance is not the exact one, the folder holds another search, or a
            process that computes rewards was killed.
        SpecError: The folder cannot be read or written.
        KeyboardInterrupt: Ctrl-C; the state is saved before.
    """
    if spec.guidance != "exact":
        raise SearchError(f"guidance = {spec.guidance!r} is for enumeration; samples need guidance = 'exact'")
    return _OperatorRun(spec, make_reward(spec), folder).run(progress)


def _serve() -> None:
    """Leave Ctrl-C, which a terminal sends to the whole group of processes, to the one that searches; end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent leaves the queue of tasks open, as each worker holds its other end: they would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _executor(workers: int) -> ProcessPoolExecutor | nullcontext[None]:
    if workers == 1:
        return nullcontext()
    # A fork of a process that has threads, as PyTorch's have, may never come back.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_serve)


class AbstractRun(ABC, Generic[SoughtSpec, Result]):
    """One run of a search, from its folder's state on.

    Attributes:
        spec: What is searched, and how.
        searcher: What searches.
        folder: Where the state is kept; none: nothing is kept.
        discovery: How far it is.
    """

    results: ClassVar[str]  # name of the folder of the best

    def __init__(
        self, spec: SoughtSpec, searcher: AbstractSearcher[Any, Result, Any], folder: Path | None = None
    ) -> None:
        """Take up the state of a folder, if there is one.

        Args:
            spec: What is searched, and how.
            searcher: What searches.
            folder: Where the state is kept; none: nothing is kept.

        Raises:
            SearchError: The folder holds another search, or no state.
            SpecError: The folder cannot be read or written.
        """
        self.spec, self.searcher, self.folder = spec, searcher, folder
        self.discovery: Discovery[SoughtSpec, Result] = Discovery(spec)
        if folder is not None:
            self._open(folder)
        self._state = self._snapshot()

    @abstractmethod
    def _to_spec(self, result: Result, name: str, description: str = "") -> Any:
        """Return a result as a spec."""

    @abstractmethod
    def _from_table(self, table: dict[str, Any], where: str) -> Result:
        """Return the result that a spec's table holds."""

    @abstractmethod
    def _write(self, found: Found[Result], folder: Path, stem: str) -> list[str]:
        """Write the files of a result, whose names begin with a stem, and return their names."""

    def _refusal(self, result: Result) -> str:
        """Return why a result failed."""
        return "reward"

    def run(self, progress: Progress[SoughtSpec, Result] | None = None) -> Discovery[SoughtSpec, Result]:
        """Search until the budget is spent or nothing is left; then the state and the best are written.

        Args:
            progress: Called after every evaluation.

        Raises:
            SearchError: A process that computes rewards was killed.
            SpecError: The folder cannot be written.
            KeyboardInterrupt: Ctrl-C; the state is saved before.
        """
        try:
            with _executor(self.spec.sampling.workers) as executor:
                try:
                    self._search(executor, progress)
                finally:
                    # Before the executor waits for rewards that are under way.
                    self._save()
                    self._write_best()
        except BrokenProcessPool:
            again = "the same command goes on" if self.folder is not None else "set sampling.workers=1"
            raise SearchError(
                f"a process that computed a reward was killed, for want of memory perhaps; {again}"
            ) from None
        return self.discovery

    def _search(self, executor: Executor | None, progress: Progress[SoughtSpec, Result] | None) -> None:
        """Evaluate results, as many at a time as there are workers, and learn from them in the order of proposals."""
        discovery, sampling = self.discovery, self.spec.sampling
        left = sampling.budget - discovery.evaluated
        for result, found in self.searcher.evaluate(left, executor, sampling.workers):
            discovery.take(found, "" if found is not None else self._refusal(result))
            self._state = self._snapshot()
            if discovery.evaluated % sampling.save_every == 0:
                self._save()
            if progress is not None:
                progress(discovery)
        discovery.spent = discovery.evaluated < sampling.budget

    def _snapshot(self) -> dict[str, Any]:
        """Return a state that can be resumed: between two evaluations, never within one."""
        discovery = self.discovery
        return {
            "searcher": self.searcher.state(),
            "evaluated": discovery.evaluated,
            "failed": dict(discovery.failed),
            "best": list(discovery.best),
        }

    def _save(self) -> None:
        """Write the state, if there is a folder."""
        if self.folder is None:
            return
        best = [self._row(found) for found in self._state["best"]]
        state = {"version": _VERSION, **self._state, "best": best}
        write_text(self.folder / STATE_FILE, json.dumps(state, separators=(",", ":"), allow_nan=False))

    def _row(self, found: Found[Result]) -> dict[str, Any]:
        spec = self._to_spec(found.operator, short_name(found.operator.digest))
        return {"reward": found.reward, "evaluation": found.evaluation, "operator": spec.model_dump(mode="json")}

    def _described(self, found: Found[Result]) -> Any:
        """Return a result as a spec that says where it comes from."""
        name = self.spec.sampling.reward
        worth = "" if name == "none" else f"{name} {found.reward:.6g}, {self.discovery.label}; "
        said = f"{worth}evaluation {found.evaluation} of {self.spec.name}"
        return self._to_spec(found.operator, short_name(found.operator.digest), said)

    def _write_best(self) -> None:
        """Write the best results, and take away those that an earlier run wrote."""
        if self.folder is None:
            return
        folder = _make(self.folder / self.results)
        names: list[str] = []
        for rank, found in enumerate(self._state["best"], 1):
            names += self._write(found, folder, f"{rank:02}-{short_name(found.operator.digest)}")
        for path in folder.iterdir():
            if _WRITTEN.fullmatch(path.name) and path.name not in names:
                path.unlink(missing_ok=True)

    def _open(self, folder: Path) -> None:
        """Take up the state of a folder, or make the folder; then say in it what is searched."""
        path = _make(folder) / STATE_FILE
        if path.exists():
            _check_same(self.spec, load_as(type(self.spec), folder / SPEC_FILE), folder)
            self._resume(path)
        save(self.spec, folder / SPEC_FILE)

    def _resume(self, path: Path) -> None:
        discovery = self.discovery
        try:
            state = json.loads(path.read_text("utf-8"))
            if state["version"] != _VERSION:
                raise SearchError(f"{path} has version {state['version']}, this program writes {_VERSION}; begin anew")
            self.searcher.restore(state["searcher"])
            discovery.evaluated = discovery.resumed = state["evaluated"]
            discovery.failed = dict(state["failed"])
            for row in state["best"]:
                result = self._from_table(row["operator"], str(path))
                discovery.best.append(Found(result, row["reward"], row["evaluation"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SearchError(f"{path} is not a state of a search ({reason}); take it away to begin anew") from None


class _OperatorRun(AbstractRun[SearchSpec, Operator]):
    """A run of a search for operators."""

    results = "operators"

    def __init__(self, spec: SearchSpec, reward: Within, folder: Path | None) -> None:
        space = space_of(spec)
        check_solvable(space, spec.depth)
        self._limits = reward.limits
        searcher = SEARCHERS[spec.sampling.algorithm](space, spec.depth, reward, spec.sampling.seed)
        super().__init__(spec, searcher, folder)

    def _refusal(self, result: Operator) -> str:
        return self._limits.broken(costs(result)) or "reward"

    def _to_spec(self, result: Operator, name: str, description: str = "") -> OperatorSpec:
        return to_spec(result, name, description)

    def _from_table(self, table: dict[str, Any], where: str) -> Operator:
        return from_spec(parse(OperatorSpec, table, where))

    def _write(self, found: Found[Operator], folder: Path, stem: str) -> list[str]:
        save(self._described(found), folder / f"{stem}.toml")
        return [f"{stem}.toml"]


def short_name(digest: int) -> str:
    """Return the first 48 of a digest's 128 bits, which name a result in a folder."""
    return f"{digest >> 80:012x}"


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
    return folder


def _check_same(spec: Spec, held: Spec, folder: Path) -> None:
    """Refuse to go on with a search that is not the one asked for."""
    for path, was, wanted in diff(held, spec):
        if path in _MAY_CHANGE:
            continue
        plain = isinstance(was, (int, float, str))
        fix = f", or set {path}={json.dumps(was)}" if plain else ""
        raise SearchError(
            f"{folder} holds a search with another {path}{_values(was, wanted)}; take another folder{fix}"
        )


def _values(was: object, wanted: object) -> str:
    """Return two values of a field in words, where they are short enough to be read."""
    pair = f": {was!r} there, {wanted!r} here"
    return pair if len(pair) <= _SHOWN_LENGTH_MAX else ""
