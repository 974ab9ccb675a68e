"""The picture of a demo run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandpo import Region
from bandpo.demo.result import Result
from bandpo.plot import DOTS_PER_INCH, GRID, draw_regions, styles


def demo_figure(result: Result, regions: Mapping[str, Region]) -> Figure:
    """Returns three panels: reward, entropy, and the bounds of the rules that were compared.

    Args:
        result: The demo's runs.
        regions: The region of each rule, by the rule's name, in the order of the runs.
    """
    figure = Figure(figsize=(14.0, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    reward, entropy, bounds = figure.subplots(1, 3)
    for rule, style in zip(regions, styles(), strict=False):
        runs = result.of_rule(rule)
        _draw_runs(reward, [run.reward for run in runs], rule, style)
        _draw_runs(entropy, [run.entropy for run in runs], rule, style)
    reward.axhline(0.5, color="0.6", linewidth=0.8)
    reward.set(title="Expected reward", ylabel="mean probability of the right answer", ylim=(0, 1))
    entropy.set(title="Entropy of the answers", ylabel="nats")
    entropy.set_ylim(bottom=0)
    for axes in (reward, entropy):
        axes.set(xlabel="rollout batches", xlim=(0, result.settings.batches))
        axes.grid(**GRID)
    reward.legend(loc="upper left", title="line: median, area: all seeds")
    draw_regions(bounds, regions)
    bounds.set_title(f"Ratios that a rule allows (band: delta {result.settings.delta:g})")
    return figure


def _draw_runs(
    axes: Axes, curves: Sequence[Sequence[float]], name: str, style: Mapping[str, Any]
) -> None:
    values = np.asarray(curves)
    batches = np.arange(values.shape[1])
    axes.fill_between(
        batches, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0
    )
    axes.plot(batches, np.median(values, axis=0), label=name, **style)
