"""The page of an operator: the file, its mathematics, numbers, code and spec against the operator itself.

Formulas are read back from the page and evaluated beside the oracle, code is run, and the last test lets a browser lay
the page out, where there is one. The graph and the loop nests have files of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from operator_pages import Page, floor, operators, pad, rendered, svg
from operators_by_hand import CASES, begin

from cofire.errors import SearchError
from cofire.search import Assembler, Operator, Symbols
from cofire.search.cost import cost
from cofire.search.lowering import lower, write_source
from cofire.search.lowering.bound import Bound
from cofire.search.lowering.loop_nest import coordinate as oracle
from cofire.search.operator_io import from_spec
from cofire.search.page import render_page, write_page
from cofire.search.page.graph_figure import graph
from cofire.search.page.mathematics import coordinate, monomial
from cofire.search.primitives import Dim, Iterator, Unfold, without_shares
from cofire.spec import OperatorSpec
from cofire.spec.io import parse

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def three_mappings() -> Operator:
    """Operator 1 for the places of a small network."""
    build = Assembler(
        Symbols.of(
            ["B", "C_in", "D", "H"],
            ["g", "k"],
            [
                {"B": 1, "C_in": c, "D": d, "H": h, "g": 4, "k": 3}
                for c, d, h in ((8, 16, 14), (16, 16, 14), (32, 4, 7))
            ],
        )
    )
    b, d, h = build.output("B", "D", "H")
    group, a, c = build.reduce("g", "k", "C_in/g")
    (group,) = build.contract([group], [d])
    c, a = build.contract([c, a])
    return build.finish(b, build.split(group, c), build.unfold(h, a))


# -- the page as a file --------------------------------------------------------------------------------------------


def test_every_page_is_ascii_well_formed_and_needs_no_network() -> None:
    for name, operator in operators():
        text = rendered(name)
        page = Page(text)
        assert text.isascii(), name
        assert not [a for _, a in page.elements if {"src", "href", "srcset", "action"} & a.keys()], name
        assert "@import" not in text
        assert not re.search(r"url\((?!#)", text)
        assert "://" not in text
        assert f"{operator.digest:032x}" in text
        ElementTree.fromstring(svg(text))
        for piece in re.findall(r"<math.*?</math>", text):
            ElementTree.fromstring(piece)


def test_the_page_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, "tests/unit")
from pathlib import Path
from operators_by_hand import operator_1
from cofire.search.page import write_page
write_page(operator_1().operator, Path(sys.argv[1]))
"""
    root = Path(__file__).parents[2]
    for seed in "12":
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(command, check=True, cwd=root, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").read_text("ascii") == rendered("operator 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_without_torch_the_page_says_how_to_get_its_code(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from cofire.search import Assembler, Symbols
from cofire.search.page import write_page
build = Assembler(Symbols.of("MNK", "", [dict(M=2, N=3, K=4)]))
m, n = build.output("M", "N")
(k,) = build.contract(build.reduce("K"), [n])
write_page(build.finish(m, k), Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "page.html")], check=True)
    page = Page((tmp_path / "page.html").read_text("ascii"))
    (said,) = [text for text in page.all("p", class_="note") if "left out" in text]
    assert said == "The code is left out: PyTorch is not installed here; pip install 'cofire[train]' brings it."
    assert not page.all("pre", id="code")


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    operator = CASES["linear"]().operator
    with pytest.raises(SearchError, match=r"^mapping 1 of an operator with 1; count from 0 to 0$"):
        write_page(operator, tmp_path / "page.html", mapping=1)
    with pytest.raises(SearchError, match=r"^cannot write '.*none.page.html': No such file.*; name a file in a folder"):
        write_page(operator, tmp_path / "none" / "page.html")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_lowered_or_kept_is_said_on_the_page() -> None:
    build = begin("A", A=1)
    many = Page(render_page(build.finish(*build.output(*["A"] * 53))))
    assert any("The code is left out: 53 iterators" in text for text in many.all("p", class_="note"))
    symbols = Symbols.of(["M"], [], [{"M": 3}])
    i = Iterator(symbols.size("M"), 0)
    twice = Page(render_page(Operator(symbols, (i,), (), (i, i))))
    assert any("No spec can hold it" in text for text in twice.all("p", class_="note"))


