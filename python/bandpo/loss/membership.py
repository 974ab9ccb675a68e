"""Which tokens a budget keeps, in plain torch."""

from __future__ import annotations

import torch

from bandpo.batch.tokens import Sequences, Tokens
from bandpo.error import InvalidValueError
from bandpo.region import PrefixBudget, TensorBand
from bandpo.tensors.divergence import bernoulli_divergence

CALIBRATION = 0.9
"""Quantile of the divergences of a sequence that sets its allowance (CPPO's code, q)."""


def limits_of(region: PrefixBudget | TensorBand, tokens: Tokens) -> torch.Tensor:
    """Returns bounds, [2, B, T], that are infinite for a token inside and 0 for one outside."""
    log_prob = tokens.log_prob.detach()
    at = tokens.log_prob_of_bounds().reshape(log_prob.shape)
    old, new = (torch.where(tokens.valid, tensor, 0.0) for tensor in (at, log_prob))
    divergence = bernoulli_divergence(region.divergence, old, new)
    if isinstance(region, TensorBand):
        inside = divergence <= _delta_of(region, tokens)
    else:
        inside = _within_prefix(region, tokens, divergence)
    # A NaN is in no region, but must stay a NaN.
    limit = torch.where(inside | divergence.isnan(), torch.inf, 0.0).to(log_prob.dtype)
    return torch.stack([-limit, limit])


def _delta_of(region: TensorBand, tokens: Tokens) -> torch.Tensor:
    given = tokens.log_prob_of_bounds()
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
    place = _before(valid.to(exact), sequences, tokens.cu_seqlens)
    last = sequences.spread((sequences.lengths - 1).clamp(min=1)).to(exact)
    weight = torch.where(valid, 1.0 - (1.0 - region.weight_min) * place / last, 0.0)
    weighted = torch.where(valid, weight * spent, 0.0)
    low, high = region.allowance
    if low == high:
        allowance = torch.full_like(spent, low)
    else:
        quantile = _quantile(spent, valid, sequences, tokens.cu_seqlens)
        allowance = sequences.spread(quantile).clamp(low, high)
    earned = allowance * _before(weight, sequences, tokens.cu_seqlens)
    left = earned - _spent_before(weighted, sequences, tokens.cu_seqlens)
    return weighted <= region.delta + left.clamp(max=0.0)


def _spent_before(
    values: torch.Tensor, sequences: Sequences, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """`_before` of values of which an infinite one or a NaN counts for its own sequence alone."""
    # As numbers they would spoil the difference of two sums for the sequences behind.
    flags = (values.isinf(), values.isnan())
    finite, endless, spoiled = (
        _before(each.to(values.dtype), sequences, cu_seqlens)
        for each in (torch.where(values.isfinite(), values, 0.0), *flags)
    )
    total = torch.where(endless > 0.0, torch.inf, finite)
    return torch.where(spoiled > 0.0, torch.nan, total)


def _before(
    values: torch.Tensor, sequences: Sequences, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The sum of finite values over the earlier tokens of each token's sequence."""
    total = values.cumsum(-1) - values
    if sequences.of_token is None or cu_seqlens is None or total.shape[1] == 0:
        return total
    starts = cu_seqlens[:-1].to(torch.int64).clamp(max=total.shape[1] - 1)
    return total - total[0, starts][sequences.of_token][None]


def _quantile(
    values: torch.Tensor,
    valid: torch.Tensor,
    sequences: Sequences,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """The quantile over the tokens of each sequence that count, linear between two, [S]."""
    values = torch.where(valid, values, torch.inf)  # sorted behind those that count
    if values.shape[-1] == 0:
        return values.new_zeros(sequences.lengths.shape)
    if sequences.of_token is None or cu_seqlens is None:
        ordered, start = values.sort(-1).values, torch.zeros_like(sequences.lengths)
        rows = torch.arange(values.shape[0], device=values.device)
    else:
        by_value = values[0].argsort()
        by_sequence = sequences.of_token[by_value].argsort(stable=True)
        ordered, start = values[:, by_value[by_sequence]], cu_seqlens[:-1].to(torch.int64)
        rows = torch.zeros_like(start)
    position = CALIBRATION * (sequences.lengths - 1).clamp(min=0).to(values.dtype)
    below = position.floor().to(torch.int64)
    above = torch.minimum(below + 1, (sequences.lengths - 1).clamp(min=0))
    width = values.shape[-1] - 1
    low, high = (ordered[rows, (start + at).clamp(max=width)] for at in (below, above))
    share = position - below
    return torch.where(share > 0.0, low + share * (high - low), low)
