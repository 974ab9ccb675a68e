"""OpenRLHF: `PolicyLoss` with the bounds of a region.

`install` makes OpenRLHF's actor take it. OpenRLHF has no setting for a loss, so that each Ray
worker has to call it: see `bandpo.integrations.ray_workers`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from openrlhf.models.loss import PolicyLoss

from bandpo.error import InvalidValueError
from bandpo.integrations.clamps import openrlhf_region
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import check_version, require, require_reads

check_version("openrlhf", "0.11.2")
require_reads("openrlhf", PolicyLoss.forward, "clip_eps_low", "clip_eps_high")


class BandPolicyLoss(PolicyLoss):  # type: ignore[misc]
    """OpenRLHF's `PolicyLoss`, with two epsilons for each token.

    Aggregation, dual clip, correction and the five returned values are OpenRLHF's; its two numbers
    of a clip have no effect. The region stands at ``old_log_probs``, or with the anchor "rollout"
    at ``rollout_log_probs``.

    Args:
        *options: Arguments of `PolicyLoss`.
        settings: The rule, which has to be a region and the surrogate min-clip.
        **named: Arguments of `PolicyLoss` by name.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp, or ``policy_loss_type`` not "ppo".
    """

    def __init__(self, *options: Any, settings: LossSettings, **named: Any) -> None:
        super().__init__(*options, **named)
        if self.policy_loss_type != "ppo":
            raise InvalidValueError(
                f"policy_loss_type must be 'ppo' with a region, which is about the probability of "
                f"a token, got {self.policy_loss_type!r}"
            )
        self.region = openrlhf_region(check_settings(settings))
        self.anchored = settings.anchor == "rollout"

    def forward(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        *others: Any,
        rollout_log_probs: torch.Tensor | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns loss, clip fraction, and three estimates, as `PolicyLoss` does."""
        if self.anchored and rollout_log_probs is None:
            raise InvalidValueError("rollout_log_probs must be given with anchor 'rollout'")
        anchor = rollout_log_probs if self.anchored else None
        numbers = vars(self)["clip_eps_low"], vars(self)["clip_eps_high"]
        self.clip_eps_low, self.clip_eps_high = epsilons(self.region, old_log_probs, anchor)
        try:
            found: tuple[torch.Tensor | None, ...] = super().forward(
                log_probs, old_log_probs, *others, rollout_log_probs=rollout_log_probs, **named
            )
        finally:
            self.clip_eps_low, self.clip_eps_high = numbers
        return found


def install(**fields: Any) -> None:
    """Makes OpenRLHF's actor of this process take a `BandPolicyLoss`.

    Args:
        **fields: The rule; see `LossSettings`.
    """
    import openrlhf.models

    require("openrlhf", openrlhf.models, "PolicyLoss")
    loss = partial(BandPolicyLoss, settings=LossSettings.of(fields))
    loss()  # so that a rule that is not served is refused here
    openrlhf.models.PolicyLoss = loss
    trainer = sys.modules.get("openrlhf.trainer.ray.ppo_actor")
    if trainer is not None:  # which has the name already
        require("openrlhf", trainer, "PolicyLoss")
        trainer.PolicyLoss = loss  # type: ignore[attr-defined]
