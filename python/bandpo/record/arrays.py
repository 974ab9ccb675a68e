"""Files of arrays, npz and safetensors, read piece by piece with numpy alone."""

from __future__ import annotations

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo.error import TokenFileError
from bandpo.record.keys import parsed
from bandpo.record.layout import LONGEST_ROW, Block, Column
from bandpo.record.tokens import LogMetadata

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError),
    *(NotImplementedError, RuntimeError),  # unknown compression, encryption
)
"""Errors of zipfile, its decompressors and numpy's headers on content that they cannot read."""

_LONGEST_HEADER = 2**26
"""Max bytes of the header of a safetensors file."""

_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
}
"""Dtypes of safetensors; BF16 is the upper half of a float32."""


class _Array(NamedTuple):
    """An array of a file, whose data has the size of its shape."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Read: TypeAlias = Callable[[str, int, int], NDArray[Any]]
"""Elements of the array of a field: the field, the first one, and their number."""


class NpzFile:
    """An npz file, with arrays [N], or [B, T] and others [B], [B, 1] or []."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        with self._archive() as archive:
            files = [info.filename for info in archive.infolist()]
        self._members = {file.removesuffix(".npy"): file for file in files}
        self.names = tuple(file.removesuffix(".npy") for file in files)

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        with self._archive() as archive, ExitStack() as stack:
            streams: dict[str, IO[bytes]] = {}
            arrays: dict[str, _Array] = {}
            for field, name in columns.items():
                info = archive.getinfo(self._members[name])
                streams[field] = stack.enter_context(archive.open(info))
                arrays[field] = self._header(streams[field], name, info.file_size)

            def read(field: str, first: int, count: int) -> NDArray[Any]:
                # The elements before the first have been read, because a stream is in order.
                return _elements(streams[field], arrays[field], count)

            yield from _blocks(self.path, arrays, read, tokens)

    def _header(self, stream: IO[bytes], name: str, size: int) -> _Array:
        """The array that a member of so many bytes begins."""
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, in_fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"array {name!r} has version {version} of npy, not 1.0 or 2.0")
        array = _Array(name, shape, dtype)
        if dtype.kind not in "fiub":
            raise ValueError(f"array {name!r} must hold bool, int or float, got dtype {dtype}")
        if in_fortran_order and len(shape) > 1:
            raise ValueError(f"array {name!r} must be in C order, as ascontiguousarray makes it")
        if any(length < 0 for length in shape) or stream.tell() + array.size != size:
            raise ValueError(f"array {name!r} has another size than its shape {shape}")
        return array

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with _damage_named(self.path, "npz"), zipfile.ZipFile(self.path) as archive:
            yield archive


class SafetensorsFile:
    """A safetensors file, with tensors [N], or [B, T] and others [B], [B, 1] or []."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = LogMetadata()
        with _damage_named(path, "safetensors"), path.open("rb") as file:
            self._tensors = dict(self._header(file))
        self.names = tuple(self._tensors)

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        wanted = {field: self._tensors[name] for field, name in columns.items()}
        arrays = {
            field: _Array(columns[field], shape, np.dtype(_DTYPES[dtype]))
            for field, (dtype, shape, _) in wanted.items()
        }
        with _damage_named(self.path, "safetensors"), self.path.open("rb") as file:

            def read(field: str, first: int, count: int) -> NDArray[Any]:
                dtype, _, start = wanted[field]
                file.seek(start + first * arrays[field].dtype.itemsize)
                values = _elements(file, arrays[field], count)
                if dtype == "BF16":
                    return (values.astype(np.uint32) << 16).view(np.float32)
                return values

            yield from _blocks(self.path, arrays, read, tokens)

    def _header(self, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
        """Dtype, shape and place of each tensor by name."""
        bytes_of_file = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if size > min(bytes_of_file - 8, _LONGEST_HEADER):
            raise ValueError(f"its header has {size} bytes, and the file {bytes_of_file}")
        try:
            header = parsed(file.read(size))
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                dtype, shape = entry["dtype"], tuple(entry["shape"])
                start, end = entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
            numbers = (*shape, start, end)
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"tensor {name!r} has a shape or offsets that are no sizes")
            if dtype in _DTYPES:  # other tensors may be there, and are not read
                array = _Array(name, shape, np.dtype(_DTYPES[dtype]))
                if array.size != end - start or 8 + size + end > bytes_of_file:
                    raise ValueError(f"tensor {name!r} has other bytes than its shape {shape}")
                yield name, (dtype, shape, 8 + size + start)


def _elements(stream: IO[bytes], array: _Array, count: int) -> NDArray[Any]:
    """The next elements of a stream."""
    content = stream.read(count * array.dtype.itemsize)
    if len(content) != count * array.dtype.itemsize:
        raise EOFError(f"array {array.name!r} ends too early")
    return np.frombuffer(content, array.dtype)


def _blocks(path: Path, arrays: Mapping[str, _Array], read: Read, tokens: int) -> Iterator[Block]:
    """Yields the rows of arrays, whose shapes are checked."""
    name, shape, _ = arrays["log_prob"]
    if len(shape) not in (1, 2):
        raise ValueError(f"array {name!r} must have shape [N] or [B, T], got {shape}")
    rows, width = shape if len(shape) == 2 else (shape[0], 1)
    if width > LONGEST_ROW:
        raise ValueError(f"array {name!r} has {width} tokens a row, above {LONGEST_ROW}")
    # Numbers a row, or 0 where all rows have the same one.
    sizes = {(): 0, (1,): 0, (rows,): 1, (rows, 1): 1, shape: width}
    for array in arrays.values():
        if array.shape not in sizes:
            raise ValueError(
                f"array {array.name!r} must have shape {shape}, ({rows},), ({rows}, 1) or (), "
                f"because {name!r} has {shape}, got {array.shape}"
            )
    same = {f: read(f, 0, 1) for f, array in arrays.items() if sizes[array.shape] == 0 < rows}
    many = max(1, tokens // max(width, 1))
    for first in range(0, rows, many):
        count = min(many, rows - first)
        block = {}
        for field, array in arrays.items():
            if field in same:
                block[field] = Column(np.repeat(same[field], count))
                continue
            size = sizes[array.shape]
            lists = len(shape) == 2 and array.shape == shape
            values = read(field, first * size, count * size)
            block[field] = Column(values, np.full(count, width) if lists else None)
        yield block


@contextmanager
def _damage_named(path: Path, form: str) -> Iterator[None]:
    """Turns errors of damaged content into those of the file."""
    try:
        yield
    except TokenFileError:
        raise
    except _DAMAGE as error:
        raise TokenFileError(f"{path}: cannot be read as {form}: {error}") from None
