"""Operators in files: an operator, its spec and its text say the same, and a bad file is one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operators_by_hand import CASES, begin, random_operator

from cofire.errors import SearchError, SpecError
from cofire.search import Allowance, Operator, Space, Symbols, enumerate_operators
from cofire.search.operator_io import from_spec, to_spec
from cofire.spec import OperatorSpec, PrimitiveSpec, dump, json_schema, load, load_as, parse, save

MATRIX_PRODUCT = """
kind = "operator"
name = "matrix product"
primary = ["M", "N", "K"]
mappings = [{ M = 4, N = 6, K = 8 }]
input = ["i0", "d0"]
weights = [["r0", "i1"]]
primitives = [
    { primitive = "output", size = "M", makes = ["i0"] },
    { primitive = "output", size = "N", makes = ["i1"] },
    { primitive = "reduce", size = "K", makes = ["r0"] },
    { primitive = "share", dims = ["r0"], makes = ["d0"] },
    { primitive = "share", dims = ["i1"], makes = ["d1"] },
    { primitive = "expand", dims = ["d1"] },
]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "o.toml"
    path.write_text(text)
    return str(path)


def assert_same(found: Operator, operator: Operator) -> None:
    assert found.digest == operator.digest
    assert found == operator
    # The digest leaves the order of a weight's dims open; parameters in a file do not.
    assert found.weights == operator.weights


@pytest.mark.parametrize("name", list(CASES))
def test_an_operator_by_hand_comes_back_from_its_spec(name: str) -> None:
    operator = CASES[name]().operator
    assert_same(from_spec(to_spec(operator)), operator)


@given(seed=st.integers(0, 10**6), form=st.sampled_from(["toml", "json"]))
@settings(max_examples=60, deadline=None)
def test_a_random_operator_comes_back_from_its_file(tmp_path_factory, seed: int, form: str) -> None:
    operator = random_operator(seed)
    path = tmp_path_factory.mktemp("operators") / f"o.{form}"
    spec = to_spec(operator, name="found", description=f"seed {seed}")
    save(spec, path)
    again = load_as(OperatorSpec, path)
    assert again == spec
    assert dump(again) == dump(spec)
    assert_same(from_spec(again), operator)


def test_an_operator_of_an_enumeration_comes_back_with_its_layout() -> None:
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in ("N", "Ci", "Co", "H"))
    allowance = Allowance.of(symbols, {"Ci": 2, "Co": 1, "H": 0, "k": 2})
    found = list(enumerate_operators(Space((n, ci, h), (n, co, h), allowance, fixed=((0, 0),)), depth=5))
    assert len(found) > 3
    for operator in found:
        assert_same(from_spec(to_spec(operator)), operator)


def test_the_order_of_a_weight_is_kept_against_that_of_its_shares() -> None:
    operator = CASES["weight on its diagonal"]().operator
    turned = replace(operator, weights=tuple(weight[::-1] for weight in operator.weights))
    assert_same(from_spec(to_spec(turned)), turned)


def test_a_file_written_by_hand_is_the_operator_of_the_assembler(tmp_path: Path) -> None:
    build = begin("M N K", M=4, N=6, K=8)
    m, n = build.output("M", "N")
    (k,) = build.reduce("K")
    (k,) = build.contract([k], [n])
    spec = load(write(tmp_path, MATRIX_PRODUCT))
    assert isinstance(spec, OperatorSpec)
    assert_same(from_spec(spec), build.finish(m, k))


def test_a_file_holds_no_field_that_a_primitive_does_not_have() -> None:
    _, *primitives = dump(to_spec(CASES["linear"]().operator)).split("[[primitives]]")
    assert len(primitives) == 7
    for text in primitives:
        assert "[]" not in text
        assert "distance" not in text


def test_a_spec_is_the_same_in_every_process_and_needs_no_torch() -> None:
    code = (
        "import sys; from cofire.search import Assembler, Symbols; from cofire.search.operator_io import to_spec;"
        "from cofire.spec import dump; b = Assembler(Symbols.of('BCH', 'k', [dict(B=2, C=3, H=5, k=3)]));"
        "n, c, h = b.output('B', 'C', 'H'); a, = b.reduce('k'); c, a = b.contract([c, a]);"
        "print(dump(to_spec(b.finish(n, c, b.unfold(h, a))))); assert 'torch' not in sys.modules"
    )
    texts = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_the_schema_names_every_primitive() -> None:
    schema = json_schema("operator")
    names = schema["$defs"]["PrimitiveSpec"]["properties"]["primitive"]["enum"]
    assert names == ["output", "reduce", "split", "merge", "shift", "unfold", "stride", "share", "expand"]


