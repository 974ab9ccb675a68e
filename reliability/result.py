"""Counts of a long check, as JSON: of a whole run, or of shards that are merged.

    python -m reliability.losses --cases 1000000 --shard 3/64 --into build/shards
    python -m reliability.result build/shards

A shard runs its share of the cases from a seed of its own. The second command adds up the shards of
each part and writes `results`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
SHOWN = 2
"""Listed cases of a row that a line of text has; the file has all."""


class Row(NamedTuple):
    """One check."""

    check: str
    cases: int
    found: Mapping[str, float]
    """What was found, by words: a whole number is a count, a decimal number a max."""
    listed: Sequence[str] = ()
    """Cases that a reader wants to see."""

    def words(self) -> str:
        """What was found, in words."""
        counts = [
            f"at most {size:.2g} {name}" if isinstance(size, float) else f"{size:,} {name}"
            for name, size in self.found.items()
        ]
        shown = [f"`{text}`" for text in self.listed[:SHOWN]]
        more = [f"and {len(self.listed) - SHOWN} more"] if len(self.listed) > SHOWN else []
        return ", ".join([*counts, *shown, *more])

    def plus(self, other: Row) -> Row:
        """The row of both runs: counts are added, a max is the larger one."""
        found = dict(self.found)
        for name, size in other.found.items():
            is_max = isinstance(size, float)
            found[name] = max(found.get(name, size), size) if is_max else found.get(name, 0) + size
        listed = sorted({*self.listed, *other.listed})
        return Row(self.check, self.cases + other.cases, found, listed)


def run_cases(
    part: str,
    about: str,
    run: Callable[[int, int], Iterable[Row]],
    *,
    cases: int,
    seed: int,
    of: str,
) -> None:
    """Runs a part, or a shard of it, as the command line has it, and writes its rows.

    A case that fails ends the run with exit code 1; its text is written beside the rows before it.

    Args:
        part: Name of the module.
        about: Its docstring.
        run: Yields the rows of a number of cases and a seed.
        cases: The default number.
        seed: The default seed.
        of: What a case is.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--cases", type=int, default=cases, help=f"{of}, in all shards")
    parser.add_argument("--seed", type=int, default=seed, help="of the first shard")
    parser.add_argument("--shard", default="1/1", help="number of this shard / number of shards")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the counts")
    given = parser.parse_args()
    number, count = (int(text) for text in given.shard.split("/"))
    share = len(range(number - 1, given.cases, count))
    command = f"python -m reliability.{part} --cases {given.cases}"
    rows: list[Row] = []
    failed = []
    try:
        rows.extend(run(share, given.seed + number - 1))
    except AssertionError as error:
        failed.append(f"seed {given.seed + number - 1}: {error}")
    name = part if count == 1 else f"{part}.{number}-{count}"
    _write(given.into / f"{name}.json", command, rows, shards=count, failed=failed)
    sys.exit("\n".join(failed) or None)


def write(part: str, command: str, rows: Sequence[Row]) -> None:
    """Writes the rows of a part, and replaces those that it had."""
    _write(RESULTS / f"{part}.json", command, rows, shards=1, failed=[])


def _write(
    path: Path, command: str, rows: Sequence[Row], *, shards: int, failed: Sequence[str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "shards": shards,
        "failed": failed,
        "rows": [row._asdict() for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row.check}: {row.cases:,} cases; {row.words()}", flush=True)


def read(part: str) -> list[Row]:
    """The rows of the last run of a part."""
    path = RESULTS / f"{part}.json"
    return rows_of(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    """The rows of a file that was read."""
    return [Row(**row) for row in content["rows"]]


def merge(folder: Path, into: Path) -> None:
    """Adds up the shards of each part in a folder.

    Raises:
        SystemExit: If a shard is missing, of another command, or has a case that failed.
    """
    parts: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.*-*.json")):
        part, _, shard = path.stem.partition(".")
        parts.setdefault(part, {})[shard] = json.loads(path.read_text(encoding="utf-8"))
    for part, shards in parts.items():
        contents = list(shards.values())
        command, count = contents[0]["command"], contents[0]["shards"]
        if any((one["command"], one["shards"]) != (command, count) for one in contents):
            sys.exit(f"{part}: shards of several commands")
        if missing := {f"{number + 1}-{count}" for number in range(count)} - set(shards):
            sys.exit(f"{part}: shards {', '.join(sorted(missing))} are missing")
        if failed := [text for one in contents for text in one["failed"]]:
            sys.exit(f"{part}: {len(failed)} cases failed\n" + "\n".join(failed))
        rows: dict[str, Row] = {}
        for row in (row for one in contents for row in rows_of(one)):
            rows[row.check] = rows[row.check].plus(row) if row.check in rows else row
        _write(into / f"{part}.json", command, list(rows.values()), shards=count, failed=[])


def main() -> None:
    """Merges the shards of a folder."""
    parser = argparse.ArgumentParser(description="Adds up the shards of each part in a folder.")
    parser.add_argument("folder", type=Path)
    merge(parser.parse_args().folder, RESULTS)


if __name__ == "__main__":
    main()
