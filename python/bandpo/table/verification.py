"""Verification of a table, with a checkpoint from which an interrupted one continues."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bandpo import _core
from bandpo.check import bytes_of_file
from bandpo.error import InvalidValueError, OutputPathError

_BLOCK = 1 << 20
"""Values that are compared between two reports of progress."""

_PART = 1 << 13
"""Values between which an interrupt is seen; some expressions take 15 us a value."""

_SAVE_EVERY = 2.0
"""Seconds between two writes of a checkpoint."""

_LARGEST = 4096
"""Max bytes of a checkpoint, which has fewer than 200."""

_NO_CHECKPOINT = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""Errors of content that is no checkpoint."""


def verify(
    core: _core.BandTable,
    exact: object,
    count: int,
    exhaustive: bool,
    progress: Callable[[int, int], object] | None,
    checkpoint: str | os.PathLike[str] | None,
) -> _core.BandTable:
    """Returns the table with its max error measured; see `bandpo.BandTable.verify`.

    Args:
        core: The table.
        exact: The exact bounds, as the core takes them.
        count: Number of values to verify, evenly spaced in their bit patterns.
        exhaustive: True if these are all there are.
        progress: Called with the numbers of values done and in total.
        checkpoint: The file of the `Checkpoint`, or None.
    """
    state = Checkpoint(checkpoint, core.to_bytes(), count)
    saved = time.monotonic()
    while state.done < count:
        stop = min(state.done + _BLOCK, count)
        while state.done < stop:
            end = min(state.done + _PART, stop)
            state.merge(core.errors_between(state.done, end, count, exact), end)
        if progress is not None:
            progress(state.done, count)
        if time.monotonic() - saved >= _SAVE_EVERY:
            state.save()
            saved = time.monotonic()
    state.remove()
    if not exhaustive:
        # Near a saturation point cells hold so few floats that even spacing misses them.
        state.merge(core.errors_in_cells(exact), count)
        # A smaller sample must not replace the error that an earlier one found.
        state.merge(core.max_error, count)
    return core.verified(count, *state.max_error)


class Checkpoint:
    """Progress of a verification, in memory and in a file.

    Args:
        path: The file, or None.
        table: Bytes of the table.
        count: Number of values to verify.

    Raises:
        InvalidValueError: If the file is not a checkpoint, or belongs to another verification.
        OutputPathError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, table: bytes, count: int) -> None:
        self.path = None if path is None else Path(path)
        # Of the table in memory; the checksum of a file is in rust/table/file.rs.
        self.key = {"table": hashlib.sha256(table).hexdigest(), "count": count}
        self.done = 0
        self.max_error = 0.0, 0.0
        if self.path is None:
            return
        if not self.path.exists():
            self.save()  # so that a path that cannot be written fails now, not after minutes
            return
        try:
            kept = json.loads(bytes_of_file(self.path, _LARGEST))
            ours = all(kept[name] == value for name, value in self.key.items())
            done = int(kept["done"])
            log_upper, lower = map(float, kept["max_error"])
            max_error = (log_upper, lower)
        except _NO_CHECKPOINT as error:
            raise InvalidValueError(f"checkpoint {self.path} cannot be used: {error}") from None
        if not ours or not 0 <= done <= count:
            raise InvalidValueError(f"checkpoint {self.path} belongs to another verification")
        if not all(error >= 0.0 for error in max_error):
            raise InvalidValueError(f"checkpoint {self.path} holds impossible errors {max_error}")
        self.done, self.max_error = done, max_error

    def merge(self, found: tuple[float, float], done: int) -> None:
        """Merges the max errors of the values up to number ``done``."""
        self.max_error = (max(self.max_error[0], found[0]), max(self.max_error[1], found[1]))
        self.done = done

    def save(self) -> None:
        """Writes the file, which appears whole or not at all."""
        if self.path is None:
            return
        content = {**self.key, "done": self.done, "max_error": list(self.max_error)}
        try:
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".bandpo-") as folder:
                whole = Path(folder, "checkpoint")
                whole.write_text(json.dumps(content))
                whole.replace(self.path)
        except OSError as error:
            raise OutputPathError(f"cannot write {self.path}: {error.strerror}") from None

    def remove(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
