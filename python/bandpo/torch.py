"""Bounds of a region on tensors: `clip_ratio` replaces `torch.clamp` in any loss.

>>> import torch
>>> from bandpo import Band
>>> from bandpo.torch import clip_ratio
>>> old_log_prob, ratio = torch.tensor([0.01, 0.9]).log(), torch.tensor([3.0, 3.0])
>>> [round(bound, 3) for bound in clip_ratio(Band("kl", 0.05), old_log_prob, ratio).tolist()]
[3.0, 1.076]
"""

from __future__ import annotations

# First, because it reports a torch that is missing or broken.
from bandpo.tensors.check import check_float, compute_dtype, converted

# isort: split
import torch

from bandpo.backends.sides import reads_half, sides_from
from bandpo.error import InvalidValueError
from bandpo.rule import AnyRegion, check_region
from bandpo.tensors.bounds import bounds_of
from bandpo.tensors.internals import is_transformed
from bandpo.tensors.lookup import clipped_op

__all__ = ["clip", "clip_ratio", "contains", "log_bounds"]


def __dir__() -> list[str]:
    return __all__


def log_bounds(
    region: AnyRegion, old_log_prob: torch.Tensor, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(log_lower, log_upper)`` of every token, like `Region.log_bounds`.

    Args:
        region: Source of the bounds.
        old_log_prob: Natural log-probabilities under the policy that drew the tokens, any shape,
            float32, float64, bfloat16 or float16. Above 0 is read as 0.
        exact: Use the solver, in float64, even if there is a table. It runs on the CPU, but for
            CUDA tensors on the device if the kernels can run and the divergence has a name.

    Returns:
        Two tensors of the shape, dtype and device of ``old_log_prob``, without gradient. They are
        computed in float32 or better; NaN gives NaN.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of deltas does not broadcast to the shape.
    """
    check_region(region)
    check_float("old_log_prob", old_log_prob)
    bounds = _log_bounds(region, _readable(old_log_prob, compute_dtype(old_log_prob)), exact)
    log_lower, log_upper = (bound.to(old_log_prob.dtype) for bound in bounds)
    return log_lower, log_upper


def contains(
    region: AnyRegion, old_log_prob: torch.Tensor, log_ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns True for each log-ratio between the bounds, both included, as a bool tensor.

    The arguments are those of `log_bounds` and log-ratios ``ln(new/old)`` that broadcast with
    ``old_log_prob``. NaN lies in no region.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of deltas does not broadcast to the shape, or the tensors are
            on different devices.
    """
    old_log_prob, log_ratio = _precise(region, old_log_prob, log_ratio, "log_ratio")
    log_lower, log_upper = _log_bounds(region, old_log_prob, exact)
    return (log_lower <= log_ratio) & (log_ratio <= log_upper)


def clip(
    region: AnyRegion, old_log_prob: torch.Tensor, log_ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns the log-ratios, moved to the nearest bound if they are outside.

    The arguments are those of `contains`; the result has the dtype of ``log_ratio``. Its gradient
    passes to ``log_ratio`` inside the region and at its bounds. NaN in either gives NaN.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of deltas does not broadcast to the shape, or the tensors are
            on different devices.
    """
    return _clip(region, old_log_prob, log_ratio, "log_ratio", exact)


def clip_ratio(
    region: AnyRegion, old_log_prob: torch.Tensor, ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns the ratios new/old, moved to the nearest bound if they are outside.

    It replaces ``torch.clamp(ratio, 1 - eps_low, 1 + eps_high)``. Otherwise it is as `clip`.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of deltas does not broadcast to the shape, or the tensors are
            on different devices.
    """
    return _clip(region, old_log_prob, ratio, "ratio", exact)


def _clip(
    region: AnyRegion, old_log_prob: torch.Tensor, values: torch.Tensor, argument: str, exact: bool
) -> torch.Tensor:
    """Clips log-ratios or ratios, according to the argument's name."""
    of_ratio = argument == "ratio"
    old_log_prob, precise = _precise(region, old_log_prob, values, argument)
    if reads_half(precise.device) and not is_transformed():
        shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            old_log_prob.shape, precise.shape
        )
        old_log_prob, precise = old_log_prob.expand(shape), precise.expand(shape)
        bounds = bounds_of(region, old_log_prob, exact=exact)
        moved: torch.Tensor = clipped_op(bounds, old_log_prob, precise, of_ratio)[0]
        return moved.to(values.dtype)
    lower, upper = _log_bounds(region, old_log_prob, exact)
    if of_ratio:
        lower, upper = lower.exp(), upper.exp()
    return precise.clamp(lower, upper).to(values.dtype)


def _precise(
    region: AnyRegion, old_log_prob: torch.Tensor, values: torch.Tensor, argument: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the arguments; returns readable old log-probs, and values in float32 or float64."""
    check_region(region)
    check_float("old_log_prob", old_log_prob)
    check_float(argument, values)
    if values.device != old_log_prob.device:  # otherwise a kernel would read foreign memory
        raise InvalidValueError(
            f"{argument} must be on old_log_prob's device {old_log_prob.device}, "
            f"got {values.device}"
        )
    dtype = compute_dtype(old_log_prob, values)
    return _readable(old_log_prob, dtype), converted(values, dtype)


def _readable(old_log_prob: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Old log-probs without gradient, in a dtype, or as they are if a kernel reads them so."""
    old_log_prob = old_log_prob.detach()
    if dtype == torch.float32 and reads_half(old_log_prob.device):
        return old_log_prob
    return converted(old_log_prob, dtype)


def _log_bounds(
    region: AnyRegion, old_log_prob: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = bounds_of(region, old_log_prob, exact=exact)
    log_lower, log_upper = sides_from(bounds, old_log_prob)
    if bounds.dtype == torch.int32 or bounds.ndim > 1:
        return log_lower, log_upper
    # A constant is the same for every token, also for a NaN.
    unknown = torch.where(old_log_prob.isnan(), old_log_prob, 0.0).to(bounds.dtype)
    return unknown + log_lower, unknown + log_upper
