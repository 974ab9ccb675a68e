"""Weights of a batch by a `Correction`, in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

# First, because it reports a torch that is missing or broken.
from bandpo.tensors.check import compute_dtype

# isort: split
import torch

from bandpo.backends.sides import sides_from
from bandpo.batch.metrics import Metrics, Statistics
from bandpo.batch.tokens import Sequences, shaped, shaped_by_row
from bandpo.correction.check import check_batch, check_sequences
from bandpo.correction.metrics import quantiles_of, statistics_of
from bandpo.correction.rule import Correction, RolloutCorrection
from bandpo.correction.tokens import TwoPolicies
from bandpo.correction.warning import warn_of_mismatch
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.bounds import bounds_of, membership_of
from bandpo.tensors.divergence import bernoulli_divergence, k3


def apply(
    rule: Correction,
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> RolloutCorrection:
    """Returns the weights; `bandpo.correction.rollout_correction` describes the arguments."""
    shape = check_batch(rule, old_log_prob, rollout_log_prob, response_mask, advantages)
    check_sequences(rule, old_log_prob, cu_seqlens)
    dtype = compute_dtype(old_log_prob, rollout_log_prob)
    valid = shaped(response_mask, shape) != 0  # a copy, because metrics are computed later
    old, rollout = (
        torch.where(valid, shaped(tensor.detach().to(dtype), shape), 0.0)
        for tensor in (old_log_prob, rollout_log_prob)
    )
    batch = TwoPolicies(old, rollout, old - rollout, valid, cu_seqlens, old_log_prob.shape)
    found = _of_tokens(rule, batch) if rule.level == "token" else _of_sequences(rule, batch)

    unknown = found.value.isnan()
    # A region has no NaN in it, but a NaN must be seen, not dropped.
    outside = valid & ~found.inside & ~unknown
    dropped = torch.zeros_like(outside) if rule.action == "truncate" else outside
    if rule.needs_advantages and advantages is not None:  # which was checked
        signed = shaped_by_row(advantages.detach().to(dtype), shape)
        eligible, unclear = _eligible(rule, batch, signed)
        dropped, unknown = dropped & eligible, unknown | unclear
    dropped = dropped & ~unknown
    weight = found.log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weight = torch.where(unknown, math.nan, weight)
    kept = valid & ~dropped
    weight = torch.where(kept, weight, 0.0)

    warn_of_mismatch("rollout_log_prob", batch.log_ratio, batch.valid)

    def statistics() -> Statistics:
        return statistics_of(batch, weight, kept, outside)

    # A compiler computes metrics in one kernel; otherwise most callers read few of them.
    metrics = Metrics(
        statistics() if torch.compiler.is_compiling() else statistics,
        lambda: quantiles_of(batch, weight),
    )
    given = old_log_prob.shape
    return RolloutCorrection(shaped(weight, given), shaped(kept, given), metrics)


class _Found(NamedTuple):
    """The decision of a rule, each [B, T] or broadcasting with it."""

    value: torch.Tensor  # the ratio's logarithm or the statistic; NaN where it is unknown
    inside: torch.Tensor
    log_weight: torch.Tensor


def _of_tokens(rule: Correction, batch: TwoPolicies) -> _Found:
    x = batch.log_ratio
    own = torch.zeros_like(x) if rule.action == "mask-only" else x
    if rule.allowed is None:
        value = _statistic(rule, batch)
        return _Found(value, value <= rule.max_statistic, own)
    # An array of deltas has to match the user's shape.
    rollout, valid = batch.rollout.reshape(batch.given), batch.valid.reshape(batch.given)
    if rule.action == "truncate":
        bounds = bounds_of(rule.allowed, rollout, valid=valid)
    else:
        bounds = membership_of(rule.allowed, rollout, lambda: x.reshape(batch.given), valid)
    lower, upper = (side.reshape(x.shape) for side in sides_from(bounds, rollout))
    if rule.action == "truncate":
        own = torch.minimum(torch.maximum(own, lower), upper)
    return _Found(x, (lower <= x) & (x <= upper), own)


def _of_sequences(rule: Correction, batch: TwoPolicies) -> _Found:
    x, sequences = batch.log_ratio, batch.sequences()
    lengths = sequences.lengths.clamp(min=1)
    own = torch.zeros_like(x) if rule.action == "mask-only" else x
    if rule.allowed is None:
        tokens = torch.where(batch.valid, _statistic(rule, batch), 0.0)
        if rule.level == "sequence-max":
            value = _max_of(tokens, batch, sequences)
        else:
            value = sequences.sum(tokens)
            value = value / lengths if rule.level == "sequence-mean" else value
        value = sequences.spread(value)
        return _Found(value, value <= rule.max_statistic, own)
    value = sequences.sum(x)
    if rule.level == "geometric-mean":
        value = value / lengths
    value = sequences.spread(value)
    lower, upper = bounds_of(rule.allowed, batch.rollout).unbind()  # of a Clip: two constants
    inside = (lower <= value) & (value <= upper)
    if rule.action == "truncate":
        own = torch.minimum(torch.maximum(value, lower), upper).expand(x.shape)
    elif rule.action == "mask" and rule.level == "sequence-product":
        own = value.expand(x.shape)
    return _Found(value, inside, own)


def _statistic(rule: Correction, batch: TwoPolicies) -> torch.Tensor:
    """The statistic of each token, [B, T]."""
    name, x = rule.statistic, batch.log_ratio
    if name == "k1":
        return -x
    if name == "k2":
        return x.square() / 2.0
    if name == "k3":
        return k3(x)
    if name == "ratio-distance":
        return x.expm1().abs()
    divergence = str(name).removeprefix("bernoulli-")
    value = bernoulli_divergence(divergence, batch.rollout, batch.old)
    # Both may be -inf, for which a divergence has a limit but a ratio has none.
    return torch.where(x.isnan(), x, value)


def _max_of(tokens: torch.Tensor, batch: TwoPolicies, sequences: Sequences) -> torch.Tensor:
    """The max of each sequence, [S]; that of a sequence without tokens is -inf."""
    tokens = torch.where(batch.valid, tokens, -math.inf)
    if sequences.of_token is None:
        if tokens.shape[-1] == 0:
            return tokens.new_full(tokens.shape[:1], -math.inf)
        return tokens.amax(-1)
    start = tokens.new_full(sequences.lengths.shape, -math.inf)
    found = start.scatter_reduce(0, sequences.of_token, tokens[0], "amax")
    # Devices differ in what the max of a NaN is.
    unknown = sequences.sum(tokens.isnan().to(tokens.dtype)) > 0
    return torch.where(unknown, math.nan, found)


def _eligible(
    rule: Correction, batch: TwoPolicies, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that may be dropped, and those of which it is not known."""
    x = batch.log_ratio
    advantages = torch.where(batch.valid, advantages.expand(x.shape), 0.0)
    sequences = None if rule.level == "token" else batch.sequences()
    unclear = advantages.isnan()
    if rule.outward_only:
        if sequences is not None:
            unclear = sequences.spread(sequences.sum(unclear.to(torch.int64))) > 0
        return (x * advantages.sign()) > 0.0, unclear
    if sequences is not None:
        # A mean has the sign of its sum.
        advantages = sequences.spread(sequences.sum(advantages))
        unclear = advantages.isnan()
    return advantages < 0.0, unclear
