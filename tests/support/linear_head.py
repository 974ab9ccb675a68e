"""Hidden states and the weight of a head, for losses that take log-probs of a fused head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from bandpo.loss import policy_loss
from support.trainer_batch import trainer_batch

WORDS, HIDDEN = 11, 8
TEMPERATURE = 0.7


class LinearHead:
    """Hidden states and a head whose log-probs are near those of the batch."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        batch = trainer_batch()
        shape = batch.log_prob.shape
        self.weight = torch.randn(WORDS, HIDDEN, generator=make)
        self.hidden = torch.randn(*shape, HIDDEN, generator=make)
        self.words = torch.randint(WORDS, shape, generator=make)
        self.mask = batch.response_mask
        self.advantages = batch.advantages[:, 0]
        now = self.log_prob(self.hidden, self.weight)
        self.old_log_prob = now - (batch.log_prob - batch.old_log_prob)

    def in_float64(self) -> LinearHead:
        """The same head in double precision."""
        exact = copy.copy(self)
        for name, value in vars(self).items():
            if value.is_floating_point():
                setattr(exact, name, value.double())
        return exact

    def log_prob(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The log-probs of the words by softmax over all logits."""
        logits = hidden @ weight.T / TEMPERATURE
        return logits.log_softmax(-1).gather(-1, self.words[..., None])[..., 0]

    def gradients(
        self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The value of a loss of hidden states and weight, and its gradients in one vector."""
        leaves = [tensor.clone().requires_grad_() for tensor in (self.hidden, self.weight)]
        value = loss(*leaves)
        found = torch.autograd.grad(value, leaves)
        return value.detach(), torch.cat([gradient.reshape(-1) for gradient in found])

    def wanted(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradients of `policy_loss` behind the plain head."""
        return self.gradients(
            lambda *leaves: (
                policy_loss(
                    self.old_log_prob, self.log_prob(*leaves), self.advantages, self.mask, **options
                ).loss
            )
        )
