"""A vector's batch as tensors, whole and in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bandpo.conform.vectors import Vector
from bandpo.surrogate import LOG_RATIO_LIMIT

SPLIT = "split"
"""The case whose rows are given in two micro-batches."""

HALF = "bfloat16"
"""The case whose inputs are given in bfloat16, in which they are exact."""


class MicroBatch(NamedTuple):
    """Tensors of a batch or a micro-batch, [B, T], and counts of the whole."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor  # a leaf with a gradient
    rollout_log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    mode: str
    tokens: int  # that count in the whole batch
    sequences: int  # with such a token, likewise
    width: int

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.log_prob.device


class Outcome(NamedTuple):
    """What an implementation made of a vector."""

    loss: float
    gradient: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None  # clipped low and high


class Loss(NamedTuple):
    """A loss, 0-dim, with its counts of clipped tokens below and above, if they are known."""

    loss: torch.Tensor
    counts: torch.Tensor | None = None


LossOf = Callable[[MicroBatch], Loss]
"""An implementation of one rule."""


def is_half(vector: Vector) -> bool:
    """Returns True if the inputs are given in bfloat16."""
    return vector.case == HALF


def run(
    vector: Vector, loss_of: LossOf, device: str = "cpu", dtype: torch.dtype | None = None
) -> Outcome:
    """Returns what an implementation makes of a vector.

    Args:
        vector: The vector.
        loss_of: The implementation.
        device: Where it runs.
        dtype: That of the inputs, in place of the case's own.
    """
    if dtype is None:
        dtype = torch.bfloat16 if is_half(vector) else torch.float32
    names = ("old_log_prob", "log_prob", "rollout_log_prob", "advantages")
    given = [torch.tensor(vector.inputs[name], dtype=dtype, device=device) for name in names]
    mask = torch.tensor(vector.inputs["response_mask"], device=device)
    rows, width = mask.shape
    tokens, sequences = int(mask.sum()), int((mask.sum(1) > 0).sum())
    size = rows // 2 if vector.case == SPLIT else rows
    total, gradients, counts = 0.0, [], []
    for start in range(0, rows, size):
        part = slice(start, start + size)
        old, new, rollout, advantages = (tensor[part].clone() for tensor in given)
        batch = MicroBatch(
            old,
            new.requires_grad_(),
            rollout,
            advantages,
            mask[part],
            vector.mode,
            tokens,
            sequences,
            width,
        )
        found = loss_of(batch)
        (gradient,) = torch.autograd.grad(found.loss, batch.log_prob)
        total += float(found.loss.detach().double().cpu())
        gradients.append(gradient.double().cpu().numpy())
        if found.counts is not None:
            counts.append(found.counts.cpu().numpy())
    return Outcome(total, np.concatenate(gradients), np.sum(counts, 0) if counts else None)


def tokens_that_count(
    vector: Vector,
) -> tuple[
    np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    np.ndarray[tuple[int, ...], np.dtype[np.float64]],
]:
    """Returns advantages and clamped log-ratios of the whole batch, for a region source."""
    valid = vector.inputs["response_mask"] != 0
    new, old, advantages = (
        vector.inputs[name][valid].astype(np.float64)
        for name in ("log_prob", "old_log_prob", "advantages")
    )
    return advantages, np.clip(new - old, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
