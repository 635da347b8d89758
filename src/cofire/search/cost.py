"""What an operator costs, known before it is lowered: parameters, multiply-adds and sizes of tensors.

Multiply-adds are counted for two ways to run an operator:

- *naive*: one loop nest over all output and reduction iterators, with one multiply-add per point and weight;
- *staged*: with materialised reductions (Syno; rfactor in other compilers). A stage multiplies the value so far by one
  weight, or by none, and sums every reduction that nothing needs any more. Because a sum is materialised before the
  next weight multiplies it up again, the order of stages decides, and so does which windows are taken before a stage.

The cheapest staging is found exactly, by Dijkstra's algorithm. A state is the set of coordinates at which the value is
held (*labels*) and the weights still to come. Views cost nothing: Split, Shift, Stride and a whole Merge can always be
read top-down at once, for they leave the number of elements or lower it; Unfold and half a Merge raise it, so that both
choices are followed.

Left out: copies that views make; products of two weights ahead of the input; a sum over part of a coordinate, such as
i div B, of which another tensor needs the rest; and the product by a number for a reduction that no tensor depends on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import product as cartesian
from math import prod

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.primitives import Dim, Iterator, MergeMajor, MergeMinor, Reduction, Unfold

Labels = frozenset[Dim]

# Stages branch over every subset of the weights.
MAX_WEIGHTS = 10


@dataclass(frozen=True)
class Stage:
    """One loop nest of a staging.

    Attributes:
        factor: Which weight the value is multiplied by, masks numbered after the weights; none: it is only summed.
        loops: The coordinates looped over, in the order of their digests.
        summed: Those of them that are summed over and gone from the result.
        multiply_adds: Points of the loop nest.
        result_elements: Elements of the result.
    """

    factor: int | None
    loops: tuple[Dim, ...]
    summed: tuple[Dim, ...]
    multiply_adds: int
    result_elements: int


@dataclass(frozen=True)
class Cost:
    """What an operator costs under one mapping. Elements are numbers, not bytes.

    Attributes:
        parameters: Elements of all weights.
        input_elements: Elements of the input.
        output_elements: Elements of the output.
        naive_multiply_adds: In one loop nest.
        stages: The cheapest staging, in the order of computation; of several, one with the smallest largest result.
    """

    parameters: int
    input_elements: int
    output_elements: int
    naive_multiply_adds: int
    stages: tuple[Stage, ...]

    @cached_property
    def multiply_adds(self) -> int:
        """Multiply-adds of the stages."""
        return sum(stage.multiply_adds for stage in self.stages)

    @cached_property
    def largest_intermediate_elements(self) -> int:
        """Elements of the largest result of a stage that another stage reads; 0 if there is none."""
        return max((stage.result_elements for stage in self.stages[:-1]), default=0)

    def tensor_bytes(self, element_bytes: int = 4) -> int:
        """Return the bytes of input, output, weights and the largest intermediate together.

        Args:
            element_bytes: Of one number; 4 for FP32.
        """
        elements = self.input_elements + self.output_elements + self.parameters + self.largest_intermediate_elements
        return elements * element_bytes


def cost(operator: Operator, mapping: int = 0) -> Cost:
    """Return what an operator costs under one mapping.

    Args:
        operator: The operator.
        mapping: Which row of ``operator.symbols.mappings`` gives the sizes.

    Raises:
        SearchError: There is no such mapping, or more than 10 weights.
    """
    count = len(operator.symbols.mappings)
    if not 0 <= mapping < count:
        raise SearchError(f"mapping {mapping} of an operator with {count}; count from 0 to {count - 1}")
    game = _Game(operator, mapping)
    if len(game.factors) > MAX_WEIGHTS:
        raise SearchError(f"{len(game.factors)} weights; stagings are searched for up to {MAX_WEIGHTS}, use fewer")
    points = game.elements((*operator.output, *operator.reductions))
    return Cost(
        parameters=sum(game.elements(weight) for weight in operator.weights),
        input_elements=game.elements(operator.input),
        output_elements=game.elements(operator.output),
        naive_multiply_adds=points * max(len(game.factors), min(len(operator.reductions), 1)),
        stages=game.cheapest(),
    )


def costs(operator: Operator) -> tuple[Cost, ...]:
    """Return the cost under every mapping; a network's is their sum (Syno adds FLOPs over mappings)."""
    return tuple(cost(operator, mapping) for mapping in range(len(operator.symbols.mappings)))


@dataclass(frozen=True)
class _State:
    """A value on the way from the input to the output.

    Attributes:
        labels: Coordinates at which it is held.
        pending: Factors still to come.
    """

    labels: Labels
    pending: frozenset[int]


