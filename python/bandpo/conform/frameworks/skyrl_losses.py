"""SkyRL's registered policy losses, with its reductions and its truncated importance sampling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector

_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("regular", {}),
    "dapo": ("regular", {"eps_clip_high": 0.28}),
    "dual-clip": ("dual_clip", {"clip_ratio_c": 3.0}),
    "gspo": ("gspo", {"eps_clip_low": 3e-4, "eps_clip_high": 4e-4}),
    "luspo": ("gspo", {"eps_clip_low": 2e-3, "eps_clip_high": 2.5e-3}),
    "sapo": ("sapo", {"sapo": SimpleNamespace(tau_pos=1.0, tau_neg=1.05)}),
    "cispo": (
        "cispo",
        {"cispo": SimpleNamespace(cispo_eps_clip_low=1.0, cispo_eps_clip_high=4.0)},
    ),
    "tis": ("regular", {}),
}

_REDUCTIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}

_CORRECTION = {
    "tis_ratio_type": None,
    "token_tis_ratio_clip_high": 2.0,
    "sequence_mask_metric": None,
    "outlier_token_is_threshold_low": None,
    "outlier_token_is_threshold_high": None,
    "token_mask_is_threshold_low": None,
    "token_mask_is_threshold_high": None,
}


def loss_of(vector: Vector) -> LossOf | None:
    """Returns SkyRL's loss of a vector's preset and mode, or None where it has none.

    SkyRL divides the advantages of a whole batch before it is split, so that the vector in two
    parts is left out.
    """
    found, reduction = _LOSSES.get(vector.preset), _REDUCTIONS.get(vector.mode)
    if found is None or reduction is None or vector.case == SPLIT:
        return None
    name, numbers = found
    function = PolicyLossRegistry.get(name)
    ratio_type = "token" if vector.preset == "tis" else None
    correction = SimpleNamespace(**{**_CORRECTION, "tis_ratio_type": ratio_type})
    config = SimpleNamespace(
        **{"eps_clip_low": 0.2, "eps_clip_high": 0.2, **numbers},
        policy_loss_type=name,
        loss_reduction=reduction,
        off_policy_correction=correction,
    )

    def loss(batch: MicroBatch) -> Loss:
        mask = batch.response_mask.to(batch.log_prob.dtype)
        advantages = apply_loss_reduction_to_advantages_minibatch(
            batch.advantages, mask, reduction, len(mask), batch.width
        )
        value, _ = function(
            batch.log_prob,
            batch.old_log_prob,
            advantages,
            config=config,
            loss_mask=mask,
            rollout_logprobs=batch.rollout_log_prob,
        )
        return Loss(value)

    return loss
