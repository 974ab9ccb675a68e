"""Epsilons of each token, for a trainer that clamps the ratio by itself."""

from __future__ import annotations

import math

import torch

from bandpo.rule import AnyRegion
from bandpo.tensors.check import compute_dtype
from bandpo.torch import log_bounds


def epsilons(
    region: AnyRegion, old_log_prob: torch.Tensor, anchor_log_prob: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(eps_low, eps_high)`` with which ``clamp(ratio, 1 - eps_low, 1 + eps_high)`` clips.

    They are computed in float32 or better, also under autocast. The ratio has to be computed so as
    well: in bfloat16, whose steps near 1 are 0.0078, most bands are narrower than a step.

    Args:
        region: Source of the bounds.
        old_log_prob: Natural log-probabilities in the denominator of the ratio that is clamped, any
            shape, float32, float64, bfloat16 or float16. Above 0 is read as 0.
        anchor_log_prob: Log-probabilities at which the region stands, likewise; by default
            ``old_log_prob``.

    Returns:
        Two tensors of the shape and device of ``old_log_prob``, without gradient, float32, or
        float64 if a log-prob is. They may be infinite and are never NaN: where a log-prob is NaN,
        as in padding, they are 0. A bound of NaN would make NaN of a ratio that the trainer has
        filled, whereas the ratio of a token that counts is NaN there by itself.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of deltas does not broadcast to the shape.
    """
    anchor = old_log_prob if anchor_log_prob is None else anchor_log_prob
    dtype = compute_dtype(old_log_prob, anchor)
    log_lower, log_upper = log_bounds(region, anchor.detach().to(dtype))
    if anchor_log_prob is not None:
        shift = anchor.detach().to(dtype) - old_log_prob.detach().to(dtype)
        log_lower, log_upper = log_lower + shift, log_upper + shift
    return _known(-torch.expm1(log_lower)), _known(torch.expm1(log_upper))


def _known(epsilon: torch.Tensor) -> torch.Tensor:
    return epsilon.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
