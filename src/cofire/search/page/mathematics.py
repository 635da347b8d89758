"""Index expressions in MathML, which browsers set as mathematics without a script or a font of ours.

A tensor is one ``math`` element per coordinate with brackets and commas around them, so that a line may break after a
comma. Coordinates in square brackets are zero outside their dim, as in :meth:`Operator.formula`. Left out: a MathML
tree of the whole formula; the page has it in LaTeX too.
"""

from __future__ import annotations

from collections.abc import Sequence

from cofire.errors import SearchError
from cofire.plan.page.svg import tag, text
from cofire.search.graph import Operator
from cofire.search.primitives import (
    Dim,
    Iterator,
    MergeMajor,
    MergeMinor,
    Reduction,
    Share,
    Shift,
    Split,
    Stride,
    Unfold,
)
from cofire.search.sizes import Size

# How tightly an expression binds: one that binds less than its place needs is put in parentheses.
_REMAINDER, _SUM, _PRODUCT, _ATOM = range(4)

_TIMES, _MINUS, _SIGMA = "\u00b7", "\u2212", "\u2211"
_FLOOR_LEFT, _FLOOR_RIGHT = "\u230a", "\u230b"


def formula(operator: Operator) -> str:
    """Return the operator as a paragraph of mathematics.

    Args:
        operator: The operator.
    """
    factors = [tensor("x", None, operator.input)]
    factors += [tensor("W", number, dims) for number, dims in enumerate(operator.weights)]
    left = f'<span class="factor">{tensor("y", None, operator.output)} {math(_mo("="))}</span>'
    right = " ".join(tag("span", factor, class_="factor") for factor in factors)
    if operator.reductions:
        names = _mo(",").join(coordinate(dim) for dim in operator.reductions)
        total = f'<munder><mo movablelimits="false">{_SIGMA}</mo><mrow>{names}</mrow></munder>'
        left = f'{left} <span class="factor">{math(total, display=True)}</span>'
    return tag("p", f"{left} {right}", class_="formula", role="math", aria_label=operator.formula())


def ranges(dims: Sequence[Iterator]) -> str:
    """Return what iterators run over: ``i0 < B, i1 < D``."""
    return ", ".join(math(coordinate(dim) + _mo("<") + monomial(dim.size)) for dim in dims)


def tensor(name: str, number: int | None, dims: Sequence[Dim]) -> str:
    """Return a tensor read at coordinates, in pieces that a line may break between.

    Args:
        name: A letter.
        number: Its index, if it has one.
        dims: Coordinates, one per dim.
    """
    head = _mi(name) if number is None else f"<msub>{_mi(name)}<mn>{number}</mn></msub>"
    if not dims:
        return math(head)
    pieces = [coordinate(dim) + _mo("," if k < len(dims) - 1 else "]") for k, dim in enumerate(dims)]
    pieces[0] = head + _mo("[") + pieces[0]
    return " ".join(math(piece) for piece in pieces)


def math(body: str, display: bool = False) -> str:
    """Return a ``math`` element; ``display`` sets limits below a sum sign."""
    return tag("math", body, displaystyle="true" if display else None)


def coordinate(dim: Dim) -> str:
    """Return the MathML of a coordinate.

    Args:
        dim: Any dim; a Share is left out.

    Raises:
        SearchError: The dim is of no known primitive.
    """
    return _expression(dim)[0]


def monomial(size: Size) -> str:
    """Return the MathML of a size, such as ``C g^2 / k``."""
    powers = list(zip(size.symbols.names, size.exponents, strict=True))
    above = _mo(_TIMES).join(_power(name, count) for name, count in powers if count > 0)
    below = "".join(_mo("/") + _power(name, -count) for name, count in powers if count < 0)
    return (above or "<mn>1</mn>") + below


def _expression(dim: Dim) -> tuple[str, int]:
    """Return the MathML of a coordinate and how tightly it binds."""
    match dim:
        case Iterator():
            kind = "summed" if isinstance(dim, Reduction) else None
            letter = "r" if isinstance(dim, Reduction) else "i"
            return tag("msub", f"{_mi(letter)}<mn>{dim.index}</mn>", class_=kind), _ATOM
        case Share():
            return _expression(dim.source)
        case Split():
            minor = _within(dim.minor, _SUM)
            return _within(dim.major, _ATOM) + _mo(_TIMES) + _factor(dim.minor.size) + _mo("+") + minor, _SUM
        case MergeMajor():
            inner = _within(dim.source, _PRODUCT) + _mo("/") + _factor(dim.block)
            return _mo(_FLOOR_LEFT) + inner + _mo(_FLOOR_RIGHT), _ATOM
        case MergeMinor():
            return _within(dim.source, _PRODUCT) + _mod() + _factor(dim.block), _REMAINDER
        case Shift():
            sign = "+" if dim.distance > 0 else _MINUS
            moved = _mo("(") + _within(dim.source, _SUM) + _mo(sign) + f"<mn>{abs(dim.distance)}</mn>" + _mo(")")
            return moved + _mod() + _factor(dim.size), _REMAINDER
        case Stride():
            return _factor(dim.stride) + _mo(_TIMES) + _within(dim.source, _ATOM), _PRODUCT
        case Unfold():
            centre = _mo(_FLOOR_LEFT) + monomial(dim.window.size) + _mo("/") + "<mn>2</mn>" + _mo(_FLOOR_RIGHT)
            inner = _within(dim.source, _SUM) + _mo("+") + _within(dim.window, _SUM) + _mo(_MINUS) + centre
            return tag("mrow", _mo("[") + inner + _mo("]"), class_="padded"), _ATOM
    raise SearchError(f"{type(dim).__name__} is not a primitive that can be shown; use those of the assembler")


def _within(dim: Dim, least: int) -> str:
    shown, binding = _expression(dim)
    return shown if binding >= least else _mo("(") + shown + _mo(")")


def _factor(size: Size) -> str:
    shown = monomial(size)
    return shown if str(size).isidentifier() else _mo("(") + shown + _mo(")")


def _power(name: str, count: int) -> str:
    stem, _, index = name.partition("_")
    shown = f"<msub>{_mi(stem)}{_mi(index)}</msub>" if stem and index else _mi(name)
    return shown if count == 1 else f"<msup>{shown}<mn>{count}</mn></msup>"


def _mod() -> str:
    return '<mo lspace="0.3em" rspace="0.3em">mod</mo>'


def _mi(name: str) -> str:
    return tag("mi", text(name))


def _mo(sign: str) -> str:
    # Brackets keep the height of the line, or those of the tensors would outgrow their letters.
    fence = {"stretchy": "false"} if sign in "()[]" + _FLOOR_LEFT + _FLOOR_RIGHT else {}
    return tag("mo", text(sign), **fence)
