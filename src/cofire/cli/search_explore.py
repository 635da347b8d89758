"""``cofire search explore``: a space walked by hand, from the output towards the input.

Commands come from standard input, so that a walk can be scripted. A step is chosen as a search chooses it: first a kind
of primitive, then its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofire.cli.options import JsonOption, SetOption, complete_operator, complete_search
from cofire.cli.output import console, print_json
from cofire.cli.search_operator import operator_document, print_operator

if TYPE_CHECKING:
    from random import Random

    from rich.console import Console
    from rich.table import Table

    from cofire.search import Operator
    from cofire.search.interface import Interface
    from cofire.search.primitives import Dim
    from cofire.search.sampling import Moves
    from cofire.spec import SearchSpec

_HELP = "a number or a kind, back, random, finish, save FILE.toml, html FILE.html, show, help, quit"
_TRIES = 64  # random completions before a walk gives up
_BACKTRACKS = 40


def complete_source(incomplete: str) -> list[str]:
    """Presets of searches and of operators whose name starts with what was typed."""
    return [*complete_search(incomplete), *complete_operator(incomplete)]


def explore(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|OPERATOR",
            help="A preset or a file: a search to walk, or an operator to look at.",
            autocompletion=complete_source,
        ),
    ],
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Walk a space in the terminal, step by step, by commands read from standard input.

    A number picks a kind of step, then its arguments; back undoes; random completes at random; finish ends where the
    interface is the input; save FILE.toml and html FILE.html write the operator; quit ends. With --json the walk is
    shown on standard error and where it ended is printed.
    """
    from cofire.errors import SpecError
    from cofire.search.operator_io import from_spec
    from cofire.spec import OperatorSpec, SearchSpec, load

    spec = load(source, overrides or ())
    if isinstance(spec, OperatorSpec):
        operator = from_spec(spec)
        if as_json:
            print_json(operator_document(operator))
        else:
            print_operator(console(), operator)
        return
    if not isinstance(spec, SearchSpec):
        raise SpecError(f"{source} is a {getattr(spec, 'kind', '')} spec, but a search or an operator is needed here")
    walk = _begin(spec, console(stderr=as_json))
    walk.show()
    for line in _lines():
        if not walk.obey(line):
            break
    if as_json:
        print_json(walk.document())


