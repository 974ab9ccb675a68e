"""The f of an f-divergence as a Python callable over arrays: its checks and its bounds.

One problem serves both sides, as in ``rust/band/mod.rs``: of the two outcomes {this token, everything
else} one, of probability ``w``, shrinks by a factor ``e^-m``; the other, of probability
``g = 1 - w``, grows to ``1 + (w/g) (1 - e^-m)`` times its size. For the lower bound the token
shrinks, for the upper bound everything else does. The unknown is ``s = ln m``, against which
``ln(D/delta)`` is nearly a straight line, and every element of a batch is solved at the same time:
an iteration asks the callable once, for one array.

A callable is only seen through its float64 values, at normal float64 numbers, and is asked for
``f(u)``, not for ``f(1+y)``. `CallableGenerator` says what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo.check import real_number
from bandpo.error import InvalidTypeError, InvalidValueError

Float64Array: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

_EPS = float(np.finfo(np.float64).eps)

LOG_REACH = 708.39
"""How far from 1 the callable is asked, in ``|ln u|``: as far as float64 numbers are normal."""

BLOCK = 2**18
"""Tokens that are solved at the same time; it bounds the memory of a call."""

_SMALLEST = math.exp(-LOG_REACH - 0.001)
_LARGEST = math.exp(LOG_REACH + 0.001)

# ln m of an outcome that shrinks as far as the callable can be asked.
_FARTHEST = math.log(LOG_REACH)

# Odds from which on the growth of the other outcome is formed from logarithms.
_FAR_ODDS = 650.0

# ln(D/delta) is cut off here, so that a D of 0 or inf can be interpolated.
_STEEPEST = 700.0

# The solver's loops; 35 iterations interpolate, the others halve a bracket that is at most 1500
# wide. A bound is moved inwards by factors that grow to 1.
_MOST_EXPANSIONS = 14
_MOST_INTERPOLATIONS = 35
_MOST_ITERATIONS = 100
_MOST_MOVES = 27

MOST_CALLS = 2 + _MOST_EXPANSIONS + _MOST_ITERATIONS + _MOST_MOVES
"""Most calls of the callable for the bounds of a block of `BLOCK` tokens, whatever the arguments.

Two are for saturation and for the far end. The mean over tokens is about 8, but the slowest token
of 100 000 takes 15 to 80.
"""

# Where f is looked at once, on construction: |ln u| <= _GRID_REACH, 6e-5 apart around u = 1 and
# 1.6 apart at the ends. The tail beyond _GRID_REACH is used for limits only.
_GRID_REACH = 300.0
_GRID_HALF = 2000

# The rounding errors, in units of eps and of the terms of f, that are no violation.
_ROUNDING = 32.0

# Where f'' is less than this part of what it is two points away on both sides, finer grids are
# laid: each of so many points over 4 intervals, at so many of the deepest dips.
_DIP = 0.99
_FINER = 24
_MOST_SUSPECTS = 64
_MOST_REFINEMENTS = 9

# f has exploded where it is this many times what it is within 0.001 of u = 1.
_EXPLODED = 1e13

# A value next to an overflow is at least this many times f around 1, or 1e285; else f has an edge
# there.
_HUGE = 1e150

# A slope or a value that grew this far, in units of f around 1, has no finite limit.
_UNBOUNDED = 1e50

# Relative steps of the two difference formulas for f': of order 2 and of order 4.
_SHORT_STEP = 2.0**-17
_LONG_STEP = 2.0**-8

# What a step is relative to, at least.
_SHORTEST_STEP = 2.0**-46

# A polynomial stands for f around 1: its order, the |u-1| it is tried for, and how far f may be off
# it, in units of f around 1. Nodes: Chebyshev's, and towards 1 for what is to be seen there only.
_SERIES_ORDER = 12
_SERIES_REACHES = (2.0**-4, 2.0**-6, 2.0**-8)
_SERIES_NOISE = 1e-12
_SERIES_NODES = np.sort(
    np.concatenate(
        [
            np.sin(np.linspace(-0.5 * np.pi, 0.5 * np.pi, 601)),
            *(side * np.logspace(-8.0, -1.0, 100) for side in (-1.0, 1.0)),
        ]
    )
)


class _Tally:
    """Evaluations of D of each problem, also of those that are taken out of a batch."""

    def __init__(self, counts: NDArray[np.uint32], problems: NDArray[np.intp]) -> None:
        self.counts = counts
        self._problems = problems

    def __getitem__(self, chosen: BoolArray | NDArray[np.intp]) -> _Tally:
        return _Tally(self.counts, self._problems[chosen])

    def add(self) -> None:
        self.counts[self._problems] += 1


class _Problems(NamedTuple):
    """Two-outcome problems, one an element; arrays of one length."""

    logp: Float64Array  # of the token, at most 0
    upper: BoolArray  # whether everything else shrinks, and not the token
    shrinking: Float64Array
    growing: Float64Array
    # Square roots of the two: w f(u) is formed in two steps, so that a probability below the
    # smallest float still meets a large f(u).
    half_shrinking: Float64Array
    half_growing: Float64Array
    odds: Float64Array  # shrinking / growing, which may overflow
    log_odds: Float64Array
    # Whether the unknown is not ln m but the ln of the growth, which alone is a float here: the
    # shrinking outcome hardly changes at any growth that the callable can be asked about.
    by_growth: BoolArray
    tally: _Tally

    @classmethod
    def of(cls, logp: Float64Array, upper: BoolArray, steep: bool) -> _Problems:
        """The problems of tokens; ``steep`` says that f'(inf) is infinite."""
        token, others = np.exp(logp), -np.expm1(logp)
        half_token, half_others = np.exp(0.5 * logp), np.sqrt(others)
        shrinking = np.where(upper, others, token)
        growing = np.where(upper, token, others)
        log_others = np.where(token < 0.5, np.log1p(-token), np.log(others))
        log_odds = np.where(upper, log_others - logp, logp - log_others)
        return cls(
            logp,
            upper,
            shrinking,
            growing,
            np.where(upper, half_others, half_token),
            np.where(upper, half_token, half_others),
            shrinking / growing,
            log_odds,
            upper & (log_odds > LOG_REACH + 40.0) & steep,
            _Tally(np.zeros(logp.size, dtype=np.uint32), np.arange(logp.size)),
        )

    def take(self, chosen: BoolArray | NDArray[np.intp]) -> _Problems:
        return _Problems._make(array[chosen] for array in self)