def test_names_from_outside_are_escaped_and_shown_as_they_are() -> None:
    build = Assembler(Symbols.of(["\u00c7_\u00ef"], [], [{"\u00c7_\u00ef": 3}]))
    text = render_page(build.finish(build.shift(build.output("\u00c7_\u00ef")[0])))
    assert text.isascii()
    page = Page(text)
    assert ["\u00c7_\u00ef"] in page.rows()
    assert any("for i0 < \u00c7_\u00ef:" in code for code in page.all("pre"))
    # Characters that end an element or an attribute stand in the page's own texts: loops, arrows and quotes.
    raw = "".join(re.findall(r"<pre.*?</pre>", text, re.DOTALL))
    assert not re.search(r"<(?!/?(pre|span)\b)", raw)
    assert "&lt;" in raw
    assert "-&gt;" in raw


# -- mathematics -----------------------------------------------------------------------------------------------------


def test_mathematics_on_the_page_has_the_values_of_the_oracle() -> None:
    tested = 0
    for name, operator in operators():
        numbers = dict(zip(operator.symbols.names, operator.symbols.mappings[0], strict=True))
        rng = random.Random(name)
        dims = [*operator.input, *itertools.chain.from_iterable(operator.weights), *operator.expansions]
        for dim in dims:
            code = compile(python(ElementTree.fromstring(f"<m>{coordinate(dim)}</m>"), sizes_of(dim)), name, "eval")
            bare = without_shares(dim)
            for _ in range(12):
                point = {i: rng.randrange(i.size.value()) for i in sorted(bare.iterators)}
                names: dict[str, Any] = {str(i): Fraction(value) for i, value in point.items()}
                names |= {symbol: Fraction(value) for symbol, value in numbers.items()}
                value = eval(code, {"floor": floor, "pad": pad}, names)
                expected = oracle(bare, point)
                assert (None if math.isnan(value) else value) == expected, (name, str(dim))
                tested += 1
    assert tested > 3000


def test_the_formula_reads_every_tensor_in_its_order() -> None:
    for name, operator in operators():
        page = Page(rendered(name))
        (shown,) = page.all("p", class_="formula")
        named = ["y", "x", *(f"W{k}" for k in range(len(operator.weights)))]
        for tensor, dims in zip(named, (operator.output, operator.input, *operator.weights), strict=True):
            whole = f"{tensor}[{','.join(plain(coordinate(dim)) for dim in dims)}]" if dims else tensor
            assert whole in re.sub(r"\s", "", shown), name
        labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "p"]
        assert operator.formula() in labels, name


def test_a_window_over_what_is_only_repeated_is_told_beside_the_formula() -> None:
    page = Page(rendered("window of a repeat"))
    said = [re.sub(r"\s", "", text) for text in page.all("p", class_="note") if "Terms in which" in text]
    (mask,) = CASES["window of a repeat"]().operator.masks
    assert len(said) == 1
    assert plain(coordinate(mask)) in said[0]
    assert "Terms in which" not in rendered("operator 1")


def test_a_monomial_is_set_with_its_powers_and_indices() -> None:
    symbols = Symbols.of(["C_in"], ["g", "k"], [{"C_in": 8, "g": 2, "k": 3}])
    shown = monomial(symbols.size("C_in^2*k/g"))
    tree = ElementTree.fromstring(f"<m>{shown}</m>")
    assert plain(shown) == "Cin2\u00b7k/g"
    assert [element.tag for element in tree] == ["msup", "mo", "mi", "mo", "mi"]
    assert [element.text for element in tree[0][0]] == ["C", "in"]


class _Unknown(Dim):
    name = "unknown"

    def formula(self, latex: bool = False) -> str:
        return "?"


