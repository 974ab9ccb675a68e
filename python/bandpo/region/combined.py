"""`Combined`: the union or intersection of two regions, or one side of each."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import BoolArray, Float64Array, float64_array
from bandpo.error import InvalidTypeError
from bandpo.parts import in_parts
from bandpo.region.base import Curves, Region


def sides(*, lower: Region, upper: Region) -> Region:
    """Returns the region with the lower bound of one region and the upper bound of another.

    ``sides(lower=Clip(0.2), upper=Band("kl", 0.05))`` lets rare tokens rise as far as a band does
    and fall as far as a fixed clip does.

    Args:
        lower: The region of ratios below 1.
        upper: The region of ratios above 1.

    Raises:
        InvalidTypeError: If one is not a region.
    """
    for argument, region in (("lower", lower), ("upper", upper)):
        if not isinstance(region, Region):
            raise InvalidTypeError(
                f"{argument} must be a Region, got {type(region).__name__}; one that changes is "
                f"built around its band: ScheduledBand(..., within=lambda band: ...)"
            )
    return Combined("sides", lower, upper)


class Combined(Region):
    """Two regions as one; made with ``|``, ``&``, `Region.cap`, `Region.at_least` and `sides`."""

    def __init__(
        self, kind: Literal["union", "intersection", "sides"], left: Region, right: Region
    ) -> None:
        self.kind = kind
        self.parts = (left, right)

    @property
    def per_token(self) -> bool:
        """True if one of the parts is; see `Region.per_token`."""
        return any(part.per_token for part in self.parts)

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the bounds, each from the part that sets it; see `Region.log_bounds`."""
        (low_a, up_a), (low_b, up_b) = (part.log_bounds(logp) for part in self.parts)
        if self.kind == "sides":
            return low_a, up_b
        first, second = (
            (np.minimum, np.maximum) if self.kind == "union" else (np.maximum, np.minimum)
        )
        return in_parts(first, low_a, low_b), in_parts(second, up_a, up_b)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether each log-ratio lies in one part, in both, or in the part of its side."""
        left, right = (part.contains(logp, log_ratio) for part in self.parts)
        if self.kind == "sides":
            ratios = np.broadcast_to(float64_array("log_ratio", log_ratio), left.shape)
            return in_parts(_on_side, ratios, left, right, dtype=np.bool_)
        both = np.logical_or if self.kind == "union" else np.logical_and
        return in_parts(both, left, right, dtype=np.bool_)

    def describe(self) -> dict[str, Any]:
        """Returns its parts; see `Region.describe`."""
        return {self.kind: [part.describe() for part in self.parts]}

    def curves(self, upper: bool) -> Curves:
        """Returns the curves of whichever part sets the bound; see `Region.curves`."""
        if self.kind == "sides":
            return self.parts[int(upper)].curves(upper)
        sides = [part.curves(upper) for part in self.parts]
        # A union takes the outer part: on the lower side the smaller bound.
        outer = self.kind == "union"

        def left_sets(y: Float64Array) -> BoolArray:
            left, right = (part.log_bounds(-y)[int(upper)] for part in self.parts)
            further: BoolArray = left >= right if upper else left <= right
            return further if outer else ~further | (left == right)

        # Crossings are bracketed on a fine grid that holds the starts of the parts, then bisected.
        octaves = np.exp2(np.arange(-149 * 16, 7 * 16 + 1) / 16.0)
        grid = np.unique(np.concatenate([octaves, [start for side in sides for start, _ in side]]))
        grid = grid[grid > 0.0]
        by_left = left_sets(grid)
        change = np.flatnonzero(by_left[1:] != by_left[:-1])
        low, high = grid[change], grid[change + 1]
        for _ in range(64):
            middle = 0.5 * (low + high)
            same = left_sets(middle) == by_left[change]
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        starts = [0.0, *high.tolist()]
        curves: Curves = []
        for i, start in enumerate(starts):
            end = starts[i + 1] if i + 1 < len(starts) else math.inf
            side = sides[0] if bool(by_left[0]) == (i % 2 == 0) else sides[1]
            for k, (begin, curve) in enumerate(side):
                next_begin = side[k + 1][0] if k + 1 < len(side) else math.inf
                if max(begin, start) < min(next_begin, end):
                    curves.append((max(begin, start), curve))
        return curves

    def __repr__(self) -> str:
        left, right = self.parts
        if self.kind == "sides":
            return f"sides(lower={left!r}, upper={right!r})"
        return f"({left!r} {'|' if self.kind == 'union' else '&'} {right!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Combined):
            return NotImplemented
        return (self.kind, self.parts) == (other.kind, other.parts)

    def __hash__(self) -> int:
        return hash((Combined, self.kind, self.parts))


def _on_side(log_ratio: Float64Array, left: BoolArray, right: BoolArray) -> BoolArray:
    inside: BoolArray = np.where(log_ratio < 0.0, left, right)
    return inside
