"""The figure of a study: the mean area of every family by noise, for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bandpo import plot
from bandpo.plot import Picture
from bandpo.plot.look import drawing, look_of

from .compare import best


def write_figures(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes ``area-TASK-PAGE.svg`` for each task of the rows, at the best strength and rate."""
    for task in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == task]
        for page in ("light", "dark"):
            plot.save(_figure(of_task, dark=page == "dark"), folder / f"area-{task}-{page}.svg")


def _figure(rows: Sequence[Mapping[str, Any]], *, dark: bool) -> Picture:
    noises = sorted({row["noise"] for row in rows})
    found = [best(row for row in rows if row["noise"] == noise) for noise in noises]
    figure = Picture(figsize=(7.0, 4.2))
    with drawing(dark=dark):
        axes = figure.add_subplot()
        for family in dict.fromkeys(name for winners in found for name in winners):
            points = [
                (noise, winners[family][2])
                for noise, winners in zip(noises, found, strict=True)
                if family in winners
            ]
            look = look_of(family, dark=dark)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=family, **look)
        axes.set(xlabel="share of rewards flipped", ylabel="area under the reward curve")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.set_layout_engine("tight")
    return figure
