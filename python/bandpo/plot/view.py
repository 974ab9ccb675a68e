"""Views: the axes that a region is drawn on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bandpo.check import Float64Array
from bandpo.curve import Curve, curve_at
from bandpo.error import InvalidValueError
from bandpo.region import Region

POINTS = 97
"""Old probabilities of a line: enough for 3 points of length each, in few bytes."""

ProbabilityRange = tuple[float, float]


class Edges(NamedTuple):
    """The two lines of a region in a view."""

    x: Float64Array
    lower: Float64Array
    upper: Float64Array


class View(NamedTuple):
    """What the axes show: the new probability or the ratio, against the old probability."""

    title: str
    scale: Literal["linear", "log", "logit"]
    of_ratio: bool = False

    def range(self, probability_range: ProbabilityRange | None) -> ProbabilityRange:
        """Returns the first and last old probability of the axes.

        Raises:
            InvalidValueError: If a range that is given is not in [0, 1] or is empty.
        """
        if probability_range is None:
            return (0.0, 1.0) if self.scale == "linear" else self.range((1e-4, 1.0))
        first, last = probability_range
        if not 0.0 <= first < last <= 1.0:
            raise InvalidValueError(f"p must be in 0 <= first < last <= 1, got {first} and {last}")
        if self.scale != "linear" and first == 0.0:
            raise InvalidValueError(f"p must be above 0 on {self.scale} axes, got {first}")
        if self.scale == "logit" and last == 1.0:
            return first, 1.0 - min(first, 0.5)
        return first, last

    def points(self, probability_range: ProbabilityRange) -> Float64Array:
        """Returns the old probabilities at which lines have a corner."""
        if self.scale == "linear":  # closer at both ends, where the lines of bands are steep
            turn = 0.5 - 0.5 * np.cos(np.linspace(0.0, np.pi, POINTS))
            first, last = probability_range
            return np.maximum(first + (last - first) * turn, 1e-12)
        first, last = np.array(probability_range)
        if self.scale == "log":
            return np.geomspace(first, last, POINTS)
        odds = np.geomspace(first / (1.0 - first), last / (1.0 - last), POINTS)
        return np.asarray(odds / (1.0 + odds))

    def edges(self, region: Region, probability_range: ProbabilityRange) -> Edges:
        """Returns the lines of a region."""
        curve = curve_at(region, self.points(probability_range))
        return self.edges_of(curve)

    def edges_of(self, curve: Curve) -> Edges:
        """Returns the lines of a curve: its ratios, or the new probabilities that they lead to."""
        if self.of_ratio:
            return Edges(curve.p, curve.lower, curve.upper)
        upper = np.minimum(curve.p * curve.upper, 1.0)
        return Edges(curve.p, curve.p * curve.lower, upper)

    def prepare(
        self,
        axes: Axes,
        probability_range: ProbabilityRange,
        value_range: tuple[float, float],
        *,
        few_ticks: bool = False,
    ) -> None:
        """Sets scales, limits and ticks."""
        name = "ratio new/old" if self.of_ratio else "new probability"
        axes.set(xscale=self.scale, yscale=self.scale, xlim=probability_range, ylim=value_range)
        axes.set(xlabel="old probability", ylabel=name)
        for axis, ends in ((axes.xaxis, probability_range), (axes.yaxis, value_range)):
            axis.set_major_locator(FixedLocator(self._ticks(ends, few=few_ticks)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.12g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True)

    def _ticks(self, ends: tuple[float, float], *, few: bool) -> list[float]:
        if self.scale == "linear":
            return list(np.linspace(*ends, 3 if few else 6))
        exponents = range(int(np.floor(np.log10(ends[0]))), int(np.ceil(np.log10(ends[1]))) + 1)
        if self.scale == "log":
            step = max(1, len(exponents) // 6)
            return [10.0**k for k in exponents if k % step == 0]
        step = 2 if few or len(exponents) > 4 else 1
        small = [10.0**k for k in exponents if k <= -1 and k % step == 0]
        ticks = sorted([*small, 0.5, *(1.0 - p for p in small)])
        inside = [p for p in ticks if ends[0] <= p <= ends[1]]
        return inside[1:-1] if few and len(inside) > 4 else inside


TITLE: Final = "Where a token's probability may go in one update"
LINEAR: Final = View(TITLE, "linear")
LOG: Final = View("The same for rare tokens, on log axes", "log")
LOGIT: Final = View("The same for rare and for sure tokens, on logit axes", "logit")
RATIO: Final = View("Ratios that are not clipped", "log", of_ratio=True)
VIEWS: Final[Mapping[str, View]] = {
    "linear": LINEAR,
    "log": LOG,
    "logit": LOGIT,
    "ratio": RATIO,
}
"""By the name that the command line has for them."""
