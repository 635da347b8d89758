"""What may be done to an unfinished kernel: primitives applied, and the rules that refuse them (Canvas, sampler).

A plan says how many primitives a kernel is to have and how many tensors may be open. Tensors that nothing reads are its
width; a Broadcast or a Bmm of two of them lowers it by one, so that what is left must suffice to close it to a single
output, and the last one must leave C*H*W elements or a variable that can make them so.

Rules are asked for one application at a time, so that a sampler or a tree tests only what it picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

from cofire.errors import SearchError
from cofire.search.canvas.graph import Graph, Kernel
from cofire.search.canvas.primitive import DILATIONS, KERNEL_SIZES, Primitive
from cofire.search.canvas.primitives import (
    ACTIVATIONS,
    BROADCASTS,
    DISTANCES,
    ELEMENTWISE,
    FOLDS,
    Activation,
    Bmm,
    Broadcast,
    Convolution,
    Elementwise,
    Fc,
    Fold,
    Group,
    Mix,
    Output,
    Scale,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.shapes import Channel, DimName, Shape, Spatial
from cofire.search.canvas.solver import REDUCTIONS, Substitution, Target, close, matches
from cofire.search.canvas.variables import ONE, C, G, Variable, dynamic_variable

WEIGHTED = ("fc", "convolution", "mix", "scale")
UNWEIGHTED = ("fold", "unfold", "group", "shift", "softmax", "activation", "elementwise", "broadcast", "bmm")
KINDS = (*WEIGHTED, *UNWEIGHTED)
_MOST_MIXED = 3  # dims that one Mix takes


@dataclass(frozen=True)
class Limits:
    """What kernels may be; the defaults are Canvas's.

    Attributes:
        primitives: Fewest and most primitives, input and output not counted.
        width: Least and greatest number that a plan draws for the tensors open at once.
        weighted: Fewest primitives with a weight, and the most.
        weighted_ratio: Greatest share of primitives with a weight.
        dims: Most dims of a tensor that are wider than 1, beside the batch.
        spatial_weights: Whether a weight may depend on H or W, which ties a kernel to a size of images.
        bmm_share: Share of kernels that must have a Bmm.
        kinds: Names of the primitives that may be used.
    """

    primitives: tuple[int, int] = (5, 25)
    width: tuple[int, int] = (2, 8)
    weighted: tuple[int, int] = (1, 8)
    weighted_ratio: float = 0.6
    dims: int = 7
    spatial_weights: bool = False
    bmm_share: float = 0.1
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        """Check that the limits leave something.

        Raises:
            SearchError: They do not.
        """
        for name in ("primitives", "width", "weighted"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise SearchError(f"{name} = {least} to {most} is no range; from 1 up, least first")
        if not (0 < self.weighted_ratio <= 1 and 0 <= self.bmm_share <= 1):
            raise SearchError(
                f"weighted_ratio = {self.weighted_ratio} and bmm_share = {self.bmm_share} must be from 0 to 1, "
                f"the first above 0"
            )
        for kind in self.kinds:
            if kind not in KINDS:
                raise SearchError(f"kinds name {kind!r}, which is none of {', '.join(KINDS)}")
        if not self.can_weigh(self.primitives[1]):
            raise SearchError(
                f"{self.weighted[0]} weights are more than {self.weighted_ratio} of {self.primitives[1]} primitives; "
                f"allow more of either"
            )
        if not set(self.kinds) & set(WEIGHTED):
            raise SearchError(f"kinds leave no primitive with a weight; add one of {', '.join(WEIGHTED)}")

    def can_weigh(self, num_primitives: int) -> bool:
        """Whether so many primitives may have the fewest weights."""
        return self.weighted[0] <= self.weighted_ratio * num_primitives


@dataclass(frozen=True)
class Plan:
    """What one kernel is to be.

    Attributes:
        target: The places to fill.
        limits: What kernels may be.
        num_primitives: Primitives it will have.
        max_width: Most tensors open at once.
        needs_bmm: Whether it must have a Bmm.
    """

    target: Target
    limits: Limits
    num_primitives: int
    max_width: int
    needs_bmm: bool = False


@dataclass(frozen=True)
class Action:
    """One application of a primitive.

    Attributes:
        primitive: What is applied.
        inputs: Positions of the nodes it is applied to.
        substitution: What the shape-matching solver replaces before; none: nothing.
    """

    primitive: Primitive
    inputs: tuple[int, ...]
    substitution: Substitution | None = None

    def __str__(self) -> str:
        shown = "".join(f" t{k}" for k in self.inputs)
        with_ = f" with x{self.substitution.variable} = {self.substitution.by}" if self.substitution else ""
        return f"{self.primitive}{shown}{with_}"


@dataclass(frozen=True)
class State:
    """An unfinished kernel.

    Attributes:
        plan: What it is to be.
        graph: What it is so far, without an output.
    """

    plan: Plan
    graph: Graph

    @classmethod
    def start(cls, plan: Plan) -> State:
        """Return the state that has an input alone."""
        return cls(plan, Graph.start())

    @cached_property
    def left(self) -> int:
        """Primitives still to be applied."""
        return self.plan.num_primitives - self.graph.num_primitives

    def fits_width(self, inputs: tuple[int, ...]) -> bool:
        """Whether a primitive that reads some nodes leaves no more open tensors than the plan and the rest allow."""
        width = len(self.graph.open) + 1 - len(set(inputs) & set(self.graph.open))
        return width <= self.plan.max_width and width <= self.left

    @property
    def may_weigh(self) -> bool:
        """Whether another weight is within the limits."""
        limits = self.plan.limits
        return self.graph.num_weighted < min(limits.weighted[1], int(limits.weighted_ratio * self.plan.num_primitives))

    @property
    def must_weigh(self) -> bool:
        """Whether every primitive left is needed for the fewest weights."""
        return self.plan.limits.weighted[0] - self.graph.num_weighted >= self.left

    def apply(self, action: Action) -> State:
        """Return the state after an action, by the solver and the primitive alone; no rule is asked.

        Raises:
            SearchError: It does not apply.
        """
        graph = self.graph.substitute(*action.substitution) if action.substitution else self.graph
        return State(self.plan, graph.apply(action.primitive, *action.inputs))

    def kernels(self, reductions: tuple[int, ...] = REDUCTIONS) -> Iterator[Kernel]:
        """Yield what a state with nothing left may be closed to.

        Args:
            reductions: Divisors of open sizes, in the order in which they are tried.

        Raises:
            SearchError: Primitives are left.
        """
        if self.left:
            raise SearchError(f"{self.left} primitives are left to apply before a kernel closes; apply them")
        for kernel in close(self.graph, self.plan.target, reductions):
            if self.plan.limits.spatial_weights or not _has_spatial_weight(kernel.graph):
                yield kernel


def kinds(state: State) -> tuple[str, ...]:
    """Return the names of primitives that may apply, as far as the numbers of primitives, tensors and weights tell."""
    if not state.left:
        return ()
    found = state.plan.limits.kinds
    if len(state.graph.open) > state.left:
        found = tuple(kind for kind in found if kind in _JOINS)
    if not state.may_weigh or state.must_weigh:
        found = tuple(kind for kind in found if (kind in WEIGHTED) is state.must_weigh)
    return found


def candidates(state: State, kind: str) -> Iterator[Action]:
    """Yield applications of primitives of a kind to tensors that the width allows; of other rules none is asked.

    Args:
        state: Where.
        kind: Name of the primitives, one of ``KINDS``.
    """
    graph = state.graph
    nodes = range(len(graph.nodes))
    if kind in _JOINS:
        for pair, row in product(filter(state.fits_width, product(nodes, nodes)), _JOINS[kind]):
            found = tuple(matches(graph, row[0], pair))
            yield from (Action(primitive, pair, substitution) for primitive in row for substitution in found)
        return
    fresh = None if graph.fresh is None else dynamic_variable(graph.fresh)
    for node in nodes:
        if state.fits_width((node,)):
            for primitive in _MAKERS[kind](graph.shapes[node], fresh):
                yield Action(primitive, (node,))


def refusal(state: State, action: Action) -> str | None:
    """Return the name of the first rule that refuses an action; none: it is legal.

    Args:
        state: Where.
        action: What.
    """
    if not state.left:
        return "count"
    for name, refuses in RULES_BEFORE.items():
        if refuses(state, action):
            return name
    try:
        after = state.apply(action)
    except SearchError:
        return "shape"
    return next((name for name, refuses in RULES_AFTER.items() if refuses(after)), None)


def actions(state: State) -> tuple[Action, ...]:
    """Return all legal actions, in an order that is the same in every process."""
    found = (action for kind in kinds(state) for action in candidates(state, kind))
    return tuple(action for action in found if refusal(state, action) is None)


# Rows of primitives that want the same two sizes equal, so that these are matched once.
_JOINS: dict[str, tuple[tuple[Primitive, ...], ...]] = {
    "broadcast": (tuple(map(Broadcast, BROADCASTS)),),
    "bmm": tuple(
        tuple(Bmm(left, right, softmax) for softmax in (False, True))
        for left, right in product((False, True), repeat=2)
    ),
}


def _channel_metas(shape: Shape) -> list[int]:
    return [k for k, meta in enumerate(shape.metas) if isinstance(meta, Channel)]


def _new_channels(fresh: Variable | None) -> list[Variable]:
    return [C] if fresh is None else [C, fresh]


def _fcs(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    for meta, channels in product(_channel_metas(shape), _new_channels(fresh)):
        yield Fc(channels, meta)


def _convolutions(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    for kernel, dilation, channels in product(KERNEL_SIZES, DILATIONS, [None, *_new_channels(fresh)]):
        yield Convolution(kernel, dilation, channels)


def _mixes(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    """Yield maps of up to three dims onto the same sizes, and onto one new size in the first; Fc's are left to Fc."""
    flat = [
        tuple(dim for dim in shape.wide_dims if dim.meta == k)
        for k in _channel_metas(shape)
        if shape.size(DimName(k, "G")).is_one
    ]
    for count in range(1, _MOST_MIXED + 1):
        for dims in combinations(shape.wide_dims, count):
            sizes = tuple(map(shape.size, dims))
            if dims not in flat or sizes != (C,):
                yield Mix(dims, sizes)
            if dims not in flat and fresh is not None:
                yield Mix(dims, (fresh, *([ONE] * (count - 1))))


