"""The loss in Rust on the CPU, and its operator, for which `bandpo.backends.cuda` has a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bandpo import _core
from bandpo.backends.contract import COUNTS, PROBABILITY_BINS, SCHEMA, SUMS, LossInputs
from bandpo.tensors.check import compute_dtype


@torch.library.custom_op("bandpo::token_loss", mutates_args=(), device_types="cpu", schema=SCHEMA)
def token_loss_op(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns losses and gradients, [B, T], counts and sums; takes the fields of `LossInputs`."""
    per_token, gradient, _, counts, sums = all_in_rust(LossInputs(*inputs))
    return per_token, gradient, counts, sums


def all_in_rust(inputs: LossInputs) -> tuple[torch.Tensor, ...]:
    """Returns losses and gradients, [B, T], the sum of the losses, counts and sums."""
    per_token = _empty_like(inputs.log_prob)
    return per_token, *in_rust(inputs, per_token=per_token)


def _empty_like(log_prob: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(log_prob.detach(), memory_format=torch.contiguous_format)


def in_rust(
    inputs: LossInputs, weight: float = 1.0, *, per_token: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients and the sum of the losses, both times a weight, counts and sums.

    Args:
        inputs: Tokens on the CPU.
        weight: Factor of gradients and sum.
        per_token: Takes the losses, [B, T], contiguous; None to compute none.
    """
    log_prob, bounds = inputs.log_prob.detach(), inputs.bounds
    gradient = _empty_like(log_prob)

    def array(tensor: torch.Tensor) -> NDArray[Any]:
        contiguous = tensor.contiguous()
        try:
            return contiguous.numpy()
        except RuntimeError:  # a negated view, or zeros without memory
            return contiguous.numpy(force=True)

    written = gradient.numpy()
    is_table = bounds.dtype == torch.int32
    total, counts, sums = _core.policy_loss(
        array(inputs.old_log_prob),
        array(log_prob),
        None if inputs.log_ratio is None else array(inputs.log_ratio),
        array(inputs.advantages),
        array(inputs.valid).view(np.uint8),
        array(bounds).view(np.uint32) if is_table else array(bounds),
        log_prob.shape[1],
        inputs.surrogate,
        inputs.parameters,
        inputs.by_probability,
        None if inputs.anchor_log_prob is None else array(inputs.anchor_log_prob),
        weight,
        None if per_token is None else per_token.numpy(),
        written,
    )
    return (
        gradient,
        torch.from_numpy(np.array(weight * total, written.dtype)),  # not torch.tensor, 8 us more
        torch.from_numpy(counts),
        torch.from_numpy(sums),
    )


@token_loss_op.register_fake
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = LossInputs(*args)
    log_prob = inputs.log_prob
    dtype = compute_dtype(log_prob)
    per_token, gradient = (
        torch.empty_like(log_prob, dtype=dtype, memory_format=torch.contiguous_format)
        for _ in range(2)
    )
    count = COUNTS + 3 * PROBABILITY_BINS * inputs.by_probability
    counts = log_prob.new_empty(count, dtype=torch.int64)
    return per_token, gradient, counts, log_prob.new_empty(SUMS, dtype=torch.float64)


def count_valid(valid: torch.Tensor) -> int:
    """Returns the number of True in a bool tensor on the CPU, on all threads."""
    return _core.count_valid(valid.contiguous().numpy().view(np.uint8))
