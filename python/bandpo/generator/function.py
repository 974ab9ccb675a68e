"""A callable that is checked to be an f, with its limits and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bandpo.check import Float64Array, real_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.generator.limits import (
    DIP,
    EPS,
    EXPLODED,
    GRID_HALF,
    GRID_REACH,
    LONG_STEP,
    MAX_REFINEMENTS,
    MAX_SUSPECTS,
    MAX_U,
    MIN_STEP,
    MIN_U,
    OVERFLOWING,
    REFINED_INTERVALS,
    ROUNDING,
    SERIES_NODES,
    SERIES_NOISE,
    SERIES_ORDER,
    SERIES_REACHES,
    SHORT_STEP,
    UNBOUNDED,
)


class Series:
    """``y^2 q(y)``, the normalised f at ``u = 1 + y``, for ``|y| < reach``."""

    def __init__(self, reach: float, coefficients: Float64Array) -> None:
        self.reach = reach
        self._coefficients = coefficients  # of (y/reach)^2, (y/reach)^3, ...
        self.curvature = 2.0 * float(coefficients[0]) / reach**2

    def value(self, excess: Float64Array) -> Float64Array:
        """Returns the polynomial at each y, float64 [n]."""
        x = excess / self.reach
        q = np.zeros_like(x)
        for coefficient in self._coefficients[::-1]:
            q = q * x + coefficient
        return np.asarray(x * x * q)

    def derivative(self, excess: Float64Array) -> Float64Array:
        """Returns its derivative at each y, float64 [n]."""
        x = excess / self.reach
        q = np.zeros_like(x)
        for power in range(self._coefficients.size + 1, 1, -1):
            q = q * x + power * self._coefficients[power - 2]
        return np.asarray(x * q / self.reach)


class Function:
    """A callable that is checked to be an f, with its limits and its derivative.

    Attributes:
        at_zero: f(0), inf allowed.
        slope_at_infinity: f'(inf), inf allowed.
        tangent: The c for which ``f(u) - c (u-1)``, the normalised f, has its min at 1.
        scale: The size of f around 1.
        rough_curvature: An estimate of f''(1), from which an iteration starts; finite at a kink.
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
            below, above = self._call(np.array([1.0 - SHORT_STEP, 1.0 + SHORT_STEP]))
            self.tangent = float((above - below) / (2.0 * SHORT_STEP))
            self.scale = _scale(log_u, f, self.tangent)
            self._check_overflow(u, f)
            self._check_zero_at_one()
            self._check_convex(log_u, u, f)
            self._check_not_linear(u, f)
            self.at_zero = self._find_at_zero(f, at_zero)
            self.slope_at_infinity = self._find_slope_at_infinity(u, f, slope_at_infinity)
            self._series = self._find_series()
            below, above = self._call(np.array([1.0 - LONG_STEP, 1.0 + LONG_STEP]))
            guess = float(above + below) / LONG_STEP**2
            self.rough_curvature = min(max(guess, 1e-6 * self.scale), 1e300)

    @property
    def curvature(self) -> float | None:
        """f''(1), from the polynomial around 1; None if f is not smooth there, or flat."""
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
        """Returns the normalised f, ``f(u) - c (u-1)``, by one call of the callable.

        ``f(0)`` and ``f'(inf) (u-1)`` stand for f outside the normal float64 numbers and where
        ``fn`` overflows. They are not below f, so that no bound moves outwards.

        Args:
            u: Arguments in [0, inf], float64 [n].
            excess: ``u - 1`` without the rounding error of u, float64 [n].
        """
        clamped = np.clip(u, MIN_U, MAX_U)
        f = self._call(clamped)
        rounded = clamped - 1.0
        value = f - self.tangent * rounded
        plain = np.isfinite(value) & (clamped == u)
        if not plain.all():
            wrong = ~np.isfinite(f) & ((f != np.inf) & (np.abs(np.log(clamped)) <= GRID_REACH))
            if wrong.any():
                raise InvalidValueError(self._not_finite(clamped[wrong], f[wrong]))
            tail = np.where(u < 1.0, self.normal_at_zero, self.normal_slope * excess)
            value = np.where(plain, value, tail)
        near = np.abs(excess) < 0.5
        if near.any():
            # Rounding took 1+y to u; f goes back to 1+y along the chord from 1, which is exact at
            # a kink at 1.
            correction = excess[near] / rounded[near]
            value[near] *= np.where(rounded[near] == 0.0, 1.0, correction)
            if self._series is not None:
                close = np.abs(excess) < self._series.reach
                value[close] = self._series.value(excess[close])
        return value

    def derivative(self, u: Float64Array, excess: Float64Array) -> Float64Array:
        """Returns the derivative of the normalised f, from differences of one call."""
        # Steps shrink towards 1, because kinks lie there, as that of |u-1|.
        near = np.abs(excess) < 0.5
        step = np.where(near, np.maximum(np.abs(excess), MIN_STEP), u)
        offsets = np.array([-SHORT_STEP, SHORT_STEP, *(LONG_STEP * np.array([-2, -1, 1, 2]))])
        points = u + offsets[:, None] * step
        at = np.where(near, excess + offsets[:, None] * step, points - 1.0)
        value = self.value(points.reshape(-1), at.reshape(-1)).reshape(at.shape)
        # The slope of the tail is taken out first; the error is then relative to the rest.
        straight = self.normal_slope if self.normal_slope < math.inf else 0.0
        rest = value - straight * at
        # Differences of the rounded points, not the nominal steps; a small u has more digits than
        # u - 1.
        x = np.where(near, at, points)
        short = (rest[1] - rest[0]) / (x[1] - x[0])
        inner = (rest[4] - rest[3]) / (x[4] - x[3])
        outer = (rest[5] - rest[2]) / (x[5] - x[2])
        long = (4.0 * inner - outer) / 3.0
        # The long formula has less rounding error. It differs from the short one if a kink lies
        # within it.
        noise = 16.0 * EPS * (np.abs(value[0]) + self.scale * (1.0 + u)) / (SHORT_STEP * step)
        smooth = np.abs(long - short) <= noise + 1e-6 * np.abs(short)
        derivative: Float64Array = straight + np.where(smooth, long, short)
        if self._series is not None:
            close = np.abs(excess) < self._series.reach
            derivative[close] = self._series.derivative(excess[close])
        return derivative

    def _call(self, u: Float64Array) -> Float64Array:
        """Returns ``fn(u)``, float64 [n].

        Raises:
            InvalidTypeError: If it is not an array of real numbers in double precision.
            InvalidValueError: If ``fn`` raises or returns another shape.
        """
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
        if hole.any() or not finite[0] < GRID_HALF < finite[-1]:
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
        """Refuses an inf at an end that is no overflow, because f jumps there."""
        finite = np.flatnonzero(f < np.inf)
        for last, beyond in ((finite[0], finite[0] - 1), (finite[-1], finite[-1] + 1)):
            if 0 <= beyond < f.size and f[last] < min(OVERFLOWING * self.scale, 1e285):
                raise InvalidValueError(
                    f"f must be finite on (0, inf), got f({u[beyond]:.6g}) = inf next to "
                    f"f({u[last]:.6g}) = {f[last]:.6g}"
                )

    def _check_zero_at_one(self) -> None:
        at_one = float(self._call(np.array([1.0]))[0])
        if not abs(at_one) <= 8.0 * EPS * self.scale:
            raise InvalidValueError(
                f"f(1) must be 0, got {at_one!r}; it is not shifted away, since only c (u-1) may "
                "be added to an f without changing the divergence"
            )

    def _check_convex(self, log_u: Float64Array, u: Float64Array, f: Float64Array) -> None:
        """Refuses an f that lies above a chord between neighbours, near and far."""
        slack = self._slack(log_u, u, f)
        worst, message = 1.0, ""
        reach = 1
        while 2 * reach < u.size:
            left, middle, right = u[: -2 * reach], u[reach:-reach], u[2 * reach :]
            # Each by itself, because 1 minus the other may round to 0.
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
        """Refines the grid where f'' dips, because the curvature around a concave kink may hide it.

        On a finer grid f' gains less between two points while its fall at a kink stays the same.
        """
        log_u, u, f = log_u[None], u[None], f[None]
        for _ in range(MAX_REFINEMENTS):
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
            with np.errstate(all="ignore"):  # NaN where rounding hides f''
                curvature = np.where(bent, np.diff(slope) / width, np.nan)
                doubt = (noise[:, :-1] + noise[:, 1:]) / width
                depth = _depth_of_dips(np.log(curvature - doubt), np.log(curvature + doubt))
            rows, columns = np.nonzero(depth < math.log(DIP))
            if rows.size == 0:
                return
            deepest = np.argsort(depth[rows, columns])[:MAX_SUSPECTS]
            rows, columns = rows[deepest], columns[deepest]
            left, right = u[rows, columns + 1], u[rows, columns + 5]
            u = (
                left[:, None]
                + np.linspace(0.0, 1.0, REFINED_INTERVALS + 1) * (right - left)[:, None]
            )
            log_u, f = np.log(u), self._call(u.reshape(-1)).reshape(u.shape)

    def _check_not_linear(self, u: Float64Array, f: Float64Array) -> None:
        """Refuses an f whose slope from 1 is the same at 0 and at infinity."""
        first, last = np.flatnonzero(f < np.inf)[[0, -1]]
        to_zero, to_infinity = f[first] / (u[first] - 1.0), f[last] / (u[last] - 1.0)
        if to_infinity - to_zero <= 16.0 * EPS * self.scale:
            shape = f"{to_infinity:.6g} (u - 1)" if to_infinity else "0"
            raise InvalidValueError(f"f is {shape} everywhere, which is no divergence")

    def _slack(self, log_u: Float64Array, u: Float64Array, f: Float64Array) -> Float64Array:
        """Returns the rounding error of f: that of its value and of terms c (u-1) that cancelled.

        Terms of a logarithm or a power exceed f by a factor of ``|ln u|`` at most.
        """
        terms = np.abs(f) + self.scale * (1.0 + u)
        return ROUNDING * EPS * (1.0 + np.abs(log_u)) * terms

    def _find_at_zero(self, f: Float64Array, given: float | None) -> float:
        def value(t: Float64Array) -> Float64Array:
            return self._call(np.exp(-t))

        reached = f[f < np.inf]
        found = _settle(value, self.scale, float(reached[0]))
        return self._reconcile("at_zero", "f(0)", found, given, float(reached[0]))

    def _find_slope_at_infinity(
        self, u: Float64Array, f: Float64Array, given: float | None
    ) -> float:
        def value(t: Float64Array) -> Float64Array:
            large = np.exp(t)
            return self._call(large) / (large - 1.0)

        last = int(np.flatnonzero(f < np.inf)[-1])
        reached = float(f[last] / (u[last] - 1.0))
        found = _settle(value, self.scale, reached)
        return self._reconcile("slope_at_infinity", "f'(inf)", found, given, reached)

    def _reconcile(
        self, argument: str, symbol: str, found: float | None, given: float | None, reached: float
    ) -> float:
        """Returns the given limit, or else the one found.

        Raises:
            InvalidValueError: If there is neither, or they contradict each other.
        """
        if given is None:
            if found is None:
                raise InvalidValueError(
                    f"{symbol} is not clear from values of f, the farthest of which is "
                    f"{reached:.6g}; give it as {argument}=..., inf included"
                )
            return found
        slack = 1e-9 * max(abs(reached), self.scale)
        settled = found is not None and found < math.inf
        if given < reached - slack or (settled and not abs(given - (found or 0.0)) <= slack):
            raise InvalidValueError(
                f"{argument} is {given!r}, but f reaches {reached!r} on its way"
            )
        return given

    def _find_series(self) -> Series | None:
        """Returns the normalised f around 1 as a polynomial, or None if no polynomial fits.

        For small y, f is of order y^2 and its rounding errors are of order 1. A fit over a wide
        interval averages them out, and ``y^2 q(y)`` keeps its digits for small y.
        """
        for reach in SERIES_REACHES:
            y = reach * SERIES_NODES
            u = 1.0 + y
            y = u - 1.0
            value = self._call(u) - self.tangent * y
            powers = (y / reach)[:, None] ** np.arange(1, SERIES_ORDER + 1)
            coefficients = np.asarray(np.linalg.lstsq(powers, value, rcond=None)[0], np.float64)
            error = value - powers @ coefficients
            worst, rough = np.abs(error).max(), np.abs(np.diff(error)).max()
            # A rest of rounding errors jumps from node to node; a rest of f is smooth. If f is a
            # polynomial, the rest is the rounding error of the fit, which may be smooth as well.
            exact = worst <= 16.0 * EPS * np.abs(value).max()
            if exact or (worst <= 3.0 * rough and worst <= SERIES_NOISE * self.scale):
                self.tangent += float(coefficients[0]) / reach
                return Series(reach, coefficients[1:])
        return None


