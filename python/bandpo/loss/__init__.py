"""The clipped policy loss of PPO and GRPO with the bounds of any region."""

from bandpo.batch.metrics import Metrics
from bandpo.loss.module import PolicyLoss
from bandpo.loss.policy import policy_loss
from bandpo.loss.reduction import GlobalBatch
from bandpo.loss.result import PolicyLossResult
from bandpo.surrogate import LOG_RATIO_LIMIT, PROBABILITY_EDGES

__all__ = [
    "LOG_RATIO_LIMIT",
    "PROBABILITY_EDGES",
    "GlobalBatch",
    "Metrics",
    "PolicyLoss",
    "PolicyLossResult",
    "policy_loss",
]


def __dir__() -> list[str]:
    return __all__
