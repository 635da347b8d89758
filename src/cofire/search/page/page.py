"""The page of an operator: one HTML file that opens from disk, needs no network and follows the reader's colour scheme.

It says what the operator is (formula, primitive graph, tensors), how it is computed and what that costs (loop nests,
naive and staged; a table over all mappings), and gives its code and its spec. All of it is text and SVG in the page
itself; the script only adds a button that copies the code. The palette and the tables are those of a plan's page. The
same operator gives the same bytes in every process.

Left out: measured times, which a search's records have.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from cofire.errors import SearchError, SpecError
from cofire.plan.page.scale import shown
from cofire.plan.page.svg import tag, text
from cofire.search.cost import Cost, costs
from cofire.search.graph import Operator
from cofire.search.operator_io import to_spec
from cofire.search.page import parts
from cofire.search.page.graph_figure import draw_graph, legend
from cofire.search.page.mathematics import coordinate, formula, math, ranges
from cofire.search.page.nests import Nest, naive_nest, notes, staged_nests
from cofire.search.sizes import Size
from cofire.spec.io import dump, write_text

_ELEMENT_BYTES = 4  # FP32


def write_page(operator: Operator, path: Path, *, mapping: int = 0) -> None:
    """Write the page of an operator to a file, whole or not at all.

    Args:
        operator: The operator.
        path: The file; its folder must exist.
        mapping: Which mapping gives the numbers of the loop nests and of the code; tables have all mappings.

    Raises:
        SearchError: There is no such mapping, the operator has more than 10 weights, or the file cannot be written.
    """
    page = render_page(operator, mapping=mapping)
    try:
        write_text(path, page)
    except SpecError as error:
        raise SearchError(f"{error}; name a file in a folder that is there and may be written to") from None


def render_page(operator: Operator, *, mapping: int = 0) -> str:
    """Return the page of an operator as HTML text in ASCII.

    Args:
        operator: The operator.
        mapping: Which mapping gives the numbers of the loop nests and of the code; tables have all mappings.

    Raises:
        SearchError: There is no such mapping, or the operator has more than 10 weights.
    """
    found = costs(operator)
    if not 0 <= mapping < len(found):
        raise SearchError(f"mapping {mapping} of an operator with {len(found)}; count from 0 to {len(found) - 1}")
    sections = (
        parts.section("Formula", _formula(operator)),
        parts.section("Primitive graph", _graph(operator)),
        parts.section("Tensors", _tensors(operator)),
        parts.section("Loop nests", _nests(operator, found[mapping], mapping)),
        parts.section("Cost", _costs(found)),
        parts.section("PyTorch", _code(operator, mapping)),
        parts.section("Files", _files(operator)),
    )
    summary, tiles = _summary(operator, found[mapping]), _tiles(operator, found[mapping], mapping)
    return parts.document("Operator", f"{operator.digest:032x}", summary, tiles, sections)


# -- what it is ----------------------------------------------------------------------------------------------------


def _summary(operator: Operator, found: Cost) -> str:
    """Say in a sentence or two what the operator maps, with what, and what its stages save."""
    weights = len(operator.weights)
    owned = f"{weights} weight{'s' * (weights > 1)}" if weights else "no weight"
    said = f"Maps {_shape(operator.input_shape)} to {_shape(operator.output_shape)} with {owned}."
    if not found.naive_multiply_adds:
        return f"{said} It is a view: it multiplies and adds nothing."
    saved = found.naive_multiply_adds / found.multiply_adds if found.multiply_adds else 0.0
    if saved > 1:
        count = len(found.stages)
        stages = f"{count} stages" if count > 1 else "1 stage"
        return f"{said} In {stages} it takes {_times(saved)} times fewer multiply-adds than in one loop nest."
    return f"{said} One loop nest is the cheapest way to compute it."


def _tiles(operator: Operator, found: Cost, mapping: int) -> str:
    under = f"under mapping {mapping}" if len(operator.symbols.mappings) > 1 else ""
    tiles = (
        ("Parameters", *parts.count(found.parameters, under)),
        ("FLOPs in stages", *parts.count(2 * found.multiply_adds, under)),
        ("FLOPs in one nest", *parts.count(2 * found.naive_multiply_adds, under)),
        ("Tensors", shown(found.tensor_bytes(_ELEMENT_BYTES), "B"), "FP32, with the largest intermediate"),
        ("Intensity", f"{_intensity(found):.3g}", "FLOPs in stages per byte of tensors"),
    )
    return parts.tiles(tiles)


def _formula(operator: Operator) -> str:
    said = f"for {ranges(operator.output)}" if operator.output else ""
    if operator.reductions:
        said += f"{'; ' * bool(said)}summed over {ranges(operator.reductions)}"
    body = formula(operator) + tag("p", said, class_="ranges")
    if operator.masks:
        kept = ", ".join(math(coordinate(dim)) for dim in operator.masks)
        body += tag(
            "p", f"Terms in which {kept} lies outside its dim are zero, though no tensor is read there.", class_="note"
        )
    if 'class="padded"' in body:
        body += tag("p", 'A <span class="padded">shaded</span> coordinate reads zero outside its dim.', class_="note")
    plain = tag("pre", text(operator.formula())) + tag("pre", text(operator.formula(latex=True)))
    return f"<figure>{body}{parts.folded('As text and in LaTeX', plain)}</figure>"


def _graph(operator: Operator) -> str:
    caption = (
        "Upwards: how coordinates of the output become those of the input and the weights. Downwards: what happens to "
        "the data. A box and an edge say more under the mouse."
    )
    drawn = f'<div class="drawing">{draw_graph(operator)}</div>'
    return f"<figure>{legend(operator)}{drawn}{tag('figcaption', text(caption))}</figure>"


def _tensors(operator: Operator) -> str:
    symbols = operator.symbols
    count = len(symbols.mappings)
    tensors = [("x, input", operator.input_shape)]
    tensors += [(f"W{k}", shape) for k, shape in enumerate(operator.weight_shapes)]
    tensors += [("y, output", operator.output_shape)]
    mappings = [f"mapping {k}" for k in range(count)] if count > 1 else ["numbers"]
    rows = [[name, _shape(sizes), *(_elements(sizes, k, count > 1) for k in range(count))] for name, sizes in tensors]
    symbol_head = [*(["symbols"] if count > 1 else []), *symbols.names]
    numbers = [
        [*([f"mapping {k}"] if count > 1 else []), *(f"{value:,}" for value in row)]
        for k, row in enumerate(symbols.mappings)
    ]
    return parts.table(["tensor", "shape", *mappings], rows, 2) + parts.table(symbol_head, numbers, int(count > 1))


def _elements(sizes: tuple[Size, ...], mapping: int, many: bool) -> str:
    """Return the sizes of a tensor's dims and how many elements it has, in two lines where there are many columns."""
    values = [size.value(mapping) for size in sizes]
    total = f"{prod(values):,}"
    return f"{' x '.join(map(str, values))}{chr(10) if many else ' '}= {total}" if len(values) > 1 else total