def test_an_unknown_primitive_is_one_line() -> None:
    symbols = Symbols.of(["M"], [], [{"M": 3}])
    i = Iterator(symbols.size("M"), 0)
    strange = _Unknown(i.size, (i,))
    with pytest.raises(SearchError, match=r"^_Unknown is not a primitive that can be shown; use"):
        coordinate(strange)
    with pytest.raises(SearchError, match=r"^_Unknown is not a primitive that can be drawn; use"):
        graph(Operator(symbols, (i,), (), (strange,)))


def sizes_of(dim: Dim) -> list[int]:
    """Sizes of the windows in a formula, in the order of their opening brackets."""
    own = [dim.size.value()] if isinstance(dim, Unfold) else []
    return own + [size for below in dim.below for size in sizes_of(below)]


def python(element: ElementTree.Element, windows: list[int]) -> str:
    """MathML as a Python expression; each padded bracket takes the next size of ``windows``."""
    signs = {"\u00b7": "*", "\u2212": "-", "\u230a": "floor(", "\u230b": ")", "mod": "%"}
    if element.tag == "mo":
        return signs.get(element.text or "", element.text or "")
    if element.tag == "msub":
        first, second = (part.text or "" for part in element)
        return first + second if first in "ir" else f"{first}_{second}"
    if element.tag == "msup":
        return f"{python(element[0], windows)}**{element[1].text}"
    if element.get("class") == "padded":
        size = windows.pop(0)
        inner = "".join(python(part, windows) for part in element[1:-1])
        return f"pad({inner}, {size})"
    return (element.text or "") + "".join(python(part, windows) for part in element)


def plain(fragment: str) -> str:
    return re.sub(r"\s", "", "".join(ElementTree.fromstring(f"<m>{fragment}</m>").itertext()))


# -- numbers, code and files ------------------------------------------------------------------------------------------


def test_tables_have_the_cost_of_every_mapping() -> None:
    operator = three_mappings()
    rows = {row[0]: row[1:] for row in Page(render_page(operator)).rows() if len(row) == 7}
    totals = np.zeros(4, dtype=int)
    for k, (c, d, h) in enumerate(((8, 16, 14), (16, 16, 14), (32, 4, 7))):
        found = cost(operator, k)
        parameters = 4 * d + c // 4 * 3
        naive, staged = 2 * 2 * d * h * c * 3, 2 * (h * c * 3 + d * h * 4)
        size = 4 * (c * h + d * h + parameters + 4 * h)
        assert found.parameters == parameters
        assert found.tensor_bytes() == size
        cells = [cell.replace(",", "") for cell in rows[f"mapping {k}"]]
        assert cells[:2] == [str(naive), str(staged)]
        assert cells[2:] == [f"{naive / staged:.3g}", str(parameters), str(size), f"{staged / size:.3g}"]
        totals += [naive, staged, parameters, size]
    cells = [int(cell.replace(",", "")) for n, cell in enumerate(rows["all, summed"]) if n not in (2, 5)]
    assert cells == totals.tolist()


def test_tables_have_the_shapes_of_every_tensor() -> None:
    rows = Page(render_page(three_mappings())).rows()
    assert ["x, input", "[B, C_in, H]", "1 x 8 x 14\n= 112", "1 x 16 x 14\n= 224", "1 x 32 x 7\n= 224"] in rows
    assert ["W0", "[g, D]", "4 x 16\n= 64", "4 x 16\n= 64", "4 x 4\n= 16"] in rows
    assert ["W1", "[C_in/g, k]", "2 x 3\n= 6", "4 x 3\n= 12", "8 x 3\n= 24"] in rows
    assert ["y, output", "[B, D, H]", "1 x 16 x 14\n= 224", "1 x 16 x 14\n= 224", "1 x 4 x 7\n= 28"] in rows
    assert ["mapping 2", "1", "32", "4", "7", "4", "3"] in rows


