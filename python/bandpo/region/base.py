"""`Region`: bounds, membership, a table, and the operators that combine regions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from bandpo import _core
from bandpo.check import BoolArray, Float64Array, broadcast, float64_array, log_probs, real_number
from bandpo.divergence import Sampler
from bandpo.error import InvalidValueError, MissingExtraError
from bandpo.parts import in_parts
from bandpo.region.live import Live

if TYPE_CHECKING:
    from bandpo.table import BandTable


Curve: TypeAlias = float | tuple[_core.Divergence, float] | _core.PriceBand | Sampler
"""A constant ratio, a compiled divergence with its delta or price, or a smooth function."""

Curves: TypeAlias = list[tuple[float, Curve]]
"""Curves that follow each other, each with the ``-logp`` where it begins; the first begins at 0."""

_MIN_POSITIVE = math.ulp(0.0)


class Region(Live, ABC):
    """A map from an old log-probability to the log-ratios a token may take.

    ``log_lower(logp) <= 0 <= log_upper(logp)``. Log-probabilities up to 0.05, which rounding
    makes, count as 0. A NaN gives NaN, for that element alone.
    """

    @abstractmethod
    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns ``(log_lower, log_upper)``: natural, float64, in the shape of ``logp``.

        Args:
            logp: Old log-probabilities (natural), real numbers, any shape.

        Raises:
            InvalidTypeError: If ``logp`` does not hold real numbers, or has masked elements.
            InvalidValueError: If a log-probability is above 0.05, as a probability is.
        """

    def bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns ``(lower, upper)``, the bounds of the ratio new/old itself.

        A finite ``log_lower`` gives at least the smallest positive float: 0 means that the ratio
        may be 0. An ``upper`` beyond the max float is inf.
        """
        log_lower, log_upper = self.log_bounds(logp)
        with np.errstate(over="ignore", under="ignore"):
            return in_parts(_lower_ratio, log_lower), in_parts(np.exp, log_upper)

    @property
    def per_token(self) -> bool:
        """True if the bounds depend on more than logp, so that no table can hold them."""
        return True

    def describe(self) -> dict[str, Any]:
        """Returns a description, for JSON, from which `from_description` makes the same region.

        Raises:
            InvalidValueError: If the region cannot be described.
        """
        raise InvalidValueError(f"{self!r} cannot be described")

    def curves(self, upper: bool) -> Curves:
        """Returns the smooth curves that make up one side, from which a table is built.

        A table holds up to eight of them a side. A region without a table does not need this.

        Args:
            upper: True for ``log_upper``, False for ``log_lower``.

        Returns:
            Pairs ``(start, curve)`` in rising order. ``start`` is the ``-logp`` where the curve
            begins, 0 for the first. ``curve`` is smooth up to the next start. It is a constant
            ratio; or a function from ``(upper, logp)`` to the log bounds and their slopes in logp,
            each float64 in the shape of ``logp``; or a compiled divergence with its delta or price.

        Raises:
            InvalidValueError: If the region cannot be tabulated.
        """
        raise InvalidValueError(f"{self!r} cannot be tabulated")

    def table(self) -> BandTable:
        """Returns the bounds as a lookup table, built once for each region.

        A table keeps to the simplex, ``log_upper <= -logp``, which `Clip`, `Dcpo` and their unions
        do not. So it differs from the solver for a new probability that rounding puts above 1, and
        in the width that soft-gate and quadratic divide by, where ``1/p`` is the nearer bound.

        Raises:
            InvalidValueError: If a delta is an array, or a side has more than eight smooth pieces.
        """
        return _table(self)

    def __or__(self, other: Region) -> Region:
        """The union: the wider bound of the two on each side."""
        return _combined("union", self, other)

    def __and__(self, other: Region) -> Region:
        """The intersection: the narrower bound of the two on each side."""
        return _combined("intersection", self, other)

    def cap(self, upper: float) -> Region:
        """Returns this region with ratios above ``upper`` taken out.

        Raises:
            InvalidTypeError: If ``upper`` is not a real number.
            InvalidValueError: If it is below 1.
        """
        limit = real_number("upper", upper)
        if not limit >= 1.0:
            raise InvalidValueError(f"upper must be at least 1, got {upper}")
        from bandpo.region.clip import Clip

        return self & Clip(1.0, limit - 1.0)

    def at_least(self, eps_low: float, eps_high: float | None = None) -> Region:
        """Returns this region with ``[1 - eps_low, 1 + eps_high]`` added: a minimum width.

        The arguments and errors are those of `Clip`.
        """
        from bandpo.region.clip import Clip

        return self | Clip(eps_low, eps_high)

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; None without matplotlib or with a delta per token."""
        try:
            from bandpo import plot

            return plot.update_figure({repr(self): self})._repr_png_()
        except (MissingExtraError, InvalidValueError):
            return None

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether each log-ratio lies in the region; the arguments broadcast.

        A NaN lies in no region.
        """
        logp, log_ratio = broadcast(
            logp=log_probs("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        log_lower, log_upper = self.log_bounds(logp)
        return in_parts(_between, log_lower, log_ratio, log_upper, dtype=np.bool_)


def _between(low: Float64Array, value: Float64Array, high: Float64Array) -> BoolArray:
    inside: BoolArray = (low <= value) & (value <= high)
    return inside


def _lower_ratio(log_lower: Float64Array) -> Float64Array:
    """The ratios, above 0 where the log bounds are finite."""
    lower = np.exp(log_lower)
    underflowed = (lower == 0.0) & (log_lower > -np.inf)
    return np.asarray(np.where(underflowed, _MIN_POSITIVE, lower))


def _combined(kind: Literal["union", "intersection"], left: Region, right: object) -> Region:
    """Returns the combination; the import is lazy because `Combined` is a `Region` itself."""
    from bandpo.region.combined import Combined

    return Combined(kind, left, right) if isinstance(right, Region) else NotImplemented


@lru_cache(maxsize=64)
def _table(region: Region) -> BandTable:
    from bandpo.table import BandTable

    return BandTable.build(region)
