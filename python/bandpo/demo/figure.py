"""The picture of a demo run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from bandpo import Region
from bandpo.demo.report import headline
from bandpo.demo.result import BIN_NAMES, Result, Run
from bandpo.demo.rule import BAND, CAP, CONSTANT, FIXED, NO_CLIP
from bandpo.plot import Picture
from bandpo.plot.draw import draw_panel
from bandpo.plot.label import Label, Line, label_ends, place_labels
from bandpo.plot.look import DOTS, DOTS_PER_INCH, drawing, look_of
from bandpo.plot.view import LOG

_LOOKS = {FIXED: "dapo", BAND: "bandpo-kl", NO_CLIP: "gmpo", CONSTANT: "cispo"}
"""The presets whose looks the rules have."""

_WIDTH, _HEIGHT = 8.3, 8.0
_LEFT, _RIGHT = 0.62, 4.72
"""Where the axes of the two columns begin, in inches."""


def demo_figure(result: Result, regions: Mapping[str, Region]) -> Picture:
    """Returns four panels: reward, entropy, clip fractions by probability, and the rules.

    Args:
        result: The demo's runs.
        regions: The region of each rule, by the rule's name, in the order of the runs.
    """
    figure = Picture(figsize=(_WIDTH, _HEIGHT), dpi=DOTS_PER_INCH)
    with drawing() as theme:

        def panel(left: float, bottom: float, width: float, height: float, title: str) -> Axes:
            axes = figure.add_axes(
                (left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, height / _HEIGHT)
            )
            axes.set_title(title, loc="left")
            return axes

        figure.set_facecolor(theme.paper)
        figure.text(0.12 / _WIDTH, 1.0 - 0.3 / _HEIGHT, headline(result), fontsize=11, va="center")
        settings = result.settings
        about = (
            f"{settings.seeds} seeds, {settings.inner_steps} steps on a batch; line: median, "
            f"area: all seeds; KL band: delta {settings.delta:g}, cap {CAP:g}"
        )
        figure.text(0.12 / _WIDTH, 1.0 - 0.53 / _HEIGHT, about, color=theme.muted, va="center")

        reward = panel(_LEFT, 4.55, 2.35, 2.45, "Expected reward")
        _draw_runs(reward, result, lambda run: run.reward, top=1.0)
        reward.axhline(0.5, color=theme.muted, linewidth=0.7, linestyle=DOTS)
        reward.set(ylabel="mean probability of the right answer", ylim=(0.0, 1.0))
        entropy = panel(_RIGHT, 4.55, 2.35, 2.45, "Entropy of the answers, in nats")
        _draw_runs(entropy, result, lambda run: run.entropy)

        clipped = panel(_LEFT, 0.55, 3.3, 3.15, "Share clipped above, of the tokens with A > 0")
        _draw_clip_fractions(clipped, result)
        shown = {rule: regions[rule] for rule in (FIXED, BAND)}
        rules = panel(_RIGHT, 0.55, 3.3, 3.15, "Where a token's probability may go")
        ends = LOG.range(None)
        draw_panel(
            rules,
            LOG,
            {_LOOKS[rule]: region for rule, region in shown.items()},
            {_LOOKS[rule]: rule for rule in shown},
            theme,
            dark=False,
            probability_range=ends,
            value_range=ends,
        )
    return figure


def _draw_runs(
    axes: Axes, result: Result, of: Callable[[Run], Sequence[float]], *, top: float | None = None
) -> None:
    """Draws the median of each rule over the seeds, with the last value at its end."""
    ends = []
    for rule in result.rules:
        values = np.asarray([of(run) for run in result.of_rule(rule)])
        batches = np.arange(values.shape[1])
        look = look_of(_LOOKS[rule])
        axes.fill_between(
            batches, values.min(0), values.max(0), color=look["color"], alpha=0.12, linewidth=0
        )
        median = np.median(values, axis=0)
        axes.plot(batches, median, linewidth=1.4, **look)
        ends.append((float(median[-1]), f"{rule}\n{median[-1]:.3g}", look["color"]))
    axes.set(xlabel="rollout batches", xlim=(0, result.settings.batches))
    axes.set_ylim(0.0, top)
    axes.grid(visible=True)
    label_ends(axes, ends)


def _draw_clip_fractions(axes: Axes, result: Result) -> None:
    """Draws the share of clipped tokens in each bin of the old probability, with its rule."""
    places = np.arange(len(BIN_NAMES))
    labels, lines = [], []
    for rule in result.rules:
        if rule == NO_CLIP:
            continue
        up, _ = result.clip_fractions(rule)
        values = np.array([np.nan if share is None else share for share in up])
        look = look_of(_LOOKS[rule])
        axes.plot(places, values, linewidth=1.4, marker="o", markersize=3.5, **look)
        lines.append((rule, places, values))
        labels.append(Label(rule, rule, look["color"]))
    axes.set_xticks(places, [fill(name.replace("-", "- "), 7) for name in BIN_NAMES])
    axes.set(xlabel="old probability", xlim=(-0.2, len(places) - 0.8))
    axes.set_ylim(bottom=0.0)
    axes.grid(visible=True, axis="y")
    drawn = [Line.of(axes, *line) for line in lines]
    place_labels(axes, labels, drawn, [])
