"""Rows of a file to tokens: one row a token, or one a sequence with lists of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray, suggestion
from bandpo.error import TokenFileError
from bandpo.record.tokens import UNKNOWN, Int64Array, LoggedTokens, LogMetadata

REQUIRED = ("old_log_prob", "log_prob", "advantages")
OPTIONAL = ("rollout_log_prob", "reward", "response_mask", "step", "sequence", "position", "weight")
FIELDS = (*REQUIRED, *OPTIONAL)
"""Columns that are read, by the names that they have unless an option names others."""

LONGEST_ROW = 2**26
"""Max tokens of one row, so that no row takes more than gigabytes."""


class Column(NamedTuple):
    """Real numbers of some rows: one a row, or a list of them."""

    values: NDArray[Any]  # of all rows, in order
    lengths: Int64Array | None = None  # numbers of each row, if rows have lists


Block = Mapping[str, Column]
"""Columns of some rows that follow each other, by field."""


class TokenFile(Protocol):
    """A file of one format; the columns are those of its header."""

    path: Path
    metadata: LogMetadata
    names: tuple[str, ...]  # of its columns

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows, in blocks of about so many tokens.

        Args:
            columns: Name of the column of each field.
            tokens: Size of a block.

        Raises:
            TokenFileError: If the content is damaged.
        """


class Place(NamedTuple):
    """A file and the names of its columns, for messages."""

    path: Path
    columns: Mapping[str, str]

    def error(self, field: str, message: str) -> TokenFileError:
        """Returns an error of the column of a field."""
        return TokenFileError(f"{self.path}: column {self.columns[field]!r} {message}")


def tokens_of(block: Block, place: Place, first_row: int) -> tuple[LoggedTokens, int]:
    """Returns the tokens of some rows that count, and the number of the rows.

    Args:
        block: The rows.
        place: Their file.
        first_row: Number of rows before them.

    Raises:
        TokenFileError: If columns do not fit together, or hold what is not allowed.
    """
    lengths = block["log_prob"].lengths
    rows = len(block["log_prob"].values if lengths is None else lengths)
    for field, column in block.items():
        _check_shape(field, column, rows, lengths, place)
    spread = _spread(lengths)
    flat = {field: spread(column) for field, column in block.items()}
    total = len(flat["log_prob"])

    row = np.arange(first_row, first_row + rows)
    within = np.full(total, UNKNOWN)
    if lengths is not None:
        starts = np.cumsum(lengths) - lengths
        within = np.arange(total) - np.repeat(starts, lengths)
    numbers = {
        "step": np.zeros(total, np.int64),
        "sequence": np.full(total, UNKNOWN) if lengths is None else np.repeat(row, lengths),
        "position": within,
    }
    for field, default in numbers.items():
        numbers[field] = _whole(field, flat[field], place) if field in flat else default
    reals = {
        field: flat[field].astype(np.float64, copy=False) if field in flat else None
        for field in ("old_log_prob", "log_prob", "advantages", "rollout_log_prob", "reward")
    }
    weight = flat["weight"].astype(np.float64) if "weight" in flat else np.ones(total)
    if not ((weight > 0) & (weight < np.inf)).all():
        raise place.error("weight", "must be finite and above 0")
    tokens = LoggedTokens(**numbers, **reals, weight=weight)  # type: ignore[arg-type]
    if "response_mask" in flat:
        tokens = select(tokens, _valid(flat["response_mask"], place))
    return tokens, rows


def select(tokens: LoggedTokens, which: BoolArray | slice) -> LoggedTokens:
    """Returns some of the tokens."""
    return LoggedTokens(*(None if field is None else field[which] for field in tokens))  # type: ignore[arg-type]


def concatenate(parts: list[LoggedTokens]) -> LoggedTokens:
    """Returns the tokens of all parts, which have the same fields."""
    if len(parts) == 1:
        return parts[0]
    joined = (None if f[0] is None else np.concatenate(f) for f in zip(*parts, strict=True))
    return LoggedTokens(*joined)  # type: ignore[arg-type]


def _check_shape(
    field: str, column: Column, rows: int, lengths: Int64Array | None, place: Place
) -> None:
    """Raises unless a column has one number a row, or as many as there are tokens."""
    found = len(column.values if column.lengths is None else column.lengths)
    name = place.columns["log_prob"]
    if found != rows:
        raise place.error(field, f"has {found} rows, and {name!r} has {rows}")
    if column.lengths is None:
        if lengths is not None and field in _OF_TOKENS:
            raise place.error(field, f"must have lists, as {name!r} has")
    elif lengths is None or not np.array_equal(column.lengths, lengths):
        raise place.error(field, f"must have lists as long as those of {name!r}, or one number")


_OF_TOKENS = ("old_log_prob", "rollout_log_prob", "response_mask")


def _spread(lengths: Int64Array | None) -> Callable[[Column], NDArray[Any]]:
    """Returns the function that gives a number of a row to each of its tokens."""

    def spread(column: Column) -> NDArray[Any]:
        if lengths is None or column.lengths is not None:
            return column.values
        return np.repeat(column.values, lengths)

    return spread


def _whole(field: str, values: NDArray[Any], place: Place) -> Int64Array:
    """Returns whole numbers as int64."""
    if values.dtype.kind == "f":
        if not ((np.abs(values) <= 2.0**53) & (values == np.floor(values))).all():
            raise place.error(field, "must hold whole numbers, at most 2^53 if they are floats")
    elif values.dtype.kind == "u" and values.dtype.itemsize == 8 and (values >> 63).any():
        raise place.error(field, "must hold numbers below 2^63")
    return values.astype(np.int64, copy=False)


def _valid(values: NDArray[Any], place: Place) -> BoolArray:
    """Returns which tokens count."""
    if values.dtype == np.bool_:
        return values
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise place.error("response_mask", "must have a number for each token: 0 is not counted")
    return np.asarray(values != 0)


def columns_of(
    path: Path, names: tuple[str, ...], wanted: Mapping[str, str] | None
) -> dict[str, str]:
    """Returns the name of the column of each field that a file has.

    Raises:
        TokenFileError: If a column is missing.
    """
    wanted = wanted or {}
    found = {}
    for field in FIELDS:
        name = wanted.get(field, field)
        if name in names:
            found[field] = name
        elif field in REQUIRED or field in wanted:
            raise TokenFileError(
                f"{path}: has no column {name!r} for {field}; it has {_listed(names)}"
                f"{suggestion(name, names)} Give columns={{{field!r}: ...}} for another name"
            )
    return found


def _listed(names: tuple[str, ...], most: int = 30) -> str:
    listed = ", ".join(name[:60] for name in names[:most]) or "no columns"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
