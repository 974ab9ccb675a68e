"""Both log bounds of every token, read by the fastest code for their device."""

from __future__ import annotations

import numpy as np
import torch

from bandpo import _core
from bandpo.backends.select import default_backend
from bandpo.rule import AnyRegion
from bandpo.tensors.bounds import bounds_of
from bandpo.tensors.internals import needs_no_dispatcher
from bandpo.tensors.lookup import table_log_bounds, table_log_bounds_op


def sides_of(
    region: AnyRegion,
    old_log_prob: torch.Tensor,
    *,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both log bounds of every token, in the shape and dtype of ``old_log_prob``.

    Args:
        region: Source of the bounds.
        old_log_prob: Old log-probabilities, float32 or float64, without gradient, any shape. Where
            `reads_half` is True also half precision, whose bounds are float32.
        exact: Use the solver even if there is a table.
    """
    return sides_from(bounds_of(region, old_log_prob, exact=exact), old_log_prob)


def reads_half(device: torch.device) -> bool:
    """Returns True if bounds on a device are read by kernels, which take half precision."""
    name: str = default_backend(device.type)
    return name == "cuda"


def sides_from(
    bounds: torch.Tensor, old_log_prob: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `sides_of` from the result of `bounds_of` or `membership_of` for the log-probs."""
    if bounds.dtype == torch.int32:
        if reads_half(bounds.device):
            log_lower, log_upper = table_log_bounds_op(bounds, old_log_prob).unbind()
            return log_lower, log_upper
        if (
            old_log_prob.is_cpu
            and needs_no_dispatcher(old_log_prob)
            and old_log_prob.is_contiguous()
        ):
            lower, log_upper = (torch.empty_like(old_log_prob) for _ in range(2))
            tokens = old_log_prob.numpy(force=True)  # also of a negated view
            words = bounds.numpy().view(np.uint32)
            _core.table_bounds(words, tokens, lower.numpy(), log_upper.numpy())
            return lower.log_(), log_upper
        return table_log_bounds(bounds, old_log_prob)
    log_lower, log_upper = bounds.unbind()
    return log_lower.expand(old_log_prob.shape), log_upper.expand(old_log_prob.shape)
