"""Objects of JSON in a file that may be anything."""

from __future__ import annotations

import json
from typing import Any


def parsed(text: bytes) -> Any:
    """Returns the value of a JSON text whose objects have each key once.

    Raises:
        ValueError: If it is no JSON, or has a key twice.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has more than one {twice[:60]!r}")
    return found
