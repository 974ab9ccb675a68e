"""TRL's `GRPOTrainer._compute_loss` on a batch, without a model or a trainer around it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector

_AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-sum": "luspo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}
"""The loss type of TRL with the min of two products that is aggregated as a mode says."""

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


def loss_of(vector: Vector) -> LossOf | None:
    """Returns TRL's loss of a vector's preset and mode, or None where it has none."""
    numbers = _OTHERS.get((vector.preset, vector.mode))
    loss_type = vector.preset
    if numbers is None:
        numbers, loss_type = _CLIPS.get(vector.preset), _AGGREGATIONS.get(vector.mode, "")
    if numbers is None or not loss_type:
        return None
    parts = 2 if vector.case == SPLIT else 1
    return lambda batch: _loss(batch, parts, loss_type=loss_type, **numbers)


def _loss(
    batch: MicroBatch,
    parts: int = 1,
    *,
    loss_type: str,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    level: str = "token",
) -> Loss:
    """Returns the loss that TRL's trainer makes of a batch, one of ``parts``, by its settings."""
    rows, width = batch.response_mask.shape
    ids = torch.zeros(rows, width, dtype=torch.long, device=batch.device)
    args = SimpleNamespace(
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=parts,
    )
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value
        ),
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        importance_sampling_level=level,
        current_gradient_accumulation_steps=parts,
        max_completion_length=width,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=0.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            batch.log_prob,
            torch.zeros_like(batch.log_prob),
            None,
        ),
    )
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": batch.response_mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_prob,
        "num_items_in_batch": torch.tensor(batch.tokens),
    }
    return Loss(GRPOTrainer._compute_loss(trainer, None, inputs))
