"""Files of lines, JSON lines and CSV, read up to the last line that is whole."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo.error import TokenFileError
from bandpo.record.layout import WHOLE, Block, Column
from bandpo.record.tokens import LogMetadata

LONGEST_LINE = 2**26
"""Max bytes of a line."""

MOST_TOKENS = 2**16
"""Max tokens of a block, because numbers of Python take several times the memory of an array."""

Cell = Any
"""A value of a row: a number, None, or a list of them; text in a CSV file."""


class JsonLinesFile:
    """One JSON object a line, with numbers or lists of numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        _, first = next(self._rows(), (0, {}))
        self.names = tuple(first)

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        picked = ((number, self._picked(row, number, columns)) for number, row in self._rows())
        yield from _blocks(self.path, columns, picked, tokens)

    def _picked(
        self, row: Mapping[str, Cell], number: int, columns: Mapping[str, str]
    ) -> list[Cell]:
        try:
            return [row[name] for name in columns.values()]
        except KeyError as missing:
            raise _error(self.path, number, f"has no {missing}, which the first line has") from None

    def _rows(self) -> Iterator[tuple[int, dict[str, Cell]]]:
        for number, line, is_cut in _lines(self.path):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if is_cut:
                    return  # its writer was stopped
                raise _error(self.path, number, f"is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise _error(self.path, number, "must be an object {...}, one a line")
            yield number, row


class CsvFile:
    """A line of names, then numbers, or lists of numbers as ``"[-0.1, -0.2]"``.

    A last line without an end is not read, because its last number may be cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        _, first = next(self._rows(), (0, []))
        self.names = tuple(first)

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        places = [self.names.index(name) for name in columns.values()]
        yield from _blocks(self.path, columns, self._picked(places), tokens)

    def _picked(self, places: list[int]) -> Iterator[tuple[int, list[Cell]]]:
        rows = self._rows()
        next(rows, None)
        for number, row in rows:
            cells = [row[place] for place in places]
            if any(cell.startswith("[") for cell in cells):
                cells = [self._list(cell, number) for cell in cells]
            yield number, cells

    def _list(self, cell: str, number: int) -> Cell:
        if not cell.startswith("["):
            return cell
        try:
            return json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise _error(self.path, number, f"has a list that is no JSON: {error}") from None

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        lines = (
            line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
            for number, line, is_cut in _lines(self.path)
            if not is_cut
        )
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
        rows = csv.reader(lines)
        width = 0
        cut: tuple[int, list[str]] | None = None
        try:
            for row in filter(None, rows):
                if cut is not None:
                    number, cells = cut
                    raise _error(self.path, number, f"has {len(cells)} cells in place of {width}")
                width = width or len(row)
                if len(row) == width:
                    yield rows.line_num, row
                else:  # an error, unless it is the last because its writer was stopped
                    cut = rows.line_num, row
        except csv.Error as error:
            raise _error(self.path, rows.line_num, f"is no CSV: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yields the number of each line, the line, and True if it is the last and has no end."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise _error(path, number, f"has more than {LONGEST_LINE} bytes")
            yield number, line, not line.endswith(b"\n")


def _blocks(
    path: Path, columns: Mapping[str, str], rows: Iterator[tuple[int, list[Cell]]], tokens: int
) -> Iterator[Block]:
    """Yields rows, whose cells are in the order of the columns, in blocks of so many tokens."""
    place = list(columns).index("log_prob")
    block: list[list[Cell]] = []
    first = count = 0
    for number, cells in rows:
        first = first or number
        block.append(cells)
        cell = cells[place]
        count += len(cell) if isinstance(cell, list) else 1
        if count >= min(tokens, MOST_TOKENS):
            yield _block(path, columns, block, first, number)
            block, first, count = [], 0, 0
    if block:
        yield _block(path, columns, block, first, number)


def _block(
    path: Path, columns: Mapping[str, str], rows: list[list[Cell]], first: int, last: int
) -> Block:
    block = {}
    for (field, name), cells in zip(columns.items(), zip(*rows, strict=True), strict=True):
        lists = [isinstance(cell, list) for cell in cells]
        lengths = None
        flat: Sequence[Cell] = cells
        if any(lists):
            if not all(lists):
                raise _error(path, first, f"to {last}: column {name!r} has numbers beside lists")
            lengths = np.array([len(cell) for cell in cells], np.int64)
            flat = list(chain.from_iterable(cells))
        try:
            values = _numbers(flat, whole=field in WHOLE)
        except (ValueError, TypeError, OverflowError) as error:
            raise _error(
                path, first, f"to {last}: column {name!r} must hold real numbers: {error}"
            ) from None
        block[field] = Column(values, lengths)
    return block


def _numbers(cells: Sequence[Cell], *, whole: bool) -> NDArray[Any]:
    """Returns numbers, None or texts as an array; what is missing is NaN."""
    kinds = set(map(type, cells))
    if kinds <= {int, float, bool}:
        values = np.array(cells, dtype=None if cells else np.float64)
        if values.dtype.kind in "fiub":
            return values
    if whole and kinds <= {str, int}:
        try:
            return np.array([int(cell) for cell in cells], np.int64)
        except ValueError:
            pass  # 12.0 is whole as well
    if not kinds <= {int, float, bool, str, type(None)}:
        other = next(cell for cell in cells if not isinstance(cell, (int, float, str, type(None))))
        raise TypeError(f"got {str(other)[:60]!r}")
    return np.array([_number(cell) for cell in cells], np.float64)


def _number(cell: float | str | None) -> float:
    if cell is None or cell == "":
        return math.nan
    if isinstance(cell, str) and cell.lower() in ("true", "false"):
        return float(cell.lower() == "true")
    return float(cell)


def _error(path: Path, line: int, message: str) -> TokenFileError:
    return TokenFileError(f"{path}: line {line} {message}")
