"""TRL: `GRPOTrainer` with the bounds of a region in place of its two epsilons.

`BandPOTrainer` sets the epsilons for the time of TRL's own `_compute_loss`. Generation, rewards,
loss types and aggregation are TRL's; docs/integrations/trl.md has the settings and the metrics.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from bandpo.error import InvalidValueError
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.trl_run import BandFields, BandRun
from bandpo.integrations.version import missing_hook, require, require_reads

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise missing_hook("trl", f"GRPOTrainer ({error})") from error

if not GRPOTrainer.__module__.startswith("trl."):
    raise missing_hook(
        "trl",
        f"GRPOTrainer of its own, but {GRPOTrainer.__module__}.{GRPOTrainer.__qualname__}: Unsloth "
        f"replaces it and its loss, and must not be imported in this process",
    )
require("trl", GRPOTrainer, "_compute_loss", "_get_per_token_logps_and_entropies")
require_reads("trl", GRPOTrainer.compute_loss, "_compute_loss")
require_reads(
    *("trl", GRPOTrainer._compute_loss, "_get_per_token_logps_and_entropies"),
    *("epsilon_low", "epsilon_high", "old_per_token_logps", "importance_sampling_ratio"),
)

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

    def __post_init__(self) -> None:
        if self.delta is not None and not self.delta > 1.0:
            raise InvalidValueError(f"delta, a cap of the ratio, must be above 1, got {self.delta}")
        super().__post_init__()
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
            dual_clip=self.delta,  # which caps the ratio for A > 0 as well, at or above the region
            schedule=self.schedule,
            anchor=self.anchor,  # type: ignore[arg-type]
            correction=self.correction,
        )


class BandPOTrainer(BandRun, GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` that clips each token's ratio to its band; ``args`` is a `BandPOConfig`."""

    _config = BandPOConfig
    _old_policy = "trainer"
    _log_prob: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        accumulated = self.args.gradient_accumulation_steps
        uses = self.args.steps_per_generation * self.args.num_iterations
        # The policy does not change then between the sampling of a batch and its last use.
        if accumulated % uses == 0 and self.args.anchor == "old" and self.is_world_process_zero():
            warnings.warn(
                "nothing can clip: each batch is used for one optimiser step, in which every ratio "
                "is 1; set num_iterations to 2 or more, or steps_per_generation above "
                f"gradient_accumulation_steps = {accumulated}",
                stacklevel=2,
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        old, anchor = inputs.get("old_per_token_logps"), None
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if old is None:  # TRL takes the log-probs of now then, and every ratio is 1
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            old = self._log_prob
        else:
            inputs, anchor = self._with_rollout(inputs, old, mask)
            with self._band_at(old, anchor):
                loss = super()._compute_loss(model, inputs)
        self._count(
            *(old, self._log_prob, inputs["advantages"], mask, anchor),
            rollout_log_prob=inputs.get("sampling_per_token_logps"),
        )
        del self._log_prob
        return loss

    def _with_rollout(
        self, inputs: dict[str, Any], old: torch.Tensor, mask: torch.Tensor
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Returns the inputs with the weights of a correction, and the log-probs of an anchor."""
        correction, anchored = self._rule["correction"], self.args.anchor == "rollout"
        if correction is None and not anchored:
            return inputs, None
        rollout = inputs["sampling_per_token_logps"]
        rollout = torch.where(rollout.isfinite(), rollout, old)  # where the engine gave none
        if correction is not None:
            found = correction(old, rollout, mask, advantages=inputs["advantages"])
            inputs = {**inputs, "importance_sampling_ratio": found.weights}
        return inputs, rollout if anchored else None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_prob = found[0].detach()  # for the metrics
        return found
