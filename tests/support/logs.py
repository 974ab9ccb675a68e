"""Logs of tokens at random, as a run would write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bandpo.record import LoggedTokens


def random_log(
    count: int, seed: int = 0, *, step: float = 0.3, length: int = 50, **columns: Any
) -> LoggedTokens:
    """Tokens of sequences of one length and one advantage, with float32 log-probs.

    Old probabilities are from rare to sure, and new ones are steps of the logit away.
    """
    rng = np.random.default_rng(seed)
    logit = rng.normal(1.0, 2.5, count)
    sequence = np.arange(count) // length
    fields = {
        "step": sequence // 8,
        "sequence": sequence,
        "position": np.arange(count) % length,
        "old_log_prob": _float32(-np.logaddexp(0.0, -logit)),
        "log_prob": _float32(-np.logaddexp(0.0, -(logit + rng.normal(0.0, step, count)))),
        "advantages": _float32(rng.normal(0.0, 1.0, count // length + 1))[sequence],
        "rollout_log_prob": None,
        "reward": None,
        "weight": np.ones(count),
    }
    return LoggedTokens(**{**fields, **columns})


def _float32(values: Any) -> Any:
    return values.astype(np.float32).astype(np.float64)
