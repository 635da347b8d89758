"""What an operator is: its symbols, and the primitives that build it from the output towards the input.

The primitives are Syno's, one table each, in the order in which an assembler applies them; dims are named. A matrix
product y[i0, i1] = sum over r0 of x[i0, r0] * W0[r0, i1]::

    kind = "operator"
    name = "matrix product"
    primary = ["M", "N", "K"]
    mappings = [{ M = 4, N = 6, K = 8 }]
    input = ["i0", "d0"]
    weights = [["r0", "i1"]]
    primitives = [
        { primitive = "output", size = "M", makes = ["i0"] },
        { primitive = "output", size = "N", makes = ["i1"] },
        { primitive = "reduce", size = "K", makes = ["r0"] },
        { primitive = "share", dims = ["r0"], makes = ["d0"] },
        { primitive = "share", dims = ["i1"], makes = ["d1"] },
        { primitive = "expand", dims = ["d1"] },
    ]

Here the tables are checked for themselves. Whether sizes divide, ``cofire.search`` says, which builds the operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cofire.spec.messages import nearest
from cofire.spec.spec_type import Positive, Spec

PrimitiveName = Literal["output", "reduce", "split", "merge", "shift", "unfold", "stride", "share", "expand"]


class _Form(NamedTuple):
    """How many dims a primitive takes and makes, and which of its other fields it has."""

    takes: int
    makes: int
    size: bool = False
    distance: bool = False


_FORMS: dict[str, _Form] = {
    "output": _Form(0, 1, size=True),
    "reduce": _Form(0, 1, size=True),
    "split": _Form(2, 1),
    "merge": _Form(1, 2, size=True),
    "shift": _Form(1, 1, distance=True),
    "unfold": _Form(2, 1),
    "stride": _Form(1, 1, size=True),
    "share": _Form(1, 1),
    "expand": _Form(1, 0),
}


class PrimitiveSpec(Spec):
    """One primitive: it takes ``dims`` off the interface and puts ``makes`` on it.

    ``dims``: of Split the major and the minor one, of Unfold the source and the window. ``makes``: of Merge the major
    and the minor one.
    """

    primitive: PrimitiveName
    dims: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    size: str | None = Field(
        default=None, description="of an output or reduction; the block of a merge; the stride of a stride"
    )
    distance: int | None = Field(default=None, description="of a shift; not 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        form = _FORMS[self.primitive]
        for field, wanted in (("dims", form.takes), ("makes", form.makes)):
            names = getattr(self, field)
            if len(names) != wanted:
                raise ValueError(f"{field} = {list(names)} of {self.primitive} must hold {wanted} names")
        for field, wanted in (("size", form.size), ("distance", form.distance)):
            given = getattr(self, field) is not None
            if given != wanted:
                raise ValueError(f"{field} must be {'given to' if wanted else 'left out of'} {self.primitive}")
        if self.distance == 0:
            raise ValueError("distance = 0 of shift must not be 0; leave the primitive out or shift by 1")
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A file holds some ten of these; fields that their primitive does not have would be half of it.
        return {key: value for key, value in write(self).items() if value not in ((), [], None)}


class OperatorSpec(Spec):
    """A linear operator that a search found or somebody wrote: y[i] = sum over r of x[e(i, r)] * W0[..] * W1[..].

    ``mappings`` give every symbol a number, once per place that the operator is to fill. ``input`` names the dims at
    which the input is read, in its order; ``weights`` the shared dims that index each weight, in the order of its
    layout.
    """

    kind: Literal["operator"] = "operator"
    name: str = "operator"
    description: str = ""
    primary: tuple[str, ...] = Field(description="large symbols: channels, height")
    coefficient: tuple[str, ...] = Field(default=(), description="small symbols: window, stride, groups")
    mappings: tuple[dict[str, Positive], ...]
    primitives: tuple[PrimitiveSpec, ...]
    input: tuple[str, ...]
    weights: tuple[tuple[str, ...], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_symbols(self.primary, self.coefficient, self.mappings)
        self._check_dims()
        self._check_weights()
        return self

    def _check_dims(self) -> None:
        made: set[str] = set()
        interface: dict[str, None] = {}
        for position, step in enumerate(self.primitives):
            _take(f"primitives.{position}.dims", step.dims, made, interface)
            for name in step.makes:
                if name in made:
                    raise ValueError(f"primitives.{position}.makes: dim {name!r} is made twice; pick another name")
                made.add(name)
                interface[name] = None
        _take("input", self.input, made, interface)
        if interface:
            left = ", ".join(interface)
            raise ValueError(f"dim {left} is left over; name it in input, or add an expand of it")

    def _check_weights(self) -> None:
        shared = [name for step in self.primitives if step.primitive == "share" for name in step.dims]
        listed = [name for row in self.weights for name in row]
        for position, row in enumerate(self.weights):
            if not row:
                raise ValueError(f"weights.{position} = [] has no dims; name the shared dims that index it")
        twice = _first_repeated(listed)
        if twice is not None:
            raise ValueError(f"weights name {twice!r} twice; a share gives a dim to one weight, once")
        for name in listed:
            if name not in shared:
                raise ValueError(f"weights name {name!r}, which no share takes; add a share{nearest(name, shared)}")
        for name in shared:
            if name not in listed:
                raise ValueError(f"a share takes {name!r}, which is in no weight; name it in weights")


def check_symbols(primary: tuple[str, ...], coefficient: tuple[str, ...], mappings: tuple[dict[str, int], ...]) -> None:
    """Check that symbols are declared once and that every mapping gives each of them a number.

    Raises:
        ValueError: They are not, or there is no mapping; a validator's, whose text names the field.
    """
    symbols = (*primary, *coefficient)
    twice = _first_repeated(symbols)
    if twice is not None:
        raise ValueError(f"symbol {twice!r} is declared twice; a symbol is primary or a coefficient")
    if not mappings:
        raise ValueError("mappings = [] must hold at least one table of numbers for the symbols")
    for position, mapping in enumerate(mappings):
        for name in symbols:
            if name not in mapping:
                raise ValueError(f"mappings.{position} has no number for {name!r}; add {name} = 1 or more")
        for name in mapping:
            if name not in symbols:
                raise ValueError(f"mappings.{position}: {name!r} is no symbol{nearest(name, symbols)}")


def _take(where: str, names: Iterable[str], made: set[str], interface: dict[str, None]) -> None:
    """Take dims off the interface."""
    for name in names:
        if name not in interface:
            reason = "was used already" if name in made else "was not made before"
            raise ValueError(f"{where}: dim {name!r} {reason}; on the interface: {', '.join(interface) or 'nothing'}")
        del interface[name]


def _first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that came before, if one did."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