def _lines() -> Iterable[str]:
    """Yield the lines of standard input, after a prompt where somebody types them."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _begin(spec: SearchSpec, shown: Console) -> Explorer:
    from random import Random

    from cofire.errors import SearchError
    from cofire.search.from_spec import check_solvable, space_of
    from cofire.search.sampling import Moves

    if spec.guidance == "compat":
        raise SearchError("guidance = 'compat' is for enumeration; a walk needs guidance = 'exact', or 'none'")
    space = space_of(spec)
    check_solvable(space, spec.depth)
    return Explorer(Moves(space, spec.depth, spec.guidance), Random(spec.sampling.seed), shown)


class Explorer:
    """A walk: the interfaces it passed, the menu that is shown, and the operator where it ended, if it has.

    Attributes:
        moves: The moves of the space.
        passed: Interfaces from the output's on; the last is where the walk is.
        steps: What each step was, in words.
        operator: Where the walk ended.
    """

    def __init__(self, moves: Moves, random: Random, shown: Console) -> None:
        """Start at the output's iterators.

        Args:
            moves: The moves of the space.
            random: The source of random completions.
            shown: Where the walk is printed.
        """
        self.moves, self.random, self.shown = moves, random, shown
        self.passed: list[Interface] = [moves.root]
        self.steps: list[str] = []
        self.operator: Operator | None = None
        self._kinds: dict[str, tuple[Interface | Operator, ...]] = {}
        self._kind: str | None = None
        self._look()

    @property
    def here(self) -> Interface:
        """The interface where the walk is."""
        return self.passed[-1]

    def _look(self) -> None:
        """List the legal moves from here, by kind; those that no operator can follow are left out."""
        moves, here = self.moves, self.here
        self._kind, self.operator = None, None
        self._kinds = {}
        for kind in moves.kinds(here):
            if kind == "finish":
                found: tuple[Interface | Operator, ...] = moves.ends(here)
            else:
                found = tuple(after for after in moves.candidates(here, kind) if moves.keeps(after))
            if found:
                self._kinds[kind] = found

    # -- commands --

    def obey(self, line: str) -> bool:
        """Do what a line says and show what came of it.

        Args:
            line: One of the commands of ``help``.

        Returns:
            Whether the walk goes on.
        """
        from cofire.errors import CofireError

        word, _, rest = line.partition(" ")
        if word == "quit":
            return False
        commands = {
            "": self.show,
            "show": self.show,
            "help": lambda: self._say(_HELP),
            "back": self._back,
            "random": self._complete,
            "finish": self._finish,
            "save": lambda: self._save(rest.strip()),
            "html": lambda: self._write_page(rest.strip()),
        }
        try:
            if word.isdecimal():
                self._pick(int(word))
            elif word in self._kinds and word not in commands:
                self._kind = word
                self.show()
            elif word in commands:
                commands[word]()
            else:
                self._say(f"{word!r} is no command; {_HELP}")
        except CofireError as error:
            self._say(str(error))
        return True

    def _say(self, text: str) -> None:
        self.shown.print(text, markup=False, soft_wrap=True)

    def _pick(self, number: int) -> None:
        options = list(self._kinds) if self._kind is None else self._kinds[self._kind]
        if self.operator is not None:
            self._say("the walk has ended; back undoes the end")
        elif not 1 <= number <= len(options):
            self._say(f"no move {number}; numbers are 1 to {len(options)}" if options else "no move is left; go back")
        elif self._kind is None:
            self._kind = list(self._kinds)[number - 1]
            self.show()
        else:
            self._go(self._kinds[self._kind][number - 1], self._kind)

    def _go(self, target: Interface | Operator, kind: str) -> None:
        from cofire.search import Operator

        if isinstance(target, Operator):
            self.operator = target
        else:
            self.steps.append(f"{kind} {describe_step(self.here, target)}")
            self.passed.append(target)
            self._look()
        self.show()

    def _back(self) -> None:
        if self.operator is not None:
            self.operator = None
        elif self._kind is not None:
            self._kind = None
        elif len(self.passed) > 1:
            self.passed.pop()
            self.steps.pop()
            self._look()
        else:
            self._say("this is where the walk begins")
            return
        self.show()

    def _complete(self) -> None:
        for _ in range(_TRIES):
            found = self.moves.walk(self.here, self.random, _BACKTRACKS)
            if found is not None:
                self.operator = found.operator
                self.show()
                return
            if not self.moves.keeps(self.here):
                self._say("no operator follows from here; go back")
                return
        self._say(f"{_TRIES} random walks from here met dead ends; try again, or go back")

    def _finish(self) -> None:
        ends = self._kinds.get("finish", ())
        if not ends:
            least = self.moves.distance(self.here)
            self._say(f"the interface is not the input yet, by at least {least} steps; go on, or complete at random")
        elif len(ends) == 1:
            self._go(ends[0], "finish")
        else:
            self._kind = "finish"
            self.show()

    def _ended(self) -> Operator:
        from cofire.errors import SearchError

        if self.operator is None:
            raise SearchError("the walk has not ended; finish or random makes an operator")
        return self.operator

    def _save(self, path: str) -> None:
        from cofire.search.operator_io import to_spec
        from cofire.spec import save

        operator = self._ended()
        save(to_spec(operator, f"{operator.digest >> 80:012x}", "; ".join(self.steps)), path)
        self._say(f"wrote {path}")

    def _write_page(self, path: str) -> None:
        from cofire.errors import SearchError

        operator = self._ended()
        if Path(path).suffix != ".html":
            raise SearchError(f"{path!r} must end in .html")
        from cofire.search.page import write_page

        write_page(operator, Path(path))
        self._say(f"wrote {path}")

    # -- what is shown --

    def show(self) -> None:
        """Print where the walk is, and the menu."""
        if self.operator is not None:
            print_operator(self.shown, self.operator, graph=False)
            self._say("save FILE.toml, html FILE.html, back or quit")
            return
        here, depth = self.here, self.moves.depth
        if self._kind is None:
            from rich.text import Text

            self.shown.print(Text(formula_so_far(here, self.moves), style="bold"), soft_wrap=True)
            self._say(f"steps {here.depth} of {depth}; {self._distance_text()}")
            self.shown.print(self._interface_table())
        self.shown.print(self._menu())

    def _distance_text(self) -> str:
        least, space = self.moves.distance(self.here), self.moves.space
        wanted = ", ".join(str(size) for size in space.desired)
        if least > self.moves.depth:
            return f"shape distance beyond the depth: reductions have to come first; the input wants ({wanted})"
        return f"shape distance to the input's ({wanted}): {least}"

    def _interface_table(self) -> Table:
        from rich.text import Text

        from cofire.plan.training_note import new_table

        table = new_table("Interface", "what", "size", "numbers", "chain left", "coordinate")
        for dim in _ordered(self.here.dims):
            numbers = "/".join(str(value) for value in dim.size.values)
            left = f"{self.moves.space.max_chain - dim.chain}"
            table.add_row(Text(describe_dim(dim)), str(dim.size), numbers, left, Text(dim.formula()))
        return table

    def _menu(self) -> Table:
        from rich.text import Text

        from cofire.plan.training_note import new_table

        if self._kind is None:
            table = new_table("Moves", "", "ways", "kind")
            for number, (kind, options) in enumerate(self._kinds.items(), 1):
                table.add_row(str(number), f"{len(options)}", kind)
            return table
        table = new_table(f"Moves: {self._kind}", "", "distance after", "arguments")
        for number, option in enumerate(self._kinds[self._kind], 1):
            distance, text = self._option(option)
            table.add_row(str(number), distance, Text(text))
        return table

    def _option(self, option: Interface | Operator) -> tuple[str, str]:
        from cofire.search import Operator

        if isinstance(option, Operator):
            return "-", option.formula()
        least = self.moves.distance(option)
        return (str(least) if least <= self.moves.depth else "-"), describe_step(self.here, option)

    def document(self) -> dict[str, Any]:
        """Return where the walk is, ready for JSON."""
        least = self.moves.distance(self.here)
        return {
            "steps": self.steps,
            "depth": self.moves.depth,
            "distance": least if least <= self.moves.depth else None,
            "formula": formula_so_far(self.here, self.moves),
            "interface": [
                {"coordinate": dim.formula(), "size": str(dim.size), "what": describe_dim(dim)}
                for dim in _ordered(self.here.dims)
            ],
            "moves": {kind: [self._option(one)[1] for one in options] for kind, options in self._kinds.items()},
            "operator": None if self.operator is None else operator_document(self.operator),
        }


def formula_so_far(state: Interface, moves: Moves) -> str:
    """Return an unfinished operator in index notation; braces hold the input's coordinates, whose order is open."""
    space = moves.space
    held = {o for _, o in space.fixed}
    fixed = [str(dim) for dim in space.iterators if dim.index in held]
    factors = [f"x{{{', '.join([*fixed, *(dim.formula() for dim in _ordered(state.dims))])}}}"]
    factors += [f"W{k}[{_names(weight)}]" for k, weight in enumerate(state.weights)]
    total = f"sum({_names(state.reductions)}) " if state.reductions else ""
    return f"y[{_names(space.iterators)}] = {total}{' * '.join(factors)}"


