"""TRL's `GRPOConfig` with a region."""

from __future__ import annotations

from dataclasses import dataclass, field

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.settings import LossSettings, refuse_delta
from bandpo.integrations.trl_fields import BandFields
from bandpo.integrations.version import missing_hook

try:
    from trl import GRPOConfig
except ImportError as error:
    raise missing_hook("trl", f"GRPOConfig ({error})") from error

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types that clip the ratio on both sides, and so take a region."""


@dataclass
class BandPOConfig(BandFields, GRPOConfig):  # type: ignore[misc]
    """`GRPOConfig` with a region, a schedule of its delta, and uses of rollout log-probs.

    Args:
        region: Bounds of the ratio: a spec (see `bandpo.spec`), or a `bandpo.Region` that has one.
        schedule: Delta by optimiser step, as text; see `bandpo.spec.schedule_from_spec`.
        record: Folder for a sample of the tokens of the run; see `bandpo.record.Recorder`.
        anchor: Policy at which the region stands: "old", the denominator of the ratio, or
            "rollout", the engine that sampled.
        correction: Name of a preset whose correction takes the place of TRL's importance sampling
            ratio, such as "icepop" or "tis".

    Raises:
        InvalidTypeError: If a setting has the wrong type.
        InvalidValueError: If one is out of range, or TRL's loss does not go with a region.
    """

    anchor: str = field(default="old", metadata={"help": "Policy of the region: old or rollout."})
    correction: str | None = field(
        default=None,
        metadata={"help": "Preset whose correction of old/rollout is taken, such as icepop."},
    )

    def check(self) -> None:
        """Raises as the making of a configuration does."""
        refuse_delta(self.delta, "TRL")
        if not isinstance(self.correction, (str, type(None))):
            raise InvalidTypeError(
                f"correction must be the name of a preset that has one, such as 'icepop', because "
                f"arguments are saved as text, got {self.correction!r}"
            )
        super().check()
        if self.loss_type not in LOSS_TYPES:
            raise InvalidValueError(
                f"loss_type must be one of {', '.join(LOSS_TYPES)} with a region, because "
                f"{self.loss_type!r} does not clip the ratio on both sides; use TRL's GRPOTrainer"
            )
        if self.importance_sampling_level != "token":
            raise InvalidValueError(
                f"importance_sampling_level must be 'token' with a region, whose bounds depend on "
                f"a token's probability, got {self.importance_sampling_level!r}; use TRL's "
                f"GRPOTrainer with epsilon for the ratio of a sequence"
            )
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            self.settings.refuse(
                "TRL",
                "TRL has the log-probabilities of both policies where use_vllm and "
                "vllm_importance_sampling_correction are True",
                *("anchor", "correction"),
            )

    @property
    def settings(self) -> LossSettings:
        """The rule of these fields."""
        return LossSettings(
            region=self.region,
            schedule=self.schedule,
            anchor=self.anchor,  # type: ignore[arg-type]
            correction=self.correction,
        )
