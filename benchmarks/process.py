"""Times of new processes: imports and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.interleaved import Comparison, compare

PYTHON = Path(sys.executable)


def run(*command: str | Path) -> None:
    """Runs a process to its end and drops what it prints."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def compare_imports(seconds: float = 10.0) -> Comparison:
    """Times processes that import bandpo, and processes that import numpy alone."""
    return compare(
        lambda: run(PYTHON, "-c", "import numpy, bandpo"),
        lambda: run(PYTHON, "-c", "import numpy"),
        seconds=seconds,
    )


class Import:
    """Imports in a new interpreter, without the interpreter's own start."""

    def timeraw_bandpo_after_numpy(self) -> tuple[str, str]:
        """Times the import of bandpo after numpy."""
        return "import bandpo", "import numpy"

    def timeraw_bandpo(self) -> str:
        """Times the import of bandpo and of its requirements."""
        return "import bandpo"


class CommandLine:
    """Whole processes of the installed command."""

    def time_version(self) -> None:
        """Times a command without any work."""
        run(PYTHON.with_name("bandpo"), "--version")

    def time_bounds(self) -> None:
        """Times the bounds of one token."""
        run(PYTHON.with_name("bandpo"), "bounds", "0.1")
