"""AReaL: `ppo_actor_loss_fn` with the bounds of a region.

`install` puts it where AReaL's actor takes it from. AReaL has no setting for a loss, so that each
process that trains has to call it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from bandpo.error import InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import check_version, require, require_reads

ActorLoss = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


def banded(actor_loss: ActorLoss, settings: LossSettings) -> ActorLoss:
    """Returns AReaL's ``ppo_actor_loss_fn`` with two epsilons for each token.

    The region stands at ``proximal_logprobs``, the denominator of the ratio that is clipped, or
    with the anchor "rollout" at ``old_logprobs``, those of the engine. Masks, dual clip, rejection
    and statistics are AReaL's.

    Args:
        actor_loss: AReaL's function, called with keywords alone.
        settings: The rule, which has to be a region and the surrogate min-clip.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp. A call raises it if
            ``importance_sampling_level`` is not "token".
    """
    check_settings(settings).refuse_correction("AReaL", "rejection_sampling has its own")
    settings.refuse_changes("AReaL")
    region = settings.clamp_region("AReaL")
    anchored = settings.anchor == "rollout"

    @wraps(actor_loss)
    def band_loss(**tensors: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        level = tensors.get("importance_sampling_level", "token")
        if level != "token":
            raise InvalidValueError(
                f"importance_sampling_level must be 'token' with a region, which is about the "
                f"probability of a token, got {level!r}"
            )
        anchor = tensors["old_logprobs"] if anchored else None
        low, high = epsilons(region, tensors["proximal_logprobs"], anchor)
        return actor_loss(**{**tensors, "eps_clip": low, "eps_clip_higher": high})

    return band_loss


def install(**fields: Any) -> None:
    """Makes AReaL's actor of this process take the loss of `banded`.

    Args:
        **fields: The rule; see `LossSettings`.
    """
    import areal.trainer.ppo.actor as actor

    check_version("areal", "1.0.4")
    require("areal", actor, "ppo_actor_loss_fn", "grpo_loss_fn")
    require_reads("areal", actor.grpo_loss_fn, "ppo_actor_loss_fn")
    theirs = getattr(actor.ppo_actor_loss_fn, "__wrapped__", actor.ppo_actor_loss_fn)
    require_reads("areal", theirs, "proximal_logprobs", "eps_clip", "eps_clip_higher")
    require("areal", actor, "sapo_loss_fn")
    actor.ppo_actor_loss_fn = banded(theirs, LossSettings.of(fields))
    actor.sapo_loss_fn = _refuse_sapo


def _refuse_sapo(**_: Any) -> None:
    raise InvalidValueError(
        "use_sapo_loss must be false with a region, because AReaL's loss of SAPO does not clip"
    )