class _Move(NamedTuple):
    """How the two outcomes of each problem change."""

    shrunk: Float64Array  # u of the outcome that shrinks, 1 - lost
    lost: Float64Array
    gained: Float64Array  # u - 1 of the outcome that grows


class _Series:
    """``y^2 q(y)``, the normalised f at ``u = 1 + y``, for ``|y| < reach``."""

    def __init__(self, reach: float, coefficients: Float64Array) -> None:
        self.reach = reach
        self._coefficients = coefficients  # of (y/reach)^2 and up
        self.curvature = 2.0 * float(coefficients[0]) / reach**2

    def value(self, excess: Float64Array) -> Float64Array:
        x = excess / self.reach
        q = np.zeros_like(x)
        for coefficient in self._coefficients[::-1]:
            q = q * x + coefficient
        return np.asarray(x * x * q)

    def derivative(self, excess: Float64Array) -> Float64Array:
        x = excess / self.reach
        q = np.zeros_like(x)
        for power in range(self._coefficients.size + 1, 1, -1):
            q = q * x + power * self._coefficients[power - 2]
        return np.asarray(x * q / self.reach)


class _Function:
    """A callable that has been checked to be an f, with its limits and its derivative.

    Attributes:
        at_zero: f(0), maybe inf.
        slope_at_infinity: f'(inf), maybe inf.
        tangent: The c for which ``f(u) - c (u-1)``, the normalised f, is least at 1.
        scale: The size of f around 1.
        rough_curvature: About f''(1), where an iteration starts; a guess where f has a kink.
    """

    def __init__(
        self,
        fn: Callable[[Float64Array], Float64Array],
        at_zero: float | None,
        slope_at_infinity: float | None,
    ) -> None:
        self._fn = fn
        log_u = _grid()
        u = np.exp(log_u)
        with np.errstate(all="ignore"):
            f = self._checked_values(u)
            self._check_elementwise(u, f)
            below, above = self._call(np.array([1.0 - _SHORT_STEP, 1.0 + _SHORT_STEP]))
            self.tangent = float((above - below) / (2.0 * _SHORT_STEP))
            self.scale = _scale(log_u, f, self.tangent)
            self._check_overflow(u, f)
            self._check_zero_at_one()
            self._check_convex(log_u, u, f)
            self._check_not_linear(u, f)
            self.at_zero = self._find_at_zero(f, at_zero)
            self.slope_at_infinity = self._find_slope_at_infinity(u, f, slope_at_infinity)
            self._series = self._find_series()
            below, above = self._call(np.array([1.0 - _LONG_STEP, 1.0 + _LONG_STEP]))
            guess = float(above + below) / _LONG_STEP**2
            self.rough_curvature = min(max(guess, 1e-6 * self.scale), 1e300)

    @property
    def curvature(self) -> float | None:
        """f''(1), of the polynomial around 1; None where f is not smooth there, or flat."""
        if self._series is None:
            return None
        curvature = self._series.curvature
        return curvature if curvature > 1e-6 * self.scale else None

    @property
    def normal_at_zero(self) -> float:
        """The normalised f at 0."""
        return self.at_zero + self.tangent

    @property
    def normal_slope(self) -> float:
        """The slope of the normalised f at infinity."""
        return self.slope_at_infinity - self.tangent

    def value(self, u: Float64Array, excess: Float64Array) -> Float64Array:
        """The normalised f, ``f(u) - c (u-1)``, for u in [0, inf]; one call of the callable.

        Outside the normal float64 numbers, and where ``fn`` overflows, ``f(0)`` and
        ``f'(inf) (u-1)`` stand for f. They are not below it, so a bound does not move outwards.

        Args:
            u: Where to evaluate, float64 [n].
            excess: ``u - 1`` without the rounding error of u, float64 [n].
        """
        asked = np.clip(u, _SMALLEST, _LARGEST)
        f = self._call(asked)
        rounded = asked - 1.0
        value = f - self.tangent * rounded
        plain = np.isfinite(value) & (asked == u)
        if not plain.all():
            wrong = ~np.isfinite(f) & ((f != np.inf) & (np.abs(np.log(asked)) <= _GRID_REACH))
            if wrong.any():
                raise InvalidValueError(self._not_finite(asked[wrong], f[wrong]))
            tail = np.where(u < 1.0, self.normal_at_zero, self.normal_slope * excess)
            value = np.where(plain, value, tail)
        near = np.abs(excess) < 0.5
        if near.any():
            # Along the chord from 1, f(1+y) for the y that rounding took from 1+y. At a kink at 1
            # this is exact.
            correction = excess[near] / rounded[near]
            value[near] *= np.where(rounded[near] == 0.0, 1.0, correction)
            if self._series is not None:
                close = np.abs(excess) < self._series.reach
                value[close] = self._series.value(excess[close])
        return value

    def derivative(self, u: Float64Array, excess: Float64Array) -> Float64Array:
        """The derivative of the normalised f, by differences; one call of the callable."""
        # Steps shrink towards 1, since that is where kinks are: in |u-1|, and in f's of that power.
        near = np.abs(excess) < 0.5
        step = np.where(near, np.maximum(np.abs(excess), _SHORTEST_STEP), u)
        offsets = np.array([-_SHORT_STEP, _SHORT_STEP, *(_LONG_STEP * np.array([-2, -1, 1, 2]))])
        points = u + offsets[:, None] * step
        at = np.where(near, excess + offsets[:, None] * step, points - 1.0)
        value = self.value(points.reshape(-1), at.reshape(-1)).reshape(at.shape)
        # Without the slope of the tail, the formulas' error is relative to what is left.
        straight = self.normal_slope if self.normal_slope < math.inf else 0.0
        rest = value - straight * at
        # By the points as they were rounded, not by the steps that were meant; u keeps the digits
        # of small ones.
        x = np.where(near, at, points)
        short = (rest[1] - rest[0]) / (x[1] - x[0])
        inner = (rest[4] - rest[3]) / (x[4] - x[3])
        outer = (rest[5] - rest[2]) / (x[5] - x[2])
        long = (4.0 * inner - outer) / 3.0
        # The long formula has less rounding error; a kink within it shows by their difference.
        noise = 16.0 * _EPS * (np.abs(value[0]) + self.scale * (1.0 + u)) / (_SHORT_STEP * step)
        smooth = np.abs(long - short) <= noise + 1e-6 * np.abs(short)
        derivative: Float64Array = straight + np.where(smooth, long, short)
        if self._series is not None:
            close = np.abs(excess) < self._series.reach
            derivative[close] = self._series.derivative(excess[close])
        return derivative

    def _call(self, u: Float64Array) -> Float64Array:
        """``fn(u)``, float64, after checking that it is an array of real numbers like u."""
        argument = u.view()
        argument.flags.writeable = False
        try:
            with np.errstate(all="ignore"):
                result: Any = np.asarray(self._fn(argument))
        except Exception as error:
            raise InvalidValueError(
                f"f raised {type(error).__name__} on {_described(u)}: {error}"
            ) from error
        if result.shape != u.shape:
            raise InvalidValueError(
                f"f must return the shape of its argument, got {result.shape} on {_described(u)}"
            )
        double = result.dtype.kind == "f" and result.dtype.itemsize >= u.dtype.itemsize
        if not double and result.dtype.kind not in "iu":
            raise InvalidTypeError(
                f"f must return real numbers in double precision, got dtype {result.dtype}"
            )
        values: Float64Array = result.astype(np.float64, copy=False)
        return values

    def _not_finite(self, u: Float64Array, f: Float64Array) -> str:
        nearest = int(np.argmin(np.abs(np.log(u))))
        return f"f must be finite on (0, inf), got f({u[nearest]:.6g}) = {f[nearest]}"

    # --- checks on entry ------------------------------------------------------------------------

    def _checked_values(self, u: Float64Array) -> Float64Array:
        f = self._call(u)
        wrong = np.isnan(f) | (f == -np.inf)
        if wrong.any():
            raise InvalidValueError(self._not_finite(u[wrong], f[wrong]))
        finite = np.flatnonzero(f < np.inf)
        if finite.size == 0:
            raise InvalidValueError("f must be finite on (0, inf), got inf everywhere")
        inner = np.arange(f.size)
        hole = (f == np.inf) & (inner > finite[0]) & (inner < finite[-1])
        if hole.any() or not finite[0] < _GRID_HALF < finite[-1]:
            infinite = hole if hole.any() else f == np.inf
            raise InvalidValueError(self._not_finite(u[infinite], f[infinite]))
        return f

    def _check_elementwise(self, u: Float64Array, f: Float64Array) -> None:
        u, f = u[::-3], f[::-3]
        again = self._call(u)
        differs = np.abs(again - f) > 1e-9 * np.abs(f) + 1e-12 * (1.0 + u)
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            raise InvalidValueError(
                f"f must work element by element, got f({u[at]:.6g}) = {f[at]} in one array and "
                f"{again[at]} in another"
            )

    def _check_overflow(self, u: Float64Array, f: Float64Array) -> None:
        """An inf at an end is an overflow, unless f jumps there."""
        finite = np.flatnonzero(f < np.inf)
        for last, beyond in ((finite[0], finite[0] - 1), (finite[-1], finite[-1] + 1)):
            if 0 <= beyond < f.size and f[last] < min(_HUGE * self.scale, 1e285):
                raise InvalidValueError(
                    f"f must be finite on (0, inf), got f({u[beyond]:.6g}) = inf next to "
                    f"f({u[last]:.6g}) = {f[last]:.6g}"
                )

    def _check_zero_at_one(self) -> None:
        at_one = float(self._call(np.array([1.0]))[0])
        if not abs(at_one) <= 8.0 * _EPS * self.scale:
            raise InvalidValueError(
                f"f(1) must be 0, got {at_one!r}; it is not shifted away, since only c (u-1) may "
                "be added to an f without changing the divergence"
            )

    def _check_convex(self, log_u: Float64Array, u: Float64Array, f: Float64Array) -> None:
        """Refuses an f that lies above a chord, looked for at neighbours near and far."""
        slack = self._slack(log_u, u, f)
        worst, message = 1.0, ""
        reach = 1
        while 2 * reach < u.size:
            left, middle, right = u[: -2 * reach], u[reach:-reach], u[2 * reach :]
            # Both by themselves: one may round to 1 where the other one still counts.
            of_left = (right - middle) / (right - left)
            of_right = (middle - left) / (right - left)
            chord = of_left * f[: -2 * reach] + of_right * f[2 * reach :]
            above = f[reach:-reach] - chord
            allowed = (
                slack[reach:-reach] + of_left * slack[: -2 * reach] + of_right * slack[2 * reach :]
            )
            excess = np.where(f[reach:-reach] < np.inf, above / allowed, -np.inf)
            excess[np.isnan(excess)] = -np.inf
            at = int(np.argmax(excess))
            if excess[at] > worst:
                worst = float(excess[at])
                message = (
                    f"f is not convex: at u = {middle[at]:.6g} it lies {above[at]:.3g} above its "
                    f"chord from {left[at]:.6g} to {right[at]:.6g}"
                )
            reach *= 2
        if message:
            raise InvalidValueError(message)
        self._check_convex_between(log_u, u, f)

    def _check_convex_between(self, log_u: Float64Array, u: Float64Array, f: Float64Array) -> None:
        """Looks closer where f'' dips, as beside a concave kink that the curvature around it hides.

        Over a finer grid f' gains less, and the fall of a kink stays, until a chord shows it.
        """
        log_u, u, f = log_u[None], u[None], f[None]
        for _ in range(_MOST_REFINEMENTS):
            slack = self._slack(log_u, u, f)
            step = np.diff(u)
            slope = np.diff(f) / step
            width = 0.5 * (step[:, 1:] + step[:, :-1])
            noise = (slack[:, 1:] + slack[:, :-1]) / step
            fall = slope[:, :-1] - slope[:, 1:] - noise[:, :-1] - noise[:, 1:]
            bent = np.isfinite(fall)
            if np.any(fall[bent] > 0.0):
                row, at = np.unravel_index(np.argmax(np.where(bent, fall, -np.inf)), fall.shape)
                raise InvalidValueError(
                    f"f is not convex: at u = {u[row, at + 1]:.6g} its slope falls by "
                    f"{(slope[row, at] - slope[row, at + 1]):.3g}"
                )
            # f'' and how far rounding errors may have moved it, against its neighbours.
            curvature = np.where(bent, np.diff(slope) / width, np.nan)
            doubt = (noise[:, :-1] + noise[:, 1:]) / width
            least = np.minimum(curvature[:, :-4], curvature[:, 4:]) - doubt[:, :-4] - doubt[:, 4:]
            dip = curvature[:, 2:-2] + doubt[:, 2:-2] < _DIP * least
            rows, columns = np.nonzero(dip)
            if rows.size == 0:
                return
            deepest = np.argsort((curvature[:, 2:-2] / least)[dip])[:_MOST_SUSPECTS]
            rows, columns = rows[deepest], columns[deepest]
            left, right = u[rows, columns + 1], u[rows, columns + 5]
            u = left[:, None] + np.linspace(0.0, 1.0, _FINER + 1) * (right - left)[:, None]
            log_u, f = np.log(u), self._call(u.reshape(-1)).reshape(u.shape)

    def _check_not_linear(self, u: Float64Array, f: Float64Array) -> None:
        """Refuses an f whose slope from 1 is the same at 0 and at infinity."""
        first, last = np.flatnonzero(f < np.inf)[[0, -1]]
        to_zero, to_infinity = f[first] / (u[first] - 1.0), f[last] / (u[last] - 1.0)
        if to_infinity - to_zero <= 16.0 * _EPS * self.scale:
            shape = f"{to_infinity:.6g} (u - 1)" if to_infinity else "0"
            raise InvalidValueError(f"f is {shape} everywhere, which is no divergence")

    def _slack(self, log_u: Float64Array, u: Float64Array, f: Float64Array) -> Float64Array:
        """Rounding errors that f may have: of its value, and of terms c (u-1) that cancelled.

        Terms that a logarithm or a power make are larger than f by ``|ln u|`` at most.
        """
        terms = np.abs(f) + self.scale * (1.0 + u)
        return _ROUNDING * _EPS * (1.0 + np.abs(log_u)) * terms

    def _find_at_zero(self, f: Float64Array, given: float | None) -> float:
        def value(t: Float64Array) -> Float64Array:
            return self._call(np.exp(-t))

        seen = f[f < np.inf]
        found = _settle(value, self.scale, float(seen[0]))
        return self._reconcile("at_zero", "f(0)", found, given, float(seen[0]))

    def _find_slope_at_infinity(
        self, u: Float64Array, f: Float64Array, given: float | None
    ) -> float:
        def value(t: Float64Array) -> Float64Array:
            large = np.exp(t)
            return self._call(large) / (large - 1.0)

        last = int(np.flatnonzero(f < np.inf)[-1])
        seen = float(f[last] / (u[last] - 1.0))
        found = _settle(value, self.scale, seen)
        return self._reconcile("slope_at_infinity", "f'(inf)", found, given, seen)

    def _reconcile(
        self, argument: str, symbol: str, found: float | None, given: float | None, seen: float
    ) -> float:
        """The limit found or given; both are kept from contradicting each other."""
        if given is None:
            if found is None:
                raise InvalidValueError(
                    f"{symbol} is not clear from values of f, the farthest of which is {seen:.6g}; "
                    f"give it as {argument}=..., inf included"
                )
            return found
        slack = 1e-9 * max(abs(seen), self.scale)
        settled = found is not None and found < math.inf
        if given < seen - slack or (settled and not abs(given - (found or 0.0)) <= slack):
            raise InvalidValueError(f"{argument} is {given!r}, but f reaches {seen!r} on its way")
        return given

    def _find_series(self) -> _Series | None:
        """The normalised f around 1 as a polynomial, if it is one to rounding errors.

        Where f is of order y^2 its values are off by rounding errors of order 1. Over a wide
        interval they average out, and ``y^2 q(y)`` loses nothing for small y.
        """
        for reach in _SERIES_REACHES:
            y = reach * _SERIES_NODES
            u = 1.0 + y
            y = u - 1.0
            value = self._call(u) - self.tangent * y
            powers = (y / reach)[:, None] ** np.arange(1, _SERIES_ORDER + 1)
            coefficients = np.asarray(np.linalg.lstsq(powers, value, rcond=None)[0], np.float64)
            error = value - powers @ coefficients
            worst, rough = np.abs(error).max(), np.abs(np.diff(error)).max()
            # What is left jumps from node to node where it is rounding, and waves where it is f.
            # A polynomial, or what is as good, leaves the rounding errors of the fit, in any shape.
            exact = worst <= 16.0 * _EPS * np.abs(value).max()
            if exact or (worst <= 3.0 * rough and worst <= _SERIES_NOISE * self.scale):
                self.tangent += float(coefficients[0]) / reach
                return _Series(reach, coefficients[1:])
        return None


