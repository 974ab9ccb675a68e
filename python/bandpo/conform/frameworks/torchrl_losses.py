"""torchrl's losses of language models on log-ratios, without an actor in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.objectives.llm.grpo import CISPOLoss, GRPOLoss

from bandpo.conform.batch import SPLIT, Loss, LossOf, MicroBatch
from bandpo.conform.vectors import Vector

_LOSSES: dict[str, tuple[type[GRPOLoss], float, float]] = {
    "ppo": (GRPOLoss, 0.2, 0.2),
    "dapo": (GRPOLoss, 0.2, 0.28),
    "cispo": (CISPOLoss, 1.0, 4.0),
}
"""Class and the two epsilons by preset."""

_AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "prompt_mean"}


def loss_of(vector: Vector) -> LossOf | None:
    """Returns torchrl's loss of a vector's preset and mode, or None where it has none.

    Its means are over the batch at hand, so that the vector in two parts is left out.
    """
    found, aggregation = _LOSSES.get(vector.preset), _AGGREGATIONS.get(vector.mode)
    if found is None or aggregation is None or vector.case == SPLIT:
        return None
    kind, low, high = found
    module: Any = object.__new__(kind)
    torch.nn.Module.__init__(module)
    module.aggregation, module.reduction = aggregation, "mean"
    module.clip_epsilon_low, module.clip_epsilon_high = torch.tensor(low), torch.tensor(high)

    def loss(batch: MicroBatch) -> Loss:
        log_ratio = (batch.log_prob - batch.old_log_prob)[..., None]
        losses, _ = module._compute_policy_objective(log_ratio, batch.advantages[..., None])
        mask = batch.response_mask.bool()
        return Loss(module._aggregate_loss_value(losses, mask).squeeze())

    return loss
