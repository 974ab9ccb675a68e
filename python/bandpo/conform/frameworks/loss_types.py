"""Loss types of TRL's trainer, which Liger has as well, by preset and mode of a vector."""

from __future__ import annotations

from typing import Any

_AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-sum": "luspo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}
"""The loss type with the min of two products that is aggregated as a mode says."""

_CLIPS: dict[str, dict[str, Any]] = {
    "ppo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
    "dapo": {"epsilon_low": 0.2, "epsilon_high": 0.28},
    "dual-clip": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 3.0},
    "gspo": {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "level": "sequence"},
    "luspo": {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3, "level": "sequence"},
}
"""Numbers of the presets that are a clip, in every aggregation."""

_OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("cispo", "token-mean"): {"epsilon_high": 5.0},
    ("sapo", "seq-mean-token-mean"): {},
    ("vespo", "token-mean"): {},
}
"""Presets that have a loss type of their own, which has one aggregation."""


def settings_of(preset: str, mode: str) -> dict[str, Any] | None:
    """Returns the loss type and its numbers, or None where there is none."""
    numbers = _OTHERS.get((preset, mode))
    if numbers is not None:
        return {"loss_type": preset, **numbers}
    if preset in _CLIPS and mode in _AGGREGATIONS:
        return {"loss_type": _AGGREGATIONS[mode], **_CLIPS[preset]}
    return None
