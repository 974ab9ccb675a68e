"""The losses of a batch at each ratio level, and with whole sequences masked."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from bandpo.backends.contract import PROBABILITY_BINS, Backend, LossInputs, TokenLosses, Totals
from bandpo.backends.plain import probability_bin
from bandpo.backends.sides import sides_of
from bandpo.loss.tokens import Tokens, shaped
from bandpo.region import Clip
from bandpo.rule import Rule
from bandpo.tensors.bounds import bounds_of, membership_of

Losses: TypeAlias = tuple[TokenLosses, dict[str, torch.Tensor]]
"""Losses, and the metrics that only some rules have."""

_NO_CLIP = Clip(1.0, math.inf)


def token_losses(
    rule: Rule, tokens: Tokens, backend: Backend, *, exact: bool, by_probability: bool
) -> Losses:
    """Returns the losses of a batch by any rule.

    Args:
        rule: What the loss of a token is.
        tokens: The batch.
        backend: What computes the losses.
        exact: Take the bounds from the exact solver.
        by_probability: Count by bin of the old probability as well.
    """
    if rule.ratio_level == "geometric-mean":
        return _geometric_mean(rule, tokens, backend, exact, by_probability)
    inputs = inputs_of(rule, tokens, exact=exact, by_probability=by_probability)
    if rule.surrogate.whole_sequence:
        return _with_sequences_masked(rule, tokens, backend, inputs)
    return backend.token_losses(inputs), {}


def inputs_of(rule: Rule, tokens: Tokens, *, exact: bool, by_probability: bool) -> LossInputs:
    """Returns the inputs of a backend for a rule that leaves the tokens as they are.

    The log-ratio is each token's own, or with ratio_level "sequence" the mean of its sequence
    (GSPO, arXiv 2507.18071).
    """
    old_log_prob, log_prob, advantages, valid, _ = tokens
    of_sequence = rule.ratio_level == "sequence"
    log_ratio = _sequence_mean(tokens.log_ratio(), tokens) if of_sequence else None
    # The shape of the user's tensor, which an array of deltas has to match.
    given = old_log_prob.shape
    if rule.surrogate.needs_bounds:
        bounds = bounds_of(rule.region, old_log_prob, valid=shaped(valid, given), exact=exact)
    else:

        def ratio_of_tokens() -> torch.Tensor:
            ratio = tokens.log_ratio() if log_ratio is None else log_ratio
            return ratio.reshape(given)

        bounds = membership_of(
            rule.region, old_log_prob, ratio_of_tokens, shaped(valid, given), exact=exact
        )
    return LossInputs(
        shaped(old_log_prob, log_prob.shape),
        log_prob,
        log_ratio,
        advantages,
        valid,
        bounds if bounds.ndim == 1 else bounds.reshape(2, *log_prob.shape),
        rule.surrogate.name,
        rule.surrogate.parameters,
        by_probability,
    )


def _geometric_mean(
    rule: Rule, tokens: Tokens, backend: Backend, exact: bool, by_probability: bool
) -> Losses:
    """Clips each token's log-ratio, then takes their mean (GMPO, arXiv 2507.20673, Eq. 4)."""
    old_log_prob, log_prob, advantages, valid, _ = tokens
    shape = log_prob.shape
    own = tokens.log_ratio()
    lower, upper = (
        side.reshape(shape) for side in sides_of(rule.region, old_log_prob, exact=exact)
    )
    low = valid & (advantages < 0.0) & (own < lower)
    high = valid & (advantages > 0.0) & (own > upper)
    clipped = low | high
    bound = torch.where(low, lower, upper)
    inputs = LossInputs(
        shaped(old_log_prob, shape),
        torch.where(clipped, log_prob.detach(), log_prob),
        _sequence_mean(torch.where(clipped, bound, own), tokens),
        advantages,
        valid,
        bounds_of(_NO_CLIP, old_log_prob),
        rule.surrogate.name,
        rule.surrogate.parameters,
        by_probability,
    )
    losses = backend.token_losses(inputs)
    removed = torch.where(clipped, losses.per_token.detach(), 0.0).abs().sum()
    totals = _with_clipped(losses.totals(), inputs, low, high, removed)
    return losses._replace(totals=lambda: totals), {}


def _with_sequences_masked(
    rule: Rule, tokens: Tokens, backend: Backend, inputs: LossInputs
) -> Losses:
    """Masks each sequence with a token outside the region (arXiv 2512.23075)."""
    valid, shape = inputs.valid, inputs.log_prob.shape
    ratio = tokens.log_ratio() if inputs.log_ratio is None else inputs.log_ratio
    given = tokens.old_log_prob.shape
    bounds = inputs.bounds
    bounds = bounds if bounds.ndim == 1 else bounds.reshape(2, *given)
    lower, upper = (
        side.reshape(shape) for side in sides_of(rule.region, tokens.old_log_prob, bounds=bounds)
    )
    below, above = valid & (ratio < lower), valid & (ratio > upper)
    sequences = tokens.sequences()
    dropped = sequences.sum((below | above).to(torch.int64)) > 0
    # A NaN is not outside, and must not be hidden by a neighbour that is.
    advantages = inputs.advantages
    masked = sequences.spread(dropped) & valid & ~(ratio.isnan() | advantages.isnan())
    advantages = advantages.expand(shape)
    kept = inputs._replace(advantages=torch.where(masked, 0.0, advantages))
    losses = backend.token_losses(kept)
    removed = torch.where(masked, advantages.abs() * ratio.exp(), 0.0).sum()
    low, high = below & (advantages < 0.0), above & (advantages > 0.0)
    totals = _with_clipped(losses.totals(), inputs, low, high, removed)
    # The backend misses the gradient of masked tokens, because their advantage is 0.
    totals = totals._replace(gradient_unclipped=totals.gradient_unclipped + removed)
    if inputs.parameters:
        [truncation] = inputs.parameters
        limited = valid & ~masked & (ratio.exp() > truncation)
        totals = totals._replace(limited=limited.sum())
    nonempty = (sequences.lengths > 0).sum().clamp(min=1)
    share = dropped.sum().to(inputs.log_prob.dtype) / nonempty
    return losses._replace(totals=lambda: totals), {"masked_sequence_fraction": share}


def _sequence_mean(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The mean over each sequence's tokens that count, at each of its tokens, [B, T]."""
    sequences = tokens.sequences()
    mean = sequences.sum(values) / sequences.lengths.clamp(min=1)
    return sequences.spread(mean).expand(values.shape)


def _with_clipped(
    totals: Totals,
    inputs: LossInputs,
    low: torch.Tensor,
    high: torch.Tensor,
    removed: torch.Tensor,
) -> Totals:
    """The totals of a loss whose tokens were clipped or masked before the backend.

    Args:
        totals: Those of the backend.
        inputs: Its inputs.
        low: Tokens clipped at their lower bound, bool [B, T].
        high: Tokens clipped at their upper bound, likewise.
        removed: Sum of the gradient that the clipping removed, 0-dim.
    """
    by_probability = totals.by_probability
    if by_probability is not None:
        index = probability_bin(inputs.old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        clipped = [torch.stack([(flag & one).sum() for one in bins]) for flag in (low, high)]
        by_probability = torch.stack([by_probability[0], *clipped])
    return totals._replace(
        clipped_low=low.sum(),
        clipped_high=high.sum(),
        gradient_removed=totals.gradient_removed + removed,
        by_probability=by_probability,
    )
