"""`compare`: what each rule would have done to the tokens of a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.check import Float64Array, check_name
from bandpo.error import InvalidValueError
from bandpo.presets import Preset
from bandpo.record import LoggedTokens
from bandpo.region import Region
from bandpo.replay.action import Action, action_of
from bandpo.replay.chunk import DTYPES, SEGMENTS, Chunk, Piece, chunk_of
from bandpo.replay.estimate import GROUPS, Estimate, quotient
from bandpo.replay.frontier import Frontier
from bandpo.replay.rule import ReplayedRule, replayed_rule
from bandpo.replay.sequences import pieces_for
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
    unclipped: dict[str, Float64Array]
    """The sums without the rule's clip: those of the log, or, if the rule has another ratio than
    that of the token, sums with that ratio."""
    sums: dict[str, Float64Array] = field(default_factory=lambda: _zeros(OF_RULE))
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
    """Tokens left out because a log-prob or the advantage is no number, or the latter infinite."""

    def share(self, rule: RuleTotals, names: Iterable[str], of: str) -> Estimate:
        """Returns a sum of a rule as a share of a sum over the tokens, of the whole log."""
        return quotient(_by_group(_sum(rule, names)), _by_group(rule.unclipped[of]))

    def share_by_bin(self, rule: RuleTotals, names: Iterable[str], of: str) -> list[Estimate]:
        """Returns the same for each bin of the old probability."""
        part, whole = _sum(rule, names), rule.unclipped[of]
        bins = range(PROBABILITY_BINS)
        return [quotient(_in_bin(part, index), _in_bin(whole, index)) for index in bins]

    def gradient_norm(self, rule: RuleTotals) -> float:
        """Returns the norm of the gradient to the log-probs, as a share of that without a rule."""
        whole = rule.unclipped["gradient_squared"].sum()
        return float(np.sqrt(rule.sums["gradient_squared"].sum() / whole)) if whole else 1.0

    def kept(self, rule: RuleTotals) -> float:
        """Returns the share of the gradient that the rule keeps."""
        whole = rule.unclipped["gradient"].sum()
        removed = rule.sums["removed_low"].sum() + rule.sums["removed_high"].sum()
        return float(1.0 - removed / whole) if whole else 1.0

    def optimum(self, rule: RuleTotals) -> float:
        """Returns the share of the gradient that the best mask of the same KL keeps.

        It is NaN for a ratio of sequences, whose gradient no mask of tokens has.
        """
        if rule.rule.has_own_ratio:
            return math.nan
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
            or if the log has no token, or not all tokens of its sequences and a rule takes these.
    """
    check_name("dtype", dtype, DTYPES)
    replayed = [replayed_rule(rule) for rule in rules]
    names = [rule.name for rule in replayed]
    if not names:
        raise InvalidValueError("rules must name at least one rule, as in kl@0.05, got none")
    for name in names:
        if names.count(name) > 1:
            raise InvalidValueError(f"rules must differ, got {name!r} twice")
    sums = _zeros(OF_TOKENS)
    found = Comparison(
        [RuleTotals(rule, _zeros(OF_TOKENS) if rule.has_own_ratio else sums) for rule in replayed],
        sums,
        Frontier(),
    )
    for part in in_threads(
        lambda piece: _part_of(replayed, piece, DTYPES[dtype], exact), pieces_for(replayed, logged)
    ):
        _add(found, part)
    if found.sampled == found.unknown:
        raise InvalidValueError(
            f"the log must have at least one token with numbers for both log-probs and the "
            f"advantage, got none in {found.sampled} tokens"
        )
    return found


class _Part(NamedTuple):
    """The sums of a chunk, and its columns for the frontier."""

    sampled: int
    unknown: int
    of_tokens: Float64Array  # [`OF_TOKENS`, `SEGMENTS`]
    unclipped: list[Float64Array | None]  # likewise, for each rule with a ratio of its own
    of_rules: list[Float64Array]  # [`OF_RULE`, `SEGMENTS`] each
    max_ratios: list[float]
    divergence: Float64Array
    gradient: Float64Array


