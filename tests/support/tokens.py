"""Random tokens as numpy arrays, the same for every call with the same seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bandpo.check import BoolArray, Float64Array


class TokenArrays(NamedTuple):
    """The inputs of a policy loss."""

    old_log_prob: Float64Array
    log_prob: Float64Array
    advantages: Float64Array
    mask: BoolArray


def random_tokens(shape: int | tuple[int, ...], seed: int = 0, step: float = 0.5) -> TokenArrays:
    """Tokens with log-ratios on both sides of most bounds; a quarter is masked."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(3.0, shape)
    new = np.minimum(old + rng.normal(0.0, step, shape), 0.0)
    return TokenArrays(old, new, rng.normal(0.0, 1.0, shape), rng.random(shape) < 0.75)


def wide_tokens(
    shape: int | tuple[int, ...],
    seed: int,
    *,
    logits: tuple[float, float],
    step: float = 1.0,
    factors: tuple[float, ...] = (0.1, 0.5, 3.0),
) -> TokenArrays:
    """Tokens from rare to sure, with log-ratios from tiny ones to some far beyond a bound.

    Logits of the old probability are uniform. New log-probs may be above 0.
    """
    rng = np.random.default_rng(seed)
    old = -np.logaddexp(0, -rng.uniform(*logits, shape))
    new = old + rng.laplace(0, step, shape) * rng.choice(factors, shape)
    return TokenArrays(old, new, rng.normal(0, 1, shape), rng.random(shape) < 0.8)


def with_extremes(tokens: TokenArrays, seed: int = 0) -> TokenArrays:
    """Tokens of which some are sure, far beyond the clamp, tiny or, if masked, NaN."""
    special = np.random.default_rng([seed, 1]).integers(0, 40, tokens.mask.shape)
    old, new, advantages = (column.copy() for column in tokens[:3])
    old[special == 0] = 0.0
    new[special == 1] = old[special == 1] - 30.0
    new[special == 2] += 25.0
    old[special == 3] = -200.0
    advantages[special == 4] = 0.0
    old[special == 5] *= 1e-6
    old[special == 6], new[special == 6] = -7.0, -70.0
    for column in (old, new, advantages):
        column[~tokens.mask & (special > 20)] = np.nan
    return TokenArrays(old, new, advantages, tokens.mask)


def log_probs(seed: int, count: int) -> Float64Array:
    """A third each of rare, sure and ordinary tokens, with p in [1e-12, 1 - 1e-12]."""
    rare, sure, logit = np.random.default_rng(seed).uniform(size=(3, count // 3))
    return np.concatenate(
        [-27.6 * rare, -(10.0 ** (-12 * sure)), -np.log1p(np.exp(54 * logit - 27))]
    )
