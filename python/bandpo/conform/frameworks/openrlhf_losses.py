"""OpenRLHF's policy loss, and its correction for the engine that sampled."""

from __future__ import annotations

from typing import Any

from openrlhf.models.loss import PolicyLoss

from bandpo.conform.batch import Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector

_LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dapo": {"clip_eps_high": 0.28},
    "dual-clip": {"dual_clip": 3.0},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4},
    "luspo": {"policy_loss_type": "gspo", "clip_eps_low": 2e-3, "clip_eps_high": 2.5e-3},
    "icepop": {"is_correction_level": "token", "is_correction_threshold": (0.5, 5.0)},
    "tis": {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.0, 2.0),
    },
}

_TOKEN_LEVEL = {"token-mean": True, "seq-mean-token-mean": False}
"""``token_level_loss`` by mode."""


def loss_of(vector: Vector) -> LossOf | None:
    """Returns OpenRLHF's loss of a vector's preset and mode, or None where it has none."""
    numbers, token_level = _LOSSES.get(vector.preset), _TOKEN_LEVEL.get(vector.mode)
    if numbers is None or token_level is None:
        return None
    if "policy_loss_type" in numbers and token_level:
        return None  # gspo has the mean over sequences alone
    module = PolicyLoss(token_level_loss=token_level, **numbers)

    def loss(batch: MicroBatch) -> Loss:
        value, *_ = module(
            batch.log_prob,
            batch.old_log_prob,
            batch.advantages,
            action_mask=batch.response_mask,
            rollout_log_probs=batch.rollout_log_prob,
            batch_num_tokens=batch.tokens,
            global_batch_size=batch.sequences,
        )
        return Loss(value)

    return loss