def _part_of(rules: Sequence[ReplayedRule], piece: Piece, dtype: torch.dtype, exact: bool) -> _Part:
    chunk = chunk_of(piece, dtype)
    sampled, known = len(piece.part.old_log_prob), len(chunk.weight)
    unclipped: list[Float64Array | None] = []
    of_rules, clipped, max_ratios = [], [], []
    columns = np.empty((len(OF_RULE), known))  # one memory for all rules, which stays in the cache
    for rule in rules:
        action = action_of(rule, chunk, exact=exact)
        unclipped.append(_of_tokens(chunk, action.unclipped) if rule.has_own_ratio else None)
        passed = np.where(action.slope != 0.0, action.log_ratio, -np.inf)
        max_ratios.append(math.exp(passed.max(initial=-np.inf)))
        clipped.append(action.clipped)
        _fill(columns, chunk, action)
        of_rules.append(chunk.sums(columns))
    alone = np.sum(clipped, axis=0, dtype=np.uint16) == 1
    for sums, own in zip(of_rules, clipped, strict=True):
        [sums[OF_RULE.index("only")]] = chunk.sums((own & alone)[None].astype(np.float64))
    return _Part(
        sampled,
        sampled - known,
        _of_tokens(chunk, chunk.unclipped),
        unclipped,
        of_rules,
        max_ratios,
        chunk.kl * chunk.weight,
        np.abs(chunk.unclipped) * chunk.weight,
    )


def _of_tokens(chunk: Chunk, unclipped: Float64Array) -> Float64Array:
    """The sums of `OF_TOKENS`."""
    gradient = np.abs(unclipped)
    ones = np.ones_like(gradient)
    return chunk.sums(np.stack([ones, gradient, gradient**2, unclipped, chunk.kl, chunk.tv]))


def _add(found: Comparison, part: _Part) -> None:
    found.sampled += part.sampled
    found.unknown += part.unknown
    _add_up(found.sums, part.of_tokens)
    for totals, unclipped, of_rule, ratio in zip(
        found.rules, part.unclipped, part.of_rules, part.max_ratios, strict=True
    ):
        if unclipped is not None:
            _add_up(totals.unclipped, unclipped)
        _add_up(totals.sums, of_rule)
        totals.max_ratio = max(totals.max_ratio, ratio)
    found.frontier.add(part.divergence, part.gradient)


def _zeros(names: Iterable[str]) -> dict[str, Float64Array]:
    return {name: np.zeros(SEGMENTS) for name in names}


def _add_up(sums: dict[str, Float64Array], more: Float64Array) -> None:
    """Adds sums in the order of the names."""
    for name, each in zip(sums, more, strict=True):
        sums[name] += each


def _fill(columns: Float64Array, chunk: Chunk, action: Action) -> None:
    """Fills the columns of `OF_RULE` but for the last, which takes all rules."""
    low, high, removed_low, removed_high, squared, loss, kl, tv, only = columns
    np.logical_and(action.clipped, action.below, out=low)
    np.subtract(action.clipped, low, out=high)
    loss[:], only[:] = action.loss, 0.0
    np.square(action.slope, out=squared)
    removed = np.abs(
        np.subtract(action.unclipped, action.slope, out=removed_high), out=removed_high
    )
    np.multiply(removed, action.below, out=removed_low)
    removed_high -= removed_low
    # The share of its gradient that a token keeps; all of it where there is none to keep.
    kept = tv
    kept[:] = 1.0
    np.divide(action.slope, action.unclipped, out=kept, where=action.unclipped != 0.0)
    np.clip(kept, 0.0, 1.0, out=kept)
    with np.errstate(invalid="ignore"):  # a divergence may be infinite where nothing is kept
        np.multiply(chunk.kl, kept, out=kl)
    kl[kept == 0.0] = 0.0
    kept *= chunk.tv


def _sum(rule: RuleTotals, names: Iterable[str]) -> Float64Array:
    return np.asarray(np.sum([rule.sums[name] for name in names], axis=0))


def _by_group(sums: Float64Array) -> Float64Array:
    return np.asarray(sums.reshape(GROUPS, PROBABILITY_BINS).sum(1))


def _in_bin(sums: Float64Array, index: int) -> Float64Array:
    return sums.reshape(GROUPS, PROBABILITY_BINS)[:, index]
