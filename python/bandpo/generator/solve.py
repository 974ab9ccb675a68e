"""Bounds of an f that is given as a Python callable over arrays.

One problem serves both sides, as in ``rust/band/``: of the two outcomes {this token, everything
else} one, of probability ``w``, shrinks by a factor ``e^-m``; the other, of probability
``g = 1 - w``, grows to ``1 + (w/g) (1 - e^-m)`` times its size. For the lower bound the token
shrinks, for the upper bound everything else does. The unknown is ``s = ln m``, because
``ln(D/delta)`` against it is nearly a straight line. All elements of a batch are solved together:
an iteration calls the function once, with one array.

A callable gives float64 values ``f(u)`` at normal float64 numbers, and not ``f(1+y)``. The
docstring of `CallableGenerator` states what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError
from bandpo.generator.function import Function, checked_limit
from bandpo.generator.limits import (
    BLOCK,
    EPS,
    FARTHEST,
    LARGEST,
    LOG_REACH,
    MAX_EXPANSIONS,
    MAX_INTERPOLATIONS,
    MAX_ITERATIONS,
    MAX_MOVES,
    STEEPEST,
)
from bandpo.generator.problem import Move, Problems, move_by_log_ratio, move_by_unknown


class CallableGenerator:
    """The f of an f-divergence, given as a callable; bounds and membership of its bands.

    On construction ``fn`` is checked on 4001 points ``u = e^t``, ``|t| <= 300``, and at a few
    farther out, and refused if it is not the f of a divergence: it must be finite, convex and 0 at
    ``u = 1``. Kinks and flat parts are allowed. A dip of f'' among neighbours gets a finer grid,
    because a concave kink may hide between two points behind the curvature around it. Not detected
    is a kink that makes f' fall by less than 1 % of what it gains between two
    points (6e-5 apart around 1, 1.3 % of u at 10), or less than the growth of f'' adds to that, a
    smooth dent that lies between two points, and what rounding errors of ``fn`` would hide.

    ``f(u) + c (u-1)`` has the same divergence for every c. The c that puts the min of f at 1 is
    used within. If f is smooth around 1, a polynomial fitted to ``fn`` takes its place
    there, so that the rounding errors of ``fn``, which are absolute ones, do not swamp a small f.

    Consequences of float64 values of f:

    - A bound is off by a few rounding errors of D times its condition number. For
      ``delta >= 1e-5`` that is less than 1e-10 of the log bound, and mostly less than 1e-13. The
      exception is the lower side next to saturation, where D hardly depends on the ratio: below a
      ratio of 1e-4 the error is about 1e-15/ratio. An f that is written so that large terms cancel
      loses what they lose.
    - A bound lies inside by the values of ``fn``: `contains` is true there.
    - ``fn`` gets normal float64 numbers only. Where the bound's ratio, or that of everything
      else, is none, or ``fn`` overflows there, the bound is replaced by a limit on its inner side,
      the farthest ratio within reach of ``fn``: ``log_lower`` is no less than -708.39
      where it is not -inf by saturation, and ``log_upper`` no more than 708.39 where ``f'(inf)`` is
      infinite. So ``log_lower`` is not to be used to compare tokens below that.

    Args:
        fn: Maps a float64 array of ``u > 0``, shape [n], to ``f(u)``, float64, shape [n], element
            by element. The array that it is handed cannot be written to. ``f`` may overflow to inf
            far out where it grows that fast, as ``u**4`` does.
        at_zero: The limit of f at 0, maybe inf. Left out, it is found numerically.
        slope_at_infinity: The limit of ``f(u)/u`` at infinity, maybe inf. Left out, it is found
            numerically.

    Raises:
        InvalidTypeError: If ``fn`` is not callable or does not return real numbers in double
            precision, or a limit is not a real number.
        InvalidValueError: If ``fn`` raises, returns another shape, is not elementwise, is not
            finite, not 0 at 1, not convex or linear, if a limit cannot be decided numerically and
            was not given, or if one was given that contradicts ``fn``.
    """

    def __init__(
        self,
        fn: Callable[[Float64Array], Float64Array],
        *,
        at_zero: float | None = None,
        slope_at_infinity: float | None = None,
    ) -> None:
        if not callable(fn):
            raise InvalidTypeError(f"f must be a callable over arrays, got {type(fn).__name__}")
        self.fn = fn
        self._given = (
            checked_limit("at_zero", at_zero),
            checked_limit("slope_at_infinity", slope_at_infinity),
        )
        self._f = Function(fn, *self._given)

    @property
    def at_zero(self) -> float:
        """The limit of f at 0, given or found; maybe inf."""
        return self._f.at_zero

    @property
    def slope_at_infinity(self) -> float:
        """The limit of ``f(u)/u`` at infinity, given or found; maybe inf."""
        return self._f.slope_at_infinity

    @property
    def curvature(self) -> float | None:
        """f''(1); None where ``fn`` is not smooth at 1, or flat."""
        return self._f.curvature

    def log_bounds(
        self,
        delta_low: float | Float64Array,
        delta_high: float | Float64Array,
        logp: Float64Array,
    ) -> tuple[Float64Array, Float64Array]:
        """Returns ``(log_lower, log_upper)`` of the band ``D_f <= delta``.

        ``fn`` is called at most `MAX_CALLS` times for every `BLOCK` tokens, with one array each.

        Args:
            delta_low: Radius of the lower side, finite and above 0; float or float64 [n].
            delta_high: Radius of the upper side, likewise.
            logp: Old log-probabilities, float64 [n]. Above 0 is read as 0; NaN gives NaN.

        Returns:
            Two float64 arrays [n]; see the class for where they are limits instead of bounds.
        """
        log_lower, log_upper = np.empty_like(logp), np.empty_like(logp)
        low = np.broadcast_to(np.asarray(delta_low, dtype=np.float64), logp.shape)
        high = np.broadcast_to(np.asarray(delta_high, dtype=np.float64), logp.shape)
        with np.errstate(all="ignore"):
            for start in range(0, logp.size, BLOCK):
                block = slice(start, start + BLOCK)
                log_lower[block], log_upper[block] = self._block_bounds(
                    low[block], high[block], logp[block]
                )
        return log_lower, log_upper

    def contains(
        self,
        delta_low: float | Float64Array,
        delta_high: float | Float64Array,
        logp: Float64Array,
        log_ratio: Float64Array,
    ) -> BoolArray:
        """Returns whether ``D_f <= delta`` at each log-ratio, evaluated in double precision.

        True at every bound that `log_bounds` returns; false outside the simplex and for NaN. Where
        the ratio is no normal float64, ``f(0)`` and ``f'(inf)`` stand for f, which is on the inner
        side. For ``logp`` of 0 the band is a limit in p.

        Args:
            delta_low: Radius for log-ratios below 0, finite and above 0; float or float64 [n].
            delta_high: Radius for the others, likewise.
            logp: Old log-probabilities, float64 [n].
            log_ratio: Log-ratios new/old, float64 [n].

        Returns:
            A bool array [n].
        """
        delta = np.where(log_ratio < 0.0, delta_low, delta_high)
        tokens = np.minimum(logp, 0.0)
        # A ratio of 1 has no divergence, whatever the rounding; and a token of no probability has
        # none at any ratio.
        inside = np.asarray((log_ratio == 0.0) & ~np.isnan(logp))
        inside |= (logp == -np.inf) & ~np.isnan(log_ratio)
        solvable = ~inside & (tokens > -np.inf) & (log_ratio <= -tokens)
        if solvable.any():
            with np.errstate(all="ignore"):
                problems = self._problems(tokens[solvable], log_ratio[solvable] > 0.0)
                inside[solvable] = self._is_inside(problems, delta[solvable], log_ratio[solvable])
        return inside

    def diagnose(
        self, delta: float | Float64Array, logp: Float64Array, upper: bool
    ) -> tuple[Float64Array, Float64Array, NDArray[np.uint8], NDArray[np.uint32]]:
        """Returns the bounds of one side with how each was found.

        Args:
            delta: Radius of that side, finite and above 0; float or float64 [n].
            logp: Old log-probabilities, float64 [n].
            upper: Whether that side is the upper one.

        Returns:
            The log bounds, a log-ratio outside next to each (the bound itself where there is none),
            the `bandpo.region.Status` of each, and how often D was evaluated; arrays [n].
        """
        bound, solved = self._limits(logp, upper)
        outside, evaluations = bound.copy(), np.zeros(logp.size, dtype=np.uint32)
        status = np.select([np.isnan(logp), logp > 0.0, ~solved | (logp == 0.0)], [4, 3, 2], 0)
        places, radii = np.flatnonzero(solved), np.broadcast_to(np.asarray(delta), logp.shape)
        with np.errstate(all="ignore"):
            for start in range(0, places.size, BLOCK):
                block = places[start : start + BLOCK]
                tokens = np.minimum(logp[block], 0.0)
                problems = self._problems(tokens, np.full(block.size, upper))
                found = self._solve(problems, radii[block])
                free = found == (-tokens if upper else -np.inf)
                # The farthest ratio within reach of fn.
                unasked = np.abs(found) >= LOG_REACH * (1.0 - 4.0 * EPS)
                unasked &= ~free & (self.slope_at_infinity == math.inf if upper else True)
                status[block] = np.select([status[block] > 0, free, unasked], [status[block], 1, 2])
                bound[block] = outside[block] = found
                edged = np.flatnonzero(status[block] == 0)
                outside[block[edged]] = self._move(
                    problems.take(edged), radii[block[edged]], found[edged], inwards=False
                )
                evaluations[block] = problems.tally.counts
        return bound, outside, status.astype(np.uint8), evaluations

    def divergences(self, logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
        """Returns ``D_f`` at each log-ratio, in double precision.

        Args:
            logp: Old log-probabilities, float64 [n], finite and below 0.
            log_ratio: Log-ratios new/old, float64 [n].

        Returns:
            A float64 array [n]; inf outside the simplex.
        """
        divergences = np.where(log_ratio <= -logp, 0.0, np.inf)
        solvable = (log_ratio <= -logp) & (log_ratio != 0.0)
        if solvable.any():
            with np.errstate(all="ignore"):
                problems = self._problems(logp[solvable], log_ratio[solvable] > 0.0)
                move = move_by_log_ratio(problems, log_ratio[solvable])
                divergences[solvable] = self._divergence(problems, move)
        return divergences

    def bounds_with_slopes(
        self,
        delta_low: float | Float64Array,
        delta_high: float | Float64Array,
        logp: Float64Array,
    ) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Returns the log bounds and their derivatives by ``logp``.

        The derivative is ``-B(r, c) / (r (f'(r) - f'(c)))`` with the Bregman divergence
        ``B(r, c) = f(r) - f(c) - f'(c) (r - c)``, by implicit differentiation of
        ``D(p, r) = delta``; f' comes from differences of f.

        Args:
            delta_low: As for `log_bounds`.
            delta_high: As for `log_bounds`.
            logp: Old log-probabilities, float64 [n].

        Returns:
            ``log_lower``, ``log_upper``, ``d log_lower / d logp`` (at least 0) and
            ``d log_upper / d logp`` (in [-1, 0]), float64 [n] each. The derivative is -1 where the
            upper side is saturated, 0 where the lower side is, where a bound is a constant limit,
            and for a ``logp`` of at least 0 or of -inf.
        """
        log_lower, log_upper = self.log_bounds(delta_low, delta_high, logp)
        with np.errstate(all="ignore"):
            lower_slope = self._log_slope(logp, log_lower)
            upper_slope = self._log_slope(logp, log_upper)
        return log_lower, log_upper, np.maximum(lower_slope, 0.0), np.clip(upper_slope, -1.0, 0.0)

    def _block_bounds(
        self, delta_low: Float64Array, delta_high: Float64Array, logp: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        log_lower, of_lower = self._limits(logp, upper=False)
        log_upper, of_upper = self._limits(logp, upper=True)
        tokens = np.concatenate((np.minimum(logp[of_lower], 0.0), logp[of_upper]))
        delta = np.concatenate((delta_low[of_lower], delta_high[of_upper]))
        if tokens.size:
            count = int(np.count_nonzero(of_lower))
            bounds = self._solve(self._problems(tokens, np.arange(tokens.size) >= count), delta)
            log_lower[of_lower], log_upper[of_upper] = bounds[:count], bounds[count:]
        return log_lower, log_upper

    def _limits(self, logp: Float64Array, upper: bool) -> tuple[Float64Array, BoolArray]:
        """The bounds that are limits in p, and which ones are to be solved for instead."""
        solved = (logp < 0.0) & (logp > -np.inf)
        certain = logp >= 0.0
        unlikely = np.where(np.isnan(logp), np.nan, np.inf if upper else -np.inf)
        if not upper and self.slope_at_infinity < math.inf:
            solved |= certain  # elsewhere the limit p -> 1 of the lower side is 0
        return np.where(certain, 0.0, unlikely), solved

    def _problems(self, logp: Float64Array, upper: BoolArray) -> Problems:
        return Problems.of(logp, upper, self.slope_at_infinity == math.inf)

    def _solve(self, problems: Problems, delta: Float64Array) -> Float64Array:
        """The log bound of each problem."""
        bound: Float64Array = np.where(problems.upper, -problems.logp, -np.inf)
        todo = np.arange(delta.size)
        if self.at_zero < math.inf:
            todo = np.flatnonzero(~self._is_inside(problems, delta, bound))
            problems, delta = problems.take(todo), delta[todo]
        if todo.size:
            rough = self._log_ratio(problems, self._root(problems, delta))
            bound[todo] = self._move(problems, delta, rough, inwards=True)
        return bound

    def _root(self, problems: Problems, delta: Float64Array) -> Float64Array:
        """Returns the max unknown found with ``D <= delta``, by Chandrupatla's method."""
        farthest = self._farthest(problems)
        root: Float64Array = farthest.copy()
        at_farthest = self._log_excess(problems, delta, farthest)
        todo = np.flatnonzero(at_farthest > 0.0)
        if todo.size == 0:
            return root
        problems, delta = problems.take(todo), delta[todo]
        low, high, at_low, at_high = self._bracket(
            problems, delta, farthest[todo], at_farthest[todo]
        )
        # T. R. Chandrupatla, Adv. Eng. Softw. 28 (1997) 145-149: x1 is the newest point, the root
        # is between it and x2, x3 is the one before; inverse quadratic interpolation where the
        # three points promise that it is safe, halving elsewhere.
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
        farthest: Float64Array,
        at_farthest: Float64Array,
    ) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Ends of a bracket of the root, inside and outside, with ``ln(D/delta)`` there."""
        low, at_low = np.full_like(delta, -np.inf), np.full_like(delta, -STEEPEST)
        high, at_high = farthest.copy(), at_farthest.copy()
        # Around 1, D is about w/(2g) f''(1) m^2.
        x = 0.5 * (np.log(2.0 * delta / self._f.rough_curvature) - problems.log_odds)
        x = np.where(problems.by_growth, LOG_REACH, np.maximum(x, -40.0))
        x = np.minimum(x, farthest - 1.0)
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
            # Once the search runs up to the far end, that end is the bracket's.
            active = (inside == rising) & (x < farthest[todo])
            if not active.any():
                break
            problems, delta, todo = problems.take(active), delta[active], todo[active]
            x, rising, step = x[active], rising[active], 2.0 * step[active]
        # A D of rounding errors alone may be too large at every m; the bound is then next to 1.
        unseen = low == -np.inf
        low[unseen] = high[unseen] - 1.0
        return low, high, at_low, at_high

    def _farthest(self, problems: Problems) -> Float64Array:
        """Returns the max unknown at which both u are normal float64 numbers."""
        farthest = np.full_like(problems.logp, FARTHEST)
        if self.slope_at_infinity == math.inf:
            log_lost = LOG_REACH - problems.log_odds
            log_m = np.where(log_lost < -37.0, log_lost, np.log(-np.log1p(-np.exp(log_lost))))
            far = log_lost < 0.0
            farthest[far] = np.minimum(log_m[far], FARTHEST)
            farthest[problems.by_growth] = LOG_REACH
        return farthest

    def _log_excess(
        self, problems: Problems, delta: Float64Array, unknown: Float64Array
    ) -> Float64Array:
        """``ln(D/delta)``, cut off at +-`STEEPEST`; what cannot be evaluated counts as outside."""
        d = self._divergence(problems, move_by_unknown(problems, unknown))
        excess = np.clip(np.log(np.maximum(d, 0.0) / delta), -STEEPEST, STEEPEST)
        excess[np.isnan(excess)] = STEEPEST
        # ln rounds a D just above delta to 0.
        return np.where((excess <= 0.0) & (d > delta), EPS, excess)

    def _log_ratio(self, problems: Problems, unknown: Float64Array) -> Float64Array:
        """The log-ratio of the token, which is not at saturation."""
        move = move_by_unknown(problems, unknown)
        growth = np.where(
            move.gained < LARGEST, np.log1p(move.gained), problems.log_odds + np.log(move.lost)
        )
        upper = np.minimum(growth, np.nextafter(-problems.logp, 0.0))
        lower = np.maximum(-np.exp(unknown), -LOG_REACH)
        return np.where(problems.upper, upper, lower)

    def _move(
        self, problems: Problems, delta: Float64Array, log_ratio: Float64Array, inwards: bool
    ) -> Float64Array:
        """The log-ratios, each moved until D evaluated at it is at most delta, or above it."""
        bound: Float64Array = log_ratio.copy()
        end = np.where(problems.upper, np.nextafter(-problems.logp, np.inf), -np.inf)
        end = 0.0 * bound if inwards else end
        if inwards:
            # `contains` must agree, though a function may round differently in another array.
            delta = delta * (1.0 - 2.0 * EPS)
        todo = np.arange(bound.size)
        for move in range(MAX_MOVES):
            done = self._is_inside(problems, delta, bound[todo]) == inwards
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

    def _is_inside(
        self, problems: Problems, delta: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        """Whether D is at most delta, at log-ratios on the side of each problem."""
        d = self._divergence(problems, move_by_log_ratio(problems, log_ratio))
        return np.asarray(d <= delta)

    def _divergence(self, problems: Problems, move: Move) -> Float64Array:
        """``w f(1 - lost) + g f(1 + gained)``; one call of the callable."""
        problems.tally.add()
        grown = 1.0 + move.gained
        value = self._f.value(
            np.concatenate((move.shrunk, grown)), np.concatenate((-move.lost, move.gained))
        )
        of_shrunk, of_grown = value[: grown.size], value[grown.size :]
        part = of_grown * problems.half_growing * problems.half_growing
        beyond = grown > LARGEST
        if beyond.any():
            # g (u-1) f'(inf), in which g (u-1) is the probability that the other one loses.
            slope = self._f.normal_slope
            moved = (problems.shrinking * move.lost)[beyond]
            part[beyond] = slope * moved if slope < math.inf else math.inf
        return of_shrunk * problems.half_shrinking * problems.half_shrinking + part

    def _log_slope(self, logp: Float64Array, log_bound: Float64Array) -> Float64Array:
        """``d log_bound / d logp``."""
        slope = np.where(np.isnan(logp), np.nan, 0.0)
        at_rest = (log_bound == 0.0) | (np.abs(log_bound) >= LOG_REACH)
        # Beyond the reach of f, an upper bound below saturation moves as saturation does.
        saturated = (log_bound >= -logp) | (log_bound > LOG_REACH * (1.0 + EPS))
        slope[(logp < 0.0) & saturated & (logp > -np.inf)] = -1.0
        solved = (logp < 0.0) & ~at_rest & ~saturated & (logp > -np.inf)
        if not solved.any():
            return slope
        problems = self._problems(logp[solved], log_bound[solved] > 0.0)
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

    def __repr__(self) -> str:
        names = ("at_zero", "slope_at_infinity")
        limits = [
            f", {name}={value!r}"
            for name, value in zip(names, self._given, strict=True)
            if value is not None
        ]
        return f"CallableGenerator({_name(self.fn)}{''.join(limits)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallableGenerator):
            return NotImplemented
        return bool(self.fn == other.fn) and self._given == other._given

    def __hash__(self) -> int:
        return hash((self.fn, self._given))


def _name(fn: object) -> str:
    return str(getattr(fn, "__qualname__", None) or repr(fn))
