"""verl's registered policy losses, and its rollout correction with the loss "vanilla"."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig

from bandpo.conform.batch import Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector

_NONE = 1e30
"""A limit that nothing reaches, where verl needs one."""

_LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "ppo": ("vanilla", {"clip_ratio_c": _NONE}),
    "dapo": ("vanilla", {"clip_ratio_high": 0.28, "clip_ratio_c": _NONE}),
    "dual-clip": ("vanilla", {"clip_ratio_c": 3.0}),
    "dppo-tv": (
        "dppo_tv",
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": _NONE},
    ),
    "dppo-kl": (
        "dppo_kl",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": _NONE},
    ),
    "gspo": ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "luspo": ("gspo", {"clip_ratio_low": 2e-3, "clip_ratio_high": 2.5e-3}),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "gpg": ("gpg", {}),
    "gmpo": ("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    "cispo": ("cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    "icepop": ("vanilla", {"clip_ratio_c": _NONE}),
    "tis": ("vanilla", {"clip_ratio_c": _NONE}),
    "geo-mask": ("vanilla", {"clip_ratio_c": _NONE}),
}

_CORRECTIONS: dict[str, dict[str, Any]] = {
    "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"},
    "tis": {"rollout_is": "token", "rollout_is_threshold": 2.0},
    "geo-mask": {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.99_1.01"},
}

_ONE_MODE = {"sapo", "gmpo"}
"""Presets whose loss of verl has one aggregation, whatever is asked for."""


def loss_of(vector: Vector) -> LossOf | None:
    """Returns verl's loss of a vector's preset, or None where there is none."""
    found = _LOSSES.get(vector.preset)
    if found is None or (vector.preset in _ONE_MODE and vector.mode != "seq-mean-token-mean"):
        return None
    name, numbers = found
    function = get_policy_loss_fn(name)
    correction = _CORRECTIONS.get(vector.preset)

    def loss(batch: MicroBatch) -> Loss:
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            global_batch_info={
                "dp_size": 1,
                "batch_num_tokens": batch.tokens,
                "global_batch_size": batch.sequences,
                "loss_scale_factor": batch.width,
            },
            **numbers,
        )
        mask, weights = batch.response_mask, None
        if correction is not None:
            made, mask, _ = compute_rollout_correction_and_rejection_mask(
                batch.old_log_prob, batch.rollout_log_prob, mask, **correction
            )
            weights = None if made is None else made.batch["rollout_is_weights"]
        value, _ = function(
            old_log_prob=batch.old_log_prob,
            log_prob=batch.log_prob,
            advantages=batch.advantages,
            response_mask=mask,
            loss_agg_mode=batch.mode,
            config=config,
            rollout_is_weights=weights,
        )
        return Loss(value)

    return loss
