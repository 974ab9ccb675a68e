"""Losses and gradients of surrogates, written out in numpy in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

import bandpo
from bandpo.check import BoolArray, Float64Array
from bandpo.surrogate import GradientPreserving, Mask, Surrogate
from support.batches import Batch

LossAndGradient: TypeAlias = tuple[Float64Array, Float64Array]


class BoundedTokens(NamedTuple):
    """A batch in float64 with the exact bounds of each token."""

    log_prob: Float64Array
    advantage: Float64Array
    valid: BoolArray
    unclamped: Float64Array
    lower: Float64Array
    upper: Float64Array

    @classmethod
    def of(
        cls, batch: Batch, region: bandpo.Region, log_ratio: Float64Array | None = None
    ) -> BoundedTokens:
        """The tokens of a batch with their own log-ratios, or with others."""
        old, new, advantage = (tensor.double().numpy() for tensor in batch[:3])
        unclamped = new - old if log_ratio is None else log_ratio
        return cls(new, advantage, batch.response_mask.numpy() != 0, unclamped, *region.bounds(old))

    @property
    def log_ratio(self) -> Float64Array:
        return np.clip(self.unclamped, -20.0, 20.0)

    @property
    def ratio(self) -> Float64Array:
        return np.asarray(np.exp(self.log_ratio))

    @property
    def clamped(self) -> BoolArray:
        return np.asarray(np.abs(self.unclamped) > 20.0)

    @property
    def below(self) -> BoolArray:
        return (self.advantage < 0) & (self.ratio < self.lower)

    @property
    def above(self) -> BoolArray:
        return (self.advantage > 0) & (self.ratio > self.upper)

    @property
    def beyond(self) -> BoolArray:
        return self.below | self.above

    @property
    def bound(self) -> Float64Array:
        """The bound on the side of the advantage."""
        return np.where(self.advantage < 0, self.lower, self.upper)


def min_clip(tokens: BoundedTokens, dual_clip: float = math.inf) -> LossAndGradient:
    """PPO, arXiv 1707.06347, with dual clip, arXiv 1912.09729."""
    loss = -tokens.advantage * np.where(
        tokens.advantage > 0,
        np.minimum(tokens.ratio, tokens.upper),
        np.minimum(np.maximum(tokens.ratio, tokens.lower), dual_clip),
    )
    stopped = tokens.beyond | tokens.clamped | dual_clipped(tokens, dual_clip)
    return loss, np.where(stopped, 0.0, -tokens.advantage * tokens.ratio)


def dual_clipped(tokens: BoundedTokens, dual_clip: float) -> BoolArray:
    return (tokens.advantage < 0) & (tokens.ratio >= dual_clip)


def mask(tokens: BoundedTokens, truncation: float) -> LossAndGradient:
    """DPPO, arXiv 2602.04879: -A sg(min(r, c)) log pi, and 0 beyond a bound."""
    weight = np.minimum(tokens.ratio, truncation)
    gradient = np.where(tokens.beyond, 0.0, -tokens.advantage * weight)
    return gradient * tokens.log_prob, gradient


def weight(tokens: BoundedTokens) -> LossAndGradient:
    """CISPO, arXiv 2506.13585: -A sg(clip(r, lower, upper)) log pi."""
    gradient = -tokens.advantage * np.clip(tokens.ratio, tokens.lower, tokens.upper)
    return gradient * tokens.log_prob, gradient


def gradient_preserving(
    tokens: BoundedTokens, beta_low: float, beta_high: float
) -> LossAndGradient:
    """CE-GPPO, arXiv 2509.20712: a bounded gradient beyond a bound."""
    beta = np.where(tokens.advantage < 0, beta_low, beta_high)
    loss = -tokens.advantage * np.where(tokens.beyond, beta * tokens.bound, tokens.ratio)
    return loss, np.where(tokens.clamped & ~tokens.beyond, 0.0, loss)


FORMULAS: dict[str, tuple[Surrogate, Callable[[BoundedTokens], LossAndGradient]]] = {
    "mask": ("mask", lambda tokens: mask(tokens, 20.0)),
    "mask, c = 1.5": (Mask(truncation=1.5), lambda tokens: mask(tokens, 1.5)),
    "mask, no c": (Mask(truncation=None), lambda tokens: mask(tokens, math.inf)),
    "weight": ("weight", weight),
    "preserving": ("gradient-preserving", lambda tokens: gradient_preserving(tokens, 1.0, 1.0)),
    "preserving .75": (
        GradientPreserving(0.75, 0.5),
        lambda tokens: gradient_preserving(tokens, 0.75, 0.5),
    ),
}
"""Surrogates other than min-clip, each with its formula."""
