"""Long arrays in parts, between which an interrupt is seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bandpo.check import Float64Array

_PART = 2**20
"""Elements of a part, some ten milliseconds of exp; one operation of numpy cannot be stopped."""


def in_parts(
    function: Callable[[Float64Array], Float64Array], values: Float64Array
) -> Float64Array:
    """Returns the result of a function that treats each element alone, in the shape of its array.

    Args:
        function: Called with arrays of any shape.
        values: Any shape.
    """
    if values.size <= _PART:
        return np.asarray(function(values))
    elements = np.ascontiguousarray(values).reshape(-1)
    found = np.empty_like(elements)
    for start in range(0, len(elements), _PART):
        part = slice(start, start + _PART)
        found[part] = function(elements[part])
    return found.reshape(values.shape)
