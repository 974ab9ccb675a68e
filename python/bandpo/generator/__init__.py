"""The f of an f-divergence as a Python callable over arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError
from bandpo.generator.function import Function, checked_limit
from bandpo.generator.limits import BLOCK, EPS, LOG_REACH, MAX_CALLS
from bandpo.generator.problem import move_by_log_ratio
from bandpo.generator.solve import Equation

__all__ = ["BLOCK", "LOG_REACH", "MAX_CALLS", "CallableGenerator", "checked_limit"]


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
        self._equation = Equation(self._f)

    @property
    def core(self) -> None:
        """None, because Rust cannot call ``fn``; see `bandpo.divergence.Solver`."""
        return None

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
                problems = self._equation.problems_of(tokens[solvable], log_ratio[solvable] > 0.0)
                inside[solvable] = self._equation.is_inside(
                    problems, delta[solvable], log_ratio[solvable]
                )
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
                problems = self._equation.problems_of(tokens, np.full(block.size, upper))
                found = self._equation.solve(problems, radii[block])
                free = found == (-tokens if upper else -np.inf)
                # The farthest ratio within reach of fn.
                unasked = np.abs(found) >= LOG_REACH * (1.0 - 4.0 * EPS)
                unasked &= ~free & (self.slope_at_infinity == math.inf if upper else True)
                status[block] = np.select([status[block] > 0, free, unasked], [status[block], 1, 2])
                bound[block] = outside[block] = found
                edged = np.flatnonzero(status[block] == 0)
                outside[block[edged]] = self._equation.move(
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
                problems = self._equation.problems_of(logp[solvable], log_ratio[solvable] > 0.0)
                move = move_by_log_ratio(problems, log_ratio[solvable])
                divergences[solvable] = self._equation.divergence(problems, move)
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
            lower_slope = self._equation.log_slope(logp, log_lower)
            upper_slope = self._equation.log_slope(logp, log_upper)
        return log_lower, log_upper, np.maximum(lower_slope, 0.0), np.clip(upper_slope, -1.0, 0.0)

    def curve(
        self, delta_low: float, delta_high: float, upper: bool
    ) -> Callable[[bool, Float64Array], tuple[Float64Array, Float64Array]]:
        """Returns a function of (is upper, logp) to log bounds and slopes; it serves both sides."""

        def sample(is_upper: bool, logp: Float64Array) -> tuple[Float64Array, Float64Array]:
            log_lower, log_upper, slope_lower, slope_upper = self.bounds_with_slopes(
                delta_low, delta_high, logp
            )
            return (log_upper, slope_upper) if is_upper else (log_lower, slope_lower)

        return sample

    def _block_bounds(
        self, delta_low: Float64Array, delta_high: Float64Array, logp: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        log_lower, of_lower = self._limits(logp, upper=False)
        log_upper, of_upper = self._limits(logp, upper=True)
        tokens = np.concatenate((np.minimum(logp[of_lower], 0.0), logp[of_upper]))
        delta = np.concatenate((delta_low[of_lower], delta_high[of_upper]))
        if tokens.size:
            count = int(np.count_nonzero(of_lower))
            bounds = self._equation.solve(
                self._equation.problems_of(tokens, np.arange(tokens.size) >= count), delta
            )
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
