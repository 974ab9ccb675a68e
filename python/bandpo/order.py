"""Order of many values, without a sort of all of them, which no interrupt would stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo.check import Float64Array
from bandpo.parts import slices

Int64Array: TypeAlias = NDArray[np.int64]

Find: TypeAlias = Callable[[Int64Array, Float64Array, Float64Array], int]
"""From the values below each bin, their sum and its start, the bin to search."""

_BITS = 16
"""Bits of a bin: those of the exponent and four of the fraction first."""

_SORTED = 2**20
"""Max values that are sorted at once."""


def neighbourhood(values: Float64Array, find: Find) -> tuple[int, float, Float64Array]:
    """Returns the values of one bin in rising order, after the number and the sum of those below.

    The bits of numbers that are not negative rise with them, so bins are made of leading bits, and
    the bin that is found is divided again until few values are left. All of few values are one bin.

    Args:
        values: Numbers of at least 0 and no -0, [N].
        find: Returns the bin to search, from arrays of one element a bin.
    """
    count, total = 0, 0.0
    for shift in range(64 - _BITS, -1, -_BITS):
        if len(values) <= _SORTED:
            break
        numbers, sums, first = np.zeros(2**_BITS, np.int64), np.zeros(2**_BITS), 0
        for part in slices(len(values)):
            of_part = values[part]
            bits = of_part.view(np.int64) >> shift
            first = int(bits[0]) >> _BITS << _BITS
            bins = bits - first
            numbers += np.bincount(bins, minlength=2**_BITS)
            sums += np.bincount(bins, of_part, minlength=2**_BITS)
        starts = ((first + np.arange(2**_BITS)) << shift).view(np.float64)
        below, sum_below = np.cumsum(numbers) - numbers, np.append(0.0, np.cumsum(sums[:-1]))
        filled = np.flatnonzero(numbers)
        found = filled[find(count + below[filled], total + sum_below[filled], starts[filled])]
        count, total = count + int(below[found]), total + float(sum_below[found])
        parts = slices(len(values))
        values = np.concatenate(
            [values[part][values[part].view(np.int64) >> shift == first + found] for part in parts]
        )
    else:
        return count, total, values  # all are equal
    return count, total, np.sort(values)


def of_rank(values: Float64Array, rank: int) -> float:
    """Returns the value that this many others precede; see `neighbourhood`."""

    def last_below(numbers: Int64Array, _sums: Float64Array, _starts: Float64Array) -> int:
        return int(np.flatnonzero(numbers <= rank)[-1])

    fewer, _, near = neighbourhood(values, last_below)
    return float(near[rank - fewer])