def _scales(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    """Yield a factor for every dim, and one for all dims together and for those that are channels together."""
    wide = shape.wide_dims
    channels = tuple(dim for dim in wide if isinstance(shape.metas[dim.meta], Channel))
    for dims in dict.fromkeys([*((dim,) for dim in wide), channels, wide]):
        if dims:
            yield Scale(dims)


def _dims_and_pairs(shape: Shape) -> Iterator[tuple[DimName, ...]]:
    wide = shape.wide_dims
    yield from ((dim,) for dim in wide)
    for k, meta in enumerate(shape.metas):
        pair = tuple(DimName(k, name) for name in (("H", "W") if isinstance(meta, Spatial) else ("KH", "KW")))
        if all(dim in wide for dim in pair):
            yield pair


def _folds(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    for dims, kind in product(_dims_and_pairs(shape), FOLDS):
        yield Fold(kind, dims)


def _unfolds(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    for over, kernel, dilation in product(("H", "W", "HW"), KERNEL_SIZES, DILATIONS):
        yield Unfold(over, kernel, dilation)


def _groups(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    factors = [G, C] if fresh is None else [G, C, fresh]
    for meta, factor in product(_channel_metas(shape), factors):
        yield Group(factor, meta)


def _shifts(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    for dims, distance in product(_dims_and_pairs(shape), DISTANCES):
        yield Shift(dims, distance)


def _softmaxes(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    return (Softmax(dim) for dim in shape.wide_dims)


def _activations(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    return map(Activation, ACTIVATIONS)


def _elementwise(shape: Shape, fresh: Variable | None) -> Iterator[Primitive]:
    return map(Elementwise, ELEMENTWISE)


_MAKERS: dict[str, Callable[[Shape, Variable | None], Iterator[Primitive]]] = {
    "fc": _fcs,
    "convolution": _convolutions,
    "mix": _mixes,
    "scale": _scales,
    "fold": _folds,
    "unfold": _unfolds,
    "group": _groups,
    "shift": _shifts,
    "softmax": _softmaxes,
    "activation": _activations,
    "elementwise": _elementwise,
}


def _breaks_width(state: State, action: Action) -> bool:
    """More open tensors than the plan allows, or than the primitives left can join to one."""
    return not state.fits_width(action.inputs)


def _breaks_weighted(state: State, action: Action) -> bool:
    """Too many weights, or too few that can still come."""
    return not state.may_weigh if action.primitive.weighted else state.must_weigh


def _lacks_bmm(state: State, action: Action) -> bool:
    """The last primitive of a kernel that must have a Bmm, and none is there."""
    has = any(isinstance(node.primitive, Bmm) for node in state.graph.nodes)
    return state.plan.needs_bmm and state.left == 1 and not has and not isinstance(action.primitive, Bmm)


def _is_duplicate(state: State, action: Action) -> bool:
    """The same without a weight is there already; two inputs of one shape may be swapped unless they are subtracted."""
    primitive, inputs = action.primitive, action.inputs
    if primitive.weighted:
        return False
    orders = {inputs}
    if isinstance(primitive, Broadcast) and primitive.kind != "sub":
        left, right = inputs
        if state.graph.shapes[left] == state.graph.shapes[right]:
            orders.add((right, left))
    return any(node.primitive == primitive and node.inputs in orders for node in state.graph.nodes)


# Second after first is the first alone, or no more than a sign or an abs.
_VOID = {
    (Activation("relu"), Activation("relu")),
    (Activation("sigmoid"), Activation("relu")),
    (Elementwise("abs"), Activation("relu")),
    (Elementwise("sqr"), Activation("relu")),
    (Elementwise("sqrt"), Activation("relu")),
    (Elementwise("exp"), Activation("relu")),
    (Activation("relu"), Elementwise("abs")),
    (Activation("sigmoid"), Elementwise("abs")),
    (Elementwise("abs"), Elementwise("abs")),
    (Elementwise("sqr"), Elementwise("abs")),
    (Elementwise("sqrt"), Elementwise("abs")),
    (Elementwise("exp"), Elementwise("abs")),
    (Elementwise("neg"), Elementwise("abs")),
    (Elementwise("neg"), Elementwise("neg")),
    (Elementwise("neg"), Elementwise("sqr")),
    (Elementwise("abs"), Elementwise("sqr")),
    (Elementwise("sqrt"), Elementwise("sqr")),
    (Elementwise("sqr"), Elementwise("sqrt")),
}


def _is_void(state: State, action: Action) -> bool:
    """A pair that undoes itself or does nothing twice, such as a double ReLU or the square of a root."""
    return any((state.graph.nodes[k].primitive, action.primitive) in _VOID for k in action.inputs)


def _is_of_itself(state: State, action: Action) -> bool:
    """A Broadcast of a tensor with itself: twice it, 0, itself, or its square, which Elementwise has."""
    return isinstance(action.primitive, Broadcast) and len(set(action.inputs)) == 1


def _follows_unfold(state: State, action: Action) -> bool:
    """Arithmetic right after a window: the same before it costs less."""
    if not isinstance(action.primitive, Activation | Elementwise):
        return False
    return isinstance(state.graph.nodes[action.inputs[0]].primitive, Unfold)


def _groups_by_one(state: State, action: Action) -> bool:
    """A Group whose factor is 1 at every place."""
    if not isinstance(action.primitive, Group) or not action.primitive.factor.is_static:
        return False
    target, factor = state.plan.target, action.primitive.factor
    return all(factor.value(extent, target.groups) == 1 for extent in target.extents)


def _is_not_whole(after: State) -> bool:
    """A size that is not whole at some place."""
    return not after.plan.target.admits_graph(after.graph)


def _has_many_dims(after: State) -> bool:
    """More dims than the limit."""
    return len(after.graph.shapes[-1].wide_dims) > after.plan.limits.dims


def _has_spatial_weight(graph: Graph) -> bool:
    sizes = (size for position in range(len(graph.nodes)) for size in graph.weight(position))
    return any(size.power("H") or size.power("W") for size in sizes)


def _weighs_space(after: State) -> bool:
    """A weight that depends on H or W."""
    return not after.plan.limits.spatial_weights and _has_spatial_weight(after.graph)


def _cannot_close(after: State) -> bool:
    """The last one leaves other than C*H*W elements, and no variable to solve for."""
    if after.left:
        return False
    return not any(True for _ in matches(after.graph, Output(), after.graph.open))


RULES_BEFORE: dict[str, Callable[[State, Action], bool]] = {
    "width": _breaks_width,
    "weighted": _breaks_weighted,
    "bmm": _lacks_bmm,
    "self": _is_of_itself,
    "unfold": _follows_unfold,
    "void": _is_void,
    "duplicate": _is_duplicate,
    "one group": _groups_by_one,
}
RULES_AFTER: dict[str, Callable[[State], bool]] = {
    "dims": _has_many_dims,
    "spatial weight": _weighs_space,
    "whole": _is_not_whole,
    "closing": _cannot_close,
}
