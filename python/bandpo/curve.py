"""The numbers that a picture of regions shows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bandpo.check import Float64Array
from bandpo.error import InvalidValueError
from bandpo.presets import PRESETS, preset
from bandpo.region import Band, Region
from bandpo.schedule import RegionSource

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


def named_region(name: str) -> Region:
    """Returns the region of a preset, or of a band written like ``kl@0.05``.

    The region of a preset that changes with the batch is the one that it begins with.

    Raises:
        InvalidValueError: If it is neither.
    """
    if name in PRESETS:
        region = preset(name).region
        return region.region if isinstance(region, RegionSource) else region
    divergence, separator, delta = name.rpartition("@")
    if not separator:
        raise InvalidValueError(
            f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a band such as kl@0.05"
        )
    try:
        radius = float(delta)
    except ValueError:
        raise InvalidValueError(f"delta must be a number, got {delta!r} in {name!r}") from None
    return Band(divergence, radius)
