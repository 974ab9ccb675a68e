"""Files of lines, JSON lines and CSV, read up to the last line that is whole."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bandpo.error import TokenFileError
from bandpo.record.keys import parsed
from bandpo.record.layout import WHOLE, Block, Column
from bandpo.record.tokens import LogMetadata

LONGEST_LINE = 2**26
"""Max bytes of a line."""

BYTES_OF_BLOCK = 2**20
"""Bytes of the lines that are read at a time; as numbers of Python they take some times that."""

Cell = Any
"""A value of a row: a number, None, or a list of them; text in a CSV file."""


class _Rows(NamedTuple):
    """Rows that follow each other: what was read of each, and the number of its line."""

    read: list[Any]
    lines: list[int]


class JsonLinesFile:
    """One JSON object a line, with numbers or lists of numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        self.names: tuple[str, ...] = tuple(next(self._rows(1), _Rows([{}], [])).read[0])

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        for rows in self._rows(BYTES_OF_BLOCK):
            block = {}
            for field, name in columns.items():
                try:
                    cells = [row[name] for row in rows.read]
                except KeyError:
                    line = next(n for row, n in zip(*rows, strict=True) if name not in row)
                    raise _error(
                        self.path, line, f"has no {name!r}, which the first line has"
                    ) from None
                block[field] = _column(self.path, field, name, cells, rows.lines)
            yield block

    def _rows(self, size: int) -> Iterator[_Rows]:
        """Yields objects whose lines have about so many bytes."""
        lines = _Lines(self.path)
        rows = _Rows([], [])
        for line in lines:
            if line.isspace():
                continue
            try:
                row = parsed(line)
            except (ValueError, RecursionError) as error:
                if lines.is_cut:  # its writer was stopped
                    break
                raise _error(self.path, lines.number, f"is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise _error(self.path, lines.number, "must be an object {...}, one a line")
            rows.read.append(row)
            rows.lines.append(lines.number)
            if lines.bytes >= size:
                yield rows
                rows, lines.bytes = _Rows([], []), 0
        if rows.read:
            yield rows


class CsvFile:
    """A line of names, then numbers, or lists of numbers as ``"[-0.1, -0.2]"``.

    A last line without an end is not read, because its last number may be cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        self.names: tuple[str, ...] = tuple(next(self._rows(1), _Rows([()], [])).read[0])

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        blocks = self._rows(BYTES_OF_BLOCK)
        for first, rows in enumerate(blocks):
            texts = list(zip(*rows.read[first == 0 :], strict=True))  # without the names
            lines = rows.lines[first == 0 :]
            if texts:
                yield {
                    field: _column(self.path, field, name, texts[self.names.index(name)], lines)
                    for field, name in columns.items()
                }

    def _rows(self, size: int) -> Iterator[_Rows]:
        """Yields rows of texts whose lines have about so many bytes, beginning with the names."""
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
        lines = _Lines(self.path)
        reader = csv.reader(lines.texts())
        rows = _Rows([], [])
        width = 0
        cut: tuple[int, int] | None = None
        try:
            for row in reader:
                if not row:
                    continue
                if cut is not None:
                    raise _error(self.path, cut[0], f"has {cut[1]} cells in place of {width}")
                width = width or len(row)
                if len(row) != width:  # an error, unless it is the last: its writer was stopped
                    cut = reader.line_num, len(row)
                    continue
                rows.read.append(row)
                rows.lines.append(reader.line_num)
                if lines.bytes >= size:
                    yield rows
                    rows, lines.bytes = _Rows([], []), 0
        except csv.Error as error:
            raise _error(self.path, reader.line_num, f"is no CSV: {error}") from None
        if rows.read:
            yield rows


class _Lines:
    """The lines of a file.

    Attributes:
        number: Number of the last one.
        bytes: Bytes of all so far, which may be set.
        is_cut: True if the last one has no end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.number = 0
        self.bytes = 0
        self.is_cut = False

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                self.number += 1
                self.bytes += len(line)
                self.is_cut = not line.endswith(b"\n")
                if len(line) > LONGEST_LINE:
                    raise _error(self._path, self.number, f"has more than {LONGEST_LINE} bytes")
                yield line

    def texts(self) -> Iterator[str]:
        """Yields the lines that have an end as texts; what is no UTF-8 is replaced."""
        for line in self:
            if not self.is_cut:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8", "replace")


def _column(
    path: Path, field: str, name: str, cells: Sequence[Cell], lines: Sequence[int]
) -> Column:
    """The numbers of a column, or its lists of numbers."""
    place = f"line {lines[0]}" if len(lines) == 1 else f"lines {lines[0]} to {lines[-1]}"
    place = f"{path}: {place}: column {name!r}"
    try:
        return Column(_numbers(cells, whole=field in WHOLE))
    except (ValueError, TypeError, OverflowError) as error:
        reason = error
    try:
        lists = [_list(cell) for cell in cells]
    except (ValueError, RecursionError) as error:
        raise TokenFileError(f"{place} has a list that is no JSON: {error}") from None
    if not any(isinstance(cell, list) for cell in lists):
        raise TokenFileError(f"{place} must hold real numbers: {reason}")
    if not all(isinstance(cell, list) for cell in lists):
        raise TokenFileError(f"{place} has numbers beside lists")
    try:
        flat = list(chain.from_iterable(lists))
        lengths = np.array([len(cell) for cell in lists], np.int64)
        return Column(_numbers(flat, whole=field in WHOLE), lengths)
    except (ValueError, TypeError, OverflowError) as error:
        raise TokenFileError(f"{place} must hold real numbers: {error}") from None


def _list(cell: Cell) -> Cell:
    """A list of a CSV file is text."""
    return json.loads(cell) if isinstance(cell, str) and cell.startswith("[") else cell


def _numbers(cells: Sequence[Cell], *, whole: bool) -> NDArray[Any]:
    """Returns numbers, texts of numbers or None as an array; what is missing is NaN."""
    if whole:
        try:
            # int() would cut a float, and 12.0 is whole as well.
            return np.array([_whole(cell) for cell in cells], np.int64)
        except ValueError:
            pass
    try:
        return np.fromiter(map(float, cells), np.float64, len(cells))
    except (ValueError, TypeError):
        return np.array([_number(cell) for cell in cells], np.float64)


def _whole(cell: Cell) -> int:
    if isinstance(cell, (int, str)):
        return int(cell)
    raise ValueError("it is no whole number")


def _number(cell: Cell) -> float:
    if cell is None or cell == "":
        return math.nan
    if isinstance(cell, str) and cell.lower() in ("true", "false"):
        return float(cell.lower() == "true")
    return float(cell)


def _error(path: Path, line: int, message: str) -> TokenFileError:
    return TokenFileError(f"{path}: line {line} {message}")
