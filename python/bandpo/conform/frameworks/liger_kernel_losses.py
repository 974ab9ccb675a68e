"""Liger's GRPO loss on log-probs, without the head in front of it."""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.frameworks.loss_types import settings_of
from bandpo.conform.vectors import Vector


def loss_of(vector: Vector) -> LossOf | None:
    """Returns Liger's loss of a vector's preset and mode, or None where it has none."""
    settings = settings_of(vector.preset, vector.mode)
    if settings is None:
        return None
    parts = 2 if vector.case == SPLIT else 1
    return lambda batch: _loss(batch, parts, **settings)


def _loss(batch: MicroBatch, parts: int, *, level: str = "token", **settings: Any) -> Loss:
    """Returns the loss of a chunk, one of ``parts`` of a batch."""
    mask = batch.response_mask
    value, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=batch.log_prob,
        attention_mask=mask,
        advantages=batch.advantages[:, 0],  # one for each sequence
        # Its rows alone are read, because a count of tokens is given.
        full_attention_mask=torch.cat([mask] * parts),
        old_per_token_logps=batch.old_log_prob,
        beta=0.0,
        max_completion_length=batch.width,
        importance_sampling_level=level,
        num_items_in_batch=torch.tensor(batch.tokens),
        **settings,
    )
    return Loss(value)
