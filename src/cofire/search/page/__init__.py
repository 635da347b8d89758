"""The HTML page of an operator: formula, primitive graph, loop nests, cost, and code in one file without a network."""

from cofire.search.page.page import render_page, write_page

__all__ = ["render_page", "write_page"]
