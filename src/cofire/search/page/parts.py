"""Parts of the pages of operators and kernels: the document, its sections, tables, tiles and code."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterable, Sequence
from importlib import resources

from cofire.plan.page.scale import shown
from cofire.plan.page.svg import tag, text

NO_TORCH = "The code is left out: PyTorch is not installed here; pip install 'cofire[train]' brings it."


def document(noun: str, digest: str, verdict: str, tiles: str, sections: Iterable[str]) -> str:
    """Return a whole page as HTML text in ASCII.

    Args:
        noun: What it is of, with a capital.
        digest: Name of that in 32 hexadecimal digits.
        verdict: What it is, in a sentence or two.
        tiles: Its most important numbers, as ``tiles`` returns them.
        sections: What ``section`` returned.
    """
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{noun} {digest[:8]}</title>
<style>
{_asset("cofire.plan.page", "page.css")}{_asset("cofire.search.page", "page.css")}</style>
</head>
<body>
<main class="operator">
<p class="eyebrow">{noun}, digest <code>{digest}</code></p>
<h1>{noun} {digest[:8]}</h1>
<p class="verdict">{text(verdict)}</p>
{tiles}
{"".join(sections)}
</main>
<script>
{_asset("cofire.search.page", "page.js")}</script>
</body>
</html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return numbers in a row; entries are name, value and remark."""
    drawn = "".join(
        tag("div", tag("span", text(name)) + tag("b", text(value)) + tag("span", text(remark)), class_="tile")
        for name, value, remark in entries
    )
    return tag("div", drawn, class_="tiles", style=f"--columns: {len(entries)}")


def count(value: int, remark: str = "") -> tuple[str, str]:
    """Return a count in short, and a remark that has it in full where it was rounded."""
    short, full = shown(value), f"{value:,}"
    return short, " ".join(part for part in (full if full != short else "", remark) if part)


def code(title: str, source: str) -> str:
    """Return Python source with a title and a button that copies it."""
    return (
        f"<figure class='code'><h3>{text(title)}</h3>"
        '<button type="button" class="copy" hidden>Copy</button>'
        f'<pre id="code">{_highlighted(source)}</pre></figure>'
    )


def _highlighted(source: str) -> str:
    """Return Python source with comments, strings and keywords marked; its text is the source to the letter."""
    lines = source.splitlines(keepends=True)
    parts: list[str] = []
    row, column = 1, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _token_class(token)
        if kind is None:
            continue
        parts.append(text(_between(lines, (row, column), token.start)))
        parts.append(tag("span", text(token.string), class_=kind))
        row, column = token.end
    parts.append(text(_between(lines, (row, column), (len(lines) + 1, 0))))
    return "".join(parts)


def _token_class(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return "keyword"
    return {tokenize.COMMENT: "comment", tokenize.STRING: "string"}.get(token.type)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the text between two places; rows count from 1, columns from 0."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    last = lines[end[0] - 1][: end[1]] if end[0] <= len(lines) else ""
    return lines[start[0] - 1][start[1] :] + "".join(lines[start[0] : end[0] - 1]) + last


def section(title: str, body: str) -> str:
    """Return a section under a heading."""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>\n"


def absent(said: str) -> str:
    """Return what stands for something that is left out."""
    return tag("figure", tag("p", text(said), class_="note"))


def files(*entries: tuple[str, str]) -> str:
    """Return what is in files, folded; entries are title and body."""
    return f"<figure>{''.join(folded(title, body) for title, body in entries)}</figure>"


def folded(title: str, body: str) -> str:
    """Return what opens when its title is clicked."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """Return a table; the first ``words`` columns are text, the others numbers."""

    def row(cells: Sequence[str], element: str) -> str:
        return tag(
            "tr", "".join(tag(element, text(c), class_="number" if k >= words else None) for k, c in enumerate(cells))
        )

    body = "".join(row(cells, "td") for cells in rows)
    drawn = tag("table", tag("thead", row(head, "th")) + tag("tbody", body))
    return f'<figure class="tabled"><div class="scroll">{drawn}</div></figure>'


def _asset(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text("utf-8")
