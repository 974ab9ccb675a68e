"""Files of logged tokens, read together and in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias

from bandpo.check import check_name, whole_number
from bandpo.error import InputPathError, InvalidTypeError, InvalidValueError, TokenFileError
from bandpo.record.arrays import NpzFile, SafetensorsFile
from bandpo.record.layout import (
    FIELDS,
    SHARED,
    Place,
    TokenFile,
    concatenate,
    select,
    tokens_of,
)
from bandpo.record.text import CsvFile, JsonLinesFile
from bandpo.record.tokens import LoggedTokens, LogMetadata

PathLike: TypeAlias = str | os.PathLike[str]

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".npz", ".safetensors")
"""Suffixes of the files that are read in a folder; the format itself is found by the content."""


class TokenFiles:
    """Logged tokens of one or more files, which can be iterated over many times.

    An iteration reads the files again and yields chunks of ``chunk`` tokens, the last one of fewer.

    Attributes:
        metadata: Data of the log; ``rank`` and ``world_size`` are None if files differ in them.
        paths: Its files, in the order in which they are read.
    """

    metadata: LogMetadata
    paths: tuple[Path, ...]

    def __init__(self, files: Sequence[TokenFile], columns: Mapping[str, str], chunk: int) -> None:
        self._chunk = chunk
        self._files = [(file, Place.of(file, columns)) for file in files]
        for file, place in self._files[1:]:
            _check_alike(self._files[0], (file, place))
        self.metadata = _common(files)
        self.paths = tuple(file.path for file in files)

    def __iter__(self) -> Iterator[LoggedTokens]:
        waiting: list[LoggedTokens] = []
        count = 0
        for tokens in self._pieces():
            start, size = 0, len(tokens.step)
            while count + size - start >= self._chunk:
                end = start + self._chunk - count
                yield concatenate([*waiting, select(tokens, slice(start, end))])
                waiting, count, start = [], 0, end
            if start < size:
                waiting.append(select(tokens, slice(start, size)))
                count += size - start
        if waiting:
            yield concatenate(waiting)

    def _pieces(self) -> Iterator[LoggedTokens]:
        row = 0
        for file, place in self._files:
            try:
                for block in file.blocks(place.columns, self._chunk):
                    tokens, rows = tokens_of(block, place, row)
                    row += rows
                    yield tokens
            except OSError as error:
                raise _unreadable(file.path, error) from None


def read_tokens(
    paths: PathLike | Sequence[PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    chunk: int = 2**20,
) -> TokenFiles:
    """Returns the logged tokens of files, which are read when they are iterated over.

    A file is Parquet, JSON lines, CSV, npz or safetensors, by its content. It has one row a token,
    or one a sequence with lists of its tokens (arrays [B, T]); then ``advantages``, ``reward`` and
    others may be one number a row, or for arrays one of the file. Columns by field:

    - old_log_prob, log_prob, advantages: needed
    - response_mask: tokens with 0 are left out
    - rollout_log_prob, reward, step, sequence, position, weight: as `LoggedTokens` has them

    Other columns are not read. In text a number may be missing, and is NaN. A file of lines may be
    unfinished: it is read up to its last whole line. So is the folder of a `Recorder` whose run was
    killed. Ranks are read together.

    Memory is bounded by ``chunk`` and by the longest rows. A row may have 2^26 tokens, or in text
    2^26 bytes.

    Args:
        paths: A file, a folder (all of its files of these kinds are read), or several.
        columns: Names of the files' columns, by field, such as
            ``{"old_log_prob": "old_logprobs"}``; by default each has the name of its field.
        chunk: Tokens in memory at a time.

    Raises:
        InputPathError: If a file cannot be read.
        TokenFileError: If it is damaged, of no known format, or lacks a column; also in an
            iteration.
        InvalidTypeError: If ``paths`` are none, or ``chunk`` is no whole number.
        InvalidValueError: If ``chunk`` is below 1, or ``columns`` names no field.
        MissingExtraError: If a file is Parquet and pyarrow is not installed.
    """
    columns = dict(columns or {})
    for field in columns:
        check_name("field of columns", field, FIELDS)
    chunk = whole_number("chunk", chunk, 1)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidTypeError(f"paths must be one or more paths, got {path!r}")
    listed = [file for path in given for file in _files_of(Path(path))]
    if not listed:
        raise InvalidValueError("paths must name a file, got none")
    return TokenFiles([_opened(path) for path in listed], columns, chunk)


def _files_of(path: Path) -> list[Path]:
    """A file, or those of a folder that hold tokens."""
    if not path.is_dir():
        return [path]
    try:
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in SUFFIXES and not file.name.startswith((".", "_"))
        )
    except OSError as error:
        raise _unreadable(path, error) from None
    if not files:
        raise TokenFileError(f"{path}: holds no file whose name ends with {', '.join(SUFFIXES)}")
    return files


def _opened(path: Path) -> TokenFile:
    """The file in the format of its content."""
    if path.exists() and not path.is_file():  # a pipe would wait, and can be read once alone
        raise InputPathError(f"cannot read {path}: it is not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            size = file.seek(0, os.SEEK_END)
        return _formatted(path, start, size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _formatted(path: Path, start: bytes, size: int) -> TokenFile:
    if start.startswith(b"PAR1"):
        from bandpo.record.parquet import ParquetFile  # pyarrow is optional

        return ParquetFile(path)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return NpzFile(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return SafetensorsFile(path)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text or b"\0" in text or text.startswith((b"[", b"\x1f\x8b", b"ARROW1")):
        raise TokenFileError(
            f"{path}: must be Parquet, npz, safetensors, CSV with a line of names, or JSON lines "
            f"with an object on each, got {'an empty file' if not size else start[:8]!r}"
        )
    return JsonLinesFile(path) if text.startswith(b"{") else CsvFile(path)


def _check_alike(first: tuple[TokenFile, Place], other: tuple[TokenFile, Place]) -> None:
    """Raises unless both files have the same optional columns and are of one run."""
    (file, place), (other_file, other_place) = first, other
    for field in SHARED:
        if (field in place.columns) != (field in other_place.columns):
            has, lacks = (file, other_file) if field in place.columns else (other_file, file)
            raise TokenFileError(f"{lacks.path}: has no {field}, which {has.path} has")
    for name in (field.name for field in fields(LogMetadata)):
        value, other_value = getattr(file.metadata, name), getattr(other_file.metadata, name)
        if value != other_value and name not in ("rank", "world_size"):
            raise TokenFileError(
                f"{other_file.path}: is of another run than {file.path}: its {name} is "
                f"{other_value!r}, not {value!r}"
            )


def _common(files: Sequence[TokenFile]) -> LogMetadata:
    """The metadata of all files, which may differ in rank and world size."""
    first = files[0].metadata
    same = {
        name: getattr(first, name)
        if all(getattr(file.metadata, name) == getattr(first, name) for file in files)
        else None
        for name in ("rank", "world_size")
    }
    return replace(first, rank=same["rank"], world_size=same["world_size"])


def _unreadable(path: Path, error: OSError) -> InputPathError:
    return InputPathError(f"cannot read {path}: {error.strerror or error}")