def test_the_chosen_mapping_gives_the_numbers_of_nests_and_code() -> None:
    operator = three_mappings()
    page = Page(render_page(operator, mapping=2))
    counts = [int(text.replace(",", "")) for text in page.all("span", class_="count")]
    found = cost(operator, 2)
    assert counts[-1] == found.naive_multiply_adds
    assert [nest for nest in page.all("figcaption") if f"{found.stages[0].multiply_adds:,} multiply-adds" in nest]
    assert page.all("pre", id="code") == [write_source(operator, 2)]
    assert any("Numbers are of mapping 2." in text for text in page.all("p", class_="said"))


@pytest.mark.parametrize("name", list(CASES))
def test_the_code_on_the_page_is_the_operator(name: str) -> None:
    operator = CASES[name]().operator
    page = Page(rendered(name))
    (source,) = page.all("pre", id="code")
    # The button shows itself by the script, which a reader may not run.
    assert [attributes for tag, attributes in page.elements if tag == "button" and "hidden" in attributes]
    assert source == write_source(operator)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    module = space["Operator"]().double()
    reference = lower(operator, backend="gather").double()
    with torch.no_grad():
        for own, other in zip(module.parameters(), reference.parameters(), strict=True):
            own.copy_(other)
        x = torch.randn(Bound(operator).input_shape, dtype=torch.float64)
        torch.testing.assert_close(module(x), reference(x), rtol=1e-10, atol=1e-10)


def test_the_spec_and_the_graphviz_source_on_the_page_are_the_operators() -> None:
    import tomllib

    for name, operator in operators():
        page = Page(rendered(name))
        (spec,) = page.all("pre", id="spec")
        assert from_spec(parse(OperatorSpec, tomllib.loads(spec))) == operator, name
        assert page.all("pre", id="graphviz") == [operator.graphviz()], name


def test_a_view_is_said_to_cost_nothing() -> None:
    page = Page(rendered("pixel shuffle"))
    assert "It is a view: it multiplies and adds nothing." in page.all("p", class_="verdict")[0]
    # Its last nest, which reads the output, is the only one.
    assert len(page.all("figure", class_="nest")) == 1


# -- a browser -------------------------------------------------------------------------------------------------------

ACT = """<script>
  window.addEventListener("error", (event) => document.body.append("FA" + "ULT " + event.message));
  const box = (mark) => { const b = mark.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; };
  const seen = {
    wide: document.documentElement.scrollWidth <= window.innerWidth,
    page: getComputedStyle(document.querySelector("main")).fontSize,
    copy: document.querySelector(".copy").hidden,
    math: [...document.querySelectorAll(".formula math")].map(box),
    formula: box(document.querySelector(".formula")),
    labels: [...document.querySelectorAll("svg.graph .node")].map((node) =>
      [box(node.querySelector("rect")), ...[...node.querySelectorAll("text")].map(box)]),
  };
  document.body.append("SE" + "EN" + JSON.stringify(seen) + "EN" + "D");
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [500, 1300])
def test_browser_lays_the_page_out_without_overflow(tmp_path: Path, width: int) -> None:
    copy = tmp_path / "page.html"
    copy.write_text(rendered("operator 2").replace("</body>", ACT), "ascii")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--disable-background-networking", "--no-first-run", "--disable-component-update", "--disable-sync"]
    command = [str(BROWSER), *flags, f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "FAULT" not in dom
    seen = json.loads(re.search(r"SEEN(\{.*?\})END", dom, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert seen["wide"]
    assert seen["page"] == "16px"
    assert seen["copy"] is False
    left, right, *_ = seen["formula"]
    assert all(left - 1 <= a < b <= right + 1 for a, b, *_ in seen["math"])
    for (x0, x1, y0, y1), *labels in seen["labels"]:
        for a, b, top, bottom in labels:
            assert x0 <= a < b <= x1
            assert y0 <= top < bottom <= y1
        for one, other in itertools.combinations(labels, 2):
            beside = one[1] <= other[0] or other[1] <= one[0]
            assert beside or min(one[3], other[3]) - max(one[2], other[2]) < 3
