"""Estimates from a sample, with intervals of confidence."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bandpo.check import Float64Array
from bandpo.record.tokens import Int64Array

GROUPS = 32
"""Groups of sequences, which intervals of confidence come from."""

T_95 = 2.0395
"""Quantile 0.975 of Student's t with 31 degrees of freedom, for 32 groups."""


class Estimate(NamedTuple):
    """A number and the ends of its interval of confidence, 95 %; NaN where there is no token."""

    value: float
    low: float
    high: float


def group_of(sequence: Int64Array, start: int) -> Int64Array:
    """Returns the group of each token, [N], which tokens of a sequence share.

    Args:
        sequence: Sequence of each token. A token without one is a sequence of its own.
        start: Place of the first token in the log.
    """
    place = start + np.arange(len(sequence))
    number = np.where(sequence < 0, place, sequence).astype(np.uint64)
    # The multiplication spreads neighbours; the highest bits are the group.
    return np.asarray((number * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(59)).astype(np.int64))


def quotient(part: Float64Array, whole: Float64Array) -> Estimate:
    """Returns the quotient of two sums from their parts in each group, by the jackknife.

    The groups are random sets of sequences, so that the interval holds for another sample of
    sequences, however alike the tokens of one sequence are (Efron and Stein 1981, eq. 1.3).
    """
    total, size = part.sum(), whole.sum()
    if not size:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(total / size)
    used = whole > 0.0
    rest = size - whole[used]
    if used.sum() < 2 or not (rest > 0.0).all():
        return Estimate(value, -math.inf, math.inf)
    if not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    without = (total - part[used]) / rest
    count = len(without)
    deviation = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    return Estimate(value, value - T_95 * deviation, value + T_95 * deviation)