def _grid() -> Float64Array:
    """Returns rising values of ln u, with 0 in the middle."""
    spread = np.arcsinh(100.0 * GRID_REACH)
    t = 0.01 * np.sinh(np.linspace(-spread, spread, 2 * GRID_HALF + 1))
    t[GRID_HALF] = 0.0
    return np.asarray(t)


def _depth_of_dips(low: Float64Array, high: Float64Array) -> Float64Array:
    """Returns how far ln f'' lies below its course in each row; NaN where that is not known.

    The course is the lower of two neighbours, or their mean if ln f'' is about as straight around
    them: so a dip shows in an f'' that grows fast as well.

    Args:
        low: ln f'' at least, [rows, n].
        high: ln f'' at most, [rows, n].

    Returns:
        The depths, negative for dips, of the points from the third to the last but two.
    """
    beside = high[:, 2:-2] - np.minimum(low[:, :-4], low[:, 4:])
    # The bend is above 0 next to a dip, and changes slowly if f'' is smooth.
    least = low[:, 2:-2] - 0.5 * (high[:, :-4] + high[:, 4:])
    bend = high[:, 2:-2] - 0.5 * (low[:, :-4] + low[:, 4:])
    depth: Float64Array = beside
    depth[:, 3:-3] = np.fmin(
        depth[:, 3:-3], bend[:, 3:-3] - np.minimum(least[:, :-6], least[:, 6:])
    )
    return depth


