"""The figures of the study, for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bandpo import plot
from bandpo.plot import Picture
from bandpo.plot.look import Theme, drawing, look_of

from . import bandit
from .compare import best, by_seed, paired
from .grid import noises_of
from .report import BANDS, CLIPS, Results
from .rule import FAMILIES

# Looks of presets that are near to a family, so that a colour means the same in every picture.
LOOKS = {
    "kl": "bandpo-kl",
    "kl 0.05": "trgppo",
    "asymmetric clip": "dapo",
    "wide constant": "cispo",
    "no clipping": "gmpo",
}
SERIES = ("bandpo-kl", "bandpo-tv", "cispo", "dapo")
"""Looks of lines that are no rules."""
TASKS = ("rare", "many", "countdown")


def write_figure(name: str, results: Path) -> None:
    """Writes ``NAME-light.svg`` and ``NAME-dark.svg`` into the folder of the results."""
    drawn, size = FIGURES[name]
    for page in ("light", "dark"):
        figure = Picture(figsize=size)
        with drawing(dark=page == "dark") as theme:
            drawn(figure, Results(results), theme, page == "dark")
            figure.set_layout_engine("tight")
            plot.save(figure, results / f"{name}-{page}.svg")


def _differences(figure: Any, results: Results, theme: Theme, dark: bool) -> None:
    """The best band less each rival, with intervals, by task and noise."""
    axes = figure.add_subplot()
    places, names = [], []
    at = 0.0
    for task in TASKS:
        for noise in noises_of(task):
            where = {"task": task, "noise": noise}
            band = by_seed(
                results.of("finals", family=results.leader("tuning", BANDS, **where), **where)
            )
            rivals = {
                "best clip": results.leader("tuning", CLIPS, **where),
                "wide constant": "wide constant",
                "no clipping": "no clipping",
            }
            for k, (rival, family) in enumerate(rivals.items()):
                found = paired(band, by_seed(results.of("finals", family=family, **where)))
                look = look_of(LOOKS.get(rival, "dapo"), dark=dark)
                axes.errorbar(
                    found.mean, at + 0.22 * (k - 1),
                    xerr=[[found.mean - found.low], [found.high - found.mean]],
                    fmt="o", markersize=4, color=look["color"], elinewidth=1.4,
                    label=rival if at == 0.0 else None,
                )  # fmt: skip
            places.append(at)
            names.append(f"{task}, {noise:.0%}")
            at += 1.0
    axes.axvline(0.0, color=theme.muted, linewidth=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlabel="area of the best band less that of a rival, 95 % intervals of 8 seeds")
    axes.legend(loc="upper left", frameon=False)


def _radius(figure: Any, results: Results, theme: Theme, dark: bool) -> None:
    """Area of kl by radius at its best rate, by noise, on the tuning seeds."""
    axes = figure.add_subplot()
    radii = [float(spec.partition("@")[2].partition(")")[0]) for spec in FAMILIES["kl"]]
    for noise, name in zip(noises_of("rare"), SERIES, strict=True):
        of = results.of("tuning", task="rare", noise=noise)
        areas = [
            best(row for row in of if (row["family"], row["region"]) == ("kl", spec))["kl"][2]
            for spec in FAMILIES["kl"]
        ]
        clip = max(found[2] for found in best(row for row in of if row["family"] in CLIPS).values())
        look = look_of(name, dark=dark) | {"linestyle": "-"}
        axes.plot(radii, areas, marker="o", markersize=3, **look)
        dotted = {"linewidth": 0.9, "linestyles": [(0, (1.0, 1.5))]}
        axes.hlines(clip, radii[0], radii[-1], colors=look["color"], **dotted)
        label = {"color": look["color"], "va": "center", "fontsize": 8}
        axes.text(radii[-1] * 1.15, areas[-1], f"{noise:.0%} flipped", **label)
    axes.set_xscale("log")
    axes.set_xlim(radii[0] * 0.85, radii[-1] * 2.2)
    axes.set(xlabel="delta of kl (dotted: the best clip)", ylabel="area under the reward curve")
    axes.set_ylim(0.0, None)


def _curves(figure: Any, results: Results, theme: Theme, dark: bool) -> None:
    """Reward by batch of four rules, mean of 8 seeds, clean and with 5 % flipped."""
    panels = figure.subplots(2, len(TASKS), sharex="col", sharey="col")
    for row, noise in zip(panels, (0.0, 0.05), strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            for family in ("kl", "kl 0.05", "asymmetric clip", "no clipping"):
                runs = results.of("finals", task=task, noise=noise, family=family)
                mean = np.mean([run["reward"] for run in runs], axis=0)
                axes.plot(mean, label=family, **look_of(LOOKS[family], dark=dark))
            axes.set_title(f"{task}, {noise:.0%} flipped", fontsize=9, color=theme.muted)
            axes.set_ylim(0.0, None)
    for axes in panels[-1]:
        axes.set_xlabel("batch")
    for row in panels:
        row[0].set_ylabel("clean reward")
    panels[0][0].legend(frameon=False, fontsize=8)


def _bandit(figure: Any, results: Results, theme: Theme, dark: bool) -> None:
    """Batches until a rare arm has half the mass: closed form and simulation, by noise."""
    axes = figure.add_subplot()
    noises = np.array([0.0, 0.01, 0.02, 0.05, 0.1])
    for delta, name in zip((0.001, 0.01, 0.05), SERIES, strict=False):
        look = look_of(name, dark=dark) | {"linestyle": "-"}
        form = [bandit.batches_to_half(0.01, delta, group=16, noise=noise) for noise in noises]
        taken = [
            bandit.simulate(0.01, delta, group=16, noise=noise, runs=400, seed=0, limit=2000)
            for noise in noises
        ]
        axes.plot(noises, form, **look)
        axes.plot(noises, [part.mean() for part in taken], "o", markersize=4, color=look["color"])
        axes.text(0.102, form[-1], f"delta {delta}", color=look["color"], va="center", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(-0.004, 0.125)
    axes.set(
        xlabel="share of rewards flipped (lines: closed form, dots: simulated)",
        ylabel="mean batches from 0.01 to 1/2",
    )


FIGURES: Mapping[str, tuple[Callable[[Any, Results, Theme, bool], None], tuple[float, float]]] = {
    "differences": (_differences, (7.0, 5.0)),
    "radius": (_radius, (7.0, 4.2)),
    "curves": (_curves, (9.0, 5.0)),
    "bandit": (_bandit, (7.0, 4.2)),
}
