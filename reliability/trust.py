"""What Rust's compiler does not check, and what is known of the packages of others.

python -m reliability.trust
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from reliability.result import Row, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))


def audited() -> list[Row]:
    """Checks of the crates by cargo-deny and of packages by pip-audit, where they are installed."""
    rows = []
    crates = (ROOT / "Cargo.lock").read_text(encoding="utf-8").count("[[package]]") - 1
    if shutil.which("cargo-deny"):
        command = ["cargo", "deny", "check", "bans", "licenses", "sources"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows.append(Row("crates under `cargo deny`", crates, {"refused": 0}))
    if shutil.which("pip-audit"):
        command = ["pip-audit", "--progress-spinner", "off", "--requirement", "/dev/stdin"]
        packages = "numpy\nrich\n"
        done = subprocess.run(command, input=packages, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = {"with a known weakness": 0}
        rows.append(Row("packages that every user gets, under `pip-audit`", 2, found))
    return rows


def main() -> None:
    """Counts, audits and writes both."""
    from list_unsafe import panics, unsafe

    found = unsafe()
    alone = Counter(kind for counts in panics().values() for kind in counts if kind != "index")
    rows = [
        Row("`unsafe` blocks and functions", len(found), {"without a reason, or its trait's": 0}),
        Row(
            "files of Rust that panic on purpose, none on what a user gives",
            sum(alone.values()),
            {f"with {kind}": count for kind, count in sorted(alone.items())},
        ),
    ]
    write("trust", "python -m reliability.trust", [*rows, *audited()])


if __name__ == "__main__":
    main()
