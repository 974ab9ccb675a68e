"""Trinity-RFT: a policy loss that ``algorithm.policy_loss_fn`` names by its path.

``policy_loss_fn: bandpo.integrations.trinity.BandPolicyLossFn``, and the rule in
``policy_loss_fn_args``.
"""

from __future__ import annotations

from typing import Any

import torch
from trinity.algorithm.policy_loss_fn.policy_loss_fn import PolicyLossFn
from trinity.algorithm.utils import aggregate_loss

from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version
from bandpo.loss import Metrics

check_version("trinity-rft", "0.6.0")


class BandPolicyLossFn(PolicyLossFn):  # type: ignore[misc]
    """A policy loss of Trinity, aggregated by Trinity.

    The region stands at ``old_logprob``, the denominator of the ratio.

    Args:
        backend: Trinity's trainer, which maps the names of the tensors.
        loss_agg_mode: Trinity's aggregation; its configuration sets it.
        **fields: The rule; see `LossSettings`.

    Raises:
        InvalidTypeError: If a field has the wrong type.
        InvalidValueError: If one is unknown or out of range, or needs a third policy or a schedule.
    """

    def __init__(
        self, backend: str = "verl", loss_agg_mode: str = "token-mean", **fields: Any
    ) -> None:
        super().__init__(backend=backend)
        settings = LossSettings.of(fields)
        settings.refuse_rollout("Trinity")
        settings.refuse_changes("Trinity")
        self.loss_agg_mode = loss_agg_mode
        self.band_loss = TrainerLoss(settings)

    def __call__(
        self,
        logprob: torch.Tensor,
        old_logprob: torch.Tensor,
        action_mask: torch.Tensor,
        advantages: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the loss and metrics as numbers; Trinity reads the names of the arguments."""
        result = self.band_loss(old_logprob, logprob, advantages, action_mask, loss_agg_mode="none")
        loss = aggregate_loss(result.loss, action_mask, loss_agg_mode=self.loss_agg_mode)
        metrics = Metrics({**result.metrics, "pg_loss": loss.detach()})
        found = metrics.scalars("band/")  # one wait for all of them
        clipped = found["band/clip_fraction_low"] + found["band/clip_fraction_high"]
        named = {"pg_loss": found.pop("band/pg_loss"), "ppo_kl": found["band/approx_kl"]}
        return loss, {"pg_clipfrac": clipped, **named, **found}

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        """Returns the arguments of a configuration that has none."""
        return {"loss_agg_mode": "token-mean"}
