"""Metrics of a correction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.backends.plain import probability_bin
from bandpo.correction.tokens import TwoPolicies
from bandpo.surrogate import LOG_RATIO_LIMIT


def metrics_of(
    batch: TwoPolicies, weight: torch.Tensor, kept: torch.Tensor, outside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The metrics by name, 0-dim or [bins]; `rollout_correction` defines them."""
    valid = batch.valid
    count = valid.sum()
    some, dtype = count.clamp(min=1), weight.dtype
    total, squares = weight.sum(), weight.square().sum()
    share = torch.where(squares == 0.0, 0.0, total.square() / (some * squares))

    def unless_empty(value: torch.Tensor) -> torch.Tensor:
        return torch.where(count > 0, value, 1.0).to(dtype)

    index = probability_bin(batch.rollout)
    bins = [valid & (index == k) for k in range(PROBABILITY_BINS)]
    by_bin = torch.stack([one.sum() for one in bins])
    kept_by_bin = torch.stack([(kept & one).sum() for one in bins])
    clamped = batch.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    quantile = _quantiles(weight, valid, some)
    return {
        "kept_fraction": unless_empty(kept.sum().to(dtype) / some),
        "outside_fraction": outside.sum().to(dtype) / some,
        "effective_sample_size": unless_empty(share),
        "weight_mean": unless_empty(total / some),
        "weight_max": unless_empty(quantile(100)),
        "weight_p01": unless_empty(quantile(1)),
        "weight_p50": unless_empty(quantile(50)),
        "weight_p99": unless_empty(quantile(99)),
        "log_ratio_abs": clamped.abs().sum() / some,
        "valid_tokens": count,
        "tokens_by_probability": by_bin,
        "kept_fraction_by_probability": torch.where(
            by_bin > 0, kept_by_bin.to(dtype) / by_bin.clamp(min=1), 1.0
        ).to(dtype),
    }


def _quantiles(
    weight: torch.Tensor, valid: torch.Tensor, count: torch.Tensor
) -> Callable[[int], torch.Tensor]:
    """A function from a percentage to the quantile of the weights of the tokens that count.

    A selection of them would have a length that the host has to wait for; so the others are sorted
    to the end. A NaN makes every quantile NaN.
    """
    if weight.numel() == 0:
        return lambda percent: weight.sum()
    unknown = torch.where(valid, weight, 0.0).isnan().any()
    ordered = torch.where(valid, weight, math.inf).reshape(-1).sort().values

    def quantile(percent: int) -> torch.Tensor:
        # In whole numbers, because not every device has float64 for a large count.
        hundredths = (count - 1) * percent
        low = hundredths // 100
        high = torch.minimum(low + 1, count - 1)
        # Not by indexing, because the host would read the index.
        below, above = ordered.index_select(0, torch.stack([low, high])).unbind()
        found = below + (hundredths % 100).to(weight.dtype) / 100.0 * (above - below)
        return torch.where(unknown, math.nan, found)

    return quantile