def describe_step(before: Interface, after: Interface) -> str:
    """Return in words what one step did: what it took off the interface and what it put on.

    Args:
        before: The interface it was applied to.
        after: What it led to.
    """
    put = [dim for dim in after.dims if dim not in before.dims]
    taken = [dim for dim in before.dims if dim not in after.dims]
    if len(after.weights) > len(before.weights):
        outer = [dim for dim in after.expansions if dim not in before.expansions]
        alone = f", which alone has {_names(outer)}" if outer else ""
        return f"W{len(before.weights)}[{_names(after.weights[-1])}]{alone}"
    if not taken:
        return f"{_names(put)} in [0, {put[0].size})"
    if not put:
        return f"over {_names(taken)}"
    return f"{_names(taken)} -> {', '.join(f'{dim.formula()} : {dim.size}' for dim in put)}"


def describe_dim(dim: Dim) -> str:
    """Return in words what a dim of an interface is."""
    from cofire.search.interface import below_shares
    from cofire.search.primitives import Iterator, Reduction

    bottom = below_shares(dim)
    if isinstance(bottom, Reduction):
        what = "reduction"
    elif isinstance(bottom, Iterator):
        what = f"output dim {bottom.index}"
    else:
        what = {"div": "merge, major", "mod": "merge, minor"}.get(bottom.name, bottom.name)
    shared = sorted(dim.weights)
    return f"{what}, in {', '.join(f'W{k}' for k in shared)}" if shared else what


def _ordered(dims: Iterable[Dim]) -> list[Dim]:
    """Return the dims of an interface as a reader expects them: those of the output before reductions."""
    return sorted(dims, key=lambda dim: (dim.ends_in_reduce, dim.formula()))


def _names(dims: Iterable[Dim]) -> str:
    return ", ".join(dim.formula() for dim in dims)
