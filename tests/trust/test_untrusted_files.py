"""Files of anyone: each is read, or refused with an error of bandpo, in little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bandpo import Band, BandTable, Clip, Divergence, PriceBand, Region, region_from_spec
from bandpo._core import BandTable as CoreTable
from bandpo.conform.vectors import read_vectors
from bandpo.error import BandpoError, InputPathError, InvalidValueError, TableFileError
from bandpo.record import read_tokens
from bandpo.region import Dcpo, by_sign
from bandpo.table.verification import Checkpoint
from reliability.targets.files import forged

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files of Unix")

TABLE = Band("kl", 0.05).table()._core.to_bytes()

READERS: dict[str, Callable[[Path], object]] = {
    "table": BandTable.load,
    "tokens": lambda path: list(read_tokens(path)),
    "vectors": lambda path: read_vectors(path),
    "checkpoint": lambda path: Checkpoint(path, TABLE, 100),
}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return READERS[request.param]


def test_a_pipe_is_refused_without_waiting(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BandpoError, match="not a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(read: Callable[[Path], object], device: str) -> None:
    with pytest.raises(BandpoError, match="not a regular file"):
        read(Path(device))


def test_a_folder_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(BandpoError, match=r"[Dd]irectory|regular file|holds no file"):
        read(tmp_path)


def test_a_socket_is_refused(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # otherwise its path may be too long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(BandpoError):
            read(Path("socket"))


def test_links_lead_to_their_target_or_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(TABLE)
    (tmp_path / "link").symlink_to("table")
    assert BandTable.load(tmp_path / "link") == BandTable.load(tmp_path / "table")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("loop", "dangling"):
        with pytest.raises(InputPathError):
            BandTable.load(tmp_path / name)
        with pytest.raises(InputPathError):
            read_tokens(tmp_path / name)


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from bandpo import BandTable
from bandpo.conform.vectors import read_vectors
from bandpo.error import BandpoError
from bandpo.record import read_tokens
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    for read in (BandTable.load, read_vectors, lambda path: list(read_tokens(path))):
        try:
            read(path)
        except BandpoError:
            continue
        sys.exit(f"{path} was read")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
sys.exit(0 if grown < 64 * 1024 else f"{grown} KiB")
"""


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    paths: list[Path] = []

    def write(content: bytes, size: int | None = None) -> None:
        paths.append(tmp_path / str(len(paths)))
        paths[-1].write_bytes(content)
        if size is not None:
            os.truncate(paths[-1], size)  # a hole, which takes no room

    for header in (2**63, 2**63 - 1, 2**64 - 1, 2**62, 10**8):
        write(struct.pack("<Q", header) + b'{"a":')
    write(struct.pack("<Q", 2**31) + b'{"a":', 2**33)
    write(TABLE, 2**40)
    write(b"", 2**40)
    shape = [2**31, 2**31]
    for offsets in ([0, 2**63], [0, 8], [-1, 7], [0, 2**64]):
        tensor = {"dtype": "F64", "shape": shape, "data_offsets": offsets}
        names = ("old_log_prob", "log_prob", "advantages", "words")
        text = json.dumps(dict.fromkeys(names, tensor)).encode()
        write(struct.pack("<Q", len(text)) + text + bytes(8))
    write(b"[" * 10**6)
    write(b'{"old_log_prob": ' + b"[" * 10**6)
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, *map(str, paths)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_duplicate_keys_are_refused() -> None:
    (size,) = struct.unpack_from("<Q", TABLE)
    header, image = TABLE[8 : 8 + size], TABLE[8 + size :]
    for old, new in (
        (b'"words":', b'"words":{"dtype":"U32","shape":[1],"data_offsets":[0,4]},"words":'),
        (b'"format":', b'"format":"bandpo-table","format":'),
        (b'{"__metadata__":', b'{"__metadata__":{},"__metadata__":'),
    ):
        changed = header.replace(old, new, 1)
        assert changed != header
        changed += b" " * (-len(changed) % 8)
        with pytest.raises(TableFileError):
            CoreTable.from_bytes(struct.pack("<Q", len(changed)) + changed + image)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "1", "null", "{}", "{", '{"clip": 1}', '{"clip": [[], []]}'),
        *('{"clip": [0.2, 0.3], "band": 1}', '{"band": {}}', '{"band": {"delta": 1}}'),
        '{"band": {"divergence": 1, "delta": [1, 1]}}',
        '{"band": {"divergence": "kl", "delta": [-1, 1]}}',
        '{"clip": [1e999, NaN]}',
        '{"union": ' * 2000 + "1" + "}" * 2000,
        '{"union": [' * 600 + "1" + "]}" * 600,
    ],
)
def test_a_forged_description_is_an_error_where_it_is_read(text: str) -> None:
    table = pickle.loads(pickle.dumps(Band("kl", 0.05).table()))  # noqa: S301 -- our own
    read = BandTable(type(table._core).from_bytes(forged(text)))
    with pytest.raises(BandpoError):
        read.region.log_bounds([-1.0])


def test_a_checkpoint_of_odd_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    key = Checkpoint(None, TABLE, 100).key
    for done, errors in (
        ("1e999", "[0, 0]"),
        ("3", "[NaN, 0]"),
        ("[" * 3000, "0"),
        ("-1", "[0, 0]"),
    ):
        text = json.dumps(key)[:-1] + f', "done": {done}, "max_error": {errors}}}'
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidValueError, match="checkpoint"):
            Checkpoint(path, TABLE, 100)


REGIONS: list[Region] = [
    Band("kl", 0.05),
    Band("renyi:2.5", (0.1, 0.2)),
    Band("kl", np.array([0.1, 0.2])),
    Clip(0.2, 0.28),
    Dcpo(),
    PriceBand("kl", 0.1),
    region_from_spec('"u*ln(u) - u + 1"@0.01'),
    (Band("kl", 0.05) | Clip(0.2, 0.28)).at_least(0.1, 0.2).cap(10),
    Band("kl", 0.05).table(),
]

OTHERS = {"copyreg _reconstructor", "builtins object", "numpy ndarray", "numpy dtype"}
"""Names of others in the pickle of a region; the rest are of numpy's arrays."""


class _Watched(pickle.Unpickler):
    """Keeps the names that a pickle imports."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: list[str] = []

    def find_class(self, module: str, name: str) -> object:
        self.names.append(f"{module} {name}")
        return super().find_class(module, name)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_a_region_names_our_constructors_alone(protocol: int) -> None:
    signed = by_sign(positive=Band("kl", 0.05), negative=Clip(0.2))
    for value in (*REGIONS, signed, Divergence("kl")):
        watched = _Watched(pickle.dumps(value, protocol))
        assert repr(watched.load()) == repr(value)
        for name in watched.names:
            ours = name.startswith("bandpo.")
            assert ours or name.startswith(("numpy._core.", "numpy.core.")) or name in OTHERS, name
