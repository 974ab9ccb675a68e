"""Which tokens a budget keeps, in plain torch."""

from __future__ import annotations

import torch

from bandpo.batch.tokens import Tokens
from bandpo.error import InvalidValueError
from bandpo.region import PrefixBudget, TensorBand
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.divergence import bernoulli_divergence

CALIBRATION = 0.9
"""Quantile of the divergences of a sequence that sets its allowance (CPPO's code, q)."""


def limits_of(region: PrefixBudget | TensorBand, tokens: Tokens) -> torch.Tensor:
    """Returns bounds, [2, B, T], that are infinite for a token inside and 0 for one outside."""
    log_prob = tokens.log_prob.detach()
    at = tokens.log_prob_of_bounds.reshape(log_prob.shape)
    old, new = (torch.where(tokens.valid, tensor, 0.0) for tensor in (at, log_prob))
    # As the ratio, the new log-prob ends at the clamp.
    new = torch.minimum(torch.maximum(new, old - LOG_RATIO_LIMIT), old + LOG_RATIO_LIMIT)
    divergence = bernoulli_divergence(region.divergence, old, new)
    if isinstance(region, TensorBand):
        inside = divergence <= _delta_of(region, tokens)
    else:
        inside = _within_prefix(region, tokens, divergence)
    # A NaN is in no region, but must stay a NaN.
    limit = torch.where(inside | divergence.isnan(), torch.inf, 0.0).to(log_prob.dtype)
    return torch.stack([-limit, limit])


def _delta_of(region: TensorBand, tokens: Tokens) -> torch.Tensor:
    given = tokens.log_prob_of_bounds
    try:
        delta = region.delta.detach().to(given.device).expand(given.shape)
    except RuntimeError:
        raise InvalidValueError(
            f"the region's delta must broadcast to the shape {tuple(given.shape)} of old_log_prob, "
            f"got {tuple(region.delta.shape)}"
        ) from None
    return delta.reshape(tokens.log_prob.shape)


def _within_prefix(region: PrefixBudget, tokens: Tokens, divergence: torch.Tensor) -> torch.Tensor:
    # Sums over packed sequences are differences, which need the digits.
    exact = torch.float32 if divergence.device.type == "mps" else torch.float64
    valid, spent = tokens.valid, divergence.to(exact)
    sequences = tokens.sequences()
    place = _before(valid.to(exact), tokens)
    last = sequences.spread((sequences.lengths - 1).clamp(min=1)).to(exact)
    weight = torch.where(valid, 1.0 - (1.0 - region.weight_min) * place / last, 0.0)
    weighted = torch.where(valid, weight * spent, 0.0)
    low, high = region.allowance
    if low == high:
        allowance = torch.full_like(spent, low)
    else:
        allowance = sequences.spread(_quantile(spent, tokens)).clamp(low, high)
    left = allowance * _before(weight, tokens) - _before(weighted, tokens)
    return weighted <= region.delta + left.clamp(max=0.0)


def _before(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The sum over the earlier tokens of each token's sequence."""
    # Apart, because an infinite sum of one sequence would hide those of the next ones.
    special = ~values.isfinite()
    finite = _finite_before(torch.where(special, 0.0, values), tokens)
    spoiled = _finite_before(torch.where(values.isnan(), 1.0, 0.0).to(values.dtype), tokens)
    endless = _finite_before(torch.where(values.isinf(), 1.0, 0.0).to(values.dtype), tokens)
    total = torch.where(endless > 0.0, torch.inf, finite)
    return torch.where(spoiled > 0.0, torch.nan, total)


def _finite_before(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    total = values.cumsum(-1) - values
    if tokens.cu_seqlens is None:
        return total
    of_token = tokens.sequences().of_token
    starts = tokens.cu_seqlens[:-1].to(torch.int64).clamp(max=max(total.shape[1] - 1, 0))
    first = total[0, starts] if total.shape[1] > 0 else total[0]
    return total if of_token is None else total - first[of_token][None]


def _quantile(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The quantile over the tokens of each sequence that count, linear between two, [S]."""
    sequences = tokens.sequences()
    values = torch.where(tokens.valid, values, torch.inf)  # sorted behind those that count
    if values.shape[-1] == 0:
        return values.new_zeros(sequences.lengths.shape)
    if sequences.of_token is None or tokens.cu_seqlens is None:
        ordered, start = values.sort(-1).values, torch.zeros_like(sequences.lengths)
        rows = torch.arange(values.shape[0], device=values.device)
    else:
        by_value = values[0].argsort()
        by_sequence = sequences.of_token[by_value].argsort(stable=True)
        ordered, start = values[:, by_value[by_sequence]], tokens.cu_seqlens[:-1].to(torch.int64)
        rows = torch.zeros_like(start)
    position = CALIBRATION * (sequences.lengths - 1).clamp(min=0).to(values.dtype)
    below = position.floor().to(torch.int64)
    above = torch.minimum(below + 1, (sequences.lengths - 1).clamp(min=0))
    width = values.shape[-1] - 1
    low, high = (ordered[rows, (start + at).clamp(max=width)] for at in (below, above))
    share = position - below
    return torch.where(share > 0.0, low + share * (high - low), low)
