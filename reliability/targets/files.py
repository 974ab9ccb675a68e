"""Tables, checkpoints and logged tokens as damaged or forged files."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo import Band, BandTable
from bandpo._core import BandTable as CoreTable
from bandpo.error import BandpoError
from bandpo.record import read_tokens
from bandpo.table.verification import Checkpoint
from reliability.choices import Choices
from reliability.targets.texts import corpus, text_of

Array = NDArray[Any]


@cache
def folder() -> Path:
    """The folder of the files of all cases, which is removed at the end of the process."""
    made = tempfile.mkdtemp(prefix="bandpo-fuzz-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


TABLE = Band("kl", 0.05).table()._core.to_bytes()


def damaged(choices: Choices, whole: bytes) -> bytes:
    """The bytes with some changes."""
    file = bytearray(whole)
    for _ in range(choices.below(4)):
        place = choices.below(len(file) + 1)
        kind = choices.below(6)
        if kind == 0:
            del file[place:]
        elif kind == 1:
            del file[place : place + choices.below(16)]
        elif kind == 2:
            file[place:place] = whole[place : place + choices.below(300)]
        elif kind == 3:
            file[place : place + 8] = (2 ** choices.below(64)).to_bytes(8, "little")
        elif kind == 4 and place < len(file):
            file[place] ^= 1 << choices.below(8)
        else:
            file[place : place + 1] = choices.of(_BYTES)
    return bytes(file)


_BYTES = (
    *(b"", b"{", b"[", b'"', b"-", b"9" * 30, b"1e999", b"NaN", b"null"),
    *(b"\xff\xfe", b"\0", b"\n", b","),
)


def forged(region: str) -> bytes:
    """A table file of any description, with its checksum."""
    (size,) = struct.unpack_from("<Q", TABLE)
    header = json.loads(TABLE[8 : 8 + size])
    metadata, image = header["__metadata__"], TABLE[8 + size :]
    metadata["region"] = region
    digest = hashlib.sha256()
    order = ("format", "format_version", "region", "grid", "max_error_log_upper")
    for key in (*order, "max_error_lower", "verification"):
        for part in (key.encode(), metadata[key].encode("utf-8", "replace")):
            digest.update(struct.pack("<Q", len(part)) + part)
    digest.update(image)
    metadata["checksum"] = digest.hexdigest()
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + image


def descriptions(data: bytes) -> None:
    """Table files of any description, under a right checksum."""
    table = BandTable(CoreTable.from_bytes(forged(text_of(Choices(data), corpus("descriptions")))))
    table.region.log_bounds([-0.5])


def checkpoints(data: bytes) -> None:
    """Checkpoints of a verification."""
    path = folder() / "checkpoint.json"
    state = Checkpoint(None, TABLE, 100)
    whole = json.dumps({**state.key, "done": 3, "max_error": [1e-9, 0.0]}).encode()
    path.write_bytes(damaged(Choices(data), whole))
    found = Checkpoint(path, TABLE, 100)
    assert 0 <= found.done <= 100
    assert min(found.max_error) >= 0.0


def _token_rows(sequences: bool) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shape = (4, 3) if sequences else (12,)
    log: dict[str, Array] = {
        name: -rng.exponential(2.0, shape) for name in ("old_log_prob", "log_prob")
    }
    log["advantages"] = rng.normal(size=shape[:1])
    log["response_mask"] = rng.random(shape) < 0.7
    log["step"] = np.arange(shape[0])
    return log


@cache
def token_corpus() -> tuple[bytes, ...]:
    """Small whole files of every format, with a row a token and with a row a sequence."""
    from bandpo.record import Recorder

    files = []
    for log in map(_token_rows, (False, True)):
        names = list(log)
        rows = list(zip(*(array.tolist() for array in log.values()), strict=True))
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        files.append("\n".join(lines).encode() + b"\n")
        cells = [",".join(f'"{str(cell).lower()}"' for cell in row) for row in rows]
        files.append("\n".join([",".join(names), *cells]).encode() + b"\n")
        arrays = io.BytesIO()
        np.savez(arrays, **log)  # type: ignore[arg-type]
        files.append(arrays.getvalue())
        files.append(_safetensors(log))
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet

            parquet = io.BytesIO()
            table = pyarrow.table({name: array.tolist() for name, array in log.items()})
            pyarrow.parquet.write_table(table, parquet)
            files.append(parquet.getvalue())
    with contextlib.suppress(BandpoError), tempfile.TemporaryDirectory() as place:
        numbers = -np.ones((2, 3))
        with Recorder(place) as record:
            record(numbers, numbers, numbers, np.ones((2, 3)), step=1)
        files += [path.read_bytes() for path in Path(place).rglob("*.parquet")]
    return tuple(files)


def _safetensors(log: dict[str, Array]) -> bytes:
    header, body = {}, b""
    kinds = {"f8": "F64", "i8": "I64", "b1": "BOOL"}
    for name, array in log.items():
        place = len(body)
        body += array.tobytes()
        kind = kinds[array.dtype.str[1:]]
        offsets = [place, len(body)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def token_files(data: bytes) -> None:
    """Files of logged tokens in every format."""
    choices = Choices(data)
    path = folder() / "tokens"
    kind = choices.below(8)
    path.write_bytes(choices.rest() if kind == 0 else damaged(choices, choices.of(token_corpus())))
    for tokens in read_tokens(path, chunk=choices.of((1, 5, 2**20))):
        assert len(tokens.log_prob) == len(tokens.step)
