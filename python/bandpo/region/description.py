"""Regions from their descriptions in JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bandpo.divergence import Divergence
from bandpo.error import InvalidValueError
from bandpo.region.band import Band
from bandpo.region.base import Region
from bandpo.region.clip import Clip
from bandpo.region.combined import Combined
from bandpo.region.dcpo import Dcpo
from bandpo.region.price import PriceBand

_WIDTHS: dict[str, Callable[[float, float], Region]] = {
    "clip": Clip._of,
    "log-clip": Clip.from_log_ratio,
    "dcpo": Dcpo,
}
"""Constructors of regions with two numbers, by kind."""


def from_description(description: dict[str, Any]) -> Region:
    """Returns the region of a description that `Region.describe` returned.

    Raises:
        InvalidValueError: If it names a Python function, which no description holds, or a kind of
            region that this version lacks.
    """
    kind: Any
    [(kind, content)] = description.items()
    if kind in _WIDTHS:
        return _WIDTHS[kind](*(float(width) for width in content))
    if kind == "band":
        low, high = content["delta"]
        return Band(Divergence.from_description(content), (low, high))
    if kind == "price":
        low, high = content["price"]
        return PriceBand(Divergence.from_description(content), (low, high))
    if kind not in ("union", "intersection", "sides"):
        raise InvalidValueError(f"regions of the kind {kind!r} are not known to this version")
    left, right = (from_description(part) for part in content)
    return Combined(kind, left, right)
