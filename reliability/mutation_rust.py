"""Changes of bounds, tables and losses in Rust, one at a time: a test that fails kills them.

The changes are those of cargo-mutants (`cargo install cargo-mutants`), of which every n-th is made.
Only tests of Rust are run, though those of Python would kill more. A change that no test kills is
printed with its line, to be killed, or explained in `reliability/survivors.json`.

    python -m reliability.mutation_rust --cases 200
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reliability.result import Row, read, write
from reliability.survivors import reason

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"band": "0", "table": "1", "loss": "0"}
"""Folders, and the optimisation of their tests: those of tables take minutes without any, and code
for vectors takes minutes to compile with any."""

PLACE = ROOT / "build" / "mutants"
COPIED = ("Cargo.toml", "Cargo.lock", "README.md", "rust", "cuda", "benchmarks", "tests/data")

QUICK = {
    "CARGO_INCREMENTAL": "1",
    "CARGO_PROFILE_TEST_DEBUG": "false",
    "CARGO_PROFILE_TEST_LTO": "off",  # of the parts of a build, all of which it would compile again
    "CARGO_TARGET_DIR": str(PLACE / "target"),
    "RUST_MIN_STACK": str(2**26),  # without optimisation every register of a vector is on the stack
}
"""A build of few seconds a change."""

SLOW = "batched_bounds_agree_with_single_ones_and_are_inside"
"""A test that takes minutes in such a build."""

OUTCOMES = {"CaughtMutant": "killed", "Timeout": "killed", "MissedMutant": "survived"}
"""Words of cargo-mutants; another one is a change that does not compile."""


def copy() -> Path:
    """A copy of the crate at a place of its own, so that a build continues the one before.

    Its files are of now, because the build before may be of a change that was interrupted.
    """
    place = PLACE / "crate"
    shutil.rmtree(place, ignore_errors=True)
    for name in COPIED:
        to = place / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to, copy_function=shutil.copy)
        else:
            shutil.copy(ROOT / name, to)
    return place


def files(folder: str) -> list[str]:
    """The options for the files of a folder. Tests are none of them."""
    return ["--file", f"rust/{folder}/**", "--exclude", "**/tests.rs"]


def count(folder: str) -> int:
    """The number of changes of a folder."""
    command = ["cargo", "mutants", "--list", *files(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


def outcomes(crate: Path, folder: str, step: int) -> list[tuple[str, dict[str, Any]]]:
    """Every change of a folder at a distance of `step` to the one before, with its outcome.

    Raises:
        AssertionError: If the tests fail without a change, or cargo-mutants fails.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [
            *("cargo", "mutants", "--in-place", *files(folder), "--output", output),
            *("--shard", f"0/{step}", "--sharding", "round-robin", "--no-shuffle"),
            *("--timeout-multiplier", "5", "--minimum-test-timeout", "15"),
            *("--", "--locked", "--lib", "--", f"{folder}::", "--skip", SLOW),
        ]  # fmt: skip
        environment = {**os.environ, **QUICK, "CARGO_PROFILE_TEST_OPT_LEVEL": FOLDERS[folder]}
        done = subprocess.run(command, cwd=crate, env=environment, check=False)
        assert done.returncode in (0, 2, 3), f"cargo mutants ended with {done.returncode}"
        path = Path(output, "mutants.out", "outcomes.json")
        found = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
    scenarios = ((one["summary"], one["scenario"]) for one in found)
    return [(summary, one["Mutant"]) for summary, one in scenarios if one != "Baseline"]


def mutation_rust(cases: int, folders: Sequence[str] = tuple(FOLDERS)) -> Iterator[Row]:
    """A sample of the changes of each folder, of the same size."""
    crate = copy()
    for folder in folders:
        every = count(folder)
        step = max(1, every * len(folders) // cases)
        counts = {"killed": 0, "without an effect": 0, "survived": 0}
        survived = []
        for summary, change in outcomes(crate, folder, step):
            if (outcome := OUTCOMES.get(summary)) is None:
                continue
            file, line = change["file"], change["span"]["start"]["line"]
            before = (ROOT / file).read_text(encoding="utf-8").splitlines()[line - 1].strip()
            words = change["name"].split(": ", 1)[1]
            if outcome == "survived" and reason(file, before, words):
                outcome = "without an effect"
            if outcome == "survived":
                survived.append(f"{file}:{line} {before}: {words}")
            counts[outcome] += 1
        check = f"changes of rust/{folder}, of {every:,}"
        yield Row(check, sum(counts.values()), counts, survived)


def _is_same(check: str, other: str) -> bool:
    """True for rows of the same folder, which may have had another number of changes."""
    return check.partition(",")[0] == other.partition(",")[0]


def main() -> None:
    """Makes changes, runs the tests and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="changes, in all folders")
    parser.add_argument(
        "folders",
        nargs="*",
        default=[*FOLDERS],
        help="in rust, whose rows are replaced; default: all",
    )
    given = parser.parse_args()
    command = f"python -m reliability.mutation_rust --cases {given.cases}"
    if given.folders != [*FOLDERS]:
        command = " ".join([command, *given.folders])
    rows = {row.check: row for row in read("mutation_rust")}
    for row in mutation_rust(given.cases, given.folders):
        rows = {check: old for check, old in rows.items() if not _is_same(check, row.check)}
        rows[row.check] = row
    write("mutation_rust", command, [rows[check] for check in sorted(rows)])


if __name__ == "__main__":
    main()
