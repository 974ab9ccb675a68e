"""The losses of tokens whose ratio is their own, their sequence's or a geometric mean."""

from __future__ import annotations

import math

import torch

from bandpo.backends.contract import (
    PROBABILITY_BINS,
    Backend,
    LossInputs,
    TokenLosses,
    Totals,
)
from bandpo.backends.plain import probability_bin
from bandpo.backends.sides import sides_of
from bandpo.loss.tokens import Tokens, shaped
from bandpo.region import Clip
from bandpo.rule import (
    Rule,
)
from bandpo.tensors.bounds import bounds_of, membership_of

_NO_CLIP = Clip(1.0, math.inf)


def inputs_of(
    rule: Rule,
    tokens: Tokens,
    exact: bool,
    by_probability: bool,
) -> LossInputs:
    """The arguments of a `TokenLoss` for a rule that leaves the tokens as they are."""
    old_log_prob, log_prob, advantages, valid, _ = tokens
    of_sequence = rule.ratio_level == "sequence"
    log_ratio = _sequence_mean(tokens.log_ratio(), tokens) if of_sequence else None
    valid_tokens = shaped(valid, old_log_prob.shape)
    if rule.surrogate.needs_bounds:
        bounds = bounds_of(rule.region, old_log_prob, valid=valid_tokens, exact=exact)
    else:

        def ratio_of_tokens() -> torch.Tensor:
            ratio = tokens.log_ratio() if log_ratio is None else log_ratio
            return ratio.reshape(old_log_prob.shape)

        bounds = membership_of(
            rule.region, old_log_prob, ratio_of_tokens, valid_tokens, exact=exact
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


def token_losses(
    rule: Rule, tokens: Tokens, backend: Backend, exact: bool, by_probability: bool
) -> tuple[TokenLosses, dict[str, torch.Tensor]]:
    """The losses, and the metrics that only some rules have."""
    old_log_prob, log_prob, advantages, valid, _ = tokens
    shape = log_prob.shape
    if rule.ratio_level == "geometric-mean":
        own = tokens.log_ratio()
        lower, upper = sides_of(rule.region, old_log_prob, exact=exact)
        low = valid & (advantages < 0.0) & (own < lower.reshape(shape))
        high = valid & (advantages > 0.0) & (own > upper.reshape(shape))
        clipped = low | high
        bound = torch.where(low, lower.reshape(shape), upper.reshape(shape))
        mean = _sequence_mean(torch.where(clipped, bound, own), tokens)
        inputs = LossInputs(
            shaped(old_log_prob, shape),
            torch.where(clipped, log_prob.detach(), log_prob),
            mean,
            advantages,
            valid,
            bounds_of(_NO_CLIP, old_log_prob),  # clipped already
            rule.surrogate.name,
            rule.surrogate.parameters,
            by_probability,
        )
        losses = backend.token_losses(inputs)
        removed = torch.where(clipped, losses.per_token.detach(), 0.0).abs().sum()
        totals = _with_clipped(losses.totals(), low, high, removed, inputs)
        return losses._replace(totals=lambda: totals), {}

    inputs = inputs_of(rule, tokens, exact, by_probability)
    if not rule.surrogate.whole_sequence:
        return backend.token_losses(inputs), {}

    ratio = tokens.log_ratio() if inputs.log_ratio is None else inputs.log_ratio
    bounds = inputs.bounds
    bounds = bounds if bounds.ndim == 1 else bounds.reshape(2, *old_log_prob.shape)
    lower, upper = sides_of(rule.region, old_log_prob, bounds=bounds)
    below = valid & (ratio < lower.reshape(shape))
    above = valid & (ratio > upper.reshape(shape))
    sequences = tokens.sequences()
    dropped = sequences.sum((below | above).to(torch.int64)) > 0
    # A NaN is not outside, and is not to be hidden by a neighbour that is.
    masked = sequences.spread(dropped) & valid & ~(ratio.isnan() | advantages.isnan())
    advantages = advantages.expand(shape)
    kept = inputs._replace(advantages=torch.where(masked, 0.0, advantages))
    losses = backend.token_losses(kept)
    removed = torch.where(masked, advantages.abs() * ratio.exp(), 0.0).sum()
    low, high = below & (advantages < 0.0), above & (advantages > 0.0)
    totals = _with_clipped(losses.totals(), low, high, removed, inputs)
    # What is masked has no advantage, so the backend misses its gradient.
    totals = totals._replace(gradient_unclipped=totals.gradient_unclipped + removed)
    if inputs.parameters:
        [truncation] = inputs.parameters
        limited = valid & ~masked & (ratio.exp() > truncation)
        totals = totals._replace(limited=limited.sum())
    nonempty = (sequences.lengths > 0).sum().clamp(min=1)
    share = dropped.sum().to(log_prob.dtype) / nonempty
    return losses._replace(totals=lambda: totals), {"masked_sequence_fraction": share}


def _sequence_mean(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The mean over each sequence's tokens that count, at each of its tokens, [B, T]."""
    sequences = tokens.sequences()
    mean = sequences.sum(values) / sequences.lengths.clamp(min=1)
    return sequences.spread(mean).expand(values.shape)


def _with_clipped(
    totals: Totals,
    low: torch.Tensor,
    high: torch.Tensor,
    removed: torch.Tensor,
    inputs: LossInputs,
) -> Totals:
    """The totals of a loss whose tokens were clipped or masked before it."""
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
