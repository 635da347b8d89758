"""The primitive graph on an operator's page: boxes and edges against the primitives of its spec, and where they lie.

Geometry is taken from the SVG of the page.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from functools import cache
from typing import Any
from xml.etree import ElementTree

import pytest
from operator_pages import all_operators, operators, rendered, svg

from cofire.search import Assembler, Operator, Symbols
from cofire.search.operator_io import to_spec
from cofire.search.page import render_page
from cofire.search.page.layers import place
from cofire.search.primitives import Dim, Iterator, Reduction


class Drawn:
    """Boxes and edges as they lie in the SVG of a page."""

    def __init__(self, text: str) -> None:
        root = ElementTree.fromstring(svg(text))
        self.width, self.height = map(float, (root.get("viewBox") or "").split()[2:])
        self.boxes: dict[str, tuple[float, float, float, float]] = {}
        self.titles: dict[str, str] = {}
        for group in root.iter("g"):
            rect, key = group.find("rect"), group.get("data-box")
            assert rect is not None
            assert key is not None
            x, y, width, height = (float(rect.get(name) or "") for name in ("x", "y", "width", "height"))
            self.boxes[key] = (x, y, x + width, y + height)
            self.titles[key] = next(text.text or "" for text in group.iter("text") if text.get("class") == "name")
        self.ports = [
            (group.get("data-box"), float(text.get("x") or ""), text.text)
            for group in root.iter("g")
            for text in group.iter("text")
            if text.get("class") == "port"
        ]
        self.edges = [
            (p.get("data-from") or "", p.get("data-to") or "", (p.findtext("title") or "").split("\n")[0], points(p))
            for p in root.iter("path")
        ]


@cache
def drawn_page(name: str) -> Drawn:
    return Drawn(rendered(name))


def points(path: ElementTree.Element) -> list[tuple[float, float]]:
    """Points along a path of curves and vertical lines, close together."""
    found: list[tuple[float, float]] = []
    for letter, rest in re.findall(r"([MCV])([^MCV]*)", path.get("d") or ""):
        numbers = [float(number) for number in rest.split()]
        if letter == "M":
            found.append((numbers[0], numbers[1]))
        elif letter == "V":
            x, y = found[-1]
            found += [(x, y + (numbers[0] - y) * t / 12) for t in range(1, 13)]
        else:
            corners = [found[-1], *zip(numbers[::2], numbers[1::2], strict=True)]
            for t in (k / 24 for k in range(1, 25)):
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                found.append(tuple(sum(w * c[a] for w, c in zip(weights, corners, strict=True)) for a in (0, 1)))  # type: ignore[arg-type]
    return found


def test_every_primitive_and_tensor_is_one_box() -> None:
    for name, operator in operators():
        drawn = Counter(drawn_page(name).titles.values())
        assert drawn == Counter(expected(operator)[0]), name


def test_every_dim_is_one_edge_from_what_makes_it_to_what_takes_it() -> None:
    for name, operator in operators():
        drawn = drawn_page(name)
        edges = Counter((drawn.titles[low], drawn.titles[high], dim) for low, high, dim, _ in drawn.edges)
        assert edges == Counter(expected(operator)[1]), name


def test_ports_name_the_dim_that_enters_or_leaves_there() -> None:
    named = set()
    for name in ("operator 2", "gpt-2"):
        drawn = drawn_page(name)
        for low, high, dim, path in drawn.edges:
            for key, x, port in drawn.ports:
                if (key, x) in ((low, path[0][0]), (high, path[-1][0])):
                    named.add((port, dim))
    assert named == {
        *(("major", "r0"), ("minor", "r3")),
        *(("place", "i2"), ("window", "r1"), ("place", "i3"), ("window", "r4")),
        *(("div", "(i2) div (q*t)"), ("mod", "(i2) mod (q*t)")),
        *(("div", "((i2) mod (q*t)) div (t)"), ("mod", "((i2) mod (q*t)) mod (t)")),
        *(("major", "((i2) mod (q*t)) div (t)"), ("minor", "r0")),
    }


def test_a_weight_that_no_share_marks_is_joined_to_its_dim() -> None:
    symbols = Symbols.of(["M", "K"], [], [{"M": 3, "K": 2}])
    i, r = Iterator(symbols.size("M"), 0), Reduction(symbols.size("K"), 0)
    drawn = Drawn(render_page(Operator(symbols, (i,), (r,), (i, r), ((r,),))))
    edges = sorted((drawn.titles[low], drawn.titles[high]) for low, high, *_ in drawn.edges)
    assert edges == [("Reduce r0", "W0"), ("Reduce r0", "x"), ("i0", "x")]


def test_boxes_do_not_overlap_and_no_edge_passes_through_one() -> None:
    for name in all_operators():
        drawn = drawn_page(name)
        for (x0, y0, x1, y1), (u0, v0, u1, v1) in itertools.combinations(drawn.boxes.values(), 2):
            assert x1 + 10 <= u0 or u1 + 10 <= x0 or y1 + 10 <= v0 or v1 + 10 <= y0, name
        for x0, y0, x1, y1 in drawn.boxes.values():
            assert 0 <= x0 < x1 <= drawn.width, name
            assert 0 <= y0 < y1 <= drawn.height, name
        for low, high, _, path in drawn.edges:
            (x, y), (u, v) = path[0], path[-1]
            lower, upper = drawn.boxes[low], drawn.boxes[high]
            assert y == lower[1], name
            assert lower[0] < x < lower[2], name
            assert v == upper[3], name
            assert upper[0] < u < upper[2], name
            for x0, y0, x1, y1 in drawn.boxes.values():
                assert not any(x0 - 1 < a < x1 + 1 and y0 + 0.2 < b < y1 - 0.2 for a, b in path), name


def test_output_is_at_the_bottom_and_input_and_weights_are_at_the_top() -> None:
    drawn = drawn_page("operator 1")
    by_title = {title: drawn.boxes[key] for key, title in drawn.titles.items()}
    lowest, highest = max(box[1] for box in by_title.values()), min(box[1] for box in by_title.values())
    assert {title for title, box in by_title.items() if box[1] == highest} == {"x", "W0", "W1"}
    assert {title for title, box in by_title.items() if box[1] == lowest} >= {"i0", "i1", "i2", "i3"}


def test_few_edges_cross_beside_the_fewest_of_all_orders() -> None:
    drawn = fewest = 0
    for seed in range(25):
        rng = random.Random(seed)
        layers = [layer for layer, count in enumerate((4, 4, 3)) for _ in range(count)]
        edges = [(rng.randrange(4), rng.randrange(4, 8)) for _ in range(5)]
        edges += [(rng.randrange(4, 8), rng.randrange(8, 11)) for _ in range(5)]
        placed = place([30.0] * len(layers), layers, edges)
        drawn += crossings(edges, placed.centres)
        orders = itertools.product(*(itertools.permutations(range(n)) for n in (4, 4, 3)))
        fewest += min(crossings(edges, [*a, *b, *c]) for a, b, c in orders)
    assert fewest <= drawn <= 1.15 * fewest + 1


def crossings(edges: list[tuple[int, int]], places: Any) -> int:
    pairs = itertools.combinations(edges, 2)
    beside = [(a, b) for a, b in pairs if (a[0] < 4) == (b[0] < 4)]
    return sum((places[a[0]] - places[b[0]]) * (places[a[1]] - places[b[1]]) < 0 for a, b in beside)


def test_boxes_keep_to_the_order_given_where_nothing_crosses() -> None:
    placed = place([40.0] * 6, [0, 0, 0, 1, 1, 1], [(0, 5), (1, 4), (2, 3)])
    assert placed.centres[0] < placed.centres[1] < placed.centres[2]
    assert placed.centres[5] < placed.centres[4] < placed.centres[3]


def test_a_long_edge_beside_a_column_of_boxes_is_straight() -> None:
    # Boxes 0 to 3 on each other, and an edge from 0 to 3 that passes 1 and 2.
    placed = place([60.0] * 4, [0, 1, 2, 3], [(0, 1), (1, 2), (2, 3), (0, 3)])
    route = placed.routes[3]
    assert len(route) == 4
    assert route[1] == pytest.approx(route[2], abs=1.0)
    for box in (1, 2):
        assert abs(route[box] - placed.centres[box]) >= 30 + 5 + 20
    assert all(30 <= x <= placed.width - 30 for x in placed.centres)


def expected(operator: Operator) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Titles of boxes, and edges as titles and coordinate, from the primitives of the operator's spec."""
    spec = to_spec(operator)
    build = Assembler(operator.symbols)
    weights = {name: k for k, row in enumerate(spec.weights) for name in row}
    for _ in spec.weights:
        build.weight()
    dims: dict[str, Dim] = {}
    makers: dict[str, str] = {}
    titles, edges = ["x", *(f"W{k}" for k in range(len(spec.weights)))], []
    for step in spec.primitives:
        taken = [dims[name] for name in step.dims]
        made: Any = ()
        match step.primitive:
            case "output" | "reduce":
                made = getattr(build, step.primitive)(step.size)
                title = f"{made[0]}" if step.primitive == "output" else f"Reduce {made[0]}"
            case "split" | "unfold":
                made, title = (getattr(build, step.primitive)(*taken),), step.primitive.title()
            case "merge":
                made, title = build.merge(taken[0], step.size or ""), "Merge"
            case "shift":
                made, title = (build.shift(taken[0], step.distance or 0),), f"Shift {step.distance:+d}"
            case "stride":
                made, title = (build.stride(taken[0], step.size or ""),), f"Stride {step.size}"
            case "share":
                weight = weights[step.dims[0]]
                made, title = (build.share(taken[0], weight),), f"Share W{weight}"
                edges.append((title, f"W{weight}", str(taken[0])))
            case "expand":
                title = "Expand"
        titles.append(title)
        edges += [(makers[name], title, str(dims[name])) for name in step.dims]
        dims |= zip(step.makes, made, strict=True)
        makers |= dict.fromkeys(step.makes, title)
    return titles, edges + [(makers[name], "x", str(dims[name])) for name in spec.input]
