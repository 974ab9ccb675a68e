"""Pictures of regions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from bandpo.check import Float64Array
from bandpo.curve import Curve, curve_of
from bandpo.error import MissingExtraError, OutputPathError
from bandpo.region import Region

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise MissingExtraError("matplotlib", "plot") from None

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which colour-blind readers can tell apart; the dashes say it once more.
_COLOURS = ("#D55E00", "#0072B2", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("--", "-", ":", "-.")
GRID: Mapping[str, Any] = {"color": "0.9", "linewidth": 0.6}
DOTS_PER_INCH = 140


def band_figure(
    regions: Mapping[str, Region],
    *,
    probability_range: tuple[float, float] = (1e-4, 1.0),
    ratio_range: tuple[float, float] = (1e-2, 1e3),
) -> Figure:
    """Returns a figure of the bounds of each region, by name; see `draw_regions`."""
    figure = Figure(figsize=(6.4, 4.8), dpi=DOTS_PER_INCH, layout="constrained")
    draw_regions(
        figure.add_subplot(),
        regions,
        probability_range=probability_range,
        ratio_range=ratio_range,
    )
    return figure


def draw_regions(
    axes: Axes,
    regions: Mapping[str, Region],
    *,
    probability_range: tuple[float, float] = (1e-4, 1.0),
    ratio_range: tuple[float, float] = (1e-2, 1e3),
) -> None:
    """Draws the upper and lower bound of each region against the old probability, log-log.

    A bound outside the ratio range, such as 0 or inf, is not drawn. The grey edge is 1/p, beyond
    which the new probability would exceed 1.

    Args:
        axes: Where to draw.
        regions: The regions by the name they get in the legend.
        probability_range: Least and greatest old probability, in (0, 1].
        ratio_range: Least and greatest ratio of the vertical axis, above 0.
    """
    curves = {name: curve_of(region, probability_range) for name, region in regions.items()}
    _draw_ratios(axes, curves, list(islice(styles(), len(curves))), ratio_range)
    axes.legend()


def comparison_figure(regions: Mapping[str, Region]) -> Figure:
    """Returns what each region allows, by name: its bounds, and the change of probability.

    Regions that are equal share one line, and one entry of the legend. The grey area is where the
    new probability would not lie in [0, 1].
    """
    names: dict[Region, list[str]] = {}
    for name, region in regions.items():
        names.setdefault(region, []).append(name)
    curves = {", ".join(same): curve_of(region) for region, same in names.items()}
    # Each line is wider than those above it, and so shows on both sides of them.
    looks = [
        {**style, "linewidth": width, "zorder": 4.0 - width}
        for style, width in zip(styles(), np.linspace(1.4, 3.2, len(curves)), strict=False)
    ]
    figure = Figure(figsize=(12.0, 6.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplot_mosaic([["ratio", "rise"], ["ratio", "fall"]], width_ratios=[1.15, 1.0])
    _draw_ratios(axes["ratio"], curves, looks, (1e-2, 1e2))
    axes["ratio"].set_title("Bounds of the ratio")
    p = next(iter(curves.values())).p
    changes = (0.1 * p[0], 1.0)
    for side, all_there_is, title in (
        ("rise", 1.0 - p, "How far p may rise: p (upper - 1)"),
        ("fall", p, "How far p may fall: p (1 - lower)"),
    ):
        for curve, style in zip(curves.values(), looks, strict=True):
            _draw(axes[side], p, getattr(curve, side), changes, style)
        _draw_edge(axes[side], p, all_there_is, changes[1])
        axes[side].set_title(title)
        _log_log(axes[side], p, changes, "change of probability")
    axes["rise"].set_xlabel("")
    figure.legend(
        *axes["ratio"].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        handlelength=3.2,
        frameon=False,
    )
    return figure


def _draw_ratios(
    axes: Axes,
    curves: Mapping[str, Curve],
    styles: Sequence[Mapping[str, Any]],
    ratio_range: tuple[float, float],
) -> None:
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        label = name
        for bound in (curve.upper, curve.lower):
            if _draw(axes, curve.p, bound, ratio_range, {**style, "label": label}):
                label = "_"  # one entry a region in the legend
    p = next(iter(curves.values())).p
    _draw_edge(axes, p, 1.0 / p, ratio_range[1], label="1/p, new probability 1")
    _log_log(axes, p, ratio_range, "allowed ratio new/old")


def _draw(
    axes: Axes,
    p: Float64Array,
    values: Float64Array,
    value_range: tuple[float, float],
    style: Mapping[str, Any],
) -> bool:
    """Draws a curve if some of it lies in the range, and returns whether it did."""
    if not np.any((values >= value_range[0]) & (values <= value_range[1])):
        return False
    # A line to 0 or to infinity leaves the picture instead of ending in it.
    axes.plot(p, np.clip(values, 0.1 * value_range[0], 10.0 * value_range[1]), **style)
    return True


def _draw_edge(
    axes: Axes, p: Float64Array, edge: Float64Array, top: float, label: str | None = None
) -> None:
    """Draws where the new probability leaves [0, 1]."""
    axes.fill_between(p, edge, top, color="0.93", linewidth=0, zorder=0)
    axes.plot(p, edge, color="0.6", linewidth=0.8, label=label)


def _log_log(axes: Axes, p: Float64Array, up: tuple[float, float], ylabel: str) -> None:
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(p[0], p[-1]),
        ylim=up,
        xlabel="old probability p of the token",
        ylabel=ylabel,
    )
    axes.set_axisbelow(True)
    axes.grid(**GRID)


def styles() -> Iterator[dict[str, Any]]:
    """Yields the look of one line after another, over and over."""
    for colour, dashes in zip(cycle(_COLOURS), cycle(_DASHES), strict=False):
        yield {"color": colour, "linestyle": dashes, "linewidth": 1.8}


def check_output(path: str | os.PathLike[str]) -> Path:
    """Returns where a picture will be written, with links followed, after trying the folder.

    Raises:
        OutputPathError: If no picture can be written there.
    """
    try:
        target = Path(path).resolve()
        if target.suffix.lower() not in SUFFIXES:
            raise OutputPathError(f"cannot write {path}: use one of {', '.join(SUFFIXES)}")
        if target.exists() and not target.is_file():
            raise OutputPathError(f"cannot write {path}: it is not a regular file")
        with tempfile.TemporaryFile(dir=target.parent):
            return target
    except OutputPathError:
        raise
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise OutputPathError(f"cannot write {path!r}: {error}") from None


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format that the suffix names; the file appears whole or not at all.

    Raises:
        OutputPathError: If it cannot be written.
    """
    target = check_output(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("xb") as file:
            figure.savefig(file, format=target.suffix[1:].lower())
        partial.replace(target)
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
