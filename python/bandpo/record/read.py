"""Files of logged tokens, read together and in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from bandpo.check import check_name
from bandpo.error import InputPathError, InvalidValueError, TokenFileError
from bandpo.record.arrays import NpzFile
from bandpo.record.layout import (
    FIELDS,
    Place,
    TokenFile,
    columns_of,
    concatenate,
    select,
    tokens_of,
)
from bandpo.record.tokens import LoggedTokens, LogMetadata

PathLike: TypeAlias = str | os.PathLike[str]


class TokenFiles:
    """Logged tokens of one or more files, which can be iterated over many times.

    An iteration reads the files again and yields chunks of ``chunk`` tokens, the last one less.

    Attributes:
        metadata: Data of the log; ``rank`` is None unless all tokens are of one rank.
        paths: Its files, in the order in which they are read.
    """

    def __init__(self, files: Sequence[TokenFile], columns: Mapping[str, str], chunk: int) -> None:
        self._files = [(file, columns_of(file.path, file.names, columns)) for file in files]
        self._chunk = chunk
        self.metadata = _common_metadata(files)
        self.paths = tuple(file.path for file in files)

    def __iter__(self) -> Iterator[LoggedTokens]:
        waiting: list[LoggedTokens] = []
        count = 0
        for tokens in self._pieces():
            start = 0
            while count + len(tokens.step) - start >= self._chunk:
                end = start + self._chunk - count
                yield concatenate([*waiting, select(tokens, slice(start, end))])
                waiting, count, start = [], 0, end
            if start < len(tokens.step):
                waiting.append(select(tokens, slice(start, None)))
                count += len(tokens.step) - start
        if waiting:
            yield concatenate(waiting)

    def _pieces(self) -> Iterator[LoggedTokens]:
        row = 0
        for file, columns in self._files:
            place = Place(file.path, columns)
            for block in file.blocks(columns, self._chunk):
                tokens, rows = tokens_of(block, place, row)
                row += rows
                yield tokens


def read_tokens(
    paths: PathLike | Sequence[PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    chunk: int = 2**20,
) -> TokenFiles:
    """Returns the logged tokens of files, which are read when they are iterated over.

    Args:
        paths: A file or several, which are read one after the other.
        columns: Names of the columns of the files, by field, such as
            ``{"old_log_prob": "old_logprobs"}``; by default each has the name of its field.
        chunk: Tokens in memory at a time.

    Raises:
        InputPathError: If a file cannot be read.
        TokenFileError: If it is damaged, of no known format, or lacks a column.
        InvalidValueError: If an argument is out of range or names no field.
    """
    columns = dict(columns or {})
    for field in columns:
        check_name("field of columns", field, FIELDS)
    if chunk < 1:
        raise InvalidValueError(f"chunk must be at least 1, got {chunk}")
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [_opened(Path(path)) for path in listed]
    if not files:
        raise InvalidValueError("paths must name a file")
    return TokenFiles(files, columns, chunk)


def _opened(path: Path) -> TokenFile:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputPathError(f"cannot read {path}: {error.strerror}") from None
    if start.startswith(b"PK\x03\x04"):
        return NpzFile(path)
    raise TokenFileError(f"{path}: is no npz file")


def _common_metadata(files: Sequence[TokenFile]) -> LogMetadata:
    """The metadata of all files, which may differ in the rank alone."""
    first, *others = (file.metadata for file in files)
    for file, metadata in zip(files[1:], others, strict=True):
        if replace(metadata, rank=first.rank) != first:
            raise TokenFileError(
                f"{file.path} and {files[0].path} are of different runs: {metadata} is not {first}"
            )
    ranks = {metadata.rank for metadata in (first, *others)}
    return first if len(ranks) == 1 else replace(first, rank=None)
