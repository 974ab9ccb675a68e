"""Tables as HTML, which a notebook shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table; cells are texts and are escaped."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Iterable[object]) -> str:
    from html import escape  # late, because its table of names is large

    style = ' style="text-align:left"'
    return f"<tr>{''.join(f'<{tag}{style}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
