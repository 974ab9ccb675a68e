"""Random log-probabilities from one end of their range to the other."""

from __future__ import annotations

from typing import Any

import numpy as np

SEED = 20260304

NAMES = (
    *("kl", "reverse-kl", "tv", "pearson-chi2", "neyman-chi2", "hellinger", "le-cam"),
    *("jensen-shannon", "jeffreys", "bhattacharyya"),
)
"""Divergences without a parameter."""


def log_probs(rng: np.random.Generator, count: int) -> Any:
    """Ordinary, rare and sure tokens, and the smallest of both kinds."""
    kind = rng.integers(0, 5, count)
    ordinary = -rng.exponential(3.0, count)
    rare = -rng.uniform(1.0, 690.0, count)
    sure = -(10.0 ** rng.uniform(-17.0, 0.0, count))
    tiny = -(10.0 ** rng.uniform(-307.0, -17.0, count))
    subnormal = -5e-324 * np.exp2(rng.integers(0, 52, count))
    logp = np.choose(kind, [ordinary, rare, sure, tiny, subnormal])
    return np.minimum(logp, -5e-324)
