"""Bins of positive numbers over all magnitudes, so that memory does not grow with a log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bandpo.check import Float64Array

_SHIFT = 12
"""Low bits of a float32 that a bin leaves out, so that it is 2^-11 wide, relatively."""

BINS = 1 << (31 - _SHIFT)


def bin_of(values: Float64Array) -> NDArray[np.uint32]:
    """Returns the bin of each number that is at least 0; those beyond float32 are in the last."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    bits = np.minimum(rounded, np.finfo(np.float32).max).view(np.uint32)
    return np.asarray(bits >> np.uint32(_SHIFT))


def edges_of(index: int) -> tuple[float, float]:
    """Returns the lower and the upper edge of a bin."""
    bits = np.array([index, index + 1], dtype=np.uint32) << np.uint32(_SHIFT)
    low, high = bits.view(np.float32).tolist()
    return low, high
