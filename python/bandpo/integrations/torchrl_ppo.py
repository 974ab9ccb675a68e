"""torchrl: `ClipPPOLoss` with the bounds of a region; `bandpo.integrations.torchrl` has it too."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives import ClipPPOLoss

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import require
from bandpo.torch import log_bounds

require("torchrl", ClipPPOLoss, "_log_weight", "_clip_bounds")


class BandClipPPOLoss(ClipPPOLoss):  # type: ignore[misc]
    """torchrl's `ClipPPOLoss`, which clips each action's ratio to the region.

    The region stands at the denominator of that ratio: ``tensor_keys.sample_log_prob``, or the
    proximal policy with ``delay_actor``. A region is about probabilities, so that the policy's
    actions must be discrete. Schedules of ``clip_epsilon`` have no effect.

    A call raises InvalidTypeError if they are not.

    Args:
        actor_network: The policy, as for `ClipPPOLoss`.
        critic_network: The critic, likewise.
        settings: The rule, which has to be a region and the surrogate min-clip.
        **options: Arguments of `ClipPPOLoss`, but for ``clip_epsilon``.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp or learns from batches, there is a
            ``clip_epsilon`` as well, or ``delay_actor`` with a ``max_importance_ratio``, which
            hides the proximal policy.
    """

    def __init__(
        self,
        actor_network: Any = None,
        critic_network: Any = None,
        *,
        settings: LossSettings,
        **options: Any,
    ) -> None:
        check_options(options)
        if options.get("delay_actor") and options.get("max_importance_ratio") is not None:
            raise InvalidValueError(
                "max_importance_ratio must be None with delay_actor, because the proximal policy's "
                "log-probabilities cannot be read from its weights"
            )
        check_settings(settings).refuse_rollout("torchrl")
        settings.refuse_changes("torchrl", but_steps=True)
        region = settings.clamp_region("torchrl's ClipPPOLoss")
        super().__init__(actor_network, critic_network, **options)
        self.region = region
        self._old_log_prob = torch.empty(0)

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        found = super()._log_weight(tensordict, adv_shape)
        _, dist, _, log_is_weight = found
        old_log_prob = tensordict.get(self.tensor_keys.sample_log_prob)
        if not isinstance(old_log_prob, torch.Tensor) or not _is_discrete(dist):
            raise InvalidTypeError(
                f"the policy must have one distribution of discrete actions, because a region is "
                f"about probabilities, got {type(dist).__name__}"
            )
        old_log_prob = old_log_prob.unsqueeze(-1)
        self._old_log_prob = old_log_prob + log_is_weight if self.delay_actor else old_log_prob
        return found  # type: ignore[no-any-return]

    @property
    def _clip_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        return log_bounds(self.region, self._old_log_prob)


def check_options(options: dict[str, Any]) -> None:
    """Raises InvalidValueError if torchrl's own width of a clip is given."""
    if "clip_epsilon" in options:
        raise InvalidValueError(
            f"clip_epsilon must be left out, because the region has the bounds, "
            f"got {options['clip_epsilon']!r}"
        )


def _is_discrete(dist: Any) -> bool:
    """False as well for a distribution that does not say what it is over."""
    try:
        return bool(dist.support.is_discrete)
    except (AttributeError, NotImplementedError, TypeError):
        return False
