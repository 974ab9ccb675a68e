"""The pictures of a report: tokens with the rules' bounds, and the frontier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bandpo.check import Float64Array
from bandpo.plot.look import Theme, drawing, look_of
from bandpo.region import BySign, Region
from bandpo.replay.cloud import Cloud
from bandpo.replay.compare import Comparison
from bandpo.replay.rule import ReplayedRule
from bandpo.rule import parts_of

WIDTH, HEIGHT = 7.4, 4.6
GAIN, LOSS = ("#0072b2", "#58b4ec"), ("#c2500a", "#ff9055")
"""Colours of tokens with a positive and a negative advantage, on a light and on a dark page."""

MARKERS = "osD^vPX"

TICKS = (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


def draw_cloud(cloud: Cloud, rules: Sequence[ReplayedRule], *, dark: bool = False) -> str:
    """Returns a picture of tokens, their log-ratio against their old probability, as SVG.

    The edges of the regions are drawn over them, of rules with ratios of tokens.
    """
    with drawing(dark=dark) as theme:
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        old, log_ratio, advantages = cloud.columns
        inside = np.isfinite(old) & np.isfinite(log_ratio)
        old, log_ratio, advantages = old[inside], log_ratio[inside], advantages[inside]
        size = float(np.quantile(np.abs(log_ratio), 0.999)) if len(old) else 1.0
        limit = 1.3 * min(max(size, 0.05), 20.0)
        x = _logit(np.clip(old, np.log(1e-6), np.log1p(-1e-6)))
        ends = np.quantile(x, [0.002, 0.998]) if len(x) else np.array([-9.0, 9.0])
        axes.set_xlim(ends[0] - 0.2, ends[1] + 0.2)
        axes.set_ylim(-limit, limit)
        for chosen, colour in ((advantages > 0.0, GAIN), (advantages < 0.0, LOSS)):
            axes.scatter(
                x[chosen],
                log_ratio[chosen],
                s=5.0,
                color=colour[dark],
                alpha=0.45,
                linewidths=0,
                rasterized=True,
            )
        grid = np.linspace(*axes.get_xlim(), 400)
        log_p = -np.logaddexp(0.0, -grid)
        for rule in rules:
            if rule.has_own_ratio:  # its bounds are not those of a token
                continue
            region = rule.rule.region
            for part in parts_of(region) if isinstance(region, (Region, BySign)) else ():
                lower, upper = part.log_bounds(log_p)
                look = look_of(rule.name, dark=dark)
                axes.plot(grid, np.maximum(lower, -2 * limit), linewidth=1.3, **look)
                axes.plot(
                    grid, np.minimum(upper, 2 * limit), linewidth=1.3, label=rule.name, **look
                )
        axes.axhline(0.0, color=theme.muted, linewidth=0.6)
        ticks = [tick for tick in TICKS if ends[0] <= _logit(np.log([tick]))[0] <= ends[1]]
        axes.xaxis.set_major_locator(FixedLocator([_logit(np.log([t]))[0] for t in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: f"{ticks[place]:g}"))
        axes.set_xlabel("old probability")
        axes.set_ylabel("ln(new/old)")
        axes.grid()
        _name_rules(axes, theme)
        return _svg(figure)


def draw_frontier(found: Comparison, *, dark: bool = False) -> str:
    """Returns a picture of gradient kept against KL spent, as SVG.

    It shows the optimum and all rules with ratios of tokens.
    """
    with drawing(dark=dark) as theme:
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        tokens = found.sums["tokens"].sum()
        spent, kept = found.frontier.curve()
        whole = found.frontier.whole or 1.0
        axes.plot(spent / tokens, kept / whole, color=theme.ink, linewidth=1.2, label="best mask")
        places = []
        masks = [rule for rule in found.rules if not rule.rule.has_own_ratio]
        for rule, marker in zip(masks, cycle(MARKERS), strict=False):
            x, y = float(rule.sums["kl"].sum() / tokens), found.kept(rule)
            places.append((x, y))
            colour = look_of(rule.rule.name, dark=dark)["color"]
            axes.plot([x], [y], marker, color=colour, markersize=5.0, label=rule.rule.name)
        lowest = min([y for _, y in places] + [0.98])
        axes.set_ylim(max(0.0, lowest - 0.15 * (1.0 - lowest) - 0.01), 1.005)
        axes.set_xlim(left=0.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("KL spent, nats a token")
        axes.set_ylabel("share of the gradient kept")
        axes.grid()
        _name_rules(axes, theme)
        return _svg(figure)


def _logit(log_p: Float64Array) -> Float64Array:
    return np.asarray(log_p - np.log(-np.expm1(log_p)))


def _name_rules(axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(),
        unique.keys(),
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.3,
        ncols=4,  # above the axes, so that a phone shows them without scrolling
        frameon=False,
        labelcolor=theme.ink,
        fontsize=8.0,
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "bandpo"}):  # so that the same picture has the same ids
        figure.savefig(buffer, format="svg", dpi=160, metadata=metadata, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
