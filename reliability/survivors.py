"""Changes that no test can kill, because they have no effect, each with its reason.

An entry holds the file, the line before and after the change, and the reason. A test checks that
each line is still in its file.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_suffix(".json")


class Survivor(NamedTuple):
    """A change without an effect."""

    file: str
    before: str
    after: str
    """The changed line, or for Rust the words of cargo-mutants."""
    reason: str


@cache
def survivors() -> list[Survivor]:
    """All of them."""
    return [Survivor(**entry) for entry in json.loads(PATH.read_text(encoding="utf-8"))]


def reason(file: str, before: str, after: str) -> str | None:
    """Why a change has no effect, or None if nothing is known."""
    found = {one[:3]: one.reason for one in survivors()}
    return found.get((file, before, after))
