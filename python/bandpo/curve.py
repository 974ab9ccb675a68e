"""The numbers that a picture of regions shows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bandpo.check import Float64Array
from bandpo.region import Region
from bandpo.schedule import RegionSource
from bandpo.spec import region_or_source_from_spec

POINTS = 601
"""Old probabilities that a curve is made of, evenly spaced in their logarithm."""


class Curve(NamedTuple):
    """What a region allows, at `POINTS` old probabilities."""

    p: Float64Array
    """The old probabilities."""
    lower: Float64Array
    """Lower bound of the ratio new/old."""
    upper: Float64Array
    """Upper bound of the ratio; inf if there is none."""
    fall: Float64Array
    """How far the probability may fall, ``p (1 - lower)``."""
    rise: Float64Array
    """How far it may rise, ``p (upper - 1)``: beyond ``1 - p`` more than there is."""


def curve_of(region: Region, probability_range: tuple[float, float] = (1e-4, 1.0)) -> Curve:
    """Returns the bounds of a region and the changes of probability that they allow.

    Args:
        region: The region.
        probability_range: Least and greatest old probability, in (0, 1].
    """
    least, greatest = map(math.log, probability_range)
    logp = np.linspace(least, greatest, POINTS)
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
