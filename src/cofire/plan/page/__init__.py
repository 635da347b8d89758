"""The HTML page of a plan: its values (``figures``), their drawings, and the page (``page``).

Left out: filling it; :mod:`cofire.plan` does.
"""

from cofire.plan.page.page import render_page, write_page

__all__ = ["render_page", "write_page"]
