"""The metrics of a loss from its totals; `policy_loss` defines each, and the backends count."""

from __future__ import annotations

import math

import torch

from bandpo.backends.contract import Totals
from bandpo.batch.metrics import Statistics, Tensors
from bandpo.rule import Rule


def statistics_of(rule: Rule, totals: Totals, dtype: torch.dtype, more: Tensors) -> Statistics:
    """Returns what the metrics are made of.

    Args:
        rule: The loss of a token.
        totals: Counts and sums of its backend.
        dtype: The dtype of metrics that are no counts.
        more: Further sums: ``masked_sequences`` and ``sequences``, ``log_ratio_penalty``.
    """
    # Not `_asdict`, which torch 2.8 does not compile.
    sums = {**{name: getattr(totals, name) for name in Totals._fields}, **more}
    log_ratio_min, log_ratio_max = sums.pop("log_ratio_min"), sums.pop("log_ratio_max")
    if totals.by_probability is None:
        del sums["by_probability"]
    some = totals.valid > 0
    return Statistics(
        sums,
        {"log_ratio": torch.where(some, log_ratio_min, math.inf)},
        {"log_ratio": torch.where(some, log_ratio_max, -math.inf)},
        _metrics_of,
        (rule.surrogate.limited_metric, dtype),
    )


def _metrics_of(statistics: Statistics, limited_metric: str | None, dtype: torch.dtype) -> Tensors:
    """The metrics by name, 0-dim or [bins]; `bandpo.loss.policy_loss` defines them."""
    sums = statistics.sums
    valid, unclipped = sums["valid"], sums["gradient_unclipped"]
    some = valid.clamp(min=1)

    def mean(name: str) -> torch.Tensor:
        return sums[name].to(dtype) / some

    log_ratio_min, log_ratio_max = (
        torch.where(valid > 0, extremes["log_ratio"], 0.0)
        for extremes in (statistics.minima, statistics.maxima)
    )
    metrics = {
        "clip_fraction_low": mean("clipped_low"),
        "clip_fraction_high": mean("clipped_high"),
        "gradient_removed": torch.where(
            unclipped == 0.0, unclipped, sums["gradient_removed"] / unclipped
        ).to(dtype),
        "all_ratios_one": (log_ratio_min == 0.0) & (log_ratio_max == 0.0),
        "entropy": mean("entropy"),
        "approx_kl": mean("kl"),
        "approx_kl_k3": mean("kl_k3"),
        "ratio_min": log_ratio_min.exp().to(dtype),
        "ratio_max": log_ratio_max.exp().to(dtype),
        "nonfinite_tokens": sums["nonfinite"],
        "positive_log_probs": sums["positive"],
        "valid_tokens": valid,
    }
    if limited_metric is not None:
        metrics[limited_metric] = mean("limited")
    if "by_probability" in sums:
        tokens, low, high = sums["by_probability"].unbind()
        metrics["tokens_by_probability"] = tokens
        metrics["clip_fraction_low_by_probability"] = low.to(dtype) / tokens.clamp(min=1)
        metrics["clip_fraction_high_by_probability"] = high.to(dtype) / tokens.clamp(min=1)
    if "masked_sequences" in sums:
        share = sums["masked_sequences"].to(dtype) / sums["sequences"].clamp(min=1)
        metrics["masked_sequence_fraction"] = share
    if "log_ratio_penalty" in sums:
        metrics["log_ratio_penalty"] = mean("log_ratio_penalty")
    return metrics
