"""The losses of a batch at each ratio level, and with whole sequences masked."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from bandpo.backends import plain
from bandpo.backends.contract import PROBABILITY_BINS, Backend, LossInputs, TokenLosses, Totals
from bandpo.backends.plain import probability_bin
from bandpo.backends.sides import sides_from
from bandpo.batch.tokens import Tokens, clamped, shaped
from bandpo.loss.membership import limits_of
from bandpo.region import BySign, Clip, PrefixBudget, TensorBand
from bandpo.rule import AnyRegion, Rule
from bandpo.surrogate import GammaWeight
from bandpo.tensors.bounds import bounds_of, membership_of

Losses: TypeAlias = tuple[TokenLosses, dict[str, torch.Tensor]]
"""Losses, and sums for the metrics that only some rules have."""

_NO_CLIP = Clip(1.0, math.inf)


def token_losses(
    rule: Rule, tokens: Tokens, backend: Backend, *, exact: bool, by_probability: bool
) -> Losses:
    """Returns the losses of a batch by any rule.

    Args:
        rule: The loss of a token.
        tokens: The batch.
        backend: The one that computes the losses.
        exact: Take the bounds from the exact solver.
        by_probability: Count by bin of the old probability as well.
    """
    if rule.ratio_level == "geometric-mean":
        return _geometric_mean(rule, tokens, backend, exact, by_probability)
    if isinstance(rule.surrogate, GammaWeight):
        return _gamma_weight(rule, rule.surrogate, tokens, backend, exact, by_probability)
    inputs = inputs_of(rule, tokens, exact=exact, by_probability=by_probability)
    if rule.surrogate.whole_sequence:
        return _with_sequences_masked(rule, tokens, backend, inputs)
    return backend.token_losses(inputs), {}


def inputs_of(rule: Rule, tokens: Tokens, *, exact: bool, by_probability: bool) -> LossInputs:
    """Returns the inputs of a backend for a rule that leaves the tokens as they are.

    The log-ratio is each token's own, or that of its sequence: the mean (GSPO, arXiv 2507.18071) or
    the sum.
    """
    shape = tokens.log_prob.shape
    old_log_prob = shaped(tokens.old_log_prob, shape)
    log_ratio, anchor = None, tokens.anchor_log_prob
    if anchor is not None:
        anchor = shaped(anchor, shape)
    if rule.ratio_level != "token":
        log_ratio = _of_sequence(clamped(tokens.log_ratio()), rule, tokens)
        shift = tokens.shift()
        if shift is not None:  # a Clip is the same at every log-prob
            anchor = old_log_prob + _of_sequence(shift, rule, tokens)
    return LossInputs(
        old_log_prob,
        tokens.log_prob,
        log_ratio,
        tokens.advantages,
        tokens.valid,
        _bounds(rule, tokens, exact),
        rule.surrogate.name,
        rule.surrogate.parameters,
        by_probability,
        anchor,
    )


def _bounds(rule: Rule, tokens: Tokens, exact: bool) -> torch.Tensor:
    """Bounds of any kind that `LossInputs` takes."""
    region, shape = rule.region, tokens.log_prob.shape
    if isinstance(region, BySign):
        # Masked tokens may hold anything, which must not become a width.
        at = tokens.log_prob_of_bounds()
        at = torch.where(shaped(tokens.valid, at.shape), at, 0.0)
        positive, negative = (
            torch.stack(sides_from(_bounds_of(part, rule, tokens, exact), at)).reshape(2, *shape)
            for part in region
        )
        return torch.where(tokens.advantages > 0.0, positive, negative)
    if isinstance(region, (PrefixBudget, TensorBand)):
        return limits_of(region, tokens)
    bounds = _bounds_of(region, rule, tokens, exact)
    return bounds if bounds.ndim == 1 else bounds.reshape(2, *shape)


def _bounds_of(region: AnyRegion, rule: Rule, tokens: Tokens, exact: bool) -> torch.Tensor:
    # In the shape of the user's tensor, which an array of deltas has to match.
    log_prob = tokens.log_prob_of_bounds()
    valid = shaped(tokens.valid, log_prob.shape)
    if rule.surrogate.needs_bounds:
        return bounds_of(region, log_prob, valid=valid, exact=exact)

    def log_ratio() -> torch.Tensor:  # a token's own, because a sequence has a Clip
        return tokens.limited_log_ratio().reshape(log_prob.shape)

    return membership_of(region, log_prob, log_ratio, valid, exact=exact)


def _sides(bounds: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log bounds of every token, [B, T], from bounds of any kind."""
    if bounds.ndim > 1:
        lower, upper = bounds.unbind()
        return lower, upper
    shape = tokens.log_prob.shape
    lower, upper = sides_from(bounds, tokens.log_prob_of_bounds())
    return lower.reshape(shape), upper.reshape(shape)


