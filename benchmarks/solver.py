"""Exact bounds: both sides of every token, from a call on a numpy array."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

import bandpo
from bandpo import _core
from benchmarks import peers
from benchmarks.availability import need_patience
from benchmarks.interleaved import Comparison, compare
from benchmarks.tokens import DELTA, SIZES, log_probs, undecided

DIVERGENCES = tuple(_core.DIVERGENCES)
"""Each built-in divergence, with a parameter if its family has one."""

EXPRESSION = "u*ln(u) - u + 1"

TEXTS = (
    *("-ln(u) + u - 1", "(u-1)^2", "(sqrt(u)-1)^2", "0.3*(u*ln(u)-u+1) + 0.7*(u-1)^2"),
    *("abs(u-1)", "(u^1.3 - 1 - 1.3*(u-1))/0.39"),
)
"""Typical expressions: sums, a mixture, a kink and a general power."""

ORDERS = ("alpha:-0.5", "alpha:0.3", "alpha:1.37", "renyi:3.5", "vajda:4")
"""Orders without special formulas."""

PEER_DIVERGENCES = ("kl", "reverse-kl", "jensen-shannon")
"""Divergences that `peers.find_root` solves."""

METHODS = ("bandpo", "find_root")
DTYPES = ("float64", "float32")

SIZE = 2**14
"""Number of tokens, except in `Growth`."""

LONG_FROM = 2**20

ROOTS_A_TOKEN = 2


def region(divergence: str) -> bandpo.Band:
    """Returns a band of a built-in divergence or of an expression, without a table."""
    if divergence in (*DIVERGENCES, *ORDERS):
        return bandpo.Band(divergence, DELTA)
    return bandpo.Band(bandpo.Divergence.from_expression(divergence), DELTA)


def bounds(
    method: str,
    divergence: str,
    size: int = SIZE,
    dtype: str = "float64",
    data: Callable[[int], NDArray[np.float64]] = log_probs,
) -> Callable[[], object]:
    """Returns the call that finds both bounds of every token."""
    if method == "find_root":
        if divergence not in PEER_DIVERGENCES:
            raise NotImplementedError(f"find_root has no {divergence}")
        tokens = undecided(size)
        return lambda: peers.find_root(divergence, tokens, DELTA)
    logp = data(size).astype(dtype)
    band = region(divergence)
    return lambda: band.log_bounds(logp)


def compare_to_find_root(divergence: str, size: int = SIZE, seconds: float = 2.0) -> Comparison:
    """Times both on tokens whose two bounds are roots, which favours scipy."""
    ours, peer = (bounds(method, divergence, size, data=undecided) for method in METHODS)
    return compare(ours, peer, seconds=seconds)


class Bounds:
    """Times of every divergence; find_root takes tokens whose two bounds are roots."""

    params: ClassVar = [METHODS, (*DIVERGENCES, EXPRESSION, *ORDERS, *TEXTS)]
    param_names: ClassVar = ["method", "divergence"]
    timeout = 300

    def setup(self, method: str, divergence: str) -> None:
        """Prepares the call; raises NotImplementedError if a requirement is missing."""
        self.call = bounds(method, divergence, SIZE)

    def time_log_bounds(self, *_: object) -> None:
        """Times both bounds of all tokens."""
        self.call()


class Growth:
    """Times of kl, at every size."""

    params: ClassVar = [METHODS, SIZES, DTYPES]
    param_names: ClassVar = ["method", "size", "dtype"]
    timeout = 600

    def setup(self, method: str, size: int, dtype: str) -> None:
        """Prepares the call; raises NotImplementedError if a requirement is missing."""
        if size >= LONG_FROM:
            need_patience()
        self.call = bounds(method, "kl", size, dtype)

    def time_log_bounds(self, *_: object) -> None:
        """Times both bounds of all tokens."""
        self.call()


class Ratio:
    """Times relative to scipy's, in turns in one process."""

    params: ClassVar = [PEER_DIVERGENCES]
    param_names: ClassVar = ["divergence"]
    timeout = 300

    def track_time_ratio_to_find_root(self, divergence: str) -> float:
        """Returns the time over that of find_root, for the same roots."""
        return compare_to_find_root(divergence).ratio

    track_time_ratio_to_find_root.unit = "ratio"  # type: ignore[attr-defined]
