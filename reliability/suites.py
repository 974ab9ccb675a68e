"""Tests that try to break the package by hand, counted by what they try.

python -m reliability.suites
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from reliability.result import Row, write

TESTS = Path(__file__).resolve().parents[1] / "tests"

SUITES = {
    "what records, transforms or redirects a loss": (
        *("loss/test_transforms.py", "loss/test_second_derivatives.py"),
    ),
    "values that are not finite or out of their domain": (
        *("loss/test_nonfinite.py", "loss/test_domain.py", "loss/test_far_tokens.py"),
        "test_check.py",
    ),
    "metrics of micro-batches and ranks": (
        *("loss/test_metrics.py", "distributed/test_processes.py"),
    ),
    "signals in long calls": ("band/test_interrupts.py",),
    "threads, forks, workers and their settings": ("trust/test_concurrency.py",),
    "full disks, locked folders, closed outputs, odd paths": ("trust/test_faults.py",),
    "files that are not trusted": ("trust/test_untrusted_files.py",),
    "kernels on the processor, under ASan and UBSan": (
        *("backends/test_cuda.py", "-k", "sanitize"),
    ),
}
"""What tests try, with their files and options of pytest."""


def count(name: str) -> Row:
    """Runs the tests of a name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run([*command, "--junitxml", report, *SUITES[name]], cwd=TESTS, check=False)
        suite = next(ElementTree.parse(report).iter("testsuite"))  # noqa: S314 -- pytest wrote it
    counts = {key: int(suite.attrib[key]) for key in ("tests", "errors", "failures", "skipped")}
    failed = counts["errors"] + counts["failures"]
    return Row(name, counts["tests"], {"failed": failed, "skipped": counts["skipped"]})


def main() -> None:
    """Runs all and writes the rows."""
    write("suites", "python -m reliability.suites", [count(name) for name in SUITES])


if __name__ == "__main__":
    main()
