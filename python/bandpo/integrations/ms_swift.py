"""ms-swift: its `GRPOTrainer` with the bounds of a region in place of its two epsilons.

`install` makes ``swift rlhf --rlhf_type grpo`` build `BandGRPOTrainer`; a file of
``--external_plugins`` calls it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory

from bandpo.check import check_name
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, refuse_delta
from bandpo.integrations.version import check_version, require, require_reads
from bandpo.rule import AnyRegion

check_version("ms-swift", "4.6.0")
require("ms-swift", GRPOTrainer, "_compute_loss_and_metrics", "_compute_loss_chunked")
require_reads(
    *("ms-swift", GRPOTrainer._compute_loss_and_metrics, "epsilon_low", "epsilon_high"),
    *("old_per_token_logps", "rollout_per_token_logps"),
)
for _caller in (GRPOTrainer._compute_loss_single, GRPOTrainer._compute_loss_chunked):
    require_reads("ms-swift", _caller, "_compute_loss_and_metrics")
require("ms-swift", TrainerFactory, "TRAINER_MAPPING")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Loss types that clip the ratio of each token on both sides, and so take a region."""


class BandGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """ms-swift's `GRPOTrainer`, with two epsilons for each token.

    The region stands at ``old_per_token_logps``, or with the anchor "rollout" at
    ``rollout_per_token_logps``. Without old log-probs every ratio is 1, and nothing clips.

    Raises:
        InvalidTypeError: If `install` was not called before.
        InvalidValueError: If the arguments of the trainer select a loss that clips no ratio of a
            token, or have a ``delta``.
    """

    installed: ClassVar[LossSettings | None] = None
    """The rule of trainers that are made from now on."""
    epsilon_low: Any  # numbers of ms-swift, and for the time of a loss tensors
    epsilon_high: Any

    def __init__(self, *args: Any, **named: Any) -> None:
        if self.installed is None:
            raise InvalidTypeError("settings must be set by install before a BandGRPOTrainer")
        self.settings = self.installed
        self.region: AnyRegion = self.settings.clamp_region("ms-swift")
        given = named["args"]
        refuse_delta(given.delta, "ms-swift")
        check_name("loss_type, with a region,", given.loss_type, LOSS_TYPES)
        if given.importance_sampling_level != "token":
            raise InvalidValueError(
                f"importance_sampling_level must be 'token' with a region, which is about the "
                f"probability of a token, got {given.importance_sampling_level!r}"
            )
        if given.use_liger_kernel:
            raise InvalidValueError(
                "use_liger_kernel must be False with a region, because Liger's loss does not call "
                "the method that clips"
            )
        super().__init__(*args, **named)

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        old = grpo_batch.old_per_token_logps
        if old is None:
            return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        anchor = None
        if self.settings.anchor == "rollout":
            anchor = grpo_batch.rollout_per_token_logps
            if anchor is None:
                raise InvalidValueError(
                    "anchor must be 'old' with ms-swift where the engine that samples returns no "
                    "log-probabilities; vLLM does"
                )
        numbers = self.epsilon_low, self.epsilon_high
        self.epsilon_low, self.epsilon_high = epsilons(self.region, old, anchor)
        try:
            return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        finally:
            self.epsilon_low, self.epsilon_high = numbers


def install(**fields: Any) -> None:
    """Makes ``--rlhf_type grpo`` of this process build a `BandGRPOTrainer`, from now on.

    Args:
        **fields: The rule; see `LossSettings`.

    Raises:
        InvalidTypeError: If a field has the wrong type.
        InvalidValueError: If the rule is more than a clamp, or changes.
    """
    settings = LossSettings.of(fields)
    settings.refuse_correction("ms-swift", "rollout_importance_sampling_mode has its own")
    settings.refuse_changes("ms-swift")
    settings.clamp_region("ms-swift")
    BandGRPOTrainer.installed = settings
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{BandGRPOTrainer.__name__}"
