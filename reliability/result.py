"""Counts of a long check, as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One check."""

    check: str
    cases: int
    found: str
    """What the check found, in words and figures."""


def run_cases(
    part: str, about: str, run: Callable[[int, int], Row], *, cases: int, seed: int, of: str
) -> None:
    """Runs a part of so many cases from a seed, both as the command line has them, and writes it.

    Args:
        part: Name of the module.
        about: Its docstring.
        run: Returns the row of a number of cases and a seed.
        cases: The default number.
        seed: The default seed.
        of: What a case is.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--cases", type=int, default=cases, help=of)
    parser.add_argument("--seed", type=int, default=seed)
    given = parser.parse_args()
    command = f"python -m reliability.{part} --cases {given.cases}"
    write(part, command, [run(given.cases, given.seed)])


def write(part: str, command: str, rows: Sequence[Row]) -> None:
    """Writes the rows of a part, and replaces those that it had."""
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "rows": [row._asdict() for row in rows]}
    (RESULTS / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row.check}: {row.cases} cases; {row.found}", flush=True)
