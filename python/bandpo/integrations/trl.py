"""TRL: `GRPOTrainer` with the bounds of a region in place of its two epsilons.

`BandPOTrainer` sets the epsilons for the time of TRL's own `_compute_loss`. Generation, rewards,
loss types and aggregation are TRL's; docs/integrations/trl.md has the settings and the metrics.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bandpo.error import InvalidValueError
from bandpo.integrations.trl_config import BandPOConfig
from bandpo.integrations.trl_run import BandRun
from bandpo.integrations.version import missing_hook, require, require_reads

try:
    from trl import GRPOTrainer
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

__all__ = ["BandPOConfig", "BandPOTrainer"]


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
        correction, anchored = self._correction, self.args.anchor == "rollout"
        if correction is None and not anchored:
            return inputs, None
        rollout = inputs.get("sampling_per_token_logps")
        if rollout is None:
            raise InvalidValueError(
                "anchor must be 'old', and correction be left out, where the engine that samples "
                "returns no log-probabilities; a batch has none"
            )
        rollout = torch.where(rollout.isfinite(), rollout, old)  # where the engine gave none
        if correction is not None:
            found = correction(old, rollout, mask, advantages=inputs["advantages"])
            inputs = {**inputs, "importance_sampling_ratio": found.weights}
        return inputs, rollout if anchored else None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_prob = found[0].detach()  # for the metrics
        return found
