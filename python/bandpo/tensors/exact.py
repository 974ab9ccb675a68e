"""Bounds and membership by the exact solver, as operators; `bandpo.backends.cuda` adds kernels."""

from __future__ import annotations

import torch

from bandpo.error import InvalidValueError
from bandpo.region import Region
from bandpo.region.live import live
from bandpo.rule import current
from bandpo.table import BandTable
from bandpo.tensors.check import compute_dtype


@torch.library.custom_op(
    "bandpo::exact_log_bounds",
    mutates_args=(),
    schema="(Tensor old_log_prob, int region) -> Tensor",
)
def exact_log_bounds_op(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    """Log bounds of every token, [2, ...], in float32, or in float64 if the log-probs are.

    Args:
        old_log_prob: Old log-probabilities, any float.
        region: ``id`` of a region or a source.

    Raises:
        InvalidValueError: If an array of radii does not broadcast to the shape.
    """
    return log_bounds_on_host(old_log_prob, region)


@exact_log_bounds_op.register_fake
def _(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    return old_log_prob.new_empty((2, *old_log_prob.shape), dtype=compute_dtype(old_log_prob))


def log_bounds_on_host(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    """Returns `exact_log_bounds_op` by `Region.log_bounds`, in float64."""
    tokens = old_log_prob.detach().to("cpu", torch.float64).clamp(max=0.0).numpy()
    bounds = exact_region(region).log_bounds(tokens)
    _check_broadcast(bounds[0].shape, tokens.shape)
    found = torch.empty((2, *tokens.shape), dtype=compute_dtype(old_log_prob), device="cpu")
    for side, of_side in zip(found, bounds, strict=True):
        side.copy_(torch.from_numpy(of_side))
    return found.to(old_log_prob.device)


@torch.library.custom_op(
    "bandpo::exact_contains",
    mutates_args=(),
    schema="(Tensor old_log_prob, Tensor log_ratio, int region) -> Tensor",
)
def exact_contains_op(
    old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int
) -> torch.Tensor:
    """True for each log-ratio inside the region, bool, in the shape of ``old_log_prob``.

    Args:
        old_log_prob: Old log-probabilities, float32 or float64.
        log_ratio: Log-ratios, the same shape and dtype.
        region: ``id`` of a region or a source.

    Raises:
        InvalidValueError: If an array of radii does not broadcast to the shape.
    """
    return contains_on_host(old_log_prob, log_ratio, region)


@exact_contains_op.register_fake
def _(old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int) -> torch.Tensor:
    return torch.empty_like(old_log_prob, dtype=torch.bool)


def contains_on_host(
    old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int
) -> torch.Tensor:
    """Returns `exact_contains_op` by `Region.contains`, in float64."""
    tokens = old_log_prob.detach().to("cpu", torch.float64).clamp(max=0.0).numpy()
    ratios = log_ratio.detach().to("cpu", torch.float64).numpy()
    inside = exact_region(region).contains(tokens, ratios)
    _check_broadcast(inside.shape, tokens.shape)
    return torch.from_numpy(inside).to(old_log_prob.device)


def exact_region(key: int) -> Region:
    """Returns the region of an ``id``: that of a source now, or of a table."""
    region = current(live(key))
    return region.region if isinstance(region, BandTable) else region


def _check_broadcast(together: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if together != shape:
        raise InvalidValueError(
            f"the region's delta must broadcast to the shape {shape} of old_log_prob, "
            f"together they have shape {together}"
        )
