"""Regions: maps from a token's old log-probability to the ratios it may take."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo import _core
from bandpo.check import Float64Array, broadcast, float64_array, real_number
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from bandpo.table import BandTable

BoolArray: TypeAlias = NDArray[np.bool_]

Sampler: TypeAlias = Callable[[bool, Float64Array], tuple[Float64Array, Float64Array]]
"""From (is upper, logp) to log bounds and their slopes in logp."""

Curve: TypeAlias = float | tuple[_core.Divergence, float] | Sampler
"""A constant ratio, a divergence with its radius, or anything smooth."""

Stretches: TypeAlias = list[tuple[float, Curve]]

_SMALLEST_POSITIVE = math.ulp(0.0)

_MOST_RARE = 600.0
"""The greatest ``-logp`` that is exponentiated: 1/p overflows at 709."""


class Region(ABC):
    """A map from an old log-probability to the log-ratios a token may take.

    ``log_lower(logp) <= 0 <= log_upper(logp)``. Log-probabilities above 0, which rounding makes,
    are read as 0. NaN in gives NaN out, for that element alone.
    """

    @abstractmethod
    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns ``(log_lower, log_upper)``: natural, float64, in the shape of ``logp``.

        Args:
            logp: Old log-probabilities (natural), real numbers, any shape.

        Raises:
            InvalidTypeError: If ``logp`` does not hold real numbers.
        """

    def bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns ``(lower, upper)``, the bounds of the ratio new/old itself.

        A finite ``log_lower`` gives at least the smallest positive float: 0 means that the ratio
        may be 0. An ``upper`` beyond the largest float is inf.
        """
        log_lower, log_upper = self.log_bounds(logp)
        with np.errstate(over="ignore", under="ignore"):
            lower, upper = np.exp(log_lower), np.exp(log_upper)
        underflowed = (lower == 0.0) & (log_lower > -np.inf)
        return np.asarray(np.where(underflowed, _SMALLEST_POSITIVE, lower)), np.asarray(upper)

    @property
    def per_token(self) -> bool:
        """Whether the bounds depend on more than logp, so that there is no table of them."""
        return True

    def describe(self) -> dict[str, Any]:
        """What `from_description` makes the same region of, as JSON takes it.

        Raises:
            InvalidValueError: If the region cannot be described.
        """
        raise InvalidValueError(f"{self!r} cannot be described")

    def _stretches(self, upper: bool) -> Stretches:
        """The curves of one side with the ``-logp`` where each begins, the first at 0."""
        raise InvalidValueError(f"{self!r} cannot be tabulated")

    def table(self) -> BandTable:
        """Returns the bounds as a lookup table, built once for each region.

        The table keeps to the simplex, ``log_upper <= -logp``, where the region may not (a `Clip`).

        Raises:
            InvalidValueError: If a delta is an array, or a side has more than eight smooth pieces.
        """
        return _table(self)

    def __or__(self, other: Region) -> Region:
        """The union: the wider bound of the two on each side."""
        return Combined("union", self, other) if isinstance(other, Region) else NotImplemented

    def __and__(self, other: Region) -> Region:
        """The intersection: the narrower bound of the two on each side."""
        return (
            Combined("intersection", self, other) if isinstance(other, Region) else NotImplemented
        )

    def cap(self, upper: float) -> Region:
        """Returns this region with ratios above ``upper`` taken out.

        Raises:
            InvalidTypeError: If ``upper`` is not a real number.
            InvalidValueError: If it is below 1.
        """
        limit = real_number("upper", upper)
        if not limit >= 1.0:
            raise InvalidValueError(f"upper must be at least 1, got {upper}")
        return self & Clip(1.0, limit - 1.0)

    def at_least(self, eps_low: float, eps_high: float | None = None) -> Region:
        """Returns this region with ``[1 - eps_low, 1 + eps_high]`` added: a minimum width.

        The arguments and errors are those of `Clip`.
        """
        return self | Clip(eps_low, eps_high)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether each log-ratio lies in the region; the arguments broadcast.

        A NaN lies in no region.
        """
        logp, log_ratio = broadcast(
            logp=float64_array("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        log_lower, log_upper = self.log_bounds(logp)
        return np.asarray((log_lower <= log_ratio) & (log_ratio <= log_upper))


class Clip(Region):
    """The constant interval ``[1 - eps_low, 1 + eps_high]`` of PPO and its variants.

    ``Clip(0.2)`` is PPO's, ``Clip(0.2, 0.28)`` DAPO's clip-higher, ``Clip(1, inf)`` does not clip.

    Args:
        eps_low: How far below 1 the ratio may fall, in [0, 1].
        eps_high: How far above 1 it may rise, at least 0, inf allowed; ``eps_low`` if left out.

    Raises:
        InvalidTypeError: If an epsilon is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, eps_low: float, eps_high: float | None = None) -> None:
        eps_high = eps_low if eps_high is None else eps_high
        self.eps_low = real_number("eps_low", eps_low)
        self.eps_high = real_number("eps_high", eps_high)
        if not 0.0 <= self.eps_low <= 1.0:
            raise InvalidValueError(
                f"eps_low must be in [0, 1], got {eps_low}: the lower bound is 1 - eps_low"
            )
        if not self.eps_high >= 0.0:
            raise InvalidValueError(
                f"eps_high must be at least 0, got {eps_high}: the upper bound is 1 + eps_high"
            )
        self.log_lower = math.log1p(-self.eps_low) if self.eps_low < 1.0 else -math.inf
        self.log_upper = math.log1p(self.eps_high)

    @classmethod
    def from_log_ratio(cls, log_low: float, log_high: float | None = None) -> Clip:
        """Returns the interval ``[-log_low, log_high]`` of the log-ratio.

        GMPO's (arXiv 2507.20673) is ``Clip.from_log_ratio(0.4)``.

        Args:
            log_low: How far below 0 the log-ratio may fall, at least 0, inf allowed.
            log_high: How far above 0 it may rise, likewise; ``log_low`` if left out.

        Raises:
            InvalidTypeError: If a width is not a real number.
            InvalidValueError: If it is below 0 or NaN.
        """
        log_high = log_low if log_high is None else log_high
        low, high = real_number("log_low", log_low), real_number("log_high", log_high)
        for argument, width in (("log_low", low), ("log_high", high)):
            if not width >= 0.0:
                raise InvalidValueError(f"{argument} must be a width, at least 0, got {width}")
        with np.errstate(over="ignore"):
            clip = cls(float(-np.expm1(-low)), float(np.expm1(high)))
        # As they were given: an epsilon next to 1 has lost them.
        clip.log_lower, clip.log_upper = -low, high
        return clip

    @classmethod
    def kl3(cls, delta: float) -> Clip:
        """Returns the ratios with ``r - 1 - ln r <= delta`` (arXiv 2602.05494).

        They are ``[-W0(-e^(-1-delta)), -W-1(-e^(-1-delta))]``, with Lambert's W. The left side is
        Schulman's estimator k3 of a KL divergence in the ratio r = new/old. If old/new is meant,
        the bounds are the reciprocals of these.

        Args:
            delta: The greatest value of the estimator, finite and above 0.

        Raises:
            InvalidTypeError: If ``delta`` is not a real number.
            InvalidValueError: If it is out of range.
        """
        radius = real_number("delta", delta)
        if not 0.0 < radius < math.inf:
            raise InvalidValueError(f"delta must be finite and above 0, got {delta}")
        return cls.from_log_ratio(-_kl3_root(radius, -1.0), _kl3_root(radius, 1.0))

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the same two bounds for every token; see `Region.log_bounds`."""
        unknown = np.where(np.isnan(float64_array("logp", logp)), np.nan, 0.0)
        return unknown + self.log_lower, unknown + self.log_upper

    def describe(self) -> dict[str, Any]:
        """Its two epsilons, or widths of the log-ratio; see `Region.describe`."""
        kind, low, high = self._widths()
        return {kind: [str(low), str(high)]}

    def _widths(self) -> tuple[str, float, float]:
        """The arguments that make the same clip, to the last bit, and whose they are."""
        plain = Clip(self.eps_low, self.eps_high)
        if plain == self:
            return "clip", self.eps_low, self.eps_high
        return "log-clip", -self.log_lower, self.log_upper

    def _stretches(self, upper: bool) -> Stretches:
        return [(0.0, 1.0 + self.eps_high if upper else 1.0 - self.eps_low)]

    def __repr__(self) -> str:
        kind, low, high = self._widths()
        return f"{'Clip' if kind == 'clip' else 'Clip.from_log_ratio'}({low!r}, {high!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clip):
            return NotImplemented
        return (self.log_lower, self.log_upper) == (other.log_lower, other.log_upper)

    def __hash__(self) -> int:
        return hash((Clip, self.log_lower, self.log_upper))


def _kl3_root(delta: float, sign: float) -> float:
    """The log-ratio t of the sign with ``e^t - 1 - t = delta``."""
    # Newton's method comes from outside, and steadily, as the left side is convex. It starts from
    # r <= 1 + sqrt(2 delta) + delta (Chatzigeorgiou, 2013), and on the lower side likewise.
    start = math.sqrt(2.0) * math.sqrt(delta) + delta
    t = math.log1p(start) if sign > 0.0 else -min(1.0 + delta, start)
    while True:
        nearer = t - (_kl3(t) - delta) / math.expm1(t)
        if not abs(nearer) < abs(t):
            return t
        t = nearer


def _kl3(t: float) -> float:
    """``e^t - 1 - t``, by its series where the subtraction cancels."""
    if abs(t) > 1.0:
        return math.expm1(t) - t
    term, total, k = 0.5 * t * t, 0.0, 2
    while total + term != total:
        total += term
        k += 1
        term *= t / k
    return total


class Dcpo(Region):
    """The bounds of DCPO's dynamic clipping: ``|(r - 1) r| p <= eps`` (arXiv 2509.02333, Eq. 3-4).

    ``upper = (1 + sqrt(1 + 4 eps_high / p)) / 2`` and
    ``lower = (1 + sqrt(max(1 - 4 eps_low / p, 0))) / 2``, which is never below 1/2. The upper bound
    leaves the simplex for ``p > 1 / (1 + eps_high)``. DCPO caps it: ``Dcpo().cap(10)``.

    Args:
        eps_low: Of the lower bound, finite and above 0.
        eps_high: Of the upper bound, likewise.

    Raises:
        InvalidTypeError: If an epsilon is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, eps_low: float = 0.16, eps_high: float = 0.20) -> None:
        self.eps_low = real_number("eps_low", eps_low)
        self.eps_high = real_number("eps_high", eps_high)
        for argument, epsilon in (("eps_low", self.eps_low), ("eps_high", self.eps_high)):
            if not 0.0 < epsilon < math.inf:
                raise InvalidValueError(f"{argument} must be finite and above 0, got {epsilon}")

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the closed forms; see `Region.log_bounds`."""
        y = np.maximum(-float64_array("logp", logp), 0.0)
        return self._log_lower(y), self._log_upper(y)

    def _log_upper(self, y: Float64Array) -> Float64Array:
        # With k = eps / p: r - 1 = 2 k / (1 + sqrt(1 + 4 k)).
        k = self.eps_high * np.exp(np.minimum(y, _MOST_RARE))
        near = np.log1p(2.0 * k / (1.0 + np.sqrt(1.0 + 4.0 * k)))
        # Where 1/p overflows, r is the square root of k to the last bit.
        far = 0.5 * (math.log(self.eps_high) + y)
        return np.asarray(np.where(y > _MOST_RARE, far, near))

    def _log_lower(self, y: Float64Array) -> Float64Array:
        k = self.eps_low * np.exp(np.minimum(y, _MOST_RARE))
        root = np.sqrt(np.maximum(1.0 - 4.0 * k, 0.0))
        return np.asarray(
            np.where(
                root == 0.0, math.log(0.5), np.log1p(-2.0 * np.minimum(k, 0.25) / (1.0 + root))
            )
        )

    def describe(self) -> dict[str, Any]:
        """Its two epsilons; see `Region.describe`."""
        return {"dcpo": [str(self.eps_low), str(self.eps_high)]}

    def _stretches(self, upper: bool) -> Stretches:
        if upper:
            return [(0.0, self._sample)]
        kink = self._kink()
        # Nearer to y = 0 a table has no grid; the bound there exceeds 1/2 by less than 1e-6.
        return [(0.0, self._sample), (kink, 0.5)] if kink > 2e-12 else [(0.0, 0.5)]

    def _kink(self) -> float:
        """The least float32 ``-logp`` from which on the lower bound is 1/2."""
        kink = -math.log(4.0 * self.eps_low)
        nearest = np.float32(kink)
        return float(
            np.nextafter(nearest, np.float32(np.inf)) if float(nearest) < kink else nearest
        )

    def _sample(self, upper: bool, logp: Float64Array) -> tuple[Float64Array, Float64Array]:
        # From log r + log |r - 1| + logp = log eps.
        if upper:
            log_bound = self._log_upper(-logp)
            return log_bound, np.expm1(-log_bound) / (2.0 - np.exp(-log_bound))
        log_bound = self._log_lower(-logp)
        root = 2.0 * np.exp(log_bound) - 1.0
        with np.errstate(divide="ignore"):
            slope = np.where(root > 0.0, -np.expm1(log_bound) / root, 0.0)
        # A table grades its grid towards the place where a side saturates, which the square root
        # needs at its end; what is said beyond is not read, as the constant follows there.
        return np.where(-logp > self._kink(), -np.inf, log_bound), slope

    def __repr__(self) -> str:
        return f"Dcpo({self.eps_low!r}, {self.eps_high!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dcpo):
            return NotImplemented
        return (self.eps_low, self.eps_high) == (other.eps_low, other.eps_high)

    def __hash__(self) -> int:
        return hash((Dcpo, self.eps_low, self.eps_high))


class Status(IntEnum):
    """How a bound came about."""

    CONVERGED = 0
    """The equation D = delta was solved."""
    SATURATED = 1
    """The whole side is allowed: exactly -inf or -logp."""
    LIMIT = 2
    """The limit: logp is 0 or -inf, or a Python function cannot be asked farther out."""
    READ_AS_CERTAIN = 3
    """logp is above 0 and was read as 0."""
    NOT_A_NUMBER = 4
    """logp is NaN, and so is the bound."""


class SideDiagnosis(NamedTuple):
    """One side of `Band.diagnose`; all arrays have the shape of ``logp``."""

    log_bound: Float64Array
    """The bound: inside the region, next to its edge."""
    outside: Float64Array
    """The other end of the final bracket; the bound itself where there is no edge."""
    status: NDArray[np.uint8]
    """A `Status` for each element."""
    iterations: NDArray[np.uint32]
    """Evaluations of D_f, two of f each, by the scalar solver; docs/accuracy.md has the most."""


class Diagnosis(NamedTuple):
    """What `Band.diagnose` returns."""

    lower: SideDiagnosis
    upper: SideDiagnosis


class Band(Region):
    """Every ratio for which ``D_f <= delta`` holds for {this token, everything else}.

    ``D_f(p, r) = p f(r) + (1-p) f((1 - r p)/(1-p))`` (BandPO, arXiv 2603.04918). It bounds a
    token's ratio; it does not bound the divergence of the whole policy after an update of shared
    parameters.

    The bounds are exact: within 1e-14 of the true log bound, relatively, and on its inner side.

    Args:
        divergence: A `Divergence` or the name of one, such as ``"kl"``.
        delta: The radius: a number, a pair ``(low, high)`` of radii for the lower and the upper
            side, or a numpy array of radii that broadcasts with the log-probabilities.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If the divergence is not known or a radius is not finite and above 0.
    """

    def __init__(
        self,
        divergence: Divergence | str,
        delta: float | tuple[float, float] | NDArray[Any],
    ) -> None:
        self.divergence = (
            divergence if isinstance(divergence, Divergence) else Divergence(divergence)
        )
        self.delta_low: float | Float64Array
        self.delta_high: float | Float64Array
        if isinstance(delta, tuple):
            if len(delta) != 2:
                raise InvalidValueError(
                    f"delta must be a pair (low, high), got {len(delta)} values"
                )
            self.delta_low, self.delta_high = (real_number("delta", side) for side in delta)
        elif isinstance(delta, np.ndarray) and delta.ndim > 0:
            radii = float64_array("delta", delta).copy()
            radii.flags.writeable = False
            self.delta_low = self.delta_high = radii
        elif np.ndim(delta) == 0 and np.asarray(delta).dtype.kind in "fiu":
            self.delta_low = self.delta_high = real_number("delta", delta)
        else:
            raise InvalidTypeError(
                f"delta must be a number, a tuple (low, high) or a numpy array, got "
                f"{type(delta).__name__}; bandpo.schedule.ScheduledBand has one that changes"
            )
        for side in (self.delta_low, self.delta_high):
            allowed = (np.asarray(side) > 0.0) & np.isfinite(side)
            if not np.all(allowed):
                refused = np.asarray(side)[~allowed].flat[0]
                raise InvalidValueError(f"delta must be finite and above 0, got {refused}")

    @property
    def per_token(self) -> bool:
        """Whether delta is an array, with a radius for every token."""
        return isinstance(self.delta_low, np.ndarray)

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the exact ``(log_lower, log_upper)``; see `Region.log_bounds`.

        Raises:
            InvalidValueError: If ``logp`` and an array of radii do not broadcast.
        """
        tokens, low, high = self._with_radii(logp=float64_array("logp", logp))
        solver = self.divergence._solver
        if isinstance(solver, _core.Divergence):
            log_lower, log_upper = _core.log_bounds(solver, low, high, _flat(tokens))
        else:
            log_lower, log_upper = solver.log_bounds(low, high, _flat(tokens))
        return log_lower.reshape(tokens.shape), log_upper.reshape(tokens.shape)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether ``D_f <= delta`` at each log-ratio, by evaluating it, without any root.

        False outside the simplex (new probability above 1) and for NaN.
        """
        tokens, low, high, ratios = self._with_radii(
            logp=float64_array("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        solver = self.divergence._solver
        inside: BoolArray
        if isinstance(solver, _core.Divergence):
            inside = _core.contains(solver, low, high, _flat(tokens), _flat(ratios))
        else:
            inside = solver.contains(low, high, _flat(tokens), _flat(ratios))
        return np.asarray(inside.reshape(tokens.shape), dtype=np.bool_)

    def diagnose(self, logp: ArrayLike) -> Diagnosis:
        """Returns the bounds with how each was found; no element ever fails the others.

        Raises:
            InvalidValueError: If ``logp`` and an array of radii do not broadcast, or a Python
                function of the divergence fails.
        """
        tokens, low, high = self._with_radii(logp=float64_array("logp", logp))
        solver = self.divergence._solver

        def side(radius: float | Float64Array, upper: bool) -> SideDiagnosis:
            found = (
                _core.diagnose(solver, radius, _flat(tokens), upper)
                if isinstance(solver, _core.Divergence)
                else solver.diagnose(radius, _flat(tokens), upper)
            )
            return SideDiagnosis(*(values.reshape(tokens.shape) for values in found))

        return Diagnosis(side(low, False), side(high, True))

    def calibrated(self, divergence: Divergence | str, *, p: float | None = None) -> Band:
        """Returns the band of another divergence that is as wide as this one.

        A delta means different things for different divergences. Near a ratio of 1 the width is
        ``sqrt(2 delta (1-p) / (f''(1) p))``, so equal ``delta / f''(1)`` gives equal width.

        Args:
            divergence: The other divergence.
            p: Match the bounds at this probability exactly, each side by its own delta, rather than
                by ``f''(1)``; in (0, 1).

        Raises:
            InvalidTypeError: If ``p`` is not a real number.
            InvalidValueError: If a divergence has no ``f''(1)`` (tv, hockey-stick, vajda but for
                k = 2) and no ``p`` is given; if ``p`` is not in (0, 1); if a bound of this band is
                saturated at ``p``, so that no finite delta is meant by it; or if the other
                divergence is 0 or infinite at a bound (flat around 1, as hockey-stick is).
        """
        other = divergence if isinstance(divergence, Divergence) else Divergence(divergence)
        if isinstance(self.delta_low, np.ndarray) or isinstance(self.delta_high, np.ndarray):
            raise InvalidValueError("calibrated needs one delta for all tokens, got an array")
        if p is None:
            for each in (self.divergence, other):
                if each.curvature is None:
                    raise InvalidValueError(
                        f"{each!r} has no f''(1); match at a reference probability: p=0.1"
                    )
            scale = (other.curvature or 0.0) / (self.divergence.curvature or 1.0)
            return Band(other, (self.delta_low * scale, self.delta_high * scale))
        p = real_number("p", p)
        if not 0.0 < p < 1.0:
            raise InvalidValueError(f"p must be in (0, 1), got {p}")
        logp = np.array([math.log(p)])
        log_lower, log_upper = self.log_bounds(logp)
        if log_lower[0] == -np.inf or log_upper[0] >= -logp[0]:
            raise InvalidValueError(f"{self!r} allows everything at p = {p}; match at another p")
        low, high = (float(other.between(logp, bound)[0]) for bound in (log_lower, log_upper))
        for side, delta, bound in (("lower", low, log_lower), ("upper", high, log_upper)):
            if not 0.0 < delta < math.inf:
                raise InvalidValueError(
                    f"{other!r} is {delta:g} at the {side} bound of {self!r} at p = {p}, a ratio "
                    f"of {math.exp(bound[0]):.6g}, and no delta matches that; match at another p, "
                    "or another divergence"
                )
        return Band(other, (low, high))

    def _with_radii(self, **arrays: Float64Array) -> list[Any]:
        """The first array, the radii as the core takes them, then the rest; all broadcast."""
        if not isinstance(self.delta_low, np.ndarray):
            first, *rest = broadcast(**arrays)
            return [first, self.delta_low, self.delta_high, *rest]
        first, radii, *rest = broadcast(logp=arrays.pop("logp"), delta=self.delta_low, **arrays)
        return [first, _flat(radii), _flat(radii), *rest]

    def describe(self) -> dict[str, Any]:
        """Its divergence and radii; see `Region.describe`."""
        low, high = self._radii_of_a_table()
        return {"band": {**self.divergence.describe(), "delta": [low, high]}}

    def _radii_of_a_table(self) -> tuple[float, float]:
        if isinstance(self.delta_low, np.ndarray) or isinstance(self.delta_high, np.ndarray):
            raise InvalidValueError(
                "a table needs one delta for all tokens, got an array; use the exact solver"
            )
        return self.delta_low, self.delta_high

    def _stretches(self, upper: bool) -> Stretches:
        low, high = self._radii_of_a_table()
        solver = self.divergence._solver
        if isinstance(solver, _core.Divergence):
            return [(0.0, (solver, high if upper else low))]

        def sampler(is_upper: bool, logp: Float64Array) -> tuple[Float64Array, Float64Array]:
            log_lower, log_upper, slope_lower, slope_upper = solver.bounds_with_slopes(
                low, high, logp
            )
            return (log_upper, slope_upper) if is_upper else (log_lower, slope_lower)

        return [(0.0, sampler)]

    def __repr__(self) -> str:
        if isinstance(self.delta_low, np.ndarray):
            delta: object = f"<array of shape {self.delta_low.shape}>"
        elif self.delta_low == self.delta_high:
            delta = self.delta_low
        else:
            delta = (self.delta_low, self.delta_high)
        by_name = "divergence" in self.divergence.describe()
        source = repr(self.divergence.spec) if by_name else repr(self.divergence)
        return f"Band({source}, {delta})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Band):
            return NotImplemented
        return (
            self.divergence == other.divergence
            and np.array_equal(self.delta_low, other.delta_low)
            and np.array_equal(self.delta_high, other.delta_high)
        )

    def __hash__(self) -> int:
        low, high = (np.asarray(side).tobytes() for side in (self.delta_low, self.delta_high))
        return hash((self.divergence, low, high))


def _flat(array: Float64Array) -> Float64Array:
    return np.ascontiguousarray(array).reshape(-1)


def sides(*, lower: Region, upper: Region) -> Region:
    """Returns the region with the lower bound of one region and the upper bound of another.

    ``sides(lower=Clip(0.2), upper=Band("kl", 0.05))`` lets rare tokens rise as a band does and
    holds what they may lose to a fixed clip.

    Args:
        lower: Decides for ratios below 1.
        upper: Decides for ratios above 1.

    Raises:
        InvalidTypeError: If one is not a region.
    """
    for argument, region in (("lower", lower), ("upper", upper)):
        if not isinstance(region, Region):
            raise InvalidTypeError(
                f"{argument} must be a Region, got {type(region).__name__}; one that changes is "
                f"built around its band: ScheduledBand(..., within=lambda band: ...)"
            )
    return Combined("sides", lower, upper)


class Combined(Region):
    """Two regions as one; made with ``|``, ``&``, `Region.cap`, `Region.at_least` and `sides`."""

    def __init__(
        self, kind: Literal["union", "intersection", "sides"], left: Region, right: Region
    ) -> None:
        self.kind = kind
        self.parts = (left, right)

    @property
    def per_token(self) -> bool:
        """Whether one of the parts is; see `Region.per_token`."""
        return any(part.per_token for part in self.parts)

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the bounds, each from the part that holds it; see `Region.log_bounds`."""
        (low_a, up_a), (low_b, up_b) = (part.log_bounds(logp) for part in self.parts)
        if self.kind == "sides":
            return low_a, up_b
        if self.kind == "union":
            return np.minimum(low_a, low_b), np.maximum(up_a, up_b)
        return np.maximum(low_a, low_b), np.minimum(up_a, up_b)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether each log-ratio lies in one part, in both, or in that of its side."""
        left, right = (part.contains(logp, log_ratio) for part in self.parts)
        inside: BoolArray
        if self.kind == "sides":
            inside = np.where(float64_array("log_ratio", log_ratio) < 0.0, left, right)
        else:
            inside = left | right if self.kind == "union" else left & right
        return inside

    def describe(self) -> dict[str, Any]:
        """Its parts; see `Region.describe`."""
        return {self.kind: [part.describe() for part in self.parts]}

    def _stretches(self, upper: bool) -> Stretches:
        """The stretches of whichever part holds the bound, cut where the other takes over."""
        if self.kind == "sides":
            return self.parts[int(upper)]._stretches(upper)
        sides = [part._stretches(upper) for part in self.parts]
        # The part that reaches further out holds a union; on the lower side that is the lesser.
        outer = self.kind == "union"

        def left_holds(y: Float64Array) -> BoolArray:
            left, right = (part.log_bounds(-y)[int(upper)] for part in self.parts)
            further: BoolArray = left >= right if upper else left <= right
            return further if outer else ~further | (left == right)

        # Kinks are bracketed on a fine grid, which starts of parts are points of, then halved.
        octaves = np.exp2(np.arange(-149 * 16, 7 * 16 + 1) / 16.0)
        grid = np.unique(np.concatenate([octaves, [start for side in sides for start, _ in side]]))
        grid = grid[grid > 0.0]
        holds = left_holds(grid)
        change = np.flatnonzero(holds[1:] != holds[:-1])
        low, high = grid[change], grid[change + 1]
        for _ in range(64):
            middle = 0.5 * (low + high)
            same = left_holds(middle) == holds[change]
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        starts = [0.0, *high.tolist()]
        stretches: Stretches = []
        for i, start in enumerate(starts):
            end = starts[i + 1] if i + 1 < len(starts) else math.inf
            side = sides[0] if bool(holds[0]) == (i % 2 == 0) else sides[1]
            for k, (begin, curve) in enumerate(side):
                next_begin = side[k + 1][0] if k + 1 < len(side) else math.inf
                if max(begin, start) < min(next_begin, end):
                    stretches.append((max(begin, start), curve))
        return stretches

    def __repr__(self) -> str:
        left, right = self.parts
        if self.kind == "sides":
            return f"sides(lower={left!r}, upper={right!r})"
        return f"({left!r} {'|' if self.kind == 'union' else '&'} {right!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Combined):
            return NotImplemented
        return (self.kind, self.parts) == (other.kind, other.parts)

    def __hash__(self) -> int:
        return hash((Combined, self.kind, self.parts))


_WIDTHS: dict[str, Callable[[float, float], Region]] = {
    "clip": Clip,
    "log-clip": Clip.from_log_ratio,
    "dcpo": Dcpo,
}
"""What makes a region of two numbers, by the kind that its description names."""


def from_description(description: dict[str, Any]) -> Region:
    """Makes the region that `Region.describe` described.

    Raises:
        InvalidValueError: If it holds a Python function, which a description cannot, or a kind of
            region that this version does not know.
    """
    kind: Any
    [(kind, content)] = description.items()
    if kind in _WIDTHS:
        return _WIDTHS[kind](*(float(width) for width in content))
    if kind == "band":
        low, high = content["delta"]
        return Band(Divergence.from_description(content), (low, high))
    if kind not in ("union", "intersection", "sides"):
        raise InvalidValueError(f"regions of the kind {kind!r} are not known to this version")
    left, right = (from_description(part) for part in content)
    return Combined(kind, left, right)


@lru_cache(maxsize=64)
def _table(region: Region) -> BandTable:
    from bandpo.table import BandTable

    return BandTable.build(region)
