"""One panel: regions on axes, each with its look and its label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bandpo.plot.label import Label, Line, place_labels
from bandpo.plot.look import DOTS, Theme, look_of
from bandpo.plot.view import Edges, ProbabilityRange, View
from bandpo.region import Region


def draw_panel(
    axes: Axes,
    view: View,
    regions: Mapping[str, Region],
    labels: Mapping[str, str],
    theme: Theme,
    *,
    dark: bool,
    probability_range: ProbabilityRange,
    value_range: tuple[float, float],
) -> None:
    """Draws regions as areas with labelled edges.

    Args:
        axes: Where to draw.
        view: What the axes show.
        regions: The regions by the names that their looks go by.
        labels: The text beside each of them.
        theme: Colours of the page.
        dark: Whether the page is dark.
        probability_range: First and last old probability.
        value_range: First and last value of the vertical axis.
    """
    view.prepare(axes, probability_range, value_range)
    edges = {}
    for name, region in regions.items():
        look = look_of(name, dark=dark)
        of = view.edges(region, probability_range)
        edges[name] = draw_region(axes, of, value_range, look, name, dark=dark)
    same = (1.0, 1.0) if view.of_ratio else probability_range
    axes.plot(probability_range, same, color=theme.muted, linewidth=0.7, linestyle=DOTS)
    lines = [Line.of(axes, "", probability_range, same)]
    if view.scale == "linear":
        _name_unchanged(axes, edges.values(), theme)
    areas = []
    for name, of in edges.items():
        lower, upper = (Line.of(axes, name, of.x, side) for side in (of.lower, of.upper))
        lines += [lower, upper]
        areas.append((lower, upper))
    place_labels(
        axes,
        [Label(name, labels[name], look_of(name, dark=dark)["color"]) for name in edges],
        lines,
        areas,
    )


def draw_region(
    axes: Axes,
    edges: Edges,
    value_range: tuple[float, float],
    look: Mapping[str, Any],
    name: str,
    *,
    dark: bool,
    linewidth: float = 1.4,
) -> Edges:
    """Fills a region and draws its edges, which it returns as drawn.

    Their ids are ``name:area``, ``name:upper`` and ``name:lower``.
    """
    # An edge at 0 or infinity leaves the picture instead of ending in it.
    low, high = value_range
    beyond = (
        (0.5 * low if low > 0.0 else -0.1),
        (high + 0.5 * (1.0 - high) if high <= 1 else 2 * high),
    )
    lower, upper = (np.clip(side, *beyond) for side in (edges.lower, edges.upper))
    area = axes.fill_between(
        edges.x, lower, upper, color=look["color"], alpha=0.24 if dark else 0.16, linewidth=0
    )
    area.set_gid(f"{name}:area")
    for side, values in (("upper", upper), ("lower", lower)):
        axes.plot(edges.x, values, linewidth=linewidth, gid=f"{name}:{side}", **look)
    return Edges(edges.x, lower, upper)


def _name_unchanged(axes: Axes, edges: Iterable[Edges], theme: Theme) -> None:
    """Writes along the diagonal of linear axes, if no edge is near."""
    at = 0.42
    p = axes.get_xlim()[0] + at * np.ptp(axes.get_xlim())
    if all(np.interp(p, of.x, of.upper) > p + 0.07 for of in edges):
        axes.annotate(
            "unchanged",
            (at, at),
            xycoords="axes fraction",
            xytext=(-2.0, 2.0),
            textcoords="offset points",
            rotation=45.0,
            rotation_mode="anchor",
            ha="center",
            va="bottom",
            color=theme.muted,
            fontsize=8.0,
        )
