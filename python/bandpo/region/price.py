"""`PriceBand`: every ratio up to which the next bit of probability has at most a given price."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bandpo import _core
from bandpo.check import (
    BoolArray,
    Float64Array,
    broadcast,
    flat,
    float64_array,
    log_probs,
    positive_number,
)
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region.base import Curves, Region


class PriceBand(Region):
    """Every ratio r with ``-low <= f'(r) - f'(c) <= high``, where ``c = (1 - r p)/(1 - p)``.

    ``f'(r) - f'(c)`` is the *price* of moving a token of old probability p to the ratio r: the
    derivative of `Band`'s divergence by the new probability. It is 0 at ``r = 1`` and rises with r.
    A budget of divergence is split between tokens for the largest first-order gain by an equal
    price for equal advantages; a `Band` splits it by an equal radius. The proof is in
    docs/numerics.md. It is of first order: no experiment of this project has compared the two.

    A rare token may rise to the ratio with ``f'(r) = f'(1) + high``: for ``"kl"``, KL(old || new),
    ``1/(1 - high)``, and without limit as p falls if ``high >= 1``. ``"hockey-stick:1.2"`` with a
    price below 1 is ``r <= 1.2`` for every token, PPO's clip, inside the simplex.

    At a jump of f' the region ends at the largest ratio whose price is at most the given one. So
    ``"tv"`` allows nothing below a price of 1 and everything from there on. Renyi and Bhattacharyya
    have the f, and the price, of ``alpha`` and ``hellinger``. The bounds are as exact as `Band`'s.

    Args:
        divergence: A `Divergence` or the name of one, such as ``"kl"``; not one of a Python
            function, because f' is needed.
        price: The max price, finite and above 0: a number, or a pair ``(low, high)`` for the lower
            and the upper side.

    Raises:
        InvalidTypeError: If an argument has the wrong type, or the divergence is made from a Python
            function.
        InvalidValueError: If the divergence is not known or a price is not finite and above 0.
    """

    def __init__(
        self, divergence: Divergence | str, price: float | tuple[float, float] | list[float]
    ) -> None:
        self.divergence = (
            divergence if isinstance(divergence, Divergence) else Divergence(divergence)
        )
        if isinstance(price, (tuple, list)):
            if len(price) != 2:
                raise InvalidValueError(
                    f"price must be a pair (low, high), got {len(price)} values"
                )
            low, high = price
        elif np.ndim(price) == 0:
            low = high = price
        else:
            raise InvalidTypeError(
                f"price must be a number or a pair (low, high), got {type(price).__name__}"
            )
        self.price_low = positive_number("price", low)
        self.price_high = positive_number("price", high)
        core = self.divergence.solver.core
        if core is None:
            raise InvalidTypeError(
                f"PriceBand needs f', which {self.divergence!r} does not give; write f as text: "
                "Divergence.from_expression(...)"
            )
        self._core = _core.PriceBand(core, self.price_low, self.price_high)

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the exact ``(log_lower, log_upper)``; see `Region.log_bounds`."""
        tokens = log_probs("logp", logp)
        log_lower, log_upper = self._core.log_bounds(flat(tokens))
        return log_lower.reshape(tokens.shape), log_upper.reshape(tokens.shape)

    def contains(self, logp: ArrayLike, log_ratio: ArrayLike) -> BoolArray:
        """Returns whether the price is allowed at each log-ratio, by evaluating it, without a root.

        False outside the simplex (new probability above 1) and for NaN. The arguments broadcast.
        """
        tokens, ratios = broadcast(
            logp=log_probs("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        inside = self._core.contains(flat(tokens), flat(ratios))
        return np.asarray(inside.reshape(tokens.shape), dtype=np.bool_)

    def describe(self) -> dict[str, Any]:
        """Returns its divergence and prices; see `Region.describe`."""
        return {"price": {**self.divergence.describe(), "price": [self.price_low, self.price_high]}}

    def curves(self, upper: bool) -> Curves:
        """Returns its one curve; see `Region.curves`."""
        return [(0.0, self._core)]

    def __repr__(self) -> str:
        low, high = self.price_low, self.price_high
        by_name = "divergence" in self.divergence.describe()
        source = repr(self.divergence.spec) if by_name else repr(self.divergence)
        return f"PriceBand({source}, {low if low == high else (low, high)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PriceBand):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash((PriceBand, self._key()))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return PriceBand, (self.divergence, (self.price_low, self.price_high))

    def _key(self) -> tuple[Divergence, float, float]:
        return self.divergence, self.price_low, self.price_high
