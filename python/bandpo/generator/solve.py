"""`Equation`: ``D_f = delta`` for an f that is a Python callable over arrays.

One problem serves both sides, as in ``rust/band/``: of the two outcomes {this token, everything
else} one, of probability ``w``, shrinks by a factor ``e^-m``; the other, of probability
``g = 1 - w``, grows to ``1 + (w/g) (1 - e^-m)`` times its size. For the lower bound the token
shrinks, for the upper bound everything else does. The unknown is ``s = ln m``, because
``ln(D/delta)`` against it is nearly a straight line. All elements of a batch are solved together:
an iteration calls the function once, with one array.

A callable has float64 values ``f(u)`` at normal float64 numbers, and none of ``f(1+y)`` for a tiny
y. The docstring of `bandpo.generator.CallableGenerator` states the cost in accuracy.
"""

from __future__ import annotations

import math

import numpy as np

from bandpo.check import BoolArray, Float64Array
from bandpo.generator.function import Function
from bandpo.generator.limits import (
    EPS,
    LOG_REACH,
    MAX_EXPANSIONS,
    MAX_INTERPOLATIONS,
    MAX_ITERATIONS,
    MAX_LOG_EXCESS,
    MAX_LOG_M,
    MAX_MOVES,
    MAX_U,
)
from bandpo.generator.problem import Move, Problems, move_by_log_ratio, move_by_unknown


