"""The numbers that a picture of a region shows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array
from bandpo.error import InvalidValueError
from bandpo.presets import PRESETS
from bandpo.region import Clip, Region
from bandpo.schedule import RegionSource
from bandpo.spec import region_or_source_from_spec

POINTS = 601
"""Old probabilities of `curve_of`, evenly spaced in their logarithm."""


def drawn_presets() -> list[str]:
    """Returns the presets with bounds to draw, each region under its first name.

    Left out are rules of another edge and those without a width, or without a limit, on both sides.
    """
    drawn: dict[str, str] = {}
    for preset in PRESETS.values():
        region = preset.region.region if isinstance(preset.region, RegionSource) else preset.region
        if preset.correction is not None or not isinstance(region, Region):
            continue
        if isinstance(region, Clip) and (region.log_lower, region.log_upper) in _NO_PICTURE:
            continue
        drawn.setdefault(repr(region), preset.name)
    return list(drawn.values())


_NO_PICTURE = ((0.0, 0.0), (-math.inf, math.inf))


class Curve(NamedTuple):
    """The bounds of a region at some old probabilities."""

    p: Float64Array
    """The old probabilities."""
    lower: Float64Array
    """Lower bound of the ratio new/old."""
    upper: Float64Array
    """Upper bound of the ratio; inf if there is none."""
    fall: Float64Array
    """Largest decrease of the probability, ``p (1 - lower)``."""
    rise: Float64Array
    """Largest increase, ``p (upper - 1)``; above ``1 - p`` where the region leaves the simplex."""


def curve_at(region: Region, p: ArrayLike) -> Curve:
    """Returns the bounds of a region at old probabilities in (0, 1]."""
    p = np.asarray(p, dtype=np.float64)
    lower, upper = region.bounds(np.log(p))
    return Curve(p, lower, upper, p * (1.0 - lower), p * (upper - 1.0))


def curve_of(region: Region, probability_range: tuple[float, float] | None = None) -> Curve:
    """Returns the bounds of a region at `POINTS` old probabilities.

    Args:
        region: The region.
        probability_range: First and last old probability, in (0, 1]; 0.0001 and 1 if left out.

    Raises:
        InvalidValueError: If the range is not in (0, 1] or is empty.
    """
    first, last = probability_range or (1e-4, 1.0)
    if not 0.0 < first < last <= 1.0:
        raise InvalidValueError(f"p must be in 0 < first < last <= 1, got {first} and {last}")
    logp = np.linspace(math.log(first), math.log(last), POINTS)
    p = np.exp(logp)
    lower, upper = region.bounds(logp)
    return Curve(p, lower, upper, p * (1.0 - lower), p * (upper - 1.0))


def named_region(spec: str) -> Region:
    """Returns the region of a spec; of a preset that changes it, the region that it begins with.

    Raises:
        InvalidValueError: If the spec cannot be read; see `bandpo.spec`.
    """
    found = region_or_source_from_spec(spec)
    return found.region if isinstance(found, RegionSource) else found
