"""Random and damaged input of the parsers and of the reader of tables in Rust: no panic.

The targets are those of rust/tests/fuzz.rs; they need cargo.

    python -m reliability.fuzz_rust --cases 6000000
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from reliability.result import Row, run_cases
from reliability.tokens import SEED

ROOT = Path(__file__).resolve().parents[1]


def fuzz_rust(cases: int, seed: int = SEED) -> Iterator[Row]:
    """All targets, each with its share of the cases.

    Raises:
        AssertionError: If a target panics.
    """
    environment = {"BANDPO_FUZZ_CASES": str(cases), "BANDPO_FUZZ_SEED": str(seed)}
    done = subprocess.run(
        ["cargo", "test", "--locked", "--lib", "fuzz", "--", "--nocapture", "--test-threads=1"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"fuzzed ([\w ]+): (\d+) cases, (\d+) accepted", done.stdout)
    for what, count, accepted in sorted(lines):
        yield Row(what, int(count), {"accepted": int(accepted), "panics": 0})


if __name__ == "__main__":
    run_cases("fuzz_rust", __doc__, fuzz_rust, cases=6_000_000, seed=SEED, of="cases of a parser")
