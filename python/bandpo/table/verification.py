"""Checkpoint of a verification, from which an interrupted one continues."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from bandpo.error import InvalidValueError, OutputPathError


class Checkpoint:
    """Progress of a verification, in memory and in a file.

    Args:
        path: The file, or None.
        table: Bytes of the table.
        count: Number of values to verify.

    Raises:
        InvalidValueError: If the file is no checkpoint, or that of another verification.
        OutputPathError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, table: bytes, count: int) -> None:
        self.path = None if path is None else Path(path)
        self.key = {"table": hashlib.sha256(table).hexdigest(), "count": count}
        self.done = 0
        self.max_error = 0.0, 0.0
        if self.path is None:
            return
        if not self.path.exists():
            self.save()  # fails now, not after minutes, if it cannot be written
            return
        try:
            kept = json.loads(self.path.read_text())
            ours = all(kept[name] == value for name, value in self.key.items())
            done = int(kept["done"])
            log_upper, lower = map(float, kept["max_error"])
            max_error = (log_upper, lower)
        except (OSError, ValueError, KeyError, TypeError) as error:
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
