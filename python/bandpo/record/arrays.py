"""Files of arrays: npz, read with numpy alone and piece by piece."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bandpo.error import TokenFileError
from bandpo.record.layout import LONGEST_ROW, Block, Column
from bandpo.record.tokens import LogMetadata

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError),
    *(NotImplementedError, RuntimeError, OverflowError, SyntaxError, RecursionError),
)
"""Errors of zipfile and numpy on content that is damaged, encrypted or of another kind."""


class _Array(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzFile:
    """An npz file: arrays [N] or [], or [B, T] with others [B], [B, 1] or []."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        with self._opened() as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            self._members = {name: info.filename for name, info in members.items()}
        self.names = tuple(self._members)

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        with self._opened() as archive, ExitStack() as stack:
            streams: dict[str, IO[bytes]] = {}
            arrays: dict[str, _Array] = {}
            for field, name in columns.items():
                size = archive.getinfo(self._members[name]).file_size
                streams[field] = stack.enter_context(archive.open(self._members[name]))
                arrays[field] = self._header(streams[field], name, size)
            yield from blocks_of(self.path, columns, arrays, _reader(streams, arrays), tokens)

    def _header(self, stream: IO[bytes], name: str, size: int) -> _Array:
        """The shape and dtype of an array, whose data must have the size that they say."""
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise self._error(name, f"has version {version} of the format npy, not 1.0 or 2.0")
        shape, in_fortran_order, dtype = read(stream)
        if dtype.kind not in "fiub":
            raise self._error(name, f"must hold bool, int or float, got dtype {dtype}")
        if in_fortran_order and len(shape) > 1:
            raise self._error(name, "is in Fortran order: save numpy.ascontiguousarray(it)")
        if stream.tell() + math.prod(shape) * dtype.itemsize != size:
            raise self._error(name, f"has shape {shape}, dtype {dtype} and not their size in bytes")
        return _Array(shape, dtype)

    def _error(self, name: str, message: str) -> TokenFileError:
        return TokenFileError(f"{self.path}: array {name!r} {message}")

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except TokenFileError:
            raise
        except _DAMAGE as error:
            raise TokenFileError(f"{self.path}: is no whole npz file: {error}") from None


class _Reader:
    """Reads the next elements of an array."""

    def __init__(self, streams: Mapping[str, IO[bytes]], arrays: Mapping[str, _Array]) -> None:
        self._streams, self._arrays = streams, arrays

    def __call__(self, field: str, start: int, count: int) -> NDArray[Any]:
        dtype = self._arrays[field].dtype
        content = self._streams[field].read(count * dtype.itemsize)
        if len(content) != count * dtype.itemsize:
            raise EOFError("an array ends before its size")
        return np.frombuffer(content, dtype)


def _reader(streams: Mapping[str, IO[bytes]], arrays: Mapping[str, _Array]) -> _Reader:
    return _Reader(streams, arrays)


def blocks_of(
    path: Path,
    columns: Mapping[str, str],
    arrays: Mapping[str, _Array],
    read: _Reader,
    tokens: int,
) -> Iterator[Block]:
    """Yields the rows of arrays.

    Args:
        path: The file.
        columns: Name of the array of each field.
        arrays: The array of each field.
        read: Returns elements of an array in one dimension: those of a field, from a start on.
        tokens: Size of a block.

    Raises:
        TokenFileError: If shapes do not fit together.
    """
    shape = arrays["log_prob"].shape
    if not 1 <= len(shape) <= 2:
        raise TokenFileError(
            f"{path}: array {columns['log_prob']!r} must have shape [N] or [B, T], got {shape}"
        )
    width = shape[1] if len(shape) == 2 else 1
    if width > LONGEST_ROW:
        raise TokenFileError(
            f"{path}: array {columns['log_prob']!r} has rows of {width} tokens, above {LONGEST_ROW}"
        )
    rows = shape[0]
    widths = {}
    for field, array in arrays.items():
        allowed = {(): 0, (rows,): 1, (rows, 1): 1, shape: width}
        if array.shape not in allowed:
            raise TokenFileError(
                f"{path}: array {columns[field]!r} must have shape {shape}, {(rows,)} or (), "
                f"like {columns['log_prob']!r}, got {array.shape}"
            )
        widths[field] = allowed[array.shape]
    constants = {field: read(field, 0, 1) for field, size in widths.items() if size == 0}
    step = max(1, tokens // max(width, 1))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = {}
        for field, size in widths.items():
            if size == 0:
                block[field] = Column(np.repeat(constants[field], count))
            else:
                values = read(field, start * size, count * size)
                lists = len(arrays[field].shape) == 2 and size == width and len(shape) == 2
                block[field] = Column(values, np.full(count, width) if lists else None)
        yield block
