"""`Band`: every ratio within an f-divergence of the old policy."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo.check import (
    BoolArray,
    Float64Array,
    broadcast,
    flat,
    float64_array,
    log_probs,
    real_number,
)
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region.base import Curves, Region


class Status(IntEnum):
    """Origin of a bound in `Band.diagnose`."""

    CONVERGED = 0
    """The equation D = delta was solved."""
    SATURATED = 1
    """The whole side is allowed: exactly -inf or -logp."""
    LIMIT = 2
    """A limit: logp is 0 or -inf, or a Python function cannot be evaluated beyond."""
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
    """Evaluations of D_f, two of f each, by the scalar solver; docs/accuracy.md gives the max."""


class Diagnosis(NamedTuple):
    """Result of `Band.diagnose`."""

    lower: SideDiagnosis
    upper: SideDiagnosis


class Band(Region):
    """Every ratio for which ``D_f <= delta`` holds for {this token, everything else}.

    ``D_f(p, r) = p f(r) + (1-p) f((1 - r p)/(1-p))`` (BandPO, arXiv 2603.04918). It bounds a
    token's ratio; it does not bound the divergence of the whole policy after an update of shared
    parameters.

    The bounds are exact: within 1e-14 of the true log bound, relatively, and on its inner side.

    ``"kl"`` is KL(old || new), the paper's direction; ``"reverse-kl"`` is KL(new || old). The
    paper takes delta 0.05 for ``"kl"``. In small trials of this project, on one toy task, 0.002 to
    0.01 did better where some rewards were wrong; other tasks were not tried.

    Without `Region.cap` the upper bound grows without limit as p falls: for kl and 0.05 it is 495
    at p = 1e-4 and 48 782 at 1e-6. One rare token may then take almost the whole gradient of a
    batch. The paper caps ratios at 10: ``Band("kl", 0.05).cap(10)``.

    Args:
        divergence: A `Divergence` or the name of one, such as ``"kl"``.
        delta: The radius of the trust region: a number, a pair ``(low, high)`` for the lower and
            the upper side, or a numpy array that broadcasts with the log-probabilities.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If the divergence is not known or a delta is not finite and above 0.
    """

    def __init__(
        self,
        divergence: Divergence | str,
        delta: float | tuple[float, float] | list[float] | NDArray[Any],
    ) -> None:
        self.divergence = (
            divergence if isinstance(divergence, Divergence) else Divergence(divergence)
        )
        self.delta_low: float | Float64Array
        self.delta_high: float | Float64Array
        if isinstance(delta, (tuple, list)):
            if len(delta) != 2:
                raise InvalidValueError(
                    f"delta must be a pair (low, high), got {len(delta)} values"
                )
            self.delta_low, self.delta_high = (real_number("delta", side) for side in delta)
        elif isinstance(delta, np.ndarray) and delta.ndim > 0:
            deltas = float64_array("delta", delta).copy()
            deltas.flags.writeable = False
            self.delta_low = self.delta_high = deltas
        else:
            try:
                self.delta_low = self.delta_high = real_number("delta", delta)
            except InvalidTypeError:
                raise InvalidTypeError(
                    f"delta must be a number, a pair (low, high) or a numpy array, got "
                    f"{type(delta).__name__}; bandpo.schedule.ScheduledBand has one that changes"
                ) from None
        for side in (self.delta_low, self.delta_high):
            allowed = (np.asarray(side) > 0.0) & np.isfinite(side)
            if not np.all(allowed):
                refused = np.asarray(side)[~allowed].flat[0]
                raise InvalidValueError(f"delta must be finite and above 0, got {refused}")

    @property
    def per_token(self) -> bool:
        """True if delta is an array, one for every token."""
        return isinstance(self.delta_low, np.ndarray)

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the exact ``(log_lower, log_upper)``; see `Region.log_bounds`.

        Raises:
            InvalidValueError: If ``logp`` and an array of deltas do not broadcast.
        """
        tokens, low, high = self._with_deltas(logp=log_probs("logp", logp))
        log_lower, log_upper = self.divergence.solver.log_bounds(low, high, flat(tokens))
        return log_lower.reshape(tokens.shape), log_upper.reshape(tokens.shape)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether ``D_f <= delta`` at each log-ratio, by evaluating it, without any root.

        False outside the simplex (new probability above 1) and for NaN.
        """
        tokens, low, high, ratios = self._with_deltas(
            logp=log_probs("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        inside = self.divergence.solver.contains(low, high, flat(tokens), flat(ratios))
        return np.asarray(inside.reshape(tokens.shape), dtype=np.bool_)

    def diagnose(self, logp: ArrayLike) -> Diagnosis:
        """Returns the bounds and the origin of each; an element that fails leaves the others.

        Raises:
            InvalidValueError: If ``logp`` and an array of deltas do not broadcast, or a Python
                function of the divergence fails.
        """
        tokens, low, high = self._with_deltas(logp=float64_array("logp", logp))

        def side(delta: float | Float64Array, upper: bool) -> SideDiagnosis:
            found = self.divergence.solver.diagnose(delta, flat(tokens), upper)
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
                saturated at ``p``, so that no finite delta belongs to it; or if the other
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

    def _with_deltas(self, **arrays: Float64Array) -> list[Any]:
        """Returns the first array, both deltas for the core, then the rest, all broadcast."""
        if not isinstance(self.delta_low, np.ndarray):
            first, *rest = broadcast(**arrays)
            return [first, self.delta_low, self.delta_high, *rest]
        first, deltas, *rest = broadcast(logp=arrays.pop("logp"), delta=self.delta_low, **arrays)
        return [first, flat(deltas), flat(deltas), *rest]

    def describe(self) -> dict[str, Any]:
        """Returns its divergence and deltas; see `Region.describe`."""
        low, high = self._deltas_of_a_table()
        return {"band": {**self.divergence.describe(), "delta": [low, high]}}

    def _deltas_of_a_table(self) -> tuple[float, float]:
        if isinstance(self.delta_low, np.ndarray) or isinstance(self.delta_high, np.ndarray):
            raise InvalidValueError(
                "a table needs one delta for all tokens, got an array; use the exact solver"
            )
        return self.delta_low, self.delta_high

    def curves(self, upper: bool) -> Curves:
        """Returns its one curve; see `Region.curves`."""
        low, high = self._deltas_of_a_table()
        return [(0.0, self.divergence.solver.curve(low, high, upper))]

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
