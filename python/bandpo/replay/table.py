"""The rows of a comparison, for a terminal, a page or JSON."""

from __future__ import annotations

import math
from typing import Any

from bandpo.replay.compare import Comparison, RuleTotals
from bandpo.replay.estimate import Estimate
from bandpo.surrogate import PROBABILITY_EDGES

CLIPPED = ("clipped_low", "clipped_high")
REMOVED = ("removed_low", "removed_high")


def rows_of(found: Comparison) -> list[dict[str, Any]]:
    """Returns one row a rule, of numbers by name; shares carry their interval as low and high."""
    return [_row(found, rule) for rule in found.rules]


def _row(found: Comparison, rule: RuleTotals) -> dict[str, Any]:
    tokens = found.sums["tokens"].sum()
    whole_loss = rule.unclipped["loss"].sum()
    return {
        "rule": rule.rule.name,
        "clip_fraction": _share(found.share(rule, CLIPPED, "tokens")),
        "clip_fraction_low": _share(found.share(rule, CLIPPED[:1], "tokens")),
        "clip_fraction_high": _share(found.share(rule, CLIPPED[1:], "tokens")),
        "gradient_removed": _share(found.share(rule, REMOVED, "gradient")),
        "gradient_removed_low": _share(found.share(rule, REMOVED[:1], "gradient")),
        "gradient_removed_high": _share(found.share(rule, REMOVED[1:], "gradient")),
        "gradient_kept": found.kept(rule),
        "gradient_kept_optimum": found.optimum(rule),
        "gradient_norm": found.gradient_norm(rule),
        "loss": float(rule.sums["loss"].sum() / tokens),
        "loss_unclipped": float(whole_loss / tokens),
        "kl": _share(found.share(rule, ("kl",), "tokens")),
        "tv": _share(found.share(rule, ("tv",), "tokens")),
        "ratio_max": rule.max_ratio,
        "only_this_rule": float(rule.sums["only"].sum()),
        "by_probability": [
            {
                "from": low,
                "to": high,
                "clip_fraction": _share(clipped),
                "gradient_removed": _share(removed),
            }
            for low, high, clipped, removed in zip(
                PROBABILITY_EDGES,
                PROBABILITY_EDGES[1:],
                found.share_by_bin(rule, CLIPPED, "tokens"),
                found.share_by_bin(rule, REMOVED, "gradient"),
                strict=False,
            )
        ],
    }


def _share(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


COLUMNS = {
    "rule": "rule",
    "clip_fraction": "clipped",
    "gradient_removed": "gradient removed",
    "gradient_kept": "kept",
    "gradient_kept_optimum": "best kept",
    "kl": "KL",
    "tv": "TV",
    "ratio_max": "max ratio",
    "only_this_rule": "alone",
}
"""Fields of a short table, with their headings."""


def texts_of(row: dict[str, Any]) -> dict[str, str]:
    """Returns the cells of a row of a short table, shares in percent with their interval."""
    return {heading: _text(name, row[name]) for name, heading in COLUMNS.items()}


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        of_tokens = name in ("kl", "tv")
        return _number(value["value"]) if of_tokens else _percent_with_interval(value)
    if name in ("gradient_kept", "gradient_kept_optimum"):
        return "-" if math.isnan(value) else f"{value:.2%}"
    return f"{value:.0f}" if name == "only_this_rule" else _number(value)


def _percent_with_interval(share: dict[str, float]) -> str:
    value, half = share["value"], share["high"] - share["value"]
    if math.isnan(value):
        return "-"
    return f"{value:.2%}" if math.isinf(half) else f"{value:.2%} ±{100 * half:.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
