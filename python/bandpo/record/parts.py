"""A folder of part files, each of which is there as a whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bandpo.error import OutputPathError


class Parts:
    """The part files of one rank.

    A part is written under a hidden name, and gets its own when it is on the disk. So a process
    may be killed at any moment, and each part that can be seen is whole. Names begin with the rank
    and the time at which the recorder was made, so a run that continues adds to its folder.

    Args:
        folder: The folder, which is made.
        rank: The rank.
        max_bytes: Max bytes of all parts of the rank in the folder.

    Attributes:
        folder: As given.
        max_bytes: As given.
        present: Number of parts of the rank that were in the folder before.

    Raises:
        OutputPathError: If the folder cannot be made or read.
    """

    folder: Path
    max_bytes: int
    present: int

    def __init__(self, folder: Path, rank: int, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        prefix = f"rank-{rank:05d}-"
        self._name = f"{prefix}{time.time_ns():020d}"
        self._count = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob(f".{prefix}*"):
                file.unlink(missing_ok=True)  # of a process that was killed
            sizes = [file.stat().st_size for file in folder.glob(f"{prefix}*.parquet")]
        except OSError as error:
            raise OutputPathError(f"cannot write to {folder}: {error.strerror}") from None
        self.present = len(sizes)
        self._bytes = sum(sizes)

    def write(self, content: bytes) -> bool:
        """Writes a part, unless all parts would have more than the max bytes.

        Returns:
            True if it was written.

        Raises:
            OSError: If it could not be; nothing of it is left then.
        """
        if self._bytes + len(content) > self.max_bytes:
            return False
        name = f"{self._name}-{self._count:06d}.parquet"
        hidden = self.folder / f".{name}"
        try:
            with hidden.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            hidden.rename(self.folder / name)
        except OSError:
            hidden.unlink(missing_ok=True)
            raise
        self._count += 1
        self._bytes += len(content)
        return True