class CallableGenerator:
    """The f of an f-divergence, given as a callable; bounds and membership of its bands.

    On construction ``fn`` is looked at on 4001 points ``u = e^t``, ``|t| <= 300``, and at a few
    farther out, and refused if it is not the f of a divergence: it must be finite, convex and 0 at
    ``u = 1``. Kinks and flat parts are welcome. Where f'' dips among neighbours, finer points are
    asked for, so that a concave kink does not hide between two points behind the curvature around
    it. What is not seen: a kink that makes f' fall by less than 1 % of what it gains between two
    points (6e-5 apart around 1, 1.3 % of u at 10), or less than the growth of f'' adds to that, a
    smooth dent that lies between two points, and what rounding errors of ``fn`` would hide.

    ``f(u) + c (u-1)`` has the same divergence for every c. The c for which f is least at 1 is found
    and used within. Where f is smooth around 1, a polynomial fitted to ``fn`` takes its place
    there, so that the rounding errors of ``fn``, which are absolute ones, do not swamp a small f.

    What follows from seeing only float64 values of f:

    - A bound is off by a few rounding errors of D times its condition number. For
      ``delta >= 1e-5`` that is less than 1e-10 of the log bound, and mostly less than 1e-13. The
      exception is the lower side next to saturation, where D hardly depends on the ratio: below a
      ratio of 1e-4 the error is about 1e-15/ratio. An f that is written so that large terms cancel
      loses what they lose.
    - A bound lies inside as far as ``fn`` can tell: `contains` is true there.
    - ``fn`` is asked for normal float64 numbers. Where the bound's ratio, or that of everything
      else, is none, or ``fn`` overflows there, the bound is replaced by a limit on its inner side,
      the farthest ratio that ``fn`` could be asked about: ``log_lower`` is no less than -708.39
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
        self._f = _Function(fn, *self._given)

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

        ``fn`` is called at most `MOST_CALLS` times for every `BLOCK` tokens, with one array each.

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
        # A ratio of 1 has no divergence, whatever rounding says; and a token of no probability has
        # none at any ratio.
        inside = np.asarray((log_ratio == 0.0) & ~np.isnan(logp))
        inside |= (logp == -np.inf) & ~np.isnan(log_ratio)
        asked = ~inside & (tokens > -np.inf) & (log_ratio <= -tokens)
        if asked.any():
            with np.errstate(all="ignore"):
                problems = self._problems(tokens[asked], log_ratio[asked] > 0.0)
                inside[asked] = self._is_inside(problems, delta[asked], log_ratio[asked])
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
                # The farthest ratio that fn could be asked about.
                unasked = np.abs(found) >= LOG_REACH * (1.0 - 4.0 * _EPS)
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
        asked = (log_ratio <= -logp) & (log_ratio != 0.0)
        if asked.any():
            with np.errstate(all="ignore"):
                problems = self._problems(logp[asked], log_ratio[asked] > 0.0)
                move = _move_by_log_ratio(problems, log_ratio[asked])
                divergences[asked] = self._divergence(problems, move)
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

    def _problems(self, logp: Float64Array, upper: BoolArray) -> _Problems:
        return _Problems.of(logp, upper, self.slope_at_infinity == math.inf)

    def _solve(self, problems: _Problems, delta: Float64Array) -> Float64Array:
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

    def _root(self, problems: _Problems, delta: Float64Array) -> Float64Array:
        """The largest unknown found for which ``D <= delta``, by Chandrupatla's method."""
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
        for iteration in range(_MOST_ITERATIONS):
            x = x1 + share * (x2 - x1)
            f = self._log_excess(problems, delta, x)
            same = (f <= 0.0) == (f1 <= 0.0)
            x3, f3 = np.where(same, x1, x2), np.where(same, f1, f2)
            x2, f2 = np.where(same, x2, x1), np.where(same, f2, f1)
            x1, f1 = x, f
            width, tolerance = np.abs(x2 - x1), 2.0 * _EPS * (1.0 + np.abs(x1))
            done = (width <= tolerance) | ((f1 <= 0.0) & (f1 >= -2.0 * _EPS))
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
            if iteration < _MOST_INTERPOLATIONS:
                xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
                safe = (phi * phi < xi) & ((1.0 - phi) * (1.0 - phi) < 1.0 - xi)
                interpolated = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (
                    f3 - f1
                ) * f2 / (f3 - f2)
                share[safe] = interpolated[safe]
            least = 0.5 * tolerance / width
            share = np.clip(share, least, 1.0 - least)
        root[todo] = np.where(f1 <= 0.0, x1, x2)
        return root

    def _bracket(
        self,
        problems: _Problems,
        delta: Float64Array,
        farthest: Float64Array,
        at_farthest: Float64Array,
    ) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Ends of a bracket of the root, inside and outside, with ``ln(D/delta)`` there."""
        low, at_low = np.full_like(delta, -np.inf), np.full_like(delta, -_STEEPEST)
        high, at_high = farthest.copy(), at_farthest.copy()
        # Around 1, D is about w/(2g) f''(1) m^2.
        x = 0.5 * (np.log(2.0 * delta / self._f.rough_curvature) - problems.log_odds)
        x = np.where(problems.by_growth, LOG_REACH, np.maximum(x, -40.0))
        x = np.minimum(x, farthest - 1.0)
        step = np.zeros_like(x)
        rising = np.zeros(x.shape, dtype=np.bool_)
        todo = np.arange(x.size)
        for expansion in range(_MOST_EXPANSIONS):
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

    def _farthest(self, problems: _Problems) -> Float64Array:
        """The largest unknown for which neither u leaves the normal float64 numbers."""
        farthest = np.full_like(problems.logp, _FARTHEST)
        if self.slope_at_infinity == math.inf:
            log_lost = LOG_REACH - problems.log_odds
            log_m = np.where(log_lost < -37.0, log_lost, np.log(-np.log1p(-np.exp(log_lost))))
            far = log_lost < 0.0
            farthest[far] = np.minimum(log_m[far], _FARTHEST)
            farthest[problems.by_growth] = LOG_REACH
        return farthest

    def _log_excess(
        self, problems: _Problems, delta: Float64Array, unknown: Float64Array
    ) -> Float64Array:
        """``ln(D/delta)``, cut off at +-`_STEEPEST`; what cannot be evaluated counts as outside."""
        d = self._divergence(problems, _move_by_unknown(problems, unknown))
        excess = np.clip(np.log(np.maximum(d, 0.0) / delta), -_STEEPEST, _STEEPEST)
        excess[np.isnan(excess)] = _STEEPEST
        # ln rounds a D just above delta to 0.
        return np.where((excess <= 0.0) & (d > delta), _EPS, excess)

    def _log_ratio(self, problems: _Problems, unknown: Float64Array) -> Float64Array:
        """The log-ratio of the token, which is not at saturation."""
        move = _move_by_unknown(problems, unknown)
        growth = np.where(
            move.gained < _LARGEST, np.log1p(move.gained), problems.log_odds + np.log(move.lost)
        )
        upper = np.minimum(growth, np.nextafter(-problems.logp, 0.0))
        lower = np.maximum(-np.exp(unknown), -LOG_REACH)
        return np.where(problems.upper, upper, lower)

    def _move(
        self, problems: _Problems, delta: Float64Array, log_ratio: Float64Array, inwards: bool
    ) -> Float64Array:
        """The log-ratios, each moved until D evaluated at it is at most delta, or above it."""
        bound: Float64Array = log_ratio.copy()
        end = np.where(problems.upper, np.nextafter(-problems.logp, np.inf), -np.inf)
        end = 0.0 * bound if inwards else end
        if inwards:
            # `contains` is to say the same, though a function may round otherwise in another array.
            delta = delta * (1.0 - 2.0 * _EPS)
        todo = np.arange(bound.size)
        for move in range(_MOST_MOVES):
            done = self._is_inside(problems, delta, bound[todo]) == inwards
            if done.all():
                return bound
            problems, delta, todo = problems.take(~done), delta[~done], todo[~done]
            share = 4.0**move * _EPS
            moved = bound[todo] * (1.0 - share if inwards else 1.0 + share)
            moved = np.where(moved == bound[todo], np.nextafter(bound[todo], end[todo]), moved)
            within = np.minimum(np.abs(moved), np.abs(end[todo]))
            bound[todo] = moved if inwards else np.copysign(within, moved)
        bound[todo] = end[todo]
        return bound

    def _is_inside(
        self, problems: _Problems, delta: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        """Whether D is at most delta, at log-ratios on the side of each problem."""
        d = self._divergence(problems, _move_by_log_ratio(problems, log_ratio))
        return np.asarray(d <= delta)

    def _divergence(self, problems: _Problems, move: _Move) -> Float64Array:
        """``w f(1 - lost) + g f(1 + gained)``; one call of the callable."""
        problems.tally.add()
        grown = 1.0 + move.gained
        value = self._f.value(
            np.concatenate((move.shrunk, grown)), np.concatenate((-move.lost, move.gained))
        )
        of_shrunk, of_grown = value[: grown.size], value[grown.size :]
        part = of_grown * problems.half_growing * problems.half_growing
        beyond = grown > _LARGEST
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
        saturated = (log_bound >= -logp) | (log_bound > LOG_REACH * (1.0 + _EPS))
        slope[(logp < 0.0) & saturated & (logp > -np.inf)] = -1.0
        solved = (logp < 0.0) & ~at_rest & ~saturated & (logp > -np.inf)
        if not solved.any():
            return slope
        problems = self._problems(logp[solved], log_bound[solved] > 0.0)
        move = _move_by_log_ratio(problems, log_bound[solved])
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


def _move_by_unknown(problems: _Problems, unknown: Float64Array) -> _Move:
    """The move for an ``ln m``, or for an ``ln gained`` where that is the unknown."""
    by_growth, log_odds = problems.by_growth, problems.log_odds
    log_m = np.where(by_growth, unknown - log_odds, unknown)
    m = np.exp(log_m)
    lost = -np.expm1(-m)
    gained = problems.odds * lost
    far = log_odds > _FAR_ODDS
    if far.any():
        log_lost = np.where(log_m < -37.0, log_m, np.log(lost))
        log_gained = np.where(by_growth, unknown, log_odds + log_lost)
        gained[far] = np.exp(log_gained[far])
    return _Move(np.exp(-m), lost, gained)


def _move_by_log_ratio(problems: _Problems, log_ratio: Float64Array) -> _Move:
    upper, logp = problems.upper, problems.logp
    excess = np.expm1(log_ratio)
    far = problems.log_odds > _FAR_ODDS
    gained = np.where(upper, excess, -problems.odds * excess)
    lost = np.where(upper, excess / problems.odds, -excess)
    if far.any():
        gained = np.where(far & ~upper, np.exp(problems.log_odds + np.log(lost)), gained)
        lost = np.where(far & upper, np.exp(logp + log_ratio), lost)
    # Next to saturation, what is left of the others without cancellation.
    left = np.where(lost > 0.5, -np.expm1(logp + log_ratio) / problems.shrinking, 1.0 - lost)
    return _Move(np.where(upper, left, np.exp(log_ratio)), lost, gained)


def _grid() -> Float64Array:
    """Values of ln u, rising, with 0 in the middle."""
    spread = np.arcsinh(100.0 * _GRID_REACH)
    t = 0.01 * np.sinh(np.linspace(-spread, spread, 2 * _GRID_HALF + 1))
    t[_GRID_HALF] = 0.0
    return np.asarray(t)


def _scale(log_u: Float64Array, f: Float64Array, tangent: float) -> float:
    """The size of f, in units of ``1+u``, around 1 and no farther out than where it is not 0."""
    size = np.where(f < np.inf, np.abs(f) / (1.0 + np.exp(log_u)), 0.0)

    def largest(reach: float) -> float:
        return float(size[np.abs(log_u) <= reach].max()) + abs(tangent)

    # Less far where f explodes on the way, as e^(1000 (u-1)) does.
    nearest = largest(0.001)
    for reach in (math.log(2.0), 0.1, 0.01):
        if 0.0 < largest(reach) <= _EXPLODED * nearest:
            return largest(reach)
    reaches = (math.log(2.0), 5.0, 50.0, _GRID_REACH)
    return next((largest(reach) for reach in reaches if largest(reach) > 0.0), 0.0)


def _settle(
    value: Callable[[Float64Array], Float64Array], scale: float, seen: float
) -> float | None:
    """The limit at infinity of a monotone function, inf included; None where it is not clear.

    Where it converges as a power of u, two steps tell how far it is from the limit; where it grows
    without a bound, it grows by as much again or more when ln u doubles, as a logarithm does.
    """
    for last in (600.0, 300.0, 150.0):
        quarter, half, whole = (float(v) for v in value(np.array([0.25, 0.5, 1.0]) * last))
        if math.isfinite(quarter) and math.isfinite(half) and math.isfinite(whole):
            slack = 16.0 * _EPS * last * max(abs(whole), scale)
            before, step = abs(half - quarter), abs(whole - half)
            # A e^(-a t) loses ratio = e^(-a last/4) in a quarter, and ratio^2 in the last half.
            ratio = min(step / before, 1.0) if before > 0.0 else 1.0
            if step * ratio * ratio <= slack:
                return whole
            if whole - half >= 2.0 * (half - quarter) * (1.0 - 1e-9) > 0.0:
                return math.inf
            break
    return math.inf if seen > _UNBOUNDED * scale else None


def checked_limit(argument: str, value: object) -> float | None:
    """Returns a limit of f that a user may have given, as a float.

    Raises:
        InvalidTypeError: If it is neither None nor a real number; the message names ``argument``.
        InvalidValueError: If it is NaN.
    """
    if value is None:
        return None
    number = real_number(argument, value)
    if math.isnan(number):
        raise InvalidValueError(f"{argument} must be a number or inf, got nan")
    return number


def _described(u: Float64Array) -> str:
    return f"an array of shape {u.shape} of u from {u.min():.6g} to {u.max():.6g}"


def _name(fn: object) -> str:
    return str(getattr(fn, "__qualname__", None) or repr(fn))
