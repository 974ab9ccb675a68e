"""The picture of a demo run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from bandpo import Region
from bandpo.demo.report import headline, rewards_text
from bandpo.demo.result import Result, Run
from bandpo.demo.rule import CAP, FIXED, NO_CLIP, PAPER_DELTA, band_name
from bandpo.plot import Picture
from bandpo.plot.draw import draw_panel
from bandpo.plot.label import label_ends
from bandpo.plot.look import DOTS_PER_INCH, drawing, look_of
from bandpo.plot.view import LOG

_WIDTH, _HEIGHT = 8.6, 7.7
_LEFT, _RIGHT = 0.62, 4.92
"""Where the axes of the two columns begin, in inches."""
_LINE = 100
"""Letters of a line of the headline, which has two at most."""


def demo_figure(result: Result, regions: Mapping[str, Region]) -> Picture:
    """Returns four panels: reward if clean and if noisy, entropy if noisy, and the rules.

    Args:
        result: The demo's runs.
        regions: The region of each rule, by the rule's name, in the order of the runs.
    """
    figure = Picture(figsize=(_WIDTH, _HEIGHT), dpi=DOTS_PER_INCH)
    looks = _looks(result)
    with drawing() as theme:

        def panel(left: float, bottom: float, width: float, height: float, title: str) -> Axes:
            axes = figure.add_axes(
                (left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, height / _HEIGHT)
            )
            axes.set_title(title, loc="left")
            return axes

        figure.set_facecolor(theme.paper)
        first = fill(headline(result), _LINE)
        figure.text(0.12 / _WIDTH, 1.0 - 0.15 / _HEIGHT, first, fontsize=10, va="top")
        settings = result.settings
        about = (
            f"{settings.seeds} seeds, {settings.inner_steps} steps on a batch; line: median, "
            f"area: all seeds; bands are capped at a ratio of {CAP:g}"
        )
        figure.text(0.12 / _WIDTH, 1.0 - 0.62 / _HEIGHT, about, color=theme.muted, va="center")

        top = min(1.0, 1.05 * max(max(run.reward) for run in result.runs))
        for left, noise in zip((_LEFT, _RIGHT), result.noises, strict=True):
            reward = panel(left, 4.3, 2.5, 2.35, f"Reward, {rewards_text(noise)}")
            _draw_runs(reward, result, noise, lambda run: run.reward, looks, top=top)
            reward.set(ylabel="mean probability of the right answer")

        noisy = panel(_LEFT, 0.55, 2.5, 2.95, f"Entropy in nats, {rewards_text(settings.noise)}")
        _draw_runs(noisy, result, settings.noise, lambda run: run.entropy, looks)
        shown = {looks[rule]: rule for rule in result.rules if rule != NO_CLIP}
        rules = panel(_RIGHT, 0.55, 3.3, 2.95, "Where a token's probability may go")
        ends = LOG.range(None)
        draw_panel(
            rules,
            LOG,
            {look: regions[rule] for look, rule in shown.items()},
            shown,
            theme,
            dark=False,
            probability_range=ends,
            value_range=ends,
        )
    return figure


def _looks(result: Result) -> dict[str, str]:
    """The presets whose looks the rules have."""
    return {
        FIXED: "dapo",
        NO_CLIP: "gmpo",
        band_name(PAPER_DELTA): "trgppo",
        band_name(result.settings.delta): "bandpo-kl",
    }


def _draw_runs(
    axes: Axes,
    result: Result,
    noise: float,
    of: Callable[[Run], Sequence[float]],
    looks: Mapping[str, str],
    *,
    top: float | None = None,
) -> None:
    """Draws the median of each rule over the seeds, with the last value at its end."""
    ends = []
    for rule in result.rules:
        values = np.asarray([of(run) for run in result.of(rule, noise)])
        batches = np.arange(values.shape[1])
        look = look_of(looks[rule])
        axes.fill_between(
            batches, values.min(0), values.max(0), color=look["color"], alpha=0.12, linewidth=0
        )
        median = np.median(values, axis=0)
        axes.plot(batches, median, linewidth=1.4, **look)
        ends.append((float(median[-1]), f"{rule}\n{median[-1]:.3g}", look["color"]))
    axes.set(xlabel="rollout batches", xlim=(0, result.settings.batches))
    axes.locator_params("x", nbins=6, integer=True)
    axes.set_ylim(0.0, top)
    axes.grid(visible=True)
    label_ends(axes, ends)
