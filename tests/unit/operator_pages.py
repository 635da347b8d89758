"""Pages of operators built by hand and at random, and a parser that takes them apart."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from html.parser import HTMLParser
from typing import Any

from operators_by_hand import CASES, random_operator

from cofire.search import Operator
from cofire.search.page import render_page

SEEDS = range(60)
VOID = {"meta", "br", "input"}


@cache
def all_operators() -> dict[str, Operator]:
    made = {name: make().operator for name, make in CASES.items()}
    return made | {f"seed {seed}": random_operator(seed) for seed in SEEDS}


def operators() -> Iterable[tuple[str, Operator]]:
    return all_operators().items()


@cache
def rendered(name: str) -> str:
    return render_page(all_operators()[name])


class Page(HTMLParser):
    """Elements with their attributes and texts; fails on tags that do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = defaultdict(str)
        self._numbers: list[int] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
            self._numbers.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag
        self._numbers.pop()

    def handle_data(self, data: str) -> None:
        for number in self._numbers:
            self.texts[number] += data

    def all(self, tag: str, **attributes: str) -> list[str]:
        """Texts of the elements with these attributes."""
        return [
            self.texts[k]
            for k, (name, found) in enumerate(self.elements)
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]

    def rows(self) -> list[list[str]]:
        """Cells of all rows of all tables, in order."""
        found: list[list[str]] = []
        for k, (name, _) in enumerate(self.elements):
            if name == "tr":
                found.append([])
            if name in ("td", "th"):
                found[-1].append(self.texts[k])
        return found


def svg(text: str) -> str:
    (found,) = re.findall(r'<svg class="graph".*?</svg>', text, re.DOTALL)
    return found


def floor(value: Any) -> Any:
    return value if math.isnan(value) else math.floor(value)


def pad(value: Any, size: int) -> Any:
    return value if 0 <= value < size else math.nan
