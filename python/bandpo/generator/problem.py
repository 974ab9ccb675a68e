"""Two-outcome problems, whose solution is a bound."""

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
    """Evaluations of D of each problem, also after a selection from a batch."""

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

    logp: Float64Array  # of the token, at most 0
    upper: BoolArray  # whether everything else shrinks, and not the token
    shrinking: Float64Array
    growing: Float64Array
    # Square roots of the two: w f(u) is formed in two steps, so that a probability below the
    # min float still meets a large f(u).
    half_shrinking: Float64Array
    half_growing: Float64Array
    odds: Float64Array  # shrinking / growing, which may overflow
    log_odds: Float64Array
    # True if the unknown is the ln of the growth in place of ln m, which is no float here, because
    # the shrinking outcome hardly changes at any growth within reach of the callable.
    by_growth: BoolArray
    tally: Tally

    @classmethod
    def of(cls, logp: Float64Array, upper: BoolArray, steep: bool) -> Problems:
        """The problems of tokens; ``steep`` if f'(inf) is infinite."""
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
        """The chosen problems."""
        return Problems._make(array[chosen] for array in self)


class Move(NamedTuple):
    """How the two outcomes of each problem change."""

    shrunk: Float64Array  # u of the outcome that shrinks, 1 - lost
    lost: Float64Array
    gained: Float64Array  # u - 1 of the outcome that grows


def move_by_unknown(problems: Problems, unknown: Float64Array) -> Move:
    """The move for an ``ln m``, or for an ``ln gained`` where that is the unknown."""
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
    """The move for a log-ratio of the token."""
    upper, logp = problems.upper, problems.logp
    excess = np.expm1(log_ratio)
    far = problems.log_odds > FAR_ODDS
    gained = np.where(upper, excess, -problems.odds * excess)
    lost = np.where(upper, excess / problems.odds, -excess)
    if far.any():
        gained = np.where(far & ~upper, np.exp(problems.log_odds + np.log(lost)), gained)
        lost = np.where(far & upper, np.exp(logp + log_ratio), lost)
    # Next to saturation, what is left of the others without cancellation.
    left = np.where(lost > 0.5, -np.expm1(logp + log_ratio) / problems.shrinking, 1.0 - lost)
    return Move(np.where(upper, left, np.exp(log_ratio)), lost, gained)
