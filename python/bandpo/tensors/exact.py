"""Bounds by the exact solver, as operators."""

from __future__ import annotations

import weakref
from types import ModuleType

import numpy as np
import torch

from bandpo.error import InvalidValueError
from bandpo.region import Region
from bandpo.schedule import RegionSource
from bandpo.table import BandTable
from bandpo.tensors.check import AnyRegion

REGIONS: weakref.WeakValueDictionary[int, AnyRegion] = weakref.WeakValueDictionary()


@torch.library.custom_op(
    "bandpo::exact_log_bounds",
    mutates_args=(),
    schema="(Tensor old_log_prob, int region) -> Tensor",
)
def solve(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    if old_log_prob.is_cuda and (kernels := _kernels()) is not None:
        solved: torch.Tensor | None = kernels.log_bounds(_exact_region(region), old_log_prob)
        if solved is not None:
            return solved.to(old_log_prob.dtype)
    tokens = old_log_prob.detach().to("cpu", torch.float64).numpy()
    bounds = np.stack(_exact_region(region).log_bounds(tokens))
    _check_broadcast(bounds.shape[1:], tokens.shape)
    return torch.from_numpy(bounds).to(old_log_prob)


@solve.register_fake
def _(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    return old_log_prob.new_empty((2, *old_log_prob.shape))


@torch.library.custom_op(
    "bandpo::exact_contains",
    mutates_args=(),
    schema="(Tensor old_log_prob, Tensor log_ratio, int region) -> Tensor",
)
def contains(old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int) -> torch.Tensor:
    if old_log_prob.is_cuda and (kernels := _kernels()) is not None:
        decided: torch.Tensor | None = kernels.contains(
            _exact_region(region), old_log_prob, log_ratio
        )
        if decided is not None:
            return decided
    tokens, ratios = (
        tensor.detach().to("cpu", torch.float64).numpy() for tensor in (old_log_prob, log_ratio)
    )
    inside = _exact_region(region).contains(tokens, ratios)
    _check_broadcast(inside.shape, tokens.shape)
    return torch.from_numpy(inside).to(old_log_prob.device)


@contains.register_fake
def _(old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int) -> torch.Tensor:
    return torch.empty_like(old_log_prob, dtype=torch.bool)


def _kernels() -> ModuleType | None:
    from bandpo.backends.select import kernels

    return kernels()


def _exact_region(key: int) -> Region:
    region = REGIONS[key]
    if isinstance(region, RegionSource):
        region = region.region
    return region.region if isinstance(region, BandTable) else region


def _check_broadcast(together: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if together != shape:
        raise InvalidValueError(
            f"the region's delta must broadcast to the shape {shape} of old_log_prob, "
            f"together they have shape {together}"
        )
