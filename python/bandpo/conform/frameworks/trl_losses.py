"""TRL's `GRPOTrainer._compute_loss` on a batch, without a model or a trainer around it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.frameworks.loss_types import settings_of
from bandpo.conform.vectors import Vector


def loss_of(vector: Vector) -> LossOf | None:
    """Returns TRL's loss of a vector's preset and mode, or None where it has none."""
    settings = settings_of(vector.preset, vector.mode)
    if settings is None:
        return None
    parts = 2 if vector.case == SPLIT else 1
    return lambda batch: _loss(batch, parts, **settings)


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
