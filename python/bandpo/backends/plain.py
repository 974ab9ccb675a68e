"""The loss in plain torch, for any device; a compiler can fuse it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from bandpo.backends.contract import (
    PROBABILITY_BINS,
    PROBABILITY_EDGES,
    LossInputs,
    TokenLosses,
    Totals,
)
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.lookup import read_table


def token_losses(inputs: LossInputs) -> TokenLosses:
    """Returns the losses, with their gradient to ``log_prob`` by autograd."""
    old_log_prob, log_prob, log_ratio, advantages, valid, bounds, *_ = inputs
    old_log_prob = torch.where(valid, old_log_prob, 0.0)
    log_prob = torch.where(valid, log_prob, 0.0)
    cost = torch.where(valid, -advantages, 0.0)
    if log_ratio is None:
        unclamped = log_prob - old_log_prob
    else:
        unclamped = torch.where(valid, log_ratio, 0.0) + _gradient_of(log_prob)
    # Not clamp, which gives a NaN no gradient and so hides it.
    x = torch.where(unclamped > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, unclamped)
    x = torch.where(x < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x)
    ratio = x.exp()
    clamped = unclamped.detach().abs() > LOG_RATIO_LIMIT
    x, r = x.detach(), ratio.detach()

    # The weight of CISPO has both bounds for either sign of the advantage.
    by_ratio = inputs.surrogate == "weight"
    up, down = (x > 0.0, x < 0.0) if by_ratio else (cost < 0.0, cost > 0.0)
    if bounds.dtype == torch.int32:
        bound = read_table(bounds, old_log_prob, down)
        clipped_low = down & (r < bound)
        edge = torch.where(down, bound, bound.exp())
    else:
        bound = torch.where(down, bounds[0], bounds[1])
        clipped_low = down & (x < bound)
        edge = bound.exp()
    clipped_high = up & (x > bound)
    beyond = clipped_low | clipped_high

    tokens = _Tokens(log_prob, cost, ratio, r, x, clamped, down, beyond, edge)
    per_token, slope, limited = _RULES[inputs.surrogate](tokens, inputs.parameters)

    by_probability = None
    if inputs.by_probability:
        index = probability_bin(old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        flags = [flag & one for flag in (valid, clipped_low, clipped_high) for one in bins]
        by_probability = torch.stack([flag.sum() for flag in flags])
        by_probability = by_probability.reshape(3, PROBABILITY_BINS)
    # A masked token has x = 0 and cost = 0 and adds nothing.
    unclipped = cost * r
    is_empty = x.numel() == 0  # and has no extremes
    totals = Totals(
        valid=valid.sum(),
        nonfinite=(~per_token.isfinite()).sum(),
        clipped_low=clipped_low.sum(),
        clipped_high=clipped_high.sum(),
        limited=torch.zeros_like(beyond).sum() if limited is None else limited.sum(),
        negative_log_ratio=(-x).sum(),
        excess=_excess(x).sum(),
        entropy=(-old_log_prob).sum(),
        gradient_unclipped=unclipped.abs().sum(),
        gradient_removed=(unclipped - slope).abs().sum(),
        log_ratio_min=x.sum() if is_empty else torch.where(valid, x, math.inf).amin(),
        log_ratio_max=x.sum() if is_empty else torch.where(valid, x, -math.inf).amax(),
        by_probability=by_probability,
    )
    return TokenLosses(per_token, per_token.sum(), lambda: totals)


def probability_bin(old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns the bin of `PROBABILITY_EDGES` that each token is in, int64."""
    edges = PROBABILITY_EDGES[1:-1]
    return torch.stack([old_log_prob >= math.log(edge) for edge in edges]).sum(0)


class _Tokens(NamedTuple):
    """What the rules read of the tokens, each [B, T]."""

    log_prob: torch.Tensor  # with gradient
    cost: torch.Tensor  # minus the advantage
    ratio: torch.Tensor  # clamped, with gradient
    r: torch.Tensor  # the ratio without gradient
    x: torch.Tensor  # its logarithm
    clamped: torch.Tensor  # whether the clamp acts
    down: torch.Tensor  # whether the lower bound is the one that holds
    beyond: torch.Tensor  # whether the ratio is beyond its bound
    edge: torch.Tensor  # the bound as a ratio


_Loss: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Losses, their gradients without gradient, and the tokens that the surrogate's limit stops."""


def _min_clip(tokens: _Tokens, parameters: list[float]) -> _Loss:
    _, cost, ratio, r, x, clamped, down, stopped, stop = tokens
    limited = None
    if parameters:
        [dual_clip] = parameters
        limited = down & (x >= math.log(dual_clip))
        stopped, stop = stopped | limited, torch.where(limited, dual_clip, stop)
    # Not minimum and maximum, which halve the gradient where r is at the bound.
    per_token = cost * torch.where(stopped, stop, ratio)
    return per_token, torch.where(stopped | clamped, 0.0, cost * r), limited


def _mask(tokens: _Tokens, parameters: list[float]) -> _Loss:
    weight, beyond, limited = tokens.r, tokens.beyond, None
    if parameters:
        [truncation] = parameters
        limited = ~beyond & (tokens.r > truncation)
        weight = torch.where(limited, truncation, tokens.r)
    slope = torch.where(beyond, 0.0, tokens.cost * weight)
    # Beyond, an infinite cost must not meet the 0.
    return slope * torch.where(beyond, 0.0, tokens.log_prob), slope, limited


def _weight(tokens: _Tokens, parameters: list[float]) -> _Loss:
    # CISPO's
    slope = tokens.cost * torch.where(tokens.beyond, tokens.edge, tokens.r)
    return slope * tokens.log_prob, slope, None


def _gradient_preserving(tokens: _Tokens, parameters: list[float]) -> _Loss:
    log_prob, cost, ratio, _, _, clamped, down, beyond, edge = tokens
    beta_low, beta_high = parameters
    # An infinite edge, which nothing is beyond, would make the gradient of all 0 * inf.
    kept = torch.where(beyond, torch.where(down, beta_low, beta_high) * edge, 0.0)
    per_token = cost * torch.where(beyond, kept * _gradient_of(log_prob).exp(), ratio)
    return per_token, torch.where(clamped & ~beyond, 0.0, per_token.detach()), None


_RULES: dict[str, Callable[[_Tokens, list[float]], _Loss]] = {
    "min-clip": _min_clip,
    "mask": _mask,
    "weight": _weight,
    "gradient-preserving": _gradient_preserving,
}


def _gradient_of(log_prob: torch.Tensor) -> torch.Tensor:
    """Zero, with the gradient of the log-prob; an infinite one has none, and a NaN stays."""
    return torch.where(log_prob.isinf(), 0.0, log_prob - log_prob.detach())


def _excess(x: torch.Tensor) -> torch.Tensor:
    """``e^x - 1 - x``, by its series near 0, because the difference cancels there."""
    near = x.abs() < 0.1
    z = torch.where(near, x, 0.0)
    series = z / 5040 + 1 / 720
    for factorial in (120, 24, 6, 2):
        series = series * z + 1 / factorial
    return torch.where(near, z * z * series, x.expm1() - x)
