"""The primitives of Syno, each a frozen dim that is built on the dims below it.

An operator is read bottom-up: it starts at the output iterators i and the reduction iterators r, and every primitive
replaces one or two dims by at most two that lie closer to the input. A dim is therefore an expression in iterators: the
coordinate at which a tensor is read. Read top-down, from the input, the same primitive is a view of the data; Split and
Merge swap their meaning between the readings, and carry here their top-down names as in Syno.

| primitive  | coordinate                      | size            | top-down meaning                 |
|------------|---------------------------------|-----------------|----------------------------------|
| Split      | (i, j) -> i*B + j               | N_i * B         | reshape one dim into two         |
| Merge      | i -> (i div B, i mod B)         | N / B and B     | reshape two dims into one        |
| Shift      | i -> (i + d) mod N              | N               | roll by -d                       |
| Unfold     | (i, j) -> i + j - floor(k/2)    | N               | window k, zero outside [0, N)    |
| Stride     | i -> s*i                        | s * N           | take every s-th                  |
| Share      | i -> i, and i in a weight       | N twice         | multiply by a weight             |
| Expand     | i -> nothing                    | none            | repeat                           |
| Reduce     | nothing -> r                    | N               | sum                              |

Dims are compared by a digest (blake2b) over their expression, so equal expressions are one dim in every process.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from hashlib import blake2b
from typing import ClassVar

from cofire.errors import SearchError
from cofire.search.sizes import Size


class Dim:
    """A coordinate with a domain size; see the module's table.

    Attributes:
        size: Its domain is [0, size).
        below: The dims it is built on, nearer to the output.
        digest: 128 bits that name the expression; equal in every process.
    """

    name: ClassVar[str] = ""

    def __init__(self, size: Size, below: tuple[Dim, ...], *arguments: object) -> None:
        self.size = size
        self.below = below
        parts = [self.name, str(size), *(str(a) for a in arguments), *(f"{dim.digest:032x}" for dim in below)]
        self.digest = int.from_bytes(blake2b("|".join(parts).encode(), digest_size=16).digest(), "big")

    def __getstate__(self) -> dict[str, object]:
        """Leave out what follows from the rest: a set that holds the dim cannot be built before its digest is there."""
        kinds = type(self).__mro__
        found = {name for kind in kinds for name, value in vars(kind).items() if isinstance(value, cached_property)}
        # Copied at once, for another thread may ask for a property meanwhile.
        return {name: value for name, value in vars(self).copy().items() if name not in found}

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Dim) and self.digest == other.digest)

    def __hash__(self) -> int:
        return self.digest & 0xFFFFFFFFFFFFFFF

    def __lt__(self, other: Dim) -> bool:
        return self.digest < other.digest

    def __repr__(self) -> str:
        return f"<{self} : {self.size}>"

    def __str__(self) -> str:
        return self.formula()

    def formula(self, latex: bool = False) -> str:
        """Return the coordinate as text, or in LaTeX."""
        raise NotImplementedError

    @cached_property
    def chain(self) -> int:
        """Primitives on the longest path down to an iterator; a Share counts, a Reduce does not."""
        return 1 + max(dim.chain for dim in self.below)

    @cached_property
    def weights(self) -> frozenset[int]:
        """Weights that are shared with this dim or with one below it."""
        return frozenset().union(*(dim.weights for dim in self.below))

    @cached_property
    def discards(self) -> bool:
        """Whether a Stride below leaves elements out that no Unfold has taken up."""
        return any(dim.discards for dim in self.below)

    @cached_property
    def ends_in_reduce(self) -> bool:
        """Whether it depends on reduction iterators alone."""
        return all(dim.ends_in_reduce for dim in self.below)

    @cached_property
    def iterators(self) -> frozenset[Dim]:
        """The output and reduction iterators it depends on."""
        return frozenset().union(*(dim.iterators for dim in self.below))

    def walk(self) -> Generator[Dim, None, None]:
        """Yield this dim and all below it, nearest the input first, each once."""
        seen: set[Dim] = {self}
        stack: list[Dim] = [self]
        while stack:
            dim = stack.pop()
            yield dim
            for child in dim.below:
                if child not in seen:
                    seen.add(child)
                    stack.append(child)


class Iterator(Dim):
    """An output coordinate i in [0, N).

    Attributes:
        index: Position among the dims of the output.
    """

    name = "iterator"

    def __init__(self, size: Size, index: int) -> None:
        self.index = index
        super().__init__(size, (), index)

    @cached_property
    def chain(self) -> int:
        """Zero: nothing is below it."""
        return 0

    @cached_property
    def ends_in_reduce(self) -> bool:
        """False: it is a dim of the output."""
        return False

    @cached_property
    def iterators(self) -> frozenset[Dim]:
        """Itself."""
        return frozenset((self,))

    def formula(self, latex: bool = False) -> str:
        """Return ``i0``, or ``i_{0}``."""
        return f"i_{{{self.index}}}" if latex else f"i{self.index}"


class Reduction(Iterator):
    """Reduce: a coordinate r in [0, N) that the output is summed over (top-down: a sum over a dim)."""

    name = "reduce"

    @cached_property
    def ends_in_reduce(self) -> bool:
        """True."""
        return True

    def formula(self, latex: bool = False) -> str:
        """Return ``r0``, or ``r_{0}``."""
        return f"r_{{{self.index}}}" if latex else f"r{self.index}"


class Split(Dim):
    """Split: (i, j) -> i*B + j with B the size of j (top-down: a dim is reshaped into two).

    Attributes:
        major: i.
        minor: j.
    """

    name = "split"

    def __init__(self, major: Dim, minor: Dim) -> None:
        self.major, self.minor = major, minor
        super().__init__(major.size * minor.size, (major, minor))

    def formula(self, latex: bool = False) -> str:
        """Return ``i*B + j``."""
        times = r" \cdot " if latex else "*"
        return f"{_wrap(self.major, latex)}{times}{_factor(self.minor.size)} + {self.minor.formula(latex)}"


class MergeMajor(Dim):
    """The major part of Merge: i -> i div B (top-down: two dims are reshaped into one).

    Attributes:
        source: i.
        block: B; it divides the size of i under every mapping.
    """

    name = "div"

    def __init__(self, source: Dim, block: Size) -> None:
        _check_block(source, block)
        self.source, self.block = source, block
        super().__init__(source.size / block, (source,), block)

    def formula(self, latex: bool = False) -> str:
        """Return ``i div B``."""
        inner = self.source.formula(latex)
        return rf"\lfloor ({inner}) / {self.block} \rfloor" if latex else f"({inner}) div ({self.block})"


class MergeMinor(Dim):
    """The minor part of Merge: i -> i mod B.

    Attributes:
        source: i.
        block: B; it divides the size of i under every mapping.
    """

    name = "mod"

    def __init__(self, source: Dim, block: Size) -> None:
        _check_block(source, block)
        self.source, self.block = source, block
        super().__init__(block, (source,), block)

    def formula(self, latex: bool = False) -> str:
        """Return ``i mod B``."""
        sign = r"\bmod" if latex else "mod"
        return f"({self.source.formula(latex)}) {sign} ({self.block})"


class Shift(Dim):
    """Shift: i -> (i + d) mod N (top-down: a roll by -d). The distance is part of the dim and never drawn at random.

    Attributes:
        source: i.
        distance: d, not 0.
    """

    name = "shift"

    def __init__(self, source: Dim, distance: int = 1) -> None:
        if distance == 0:
            raise SearchError("a Shift by 0 moves nothing; leave it out or shift by 1")
        self.source, self.distance = source, distance
        super().__init__(source.size, (source,), distance)

    def formula(self, latex: bool = False) -> str:
        """Return ``(i + d) mod N``."""
        sign = r"\bmod" if latex else "mod"
        operator = "+" if self.distance > 0 else "-"
        return f"({self.source.formula(latex)} {operator} {abs(self.distance)}) {sign} ({self.size})"


class Unfold(Dim):
    """Unfold: (i, j) -> i + j - floor(k/2), zero outside [0, N), with k the size of j (top-down: a sliding window).

    With a strided j = s*t, k is s times the number of taps, so that floor(s*k/2) zeros pad the left side; torch's
    symmetric dilated padding is another function.

    Attributes:
        source: i, of size N.
        window: j, of size k.
    """

    name = "unfold"

    def __init__(self, source: Dim, window: Dim) -> None:
        self.source, self.window = source, window
        super().__init__(source.size, (source, window))

    @cached_property
    def discards(self) -> bool:
        """Whether the source does: what a strided window leaves out, other positions read."""
        return self.source.discards

    def formula(self, latex: bool = False) -> str:
        """Return ``i + j - floor(k/2)``, in brackets that mark the zero padding."""
        centre = rf"\lfloor {self.window.size}/2 \rfloor" if latex else f"floor({self.window.size}/2)"
        return f"[{self.source.formula(latex)} + {self.window.formula(latex)} - {centre}]"


class Stride(Dim):
    """Stride: i -> s*i (top-down: every s-th element is taken, the others are discarded).

    Attributes:
        source: i.
        stride: s.
    """

    name = "stride"

    def __init__(self, source: Dim, stride: Size) -> None:
        if not stride.is_legal:
            raise SearchError(f"a stride of {stride} is not a size; it must be whole and at least 1 in every mapping")
        self.source, self.stride = source, stride
        super().__init__(source.size * stride, (source,), stride)

    @cached_property
    def discards(self) -> bool:
        """True."""
        return True

    def formula(self, latex: bool = False) -> str:
        """Return ``s*i``."""
        times = r" \cdot " if latex else "*"
        return f"{_factor(self.stride)}{times}{_wrap(self.source, latex)}"


class Share(Dim):
    """The left side of Share: i -> i, while the right side is a dim of a weight (top-down: a product with the weight).

    Its coordinate is that of ``source``; it marks that the weight is multiplied in at this height.

    Attributes:
        source: i.
        weight: Number of the weight, from 0, in the order of contractions.
    """

    name = "share"

    def __init__(self, source: Dim, weight: int) -> None:
        self.source, self.weight = source, weight
        super().__init__(source.size, (source,), weight)

    @cached_property
    def weights(self) -> frozenset[int]:
        """The source's and its own."""
        return self.source.weights | {self.weight}

    def formula(self, latex: bool = False) -> str:
        """Return the source's."""
        return self.source.formula(latex)