def _limited(
    own: torch.Tensor, bounds: torch.Tensor, shift: torch.Tensor | None, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-ratios to the old policy and both their log bounds, which an anchor shifts."""
    lower, upper = _sides(bounds, tokens)
    if shift is None:
        return own, lower, upper
    # A NaN bound clips nothing, so the log-ratio is NaN where an anchor is.
    return torch.where(shift.isnan(), shift, own), lower + shift, upper + shift


def _geometric_mean(
    rule: Rule, tokens: Tokens, backend: Backend, exact: bool, by_probability: bool
) -> Losses:
    """Clips each token's log-ratio, then takes their mean (GMPO, arXiv 2507.20673, Eq. 4)."""
    advantages, valid, shape = tokens.advantages, tokens.valid, tokens.log_prob.shape
    bounds = _bounds(rule, tokens, exact)
    own, lower, upper = _limited(tokens.log_ratio(), bounds, tokens.shift(), tokens)
    low = valid & (advantages < 0.0) & (own < lower)
    high = valid & (advantages > 0.0) & (own > upper)
    outside = low | high
    bound = torch.where(low, lower, upper)
    inputs = LossInputs(
        shaped(tokens.old_log_prob, shape),
        torch.where(outside, tokens.log_prob.detach(), tokens.log_prob),
        _of_sequence(clamped(torch.where(outside, bound, own)), rule, tokens),
        advantages,
        valid,
        bounds_of(_NO_CLIP, tokens.old_log_prob),
        rule.surrogate.name,
        rule.surrogate.parameters,
        by_probability,
    )
    losses = backend.token_losses(inputs)
    removed = torch.where(outside, losses.per_token.detach(), 0.0).abs().sum()
    totals = _with_clipped(losses.totals(), inputs, low, high, removed)
    return losses._replace(totals=lambda: totals), {}


def _gamma_weight(
    rule: Rule,
    surrogate: GammaWeight,
    tokens: Tokens,
    backend: Backend,
    exact: bool,
    by_probability: bool,
) -> Losses:
    """Weights each token by a function of its ratio (VESPO, arXiv 2602.10693)."""
    advantages, valid, shape = tokens.advantages, tokens.valid, tokens.log_prob.shape
    own, shift = tokens.log_ratio(), tokens.shift()
    if rule.ratio_level != "token":
        own = _of_sequence(clamped(own), rule, tokens)
        shift = None if shift is None else _of_sequence(shift, rule, tokens)
    own, lower, upper = _limited(own, _bounds(rule, tokens, exact), shift, tokens)
    low, high = valid & (own < lower), valid & (own > upper)
    moved = clamped(torch.where(low, lower, torch.where(high, upper, own)))
    falls = advantages < 0.0
    k, rate = (
        torch.where(falls, torch.full_like(own, negative), positive)
        for negative, positive in (
            (surrogate.k_negative, surrogate.k_positive),
            (surrogate.lambda_negative, surrogate.lambda_positive),
        )
    )
    weight = (k * moved - rate * moved.expm1()).exp()
    inputs = LossInputs(
        shaped(tokens.old_log_prob, shape),
        tokens.log_prob,
        torch.zeros_like(own),
        advantages * weight,
        valid,
        bounds_of(_NO_CLIP, tokens.old_log_prob),
        "weight",
        [],
        by_probability,
    )
    losses = backend.token_losses(inputs)
    # Its ratios are 1, so sums over the true ones are taken beside it.
    of_ratios = inputs._replace(
        log_prob=inputs.log_prob.detach(), log_ratio=own, advantages=advantages
    )
    totals = plain.token_losses(of_ratios).totals()
    totals = totals._replace(nonfinite=losses.totals().nonfinite)
    change = torch.where(valid, advantages * (clamped(own).exp() - weight), 0.0).abs().sum()
    totals = _with_clipped(totals, inputs, low, high, change)  # the backend removes nothing
    return losses._replace(totals=lambda: totals), {}


def _with_sequences_masked(
    rule: Rule, tokens: Tokens, backend: Backend, inputs: LossInputs
) -> Losses:
    """Masks each sequence with a token outside the region (arXiv 2512.23075)."""
    valid, shape = inputs.valid, inputs.log_prob.shape
    if inputs.log_ratio is None:
        ratio, limited = tokens.log_ratio(), tokens.limited_log_ratio()
    else:
        ratio = inputs.log_ratio
        anchor = inputs.anchor_log_prob
        limited = ratio if anchor is None else ratio - (anchor - inputs.old_log_prob)
    lower, upper = _sides(inputs.bounds, tokens)
    below, above = valid & (limited < lower), valid & (limited > upper)
    sequences = tokens.sequences()
    dropped = sequences.sum((below | above).to(torch.int64)) > 0
    # A NaN is not outside, and must not be hidden by a neighbour that is.
    advantages = inputs.advantages
    unknown = ratio.isnan() | limited.isnan() | advantages.isnan()
    masked = sequences.spread(dropped) & valid & ~unknown
    advantages = advantages.expand(shape)
    # An infinite log-prob must not meet the 0; its ratio is clamped all the same.
    ends = torch.finfo(inputs.log_prob.dtype)
    finite = inputs.log_prob.clamp(ends.min, ends.max)
    kept = inputs._replace(
        advantages=torch.where(masked, 0.0, advantages),
        log_prob=torch.where(masked, finite, inputs.log_prob),
    )
    losses = backend.token_losses(kept)
    removed = torch.where(masked, advantages.abs() * clamped(ratio).exp(), 0.0).sum()
    low, high = below & (advantages < 0.0), above & (advantages > 0.0)
    totals = _with_clipped(losses.totals(), inputs, low, high, removed)
    # The backend misses the gradient of masked tokens, because their advantage is 0.
    totals = totals._replace(gradient_unclipped=totals.gradient_unclipped + removed)
    truncation, _ = inputs.parameters
    if truncation < math.inf:
        over = valid & ~masked & (ratio.exp() > truncation)
        totals = totals._replace(limited=over.sum())
    of_sequences = {
        "masked_sequences": dropped.sum(),
        "sequences": (sequences.lengths > 0).sum(),
    }
    return losses._replace(totals=lambda: totals), of_sequences


def _of_sequence(values: torch.Tensor, rule: Rule, tokens: Tokens) -> torch.Tensor:
    """The mean, or the sum, over each sequence's tokens that count, at each of its tokens."""
    sequences = tokens.sequences()
    total = sequences.sum(values)
    if rule.ratio_level != "sequence-product":
        total = total / sequences.lengths.clamp(min=1)
    return sequences.spread(total).expand(values.shape)


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
