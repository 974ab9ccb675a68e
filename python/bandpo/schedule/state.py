"""Check of the state that a checkpoint keeps of a schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bandpo.check import real_number
from bandpo.error import InvalidTypeError, InvalidValueError


def entries(state: Mapping[str, Any], *names: str) -> dict[str, float]:
    """Returns the entries of a state, which must have these names and be finite numbers."""
    if not isinstance(state, Mapping):
        raise InvalidTypeError(f"state must be a mapping, got {type(state).__name__}")
    if set(state) != set(names):
        raise InvalidValueError(
            f"state must have the entries {list(names)}, got {[str(name) for name in state]}"
        )
    for name in names:
        real_number(name, state[name])
        if not math.isfinite(state[name]):
            raise InvalidValueError(f"{name} must be finite, got {state[name]}")
    return dict(state)
