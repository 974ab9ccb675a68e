"""Tables and lists of texts as lines, for a terminal of any width; nothing is ever cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence

GAP = "  "

_MIN_TEXT = 24
"""Min width of a column that running text is wrapped into."""


def width() -> int:
    """Returns the columns of the terminal, or those of ``COLUMNS``; a pipe has no limit."""
    return shutil.get_terminal_size(fallback=(1_000_000, 24)).columns


def table(rows: Sequence[Mapping[str, str]], columns: int, *, wrap_last: bool = False) -> list[str]:
    """Returns the lines of a table, or, if it is too wide, those of a list for each row.

    Args:
        rows: Each by the names of its columns, which are those of the first row.
        columns: How wide a line may be.
        wrap_last: The last column is running text and may take several lines; the others and the
            text begin at the left. Without it, all are numbers and end at the right.
    """
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if wrap_last:
        before = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
        if columns - before >= min(_MIN_TEXT, widths[-1]):
            return [
                line.rstrip()
                for *cells, text in lines
                for line in wrapped(_row(cells, widths, str.ljust) + GAP, text, columns)
            ]
    elif sum(widths) + len(GAP) * (len(widths) - 1) <= columns:
        return [_row(cells, widths, str.rjust) for cells in lines]
    lists = [fields(row, columns) for row in rows]
    return [line for each in lists for line in [*each, ""]][:-1]


def fields(values: Mapping[str, str], columns: int) -> list[str]:
    """Returns a line for each name with its value, wrapped at spaces to the width of a line."""
    longest = max(map(len, values))
    return [
        line
        for name, value in values.items()
        for line in wrapped(name.ljust(longest) + GAP, value, columns)
    ]


def wrapped(head: str, text: str, columns: int) -> list[str]:
    """Returns a text in lines, the first after a head, the others indented as far.

    Lines end at spaces alone, so that a name with a hyphen stays whole.
    """
    if len(head) + len(text) <= columns:
        return [(head + text).rstrip()]
    from textwrap import wrap

    room = max(columns - len(head), 1)
    first, *rest = wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [head + first, *(" " * len(head) + line for line in rest)]


def _row(cells: Sequence[str], widths: Sequence[int], justify: Callable[[str, int], str]) -> str:
    return GAP.join(justify(cell, width) for cell, width in zip(cells, widths, strict=False))
