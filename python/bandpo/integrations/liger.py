"""Liger-Kernel: the chunked GRPO loss with the bounds of a region.

`BandGRPOLoss` takes the place of ``LigerFusedLinearGRPOLoss``. Head, chunks, loss types and metrics
are Liger's.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
)

from bandpo.check import check_name
from bandpo.error import InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings, refuse_delta
from bandpo.integrations.version import check_version, missing_hook, require_reads
from bandpo.rule import AnyRegion

check_version("liger-kernel", "0.8.5")
require_reads("liger-kernel", LigerFusedLinearPPOBase.forward, "ppo_loss_fn")
require_reads(
    "liger-kernel",
    LigerFusedLinearGRPOFunction.ppo_loss_fn,
    "old_per_token_logps",
    "epsilon_low",
    "epsilon_high",
)

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types of Liger that clamp the ratio of each token between two numbers."""


class BandGRPOLoss(LigerFusedLinearGRPOLoss):  # type: ignore[misc]
    """Liger's `LigerFusedLinearGRPOLoss`, with two epsilons for each token.

    Its own two have no effect. The region stands at ``old_per_token_logps``; without them every
    ratio is 1, and nothing can clip.

    Args:
        settings: The rule, which has to be a region and the surrogate min-clip.
        **options: Arguments of `LigerFusedLinearGRPOLoss`.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp or learns from batches,
            ``importance_sampling_level`` not "token", ``loss_type`` one that does not clamp, or
            ``delta`` given.
        MissingHookError: If Liger's function has an argument that its module does not keep.
    """

    def __init__(self, *, settings: LossSettings, **options: Any) -> None:
        super().__init__(**options)
        check_name("loss_type, with a region,", self.loss_type, LOSS_TYPES)
        if self.importance_sampling_level != "token":
            raise InvalidValueError(
                f"importance_sampling_level must be 'token' with a region, which is about the "
                f"probability of a token, got {self.importance_sampling_level!r}"
            )
        refuse_delta(self.delta, "Liger")
        check_settings(settings).refuse_rollout("Liger")
        settings.refuse_changes("Liger", but_steps=True)
        self.region = settings.clamp_region("Liger")
        given = signature(super().forward).parameters
        self._arguments = [
            {"weight": "lin_weight"}.get(name, name)
            for name in list(signature(LigerFusedLinearGRPOFunction.forward).parameters)[1:]
        ]
        for name in self._arguments:
            if name not in given and not hasattr(self, name):
                raise missing_hook("liger-kernel", f"{name} in LigerFusedLinearGRPOLoss")

    def forward(self, *args: Any, **named: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the loss and Liger's metrics; the arguments are Liger's."""
        given = signature(super().forward).bind(*args, **named)
        given.apply_defaults()
        values = (
            given.arguments[name] if name in given.arguments else getattr(self, name)
            for name in self._arguments
        )
        return _function(self.region).apply(*values)  # type: ignore[no-any-return, no-untyped-call]


@lru_cache(64)
def _function(region: AnyRegion) -> type[torch.autograd.Function]:
    """Liger's function for a region; one a region, so that it is compiled once."""

    class BandFunction(LigerFusedLinearGRPOFunction):  # type: ignore[misc]
        @staticmethod
        def ppo_loss_fn(*args: Any, **named: Any) -> Any:
            old_log_prob = named["old_per_token_logps"]
            if old_log_prob is not None:
                low, high = epsilons(region, old_log_prob)
                named = {**named, "epsilon_low": low, "epsilon_high": high}
            return LigerFusedLinearGRPOFunction.ppo_loss_fn(*args, **named)

    return BandFunction
