"""The file that a picture, or a page of pictures, is written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bandpo.error import OutputPathError

# Without the time and the version of matplotlib, so that the same picture is the same file.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "bandpo"},
    ".svg": {"Creator": "bandpo", "Date": None},
    ".pdf": {"Creator": "bandpo", "Producer": "bandpo", "CreationDate": None},
}
SUFFIXES = tuple(_METADATA)


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Returns where a file will be written, with links followed, after trying the folder.

    Args:
        path: The file, by default a picture.
        suffixes: Those that it may have.

    Raises:
        OutputPathError: If it cannot be written there.
    """
    try:
        target = Path(path).resolve()
        if target.suffix.lower() not in suffixes:
            raise OutputPathError(f"cannot write {path}: use one of {', '.join(suffixes)}")
        if target.exists() and not target.is_file():
            raise OutputPathError(f"cannot write {path}: it is not a regular file")
        with tempfile.TemporaryFile(dir=target.parent):
            return target
    except OutputPathError:
        raise
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise OutputPathError(f"cannot write {path!r}: {error}") from None


@contextmanager
def whole_file(
    path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES
) -> Iterator[IO[bytes]]:
    """Gives a file to write, which appears under its name whole or not at all.

    Raises:
        OutputPathError: If it cannot be written.
    """
    target = check_output(path, suffixes)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(target)
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format that the suffix names; the file appears whole or not at all.

    Raises:
        OutputPathError: If it cannot be written.
    """
    suffix = Path(path).resolve().suffix.lower()
    with whole_file(path) as file, rc_context({"svg.hashsalt": "bandpo"}):
        figure.savefig(file, format=suffix[1:], metadata=_METADATA[suffix])