def _scale(log_u: Float64Array, f: Float64Array, tangent: float) -> float:
    """Returns the size of f: the max of ``|f| / (1+u)`` around 1, plus ``|tangent|``.

    The max is taken over the first of several intervals in which it is above 0.
    """
    size = np.where(f < np.inf, np.abs(f) / (1.0 + np.exp(log_u)), 0.0)

    def max_value(reach: float) -> float:
        return float(size[np.abs(log_u) <= reach].max()) + abs(tangent)

    # A shorter reach if f explodes on the way, as e^(1000 (u-1)) does.
    near_1 = max_value(0.001)
    for reach in (math.log(2.0), 0.1, 0.01):
        if 0.0 < max_value(reach) <= EXPLODED * near_1:
            return max_value(reach)
    reaches = (math.log(2.0), 5.0, 50.0, GRID_REACH)
    return next((max_value(reach) for reach in reaches if max_value(reach) > 0.0), 0.0)


def _settle(
    value: Callable[[Float64Array], Float64Array], scale: float, reached: float
) -> float | None:
    """Returns the limit at infinity of a monotone function, inf included; None if it is not clear.

    A function that converges as a power of u has its distance from the limit in two steps. One
    without a limit grows by as much again, or more, when ln u doubles, as a logarithm does.
    """
    for last in (600.0, 300.0, 150.0):
        quarter, half, whole = (float(v) for v in value(np.array([0.25, 0.5, 1.0]) * last))
        if math.isfinite(quarter) and math.isfinite(half) and math.isfinite(whole):
            slack = 16.0 * EPS * last * max(abs(whole), scale)
            before, step = abs(half - quarter), abs(whole - half)
            # A e^(-a t) loses ratio = e^(-a last/4) in a quarter, and ratio^2 in the last half.
            ratio = min(step / before, 1.0) if before > 0.0 else 1.0
            if step * ratio * ratio <= slack:
                return whole
            if whole - half >= 2.0 * (half - quarter) * (1.0 - 1e-9) > 0.0:
                return math.inf
            break
    return math.inf if reached > UNBOUNDED * scale else None


def checked_limit(argument: str, value: object) -> float | None:
    """Returns a limit of f as a float, or None if it is not given.

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
