"""The loss in plain torch."""

from __future__ import annotations

import math

import torch

from bandpo.backends.contract import PROBABILITY_BINS, PROBABILITY_EDGES, SUMS, LossInputs
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.lookup import read_table


def token_loss_torch(
    inputs: LossInputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`TokenLoss` in plain torch, for any device; a compiler can fuse it."""
    old_log_prob, log_prob, log_ratio, advantages, valid, bounds, *_ = inputs
    surrogate, parameters = inputs.surrogate, inputs.parameters
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

    weighs = surrogate == "weight"
    up, down = (x > 0.0, x < 0.0) if weighs else (cost < 0.0, cost > 0.0)
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
    limited = torch.zeros_like(beyond)

    if surrogate == "min-clip":
        stopped, stop = beyond, edge
        if parameters:
            [dual_clip] = parameters
            limited = down & (x >= math.log(dual_clip))
            stopped, stop = stopped | limited, torch.where(limited, dual_clip, stop)
        # Not minimum and maximum, which halve the gradient where r is at the bound.
        per_token = cost * torch.where(stopped, stop, ratio)
        slope = torch.where(stopped | clamped, 0.0, cost * r)
    elif surrogate == "mask":
        weight = r
        if parameters:
            [truncation] = parameters
            limited = ~beyond & (r > truncation)
            weight = torch.where(limited, truncation, r)
        slope = torch.where(beyond, 0.0, cost * weight)
        # Beyond, an infinite cost must not meet the 0.
        per_token = slope * torch.where(beyond, 0.0, log_prob)
    elif weighs:
        slope = cost * torch.where(beyond, edge, r)
        per_token = slope * log_prob
    else:
        beta_low, beta_high = parameters
        # An infinite edge, which nothing is beyond, would make the gradient of all 0 * inf.
        kept = torch.where(beyond, torch.where(down, beta_low, beta_high) * edge, 0.0)
        per_token = cost * torch.where(beyond, kept * _gradient_of(log_prob).exp(), ratio)
        slope = torch.where(clamped & ~beyond, 0.0, per_token.detach())

    counted = [valid, ~per_token.isfinite(), clipped_low, clipped_high, limited]
    if inputs.by_probability:
        index = probability_bin(old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        counted += [flag & one for flag in (valid, clipped_low, clipped_high) for one in bins]
    counts = torch.stack([flag.sum() for flag in counted])
    if x.numel() == 0:
        return per_token, per_token.sum(), counts, x.new_zeros(SUMS)
    # A masked token has x = 0 and cost = 0 and adds nothing.
    free = cost * r
    of_tokens = (-x, _excess(x), -old_log_prob, free.abs(), (free - slope).abs())
    lowest = torch.where(valid, x, math.inf).amin()
    highest = torch.where(valid, x, -math.inf).amax()
    sums = torch.stack([*(values.sum() for values in of_tokens), lowest, highest])
    return per_token, per_token.sum(), counts, sums


def probability_bin(old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns the bin of `PROBABILITY_EDGES` that each token is in, int64."""
    edges = PROBABILITY_EDGES[1:-1]
    return torch.stack([old_log_prob >= math.log(edge) for edge in edges]).sum(0)


def _gradient_of(log_prob: torch.Tensor) -> torch.Tensor:
    """Zero, with the gradient of the log-prob, which an infinite one has not; a NaN stays."""
    return torch.where(log_prob.isinf(), 0.0, log_prob - log_prob.detach())


def _excess(x: torch.Tensor) -> torch.Tensor:
    """``e^x - 1 - x``, by its series near 0, where the difference has lost its digits."""
    near = x.abs() < 0.1
    z = torch.where(near, x, 0.0)
    series = z / 5040 + 1 / 720
    for factorial in (120, 24, 6, 2):
        series = series * z + 1 / factorial
    return torch.where(near, z * z * series, x.expm1() - x)
