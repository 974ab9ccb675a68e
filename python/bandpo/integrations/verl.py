"""verl: the policy loss ``bandpo``, which an import of this module registers.

verl 0.9 imports it where bandpo is installed, by the entry point group ``verl.plugins``; earlier
versions, and rLLM, with ``VERL_USE_EXTERNAL_MODULES=bandpo.integrations.verl``. ``bandpo doctor
--verl`` tries it.

``actor_rollout_ref.actor.policy_loss.loss_mode=bandpo`` is the band of kl, with delta 0.01 and
ratios up to 10. With
``policy_loss._target_=bandpo.integrations.verl.BandPOPolicyLossConfig`` it has fields for others.
docs/integrations/verl.md has the rest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bandpo.error import InvalidTypeError
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.verl_config import FIELDS, NAME, BandPOPolicyLossConfig, loss_of
from bandpo.integrations.version import installed, missing_hook
from bandpo.loss import GlobalBatch
from bandpo.schedule import ScheduledBand

try:
    from verl.trainer.ppo.core_algos import register_policy_loss
except ImportError as error:
    raise missing_hook("verl", f"hook for a policy loss ({error})") from error

if TYPE_CHECKING:
    import torch

__all__ = ["NAME", "BandPOPolicyLossConfig", "policy_loss"]


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
    ignored = [name for name in (*FIELDS, "record") if config.get(name, None) is not None]
    if ignored:
        raise InvalidTypeError(
            f"policy_loss must be a BandPOPolicyLossConfig to have {', '.join(ignored)}, got "
            f"{type(config).__name__}; set policy_loss._target_={__name__}.BandPOPolicyLossConfig"
        )
    return _default()


@lru_cache(1)
def _default() -> TrainerLoss:
    return loss_of(LossSettings())