class Equation:
    """``D_f = delta`` for one f, solved for whole arrays of problems."""

    def __init__(self, function: Function) -> None:
        self._f = function

    def problems_of(self, logp: Float64Array, upper: BoolArray) -> Problems:
        """Returns the problems of these tokens and sides."""
        return Problems.of(logp, upper, self._f.slope_at_infinity == math.inf)

    def solve(self, problems: Problems, delta: Float64Array) -> Float64Array:
        """Returns the log bound of each problem."""
        bound: Float64Array = np.where(problems.upper, -problems.logp, -np.inf)
        todo = np.arange(delta.size)
        if self._f.at_zero < math.inf:
            todo = np.flatnonzero(~self.is_inside(problems, delta, bound))
            problems, delta = problems.take(todo), delta[todo]
        if todo.size:
            rough = self._log_ratio(problems, self._root(problems, delta))
            bound[todo] = self.move(problems, delta, rough, inwards=True)
        return bound

    def _root(self, problems: Problems, delta: Float64Array) -> Float64Array:
        """Returns the max unknown found with ``D <= delta``, by Chandrupatla's method."""
        max_unknown = self._max_unknown(problems)
        root: Float64Array = max_unknown.copy()
        at_max = self._log_excess(problems, delta, max_unknown)
        todo = np.flatnonzero(at_max > 0.0)
        if todo.size == 0:
            return root
        problems, delta = problems.take(todo), delta[todo]
        low, high, at_low, at_high = self._bracket(problems, delta, max_unknown[todo], at_max[todo])
        # T. R. Chandrupatla, Adv. Eng. Softw. 28 (1997) 145-149. x1 is the newest point, the root
        # lies between x1 and x2, and x3 is the previous point. Interpolation is inverse quadratic
        # if the three points make it safe; otherwise the bracket is halved.
        x1, f1, x2, f2 = low, at_low, high, at_high
        share = f1 / (f1 - f2)
        for iteration in range(MAX_ITERATIONS):
            x = x1 + share * (x2 - x1)
            f = self._log_excess(problems, delta, x)
            same = (f <= 0.0) == (f1 <= 0.0)
            x3, f3 = np.where(same, x1, x2), np.where(same, f1, f2)
            x2, f2 = np.where(same, x2, x1), np.where(same, f2, f1)
            x1, f1 = x, f
            width, tolerance = np.abs(x2 - x1), 2.0 * EPS * (1.0 + np.abs(x1))
            done = (width <= tolerance) | ((f1 <= 0.0) & (f1 >= -2.0 * EPS))
            if done.any():
                root[todo[done]] = np.where(f1 <= 0.0, x1, x2)[done]
                active = ~done
                if not active.any():
                    return root
                problems, delta, todo = problems.take(active), delta[active], todo[active]
                x1, x2, x3, f1, f2, f3, width, tolerance = (
                    array[active] for array in (x1, x2, x3, f1, f2, f3, width, tolerance)
                )
            share = np.full_like(x1, 0.5)
            if iteration < MAX_INTERPOLATIONS:
                xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
                safe = (phi * phi < xi) & ((1.0 - phi) * (1.0 - phi) < 1.0 - xi)
                interpolated = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (
                    f3 - f1
                ) * f2 / (f3 - f2)
                share[safe] = interpolated[safe]
            margin = 0.5 * tolerance / width
            share = np.clip(share, margin, 1.0 - margin)
        root[todo] = np.where(f1 <= 0.0, x1, x2)
        return root

    def _bracket(
        self,
        problems: Problems,
        delta: Float64Array,
        max_unknown: Float64Array,
        at_max: Float64Array,
    ) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Returns a bracket of the root: low, high, and ``ln(D/delta)`` at both.

        ``high`` is outside; ``low`` is inside, or next to ``high`` if no point is.
        """
        low, at_low = np.full_like(delta, -np.inf), np.full_like(delta, -MAX_LOG_EXCESS)
        high, at_high = max_unknown.copy(), at_max.copy()
        # Around 1, D is about w/(2g) f''(1) m^2.
        x = 0.5 * (np.log(2.0 * delta / self._f.rough_curvature) - problems.log_odds)
        x = np.where(problems.by_growth, LOG_REACH, np.maximum(x, -40.0))
        x = np.minimum(x, max_unknown - 1.0)
        step = np.zeros_like(x)
        rising = np.zeros(x.shape, dtype=np.bool_)
        todo = np.arange(x.size)
        for expansion in range(MAX_EXPANSIONS):
            f = self._log_excess(problems, delta, x)
            inside = f <= 0.0
            within, beyond = todo[inside], todo[~inside]
            low[within], at_low[within] = x[inside], f[inside]
            high[beyond], at_high[beyond] = x[~inside], f[~inside]
            if expansion == 0:
                rising = inside
                # The slope of ln D by ln m is 2 around 1 for a smooth f and 1 for a kink there.
                step = np.minimum(0.6 * np.abs(f) + 0.05, 4.0)
            x = np.where(rising, x + step, x - step)
            # A search that has passed the max unknown keeps it as its outer end.
            active = (inside == rising) & (x < max_unknown[todo])
            if not active.any():
                break
            problems, delta, todo = problems.take(active), delta[active], todo[active]
            x, rising, step = x[active], rising[active], 2.0 * step[active]
        # A D of rounding errors alone may exceed delta at every m; the bound is then next to 1.
        unseen = low == -np.inf
        low[unseen] = high[unseen] - 1.0
        return low, high, at_low, at_high

    def _max_unknown(self, problems: Problems) -> Float64Array:
        """Returns the max unknown at which both u are normal float64 numbers."""
        max_unknown = np.full_like(problems.logp, MAX_LOG_M)
        if self._f.slope_at_infinity == math.inf:
            log_lost = LOG_REACH - problems.log_odds
            log_m = np.where(log_lost < -37.0, log_lost, np.log(-np.log1p(-np.exp(log_lost))))
            far = log_lost < 0.0
            max_unknown[far] = np.minimum(log_m[far], MAX_LOG_M)
            max_unknown[problems.by_growth] = LOG_REACH
        return max_unknown

    def _log_excess(
        self, problems: Problems, delta: Float64Array, unknown: Float64Array
    ) -> Float64Array:
        """Returns ``ln(D/delta)`` within +-`MAX_LOG_EXCESS`; a NaN counts as outside."""
        d = self.divergence(problems, move_by_unknown(problems, unknown))
        excess = np.clip(np.log(np.maximum(d, 0.0) / delta), -MAX_LOG_EXCESS, MAX_LOG_EXCESS)
        excess[np.isnan(excess)] = MAX_LOG_EXCESS
        # ln rounds a D just above delta to 0.
        return np.where((excess <= 0.0) & (d > delta), EPS, excess)

    def _log_ratio(self, problems: Problems, unknown: Float64Array) -> Float64Array:
        """Returns the log-ratio of a token that is not at saturation."""
        move = move_by_unknown(problems, unknown)
        growth = np.where(
            move.gained < MAX_U, np.log1p(move.gained), problems.log_odds + np.log(move.lost)
        )
        upper = np.minimum(growth, np.nextafter(-problems.logp, 0.0))
        lower = np.maximum(-np.exp(unknown), -LOG_REACH)
        return np.where(problems.upper, upper, lower)

    def move(
        self, problems: Problems, delta: Float64Array, log_ratio: Float64Array, inwards: bool
    ) -> Float64Array:
        """Moves each log-ratio until D there is at most delta (``inwards``), or above delta."""
        bound: Float64Array = log_ratio.copy()
        end = np.where(problems.upper, np.nextafter(-problems.logp, np.inf), -np.inf)
        end = 0.0 * bound if inwards else end
        if inwards:
            # Slack for `contains`, because a function may round differently in another array.
            delta = delta * (1.0 - 2.0 * EPS)
        todo = np.arange(bound.size)
        for move in range(MAX_MOVES):
            done = self.is_inside(problems, delta, bound[todo]) == inwards
            if done.all():
                return bound
            problems, delta, todo = problems.take(~done), delta[~done], todo[~done]
            share = 4.0**move * EPS
            moved = bound[todo] * (1.0 - share if inwards else 1.0 + share)
            moved = np.where(moved == bound[todo], np.nextafter(bound[todo], end[todo]), moved)
            within = np.minimum(np.abs(moved), np.abs(end[todo]))
            bound[todo] = moved if inwards else np.copysign(within, moved)
        bound[todo] = end[todo]
        return bound

    def is_inside(
        self, problems: Problems, delta: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        """Returns True if D is at most delta, for a log-ratio on the side of each problem."""
        d = self.divergence(problems, move_by_log_ratio(problems, log_ratio))
        return np.asarray(d <= delta)

    def divergence(self, problems: Problems, move: Move) -> Float64Array:
        """Returns D, ``w f(1 - lost) + g f(1 + gained)``, by one call of the callable."""
        problems.tally.add()
        grown = 1.0 + move.gained
        value = self._f.value(
            np.concatenate((move.shrunk, grown)), np.concatenate((-move.lost, move.gained))
        )
        of_shrunk, of_grown = value[: grown.size], value[grown.size :]
        part = of_grown * problems.half_growing * problems.half_growing
        beyond = grown > MAX_U
        if beyond.any():
            # g (u-1) f'(inf), where g (u-1) is the probability that the other outcome loses.
            slope = self._f.normal_slope
            moved = (problems.shrinking * move.lost)[beyond]
            part[beyond] = slope * moved if slope < math.inf else math.inf
        return of_shrunk * problems.half_shrinking * problems.half_shrinking + part

    def log_slope(self, logp: Float64Array, log_bound: Float64Array) -> Float64Array:
        """Returns ``d log_bound / d logp``, not yet limited to its range."""
        slope = np.where(np.isnan(logp), np.nan, 0.0)
        at_rest = (log_bound == 0.0) | (np.abs(log_bound) >= LOG_REACH)
        # An upper bound beyond the reach of f moves as a saturated one does.
        saturated = (log_bound >= -logp) | (log_bound > LOG_REACH * (1.0 + EPS))
        slope[(logp < 0.0) & saturated & (logp > -np.inf)] = -1.0
        solved = (logp < 0.0) & ~at_rest & ~saturated & (logp > -np.inf)
        if not solved.any():
            return slope
        problems = self.problems_of(logp[solved], log_bound[solved] > 0.0)
        move = move_by_log_ratio(problems, log_bound[solved])
        excess_token = np.where(problems.upper, move.gained, -move.lost)
        excess_others = np.where(problems.upper, -move.lost, move.gained)
        token = np.where(problems.upper, 1.0 + move.gained, move.shrunk)
        others = np.where(problems.upper, move.shrunk, 1.0 + move.gained)
        u = np.concatenate((token, others))
        excess = np.concatenate((excess_token, excess_others))
        value, derivative = self._f.value(u, excess), self._f.derivative(u, excess)
        count = token.size
        slope_others = derivative[count:]
        bregman = value[:count] - value[count:] - slope_others * (excess_token - excess_others)
        result = -bregman / (token * (derivative[:count] - slope_others))
        slope[solved] = np.where(np.isfinite(result), result, 0.0)
        return slope
