"""Compiled kernels on disk, in the user's cache directory.

A file that is truncated, altered or of another key is as good as none, and a directory that cannot
be read or written is no error: the kernel is compiled again. Processes may share the directory,
because a file appears whole.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

_CHECKSUM = sha256().digest_size


def folder() -> Path | None:
    """Returns the directory, which need not exist; None for a user without a home."""
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # others are ignored, as the XDG specification has it
        return Path(base) / "bandpo"
    try:
        return Path.home() / ".cache" / "bandpo"
    except RuntimeError:
        return None


def key_of(*parts: str) -> str:
    """Returns the key of what is compiled from parts, none of which contains NUL."""
    return sha256("\0".join(parts).encode()).hexdigest()


def read(key: str) -> bytes | None:
    """Returns the content that was written under a key, None if there is no intact one."""
    directory = folder()
    if directory is None:
        return None
    try:
        data = (directory / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    content = data[_CHECKSUM:]
    return content if data[:_CHECKSUM] == _checksum(key, content) else None


def write(key: str, content: bytes) -> None:
    """Writes a content under a key, if the directory can be written."""
    directory = folder()
    if directory is None:
        return
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=directory, suffix=".part")
    except OSError:
        return
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(_checksum(key, content) + content)
        part.replace(directory / f"{key}.cubin")
    except OSError:
        with suppress(OSError):  # as on a disk that has become read-only
            part.unlink()


def _checksum(key: str, content: bytes) -> bytes:
    return sha256(key.encode() + content).digest()
