"""The metrics of a loss from its totals; `policy_loss` defines each, and the backends count."""

from __future__ import annotations

import torch

from bandpo.backends.contract import Totals
from bandpo.rule import Rule


def metrics_of(rule: Rule, totals: Totals, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the metrics by name, 0-dim or [bins]; `bandpo.loss.policy_loss` defines them."""
    valid, unclipped = totals.valid, totals.gradient_unclipped
    some = valid.clamp(min=1)

    def mean(total: torch.Tensor) -> torch.Tensor:
        return total.to(dtype) / some

    log_ratio_min, log_ratio_max = (
        torch.where(valid > 0, extreme, 0.0)
        for extreme in (totals.log_ratio_min, totals.log_ratio_max)
    )
    metrics = {
        "clip_fraction_low": mean(totals.clipped_low),
        "clip_fraction_high": mean(totals.clipped_high),
        "gradient_removed": torch.where(
            unclipped == 0.0, unclipped, totals.gradient_removed / unclipped
        ).to(dtype),
        "all_ratios_one": (log_ratio_min == 0.0) & (log_ratio_max == 0.0),
        "entropy": mean(totals.entropy),
        "approx_kl": mean(totals.kl),
        "approx_kl_k3": mean(totals.kl_k3),
        "ratio_min": log_ratio_min.exp().to(dtype),
        "ratio_max": log_ratio_max.exp().to(dtype),
        "nonfinite_tokens": totals.nonfinite,
        "valid_tokens": valid,
    }
    if rule.surrogate.limited_metric is not None:
        metrics[rule.surrogate.limited_metric] = mean(totals.limited)
    if totals.by_probability is not None:
        tokens, low, high = totals.by_probability.unbind()
        metrics["tokens_by_probability"] = tokens
        metrics["clip_fraction_low_by_probability"] = low.to(dtype) / tokens.clamp(min=1)
        metrics["clip_fraction_high_by_probability"] = high.to(dtype) / tokens.clamp(min=1)
    return metrics
