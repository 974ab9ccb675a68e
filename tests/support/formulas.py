"""Losses and gradients of surrogates, written out in numpy in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

import bandpo
from bandpo.check import BoolArray, Float64Array
from bandpo.surrogate import GradientPreserving, Mask, SoftGate, Surrogate
from support.batches import Batch

LossAndGradient: TypeAlias = tuple[Float64Array, Float64Array]


class BoundedTokens(NamedTuple):
    """A batch in float64 with the exact bounds of each token."""

    log_prob: Float64Array
    advantage: Float64Array
    valid: BoolArray
    unclamped: Float64Array
    log_lower: Float64Array
    log_upper: Float64Array

    @classmethod
    def of(
        cls, batch: Batch, region: bandpo.Region, log_ratio: Float64Array | None = None
    ) -> BoundedTokens:
        """The tokens of a batch with their own log-ratios, or with others."""
        old, new, advantage = (tensor.double().numpy() for tensor in batch[:3])
        unclamped = new - old if log_ratio is None else log_ratio
        log_lower, log_upper = region.log_bounds(old)
        valid = batch.response_mask.numpy() != 0
        return cls(new, advantage, valid, unclamped, log_lower, log_upper)

    @property
    def lower(self) -> Float64Array:
        """The bound as a ratio, which ends where the clamp of ratios does."""
        return np.asarray(np.exp(np.clip(self.log_lower, -20.0, 20.0)))

    @property
    def upper(self) -> Float64Array:
        return np.asarray(np.exp(np.clip(self.log_upper, -20.0, 20.0)))

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
    def width(self) -> Float64Array:
        """Distance from 1 to the bound on the side of the ratio."""
        # Not from the bounds as ratios, whose difference from 1 may have lost its digits.
        side = np.where(self.log_ratio < 0.0, -np.expm1(self.log_lower),
                        np.expm1(np.minimum(self.log_upper, 20.0)))  # fmt: skip
        return np.maximum(side, 1e-6)

    # The published losses have no clamp: the ratio as it is decides what has left the region. In
    # logarithms, because a ratio of e^-800 is 0 and a bound of e^800 infinite.
    @property
    def outside(self) -> tuple[BoolArray, BoolArray]:
        """Tokens below the lower and above the upper bound, whatever their advantage."""
        return self.unclamped < self.log_lower, self.unclamped > self.log_upper

    @property
    def below(self) -> BoolArray:
        return (self.advantage < 0) & self.outside[0]

    @property
    def above(self) -> BoolArray:
        return (self.advantage > 0) & self.outside[1]

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
    return dropped(tokens, tokens.beyond, truncation)


def dropped(tokens: BoundedTokens, which: BoolArray, truncation: float) -> LossAndGradient:
    gradient = -tokens.advantage * np.minimum(tokens.ratio, truncation)
    # Not 0 times the log-prob, which may be infinite.
    return np.where(which, 0.0, gradient * tokens.log_prob), np.where(which, 0.0, gradient)


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


def symmetric_mask(tokens: BoundedTokens, truncation: float) -> LossAndGradient:
    """IPO of prime-rl, #2798: a mask on both sides, whatever the sign of the advantage."""
    below, above = tokens.outside
    return dropped(tokens, below | above, truncation)


def soft_gate(tokens: BoundedTokens, tau_positive: float, tau_negative: float) -> LossAndGradient:
    """SAPO, arXiv 2511.20347, with the width of the region in place of 1.

    With w = 1 the loss is ``-A (4 / tau) sigmoid(tau (r - 1))``.
    """
    tau = np.where(tokens.advantage > 0, tau_positive, tau_negative)
    width = tokens.width
    half = 0.5 * tau * np.expm1(tokens.log_ratio) / width
    value = 2.0 / tau + 2.0 * width / tau * np.tanh(half)
    slope = tokens.ratio / np.cosh(np.clip(half, -300.0, 300.0)) ** 2
    return -tokens.advantage * value, -tokens.advantage * np.where(tokens.clamped, 0.0, slope)


def quadratic(tokens: BoundedTokens) -> LossAndGradient:
    """SPO, arXiv 2401.16025: a quadratic penalty with its optimum at the bound."""
    excess, sign = np.expm1(tokens.log_ratio), np.sign(tokens.advantage)
    loss = -tokens.advantage * tokens.ratio + np.abs(tokens.advantage) * excess**2 / (
        2.0 * tokens.width
    )
    slope = -tokens.advantage * tokens.ratio * (1.0 - sign * excess / tokens.width)
    return loss, np.where(tokens.clamped, 0.0, slope)


def gamma_weight(
    tokens: BoundedTokens, positive: tuple[float, float], negative: tuple[float, float]
) -> LossAndGradient:
    """VESPO, arXiv 2602.10693: -A sg(W^k e^(lambda (1 - W))) log pi, with W clipped."""
    k, rate = (np.where(tokens.advantage < 0, low, high)
               for high, low in zip(positive, negative, strict=True))  # fmt: skip
    clipped = np.clip(tokens.ratio, tokens.lower, tokens.upper)
    gradient = -tokens.advantage * clipped**k * np.exp(rate * (1.0 - clipped))
    return gradient * tokens.log_prob, gradient


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
    "mask, symmetric": (
        Mask(truncation=None, symmetric=True),
        lambda tokens: symmetric_mask(tokens, math.inf),
    ),
    "mask, symmetric, c = 1.5": (
        Mask(truncation=1.5, symmetric=True),
        lambda tokens: symmetric_mask(tokens, 1.5),
    ),
    "soft-gate": ("soft-gate", lambda tokens: soft_gate(tokens, 1.0, 1.05)),
    "soft-gate, 3 and 0.1": (SoftGate(3.0, 0.1), lambda tokens: soft_gate(tokens, 3.0, 0.1)),
    "quadratic": ("quadratic", quadratic),
    "gamma-weight": (
        "gamma-weight",
        lambda tokens: gamma_weight(tokens, (2.0, 3.0), (3.0, 2.0)),
    ),
}
"""Surrogates other than min-clip, each with its formula."""

SMOOTH = {"soft-gate", "soft-gate, 3 and 0.1", "quadratic"}
"""Surrogates whose gradient fades by a factor that cancels, or falls exponentially."""


def rounded_size(name: str, tokens: BoundedTokens) -> Float64Array:
    """What the rounding of a loss or gradient is relative to, beside the value itself."""
    unclipped = np.abs(tokens.advantage) * tokens.ratio
    return unclipped if name in SMOOTH else np.zeros_like(unclipped)
