"""Pictures of regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from bandpo.caption import label_of
from bandpo.error import MissingExtraError
from bandpo.region import Clip, Region

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bandpo.plot.draw import draw_panel, draw_region
    from bandpo.plot.look import DOTS, DOTS_PER_INCH, drawing, look_of
    from bandpo.plot.output import SUFFIXES, check_output, save
    from bandpo.plot.view import LOGIT, RATIO, TITLE, VIEWS, ProbabilityRange
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise MissingExtraError("matplotlib", "plot") from None

__all__ = [
    "SUFFIXES",
    "VIEWS",
    "Picture",
    "band_figure",
    "check_output",
    "comparison_figure",
    "draw_regions",
    "save",
    "update_figure",
]

_PANEL = 4.1
"""Width and height of a panel in inches: two fill a page of text, one a phone."""
_SIDE = 3.15
"""Width and height of its axes."""
_COLUMNS = 4


class Picture(Figure):
    """A figure that a notebook shows."""

    def _repr_png_(self) -> bytes:
        written = BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()


def update_figure(
    regions: Mapping[str, Region],
    *,
    views: Sequence[str] = ("linear", "log"),
    dark: bool = False,
    probability_range: ProbabilityRange | None = None,
) -> Picture:
    """Returns where the probability of a token may go in one update, a panel for each view.

    Args:
        regions: A few regions by name.
        views: Names of `VIEWS`.
        dark: Whether the page is dark.
        probability_range: First and last old probability; those of the views if left out.

    Raises:
        InvalidValueError: If the range is not in [0, 1], or is empty.
    """
    figure = Picture(figsize=(_PANEL * len(views), _PANEL), dpi=DOTS_PER_INCH)
    labels = {name: label_of(name, region) for name, region in regions.items()}
    with drawing(dark=dark) as theme:
        figure.set_facecolor(theme.paper)
        width = _PANEL * len(views)
        for k, view in enumerate(VIEWS[name] for name in views):
            # In inches, so that a panel is the same alone and beside others.
            left, bottom = _PANEL * k + 0.73, 0.5
            axes = figure.add_axes((left / width, bottom / _PANEL, _SIDE / width, _SIDE / _PANEL))
            ends = view.range(probability_range)
            draw_panel(
                axes,
                view,
                regions,
                labels,
                theme,
                dark=dark,
                probability_range=ends,
                value_range=(1e-2, 1e2) if view.of_ratio else ends,
            )
            axes.set_title(view.title, loc="left", x=-0.19)
    return figure


def comparison_figure(
    regions: Mapping[str, Region],
    *,
    dark: bool = False,
    probability_range: ProbabilityRange | None = None,
) -> Picture:
    """Returns a small picture of each region, over the fixed clip of DAPO in grey.

    The axes are those of the log-odds, which show rare tokens and tokens near p = 1 alike.

    Args:
        regions: The regions by name, as many as you like.
        dark: Whether the page is dark.
        probability_range: First and last old probability, in (0, 1).

    Raises:
        InvalidValueError: If the range is not in [0, 1], or is empty.
    """
    ends = LOGIT.range(probability_range)
    columns = min(_COLUMNS, len(regions))
    rows = -(-len(regions) // columns)
    side, gap, left, bottom, top = 1.74, (0.2, 0.46), 0.62, 0.5, 0.95
    width = left + columns * (side + gap[0]) + 0.05
    height = bottom + rows * (side + gap[1]) - gap[1] + top
    figure = Picture(figsize=(width, height), dpi=DOTS_PER_INCH)
    with drawing(dark=dark) as theme:
        figure.set_facecolor(theme.paper)
        for k, (name, region) in enumerate(regions.items()):
            row, column = divmod(k, columns)
            x = left + column * (side + gap[0])
            y = bottom + (rows - 1 - row) * (side + gap[1])
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            LOGIT.prepare(axes, ends, ends, few_ticks=True)
            axes.plot(ends, ends, color=theme.muted, linewidth=0.7, linestyle=DOTS)
            grey = {"color": theme.muted, "linestyle": "-"}
            look = look_of(name, dark=dark)
            edges = LOGIT.edges(Clip(0.2, 0.28), ends)
            draw_region(axes, edges, ends, grey, f"{name}:dapo", dark=dark, linewidth=0.6)
            draw_region(axes, LOGIT.edges(region, ends), ends, look, name, dark=dark)
            heading, _, caption = label_of(name, region).rpartition("\n")
            axes.text(0.0, 1.12, heading or caption, transform=axes.transAxes, color=look["color"])
            if heading:
                axes.text(
                    0.0, 1.03, caption, transform=axes.transAxes, color=theme.muted, fontsize=7.2
                )
            if column:
                axes.set_ylabel("")
                axes.tick_params(labelleft=False)
            if k + columns < len(regions):
                axes.set_xlabel("")
                axes.tick_params(labelbottom=False)
        figure.text(0.1 / width, 1.0 - 0.25 / height, TITLE, fontsize=10.0, va="center")
        figure.text(
            0.1 / width,
            1.0 - 0.45 / height,
            "grey: fixed clip 0.2/0.28 (dapo); axes of the log-odds",
            color=theme.muted,
            va="center",
        )
    return figure


def band_figure(
    regions: Mapping[str, Region],
    *,
    probability_range: ProbabilityRange = (1e-4, 1.0),
    ratio_range: tuple[float, float] = (1e-2, 1e3),
    dark: bool = False,
) -> Picture:
    """Returns the bounds of the ratio of each region, by name; see `draw_regions`."""
    figure = Picture(figsize=(6.4, 4.8), dpi=DOTS_PER_INCH)
    with drawing(dark=dark) as theme:
        figure.set_facecolor(theme.paper)
        draw_regions(
            figure.add_axes((0.1, 0.11, 0.87, 0.86)),
            regions,
            probability_range=probability_range,
            ratio_range=ratio_range,
            dark=dark,
        )
    return figure


def draw_regions(
    axes: Axes,
    regions: Mapping[str, Region],
    *,
    probability_range: ProbabilityRange = (1e-4, 1.0),
    ratio_range: tuple[float, float] = (1e-2, 1e3),
    dark: bool = False,
) -> None:
    """Draws the allowed ratios of each region against the old probability, log-log, on your axes.

    Args:
        axes: Where to draw.
        regions: The regions by the names that label them.
        probability_range: First and last old probability, in (0, 1].
        ratio_range: First and last ratio of the vertical axis, above 0.
        dark: Whether the page is dark.

    Raises:
        InvalidValueError: If the range of probabilities is not in (0, 1], or is empty.
    """
    with drawing(dark=dark) as theme:
        draw_panel(
            axes,
            RATIO,
            regions,
            {name: label_of(name, region) for name, region in regions.items()},
            theme,
            dark=dark,
            probability_range=RATIO.range(probability_range),
            value_range=ratio_range,
        )


def __dir__() -> list[str]:
    return __all__
