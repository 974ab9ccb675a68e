"""The max gradient that a mask can keep for the divergence that it spends."""

from __future__ import annotations

import numpy as np

from bandpo.check import Float64Array
from bandpo.replay.bins import BINS, bin_of


class Frontier:
    """Divergence and gradient of tokens by their price, which is the quotient of the two.

    Among masks that spend the same sum of divergences, the one that keeps the cheapest tokens keeps
    the most gradient. It is a fractional knapsack, because the gain is a sum; docs/replay.md has
    the proof. Prices are kept in bins, so that memory does not grow with the log; within a bin they
    differ by a factor of at most ``1 + 2^-11``, and so does the optimum from the exact one.
    """

    def __init__(self) -> None:
        self.divergence = np.zeros(BINS)
        self.gradient = np.zeros(BINS)
        self.whole = 0.0  # the gradient of all tokens, also of those with an infinite divergence

    def add(self, divergence: Float64Array, gradient: Float64Array) -> None:
        """Adds tokens by their divergence and the absolute value of their gradient, each [N]."""
        self.whole += float(gradient.sum())
        worth = (gradient > 0.0) & np.isfinite(divergence)
        with np.errstate(over="ignore"):
            index = bin_of(divergence[worth] / gradient[worth])
        self.divergence += np.bincount(index, divergence[worth], BINS)
        self.gradient += np.bincount(index, gradient[worth], BINS)

    def curve(self) -> tuple[Float64Array, Float64Array]:
        """Returns sums of divergence and the max gradients for them, both from 0, [K + 1]."""
        used = self.gradient > 0.0
        return tuple(  # type: ignore[return-value]
            np.concatenate([[0.0], np.cumsum(column[used])])
            for column in (self.divergence, self.gradient)
        )

    def share_at(self, divergence: float) -> float:
        """Returns the max share of the gradient for a sum of divergences; 1 without a gradient."""
        spent, kept = self.curve()
        return float(np.interp(divergence, spent, kept) / self.whole) if self.whole else 1.0
