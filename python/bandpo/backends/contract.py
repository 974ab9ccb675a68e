"""The contract of a backend: its inputs, its outputs, and the names of its counts and sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from bandpo.surrogate import PROBABILITY_EDGES

PROBABILITY_BINS = len(PROBABILITY_EDGES) - 1


class LossInputs(NamedTuple):
    """The tokens of a batch and the rule for them, as `bandpo.loss.policy_loss` defines it.

    Attributes:
        old_log_prob: [B, T], float32 or float64, without gradient. A backend that reads half
            precision takes bfloat16 and float16 as well; the other floats are float32 then.
        log_prob: [B, T], same dtype; the loss carries its gradient.
        log_ratio: Replaces ``log_prob - old_log_prob``, [B, T], without gradient; None for the
            ratio of each token.
        advantages: [B, T] or [B, 1], without gradient.
        valid: Which tokens count, bool [B, T].
        bounds: As `bandpo.tensors.bounds.bounds_of` makes them; per token, [2, B, T].
        surrogate: Its name.
        parameters: Those of the surrogate, as `bandpo.surrogate` orders them.
        by_probability: True to count by bin of the old probability as well.
        anchor_log_prob: Like ``old_log_prob``: the bounds stand at these log-probs and limit
            ``log_prob - anchor_log_prob``, or a given ``log_ratio`` less
            ``anchor_log_prob - old_log_prob``. None for ``old_log_prob``.
    """

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    log_ratio: torch.Tensor | None
    advantages: torch.Tensor
    valid: torch.Tensor
    bounds: torch.Tensor
    surrogate: str
    parameters: list[float]
    by_probability: bool
    anchor_log_prob: torch.Tensor | None = None


SCHEMA = (
    "(Tensor old_log_prob, Tensor log_prob, Tensor? log_ratio, Tensor advantages, Tensor valid, "
    "Tensor bounds, str surrogate, float[] parameters, bool by_probability, "
    "Tensor? anchor_log_prob=None) "
    "-> (Tensor per_token, Tensor gradient, Tensor counts, Tensor sums)"
)
"""`LossInputs` and the outputs of the compiled backends, as torch declares an operator."""


def gradients_of(log_prob: torch.Tensor | None) -> tuple[Any, ...]:
    """Returns the gradients of `LossInputs`, of which only ``log_prob`` has one."""
    return None, log_prob, *[None] * (len(LossInputs._fields) - 2)


class Totals(NamedTuple):
    """Counts (int64) and sums (floats) over the tokens that count, each 0-dim.

    x is the log-ratio, clamped, r is ``exp(x)``, and A the advantage.
    """

    valid: torch.Tensor
    """Tokens that count."""
    nonfinite: torch.Tensor
    """Those of them whose loss is infinite or NaN."""
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    limited: torch.Tensor
    """Tokens that the dual clip or the truncation limits."""
    positive: torch.Tensor
    """Tokens with an old or new log-prob above `bandpo.check.MAX_LOG_PROB`."""
    kl: torch.Tensor
    """Sum of -x."""
    kl_k3: torch.Tensor
    """Sum of ``r - 1 - x``."""
    entropy: torch.Tensor
    """Sum of ``-old_log_prob``."""
    gradient_unclipped: torch.Tensor
    """Sum of ``abs(A) r``."""
    gradient_removed: torch.Tensor
    """Sum of what the rule takes from it."""
    log_ratio_min: torch.Tensor
    log_ratio_max: torch.Tensor
    """The extremes of x; arbitrary where no token counts."""
    by_probability: torch.Tensor | None
    """Tokens that count, are clipped low and are clipped high, by bin, [3, bins]."""

    @classmethod
    def of(cls, counts: torch.Tensor, sums: torch.Tensor) -> Totals:
        """Returns views of the counts, [6], or [6 + 3 bins], and the sums, [7], of a backend."""
        by_bin = None
        if counts.shape[0] > COUNTS:
            counts, by_bin = counts[:COUNTS], counts[COUNTS:].reshape(3, PROBABILITY_BINS)
        return cls(*counts.unbind(), *sums.unbind(), by_bin)  # type: ignore[call-arg]


COUNTS = Totals._fields.index("kl")
"""How many counts there are beside those by bin."""

SUMS = len(Totals._fields) - 1 - COUNTS
"""How many sums and extremes there are."""


class TokenLosses(NamedTuple):
    """The losses of `LossInputs`."""

    per_token: torch.Tensor
    """[B, T], 0 where masked."""
    total: torch.Tensor
    """Their sum, 0-dim."""
    totals: Callable[[], Totals]
    """Returns the counts and sums."""


Count: TypeAlias = "float | torch.Tensor"


class Weight(NamedTuple):
    """The factor of every token of a batch: a number over a count, which is at least 1."""

    numerator: float
    divisor: Count
    """The count, a number or a 0-dim tensor. Less than 1 is taken for 1, so that the loss of a
    batch without tokens is 0, not 0/0."""

    def number(self) -> float:
        """Returns the quotient; waits for a count on a device."""
        count = self.divisor
        if isinstance(count, torch.Tensor):
            count = float(count.detach().cpu().double().numpy())  # numpy has no bfloat16
        return self.numerator / max(count, 1)

    def times(self, total: torch.Tensor) -> torch.Tensor:
        """Returns a total times the quotient; waits for a count on another device alone."""
        numerator, count = self
        total = total if numerator == 1 else total * numerator
        if not isinstance(count, torch.Tensor):
            return total / max(count, 1)
        # Any device divides by a number of the CPU, without a copy.
        count = count if count.is_cpu else count.to(total.device)
        return total / count.clamp(min=1)

    def on(self, device: torch.device) -> tuple[float, torch.Tensor | None]:
        """Returns the numerator and the count, float64 on a device; None if that is 1."""
        count = self.divisor
        if isinstance(count, torch.Tensor) and count.device.type != "cpu":
            return self.numerator, count.detach().to(device, torch.float64, non_blocking=True)
        return self.number(), None


@dataclass(frozen=True)
class Backend:
    """A way to compute the loss of each token.

    Attributes:
        token_losses: Returns the losses, with their gradient.
        runs_on: The type of its devices, such as ``"cpu"``; None for any.
        reads_half: True if log-probs may be bfloat16 or float16.
        weighted_sum: Returns the sum of the losses times a number, 0-dim, and a function that
            returns the totals; None if the backend cannot. See `bandpo.backends.autograd`.
        count_valid: Returns how many tokens of a bool tensor count, without waiting for a device;
            None if there is no ``weighted_sum``.
    """

    token_losses: Callable[[LossInputs], TokenLosses]
    runs_on: str | None = None
    reads_half: bool = False
    weighted_sum: Callable[[Weight, LossInputs], WeightedSum] | None = None
    count_valid: Callable[[torch.Tensor], Count] | None = None


WeightedSum: TypeAlias = "tuple[torch.Tensor, Callable[[], Totals]]"
