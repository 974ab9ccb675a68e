"""Random and damaged input of the Python entries: each gives its result or an error of bandpo.

A target takes bytes and makes a case of them. Seeded random bytes drive it here and in tests/trust;
`--guided` hands it to Atheris, which steers the bytes by the coverage that they reach. The parsers
and the reader of tables in Rust have targets of their own in rust/tests/fuzz.rs.

    python -m reliability.fuzz --cases 100000
    python -m reliability.fuzz --guided token_files --cases 100000
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bandpo.error import BandpoError
from reliability.result import Row, write
from reliability.targets.arrays import arrays, numbers
from reliability.targets.commands import commands
from reliability.targets.files import checkpoints, descriptions, token_files
from reliability.targets.tensors import tensors
from reliability.targets.texts import schedules, specs
from reliability.tokens import SEED

ROOT = Path(__file__).resolve().parents[1]

TARGETS: dict[str, tuple[Callable[[bytes], None], float]] = {
    "specs": (specs, 1.0),
    "schedules": (schedules, 1.0),
    "descriptions": (descriptions, 1.0),
    "checkpoints": (checkpoints, 0.2),
    "numbers": (numbers, 4.0),
    "arrays": (arrays, 2.0),
    "token_files": (token_files, 0.3),
    "commands": (commands, 0.05),
    "tensors": (tensors, 0.2),
}
"""Targets, and their share of the cases, by what one takes."""


def one(target: Callable[[bytes], None], data: bytes) -> bool:
    """Runs a case; True if it was accepted. Any error but those of bandpo goes through."""
    try:
        target(data)
    except BandpoError:
        return False
    return True


def run(name: str, cases: int, seed: int = SEED) -> int:
    """Runs cases of a target and returns how many were accepted.

    Raises:
        AssertionError: If a case fails, with its bytes.
    """
    rng = np.random.default_rng(seed)
    accepted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What a case is warned about on purpose; others of numpy or Python are findings.
        for expected in ("log_prob", "advantages", "old_log_prob", "Clip", "the table of", "far"):
            warnings.filterwarnings("ignore", rf"(?s).*{expected}")
        for number in range(cases):
            data = rng.bytes(int(rng.integers(4, 120)))
            try:
                accepted += one(TARGETS[name][0], data)
            except Exception as error:
                raise AssertionError(f"{name}, case {number}, {data!r}: {error!r}") from error
    return accepted


def run_rust(cases: int, seed: int) -> list[Row]:
    """The targets of rust/tests/fuzz.rs."""
    environment = {"BANDPO_FUZZ_CASES": str(cases), "BANDPO_FUZZ_SEED": str(seed)}
    done = subprocess.run(
        ["cargo", "test", "--locked", "--lib", "fuzz", "--", "--nocapture", "--test-threads=1"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    lines = re.findall(r"fuzzed ([\w ]+): (\d+) cases, (\d+) accepted", done.stdout)
    return [
        Row(f"{what} (Rust)", int(count), f"{accepted} accepted, no panic")
        for what, count, accepted in sorted(lines)
    ]


def guided(name: str, cases: int, seed: int) -> None:
    """Runs a target under Atheris, which ends the process."""
    import atheris

    atheris.instrument_all()
    target = TARGETS[name][0]
    atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed}", "-max_len=512"],
                  lambda data: one(target, data) and None)  # fmt: skip
    atheris.Fuzz()


def main() -> None:
    """Runs all targets and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of a target of share 1")
    parser.add_argument("--rust-cases", type=int, default=6_000_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--guided", choices=list(TARGETS))
    parsed = parser.parse_args()
    if parsed.guided:
        guided(parsed.guided, parsed.cases, parsed.seed)
    rows = run_rust(parsed.rust_cases, parsed.seed)
    for name, (target, share) in TARGETS.items():
        cases = int(parsed.cases * share)
        accepted = run(name, cases, parsed.seed)
        what = (target.__doc__ or name).rstrip(".").split(",")[0]
        rows.append(Row(what, cases, f"{accepted} accepted, other errors: none"))
    command = f"python -m reliability.fuzz --cases {parsed.cases} --rust-cases {parsed.rust_cases}"
    write("fuzzing", command, rows)


if __name__ == "__main__":
    main()
