"""The cache of compiled kernels: intact content or none, whatever is wrong with the directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bandpo.backends.cuda import cubin_cache
from bandpo.backends.cuda.cubin_cache import key_of, read, write

CONTENT = b"name\0code"
KEY = key_of("source", "-option", "sm_90", "nvrtc 13.0", "kernel")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="variables and modes of Unix")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_content_is_read_as_written(base: Path) -> None:
    assert read(KEY) is None
    write(KEY, CONTENT)
    assert read(KEY) == CONTENT
    [file] = base.rglob("*.*")
    assert file.parent == base / "bandpo"
    assert file.name == f"{KEY}.cubin"
    assert file.parent.stat().st_mode & 0o77 == 0
    write(KEY, b"")
    assert read(KEY) == b""


def test_a_key_depends_on_every_part_and_its_place() -> None:
    parts = ["source", "-a", "-b", "nvrtc 13.0", "kernel"]
    keys = {key_of(*parts), key_of(*parts[::-1]), key_of("".join(parts))}
    for k in range(len(parts)):
        keys.add(key_of(*parts[:k], parts[k] + "x", *parts[k + 1 :]))
        keys.add(key_of(*parts[:k], *parts[k + 1 :]))
    assert len(keys) == 3 + 2 * len(parts)


def test_every_damage_is_noticed(base: Path) -> None:
    write(KEY, CONTENT)
    [path] = base.rglob("*.cubin")
    intact = path.read_bytes()
    damaged = [intact[:length] for length in range(len(intact))]
    damaged += [bytes([*intact[:k], intact[k] ^ 1, *intact[k + 1 :]]) for k in range(len(intact))]
    damaged.append(intact + b"\0")
    for data in damaged:
        path.write_bytes(data)
        assert read(KEY) is None
    path.write_bytes(intact)
    other = key_of("another")
    path.rename(path.with_name(f"{other}.cubin"))
    assert read(other) is None
    write(other, CONTENT)
    assert read(other) == CONTENT


def test_a_directory_that_cannot_be_used_is_no_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "bandpo").write_text("a file")
    write(KEY, CONTENT)
    assert read(KEY) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/fd/nothing")
    write(KEY, CONTENT)
    assert read(KEY) is None


def test_a_full_disk_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", refused)
    write(KEY, CONTENT)
    assert list((base / "bandpo").iterdir()) == []


def test_a_disk_that_becomes_read_only_is_no_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *arguments: object, **options: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    write(KEY, CONTENT)
    assert read(KEY) is None


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert cubin_cache.folder() is None
    write(KEY, CONTENT)
    assert read(KEY) is None


def test_a_relative_variable_is_ignored(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(base))
    assert cubin_cache.folder() == base / ".cache" / "bandpo"


def test_processes_that_write_at_once_never_show_a_part(base: Path) -> None:
    code = (
        "import sys\n"
        "from bandpo.backends.cuda.cubin_cache import read, write\n"
        "big = b'x' * 1_000_000\n"
        "for _ in range(30):\n"
        "    write(sys.argv[1], big)\n"
        "    assert read(sys.argv[1]) == big\n"
    )
    command = [sys.executable, "-c", code, KEY]
    running = [subprocess.Popen(command, env={**os.environ}) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [path.suffix for path in (base / "bandpo").iterdir()] == [".cubin"]
