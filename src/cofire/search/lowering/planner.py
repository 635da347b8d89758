"""Plans an optimised lowering: which views, contractions and convolutions, and in which order.

A tensor's dims are labelled with the coordinates at which they are read. The plan starts from the input, labelled with
the operator's input coordinates, and walks down to the output's iterators: a label is *peeled* by the view that its
primitive means top-down (Split: unflatten, Merge: flatten, Shift: roll, Unfold: pad and a strided window, Stride: every
s-th), and a weight is contracted as soon as its labels stand beside it. A reduction is summed once nothing else needs
it, so a sum is materialised before the next weight multiplies it up again (Syno's materialised reduction). Windows
whose offset only that weight shares become a convolution.

Every order of contractions is planned and the one with the least work is taken; work counts multiply-adds and the
elements of copies, at the mapping's sizes. Any order is right: a label peeled too early comes back as a diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from string import ascii_letters

from cofire.search.graph import Operator
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.convolution import Convolution, closure, find_convolution, offset
from cofire.search.lowering.steps import (
    Contract,
    Convolve,
    Diagonal,
    EveryNth,
    Flatten,
    Pad,
    Permute,
    Repeat,
    Roll,
    Scale,
    Step,
    Sum,
    Unflatten,
    Window,
)
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Reduction, Shift, Split, Stride, Unfold

# With more factors than this only the natural order is planned: the weight nearest the input first.
MAX_FACTORS_PERMUTED = 4


@dataclass(frozen=True)
class Plan:
    """How an operator is computed at the sizes of one mapping.

    Attributes:
        bound: The operator and the mapping.
        steps: The steps in order; the last one's value is the output.
        labels: After each step, the names of the dims of its value.
        work: Multiply-adds and copied elements.
    """

    bound: Bound
    steps: tuple[Step, ...]
    labels: tuple[tuple[str, ...], ...]
    work: int


def plan(operator: Operator, mapping: int = 0) -> Plan:
    """Return the plan with the least work.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: There is no such mapping.
    """
    bound = Bound(operator, mapping)
    natural = tuple(reversed(range(len(bound.factors))))
    orders = permutations(natural) if len(natural) <= MAX_FACTORS_PERMUTED else (natural,)
    return min((_Planner(bound, order).run() for order in orders), key=lambda found: found.work)


class _Planner:
    """One plan in the making: the labels of the input's dims and the steps that led to them."""

    def __init__(self, bound: Bound, order: Sequence[int]) -> None:
        self.bound = bound
        self.labels: list[Dim] = list(bound.input)
        self.pending = list(order)
        self.steps: list[Step] = []
        self.names: list[tuple[str, ...]] = []
        self.work = 0

    def run(self) -> Plan:
        """Return the finished plan."""
        self._take_diagonals()
        while self.pending:
            number = self.pending[0]
            found = self._approach(number)
            self.pending.pop(0)
            if found is None:
                self._contract(number)
            else:
                self._convolve(number, found)
        self._finish()
        return Plan(self.bound, tuple(self.steps), tuple(self.names), self.work)

    # The walk.

    def _approach(self, number: int) -> Convolution | None:
        """Peel until a factor's labels stand beside it; return the convolution that this makes, if it does."""
        while True:
            self._sum_finished()
            self._peel_cheaply()
            found = self._convolution(number)
            offsets = [] if found is None else [offset(window) for window in found.windows]
            inside = closure(self.labels)
            for label in self.bound.factors[number]:
                if label in inside and label not in self.labels and label not in offsets:
                    self._peel_towards(label)
                    break
            else:
                return found

    def _peel_cheaply(self) -> None:
        """Peel what costs nothing or makes the tensor smaller, so that reductions are summed early."""
        kept = {label for number in self.pending for label in self.bound.factors[number]}
        for label in self.labels:
            if isinstance(label, Split | Stride) and label not in kept:
                self._peel(label)
                self._sum_finished()
                return self._peel_cheaply()
        return None

    def _peel_towards(self, target: Dim) -> None:
        """Peel the label that holds ``target``; of a half of a Merge, first what holds the other half."""
        label = next(label for label in self.labels if label != target and target in label.walk())
        other = _other_half(label)
        if other is not None and other not in self.labels and other in closure(self.labels):
            self._peel_towards(other)
        else:
            self._peel(label)

    def _finish(self) -> None:
        """Peel down to iterators, sum what is left, repeat what is missing and put the output in order."""
        while True:
            self._sum_finished()
            compound = [label for label in self.labels if not isinstance(label, Iterator)]
            if not compound:
                break
            if _is_summed(self.labels) and not any(isinstance(label, Split) for label in compound):
                # One reordering ahead of all flattening, so that data are copied once.
                self._permute(sorted(self.labels, key=_output_place))
            self._peel(min(compound, key=self._expense))
        if self.bound.idle > 1:
            self._add(Scale("x", self.bound.idle), self.labels)
        present = [dim for dim in self.bound.output if dim in self.labels]
        self._permute(present)
        for k, dim in enumerate(self.bound.output):
            if dim not in self.labels:
                size = self.bound.size(dim)
                self._add(Repeat("x", k, len(self.labels), size), [*self.labels[:k], dim, *self.labels[k:]])

    def _expense(self, label: Dim) -> int:
        """Rank a peel: views that shrink or keep the tensor first, a lone half of a Merge last."""
        if isinstance(label, Split | Stride):
            return 0
        other = _other_half(label)
        if other is not None:
            if other in self.labels:
                return 1
            return 5 if other in closure(self.labels) else 4
        return 3 if isinstance(label, Unfold) else 2

    # Peeling.

    def _peel(self, label: Dim) -> None:
        """Replace a label by those below it."""
        k = self.labels.index(label)
        rest = self.labels[:k], self.labels[k + 1 :]
        match label:
            case Split():
                parts = [label.major, label.minor]
                self._add(Unflatten("x", k, self.bound.shape(parts)), [*rest[0], *parts, *rest[1]])
            case Shift():
                self._add(Roll("x", k, -label.distance), [*rest[0], label.source, *rest[1]], copies=True)
            case Stride():
                stride = label.stride.value(self.bound.mapping)
                self._add(EveryNth("x", k, stride), [*rest[0], label.source, *rest[1]])
            case Unfold():
                size = self.bound.size(label.window)
                padding = (size // 2, size - 1 - size // 2)
                step = Window("x", k, len(self.labels), padding, size)
                self._add(step, [*rest[0], label.source, *rest[1], label.window], copies=True)
            case MergeMajor() | MergeMinor():
                self._merge(label)
        self._take_diagonals()

    def _merge(self, label: MergeMajor | MergeMinor) -> None:
        """Flatten the two halves of a Merge; a half that is missing is repeated over."""
        other = _other_half(label)
        assert other is not None
        major, minor = (label, other) if isinstance(label, MergeMajor) else (other, label)
        if other not in self.labels:
            k = self.labels.index(label) + (label is major)
            step = Repeat("x", k, len(self.labels), self.bound.size(other))
            self._add(step, [*self.labels[:k], other, *self.labels[k:]])
        without = [dim for dim in self.labels if dim != minor]
        k = without.index(major)
        self._permute([*without[: k + 1], minor, *without[k + 1 :]])
        self._add(Flatten("x", k, k + 1), [*without[:k], label.source, *without[k + 1 :]], copies=True)

    def _take_diagonals(self) -> None:
        """Make one dim of any two with the same label; a Split or an Unfold can bring two such pairs at once."""
        while len(set(self.labels)) < len(self.labels):
            second = next(k for k, label in enumerate(self.labels) if label in self.labels[:k])
            label = self.labels[second]
            first = self.labels.index(label)
            rest = [dim for k, dim in enumerate(self.labels) if k not in (first, second)]
            self._add(Diagonal("x", first, second), [*rest, label])

    def _permute(self, labels: Sequence[Dim]) -> None:
        order = tuple(self.labels.index(label) for label in labels)
        if order != tuple(range(len(order))):
            self._add(Permute("x", order), labels)

    # Sums and products.

    def _needed(self) -> set[Dim]:
        """Return what the factors still to come depend on."""
        return closure(label for number in self.pending for label in self.bound.factors[number])

    def _sum_finished(self) -> None:
        """Sum the reductions that nothing else depends on."""
        needed = self._needed() | closure(label for label in self.labels if not isinstance(label, Iterator))
        dims = [k for k, label in enumerate(self.labels) if isinstance(label, Reduction) and label not in needed]
        if dims:
            self.work += self._numel(self.labels)
            self._add(Sum("x", tuple(dims)), [label for k, label in enumerate(self.labels) if k not in dims])

    def _contract(self, number: int) -> None:
        """Multiply with a factor and sum what nothing else depends on."""
        factor = self.bound.factors[number]
        every = [*self.labels, *(label for label in factor if label not in self.labels)]
        needed = self._needed() | closure(label for label in every if not isinstance(label, Iterator))
        summed = [label for label in every if isinstance(label, Reduction) and label not in needed]
        result = [label for label in self.labels if label not in summed]
        fresh = [label for label in every[len(self.labels) :] if label not in summed]
        k = next((k for k, label in enumerate(self.labels) if label in summed), len(self.labels))
        result[k:k] = fresh
        if _is_summed(result):
            result.sort(key=_output_place)
        letter = dict(zip(every, ascii_letters, strict=False))
        terms = ["".join(letter[label] for label in dims) for dims in (self.labels, factor, result)]
        self.work += self._numel(every)
        self._add(Contract("x", _name(self.bound, number), f"{terms[0]},{terms[1]}->{terms[2]}"), result)

    def _convolution(self, number: int) -> Convolution | None:
        later = [label for k in self.pending if k != number for label in self.bound.factors[k]]
        return find_convolution(self.bound, self.labels, self.bound.factors[number], later)

    def _convolve(self, number: int, found: Convolution) -> None:
        """Multiply with a factor and sum, as a convolution."""
        bound, factor = self.bound, self.bound.factors[number]
        channels = (*found.groups, *found.inner)
        self._permute([*found.batch, *channels, *found.spatial])
        spatial = [str(dim) for dim in found.spatial]
        width = len(found.batch)
        self._bundle(0, width, [_bundled(found.batch), *map(str, channels), *spatial])
        self._bundle(1, len(channels), [_bundled(found.batch), _bundled(channels), *spatial])
        kernel = [found.window(bound, dim) for dim in found.spatial]
        out, into, groups = (prod(bound.shape(d)) for d in ((*found.groups, *found.outer), found.inner, found.groups))
        order = tuple(factor.index(label) for label in found.weight)
        taps, dilation, pads = zip(*kernel, strict=True)
        padding = tuple(before for before, _ in pads)
        if any(before != after for before, after in pads):
            around = tuple(zeros for pair in reversed(pads) for zeros in pair)
            self._emit(Pad("x", around), [_bundled(found.batch), _bundled(channels), *spatial])
            padding = (0,) * len(pads)
        step = Convolve("x", _name(bound, number), order, (out, into, *taps), padding, dilation, groups)
        made, places = (*found.groups, *found.outer), [str(dim) for dim in found.places]
        self._emit(step, [_bundled(found.batch), _bundled(made), *places])
        self._unbundle(1, made, [_bundled(found.batch), *map(str, made), *places])
        self._unbundle(0, found.batch, [*map(str, (*found.batch, *made)), *places])
        self.labels = [*found.batch, *made, *found.places]
        self.work += self._numel(self.labels) * into * prod(taps)

    def _bundle(self, dim: int, count: int, names: Sequence[str]) -> None:
        """Make ``count`` dims from ``dim`` on one."""
        if count == 0:
            self._emit(Repeat("x", dim, 0, 1), names)
        elif count > 1:
            self._emit(Flatten("x", dim, dim + count - 1), names)

    def _unbundle(self, dim: int, labels: Sequence[Dim], names: Sequence[str]) -> None:
        """Make one dim those of ``labels``."""
        if not labels:
            self._emit(Sum("x", (dim,)), names)
        elif len(labels) > 1:
            sizes = tuple(-1 if self.bound.is_free(label) else self.bound.size(label) for label in labels)
            self._emit(Unflatten("x", dim, sizes), names)

    # Bookkeeping.

    def _add(self, step: Step, labels: Sequence[Dim], copies: bool = False) -> None:
        self._emit(step, [str(label) for label in labels])
        self.labels = list(labels)
        self.work += self._numel(labels) * copies

    def _emit(self, step: Step, names: Sequence[str]) -> None:
        self.steps.append(step)
        self.names.append(tuple(names))

    def _numel(self, labels: Sequence[Dim]) -> int:
        return prod(self.bound.shape(labels))


def _other_half(label: Dim) -> Dim | None:
    if isinstance(label, MergeMajor):
        return MergeMinor(label.source, label.block)
    return MergeMajor(label.source, label.block) if isinstance(label, MergeMinor) else None


def _is_summed(labels: Sequence[Dim]) -> bool:
    """Say whether only output iterators are left."""
    return not any(isinstance(iterator, Reduction) for label in labels for iterator in label.iterators)


def _output_place(label: Dim) -> tuple[int, ...]:
    """Return a key that puts labels in the order of the output, the halves of a Merge beside each other."""
    path: list[int] = []
    while not isinstance(label, Iterator):
        path.insert(0, int(isinstance(label, MergeMinor)))
        label = label.below[0]
    return (label.index, *path)


def _name(bound: Bound, number: int) -> str:
    """Return the name of a factor: weights come first, then masks."""
    count = len(bound.weight_shapes)
    return f"w{number}" if number < count else f"m{number - count}"


def _bundled(labels: Sequence[Dim]) -> str:
    if not labels:
        return "1"
    return str(labels[0]) if len(labels) == 1 else f"({' '.join(map(str, labels))})"
