"""A search for kernels from its spec to its best kernels, run, saved and resumed as searches for operators are.

The folder's ``kernels`` holds every kernel of the best as ``01-<digest>.json``, its spec, and for each place as
``01-<digest>-<C>x<H>x<W>.py``, a module that needs nothing but PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cofire.errors import SearchError
from cofire.search.canvas.from_spec import BOUNDS, kernel_of, reward_of, space_of, to_spec
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.search import KernelRandomSearch, KernelSearcher, KernelTreeSearch
from cofire.search.canvas.variables import Extent
from cofire.search.discovery import AbstractRun, Discovery, Progress
from cofire.search.searcher import Found
from cofire.spec import KernelSpec, KernelsSpec, parse, save
from cofire.spec.io import write_text

SEARCHERS: dict[str, type[KernelTreeSearch | KernelRandomSearch]] = {
    "mcts": KernelTreeSearch,
    "random": KernelRandomSearch,
}

WriteSource = Callable[[Kernel, Extent], str]


class KernelRun(AbstractRun[KernelsSpec, Kernel]):
    """A run of a search for kernels.

    Attributes:
        searcher: What searches; it counts what each rule and filter has refused.
    """

    results = "kernels"
    searcher: KernelSearcher[Any]

    def __init__(self, spec: KernelsSpec, folder: Path | None = None) -> None:
        """Take up the state of a folder, if there is one.

        Args:
            spec: What is searched, and how.
            folder: Where the state is kept; none: nothing is kept.

        Raises:
            SearchError: The limits leave no kernel, or the folder holds another search or no state.
            SpecError: The folder cannot be read or written.
            ModuleNotFoundError: There is a folder, but no torch, which kernels are written for.
        """
        self._source = None if folder is None else _writer()
        kind = SEARCHERS[spec.sampling.algorithm]
        super().__init__(spec, kind(space_of(spec), reward_of(spec), spec.sampling.seed), folder)

    @property
    def refused(self) -> dict[str, int]:
        """How often each rule and filter has refused what was picked, earlier runs included; the most first."""
        found = ((name, count) for name, count in self.searcher.refused.items() if count)
        return dict(sorted(found, key=lambda item: (-item[1], item[0])))

    def run(self, progress: Progress[KernelsSpec, Kernel] | None = None) -> Discovery[KernelsSpec, Kernel]:
        """Search as ``AbstractRun.run`` does; where no kernel is within the window, name the bound to widen.

        Args:
            progress: Called after every evaluation.

        Raises:
            SearchError: No kernel was found, or a process that computes rewards was killed.
            SpecError: The folder cannot be written.
            KeyboardInterrupt: Ctrl-C; the state is saved before.
        """
        try:
            return super().run(progress)
        except SearchError:
            refused = {name: count for name, count in self.refused.items() if name in BOUNDS}
            if self.discovery.evaluated or self.searcher.in_flight or not refused:
                raise
            name, count = next(iter(refused.items()))
            raise SearchError(
                f"none of {sum(refused.values())} kernels met is within the window; {name} refused {count}: "
                f"widen {BOUNDS[name]}"
            ) from None

    def _to_spec(self, result: Kernel, name: str, description: str = "") -> KernelSpec:
        return to_spec(result, name, description, self.spec.places)

    def _from_table(self, table: dict[str, Any], where: str) -> Kernel:
        return kernel_of(parse(KernelSpec, table, where))

    def _write(self, found: Found[Kernel], folder: Path, stem: str) -> list[str]:
        assert self._source is not None
        files = [f"{stem}.json"]
        save(self._described(found), folder / files[0])
        for place in self.spec.places:
            files.append(f"{stem}-{'x'.join(map(str, place))}.py")
            write_text(folder / files[-1], self._source(found.operator, Extent(*place)))
        return files


def _writer() -> WriteSource:
    # Here and not above, so that a search that writes nothing needs no torch.
    from cofire.search.canvas.lowering import write_source

    return write_source


def discover_kernels(
    spec: KernelsSpec, folder: Path | None = None, progress: Progress[KernelsSpec, Kernel] | None = None
) -> tuple[Discovery[KernelsSpec, Kernel], dict[str, int]]:
    """Search until the budget is spent or the searcher finds no other kernel.

    Args:
        spec: What is searched, and how.
        folder: Where the state and the best are kept; a search that is there already goes on. None: nothing is kept.
        progress: Called after every evaluation.

    Returns:
        How far it came, and how often each rule and filter has refused what was picked.

    Raises:
        SearchError: No kernel was found, the folder holds another search, or a process that computes rewards was
            killed.
        SpecError: The folder cannot be read or written.
        KeyboardInterrupt: Ctrl-C; the state is saved before.
    """
    run = KernelRun(spec, folder)
    return run.run(progress), run.refused
