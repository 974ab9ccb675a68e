"""Regions: maps from a token's old log-probability to the ratios it may take."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo import _core
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from bandpo.table import BandTable

Float64Array: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

_SMALLEST_POSITIVE = math.ulp(0.0)


def as_float64(argument: str, values: ArrayLike) -> Float64Array:
    """Returns real numbers as a float64 array.

    Raises:
        InvalidTypeError: If ``values`` is not made of real numbers; the message names ``argument``.
    """
    try:
        array = np.asarray(values)
    except ValueError as ragged:
        raise InvalidTypeError(f"{argument} must be an array of real numbers: {ragged}") from None
    if array.dtype.kind not in "fiu":
        raise InvalidTypeError(f"{argument} must hold real numbers, got dtype {array.dtype}")
    return array.astype(np.float64, copy=False)


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

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether each log-ratio lies in the region; the arguments broadcast.

        A NaN lies in no region.
        """
        logp, log_ratio = _broadcast(
            logp=as_float64("logp", logp), log_ratio=as_float64("log_ratio", log_ratio)
        )
        log_lower, log_upper = self.log_bounds(logp)
        return (log_lower <= log_ratio) & (log_ratio <= log_upper)


def _broadcast(**arrays: Float64Array) -> list[Float64Array]:
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InvalidValueError(f"shapes do not broadcast: {shapes}") from None


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
        self.eps_low = _as_number("eps_low", eps_low)
        self.eps_high = _as_number("eps_high", eps_high)
        if not 0.0 <= self.eps_low <= 1.0:
            raise InvalidValueError(f"eps_low must be in [0, 1], got {eps_low}")
        if not self.eps_high >= 0.0:
            raise InvalidValueError(f"eps_high must be at least 0, got {eps_high}")
        self.log_lower = math.log1p(-self.eps_low) if self.eps_low < 1.0 else -math.inf
        self.log_upper = math.log1p(self.eps_high)

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the same two bounds for every token; see `Region.log_bounds`."""
        unknown = np.where(np.isnan(as_float64("logp", logp)), np.nan, 0.0)
        return unknown + self.log_lower, unknown + self.log_upper

    def __repr__(self) -> str:
        return f"Clip({self.eps_low!r}, {self.eps_high!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clip):
            return NotImplemented
        return (self.eps_low, self.eps_high) == (other.eps_low, other.eps_high)

    def __hash__(self) -> int:
        return hash((Clip, self.eps_low, self.eps_high))


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
            self.delta_low, self.delta_high = (_as_number("delta", side) for side in delta)
        elif isinstance(delta, np.ndarray) and delta.ndim > 0:
            radii = as_float64("delta", delta).copy()
            radii.flags.writeable = False
            self.delta_low = self.delta_high = radii
        else:
            self.delta_low = self.delta_high = _as_number("delta", delta)
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
        tokens, low, high = self._with_radii(logp=as_float64("logp", logp))
        log_lower, log_upper = _core.log_bounds(self.divergence._core, low, high, _flat(tokens))
        return log_lower.reshape(tokens.shape), log_upper.reshape(tokens.shape)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether ``D_f <= delta`` at each log-ratio, by evaluating it, without any root.

        False outside the simplex (new probability above 1) and for NaN.
        """
        tokens, low, high, ratios = self._with_radii(
            logp=as_float64("logp", logp), log_ratio=as_float64("log_ratio", log_ratio)
        )
        inside: BoolArray = _core.contains(
            self.divergence._core, low, high, _flat(tokens), _flat(ratios)
        )
        return np.reshape(inside, tokens.shape)

    def _with_radii(self, **arrays: Float64Array) -> list[Any]:
        """The first array, the radii as the core takes them, then the rest; all broadcast."""
        if not isinstance(self.delta_low, np.ndarray):
            first, *rest = _broadcast(**arrays)
            return [first, self.delta_low, self.delta_high, *rest]
        first, radii, *rest = _broadcast(logp=arrays.pop("logp"), delta=self.delta_low, **arrays)
        return [first, _flat(radii), _flat(radii), *rest]

    def table(self) -> BandTable:
        """Returns the bounds as a lookup table, built once for each divergence and radius.

        Raises:
            InvalidValueError: If delta is an array.
        """
        if isinstance(self.delta_low, np.ndarray) or isinstance(self.delta_high, np.ndarray):
            raise InvalidValueError(
                "a table needs one delta for all tokens, got an array; use the exact solver"
            )
        return _table(self.divergence, self.delta_low, self.delta_high)

    def __repr__(self) -> str:
        if isinstance(self.delta_low, np.ndarray):
            delta: object = f"<array of shape {self.delta_low.shape}>"
        elif self.delta_low == self.delta_high:
            delta = self.delta_low
        else:
            delta = (self.delta_low, self.delta_high)
        return f"Band({self.divergence.spec!r}, {delta})"

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


def _as_number(argument: str, value: object) -> float:
    array = as_float64(argument, value)  # type: ignore[arg-type]
    if array.ndim != 0:
        raise InvalidTypeError(f"{argument} must be one number, got shape {array.shape}")
    return float(array)


def _flat(array: Float64Array) -> Float64Array:
    return np.ascontiguousarray(array).reshape(-1)


@lru_cache(maxsize=64)
def _table(divergence: Divergence, delta_low: float, delta_high: float) -> BandTable:
    from bandpo.table import BandTable

    return BandTable(_core.BandTable.build(divergence._core, delta_low, delta_high))
