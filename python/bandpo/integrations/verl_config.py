"""verl's configuration of the policy loss ``bandpo``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from bandpo.error import InvalidValueError
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version, missing_hook

try:
    from verl.workers.config import PolicyLossConfig
except ImportError as error:
    raise missing_hook("verl", f"hook for a policy loss ({error})") from error

NAME = "bandpo"
"""The loss_mode."""

_KEPT = ("_target_", "loss_mode", "rollout_correction")
"""Fields of verl's class that this loss has too, or that verl sets by itself."""

FIELDS = [field.name for field in fields(LossSettings)]
"""Fields of the rule."""


@dataclass
class BandPOPolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's configuration of a policy loss, with the fields of `LossSettings`, which it describes.

    ``record`` is a folder for a sample of the tokens of the run; see `bandpo.record.Recorder`.

    Raises:
        InvalidTypeError: If a field has the wrong type.
        InvalidValueError: If it is out of range, unknown or of another loss of verl, or the rule
            needs what verl gives to no loss: rollout log-probs, batches to learn from, or the
            entropy of the policy.
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
        self._refuse_inherited()
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
        settings = LossSettings(**{name: getattr(self, name) for name in FIELDS})
        recording = None
        if self.record is not None:
            recording = Recording(self.record, rule=settings.as_json())
        return loss_of(settings, recording)

    def _refuse_inherited(self) -> None:
        """Raises if a field of another loss of verl is set, which this one does not read."""
        for own in fields(PolicyLossConfig):
            if own.name in (*_KEPT, *FIELDS) or own.default is MISSING:
                continue
            value = getattr(self, own.name)
            if value != own.default:
                raise InvalidValueError(
                    f"{own.name} must be left out with loss_mode {NAME!r}, which does not read it, "
                    f"got {value!r}; it belongs to another loss of verl, and the rule of this one "
                    f"is in {', '.join(FIELDS)}"
                )


def loss_of(settings: LossSettings, recording: Recording | None = None) -> TrainerLoss:
    """Returns the loss of settings, whose schedule follows the optimiser's steps."""
    check_version("verl", "0.7.1", "0.9.1")
    return TrainerLoss(settings, count_steps=True, recording=recording)
