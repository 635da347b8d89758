"""A search from its spec to its best operators: evaluated in this process or in others, saved and resumed.

A folder holds ``search.toml``, the spec; ``state.json``, the searcher's events and the best operators so far; and at
the end of each run ``operators/01-<digest>.toml`` and on, the best first. Every file is written whole or not at all.

A searcher does what follows from its seed and the rewards it learnt, so the state is the list of these. A run that was
killed goes on from the last state and ends where it would have ended. The budget may be raised between runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofire.errors import SearchError, SpecError
from cofire.search.baselines import BeamSearch, RandomSearch
from cofire.search.cost import costs
from cofire.search.from_spec import check_solvable, space_of
from cofire.search.mcts import TreeSearch
from cofire.search.operator_io import from_spec, to_spec
from cofire.search.rewards import Within, make_reward
from cofire.search.sampling import Found, Searcher
from cofire.spec import OperatorSpec, SearchSpec, load_as, parse, save
from cofire.spec.io import diff, write_text

SEARCHERS: dict[str, type[Searcher[Any]]] = {"mcts": TreeSearch, "random": RandomSearch, "beam": BeamSearch}
STATE_FILE, SPEC_FILE, OPERATOR_FOLDER = "state.json", "search.toml", "operators"

_VERSION = 1
_MAY_CHANGE = ("name", "description", "sampling.budget", "sampling.save_every")
_SHOWN_LENGTH_MAX = 80
_WRITTEN = re.compile(r"[0-9]{2,}-[0-9a-f]{12}\.toml")


@dataclass
class Discovery:
    """How far a search is.

    Attributes:
        spec: Its spec.
        evaluated: Evaluations so far, those of earlier runs included.
        failed: Those of them that failed, by the limit of the window that refused them; ``"reward"``: they had none.
        resumed: Evaluations of earlier runs.
        spent: Whether no operator is left that the searcher would find.
        best: The best operators, best first.
    """

    spec: SearchSpec
    evaluated: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    spent: bool = False
    best: list[Found] = field(default_factory=list)

    def take(self, found: Found | None, refused: str = "") -> None:
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


Progress = Callable[[Discovery], None]


def discover(spec: SearchSpec, folder: Path | None = None, progress: Progress | None = None) -> Discovery:
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
    run = _Run(spec, make_reward(spec), folder)
    try:
        with _executor(spec.sampling.workers) as executor:
            try:
                run.search(executor, progress)
            finally:
                # Before the executor waits for rewards that are under way.
                run.save()
                run.write_operators()
    except BrokenProcessPool:
        again = "the same command goes on" if folder is not None else "set sampling.workers=1"
        raise SearchError(f"a process that computed a reward was killed, for want of memory perhaps; {again}") from None
    return run.discovery


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


class _Run:
    """One run of a search, from its folder's state on."""

    def __init__(self, spec: SearchSpec, reward: Within, folder: Path | None) -> None:
        space = space_of(spec)
        check_solvable(space, spec.depth)
        self.spec, self.folder, self.limits = spec, folder, reward.limits
        self.discovery = Discovery(spec)
        self.searcher = SEARCHERS[spec.sampling.algorithm](space, spec.depth, reward, spec.sampling.seed)
        if folder is not None:
            self._open(folder)
        self._state = self._snapshot()

    def search(self, executor: Executor | None, progress: Progress | None) -> None:
        """Evaluate operators, as many at a time as there are workers, and learn from them in the order of proposals."""
        searcher, discovery, sampling = self.searcher, self.discovery, self.spec.sampling
        pending: deque[Future[float]] = deque()
        if executor is not None:
            pending.extend(executor.submit(searcher.reward, operator) for operator in searcher.in_flight)
        while discovery.evaluated < sampling.budget:
            while len(searcher.in_flight) < min(sampling.workers, sampling.budget - discovery.evaluated):
                operator = searcher.propose()
                if operator is None:
                    break
                if executor is not None:
                    pending.append(executor.submit(searcher.reward, operator))
            if not searcher.in_flight:
                discovery.spent = True
                break
            oldest = searcher.in_flight[0]
            found = searcher.learn(pending.popleft().result() if executor is not None else searcher.reward(oldest))
            discovery.take(found, "" if found is not None else self.limits.broken(costs(oldest)) or "reward")
            self._state = self._snapshot()
            if discovery.evaluated % sampling.save_every == 0:
                self.save()
            if progress is not None:
                progress(discovery)

    def _snapshot(self) -> dict[str, Any]:
        """Return a state that can be resumed: between two evaluations, never within one."""
        discovery = self.discovery
        return {
            "searcher": self.searcher.state(),
            "evaluated": discovery.evaluated,
            "failed": dict(discovery.failed),
            "best": list(discovery.best),
        }

    def save(self) -> None:
        """Write the state, if there is a folder."""
        if self.folder is None:
            return
        best = [_row(found) for found in self._state["best"]]
        state = {"version": _VERSION, **self._state, "best": best}
        write_text(self.folder / STATE_FILE, json.dumps(state, separators=(",", ":"), allow_nan=False))

    def write_operators(self) -> None:
        """Write the best operators as specs, and take away those that an earlier run wrote."""
        if self.folder is None:
            return
        folder = _make(self.folder / OPERATOR_FOLDER)
        names = []
        for rank, found in enumerate(self._state["best"], 1):
            names.append(f"{rank:02}-{found.operator.digest >> 80:012x}.toml")
            save(_operator_spec(self.spec, found), folder / names[-1])
        for path in folder.iterdir():
            if _WRITTEN.fullmatch(path.name) and path.name not in names:
                path.unlink(missing_ok=True)

    def _open(self, folder: Path) -> None:
        """Take up the state of a folder, or make the folder; then say in it what is searched."""
        path = _make(folder) / STATE_FILE
        if path.exists():
            _check_same(self.spec, load_as(SearchSpec, folder / SPEC_FILE), folder)
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
                operator = from_spec(parse(OperatorSpec, row["operator"], str(path)))
                discovery.best.append(Found(operator, row["reward"], row["evaluation"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SearchError(f"{path} is not a state of a search ({reason}); take it away to begin anew") from None


def _row(found: Found) -> dict[str, Any]:
    spec = to_spec(found.operator, f"{found.operator.digest >> 80:012x}")
    return {"reward": found.reward, "evaluation": found.evaluation, "operator": spec.model_dump(mode="json")}


def _operator_spec(spec: SearchSpec, found: Found) -> OperatorSpec:
    said = f"{spec.sampling.reward} {found.reward:.6g}, modelled; evaluation {found.evaluation} of {spec.name}"
    return to_spec(found.operator, f"{found.operator.digest >> 80:012x}", said)


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
    return folder


def _check_same(spec: SearchSpec, held: SearchSpec, folder: Path) -> None:
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
