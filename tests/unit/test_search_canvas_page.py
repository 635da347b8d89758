"""Pages of kernels: everything on them is the kernel's, they are well formed, need no network and are reproducible."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from canvas_by_hand import CASES
from operator_pages import Page, svg

from cofire.errors import SearchError
from cofire.search.canvas import Extent, Kernel, Limits, Sampler
from cofire.search.canvas.description import node_figures, place_figures, shown_field
from cofire.search.canvas.from_spec import kernel_of
from cofire.search.canvas.lowering import lower, write_source
from cofire.search.canvas.page import KINDS, graph, render_page, write_page
from cofire.spec import KernelSpec, parse

PLACES = (Extent(16, 8, 8), Extent(32, 4, 4))
ROOT = Path(__file__).parents[2]


@cache
def kernels() -> dict[str, Kernel]:
    sampler = Sampler(PLACES, Limits(primitives=(3, 16)), seed=1)
    return {**CASES, **{f"sample {k}": sampler.sample() for k in range(25)}}


@cache
def rendered(name: str) -> str:
    return render_page(kernels()[name], PLACES)


def test_every_page_is_ascii_well_formed_and_needs_no_network():
    for name, kernel in kernels().items():
        source = rendered(name)
        page = Page(source)
        assert source.isascii(), name
        assert not [a for _, a in page.elements if {"src", "href", "srcset", "action"} & a.keys()], name
        assert "://" not in source
        assert "@import" not in source
        assert f"{kernel.digest:032x}" in source
        ElementTree.fromstring(svg(source))


def test_the_drawing_has_a_box_for_every_node_and_an_edge_for_every_input():
    for name, kernel in kernels().items():
        found = [attributes for _, attributes in Page(rendered(name)).elements]
        boxes = {int(a["data-box"] or ""): a["class"] for a in found if "data-box" in a}
        edges = sorted((int(a["data-to"] or ""), int(a["data-from"] or "")) for a in found if "data-from" in a)
        assert sorted(boxes) == list(range(len(kernel.graph.nodes))), name
        wanted = [(k, position) for position, node in enumerate(kernel.graph.nodes) for k in node.inputs]
        assert edges == sorted(wanted), name
        for position, node in enumerate(kernel.graph.nodes):
            assert (boxes[position] == "node share") is node.primitive.weighted
            assert (boxes[position] == "node expand") is (len(node.inputs) == 2)
        assert {str(kind).removeprefix("node ") for kind in boxes.values()} <= set(KINDS)


def test_every_edge_goes_down_and_the_output_is_lowest():
    for name, kernel in kernels().items():
        drawn = graph(kernel, node_figures(kernel, PLACES[0]))
        for edge in drawn.edges:
            assert drawn.boxes[edge.upper].layer > drawn.boxes[edge.lower].layer, name
        layers = [box.layer for box in drawn.boxes]
        assert layers[-1] == 0
        assert layers.count(0) == 1
        assert set(layers) == set(range(max(layers) + 1))


def test_numbers_of_a_page_are_those_of_the_modules():
    for name, kernel in kernels().items():
        layers = [lower(kernel, extent) for extent in PLACES]
        rows = Page(rendered(name)).rows()
        for place, layer in zip(PLACES, layers, strict=True):
            c, h, w = place
            work = kernel.multiply_adds(place)
            parameters = sum(weight.numel() for weight in layer.parameters())
            wanted = [" x ".join(map(str, place)), f"{parameters:,}", f"{work:,}", f"{work / (9 * c * c * h * w):.1%}"]
            assert wanted in rows, name
        weights = [" x ".join(map(str, weight.shape)) for weight in layers[0].parameters()]
        nodes = [row for row in rows if re.fullmatch(r"t\d+", row[0])]
        assert [row[4] for row in nodes if row[4]] == weights
        assert sum(int(row[5].replace(",", "")) for row in nodes if row[5]) == kernel.multiply_adds(PLACES[0])
        assert [" ".join(row[1].split()) for row in nodes] == [
            " ".join([str(node.primitive), *(f"t{k}" for k in node.inputs)]) for node in kernel.graph.nodes
        ]


def test_the_field_is_drawn_place_by_place():
    for name, kernel in kernels().items():
        seen = [a for tag, a in Page(rendered(name)).elements if tag == "rect" and a.get("class") == "seen"]
        drawn = {
            (int(a["y"] or "") // 9 - 15, int(a["x"] or "") // 9 - 15 + step)
            for a in seen
            for step in range(int(a["width"] or "") // 9)
        }
        assert drawn == set(shown_field(kernel, PLACES[0])), name
        assert sum(int(a["width"] or "") for a in seen) == 9 * len(drawn)


def test_code_and_files_of_a_page_are_the_kernels():
    for name, kernel in kernels().items():
        page = Page(rendered(name))
        assert page.all("pre", id="code") == [write_source(kernel, PLACES[0])], name
        assert page.all("pre", id="graphviz") == [kernel.graph.graphviz()]
        (spec,) = page.all("pre", id="spec")
        read = parse(KernelSpec, tomllib.loads(spec))
        assert kernel_of(read) == kernel
        assert read.places == PLACES


def test_the_page_is_the_same_in_every_process(tmp_path: Path):
    program = (
        "import sys; sys.path.insert(0, 'tests/unit');\n"
        "from pathlib import Path; from canvas_by_hand import CASES\n"
        "from cofire.search.canvas import Extent; from cofire.search.canvas.page import write_page\n"
        "write_page(CASES['fc of means'], (Extent(16, 8, 8), Extent(32, 4, 4)), Path(sys.argv[1]))"
    )
    for seed in "12":
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
        assert (tmp_path / seed).read_text("ascii") == rendered("fc of means")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_without_torch_the_page_says_how_to_get_its_code(tmp_path: Path):
    program = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tests/unit')\n"
        "from canvas_by_hand import CASES; from cofire.search.canvas import Extent\n"
        "from cofire.search.canvas.page import render_page; print(render_page(CASES['fc'], (Extent(4, 5, 6),)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    page = Page(done.stdout)
    assert not page.all("pre", id="code")
    assert "PyTorch is not installed here; pip install 'cofire[train]' brings it." in "".join(page.all("p"))


def test_figures_of_a_place_add_up():
    for kernel in kernels().values():
        for extent in PLACES:
            found = place_figures(kernel, extent)
            assert found.multiply_adds == sum(node.multiply_adds for node in node_figures(kernel, extent))


def test_a_page_that_cannot_be_made_says_why(tmp_path: Path):
    with pytest.raises(SearchError, match="a page shows a kernel at a place; give one"):
        render_page(CASES["fc"], ())
    with pytest.raises(SearchError, match="it must be whole: use a place whose sizes divide"):
        render_page(CASES["fc of groups"], (Extent(3, 4, 4),))
    with pytest.raises(SearchError, match="name a file in a folder that is there"):
        write_page(CASES["fc"], PLACES, tmp_path / "no" / "k.html")