# -- how it is computed, and what that costs -----------------------------------------------------------------------


def _nests(operator: Operator, found: Cost, mapping: int) -> str:
    naive, staged = naive_nest(operator, found), staged_nests(operator, found)
    lines = notes(operator, found)
    remarks = tag("ul", "".join(tag("li", text(line)) for line in lines), class_="notes") if lines else ""
    said = (
        '<p class="said"><code>i &lt; N</code> runs over 0 to N - 1; a coordinate in square brackets reads zero '
        f"outside its dim.{f' Numbers are of mapping {mapping}.' * (len(operator.symbols.mappings) > 1)}</p>"
    )
    if [nest.code for nest in staged] == [naive.code]:
        return said + _nest(naive, "The only nest") + remarks
    cards = [_nest(nest, f"Stage {k + 1}" if k < len(found.stages) else "View") for k, nest in enumerate(staged)]
    beside = _nest(naive, "Without stages")
    return (
        f'{said}{_bars(staged, naive)}{remarks}<div class="nests"><div>{"".join(cards)}</div><div>{beside}</div></div>'
    )


def _nest(nest: Nest, eyebrow: str) -> str:
    work = f"{nest.multiply_adds:,} multiply-adds; " if nest.multiply_adds else ""
    said = f"{work}{nest.result} has {nest.result_elements:,} elements"
    head = f"<h3>{text(eyebrow)}: {text(nest.title[:1].lower() + nest.title[1:])}</h3>"
    return tag("figure", f"{head}<pre>{text(nest.code)}</pre>{tag('figcaption', text(said))}", class_="nest")


