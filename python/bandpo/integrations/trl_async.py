"""TRL's experimental `AsyncGRPOTrainer` with the bounds of a region.

The region stands at ``old_log_probs``, which are those of the engine that sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bandpo.integrations.trl_fields import BandFields
from bandpo.integrations.trl_run import BandRun
from bandpo.integrations.version import missing_hook, require, require_reads

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
except ImportError as error:
    raise missing_hook("trl", f"AsyncGRPOTrainer ({error})") from error

require("trl", AsyncGRPOTrainer, "compute_loss")
require_reads(
    *("trl", AsyncGRPOTrainer.compute_loss, "epsilon_low", "epsilon_high"),
    *("old_log_probs", "token_index", "log_probs"),
)


@dataclass
class AsyncBandPOConfig(BandFields, AsyncGRPOConfig):  # type: ignore[misc]
    """`AsyncGRPOConfig` with a region and a schedule of its delta.

    Args:
        region: Bounds of the ratio: a spec (see `bandpo.spec`), or a `bandpo.Region` that has one.
        schedule: Delta by optimiser step, as text; see `bandpo.spec.schedule_from_spec`.
        record: Folder for a sample of the tokens of the run; see `bandpo.record.Recorder`.
    """


class AsyncBandPOTrainer(BandRun, AsyncGRPOTrainer):  # type: ignore[misc]
    """`AsyncGRPOTrainer` that clips each token's ratio; ``args`` is an `AsyncBandPOConfig`."""

    _config = AsyncBandPOConfig
    _old_policy = "rollout"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *others: Any, **named: Any
    ) -> torch.Tensor:
        """Returns TRL's loss with the epsilons of each token."""
        selected = inputs["token_index"] >= 0
        old, advantages = inputs["old_log_probs"][selected], inputs["advantages"][selected]
        seen: list[torch.Tensor] = []

        def observed(*tensors: Any, **options: Any) -> Any:
            outputs = model(*tensors, **options)
            seen.append(outputs.log_probs.detach().flatten()[inputs["token_index"][selected]])
            return outputs

        with self._band_at(old):
            loss: torch.Tensor = super().compute_loss(observed, inputs, *others, **named)
        self._count(old, seen[0], advantages, torch.ones_like(old))
        return loss