def without_shares(dim: Dim) -> Dim:
    """Return the same coordinate with every Share left out: what lowering and comparison need."""
    if isinstance(dim, Iterator):
        return dim
    if isinstance(dim, Share):
        return without_shares(dim.source)
    below = [without_shares(child) for child in dim.below]
    if all(new is old for new, old in zip(below, dim.below, strict=True)):
        return dim
    if isinstance(dim, Split):
        return Split(below[0], below[1])
    if isinstance(dim, Unfold):
        return Unfold(below[0], below[1])
    if isinstance(dim, MergeMajor):
        return MergeMajor(below[0], dim.block)
    if isinstance(dim, MergeMinor):
        return MergeMinor(below[0], dim.block)
    if isinstance(dim, Stride):
        return Stride(below[0], dim.stride)
    if isinstance(dim, Shift):
        return Shift(below[0], dim.distance)
    raise SearchError(f"{type(dim).__name__} is not a primitive of this space")


def _check_block(source: Dim, block: Size) -> None:
    rest = source.size / block
    if not (block.is_legal and rest.is_legal):
        raise SearchError(f"a block of {block} does not divide a dim of {source.size}; pick a divisor in every mapping")


def _factor(size: Size) -> str:
    text = str(size)
    return text if text.isidentifier() else f"({text})"


def _wrap(dim: Dim, latex: bool) -> str:
    text = dim.formula(latex)
    bare = dim.source if isinstance(dim, Share) else dim
    return text if isinstance(bare, Iterator) else f"({text})"
