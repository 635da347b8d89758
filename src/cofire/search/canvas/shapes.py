"""Shapes of Canvas: a tensor beside its batch is a pair of meta-shapes, each channels or space (Canvas, shapes).

Data lie row by row in the order batch, dims of the first meta-shape, dims of the second; where a primitive takes a
tensor for a vector or a matrix, this order says how. Channels are G, C, KH, KW, space is H, W. Dims of size 1 are
always there in name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from cofire.errors import SearchError
from cofire.search.canvas import variables
from cofire.search.canvas.variables import ONE, Variable, product


class DimName(NamedTuple):
    """Which dim of a shape: the position of its meta-shape, 0 or 1, and its name there."""

    meta: int
    name: str

    def __str__(self) -> str:
        return f"{self.meta}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> DimName:
        """Read what ``str`` writes, such as ``"0.C"``.

        Raises:
            SearchError: The text names no dim.
        """
        meta, _, name = text.partition(".")
        if meta not in ("0", "1") or name not in (*Channel.names, *Spatial.names):
            raise SearchError(f"{text!r} is no dim; write the meta-shape's position and the dim's name, such as 0.C")
        return cls(int(meta), name)


@dataclass(frozen=True)
class Channel:
    """Channels: groups, channels in each, and a window unfolded into channels."""

    names: ClassVar[tuple[str, ...]] = ("G", "C", "KH", "KW")

    g: Variable = ONE
    c: Variable = ONE
    kh: Variable = ONE
    kw: Variable = ONE

    @property
    def sizes(self) -> tuple[Variable, ...]:
        """Sizes of all dims, in order."""
        return (self.g, self.c, self.kh, self.kw)

    @property
    def numel(self) -> Variable:
        """Product of the sizes."""
        return product(self.sizes)

    @property
    def per_group(self) -> Variable:
        """Channels of one group, windows counted."""
        return self.c * self.kh * self.kw


@dataclass(frozen=True)
class Spatial:
    """Space: height and width."""

    names: ClassVar[tuple[str, ...]] = ("H", "W")

    h: Variable = ONE
    w: Variable = ONE

    @property
    def sizes(self) -> tuple[Variable, ...]:
        """Sizes of both dims."""
        return (self.h, self.w)

    @property
    def numel(self) -> Variable:
        """Height times width."""
        return self.h * self.w


MetaShape = Channel | Spatial


@dataclass(frozen=True)
class Shape:
    """A pair of meta-shapes."""

    first: MetaShape
    second: MetaShape

    @property
    def metas(self) -> tuple[MetaShape, MetaShape]:
        """Both meta-shapes, in order."""
        return (self.first, self.second)

    @property
    def dims(self) -> tuple[DimName, ...]:
        """Names of all dims, in the order of the data, those of size 1 among them."""
        return tuple(DimName(k, name) for k, meta in enumerate(self.metas) for name in meta.names)

    @property
    def sizes(self) -> tuple[Variable, ...]:
        """Sizes of ``dims``."""
        return (*self.first.sizes, *self.second.sizes)

    @property
    def wide_dims(self) -> tuple[DimName, ...]:
        """Names of the dims whose size is not 1."""
        return tuple(dim for dim, size in zip(self.dims, self.sizes, strict=True) if not size.is_one)

    @property
    def numel(self) -> Variable:
        """Elements of one example of the batch."""
        return self.first.numel * self.second.numel

    @property
    def channel(self) -> int | None:
        """Position of the only Channel meta-shape; none: there are two or none."""
        found = [k for k, meta in enumerate(self.metas) if isinstance(meta, Channel)]
        return found[0] if len(found) == 1 else None

    def size(self, dim: DimName) -> Variable:
        """Return the size of a dim.

        Raises:
            SearchError: The shape has no such dim.
        """
        if dim not in self.dims:
            raise SearchError(f"shape {self} has no dim {dim}; it has {', '.join(map(str, self.dims))}")
        return self.sizes[self.dims.index(dim)]

    def resized(self, sizes: Mapping[DimName, Variable]) -> Shape:
        """Return this with other sizes of some dims.

        Raises:
            SearchError: The shape has no such dim.
        """
        metas = list(self.metas)
        for dim, size in sizes.items():
            self.size(dim)
            meta = metas[dim.meta]
            place = meta.names.index(dim.name)
            sizes_now = (*meta.sizes[:place], size, *meta.sizes[place + 1 :])
            metas[dim.meta] = Channel(*sizes_now) if isinstance(meta, Channel) else Spatial(*sizes_now)
        return Shape(*metas)

    def with_meta(self, position: int, meta: MetaShape) -> Shape:
        """Return this with another meta-shape at a position, 0 or 1."""
        return Shape(meta, self.second) if position == 0 else Shape(self.first, meta)

    def __str__(self) -> str:
        parts = []
        for meta in self.metas:
            shown = [f"{name}={size}" for name, size in zip(meta.names, meta.sizes, strict=True) if not size.is_one]
            parts.append(" ".join(shown) or type(meta).__name__.lower())
        return f"[{' | '.join(parts)}]"


INPUT_SHAPE = Shape(Channel(c=variables.C), Spatial(variables.H, variables.W))
