"""From a spec of a search to its space, and what is wrong with it before anything is searched.

A space that holds no operator is recognised in two ways. The bound of ``completion`` never exceeds what is needed:
where it is above the depth for every choice of reductions, nothing can end. Beyond that, small spaces are walked
through until an operator turns up or none is left; of large ones a part is looked at, and they are given the benefit of
the doubt. Where nothing can end, limits are relaxed one by one, and the first change that helps is named.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from fractions import Fraction
from itertools import product as cartesian

from cofire.errors import SearchError
from cofire.search.cost import costs
from cofire.search.graph import Operator
from cofire.search.interface import Interface
from cofire.search.operator_io import from_spec
from cofire.search.sampling import FINISH, Moves
from cofire.search.sizes import Allowance, Size, Symbols
from cofire.search.space import Space
from cofire.spec.search import SearchSpec

_LOOKED_AT = 4000  # interfaces that are tested before a space is given the benefit of the doubt; about a second
_LOOKED_AT_RELAXED = 800  # the same of each space with a limit relaxed: there are some forty
_DEEPER = 6  # steps more that are tried before other limits are
_MORE = 3  # of a symbol, of reductions, of primitives in a chain


def space_of(spec: SearchSpec) -> Space:
    """Return the space that a spec says.

    Args:
        spec: Symbols, shapes, allowance and limits.

    Raises:
        SearchError: A size is no monomial in the symbols or not whole, a coefficient is of no use, or no operator can
            read the whole input.
    """
    symbols = Symbols.of(spec.primary, spec.coefficient, spec.mappings)
    space = Space(
        tuple(_size(symbols, text, f"input.{position}") for position, text in enumerate(spec.input)),
        tuple(_size(symbols, text, f"output.{position}") for position, text in enumerate(spec.output)),
        Allowance.of(symbols, spec.allowance),
        fixed=spec.fixed,
        unordered_input=frozenset(spec.unordered_input),
        unordered_output=frozenset(spec.unordered_output),
        **spec.limits.model_dump(),
    )
    _check_coefficients(space)
    return space


def _size(symbols: Symbols, text: str, where: str) -> Size:
    """Read a size of a shape; one that is not whole names the number that would make it so."""
    try:
        size = symbols.size(text)
    except SearchError as error:
        raise SearchError(f"{where}: {error}") from None
    if size.is_legal:
        return size
    for row, (value, mapping) in enumerate(zip(size.values, symbols.mappings, strict=True)):
        if value.denominator == 1 and value >= 1:
            continue
        name, number = _divided(size, mapping)
        least = max(1, round(Fraction(number, value.denominator))) * value.denominator
        raise SearchError(
            f"{where} = {text} is {value} in mappings.{row}, but a size must be whole; take {name} = {least}, for "
            f"example, instead of {number}"
        )
    raise SearchError(
        f"{where} = {text} is no size: coefficients alone divide, and only beside a primary symbol; write Ci/g"
    )


def _divided(size: Size, mapping: tuple[int, ...]) -> tuple[str, int]:
    """Return the first symbol above the line and its number."""
    names = size.symbols.names
    index = next((k for k, power in enumerate(size.exponents) if power > 0), 0)
    return names[index], mapping[index]


def _check_coefficients(space: Space) -> None:
    """Refuse a coefficient that is allowed and that nothing can be done with under these mappings."""
    symbols = space.allowance.symbols
    first = len(symbols.primary)
    for index, name in enumerate(symbols.coefficient, first):
        shaped = any(size.exponents[index] for size in (*space.input, *space.output))
        size = symbols.size(name)
        if not space.allowance.left[index] or shaped or _is_window(size, space) or _is_low_rank(size, space):
            continue
        if space.max_strides != 0 or any(divided.exponents[index] < 0 for divided in _divisions(space)):
            continue
        numbers = ", ".join(str(value) for value in size.values)
        longest = max((dim.size.smallest for dim in space.free_iterators), default=0)
        odd = " odd and" if space.odd_windows else ""
        most = min(space.max_window, int(longest / Fraction(space.min_unfold_ratio)))
        raise SearchError(
            f"{name} = {numbers} divides none of {', '.join(symbols.primary)} in every mapping and is no window, which "
            f"is{odd} at most {most} here; take a divisor, or leave {name} out of the allowance"
        )


def _is_window(size: Size, space: Space) -> bool:
    if space.max_unfolds == 0 or size.largest > space.max_window:
        return False
    if space.odd_windows and any(value % 2 == 0 for value in size.values):
        return False
    ratio = Fraction(space.min_unfold_ratio)
    products = (s for s in _divisions(space) if s.is_legal)
    sources = (*(dim.size for dim in space.free_iterators), *space.desired, *products)
    return any(all(n >= ratio * k for n, k in zip(s.values, size.values, strict=True)) for s in sources)


def _is_low_rank(size: Size, space: Space) -> bool:
    return space.max_tensors > 2 and space.low_rank[0] <= size.largest <= space.low_rank[1]


def _divisions(space: Space) -> Generator[Size, None, None]:
    """Yield whole sizes of one primary, each coefficient times, under the line or absent, and products in shapes."""
    symbols = space.allowance.symbols
    wholes = [symbols.size(name) for name in symbols.primary]
    wholes += [size for size in (*space.input, *space.output) if size.degree > 1]
    for powers in cartesian((-1, 0, 1), repeat=len(symbols.coefficient)):
        factor = symbols.from_exponents((*([0] * len(symbols.primary)), *powers))
        for whole in wholes:
            if (whole * factor).is_legal:
                yield whole * factor


def baseline_of(spec: SearchSpec, space: Space) -> Operator | None:
    """Return the operator that a window measures against, at the numbers of the search, or none where there is none.

    Args:
        spec: Names the baseline in ``window.operator``.
        space: Its space.

    Raises:
        SearchError: The baseline has other symbols or other shapes than the search.
    """
    named = spec.window.operator
    if named is None:
        return None
    unknown = [name for name in (*named.primary, *named.coefficient) if name not in (*spec.primary, *spec.coefficient)]
    if unknown:
        raise SearchError(
            f"window.operator = {named.name!r} has the symbol {unknown[0]}, the search has "
            f"{', '.join((*spec.primary, *spec.coefficient))}; write the baseline in these"
        )
    symbols = {"primary": spec.primary, "coefficient": spec.coefficient, "mappings": spec.mappings}
    operator = from_spec(named.model_copy(update=symbols))
    for name, found, wanted in (
        ("input", operator.input_shape, space.input),
        ("output", operator.output_shape, space.output),
    ):
        if found != wanted:
            raise SearchError(
                f"window.operator = {named.name!r} has the {name} [{', '.join(map(str, found))}], the search "
                f"[{', '.join(map(str, wanted))}]; a baseline does the same job"
            )
    return operator


def total_multiply_adds(operator: Operator) -> int:
    """Return the multiply-adds of the cheapest stages, summed over all mappings."""
    return sum(found.multiply_adds for found in costs(operator))


def check_solvable(space: Space, depth: int) -> None:
    """Refuse a space that is known to hold no operator, and name a change that would give it one.

    Args:
        space: The space.
        depth: Most steps.

    Raises:
        SearchError: No operator exists.
    """
    if _holds_operator(space, depth, _LOOKED_AT) is not False:
        return
    for more in range(1, _DEEPER + 1):
        if _holds_operator(space, depth + more, _LOOKED_AT_RELAXED):
            raise SearchError(f"no operator within depth = {depth}; one exists with depth = {depth + more}")
    for more in (0, _DEEPER):
        for text, relaxed in _relaxations(space):
            if _holds_operator(relaxed, depth + more, _LOOKED_AT_RELAXED):
                deeper = f" and depth = {depth + more}" if more else ""
                raise SearchError(f"no operator within the limits at depth = {depth}; one exists with {text}{deeper}")
    raise SearchError(
        f"no operator within the limits at depth = {depth}, nor with any one limit relaxed; raise the allowance of the "
        "symbols that the input has and the output has not, and those of the output once"
    )


def _relaxations(space: Space) -> Generator[tuple[str, Space], None, None]:
    """Yield spaces with one limit relaxed, and what to write for it."""
    for name in ("max_splits", "max_merges", "max_unfolds", "max_shifts"):
        if getattr(space, name) is not None:
            yield f"limits.{name} = none", replace(space, **{name: None})
    for name in ("max_reductions", "max_chain", "max_tensors"):
        for more in range(1, _MORE + 1):
            value = getattr(space, name) + more
            yield f"limits.{name} = {value}", replace(space, **{name: value})
    for index, name in enumerate(space.allowance.symbols.names):
        left = space.allowance.left
        for more in range(1, _MORE + 1):
            counts = (*left[:index], left[index] + more, *left[index + 1 :])
            yield f"allowance.{name} = {counts[index]}", replace(space, allowance=replace(space.allowance, left=counts))
    largest = max(int(size.largest) for size in (*space.input, *space.output))
    for name, value in (("max_outer", largest), ("min_weight", 1), ("max_pooling", largest)):
        yield f"limits.{name} = {value}", replace(space, **{name: value})
    for name in ("needs_matmul", "needs_weight"):
        if getattr(space, name):
            yield f"limits.{name} = false", replace(space, **{name: False})


def _holds_operator(space: Space, depth: int, most: int) -> bool | None:
    """Whether a space holds an operator; none: not known after ``most`` interfaces."""
    moves = Moves(space, depth)
    frontier, seen, tested = [moves.root], {moves.root.digest}, 0
    while frontier:
        state = frontier.pop()
        for after in _children(moves, state):
            if isinstance(after, Operator):
                return True
            tested += 1
            if tested > most:
                return None
            if after.digest in seen:
                continue
            seen.add(after.digest)
            # Reductions come first, and each raises the distance that the views after it lower again.
            if moves.may_end(after) or len(after.reductions) == after.depth:
                frontier.append(after)
    return False


def _children(moves: Moves, state: Interface) -> Generator[Interface | Operator, None, None]:
    for kind in moves.kinds(state):
        if kind == FINISH:
            yield from moves.ends(state)
        else:
            yield from moves.candidates(state, kind)
