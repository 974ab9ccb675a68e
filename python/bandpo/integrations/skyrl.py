"""SkyRL: a policy loss for its registry.

``register(region="(kl@0.01).cap(10)")`` in the entry point of a run, before the configuration is
checked, and ``trainer.algorithm.policy_loss_type=bandpo``.
"""

from __future__ import annotations

from typing import Any

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
    apply_off_policy_correction,
    off_policy_correction_enabled,
)
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, reduce_loss

from bandpo.error import InvalidValueError
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import check_version

NAME = "bandpo"


class BandPolicyLoss:
    """A policy loss of SkyRL; registered under a name by `register`.

    SkyRL divides the advantages by what its ``loss_reduction`` divides by, so that the losses of
    the tokens are summed. Its ``off_policy_correction`` acts as on its own losses.

    Args:
        settings: The rule.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If it has a log_ratio_penalty, which divided advantages do not reach, or
            a region that changes.
    """

    def __init__(self, settings: LossSettings) -> None:
        penalty = check_settings(settings).arguments()["log_ratio_penalty"]
        if penalty != 0.0:
            raise InvalidValueError(
                f"log_ratio_penalty must be 0 with SkyRL, which divides the advantages and not the "
                f"loss, got {penalty}"
            )
        settings.refuse_changes("SkyRL")
        self.loss = TrainerLoss(settings)
        self.corrects = settings.arguments()["correction"] is not None

    def __call__(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        config: Any,
        loss_mask: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the summed loss, and metrics as numbers.

        Raises:
            InvalidValueError: If the rule and ``config`` both have a correction, or the rule reads
                rollout log-probs and there are none.
        """
        theirs = config.off_policy_correction
        if self.corrects and off_policy_correction_enabled(theirs):
            raise InvalidValueError(
                "off_policy_correction must be left out with a correction of bandpo: "
                "a correction given twice would count twice"
            )
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        result = self.loss(
            old_log_probs,
            log_probs,
            advantages,
            mask,
            loss_agg_mode="none",
            rollout_log_prob=rollout_logprobs,
        )
        losses, mask, corrected = apply_off_policy_correction(
            result.loss, old_log_probs, rollout_logprobs, mask, theirs
        )
        found = result.metrics.scalars("band/")
        clipped = found["band/clip_fraction_low"] + found["band/clip_fraction_high"]
        return reduce_loss(losses, mask), {"clip_ratio": clipped, **found, **corrected}


def register(name: str = NAME, **fields: Any) -> None:
    """Registers a loss, which SkyRL sends to its workers.

    Args:
        name: Value of ``trainer.algorithm.policy_loss_type`` that selects it.
        **fields: The rule; see `LossSettings`.
    """
    check_version("skyrl", "0.3.0")
    PolicyLossRegistry.register(name, BandPolicyLoss(LossSettings.of(fields)))
