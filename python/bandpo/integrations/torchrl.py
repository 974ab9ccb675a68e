"""torchrl: `GRPOLoss` and `ClipPPOLoss` with the bounds of a region.

``BandGRPOLoss(actor, settings=LossSettings("(kl@0.01).cap(10)"))`` takes the place of
``GRPOLoss(actor)``, and `BandClipPPOLoss` likewise. All but the loss of a token, or the clip, is
torchrl's.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives.llm import GRPOLoss

from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.torchrl_ppo import BandClipPPOLoss, check_options
from bandpo.integrations.version import check_version, require, require_reads

check_version("torchrl", "0.14.1")
require("torchrl", GRPOLoss, "_log_weight", "_compute_policy_objective")
require_reads("torchrl", GRPOLoss.forward, "_log_weight", "_compute_policy_objective")

__all__ = ["BandClipPPOLoss", "BandGRPOLoss"]


class BandGRPOLoss(GRPOLoss):  # type: ignore[misc]
    """torchrl's `GRPOLoss`, whose loss of a token is that of `bandpo.loss.policy_loss`.

    The region stands at ``tensor_keys.sample_log_prob``, the denominator of the ratio. The output's
    ``clip_fraction`` is that of `policy_loss`: of the tokens that count, the fraction beyond the
    bound on the side of their advantage. Schedules of ``clip_epsilon`` have no effect.

    Args:
        actor_network: The policy, as for `GRPOLoss`.
        settings: The rule. torchrl's loss has no third policy, so that it takes neither an anchor
            nor a correction.
        **options: Arguments of `GRPOLoss`, but for ``clip_epsilon``.

    Attributes:
        band_loss: The loss of the tokens; ``band_loss.region.step()`` advances a schedule.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If there is a ``clip_epsilon`` as well, or an anchor or a correction, or
            the region learns from batches.
    """

    def __init__(
        self,
        actor_network: Any = None,
        *,
        settings: LossSettings,
        **options: Any,
    ) -> None:
        check_options(options)
        check_settings(settings).refuse_rollout("torchrl")
        settings.refuse_changes("torchrl", but_steps=True)
        super().__init__(actor_network, **options)
        self.band_loss = TrainerLoss(settings)
        self._tokens: tuple[torch.Tensor, ...] = ()

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        found = super()._log_weight(tensordict, adv_shape)
        old_log_prob = tensordict.get(
            self.tensor_keys.sample_log_prob,
            as_padded_tensor=True,
            padding_side="left",
            padding_value=0.0,
        )
        self._tokens = old_log_prob, tensordict["_cur_log_prob"], found[-1]
        return found  # type: ignore[no-any-return]

    def _compute_policy_objective(
        self, log_weight: torch.Tensor, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (old_log_prob, log_prob, mask), self._tokens = self._tokens, ()
        result = self.band_loss(
            old_log_prob, log_prob, advantage.squeeze(-1), mask, loss_agg_mode="none"
        )
        clipped = result.metrics["clip_fraction_low"] + result.metrics["clip_fraction_high"]
        return result.loss.unsqueeze(-1), clipped
