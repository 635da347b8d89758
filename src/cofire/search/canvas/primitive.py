"""What every primitive of Canvas is, and the checks that several of them make.

In the formulas x is the first input and y the output. A batch dim stands before all shapes and is never touched. p is a
position over all dims that a formula does not name. Weights have no bias: what is counted is what is multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

from cofire.errors import SearchError
from cofire.search.canvas.shapes import Channel, DimName, Shape, Spatial
from cofire.search.canvas.variables import Variable

KERNEL_SIZES = (3, 5, 7)
DILATIONS = (1, 2, 3)

Shapes = tuple[Shape, ...]


class Primitive(ABC):
    """One operation. Its arguments are the fields of its dataclass.

    Attributes:
        name: Its name in text and files.
        arity: Number of inputs.
        weighted: Whether it has a weight.
        stretches: Whether its mismatch may be any whole number and not 1 alone.
    """

    name: ClassVar[str]
    arity: ClassVar[int] = 1
    weighted: ClassVar[bool] = False
    stretches: ClassVar[bool] = False

    @abstractmethod
    def shape(self, inputs: Shapes) -> Shape:
        """Return the output's shape.

        Args:
            inputs: Shape of each input, in order.

        Raises:
            SearchError: The primitive does not apply to such inputs.
        """

    def weight(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return the sizes of the weight, as its formula indexes it; empty where there is none."""
        return ()

    def multiply_adds(self, inputs: Shapes) -> Variable | None:
        """Return the multiply-adds of its contraction per example; none: it has no contraction, its cost is a pass."""
        return None

    def constraints(self, inputs: Shapes) -> tuple[Variable, ...]:
        """Return what must be whole beside the sizes of the output."""
        return ()

    def mismatch(self, inputs: Shapes) -> Variable | None:
        """Return the quotient of two sizes that the shape-matching solver may make equal; none: nothing to match."""
        return None

    def substitute(self, index: int, by: Variable) -> Primitive:
        """Return this with x<index> replaced in its arguments."""
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the arguments as strings, numbers and lists; those that are none are left out."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {key: _plain(value) for key, value in found.items() if value is not None}

    def refuse(self, reason: str) -> SearchError:
        """Return the error that says why this does not apply."""
        return SearchError(f"{self}: {reason}")

    def __str__(self) -> str:
        shown = [f"{key}={', '.join(v) if isinstance(v, list) else v}" for key, v in self.arguments().items()]
        return f"{self.name}({', '.join(shown)})"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and not isinstance(value, DimName):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, (Variable, DimName)) else value


def channel_of(primitive: Primitive, shape: Shape, meta: int) -> Channel:
    """Return the channels at a position of a shape.

    Raises:
        SearchError: There is space.
    """
    if meta not in (0, 1):
        raise primitive.refuse("a shape has the meta-shapes 0 and 1")
    found = shape.metas[meta]
    if not isinstance(found, Channel):
        raise primitive.refuse(f"meta-shape {meta} of {shape} is space; name one of channels")
    return found


def channel_and_space(primitive: Primitive, shape: Shape) -> tuple[int, Channel, Spatial]:
    """Return the position of the channels, the channels and the space of a shape that has one of each.

    Raises:
        SearchError: It has two of one.
    """
    position = shape.channel
    if position is None:
        raise primitive.refuse(f"{shape} is not one meta-shape of channels and one of space")
    channel, space = shape.metas[position], shape.metas[1 - position]
    assert isinstance(channel, Channel)
    assert isinstance(space, Spatial)
    return position, channel, space


def require_order(primitive: Primitive, shape: Shape, dims: tuple[DimName, ...]) -> None:
    """Check that dims are dims of a shape, at least one, in its order and none twice.

    Raises:
        SearchError: They are not.
    """
    if not dims:
        raise primitive.refuse("no dim is named; name one")
    if tuple(dim for dim in shape.dims if dim in dims) != dims:
        raise primitive.refuse(f"dims must be among {', '.join(map(str, shape.dims))}, once each and in this order")


def require_wide(primitive: Primitive, shape: Shape, dims: tuple[DimName, ...]) -> None:
    """Check that dims are dims of a shape in its order, and wider than 1.

    Raises:
        SearchError: They are not.
    """
    require_order(primitive, shape, dims)
    for dim in dims:
        if shape.size(dim).is_one:
            raise primitive.refuse(f"dim {dim} of {shape} has size 1; name a wider one")


def check_window(primitive: Primitive, kernel: int, dilation: int) -> None:
    """Check a window and its dilation.

    Raises:
        SearchError: Others than Canvas has.
    """
    if kernel not in KERNEL_SIZES:
        raise primitive.refuse("the window must be 3, 5 or 7")
    if dilation not in DILATIONS:
        raise primitive.refuse("the dilation must be 1, 2 or 3")


def require_one_or_pair(primitive: Primitive, dims: tuple[DimName, ...]) -> None:
    """Check that dims are one, or a pair that Canvas folds and shifts together.

    Raises:
        SearchError: They are not.
    """
    pair = tuple(dim.name for dim in dims)
    if len(dims) > 1 and (pair not in (("KH", "KW"), ("H", "W")) or dims[0].meta != dims[1].meta):
        raise primitive.refuse("several dims must be KH and KW, or H and W, of one meta-shape")


def check_kind(primitive: Primitive, kind: str, kinds: tuple[str, ...]) -> None:
    """Check an argument that is one of several words.

    Raises:
        SearchError: Another word.
    """
    if kind not in kinds:
        raise primitive.refuse(f"the kind must be one of {', '.join(kinds)}")
