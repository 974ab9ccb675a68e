"""Counts of a long check, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One check."""

    check: str
    cases: int
    found: str
    """What the check found, in words and figures."""


def write(part: str, command: str, rows: Sequence[Row]) -> None:
    """Writes the rows of a part, and replaces those that it had."""
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "rows": [row._asdict() for row in rows]}
    (RESULTS / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row.check}: {row.cases} cases; {row.found}", flush=True)
