"""Metrics of a correction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.backends.plain import probability_bin
from bandpo.batch.metrics import Statistics, Tensors
from bandpo.correction.tokens import TwoPolicies
from bandpo.order import of_rank
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.internals import needs_no_dispatcher


def statistics_of(
    batch: TwoPolicies, weight: torch.Tensor, kept: torch.Tensor, outside: torch.Tensor
) -> Statistics:
    """Returns what the metrics are made of."""
    valid = batch.valid
    index = probability_bin(batch.rollout)
    bins = [valid & (index == k) for k in range(PROBABILITY_BINS)]
    clamped = batch.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    nothing = weight.new_full((1,), -math.inf)  # because an empty batch has no max
    of_valid = torch.where(valid, weight, -math.inf).reshape(-1)
    return Statistics(
        {
            "valid": valid.sum(),
            "kept": kept.sum(),
            "outside": outside.sum(),
            "weight": weight.sum(),
            "squared_weight": weight.square().sum(),
            "log_ratio_abs": clamped.abs().sum(),
            "tokens_by_probability": torch.stack([one.sum() for one in bins]),
            "kept_by_probability": torch.stack([(kept & one).sum() for one in bins]),
        },
        {},
        {"weight": torch.cat([nothing, of_valid]).amax()},
        _metrics_of,
    )


def _metrics_of(statistics: Statistics) -> Tensors:
    """The metrics by name, without quantiles; `rollout_correction` defines them."""
    sums, weight_max = statistics.sums, statistics.maxima["weight"]
    count, total, squares = sums["valid"], sums["weight"], sums["squared_weight"]
    some, dtype = count.clamp(min=1), total.dtype
    share = torch.where(squares == 0.0, 0.0, total.square() / (some * squares))
    by_bin, kept_by_bin = sums["tokens_by_probability"], sums["kept_by_probability"]

    def unless_empty(value: torch.Tensor) -> torch.Tensor:
        return torch.where(count > 0, value, 1.0).to(dtype)

    return {
        "kept_fraction": unless_empty(sums["kept"].to(dtype) / some),
        "outside_fraction": sums["outside"].to(dtype) / some,
        "effective_sample_size": unless_empty(share),
        "weight_mean": unless_empty(total / some),
        "weight_max": unless_empty(weight_max),
        "log_ratio_abs": sums["log_ratio_abs"] / some,
        "valid_tokens": count,
        "tokens_by_probability": by_bin,
        "kept_fraction_by_probability": torch.where(
            by_bin > 0, kept_by_bin.to(dtype) / by_bin.clamp(min=1), 1.0
        ).to(dtype),
    }


def quantiles_of(batch: TwoPolicies, weight: torch.Tensor) -> Tensors:
    """Returns the metrics that no sum gives, and that are of one batch therefore."""
    count = batch.valid.sum()
    quantile = _quantiles(weight, batch.valid, count.clamp(min=1))
    return {
        f"weight_p{percent:02}": torch.where(count > 0, quantile(percent), 1.0).to(weight.dtype)
        for percent in (1, 50, 99)
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
    counted = torch.where(valid, weight, math.inf).reshape(-1)
    if needs_no_dispatcher(counted):
        # A sort would take seconds, in which no interrupt is seen. A sum with 0 makes 0 of -0.
        given = counted.double().numpy() + 0.0

        def at(ranks: torch.Tensor) -> torch.Tensor:
            found = [math.nan if unknown else of_rank(given, rank) for rank in ranks.tolist()]
            return torch.tensor(found, dtype=weight.dtype, device="cpu")

    else:
        ordered = counted.sort().values

        def at(ranks: torch.Tensor) -> torch.Tensor:
            # Not by indexing, because the host would read the index.
            return ordered.index_select(0, ranks)

    def quantile(percent: int) -> torch.Tensor:
        # In whole numbers, because not every device has float64 for a large count.
        hundredths = (count - 1) * percent
        low = hundredths // 100
        high = torch.minimum(low + 1, count - 1)
        below, above = at(torch.stack([low, high])).unbind()
        found = below + (hundredths % 100).to(weight.dtype) / 100.0 * (above - below)
        return torch.where(unknown, math.nan, found)

    return quantile
