"""Tokens of the benchmarks, fixed by a seed. A change would begin a new history."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZES = (2**10, 2**14, 2**18, 2**20, 2**24)
"""Numbers of tokens that show the growth of a cost."""

SIZE = 2**20
"""Number of tokens at one size, about those of a training step on one device."""

ROW = 1024
"""Tokens of a sequence; every size is a multiple of it."""

DELTA = 0.05
"""The radius of the paper's experiments."""

_SEED = 20260711


class TokenArrays(NamedTuple):
    """Arguments of a policy loss [sequences, ROW], in float64; the mask is bool."""

    old_log_prob: NDArray[np.float64]
    log_prob: NDArray[np.float64]
    advantages: NDArray[np.float64]
    mask: NDArray[np.bool_]


@cache
def log_probs(size: int) -> NDArray[np.float64]:
    """Returns log-probs whose logits have mean and deviation 3, so that most tokens are likely."""
    logits = np.random.default_rng(_SEED).normal(3.0, 3.0, size)
    return -np.logaddexp(0.0, -logits)


@cache
def undecided(size: int) -> NDArray[np.float64]:
    """Returns log-probs of p uniform in [0.2, 0.8], where both bounds are roots for every f."""
    return np.log(np.random.default_rng(_SEED + 1).uniform(0.2, 0.8, size))


@cache
def batch(size: int) -> TokenArrays:
    """Returns sequences of ROW tokens; three quarters of them count on average."""
    rng = np.random.default_rng(_SEED + 2)
    shape = (size // ROW, ROW)
    old_log_prob = log_probs(size).reshape(shape)
    log_prob = np.minimum(old_log_prob + rng.normal(0.0, 0.2, shape), 0.0)
    advantages = np.broadcast_to(rng.normal(0.0, 1.0, (shape[0], 1)), shape)
    lengths = rng.integers(ROW // 2, ROW, (shape[0], 1), endpoint=True)
    return TokenArrays(
        old_log_prob, log_prob, np.ascontiguousarray(advantages), np.arange(ROW) < lengths
    )
