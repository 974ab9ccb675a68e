"""One small batch, as the losses of all trainers get it, and the loss that they have to give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bandpo.loss import policy_loss

TOLERANCE = 2e-6
"""Of the largest gradient, or of the sum of the tokens' losses: some ten roundings of float32."""

REGION = "(kl@0.05).cap(10)"
"""A region whose bounds depend on the probability, both of which act on the batch."""

_OLD = (
    (0.0005, 0.02, 0.3, 0.6, 0.9, 0.9999),
    (0.01, 0.45, 0.97, 0.1, 0.1, 0.1),
    (0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    (0.002, 0.08, 0.25, 0.99, 0.1, 0.1),
)
_LOG_RATIO = (
    (2.0, 3.0, -0.9, 0.1, 0.09, 2e-4),
    (-1.5, -0.8, 0.02, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (-2.2, 0.4, 0.9, -0.05, 0.0, 0.0),
)
_LENGTHS = (6, 3, 0, 4)
_ADVANTAGES = (1.2, -0.7, 0.4, -1.5)
_WEIGHTS = (1.0, 0.5, 1.7, 0.0, 2.0, 0.8)


@dataclass(frozen=True)
class TrainerBatch:
    """Four sequences of at most six tokens, [B, T] or packed [N]; the third has no token.

    Attributes:
        old_log_prob: The denominator of the ratio.
        log_prob: The policy in training; one is slightly above 0, as rounding leaves it.
        advantages: One a token, the same along a sequence.
        response_mask: Which tokens count, bool.
        rollout_log_prob: What the engine that sampled returned, a little off ``old_log_prob``.
        weights: Importance weights, some 0.
        cu_seqlens: Offsets of the sequences if packed, int64 [S + 1].
    """

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    rollout_log_prob: torch.Tensor
    weights: torch.Tensor
    cu_seqlens: torch.Tensor | None = None

    def with_padding(self, value: float) -> TrainerBatch:
        """The batch with a value in all tensors of tokens where no token counts."""
        names = ("old_log_prob", "log_prob", "rollout_log_prob")
        fields = {n: torch.where(self.response_mask, getattr(self, n), value) for n in names}
        return replace(self, **fields)

    def packed(self) -> TrainerBatch:
        """The tokens that count alone, one sequence after the other."""
        mask = self.response_mask
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        names = (*("old_log_prob", "log_prob", "advantages"), *("rollout_log_prob", "weights"))
        fields = {name: getattr(self, name)[mask] for name in names}
        return TrainerBatch(response_mask=mask[mask], cu_seqlens=offsets, **fields)

    def wanted(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of `policy_loss`."""
        return self.of(
            lambda log_prob: (
                policy_loss(
                    self.old_log_prob,
                    log_prob,
                    self.advantages,
                    self.response_mask,
                    cu_seqlens=self.cu_seqlens,
                    **options,
                ).loss
            )
        )

    def of(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, summed, and its gradient to ``log_prob``, of a function of it."""
        log_prob = self.log_prob.detach().requires_grad_()
        value = loss(log_prob).sum()
        return value.detach(), torch.autograd.grad(value, log_prob)[0]


def trainer_batch() -> TrainerBatch:
    """The batch, padded, float32; padding holds ordinary numbers."""
    old = torch.tensor(_OLD).log()
    shape = old.shape
    return TrainerBatch(
        old_log_prob=old,
        log_prob=old + torch.tensor(_LOG_RATIO),
        advantages=torch.tensor(_ADVANTAGES)[:, None].expand(shape).clone(),
        response_mask=torch.arange(shape[1]) < torch.tensor(_LENGTHS)[:, None],
        rollout_log_prob=old + torch.linspace(-0.04, 0.05, old.numel()).reshape(shape),
        weights=torch.tensor(_WEIGHTS).expand(shape).clone(),
    )


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Two pairs of loss and gradient agree to rounding; neither gradient is zero."""
    size = float(wanted[1].abs().max())
    assert size > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=0.0, atol=TOLERANCE * size)
