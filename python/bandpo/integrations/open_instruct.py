"""Open-Instruct: `compute_grpo_loss` with the bounds of a region.

`install` puts it where both trainers call it. Open-Instruct has no setting for a loss, so that each
process that trains has to call it; in its Ray workers `bandpo.integrations.ray_workers` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from bandpo.error import InvalidValueError
from bandpo.integrations.clamps import open_instruct_region
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import check_version, require, require_reads

GrpoLoss = Callable[..., tuple[torch.Tensor, ...]]


def banded(grpo_loss: GrpoLoss, settings: LossSettings) -> GrpoLoss:
    """Returns Open-Instruct's ``compute_grpo_loss`` with two epsilons for each token.

    The region stands at the denominator of the ratio, which Open-Instruct gives as
    ``new_logprobs`` and ``ratio``. Importance weights, masks and KL terms are Open-Instruct's.

    Args:
        grpo_loss: Open-Instruct's function, called with keywords alone.
        settings: The rule, which has to be a region and the surrogate min-clip.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp. A call raises it if ``config.loss_fn``
            is not "dapo".
    """
    region = open_instruct_region(check_settings(settings))

    @wraps(grpo_loss)
    def band_loss(
        *, new_logprobs: torch.Tensor, ratio: torch.Tensor, config: Any, **others: Any
    ) -> tuple[torch.Tensor, ...]:
        if config.loss_fn != "dapo":
            raise InvalidValueError(
                f"loss_fn must be 'dapo' with a region, the one that clips the ratio on both "
                f"sides, got {str(config.loss_fn)!r}"
            )
        old = new_logprobs.detach() - ratio.detach().log()
        config = copy.copy(config)
        config.clip_lower, config.clip_higher = epsilons(region, old)
        return grpo_loss(new_logprobs=new_logprobs, ratio=ratio, config=config, **others)

    return band_loss


def install(**fields: Any) -> None:
    """Makes the trainers of this process take the loss of `banded`.

    Args:
        **fields: The rule; see `LossSettings`.
    """
    import open_instruct.grpo_utils as module

    check_version("open-instruct", "0.3")  # a checkout counts its commits since 0.3.0
    require("open-instruct", module, "compute_grpo_loss")
    theirs = getattr(module.compute_grpo_loss, "__wrapped__", module.compute_grpo_loss)
    names = "new_logprobs", "ratio", "loss_fn", "clip_lower", "clip_higher"
    require_reads("open-instruct", theirs, *names)
    module.compute_grpo_loss = banded(theirs, LossSettings.of(fields))
