"""`TrainerLoss`: the loss of settings, for a trainer that takes a whole loss."""

from __future__ import annotations

import torch

from bandpo.error import InvalidValueError
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.steps import OptimizerSteps
from bandpo.loss import GlobalBatch, PolicyLossResult, policy_loss
from bandpo.rule import AggregationMode, RuleRegion
from bandpo.schedule import ScheduledBand


class TrainerLoss:
    """`bandpo.loss.policy_loss` with the rule of settings, and a region of its own.

    Args:
        settings: The rule.
        count_steps: Advance the schedule of the band after each step of the optimiser, for a
            trainer that tells its loss of none; see `bandpo.integrations.steps.OptimizerSteps`.
        recording: Record of the batches whose loss has a gradient.

    Attributes:
        region: The region. ``step`` of a `bandpo.schedule.ScheduledBand` advances its schedule.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        count_steps: bool = False,
        recording: Recording | None = None,
    ) -> None:
        self.settings = settings
        self._recording = recording
        self._arguments = settings.arguments()
        self.region: RuleRegion = self._arguments["region"]
        self._steps = (
            OptimizerSteps(self.region)
            if count_steps and isinstance(self.region, ScheduledBand)
            else None
        )

    def __call__(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        *,
        loss_agg_mode: AggregationMode,
        rollout_log_prob: torch.Tensor | None = None,
        rollout_is_weights: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        global_batch: GlobalBatch | None = None,
    ) -> PolicyLossResult:
        """Returns `bandpo.loss.policy_loss` of a batch, which describes the arguments.

        ``rollout_log_prob`` may be given where the rule does not read it.

        Raises:
            InvalidValueError: If the rule reads it and it is None, or as `policy_loss` does.
        """
        if self._steps is not None and log_prob.requires_grad:
            self._steps.loss_is_called()
        anchored = self.settings.anchor == "rollout"
        corrected = self._arguments["correction"] is not None
        if rollout_log_prob is None and (anchored or corrected):
            reader = "anchor 'rollout'" if anchored else repr(self._arguments["correction"])
            raise InvalidValueError(
                f"rollout_log_prob must be given with {reader}: the log-probabilities that the "
                f"rollout engine returned with the tokens"
            )
        if self._recording is not None and log_prob.requires_grad:
            self._recording(
                *(old_log_prob, log_prob, advantages, response_mask),
                rollout_log_prob=rollout_log_prob,
                cu_seqlens=cu_seqlens,
            )
        return policy_loss(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            **self._arguments,
            loss_agg_mode=loss_agg_mode,
            rollout_log_prob=rollout_log_prob if corrected else None,
            anchor_log_prob=rollout_log_prob if anchored else None,
            rollout_is_weights=rollout_is_weights,
            cu_seqlens=cu_seqlens,
            global_batch=global_batch,
        )
