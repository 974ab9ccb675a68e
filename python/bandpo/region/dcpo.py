"""`Dcpo`: the closed-form bounds of DCPO."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array, log_probs, positive_number
from bandpo.parts import in_parts
from bandpo.region.base import Curves, Region

_MAX_Y = 600.0
"""Max ``-logp`` that is exponentiated; 1/p overflows at 709."""


class Dcpo(Region):
    """The bounds of DCPO's dynamic clipping: ``|(r - 1) r| p <= eps`` (arXiv 2509.02333, Eq. 3-4).

    ``upper = (1 + sqrt(1 + 4 eps_high / p)) / 2`` and
    ``lower = (1 + sqrt(max(1 - 4 eps_low / p, 0))) / 2``, which is never below 1/2. The upper bound
    leaves the simplex for ``p > 1 / (1 + eps_high)``. DCPO caps it: ``Dcpo().cap(10)``.

    Args:
        eps_low: Epsilon of the lower bound, finite and above 0.
        eps_high: Epsilon of the upper bound, likewise.

    Raises:
        InvalidTypeError: If an epsilon is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, eps_low: float = 0.16, eps_high: float = 0.20) -> None:
        self.eps_low = positive_number("eps_low", eps_low)
        self.eps_high = positive_number("eps_high", eps_high)

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the closed forms; see `Region.log_bounds`."""
        tokens = log_probs("logp", logp)
        return (
            in_parts(lambda part: self._log_lower(np.maximum(-part, 0.0)), tokens),
            in_parts(lambda part: self._log_upper(np.maximum(-part, 0.0)), tokens),
        )

    def _log_upper(self, y: Float64Array) -> Float64Array:
        # With k = eps / p: r - 1 = 2 k / (1 + sqrt(1 + 4 k)).
        k = self.eps_high * np.exp(np.minimum(y, _MAX_Y))
        near = np.log1p(2.0 * k / (1.0 + np.sqrt(1.0 + 4.0 * k)))
        # Where 1/p overflows, r equals sqrt(k) in float64.
        far = 0.5 * (math.log(self.eps_high) + y)
        return np.asarray(np.where(y > _MAX_Y, far, near))

    def _log_lower(self, y: Float64Array) -> Float64Array:
        k = self.eps_low * np.exp(np.minimum(y, _MAX_Y))
        root = np.sqrt(np.maximum(1.0 - 4.0 * k, 0.0))
        return np.asarray(
            np.where(
                root == 0.0, math.log(0.5), np.log1p(-2.0 * np.minimum(k, 0.25) / (1.0 + root))
            )
        )

    def describe(self) -> dict[str, Any]:
        """Returns its two epsilons; see `Region.describe`."""
        return {"dcpo": [str(self.eps_low), str(self.eps_high)]}

    def curves(self, upper: bool) -> Curves:
        """Returns the closed form, and 1/2 beyond the kink below; see `Region.curves`."""
        if upper:
            return [(0.0, self._sample)]
        kink = self._kink()
        # A table has no grid below this y, where the bound exceeds 1/2 by less than 1e-6.
        return [(0.0, self._sample), (kink, 0.5)] if kink > 2e-12 else [(0.0, 0.5)]

    def _kink(self) -> float:
        """Returns the first float32 ``-logp`` at which the lower bound is 1/2."""
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
        # The -inf makes a table grade its grid towards the kink, as the square root needs; the
        # values themselves are not used, because the constant follows there.
        return np.where(-logp > self._kink(), -np.inf, log_bound), slope

    def __repr__(self) -> str:
        return f"Dcpo({self.eps_low!r}, {self.eps_high!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dcpo):
            return NotImplemented
        return (self.eps_low, self.eps_high) == (other.eps_low, other.eps_high)

    def __hash__(self) -> int:
        return hash((Dcpo, self.eps_low, self.eps_high))
