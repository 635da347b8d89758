"""Plans an optimised lowering: which views, contractions and convolutions, and in which order.

A tensor's dims are labelled with the coordinates at which they are read. The plan starts from the input, labelled with
the operator's input coordinates, and walks down to the output's iterators: a label is *peeled* by the view that its
primitive means top-down (Split: unflatten, Merge: flatten, Shift: roll, Unfold: pad and a strided window, Stride: every
s-th), and a weight is contracted as soon as its labels stand beside it. A reduction is summed once nothing else needs
it, so a sum is materialised before the next weight multiplies it up again (Syno's materialised reduction). Windows
whose offset only that weight shares become a convolution.

A weight may also be contracted *early*, ahead of the windows whose offsets it is read at: the offset is then a dim of
the weight that the product brings in, and the window is slid over the product (each slab along the offset moved by it)
in place of being copied out of a larger input. That is how two weights share a kernel's coordinate.

Plans are made for every order of contractions, each early or not, and with and without windows that do not overlap
taken as convolutions; the one of the lowest price by ``work`` is taken, the first among equals. Any of them is right: a
label peeled too early comes back as a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
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
    Keep,
    Pad,
    Permute,
    Repeat,
    Roll,
    Scale,
    SizeOf,
    Slide,
    Step,
    Sum,
    Unflatten,
    Window,
)
from cofire.search.lowering.work import Work, work
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Reduction, Shift, Split, Stride, Unfold

# With more factors than this only the natural order is planned, the weight nearest the input first, and with more than
# the second number all are early or none.
MAX_FACTORS_PERMUTED = 4
MAX_FACTORS_CHOSEN = 3
# A window is slid slab by slab up to so many taps.
MAX_SLABS = 16


@dataclass(frozen=True)
class Plan:
    """How an operator is computed at the sizes of one mapping.

    Attributes:
        bound: The operator and the mapping.
        steps: The steps in order; the last one's value is the output.
        labels: After each step, the names of the dims of its value.
    """

    bound: Bound
    steps: tuple[Step, ...]
    labels: tuple[tuple[str, ...], ...]

    @cached_property
    def traced(self) -> Work:
        """What the steps cost, counted."""
        return work(self.bound, self.steps)

    @property
    def work(self) -> int:
        """What the steps cost, in multiply-adds: plans are compared by it."""
        return self.traced.price


@dataclass(frozen=True)
class Choice:
    """What a plan is free in.

    Attributes:
        order: The factors in the order of their contraction.
        early: Which of them are contracted ahead of the windows whose offsets they hold.
        kinds: What may be a window of a convolution.
    """

    order: tuple[int, ...]
    early: frozenset[int]
    kinds: tuple[type[Dim], ...]


def plan(operator: Operator, mapping: int = 0) -> Plan:
    """Return the plan with the least work.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: There is no such mapping.
    """
    found = plans(operator, mapping)
    return found[0] if len(found) == 1 else min(found, key=lambda planned: planned.work)


def plans(operator: Operator, mapping: int = 0) -> list[Plan]:
    """Return all plans that are compared, each once.

    Args:
        operator: The operator.
        mapping: Which mapping gives the sizes.

    Raises:
        SearchError: There is no such mapping.
    """
    bound = Bound(operator, mapping)
    return list({made.steps: made for made in (_Planner(bound, choice).run() for choice in _choices(bound))}.values())


def _choices(bound: Bound) -> Iterable[Choice]:
    natural = tuple(reversed(range(len(bound.factors))))
    orders = list(permutations(natural)) if len(natural) <= MAX_FACTORS_PERMUTED else [natural]
    windowed = [k for k in natural if any(isinstance(dim, Reduction) for dim in bound.factors[k])]
    if len(windowed) <= MAX_FACTORS_CHOSEN:
        flags = product((False, True), repeat=len(windowed))
        subsets = [frozenset(k for k, early in zip(windowed, chosen, strict=True) if early) for chosen in flags]
    else:
        subsets = [frozenset[int](), frozenset(windowed)]
    for order, early, kinds in product(orders, subsets, ((Unfold,), (Unfold, Split))):
        yield Choice(order, early, kinds)


class _Planner:
    """One plan in the making: the labels of the input's dims and the steps that led to them."""

    def __init__(self, bound: Bound, choice: Choice) -> None:
        self.bound = bound
        self.choice = choice
        self.labels: list[Dim] = list(bound.input)
        self.pending = list(choice.order)
        self.steps: list[Step] = []
        self.names: list[tuple[str, ...]] = []
        self.kept = 0
        self.sizes: dict[Dim, SizeOf] = {}

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
        return Plan(self.bound, tuple(self.steps), tuple(self.names))

    # The walk.

    def _approach(self, number: int) -> Convolution | None:
        """Peel until a factor's labels stand beside it; return the convolution that this makes, if it does."""
        while True:
            self._sum_finished()
            self._peel_cheaply(number)
            found = self._convolution(number)
            offsets = [] if found is None else [offset(window) for window in found.windows]
            # Ahead of a window its offset is not in sight, and the product brings it in.
            inside = _above_windows(self.labels) if number in self.choice.early else closure(self.labels)
            for label in self.bound.factors[number]:
                if label in inside and label not in self.labels and label not in offsets:
                    self._peel_towards(label)
                    break
            else:
                return found

    def _peel_cheaply(self, number: int) -> None:
        """Peel what costs nothing or makes the tensor smaller, so that reductions are summed early."""
        found = self._convolution(number)
        kept = {label for number in self.pending for label in self.bound.factors[number]}
        kept |= set(found.windows if found else ())
        for label in self.labels:
            if (isinstance(label, Split | Stride) or self._can_slide(label)) and label not in kept:
                self._peel(label)
                self._sum_finished()
                return self._peel_cheaply(number)
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
        if isinstance(label, Split | Stride) or self._can_slide(label):
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
                self._add(Roll("x", k, -label.distance), [*rest[0], label.source, *rest[1]])
            case Stride():
                stride = label.stride.value(self.bound.mapping)
                self._add(EveryNth("x", k, stride), [*rest[0], label.source, *rest[1]])
            case Unfold() if self._can_slide(label):
                self._slide(label)
            case Unfold():
                size = self.bound.size(label.window)
                padding = (size // 2, size - 1 - size // 2)
                step = Window("x", k, len(self.labels), padding, size)
                self._add(step, [*rest[0], label.source, *rest[1], label.window])
            case MergeMajor() | MergeMinor():
                self._merge(label)
        self._take_diagonals()

    def _can_slide(self, label: Dim) -> bool:
        """Say whether a window's offset is a dim already, of few taps."""
        if not isinstance(label, Unfold) or offset(label) not in self.labels:
            return False
        # F.pad cannot take off more than there is.
        return self.bound.size(offset(label)) <= MAX_SLABS and self.bound.size(label.window) < self.bound.size(label)

    def _slide(self, label: Unfold) -> None:
        """Move each slab along a window's offset by it, and add the slabs up if nothing else needs the offset."""
        taps, size = offset(label), self.bound.size(label.window)
        k, slabs = self.labels.index(label), self.labels.index(taps)
        labels = [*self.labels[:k], label.source, *self.labels[k + 1 :]]
        is_summed = taps in self._finished(labels)
        step = Slide("x", k, slabs, len(labels), size // 2, size // self.bound.size(taps), is_summed)
        self._add(step, [dim for dim in labels if dim != taps or not is_summed])

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
        self._add(Flatten("x", k, k + 1), [*without[:k], label.source, *without[k + 1 :]])

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

    def _finished(self, labels: Iterable[Dim]) -> list[Dim]:
        """Return the reductions among labels that neither another label nor a factor still to come depends on."""
        every = list(labels)
        pending = (label for number in self.pending for label in self.bound.factors[number])
        needed = closure((*pending, *(label for label in every if not isinstance(label, Iterator))))
        return [label for label in every if isinstance(label, Reduction) and label not in needed]

    def _sum_finished(self) -> None:
        """Sum the reductions that nothing else depends on."""
        finished = self._finished(self.labels)
        dims = tuple(k for k, label in enumerate(self.labels) if label in finished)
        if dims:
            self._add(Sum("x", dims), [label for label in self.labels if label not in finished])

    def _contract(self, number: int) -> None:
        """Multiply with a factor and sum what nothing else depends on."""
        factor = self.bound.factors[number]
        every = list(dict.fromkeys((*self.labels, *factor)))
        summed = self._finished(every)
        result = [label for label in self.labels if label not in summed]
        fresh = [label for label in every[len(self.labels) :] if label not in summed]
        k = next((k for k, label in enumerate(self.labels) if label in summed), len(self.labels))
        result[k:k] = fresh
        if _is_summed(result):
            result.sort(key=_output_place)
        letter = dict(zip(every, ascii_letters, strict=False))
        terms = ["".join(letter[label] for label in dims) for dims in (self.labels, factor, result)]
        self._add(Contract("x", _name(self.bound, number), f"{terms[0]},{terms[1]}->{terms[2]}"), result)

    def _convolution(self, number: int) -> Convolution | None:
        later = [label for k in self.pending if k != number for label in self.bound.factors[k]]
        kinds = () if number in self.choice.early else self.choice.kinds
        return find_convolution(self.bound, self.labels, self.bound.factors[number], later, kinds)

    def _convolve(self, number: int, found: Convolution) -> None:
        """Multiply with a factor and sum, as a convolution."""
        bound, factor = self.bound, self.bound.factors[number]
        channels = (*found.repeated, *found.groups, *found.inner)
        self._permute([*found.batch, *channels, *found.spatial])
        self._keep_sizes(found.batch)
        self._keep_sizes(found.spatial if found.is_flat else ())
        spatial = [str(dim) for dim in found.spatial]
        self._bundle(0, len(found.batch), [_bundled(found.batch), *map(str, channels), *spatial])
        self._bundle(1, len(channels), [_bundled(found.batch), _bundled(channels), *spatial])
        if found.is_flat:
            spatial = [_bundled(found.spatial)]
            self._bundle(2, len(found.spatial), [_bundled(found.batch), _bundled(channels), *spatial])
        kernels = [found.window(bound, dim) for dim in found.spatial][: len(spatial)]
        padding = self._pad([kernel.pads for kernel in kernels], [_bundled(found.batch), _bundled(channels), *spatial])
        out, into, groups = (prod(bound.shape(d)) for d in ((*found.groups, *found.outer), found.inner, found.groups))
        repeats = prod(bound.shape(found.repeated))
        step = Convolve(
            "x",
            _name(bound, number),
            order=tuple(factor.index(label) for label in found.weight),
            shape=(out, into, *(kernel.taps for kernel in kernels)),
            padding=padding,
            stride=tuple(kernel.stride for kernel in kernels),
            dilation=tuple(kernel.dilation for kernel in kernels),
            groups=groups * repeats,
            repeats=repeats,
        )
        made, places = (*found.repeated, *found.groups, *found.outer), [str(dim) for dim in found.places]
        flat = [_bundled(found.places)] if found.is_flat else places
        self._emit(step, [_bundled(found.batch), _bundled(made), *flat])
        if found.is_flat:
            self._unbundle(2, found.places, [_bundled(found.batch), _bundled(made), *places])
        self._unbundle(1, made, [_bundled(found.batch), *map(str, made), *places])
        self._unbundle(0, found.batch, [*map(str, (*found.batch, *made)), *places])
        self.labels = [*found.batch, *made, *found.places]

    def _pad(self, pads: Sequence[tuple[int, int]], names: Sequence[str]) -> tuple[int, ...]:
        """Return the padding that torch's convolution is to add; what it cannot, since sides differ, is added here."""
        if all(before == after for before, after in pads):
            return tuple(before for before, _ in pads)
        self._emit(Pad("x", tuple(zeros for pair in reversed(pads) for zeros in pair)), names)
        return (0,) * len(pads)

    def _keep_sizes(self, labels: Sequence[Dim]) -> None:
        """Keep the tensor if two or more free dims will be one, for only one size can be inferred."""
        if sum(self.bound.is_free(label) for label in labels) > 1:
            self._emit(Keep(f"s{self.kept}", "x"), [str(label) for label in self.labels])
            self.sizes |= {label: SizeOf(f"s{self.kept}", k) for k, label in enumerate(self.labels)}
            self.kept += 1

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
            free = [label for label in labels if self.bound.is_free(label)]
            inferred, known = free[:1], {label: self.sizes[label] for label in free[1:]}
            sizes = (-1 if label in inferred else known.get(label, self.bound.size(label)) for label in labels)
            self._emit(Unflatten("x", dim, tuple(sizes)), names)

    # Bookkeeping.

    def _add(self, step: Step, labels: Sequence[Dim]) -> None:
        self._emit(step, [str(label) for label in labels])
        self.labels = list(labels)

    def _emit(self, step: Step, names: Sequence[str]) -> None:
        if self.steps and _undoes(step, self.steps[-1]):
            self.steps.pop()
            self.names.pop()
            return
        self.steps.append(step)
        self.names.append(tuple(names))


def _undoes(step: Step, last: Step) -> bool:
    """Say whether a step makes one dim of those that the last one has just made of one."""
    if not (isinstance(step, Flatten) and isinstance(last, Unflatten)) or step.name != last.name:
        return False
    return (step.first, step.last) == (last.dim, last.dim + len(last.sizes) - 1)


def _above_windows(labels: Iterable[Dim]) -> set[Dim]:
    """Return the dims and what they depend on, but for what lies below an Unfold."""
    found: set[Dim] = set()
    stack = list(labels)
    while stack:
        dim = stack.pop()
        found.add(dim)
        stack.extend(() if isinstance(dim, Unfold) else dim.below)
    return found


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