def _bars(staged: list[Nest], naive: Nest) -> str:
    """Return multiply-adds by stage as bars beside their numbers."""
    counted = [(f"stage {k + 1}", nest.multiply_adds, "") for k, nest in enumerate(staged) if nest.multiply_adds]
    if not counted:
        return ""
    if len(counted) > 1:
        counted.append(("all stages", sum(work for _, work, _ in counted), "all"))
    counted.append(("one loop nest", naive.multiply_adds, "naive"))
    widest = max(work for _, work, _ in counted)
    rows = "".join(
        tag("span", text(name))
        + f'<i class="bar"><i class="{kind}" style="width: {max(100 * work / widest, 0.4):.2f}%"></i></i>'
        + tag("span", f"{work:,}", class_="count")
        for name, work, kind in counted
    )
    return f'<figure><h3>Multiply-adds</h3><div class="bars">{rows}</div></figure>'


def _costs(found: tuple[Cost, ...]) -> str:
    many = len(found) > 1
    rows = [
        [*([f"mapping {k}"] if many else []), *_cost_cells([each]), f"{_intensity(each):.3g}"]
        for k, each in enumerate(found)
    ]
    if many:
        rows.append(["all, summed", *_cost_cells(found), ""])
    head = ["FLOPs in one nest", "FLOPs in stages", "times fewer", "parameters", "bytes", "FLOP/byte"]
    return parts.table([*([""] if many else []), *head], rows, int(many)) + tag(
        "p",
        "FLOPs are two per multiply-add. Bytes are of input, output, weights and the largest intermediate in FP32, "
        "each counted once; FLOP/byte is the FLOPs in stages over them.",
        class_="note",
    )


def _cost_cells(found: Sequence[Cost]) -> list[str]:
    naive = 2 * sum(each.naive_multiply_adds for each in found)
    staged = 2 * sum(each.multiply_adds for each in found)
    return [
        f"{naive:,}",
        f"{staged:,}",
        _times(naive / staged) if staged else "",
        f"{sum(each.parameters for each in found):,}",
        f"{sum(each.tensor_bytes(_ELEMENT_BYTES) for each in found):,}",
    ]


def _intensity(found: Cost) -> float:
    """Return FLOPs in stages per byte of tensors."""
    return 2 * found.multiply_adds / found.tensor_bytes(_ELEMENT_BYTES)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


# -- code and files ------------------------------------------------------------------------------------------------


def _code(operator: Operator, mapping: int) -> str:
    try:
        from cofire.search.lowering import write_source
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return parts.absent(
            "The code is left out: PyTorch is not installed here; pip install 'cofire[train]' brings it."
        )
    try:
        source = write_source(operator, mapping)
    except SearchError as error:
        return parts.absent(f"The code is left out: {error}.")
    several = f", for mapping {mapping}" * (len(operator.symbols.mappings) > 1)
    return parts.code(f"A module that needs nothing but PyTorch{several}", source)


def _files(operator: Operator) -> str:
    try:
        spec = f'<pre id="spec">{text(dump(to_spec(operator)))}</pre>'
    except SearchError as error:
        spec = tag("p", text(f"No spec can hold it: {error}."), class_="note")
    drawing = f'<pre id="graphviz">{text(operator.graphviz())}</pre>'
    return parts.files(("OperatorSpec in TOML", spec), ("Graphviz source of the graph", drawing))


def _shape(sizes: Sequence[Size]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
