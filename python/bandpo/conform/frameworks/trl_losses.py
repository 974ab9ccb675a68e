"""TRL's weights of VESPO, the part of its losses that is a function; token-mean alone."""

from __future__ import annotations

from trl.trainer.grpo_trainer import GRPOTrainer

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector


def loss_of(vector: Vector) -> LossOf | None:
    """Returns the loss that TRL's weights make, or None where TRL has no function of a batch."""
    if vector.preset != "vespo" or vector.mode != "token-mean" or vector.case == SPLIT:
        return None
    return _loss


def _loss(batch: MicroBatch) -> Loss:
    valid = batch.response_mask != 0
    weights = GRPOTrainer.get_gamma_weights(
        advantages=batch.advantages[:, :1],
        log_ratio_per_token=batch.log_prob - batch.old_log_prob,
        mask=batch.response_mask,
        importance_sampling_ratio=None,
    )
    terms = -weights * batch.advantages * batch.log_prob
    return Loss((terms * valid).sum() / batch.tokens)
