"""`Clip`: a constant interval of ratios."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array, log_probs, positive_number, real_number
from bandpo.error import ClipWarning, InvalidValueError, caller_level
from bandpo.parts import in_parts
from bandpo.region.base import Curves, Region


class Clip(Region):
    """The constant interval ``[1 - eps_low, 1 + eps_high]`` of PPO and its variants.

    ``Clip(0.2)`` is PPO's, ``Clip(0.2, 0.28)`` DAPO's clip-higher, ``Clip(1, inf)`` does not clip.
    The arguments are widths; `Clip.between` takes the ends: ``Clip(0.2, 0.28)`` is
    ``Clip.between(0.8, 1.28)``. A low width between 0.5 and 1 with a high one between 1 and 2 gives
    a `ClipWarning`, because they are more likely ends.

    Args:
        eps_low: How far below 1 the ratio may fall, in [0, 1].
        eps_high: How far above 1 it may rise, at least 0, inf allowed; ``eps_low`` if left out.

    Raises:
        InvalidTypeError: If an epsilon is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, eps_low: float, eps_high: float | None = None) -> None:
        self._set(eps_low, eps_low if eps_high is None else eps_high)
        if self.has_likely_ends:
            meant = Clip.between(self.eps_low, self.eps_high)
            warnings.warn(
                f"Clip({self.eps_low}, {self.eps_high}) takes widths and allows ratios from "
                f"{1.0 - self.eps_low:.6g} to {1.0 + self.eps_high:.6g}: for ratios from "
                f"{self.eps_low} to {self.eps_high} write {meant!r}, or Clip.between with the ends",
                ClipWarning,
                stacklevel=caller_level(),
            )

    @classmethod
    def _of(cls, eps_low: float, eps_high: float) -> Clip:
        """The clip of two widths that are known to be meant as such."""
        clip = cls.__new__(cls)
        clip._set(eps_low, eps_high)
        return clip

    def _set(self, eps_low: float, eps_high: float) -> None:
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
    def between(cls, lower: float, upper: float) -> Clip:
        """Returns the interval with these two ends.

        >>> Clip.between(0.8, 1.28)
        Clip(0.2, 0.28)

        Args:
            lower: Min ratio, in [0, 1].
            upper: Max ratio, at least 1, inf allowed.

        Raises:
            InvalidTypeError: If an end is not a real number.
            InvalidValueError: If it is out of range.
        """
        low, high = real_number("lower", lower), real_number("upper", upper)
        if not 0.0 <= low <= 1.0:
            raise InvalidValueError(f"lower must be in [0, 1], got {lower}")
        if not high >= 1.0:
            raise InvalidValueError(f"upper must be at least 1, got {upper}")
        # The widths that a user would write: 1 - 0.8 is not 0.2 in binary.
        return cls._of(_rounded(1.0 - low, low), _rounded(high - 1.0, high))

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
            clip = cls._of(float(-np.expm1(-low)), float(np.expm1(high)))
        # As given, because an epsilon next to 1 has lost the digits of a log bound.
        clip.log_lower, clip.log_upper = -low, high
        return clip

    @classmethod
    def kl3(cls, delta: float) -> Clip:
        """Returns the ratios with ``r - 1 - ln r <= delta`` (arXiv 2602.05494).

        They are ``[-W0(-e^(-1-delta)), -W-1(-e^(-1-delta))]``, with Lambert's W. The left side is
        Schulman's estimator k3 of a KL divergence in the ratio r = new/old. For old/new the bounds
        are the reciprocals of these.

        Args:
            delta: Max value of the estimator, finite and above 0.

        Raises:
            InvalidTypeError: If ``delta`` is not a real number.
            InvalidValueError: If it is out of range.
        """
        value = positive_number("delta", delta)
        return cls.from_log_ratio(-_kl3_root(value, -1.0), _kl3_root(value, 1.0))

    @property
    def has_likely_ends(self) -> bool:
        """True if the widths are more likely meant as the ends of the interval."""
        return 0.5 < self.eps_low < 1.0 < self.eps_high < 2.0

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the same two bounds for every token; see `Region.log_bounds`."""
        tokens = log_probs("logp", logp)
        return _constant(self.log_lower, tokens), _constant(self.log_upper, tokens)

    def describe(self) -> dict[str, Any]:
        """Returns its two epsilons, or its widths in the log-ratio; see `Region.describe`."""
        kind, low, high = self._widths()
        return {kind: [str(low), str(high)]}

    def _widths(self) -> tuple[str, float, float]:
        """Returns a constructor's kind and the arguments that make the same clip bit for bit."""
        plain = Clip._of(self.eps_low, self.eps_high)
        if plain == self:
            return "clip", self.eps_low, self.eps_high
        return "log-clip", -self.log_lower, self.log_upper

    def curves(self, upper: bool) -> Curves:
        """Returns the constant ratio of the side; see `Region.curves`."""
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


def _rounded(width: float, end: float) -> float:
    """The width with as many decimals as the end; of such ends 1 is a whole distance away."""
    text = repr(end)
    decimals = len(text.partition(".")[2])
    if "e" not in text and decimals <= 13 and end < 100.0:  # the error of the width is below 1e-13
        return round(width, decimals)
    from decimal import Decimal  # late, because its import is slow and few ends need it

    return float(abs(Decimal(text) - 1))


def _kl3_root(delta: float, sign: float) -> float:
    """The log-ratio t of the sign with ``e^t - 1 - t = delta``."""
    # Newton's method converges monotonically from outside, because the left side is convex. It
    # starts from r <= 1 + sqrt(2 delta) + delta (Chatzigeorgiou, 2013), mirrored on the lower side.
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


def _constant(bound: float, tokens: Float64Array) -> Float64Array:
    """The bound at each token, NaN where its log-prob is."""
    return in_parts(lambda part: np.where(np.isnan(part), np.nan, bound), tokens)
