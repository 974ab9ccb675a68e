"""Random batches as tensors, with the loss and the gradient of a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from bandpo.loss import PolicyLossResult, policy_loss
from support.tokens import random_tokens, with_extremes


class Batch(NamedTuple):
    """The tensors of a policy loss, in the order of its arguments."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor

    def loss(self, **options: Any) -> PolicyLossResult:
        return policy_loss(*self, **options)

    def gradient(self, **options: Any) -> torch.Tensor:
        log_prob = self.log_prob.detach().requires_grad_()
        loss = self._replace(log_prob=log_prob).loss(**options).loss
        return torch.autograd.grad(loss, log_prob)[0]


def random_batch(
    shape: tuple[int, ...],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    extremes: bool = False,
) -> Batch:
    """The tokens of `random_tokens`, on request those of `with_extremes`."""
    tokens = random_tokens(shape, seed)
    if extremes:
        tokens = with_extremes(tokens, seed)
    old, new, advantages = (torch.from_numpy(column).to(dtype) for column in tokens[:3])
    return Batch(old, new, advantages, torch.from_numpy(tokens.mask))


def every_end(dtype: torch.dtype, *, anchored: bool) -> tuple[Batch, torch.Tensor | None]:
    """Each old with each new log-prob of the ends of the floats, both signs, and an anchor.

    Without old log-probs and anchors of -inf together, whose ratio has no value.
    """
    ends = (-math.inf, -3e38, -1.0, 0.0)
    anchors = (*ends, math.nan) if anchored else (-1.0,)
    advantages = (1.0, -1.0, 0.0, math.inf, -math.inf)
    points = [
        point
        for point in itertools.product(ends, (*ends, math.inf, math.nan), advantages, anchors)
        if not (anchored and point[0] == point[3] == -math.inf)
    ]
    rows = torch.tensor(points, dtype=torch.float64).T.to(dtype)
    old, new, gains, anchor = (row.reshape(-1, 10) for row in rows)
    made = Batch(old, new, gains, torch.ones(old.shape, dtype=torch.bool))
    return made, anchor if anchored else None


def assert_close(actual: torch.Tensor, wanted: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), wanted, rtol=rtol, atol=atol)


def assert_compiled_gradient_is_eager(
    loss: Callable[[torch.Tensor], torch.Tensor], log_prob: torch.Tensor
) -> None:
    """A loss compiles without a graph break and has the gradient that it has uncompiled."""
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = log_prob.requires_grad_()
    wanted, found = (torch.autograd.grad(f(leaf), leaf)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, wanted)
