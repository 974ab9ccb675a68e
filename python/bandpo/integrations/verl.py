"""verl: the policy loss ``bandpo``, which an import of this module registers.

verl 0.9 imports it where bandpo is installed, by the entry point group ``verl.plugins``; earlier
versions, and rLLM, with ``VERL_USE_EXTERNAL_MODULES=bandpo.integrations.verl``. ``bandpo doctor
--verl`` tries it.

``actor_rollout_ref.actor.policy_loss.loss_mode=bandpo`` is the rule of the preset bandpo-kl. With
``policy_loss._target_=bandpo.integrations.verl.BandPOPolicyLossConfig`` it has fields for others.
docs/integrations/verl.md has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version, installed, missing_hook
from bandpo.loss import GlobalBatch
from bandpo.schedule import ScheduledBand

try:
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.workers.config import PolicyLossConfig
except ImportError as error:
    raise missing_hook("verl", f"hook for a policy loss ({error})") from error

if TYPE_CHECKING:
    import torch

NAME = "bandpo"
"""The loss_mode."""

_FIELDS = [field.name for field in fields(LossSettings)]


@dataclass
class BandPOPolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's configuration of a policy loss, with the fields of `LossSettings`, which it describes.

    ``record`` is a folder for a sample of the tokens of the run; see `bandpo.record.Recorder`.

    Raises:
        InvalidTypeError: If a field has the wrong type.
        InvalidValueError: If it is out of range or unknown, or the rule needs what verl gives to no
            loss: rollout log-probs, batches to learn from, or the entropy of the policy.
    """

    loss_mode: str = NAME
    region: Any = None
    preset: str | None = None
    surrogate: Any = None
    dual_clip: float | None = None
    ratio_level: str | None = None
    schedule: Any = None
    anchor: str = "old"
    correction: Any = None
    log_ratio_penalty: float | None = None
    record: str | None = None

    def __post_init__(self) -> None:
        if self.loss_mode != NAME:
            raise InvalidValueError(
                f"loss_mode must be {NAME!r} with BandPOPolicyLossConfig, got {self.loss_mode!r}, "
                f"which ignores its fields; some trainers set it to 'bypass_mode' where "
                f"algorithm.rollout_correction.bypass_mode is True"
            )
        settings = self.band.settings
        if settings.needs_rollout_log_prob:
            raise InvalidValueError(
                "anchor must be 'old', and correction be left out, with verl, whose loss gets no "
                "rollout log-probs: algorithm.rollout_correction.rollout_is=token makes weights of "
                "them, which this loss takes, and bypass_mode=True puts them in place of the old"
            )
        settings.refuse_changes("verl", but_steps=True)
        if settings.needs_entropy:
            raise InvalidValueError(
                f"schedule must be over steps with verl, whose ranks measure different entropies, "
                f"got {self.schedule!r}"
            )

    @cached_property
    def band(self) -> TrainerLoss:
        """The loss of this configuration, with the state of its schedule."""
        settings = LossSettings(**{name: getattr(self, name) for name in _FIELDS})
        return _loss(settings, None if self.record is None else Recording(self.record))


@register_policy_loss(NAME)  # type: ignore[untyped-decorator]
def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: Any = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of a micro-batch and its metrics, as verl calls a policy loss.

    The metrics are verl's ``actor/pg_clipfrac``, ``actor/pg_clipfrac_lower`` and ``actor/ppo_kl``,
    the others of `bandpo.loss.policy_loss` as ``actor/band/NAME``, and the delta of a schedule.
    """
    if any(value is not None for value in others.values()):
        raise InvalidTypeError(
            f"verl {installed('verl')} gives its policy loss {', '.join(others)}, which bandpo's "
            f"adapter does not know"
        )
    config = {} if config is None else config
    loss = _chosen(config.get("policy_loss", None) or {})
    counts = config.get("global_batch_info", None) or {}
    result = loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode=loss_agg_mode,
        rollout_is_weights=rollout_is_weights,
        global_batch=GlobalBatch(
            tokens=counts.get("batch_num_tokens"),
            sequences=counts.get("global_batch_size"),
            dp_size=counts.get("dp_size", 1),
            loss_scale_factor=counts.get("loss_scale_factor"),
        ),
    )
    band = result.metrics.scalars()
    metrics = {
        "actor/pg_clipfrac": band["clip_fraction_low"] + band["clip_fraction_high"],
        "actor/pg_clipfrac_lower": band.pop("dual_clip_fraction", 0.0),
        "actor/ppo_kl": band.pop("approx_kl"),
    }
    if isinstance(loss.region, ScheduledBand):
        band["delta"] = loss.region.schedule.value
    return result.loss, metrics | {f"actor/band/{name}": value for name, value in band.items()}


def _chosen(config: Any) -> TrainerLoss:
    """The loss of a configuration; without fields of ours it is the default."""
    if isinstance(config, BandPOPolicyLossConfig):
        return config.band
    ignored = [name for name in (*_FIELDS, "record") if config.get(name, None) is not None]
    if ignored:
        raise InvalidTypeError(
            f"policy_loss must be a BandPOPolicyLossConfig to have {', '.join(ignored)}, got "
            f"{type(config).__name__}; set policy_loss._target_={__name__}.BandPOPolicyLossConfig"
        )
    return _default()


@lru_cache(1)
def _default() -> TrainerLoss:
    return _loss(LossSettings())


def _loss(settings: LossSettings, recording: Recording | None = None) -> TrainerLoss:
    check_version("verl", "0.7.1", "0.9.1")
    return TrainerLoss(settings, count_steps=True, recording=recording)
