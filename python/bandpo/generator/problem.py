"""Two-outcome problems, whose solutions are bounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray, Float64Array
from bandpo.generator.limits import (
    FAR_ODDS,
    LOG_REACH,
)


class Tally:
    """Counts the evaluations of D of each problem; a selection shares the counts of its batch."""

    def __init__(self, counts: NDArray[np.uint32], problems: NDArray[np.intp]) -> None:
        self.counts = counts
        self._problems = problems

    def __getitem__(self, chosen: BoolArray | NDArray[np.intp]) -> Tally:
        return Tally(self.counts, self._problems[chosen])

    def add(self) -> None:
        """Counts one evaluation of each problem."""
        self.counts[self._problems] += 1


class Problems(NamedTuple):
    """Two-outcome problems, one an element; arrays of one length."""

    logp: Float64Array
    """Log-probability of the token, at most 0."""
    upper: BoolArray
    """True if everything else shrinks, False if the token does."""
    shrinking: Float64Array
    """Probability w of the outcome that shrinks."""
    growing: Float64Array
    """Probability g of the outcome that grows."""
    half_shrinking: Float64Array
    """Square root of w: ``w f(u)`` is formed in two steps, otherwise a tiny w underflows."""
    half_growing: Float64Array
    """Square root of g, likewise."""
    odds: Float64Array
    """w / g, which may overflow."""
    log_odds: Float64Array
    by_growth: BoolArray
    """True if the unknown is ``ln gained`` in place of ``ln m``, because m is no float64."""
    tally: Tally

    @classmethod
    def of(cls, logp: Float64Array, upper: BoolArray, steep: bool) -> Problems:
        """Returns the problems of tokens; ``steep`` is True if f'(inf) is infinite."""
        token, others = np.exp(logp), -np.expm1(logp)
        half_token, half_others = np.exp(0.5 * logp), np.sqrt(others)
        shrinking = np.where(upper, others, token)
        growing = np.where(upper, token, others)
        log_others = np.where(token < 0.5, np.log1p(-token), np.log(others))
        log_odds = np.where(upper, log_others - logp, logp - log_others)
        return cls(
            logp,
            upper,
            shrinking,
            growing,
            np.where(upper, half_others, half_token),
            np.where(upper, half_token, half_others),
            shrinking / growing,
            log_odds,
            upper & (log_odds > LOG_REACH + 40.0) & steep,
            Tally(np.zeros(logp.size, dtype=np.uint32), np.arange(logp.size)),
        )

    def take(self, chosen: BoolArray | NDArray[np.intp]) -> Problems:
        """Returns the chosen problems."""
        return Problems._make(array[chosen] for array in self)


class Move(NamedTuple):
    """Changes of the two outcomes of each problem."""

    shrunk: Float64Array
    """u of the outcome that shrinks."""
    lost: Float64Array
    """1 - u of the outcome that shrinks."""
    gained: Float64Array
    """u - 1 of the outcome that grows."""


def move_by_unknown(problems: Problems, unknown: Float64Array) -> Move:
    """Returns the move for each unknown, ``ln m`` or ``ln gained``."""
    by_growth, log_odds = problems.by_growth, problems.log_odds
    log_m = np.where(by_growth, unknown - log_odds, unknown)
    m = np.exp(log_m)
    lost = -np.expm1(-m)
    gained = problems.odds * lost
    far = log_odds > FAR_ODDS
    if far.any():
        log_lost = np.where(log_m < -37.0, log_m, np.log(lost))
        log_gained = np.where(by_growth, unknown, log_odds + log_lost)
        gained[far] = np.exp(log_gained[far])
    return Move(np.exp(-m), lost, gained)


def move_by_log_ratio(problems: Problems, log_ratio: Float64Array) -> Move:
    """Returns the move for each log-ratio of the token."""
    upper, logp = problems.upper, problems.logp
    excess = np.expm1(log_ratio)
    far = problems.log_odds > FAR_ODDS
    gained = np.where(upper, excess, -problems.odds * excess)
    lost = np.where(upper, excess / problems.odds, -excess)
    if far.any():
        gained = np.where(far & ~upper, np.exp(problems.log_odds + np.log(lost)), gained)
        lost = np.where(far & upper, np.exp(logp + log_ratio), lost)
    # Next to saturation 1 - lost would cancel.
    left = np.where(lost > 0.5, -np.expm1(logp + log_ratio) / problems.shrinking, 1.0 - lost)
    return Move(np.where(upper, left, np.exp(log_ratio)), lost, gained)
