"""ROLL: actor workers whose range of the clip is the band of each token.

A subclass in a module of the user has the rule, and ``actor_train.worker_cls`` its path.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from roll.pipeline.agentic.agentic_actor_worker import ActorWorker as AgenticActorWorker
from roll.pipeline.rlvr.actor_worker import ActorWorker

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import require, require_reads
from bandpo.rule import AnyRegion

_HOOK = "get_old_log_probs_with_cache"
for _worker in (ActorWorker, AgenticActorWorker):
    require("roll", _worker, _HOOK)
    require_reads(
        "roll", _worker.loss_func, _HOOK, "use_pg_clip_range", "pg_clip_low", "pg_clip_high"
    )


class _Banded:
    """Sets the range of the clip where ROLL's loss has the old log-probs and before it reads it."""

    settings: ClassVar[LossSettings]
    _region: ClassVar[AnyRegion]
    pipeline_config: Any

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "settings" in vars(cls):
            settings = check_settings(cls.settings)
            settings.refuse_correction("ROLL", "train_infer_correction has its own")
            settings.refuse_changes("ROLL")
            cls._region = settings.clamp_region("ROLL")

    def __init__(self, *options: Any, **named: Any) -> None:
        if not hasattr(type(self), "_region"):
            raise InvalidTypeError(
                f"settings must be a LossSettings of class {type(self).__name__}, which has none"
            )
        super().__init__(*options, **named)

    def get_old_log_probs_with_cache(self, data: Any, log_probs: torch.Tensor) -> torch.Tensor:
        """Returns ROLL's old log-probs."""
        old: torch.Tensor = super().get_old_log_probs_with_cache(  # type: ignore[misc]
            data, log_probs
        )
        anchor = None
        if self.settings.anchor == "rollout":
            anchor = data.batch.get("infer_logprobs", None)
            if anchor is None:
                raise InvalidValueError(
                    "anchor must be 'old' with ROLL where a batch has no infer_logprobs"
                )
        config = self.pipeline_config
        config.pg_clip_low, config.pg_clip_high = epsilons(self._region, old, anchor)
        return old

    def loss_func(self, data: Any, output_tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns ROLL's loss and metrics, with two epsilons for each token."""
        config = self.pipeline_config
        for field in ("importance_sampling", "ratio_type"):  # of rlvr, and agentic
            level = getattr(config, field, "token")
            if level != "token":
                raise InvalidValueError(
                    f"{field} must be 'token' with a region, which is about the probability of a "
                    f"token, got {level!r}"
                )
        numbers = config.use_pg_clip_range, config.pg_clip_low, config.pg_clip_high
        config.use_pg_clip_range = True
        try:
            return super().loss_func(data, output_tensor)  # type: ignore[misc, no-any-return]
        finally:
            config.use_pg_clip_range, config.pg_clip_low, config.pg_clip_high = numbers


class BandActorWorker(_Banded, ActorWorker):  # type: ignore[misc]
    """ROLL's worker of the pipeline rlvr; a subclass sets ``settings``, a `LossSettings`."""


class BandAgenticActorWorker(_Banded, AgenticActorWorker):  # type: ignore[misc]
    """ROLL's worker of the agentic pipeline; a subclass sets ``settings``, a `LossSettings`."""
