"""Rows of a file to tokens: one row a token, or one a sequence with lists of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray, suggestion
from bandpo.error import TokenFileError
from bandpo.record.tokens import UNKNOWN, Int64Array, LoggedTokens, LogMetadata

REQUIRED = ("old_log_prob", "log_prob", "advantages")
SHARED = ("rollout_log_prob", "reward")
"""Optional fields that files which are read together all have, or none."""
WHOLE = ("step", "sequence", "position")
"""Fields of whole numbers."""
FIELDS = (*REQUIRED, *SHARED, *WHOLE, "weight", "response_mask")
"""Columns that are read, by the names that they have unless an option names others."""

LONGEST_ROW = 2**26
"""Max tokens of a row: one row is in memory as a whole."""

_OF_TOKENS = ("old_log_prob", "rollout_log_prob", "response_mask")
"""Fields that have one number a token, never one a row."""


class Column(NamedTuple):
    """Real numbers of some rows: one a row, or a list of them."""

    values: NDArray[Any]  # of all rows, in order
    lengths: Int64Array | None = None  # numbers of each row, if rows have lists


Block = Mapping[str, Column]
"""Columns of some rows that follow each other, by field."""


class TokenFile(Protocol):
    """A file of one format, whose header was read."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def metadata(self) -> LogMetadata:
        """Its metadata."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its columns."""

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows, in blocks of about so many tokens.

        Args:
            columns: Name of the column of each field.
            tokens: Size of a block.

        Raises:
            TokenFileError: If the content is damaged.
            OSError: If it cannot be read.
        """


class Place(NamedTuple):
    """A file and the names of its columns, for messages."""

    path: Path
    columns: Mapping[str, str]

    def error(self, field: str, message: str) -> TokenFileError:
        """Returns an error of the column of a field."""
        return TokenFileError(f"{self.path}: column {self.columns[field]!r} {message}")

    @classmethod
    def of(cls, file: TokenFile, wanted: Mapping[str, str]) -> Place:
        """Returns a file with the columns that it has.

        Args:
            file: The file.
            wanted: Name of the column of some fields; others have the name of their field.

        Raises:
            TokenFileError: If a column is missing that is required, or that has a name in
                ``wanted``, or is there twice.
        """
        found = {}
        for field in FIELDS:
            name = wanted.get(field, field)
            if file.names.count(name) > 1:
                raise TokenFileError(f"{file.path}: has more than one column {name!r}")
            if name in file.names:
                found[field] = name
            elif field in REQUIRED or field in wanted:
                option = (
                    ""
                    if field in wanted
                    else f"; another is given by columns={{{field!r}: name}}, or in the command by "
                    f"--column {field}=name"
                )
                raise TokenFileError(
                    f"{file.path}: has no column {name!r} for {field}, only "
                    f"{_listed(file.names)}{option}{suggestion(name, file.names)}"
                )
        return cls(file.path, found)


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
    flat = {field: _of_each_token(column, lengths) for field, column in block.items()}
    if "response_mask" in flat:
        valid = _valid(flat.pop("response_mask"), place)
        flat = {field: values[valid] for field, values in flat.items()}
    else:
        valid = np.ones(len(flat["log_prob"]), np.bool_)

    if lengths is None:
        sequence = position = np.full(int(valid.sum()), UNKNOWN)
    else:
        starts = np.cumsum(lengths) - lengths
        sequence = np.repeat(np.arange(first_row, first_row + rows), lengths)[valid]
        position = (np.arange(len(valid)) - np.repeat(starts, lengths))[valid]
    defaults = {"step": np.zeros_like(sequence), "sequence": sequence, "position": position}
    whole = {
        field: _whole(field, flat[field], place) if field in flat else defaults[field]
        for field in WHOLE
    }
    real = {
        field: flat[field].astype(np.float64, copy=False) if field in flat else None
        for field in (*REQUIRED, *SHARED)
    }
    weight = flat.get("weight", np.ones(len(sequence))).astype(np.float64, copy=False)
    if not ((weight > 0) & (weight < np.inf)).all():
        raise place.error("weight", "must be finite and above 0")
    return LoggedTokens(**whole, **real, weight=weight), rows  # type: ignore[arg-type]


def select(tokens: LoggedTokens, which: slice) -> LoggedTokens:
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
            raise place.error(field, f"must have a list in each row, as {name!r} has")
    elif lengths is None:
        raise place.error(field, f"must have one number in each row, as {name!r} has")
    elif not np.array_equal(column.lengths, lengths):
        raise place.error(field, f"must have lists as long as those of {name!r}")


def _of_each_token(column: Column, lengths: Int64Array | None) -> NDArray[Any]:
    """Returns one number a token, where a row may have one for all of its tokens."""
    if lengths is None or column.lengths is not None:
        return column.values
    return np.repeat(column.values, lengths)


def _whole(field: str, values: NDArray[Any], place: Place) -> Int64Array:
    """Returns whole numbers as int64."""
    if values.dtype.kind == "f":
        if not ((np.abs(values) <= 2.0**53) & (values == np.floor(values))).all():
            raise place.error(field, "must hold whole numbers, as floats at most 2^53")
    elif values.dtype.kind == "u" and (values > np.iinfo(np.int64).max).any():
        raise place.error(field, "must hold numbers below 2^63")
    return values.astype(np.int64, copy=False)


def _valid(values: NDArray[Any], place: Place) -> BoolArray:
    """Returns which tokens count."""
    if values.dtype.kind == "f" and not (values == np.floor(values)).all():
        raise place.error(
            "response_mask",
            "must have a whole number for each token, 0 if masked; shares of tokens are a weight",
        )
    return np.asarray(values != 0)


def _listed(names: tuple[str, ...]) -> str:
    """The names of the columns, cut where a file has absurd ones."""
    listed = ", ".join(name[:60] for name in names[:30]) or "no columns"
    return listed if len(names) <= 30 else f"{listed} and {len(names) - 30} more"
