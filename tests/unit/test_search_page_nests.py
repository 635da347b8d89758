"""The loop nests on an operator's page, run as they are written there and compared with the oracle."""

from __future__ import annotations

import ast
import itertools
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from operator_pages import Page, floor, operators, pad, rendered
from operators_by_hand import CASES

from cofire.search import Operator
from cofire.search.cost import cost
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.loop_nest import loop_nest
from cofire.search.page.nests import staged_nests

MAX_POINTS = 6000


class NoWidthError(Exception):
    """A padded bracket deep in an expression does not say the size of its dim."""


def test_nests_on_the_page_run_as_they_are_give_the_operator() -> None:
    rng, tested, staged = np.random.default_rng(0), 0, 0
    for name, operator in operators():
        if cost(operator).naive_multiply_adds > MAX_POINTS:
            continue
        page = Page(rendered(name))
        codes = page.all("figure", class_="nest")
        nests = [code for code in page.all("pre") if "for " in code and any(code in each for each in codes)]
        bound = Bound(operator)
        x, *weights = (rng.standard_normal(shape) for shape in (bound.input_shape, *bound.weight_shapes))
        tensors: dict[str, Any] = {"x": x, **{f"W{k}": weight for k, weight in enumerate(weights)}}
        tensors |= {f"M{k}": np.ones(bound.size(dim)) for k, dim in enumerate(bound.masks)}
        exact = loop_nest(operator, x, weights)
        try:
            # The naive nest comes last; where it is the only one, it is the only stage too.
            for part in ([nests[-1]], nests[:-1] or nests):
                assert run(operator, part, dict(tensors)) == pytest.approx(exact), name
        except NoWidthError:
            continue
        tested += 1
        staged += len(nests) > 2
    assert tested > 75
    assert staged > 25


def run(operator: Operator, nests: list[str], tensors: dict[str, Any]) -> np.ndarray:
    """Run nests in their order and return y."""
    symbols = dict(zip(operator.symbols.names, map(Fraction, operator.symbols.mappings[0]), strict=True))
    values: dict[str, Any] = {**symbols, "floor": floor, "pad": pad, "product": itertools.product, "read": read}
    for nest in nests:
        code = as_python(nest)
        written = re.findall(r"^ *(\w+)(?:\[.*\])? = ", code, re.MULTILINE)[-1]
        tensors[written] = {}
        tree = ast.fix_missing_locations(_Reads(symbols, tensors).visit(ast.parse(code)))
        names = values | tensors
        exec(compile(tree, "nest", "exec"), names)
        tensors[written] = names[written]
    found = np.zeros(tuple(dim.size.value() for dim in operator.output))
    for at, value in tensors["y"].items():
        found[at] = value
    return found


def as_python(nest: str) -> str:
    """Pseudo-code with its lines joined, and its loops, div and mod as Python's."""
    lines: list[str] = []
    for line in nest.splitlines():
        if lines and (lines[-1].endswith(",") or line.strip().startswith("* ")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    found = []
    for line in lines:
        indent, rest = re.match(r"( *)(.*)", line).groups()  # type: ignore[union-attr]
        if rest.startswith("for "):
            pairs = [part.split(" < ") for part in rest[4:-1].split(", ")]
            names, spans = (", ".join(each) for each in zip(*((n, f"range(int({s}))") for n, s in pairs), strict=True))
            rest = f"for {names}, in product({spans}):"
        found.append(indent + rest.replace(" div ", " // ").replace(" mod ", " % ").replace("^", "**"))
    return "\n".join(found)


class _Reads(ast.NodeTransformer):
    """Reads become calls that know zero padding; what a bracket pads with follows from where it stands."""

    def __init__(self, symbols: dict[str, Fraction], tensors: dict[str, Any]) -> None:
        self.symbols, self.tensors = symbols, tensors

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        assert isinstance(node.value, ast.Name)
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if isinstance(node.ctx, ast.Store):
            node.slice = ast.Tuple(index, ast.Load())
            return node
        shape = extents(self.tensors[node.value.id])
        made = [self.padded(part, size) for part, size in zip(index, shape, strict=True)]
        return ast.Call(ast.Name("read", ast.Load()), [node.value, ast.Tuple(made, ast.Load())], [])

    def padded(self, node: ast.expr, size: int | None) -> ast.expr:
        if isinstance(node, ast.List):
            if size is None:
                raise NoWidthError
            inner = self.padded(node.elts[0], None)
            return ast.Call(ast.Name("pad", ast.Load()), [inner, ast.Constant(size)], [])
        if isinstance(node, ast.BinOp):
            # (i + d) mod N: the bracket in it is of size N too.
            is_shift = isinstance(node.op, ast.Mod) and isinstance(node.left, ast.BinOp)
            if is_shift and isinstance(node.left, ast.BinOp) and isinstance(node.left.left, ast.List):
                whole = eval(compile(ast.Expression(node.right), "size", "eval"), dict(self.symbols))
                node.left.left = self.padded(node.left.left, int(whole))
                return node
            node.left, node.right = self.padded(node.left, None), self.padded(node.right, None)
        return node


def extents(tensor: Any) -> tuple[int, ...]:
    if isinstance(tensor, dict):
        return tuple(max(part) + 1 for part in zip(*tensor, strict=True))
    return tensor.shape


def read(tensor: Any, place: tuple[Any, ...]) -> float:
    if any(math.isnan(part) for part in place):
        return 0.0
    return float(tensor[tuple(int(part) for part in place)])


def test_stages_on_the_page_have_the_multiply_adds_of_the_cost() -> None:
    for name in ("operator 1", "operator 2", "depthwise separable", "sliding average pooling"):
        operator = CASES[name]().operator
        found = cost(operator)
        page = Page(rendered(name))
        counts = [int(text.replace(",", "")) for text in page.all("span", class_="count")]
        stages = [stage.multiply_adds for stage in found.stages]
        assert counts == [*stages, sum(stages), found.naive_multiply_adds], name
        widths = [float(w) for w in re.findall(r'style="width: ([\d.]+)%"', rendered(name))]
        assert widths == pytest.approx([max(100 * count / max(counts), 0.4) for count in counts], abs=0.006), name
        for nest, stage in zip(staged_nests(operator, found), found.stages, strict=True):
            assert (nest.multiply_adds, nest.result_elements) == (stage.multiply_adds, stage.result_elements), name


def test_an_operator_of_one_nest_shows_it_once() -> None:
    page = Page(rendered("conv2d k=3"))
    assert len(page.all("figure", class_="nest")) == 1
    assert not page.all("span", class_="count")


def test_no_line_of_a_nest_is_longer_than_half_the_page() -> None:
    for name, operator in operators():
        for nest in staged_nests(operator, cost(operator)):
            for line in nest.code.splitlines():
                assert len(line) <= 58 or "," not in line.strip()[:-1], (name, line)