SHARE = '{ primitive = "share", dims = ["r0"], makes = ["d0"] }'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"share", dims = ["r0"]', '"shrae", dims = ["r0"]', "primitives.3.primitive = 'shrae' is not one of output"),
        (SHARE, '{ primitive = "split", dims = ["r0"], makes = ["d0"] }', "dims = ['r0'] of split must hold 2 names"),
        (SHARE, '{ primitive = "share", dims = ["r0"], makes = [] }', "makes = [] of share must hold 1 names"),
        (SHARE, '{ primitive = "stride", dims = ["r0"], makes = ["d0"] }', "size must be given to stride"),
        (SHARE, '{ primitive = "share", dims = ["r0"], makes = ["d0"], size = "K" }', "size must be left out of share"),
        (SHARE, '{ primitive = "shift", dims = ["r0"], makes = ["d0"], distance = 0 }', "distance = 0 of shift must"),
        (SHARE, '{ primitive = "shift", dims = ["r0"], makes = ["d0"] }', "distance must be given to shift"),
        ('dims = ["r0"]', 'dims = ["r1"]', "primitives.3.dims: dim 'r1' was not made before; on the interface: i0"),
        ('dims = ["i1"]', 'dims = ["r0"]', "primitives.4.dims: dim 'r0' was used already; on the interface: i0, i1"),
        ('makes = ["d1"]', 'makes = ["d0"]', "primitives.4.makes: dim 'd0' is made twice; pick another name"),
        ('input = ["i0", "d0"]', 'input = ["i0"]', "dim d0 is left over; name it in input, or add an expand of it"),
        ('input = ["i0", "d0"]', 'input = ["i0", "d1"]', "input: dim 'd1' was used already; on the interface: d0"),
        ('[["r0", "i1"]]', '[["r0"]]', "a share takes 'i1', which is in no weight; name it in weights"),
        ('[["r0", "i1"]]', '[["r0", "i1", "i0"]]', "weights name 'i0', which no share takes; add a share"),
        ('[["r0", "i1"]]', '[["r0", "i1"], ["r0"]]', "weights name 'r0' twice; a share gives a dim to one weight"),
        ('[["r0", "i1"]]', '[["r0", "i1"], []]', "weights.1 = [] has no dims; name the shared dims that index it"),
        ('["M", "N", "K"]', '["M", "N", "M"]', "symbol 'M' is declared twice; a symbol is primary or a coefficient"),
        ("N = 6, K = 8", "N = 6", "mappings.0 has no number for 'K'; add K = 1 or more"),
        ("K = 8", "K = 8, Q = 1", "mappings.0: 'Q' is no symbol"),
        ("K = 8", "K = 0", "mappings.0 = 0 must be greater than or equal to 1"),
        ("[{ M = 4, N = 6, K = 8 }]", "[]", "mappings = [] must hold at least one table of numbers"),
        ('name = "matrix product"', 'nmae = "x"', "unknown key 'nmae'; nearest: name"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MATRIX_PRODUCT
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, MATRIX_PRODUCT.replace(old, new, 1)))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('size = "K"', 'size = "Q"', "primitives.2 (reduce): size 'Q' names 'Q', which is not among M, N, K"),
        ('size = "K"', 'size = "K/N"', "primitives.2 (reduce): size K/N is not whole and at least 1"),
        ('size = "K"', 'size = "K^x"', "primitives.2 (reduce): size 'K^x': exponent 'x' is not a whole number"),
        ('["M", "N", "K"]', '["M", "N", "K", "2"]', "symbol '2' is not a name; use letters, digits and _"),
    ],
)
def test_a_size_that_is_none_is_one_line_with_its_primitive(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = MATRIX_PRODUCT.replace(old, new, 1).replace("K = 8", "K = 8, 2 = 2" if '"2"' in new else "K = 8")
    spec = load_as(OperatorSpec, write(tmp_path, text))
    with pytest.raises(SearchError) as caught:
        from_spec(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_that_no_assembler_builds_is_one_line() -> None:
    for name in ("linear", "tiling"):
        graph = replace(CASES[name]().operator, expansions=())
        with pytest.raises(SearchError, match=r"is not built by primitives that use every dim once") as caught:
            to_spec(graph)
        assert "\n" not in str(caught.value)


def test_a_primitive_is_checked_outside_a_file_too() -> None:
    with pytest.raises(SpecError, match=r"^step: dims = \['a'\] of unfold must hold 2 names$"):
        parse(PrimitiveSpec, {"primitive": "unfold", "dims": ["a"], "makes": ["b"]}, "step")
