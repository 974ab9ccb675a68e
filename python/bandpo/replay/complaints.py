"""`complaints_of`: what is wrong with a log, or with the run that wrote it, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bandpo.check import Float64Array
from bandpo.record import LoggedTokens
from bandpo.replay.chunk import known_tokens
from bandpo.replay.estimate import GROUPS, Estimate, group_of, quotient

SURE = 1e-3
"""Share of log-probs above 0.05 from which they are no rounding errors."""

PADDING = 0.02
"""Share of tokens whose log-probs are both exactly 0, from which they are padding."""

BFLOAT16_STEP = 2.0**-8
"""Relative distance of neighbouring bfloat16 numbers."""

TAIL = 0.01
"""Share of tokens with old and rollout apart by `FAR` from which the mismatch has a heavy tail."""

FAR = 0.5

ALIKE = 0.99
"""Correlation of the log-odds of old and rollout from which one is the other, scaled."""

SCALED = 0.03
"""Distance of that scale from 1 that is no rounding."""

RISEN = 1e-3
"""Mean log-ratio that training on the tokens does not make."""


class Complaint(NamedTuple):
    """One finding: its name, and a sentence with the numbers and what to change."""

    name: str
    text: str


class Facts:
    """Sums over a log, from which its complaints follow."""

    def __init__(self) -> None:
        self.tokens = 0
        self.unknown = 0
        self.above_zero = 0
        self.in_unit = 0
        self.certain = 0
        self.bfloat16 = 0
        self.infinite = 0
        self.moved = 0
        self.advantages = 0
        self.far = 0
        self.rollout = 0
        self.odds = np.zeros(6)  # of log-odds: count, sums, squares and product of old and rollout
        self.log_ratio = np.zeros(GROUPS)
        self.count = np.zeros(GROUPS)

    def complaints(self) -> list[Complaint]:
        """Returns what is wrong with the parts so far; see `complaints_of`."""
        if not self.tokens:
            return [Complaint("empty", "The log has no token with numbers for its log-probs.")]
        checks = (
            _unknown,
            _infinite,
            _probabilities,
            _above_zero,
            _padding,
            _idle,
            _no_advantage,
            _bfloat16,
            _swapped,
            _temperature,
            _heavy_tail,
        )
        return [found for check in checks for found in check(self)]

    def add(self, part: LoggedTokens) -> None:
        """Adds a part of the log."""
        known = known_tokens(part)
        old, new, weight = part.old_log_prob[known], part.log_prob[known], part.weight[known]
        group = group_of(part.sequence, self.tokens + self.unknown)[known]
        self.unknown += int((~known).sum())
        self.tokens += len(old)
        self.above_zero += int(((old > 0.05) | (new > 0.05)).sum())
        self.in_unit += int(((old >= 0.0) & (old <= 1.0) & (new >= 0.0) & (new <= 1.0)).sum())
        certain = (old == 0.0) & (new == 0.0)
        self.certain += int(certain.sum())
        self.bfloat16 += int((_is_bfloat16(old) & _is_bfloat16(new)).sum())
        self.infinite += int((np.isinf(old) | np.isinf(new)).sum())
        self.moved += int((old != new).sum())
        self.advantages += int(np.count_nonzero(part.advantages[known]))
        if part.rollout_log_prob is not None:
            rollout = part.rollout_log_prob[known]
            self.rollout += int((~np.isnan(rollout)).sum())
            self.far += int((np.abs(old - rollout) > FAR).sum())
            self.odds += _moments(_log_odds(old), _log_odds(rollout))
        with np.errstate(invalid="ignore"):
            log_ratio = np.clip(new - old, -20.0, 20.0)
        for sums, column in (
            (self.log_ratio, log_ratio),
            (self.count, np.ones_like(log_ratio)),
        ):
            sums += np.bincount(group, weight * column, GROUPS)


def _log_odds(log_p: Float64Array) -> Float64Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(log_p - np.log(-np.expm1(log_p)))


def _moments(old: Float64Array, rollout: Float64Array) -> Float64Array:
    """Count, sums, sums of squares and of the product, of numbers that float32 can tell from 1."""
    inside = (np.abs(old) < 12.0) & (np.abs(rollout) < 12.0)
    x, y = old[inside], rollout[inside]
    return np.array([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])


def complaints_of(logged: Iterable[LoggedTokens]) -> list[Complaint]:
    """Returns what is wrong with a log, the gravest first; an empty list if nothing was found.

    The mean of ln r is at most 0 if the old policy drew the tokens (Jensen's inequality); it is
    judged by an interval of 95 % over groups of sequences. A temperature scales log-odds, exactly
    between two tokens and nearly between more.
    """
    facts = Facts()
    for part in logged:
        facts.add(part)
    return facts.complaints()


def _is_bfloat16(values: Float64Array) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    return np.asarray((bits & np.uint32(0xFFFF)) == 0)


def _unknown(facts: Facts) -> list[Complaint]:
    if not facts.unknown:
        return []
    return [
        Complaint(
            "nan",
            f"{facts.unknown} tokens have NaN as a log-prob or advantage, an infinite advantage or "
            f"two infinite log-probs. They are left out here, and make a loss NaN. Mask them, "
            f"or find where they come from.",
        )
    ]


def _infinite(facts: Facts) -> list[Complaint]:
    if not facts.infinite:
        return []
    return [
        Complaint(
            "infinite",
            f"{facts.infinite} tokens have an infinite log-prob in one of the two policies. The KL "
            f"of a rule that keeps them is infinite. A sampled token has that if top-k or top-p "
            f"cut it off in the other policy alone.",
        )
    ]


def _probabilities(facts: Facts) -> list[Complaint]:
    if facts.in_unit < facts.tokens or facts.certain == facts.tokens:
        return []
    return [
        Complaint(
            "probabilities",
            "All log-probs lie in [0, 1], as probabilities do. Log their natural logarithms.",
        )
    ]


def _above_zero(facts: Facts) -> list[Complaint]:
    if facts.above_zero <= SURE * facts.tokens or _probabilities(facts):
        return []
    return [
        Complaint(
            "above-zero",
            f"{_percent(facts.above_zero, facts.tokens)} of the tokens have a log-prob above 0.05, "
            f"which no probability has. Check that they are normalised logarithms, not logits.",
        )
    ]


def _padding(facts: Facts) -> list[Complaint]:
    if facts.certain <= PADDING * facts.tokens or facts.certain == facts.tokens:
        return []
    return [
        Complaint(
            "padding",
            f"{_percent(facts.certain, facts.tokens)} of the tokens have both log-probs exactly 0. "
            f"Padding has that. Check that the mask leaves out padding and prompts.",
        )
    ]


def _idle(facts: Facts) -> list[Complaint]:
    if facts.moved:
        return []
    return [
        Complaint(
            "ratios-are-1",
            "All ratios are 1, so no rule can act. Each batch has one optimiser step: take more "
            "(num_iterations in TRL, ppo_epochs or a smaller ppo_mini_batch_size in verl), or "
            "record later steps as well.",
        )
    ]


def _no_advantage(facts: Facts) -> list[Complaint]:
    if facts.advantages:
        return []
    return [
        Complaint(
            "no-advantage",
            "All advantages are 0, so no token has a gradient. In GRPO, groups whose rewards are "
            "all the same have that: check the rewards, or filter such groups.",
        )
    ]


def _bfloat16(facts: Facts) -> list[Complaint]:
    if facts.bfloat16 < facts.tokens or facts.certain == facts.tokens:
        return []
    return [
        Complaint(
            "bfloat16",
            f"All log-probs are bfloat16 numbers. Rounding alone moves the ratio of a token with "
            f"log-prob -5 by up to {math.expm1(5.0 * BFLOAT16_STEP):.1%}, and narrow regions clip "
            f"that. Compute log-probs in float32.",
        )
    ]


def _swapped(facts: Facts) -> list[Complaint]:
    mean = quotient(facts.log_ratio, facts.count)
    if not mean.low > RISEN or _probabilities(facts):
        return []
    return [
        Complaint(
            "swapped",
            f"The mean of ln(new/old) is {_interval(mean)}. It cannot be above 0 if the old policy "
            f"drew the tokens. Check that old and new log-probs are not swapped.",
        )
    ]


def _temperature(facts: Facts) -> list[Complaint]:
    count, old, rollout, old_squared, rollout_squared, product = facts.odds
    if count < 2:
        return []
    of_old, of_rollout = old_squared - old**2 / count, rollout_squared - rollout**2 / count
    if not (of_old > 0.0 and of_rollout > 0.0):
        return []
    correlation = (product - old * rollout / count) / math.sqrt(of_old * of_rollout)
    scale = math.sqrt(of_old / of_rollout)
    if correlation < ALIKE or abs(scale - 1.0) <= SCALED:
        return []
    return [
        Complaint(
            "temperature",
            f"The log-odds of old_log_prob are {scale:.3f} times those of rollout_log_prob, as if "
            f"its temperature were {1.0 / scale:.3f} of theirs. Compute both at the sampling "
            f"temperature.",
        )
    ]


def _heavy_tail(facts: Facts) -> list[Complaint]:
    if facts.far <= TAIL * facts.rollout:
        return []
    return [
        Complaint(
            "mismatch",
            f"{_percent(facts.far, facts.rollout)} of the tokens have old and rollout log-probs "
            f"more than {FAR} apart. The inference engine does not sample from the policy that the "
            f"trainer computes: see docs/mismatch.md for corrections.",
        )
    ]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} (95 %: {estimate.low:.4g} to {estimate.high:.4g})"
