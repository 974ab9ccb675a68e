"""Parquet files of tokens, by pyarrow: those of a recorder, and others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo.error import BrokenExtraError, MissingExtraError, TokenFileError
from bandpo.record.layout import LONGEST_ROW, Block, Column
from bandpo.record.tokens import LogMetadata

try:
    import pyarrow
    import pyarrow.parquet
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "pyarrow":
        raise
    raise MissingExtraError("pyarrow", "record") from None
except ImportError as broken:
    raise BrokenExtraError(f"pyarrow is installed but cannot be imported: {broken}") from broken

FORMAT_VERSION = 1
"""Version of the format of a recorder's files; see `encoded`."""

_KEY = b"bandpo"
"""Entry of a file's metadata that holds a `LogMetadata` as JSON."""

_BUFFER = 2**20
"""Bytes of a column that are read at a time, in place of all of a row group."""

ROWS_OF_LISTS = 64
"""Rows that are read at a time where a row is a sequence, which may have many tokens."""

_LONGEST_FOOTER = 2**26
"""Max bytes of a text in the footer of a file."""


def encoded(columns: Mapping[str, NDArray[Any]], metadata: LogMetadata) -> bytes:
    """Returns a Parquet file: columns by the names of their fields, and metadata as JSON.

    Args:
        columns: Those of `bandpo.record.LoggedTokens`, log-probs and advantages as float32 or
            float64.
        metadata: Data of the log.
    """
    table = pyarrow.table(dict(columns))
    content = json.dumps(asdict(metadata)).encode()
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({_KEY: content}),
        sink,
        compression="zstd",
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


class ParquetFile:
    """A Parquet file with one row a token, or one a sequence with lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            schema = file.schema_arrow
            self.names = tuple(schema.names)
            self.metadata = _metadata(path, (schema.metadata or {}).get(_KEY))

    def blocks(self, columns: Mapping[str, str], tokens: int) -> Iterator[Block]:
        """Yields all rows; see `bandpo.record.layout.TokenFile`."""
        with self._opened() as file:
            for field, name in columns.items():
                self._check_type(field, name, file.schema_arrow)
            lists = _is_list(file.schema_arrow.field(columns["log_prob"]).type)
            # The counts in the footer are not read: on damaged ones pyarrow ends the process.
            batches = file.iter_batches(
                batch_size=min(tokens, ROWS_OF_LISTS) if lists else tokens,
                columns=list(dict.fromkeys(columns.values())),
                use_threads=False,
            )
            for batch in batches:
                yield {
                    field: self._column(name, batch.column(name)) for field, name in columns.items()
                }

    def _check_type(self, field: str, name: str, schema: Any) -> None:
        given = schema.field(name).type
        kind = given.value_type if _is_list(given) else given
        types = pyarrow.types
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise TokenFileError(
                f"{self.path}: column {name!r} must hold bool, int or float, or lists of them, "
                f"for {field}, got {given}"
            )

    def _column(self, name: str, array: Any) -> Column:
        if not _is_list(array.type):
            return Column(_numbers(array))
        fixed = pyarrow.types.is_fixed_size_list(array.type)
        lengths = (
            np.where(_numbers(array.is_valid()), array.type.list_size, 0)
            if fixed
            else _numbers(array.value_lengths().fill_null(0)).astype(np.int64)
        )
        if len(lengths) and lengths.max() > LONGEST_ROW:
            raise TokenFileError(
                f"{self.path}: column {name!r} has a list of {lengths.max()}, above {LONGEST_ROW}"
            )
        return Column(_numbers(array.flatten()), lengths)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(
                self.path,
                buffer_size=_BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,  # of files that have them
                thrift_string_size_limit=_LONGEST_FOOTER,
                thrift_container_size_limit=_LONGEST_FOOTER,
            ) as file:
                yield file
        except TokenFileError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).rstrip(".")
            raise TokenFileError(
                f"{self.path}: cannot be read as Parquet: {reason}. A writer that was stopped "
                f"leaves a file without its end"
            ) from None


def _is_list(given: Any) -> bool:
    types = pyarrow.types
    return bool(
        types.is_list(given) or types.is_large_list(given) or types.is_fixed_size_list(given)
    )


def _numbers(array: Any) -> NDArray[Any]:
    """The numbers of an array in numpy; what is missing is NaN."""
    if array.null_count:
        array = array.cast(pyarrow.float64()).fill_null(math.nan)
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _metadata(path: Path, content: bytes | None) -> LogMetadata:
    """The metadata of a file, which is checked, because the file may be anyone's."""
    if content is None:
        return LogMetadata()
    try:
        found = dict(json.loads(content))
        version = int(found["format_version"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise TokenFileError(f"{path}: its metadata of bandpo cannot be read") from None
    if version > FORMAT_VERSION:
        raise TokenFileError(
            f"{path}: has version {version} of the format, above {FORMAT_VERSION}: it was written "
            f"by a newer bandpo"
        )
    metadata = LogMetadata(**{field.name: found.get(field.name) for field in fields(LogMetadata)})
    kinds = {
        "temperature": (int, float),
        "dtype": str,
        "old_policy": str,
        "rule": dict,
        "format_version": int,
        "rank": int,
        "world_size": int,
    }
    for name, kind in kinds.items():
        value = getattr(metadata, name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):  # type: ignore[arg-type]
            raise TokenFileError(f"{path}: its metadata of bandpo has the {name} {value!r}")
    return metadata
