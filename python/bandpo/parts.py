"""Long arrays in parts, between which an interrupt is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PART = 2**20
"""Elements of a part, some ten milliseconds of exp; one operation of numpy cannot be stopped."""


def slices(count: int, size: int = _PART) -> Iterator[slice]:
    """Yields the parts of so many elements."""
    for start in range(0, count, size):
        yield slice(start, start + size)


def in_parts(
    function: Callable[..., NDArray[Any]],
    *values: NDArray[Any],
    dtype: DTypeLike = np.float64,
    size: int = _PART,
) -> NDArray[Any]:
    """Returns the result of a function that treats each element alone, in the shape of its arrays.

    Args:
        function: Called with arrays of any shape.
        values: Any shape, the same for all of them.
        dtype: Dtype of the result.
        size: Elements of a part.
    """
    shape = values[0].shape
    if values[0].size <= size:
        return np.asarray(function(*values), dtype)
    elements = [np.ascontiguousarray(array).reshape(-1) for array in values]
    found = np.empty(values[0].size, dtype)
    for part in slices(len(found), size):
        found[part] = function(*(array[part] for array in elements))
    return found.reshape(shape)
