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
from bandpo.parts import in_parts, slices

__all__ = ["BLOCK", "LOG_REACH", "MAX_CALLS", "CallableGenerator", "checked_limit"]


class CallableGenerator:
    """The f of an f-divergence, given as a callable; bounds and membership of its bands.

    The constructor evaluates ``fn`` at 4001 points ``u = e^t``, ``|t| <= 300``, and a few beyond.
    It refuses an ``fn`` that is not finite, not convex or not 0 at ``u = 1``. Kinks and flat parts
    are allowed. A dip of f'' below its course gets a finer grid, because the curvature around a
    concave kink may hide it between two points. Three faults are not detected:

    - a kink at which f' falls by less than 0.5 % of its gain between two points (6e-5 apart around
      1, 1.3 % of u at 10);
    - a smooth dent between two points;
    - anything below the rounding errors of ``fn``.

    ``f(u) + c (u-1)`` has the same divergence for every c; the solver takes the c that puts the min
    of f at 1. If f is smooth around 1, a polynomial fitted to ``fn`` stands for it there, because
    the rounding errors of ``fn`` are absolute and would swamp a small f.

    Consequences of float64 values of f:

    - A bound is off by a few rounding errors of D times its condition number. For
      ``delta >= 1e-5`` that is less than 1e-10 of the log bound, and mostly less than 1e-13. Next
      to saturation of the lower side the error is larger, because D hardly depends on the ratio:
      below a ratio of 1e-4 it is about 1e-15/ratio. An f whose large terms cancel loses as many
      digits as they do.
    - A bound lies inside by the values of ``fn``: `contains` is true there.
    - ``fn`` gets normal float64 numbers only. If the ratio at a bound, or that of everything else,
      is not one, or if ``fn`` overflows there, the bound is the last ratio on its inner side at
      which ``fn`` can be evaluated. So ``log_lower`` is at least -708.39 unless saturation makes it
      -inf, and ``log_upper`` at most 708.39 if ``f'(inf)`` is infinite. Below that, ``log_lower``
      does not order tokens.

    Args:
        fn: Maps a float64 array of ``u > 0``, shape [n], to ``f(u)``, float64, shape [n], element
            by element. Its argument is read-only. It may overflow to inf if f grows as fast as
            ``u**4`` does.
        at_zero: The limit of f at 0, inf allowed; found numerically if left out.
        slope_at_infinity: The limit of ``f(u)/u`` at infinity, inf allowed; likewise.

    Raises:
        InvalidTypeError: If ``fn`` is not callable or does not return real numbers in double
            precision, or a limit is not a real number.
        InvalidValueError: If ``fn`` raises, returns another shape, is not elementwise, is not
            finite, not 0 at 1, not convex, or linear; if a limit is not given and cannot be found;
            or if a given one contradicts ``fn``.
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
        """The limit of f at 0, given or found; inf allowed."""
        return self._f.at_zero

    @property
    def slope_at_infinity(self) -> float:
        """The limit of ``f(u)/u`` at infinity, given or found; inf allowed."""
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
            Two float64 arrays [n]; the class states which bounds are limits of ``fn`` instead.
        """
        log_lower, log_upper = np.empty_like(logp), np.empty_like(logp)
        low = np.broadcast_to(np.asarray(delta_low, dtype=np.float64), logp.shape)
        high = np.broadcast_to(np.asarray(delta_high, dtype=np.float64), logp.shape)
        with np.errstate(all="ignore"):
            for block in slices(logp.size, BLOCK):
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

        True at every bound that `log_bounds` returns; false outside the simplex and for NaN. At a
        ratio that is no normal float64, ``f(0)`` and ``f'(inf)`` stand for f, on the inner side.
        For ``logp`` of 0 the band is a limit in p.

        Args:
            delta_low: Radius for log-ratios below 0, finite and above 0; float or float64 [n].
            delta_high: Radius for the others, likewise.
            logp: Old log-probabilities, float64 [n].
            log_ratio: Log-ratios new/old, float64 [n].

        Returns:
            A bool array [n].
        """
        delta = np.where(log_ratio < 0.0, delta_low, delta_high)
        tokens = (delta, logp, log_ratio)
        return in_parts(self._block_contains, *tokens, dtype=np.bool_, size=BLOCK)

    def _block_contains(
        self, delta: Float64Array, logp: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        tokens = np.minimum(logp, 0.0)
        # Exact, whatever the rounding: a ratio of 1 has no divergence, and a token of probability 0
        # has none at any ratio.
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
        """Returns the bounds of one side with the origin of each.

        Args:
            delta: Radius of that side, finite and above 0; float or float64 [n].
            logp: Old log-probabilities, float64 [n].
            upper: True for the upper side.

        Returns:
            The log bounds; a log-ratio outside next to each, or the bound itself if nothing is
            outside; the `bandpo.region.Status` of each; and the evaluations of D. Arrays [n].
        """
        bound, solved = self._limits(logp, upper)
        outside, evaluations = bound.copy(), np.zeros(logp.size, dtype=np.uint32)
        status = np.select([np.isnan(logp), logp > 0.0, ~solved | (logp == 0.0)], [4, 3, 2], 0)
        places, radii = np.flatnonzero(solved), np.broadcast_to(np.asarray(delta), logp.shape)
        with np.errstate(all="ignore"):
            for part in slices(places.size, BLOCK):
                block = places[part]
                tokens = np.minimum(logp[block], 0.0)
                problems = self._equation.problems_of(tokens, np.full(block.size, upper))
                found = self._equation.solve(problems, radii[block])
                saturated = found == (-tokens if upper else -np.inf)
                at_reach = np.abs(found) >= LOG_REACH * (1.0 - 4.0 * EPS)
                at_reach &= ~saturated & (self.slope_at_infinity == math.inf if upper else True)
                status[block] = np.select(
                    [status[block] > 0, saturated, at_reach], [status[block], 1, 2]
                )
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
        return in_parts(self._block_divergences, logp, log_ratio, size=BLOCK)

    def _block_divergences(self, logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
        divergences: Float64Array = np.where(log_ratio <= -logp, 0.0, np.inf)
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
            ``d log_upper / d logp`` (in [-1, 0]), float64 [n] each. The derivative is -1 at a
            saturated upper bound. It is 0 at a saturated lower bound, at a constant limit, and for
            a ``logp`` of at least 0 or of -inf.
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
        """Returns the bounds that are limits in p, and a mask of those to solve for instead."""
        solved = (logp < 0.0) & (logp > -np.inf)
        certain = logp >= 0.0
        unlikely = np.where(np.isnan(logp), np.nan, np.inf if upper else -np.inf)
        if not upper and self.slope_at_infinity < math.inf:
            solved |= certain  # with an infinite slope the limit p -> 1 of the lower side is 0
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
