"""Labels beside the lines that they name, in place of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from numpy.typing import ArrayLike

from bandpo.check import Float64Array

_STEP = 4.0
"""Distance of two places that are tried, and of two points of a line, in points of 1/72 inch."""
_MARGIN = 4.0
_LINE_HEIGHT = 1.25
_INSIDE = 20.0
"""Cost of a place inside a filled area, as a distance in points."""
_HIT = 1000.0


class Line(NamedTuple):
    """A line to keep clear of, its corners in fractions of the axes [points, 2]."""

    corners: Float64Array
    owner: str

    @classmethod
    def of(cls, axes: Axes, owner: str, x: ArrayLike, y: ArrayLike) -> Line:
        """Returns the line through the points of the data that are finite."""
        data = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)], -1)
        fractions = (axes.transScale + axes.transLimits).transform(data)
        finite = np.isfinite(fractions).all(1)
        return cls(np.clip(fractions[finite], -1.0, 2.0), owner)


class Label(NamedTuple):
    """A text for the lines of an owner."""

    owner: str
    text: str
    color: str


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    lines: Sequence[Line],
    areas: Sequence[tuple[Line, Line]],
    *,
    size: float = 8.5,
) -> None:
    """Writes each label next to a line of its owner, where it covers no line and no other label.

    Args:
        axes: Where to write.
        labels: The labels, the most important first; without any line there is no label.
        lines: All lines that are drawn.
        areas: The lower and upper edge of each filled area; labels keep out where they can.
        size: Font size in points.
    """
    pixels = np.array([axes.bbox.width, axes.bbox.height])
    extent = axes.figure.dpi_scale_trans.inverted().transform(pixels) * 72.0
    points: dict[str, Float64Array] = {}
    for line in lines:
        if len(line.corners):
            dots = [points[line.owner]] if line.owner in points else []
            points[line.owner] = np.concatenate([*dots, _dense(line, extent)])
    taken: list[Float64Array] = []
    for label in labels:
        if label.owner not in points:
            continue
        box = _size(label.text, size)
        low = _places(extent, box)
        cost = _cost(low, low + box, points, label.owner, taken)
        centre = (low + 0.5 * box) / extent
        for lower, upper in areas:
            cost += _INSIDE * _between(centre, lower, upper)
        best = low[int(np.argmin(cost))]
        taken.append(np.stack([best, best + box]))
        x, y = best / extent
        axes.text(
            x,
            y,
            label.text,
            transform=axes.transAxes,
            va="bottom",
            color=label.color,
            fontsize=size,
            linespacing=1.15,
        )


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, size: float = 8.0) -> None:
    """Writes right of the axes where each line ends, moved apart where they are close.

    Args:
        axes: Where to write.
        ends: The last value of each line, its text, and its colour.
        size: Font size in points.
    """
    height = axes.bbox.height * 72.0 / axes.figure.dpi
    to_axes = (axes.transScale + axes.transLimits).transform
    wanted = [float(to_axes((0.0, value))[1]) for value, _, _ in ends]
    heights = [(text.count("\n") + 1.4) * _LINE_HEIGHT * size / height for _, text, _ in ends]
    order = sorted(range(len(ends)), key=lambda k: wanted[k])
    tops: dict[int, float] = {}
    floor = 0.0
    for k in order:  # upwards, each clear of the one below
        tops[k] = max(wanted[k] + 0.5 * heights[k], floor + heights[k])
        floor = tops[k]
    ceiling = 1.0
    for k in reversed(order):  # and down again from the top of the axes
        tops[k] = min(tops[k], ceiling)
        ceiling = tops[k] - heights[k]
    for k, (_, text, color) in enumerate(ends):
        axes.text(
            1.02,
            tops[k] - 0.5 * heights[k],
            text,
            transform=axes.transAxes,
            va="center",
            color=color,
            fontsize=size,
            linespacing=1.15,
        )


def _size(text: str, size: float) -> Float64Array:
    """Width and height of a text in points, from its outlines: no canvas is needed."""
    font = FontProperties(family="DejaVu Sans", size=size)
    rows = text.split("\n")
    width = max(TextPath((0.0, 0.0), row, prop=font).get_extents().x1 for row in rows)
    return np.array([width, _LINE_HEIGHT * size * len(rows)])


def _places(extent: Float64Array, box: Float64Array) -> Float64Array:
    """Lower left corners at which a box lies in the axes [places, 2]."""
    last = np.maximum(extent - box - _MARGIN, _MARGIN)
    x, y = (np.arange(_MARGIN, end + 1e-6, _STEP) for end in last)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _cost(
    low: Float64Array,
    high: Float64Array,
    points: dict[str, Float64Array],
    owner: str,
    taken: Sequence[Float64Array],
) -> Float64Array:
    """The distance from the owner's line, more where another line is nearer or anything is hit."""
    own = np.full(len(low), np.inf)
    other = np.full(len(low), np.inf)
    hits = np.zeros(len(low))
    for name, dots in points.items():
        outside = np.maximum(np.maximum(low[:, None] - dots, dots - high[:, None]), 0.0)
        distance = np.hypot(outside[..., 0], outside[..., 1]).min(1)
        hits += distance < 2.0
        if name == owner:
            own = np.minimum(own, distance)
        else:
            other = np.minimum(other, distance)
    for begin, end in taken:
        hits += ((low < end + 2.0) & (begin < high + 2.0)).all(1)
    return np.asarray(own + 2.0 * np.maximum(own + 8.0 - other, 0.0) + _HIT * hits)


def _dense(line: Line, extent: Float64Array) -> Float64Array:
    """Points along a line, at most `_STEP` apart, as far as it lies in the axes."""
    corners = np.clip(line.corners, -0.05, 1.05) * extent
    lengths = np.hypot(*np.diff(corners, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.linspace(0.0, along[-1], max(int(along[-1] / _STEP) + 1, 2))
    dots = np.stack([np.interp(at, along, corners[:, k]) for k in (0, 1)], -1)
    inside = ((dots > -1.0) & (dots < extent + 1.0)).all(1)
    return np.asarray(dots[inside] if inside.any() else dots)


def _between(centre: Float64Array, lower: Line, upper: Line) -> Float64Array:
    x, y = centre.T
    low, high = (np.interp(x, line.corners[:, 0], line.corners[:, 1]) for line in (lower, upper))
    return np.asarray((low <= y) & (y <= high), dtype=np.float64)