class _Game:
    """The search for the cheapest staging of one operator at the sizes of one mapping."""

    def __init__(self, operator: Operator, mapping: int) -> None:
        self.operator = operator
        self.mapping = mapping
        self.factors: tuple[Labels, ...] = tuple(map(frozenset, operator.weight_coordinates))
        # A window over what is only repeated still makes the output zero beside its domain: a weight of ones.
        self.factors += tuple(frozenset((dim,)) for dim in operator.masks)

    def elements(self, labels: Iterable[Dim]) -> int:
        """Return the number of elements of a tensor with these labels."""
        return prod(dim.size.value(self.mapping) for dim in labels)

    def cheapest(self) -> tuple[Stage, ...]:
        """Return the stages with the fewest multiply-adds, and among those the smallest largest intermediate."""
        start = _State(_simplified(self.operator.input_coordinates), frozenset(range(len(self.factors))))
        # The counter keeps states out of the comparison and ties in the order of discovery.
        queue: list[tuple[int, int, int, _State, tuple[Stage, ...]]] = [(0, 0, 0, start, ())]
        done: set[_State] = set()
        pushed = 0
        while queue:
            paid, largest, _, state, stages = heappop(queue)
            if self._is_finished(state):
                return stages
            if state in done:
                continue
            done.add(state)
            for following, stage in self._moves(state):
                pushed += 1
                if stage is None:
                    heappush(queue, (paid, largest, pushed, following, stages))
                    continue
                kept = 0 if self._is_finished(following) else stage.result_elements
                entry = (paid + stage.multiply_adds, max(largest, kept), pushed, following, (*stages, stage))
                heappush(queue, entry)
        raise AssertionError("every operator ends in iterators")

    def _is_finished(self, state: _State) -> bool:
        """Say whether only views are left."""
        return not state.pending and not _reductions(state.labels)

    def _moves(self, state: _State) -> Iterable[tuple[_State, Stage | None]]:
        """Yield what may follow a state: a view, a sum, or a product with a factor."""
        for label in sorted(state.labels):
            if not isinstance(label, Iterator):
                peeled = _simplified((*(state.labels - {label}), *label.below))
                yield _State(peeled, state.pending), None
        if self._finished_reductions(state.labels, state.pending):
            yield self._stage(state.labels, state.pending, None)
        for number in sorted(state.pending):
            for loops in _loop_nests(state.labels, self.factors[number]):
                yield self._stage(loops, state.pending - {number}, number)

    def _stage(self, loops: Labels, pending: frozenset[int], factor: int | None) -> tuple[_State, Stage]:
        """Return a stage over these loops and the state after it."""
        summed = self._finished_reductions(loops, pending)
        result = loops - summed
        stage = Stage(factor, tuple(sorted(loops)), tuple(sorted(summed)), self.elements(loops), self.elements(result))
        return _State(result, pending), stage

    def _finished_reductions(self, labels: Labels, pending: frozenset[int]) -> Labels:
        """Return the reductions among labels that no other label and no factor to come depends on."""
        compound = (label for label in labels if not isinstance(label, Iterator))
        to_come = (label for number in pending for label in self.factors[number])
        return frozenset(dim for dim in labels if isinstance(dim, Reduction)) - _reductions((*compound, *to_come))


def _loop_nests(labels: Labels, factor: Labels) -> Iterable[Labels]:
    """Yield the loops in which a value can be multiplied by a factor: its own and any that the factor adds."""
    choices = [_cuts(label, labels) for label in sorted(factor)]
    nests = (_simplified((*labels, *(label for part in cut for label in part))) for cut in cartesian(*choices))
    return dict.fromkeys(nests)


def _cuts(label: Dim, known: Labels) -> tuple[Labels, ...]:
    """Return the sets of coordinates, at the label or below, that determine it together with what is known."""
    if _follows(label, known):
        return (frozenset(),)
    whole = (frozenset((label,)),)
    if isinstance(label, Iterator):
        return whole
    below = cartesian(*(_cuts(part, known) for part in label.below))
    return (*whole, *(frozenset(dim for part in cut for dim in part) for cut in below))


def _follows(label: Dim, known: Labels) -> bool:
    """Say whether known coordinates determine a label."""
    if label in known:
        return True
    return bool(label.below) and all(_follows(below, known) for below in label.below)


def _simplified(labels: Iterable[Dim]) -> Labels:
    """Apply the views that never raise the number of elements, and leave out labels that follow from others."""
    found = frozenset(labels)
    while True:
        for label in sorted(found):
            rest = found - {label}
            if isinstance(label, Iterator):
                continue
            if _follows(label, rest):
                found = rest
                break
            if _is_free(label, rest):
                found = rest | frozenset(label.below)
                break
        else:
            return found


def _is_free(label: Dim, others: Labels) -> bool:
    """Say whether the view that a label's primitive means never raises the number of elements."""
    if isinstance(label, MergeMajor):
        return MergeMinor(label.source, label.block) in others
    if isinstance(label, MergeMinor):
        return MergeMajor(label.source, label.block) in others
    return not isinstance(label, Unfold)


def _reductions(labels: Iterable[Dim]) -> Labels:
    """Return the reductions that labels depend on."""
    return frozenset(dim for label in labels for dim in label.iterators if isinstance(dim, Reduction))
