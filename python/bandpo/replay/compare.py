"""`compare`: what each rule would have done to the tokens of a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.check import BoolArray, Float64Array, check_name
from bandpo.error import InvalidValueError
from bandpo.presets import Preset
from bandpo.record import LoggedTokens
from bandpo.region import Region
from bandpo.replay.action import Action, action_of
from bandpo.replay.chunk import DTYPES, SEGMENTS, Chunk, Piece, chunk_of, pieces_of
from bandpo.replay.estimate import GROUPS, Estimate, quotient
from bandpo.replay.frontier import Frontier
from bandpo.replay.rule import ReplayedRule, replayed_rule
from bandpo.replay.threads import in_threads

OF_TOKENS = ("tokens", "gradient", "gradient_squared", "loss", "kl", "tv")
"""Sums over the tokens without a rule: of 1, ``abs(A) r``, its square, ``-A r`` and divergences."""

OF_RULE = (
    "clipped_low",
    "clipped_high",
    "removed_low",
    "removed_high",
    "gradient_squared",
    "loss",
    "kl",
    "tv",
    "only",
)
"""Sums over the tokens under a rule: clipped ones, what it takes from the gradient of tokens with a
ratio below and above 1, the square of the gradient, the loss, the divergence of what it keeps, and
the tokens that no other rule clips."""


@dataclass
class RuleTotals:
    """Sums of one rule over the segments of a log, each [`SEGMENTS`]."""

    rule: ReplayedRule
    sums: dict[str, Float64Array] = field(
        default_factory=lambda: {name: np.zeros(SEGMENTS) for name in OF_RULE}
    )
    max_ratio: float = 0.0
    """Max ratio of a token with a gradient."""


@dataclass
class Comparison:
    """Sums over the tokens of a log, without a rule and under each.

    `rows_of` has them as shares with intervals of confidence.
    """

    rules: list[RuleTotals]
    sums: dict[str, Float64Array]
    frontier: Frontier
    sampled: int = 0
    """Tokens of the log."""
    unknown: int = 0
    """Tokens left out because a log-prob or the advantage is NaN."""

    def share(self, rule: RuleTotals, names: Iterable[str], of: str) -> Estimate:
        """Returns a sum of a rule as a share of a sum over the tokens, of the whole log."""
        return quotient(_by_group(_sum(rule, names)), _by_group(self.sums[of]))

    def share_by_bin(self, rule: RuleTotals, names: Iterable[str], of: str) -> list[Estimate]:
        """Returns the same for each bin of the old probability."""
        part, whole = _sum(rule, names), self.sums[of]
        bins = range(PROBABILITY_BINS)
        return [quotient(_in_bin(part, index), _in_bin(whole, index)) for index in bins]

    def gradient_norm(self, rule: RuleTotals) -> float:
        """Returns the norm of the gradient to the log-probs, as a share of that without a rule."""
        whole = self.sums["gradient_squared"].sum()
        return float(np.sqrt(rule.sums["gradient_squared"].sum() / whole)) if whole else 1.0

    def kept(self, rule: RuleTotals) -> float:
        """Returns the share of the gradient that the rule keeps."""
        whole = self.sums["gradient"].sum()
        removed = rule.sums["removed_low"].sum() + rule.sums["removed_high"].sum()
        return float(1.0 - removed / whole) if whole else 1.0

    def optimum(self, rule: RuleTotals) -> float:
        """Returns the share of the gradient that the best mask of the same KL keeps."""
        return self.frontier.share_at(rule.sums["kl"].sum())


def compare(
    logged: Iterable[LoggedTokens],
    rules: Sequence[str | Region | Preset],
    *,
    dtype: str = "float32",
    exact: bool = False,
) -> Comparison:
    """Returns what each rule would have done to the tokens of a log.

    Every number is an estimate of that of the whole run: a token counts as often as its weight.
    Memory does not grow with the log.

    Args:
        logged: Parts of a log, as `bandpo.record.read_tokens` yields them.
        rules: Texts such as "ppo", "kl@0.05" and "mask:kl@0.05", regions, or presets.
        dtype: Dtype of the loss in the run, "float32" or "float64".
        exact: Take the bounds from the exact solver.

    Raises:
        InvalidTypeError: If a rule has another type.
        InvalidValueError: If a rule cannot be read or replayed, is given twice, or none is given;
            or if the log has no token.
    """
    check_name("dtype", dtype, DTYPES)
    replayed = [replayed_rule(rule) for rule in rules]
    names = [rule.name for rule in replayed]
    if not names:
        raise InvalidValueError("rules must name at least one rule, as in kl@0.05, got none")
    for name in names:
        if names.count(name) > 1:
            raise InvalidValueError(f"rules must differ, got {name!r} twice")
    found = Comparison(
        [RuleTotals(rule) for rule in replayed],
        {name: np.zeros(SEGMENTS) for name in OF_TOKENS},
        Frontier(),
    )
    for part in in_threads(
        lambda piece: _part_of(found.rules, piece, DTYPES[dtype], exact), pieces_of(logged)
    ):
        _add(found, part)
    if not found.sampled:
        raise InvalidValueError("the log must have at least one token, got none")
    return found


class _Part(NamedTuple):
    """The sums of a chunk, and its columns for the frontier."""

    sampled: int
    unknown: int
    of_tokens: Float64Array  # [`OF_TOKENS`, `SEGMENTS`]
    of_rules: list[Float64Array]  # [`OF_RULE`, `SEGMENTS`] each
    max_ratios: list[float]
    divergence: Float64Array
    gradient: Float64Array


def _part_of(rules: Sequence[RuleTotals], piece: Piece, dtype: torch.dtype, exact: bool) -> _Part:
    chunk = chunk_of(piece, dtype)
    actions = [action_of(totals.rule, chunk, exact=exact) for totals in rules]
    unclipped = np.abs(chunk.unclipped)
    ones = np.ones_like(unclipped)
    columns = np.stack([ones, unclipped, unclipped**2, chunk.unclipped, chunk.kl, chunk.tv])
    clipped = [action.clipped_low | action.clipped_high for action in actions]
    alone = np.sum(clipped, axis=0, dtype=np.uint16) == 1
    log_ratio = chunk.log_ratio.numpy()
    passed = [log_ratio[action.slope != 0.0].max(initial=-np.inf) for action in actions]
    sampled = len(piece.part.old_log_prob)
    return _Part(
        sampled,
        sampled - len(unclipped),
        chunk.sums(columns),
        [
            chunk.sums(_columns(chunk, action, own & alone))
            for action, own in zip(actions, clipped, strict=True)
        ],
        np.exp(np.array(passed, dtype=np.float64)).tolist(),
        chunk.kl * chunk.weight,
        unclipped * chunk.weight,
    )


def _add(found: Comparison, part: _Part) -> None:
    found.sampled += part.sampled
    found.unknown += part.unknown
    for name, sums in zip(OF_TOKENS, part.of_tokens, strict=True):
        found.sums[name] += sums
    for totals, of_rule, ratio in zip(found.rules, part.of_rules, part.max_ratios, strict=True):
        for name, sums in zip(OF_RULE, of_rule, strict=True):
            totals.sums[name] += sums
        totals.max_ratio = max(totals.max_ratio, ratio)
    found.frontier.add(part.divergence, part.gradient)


def _columns(chunk: Chunk, action: Action, only: BoolArray) -> Float64Array:
    """The columns of `OF_RULE`."""
    columns = np.empty((len(OF_RULE), len(only)))
    low, high, removed_low, removed_high, squared, loss, kl, tv, of_only = columns
    low[:], high[:], of_only[:], loss[:] = (
        action.clipped_low,
        action.clipped_high,
        only,
        action.loss,
    )
    np.square(action.slope, out=squared)
    removed = np.abs(np.subtract(chunk.unclipped, action.slope, out=removed_high), out=removed_high)
    np.multiply(removed, chunk.below, out=removed_low)
    removed_high -= removed_low
    # The share of its gradient that a token keeps; all of it where there is none to keep.
    kept = np.ones_like(removed)
    np.divide(action.slope, chunk.unclipped, out=kept, where=chunk.unclipped != 0.0)
    np.clip(kept, 0.0, 1.0, out=kept)
    # A divergence may be infinite where nothing is kept.
    np.multiply(chunk.kl, kept, out=kl)
    np.multiply(chunk.tv, kept, out=tv)
    kl[kept == 0.0] = 0.0
    return columns


def _sum(rule: RuleTotals, names: Iterable[str]) -> Float64Array:
    return np.asarray(np.sum([rule.sums[name] for name in names], axis=0))


def _by_group(sums: Float64Array) -> Float64Array:
    return np.asarray(sums.reshape(GROUPS, PROBABILITY_BINS).sum(1))


def _in_bin(sums: Float64Array, index: int) -> Float64Array:
    return sums.reshape(GROUPS, PROBABILITY_BINS)[:, index]
