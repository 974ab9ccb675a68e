"""A region as one tensor of bounds, which every backend reads."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from bandpo.error import InvalidValueError
from bandpo.region import Clip, Region
from bandpo.region.live import live
from bandpo.rule import AnyRegion, current
from bandpo.schedule import RegionSource
from bandpo.tensors.cached import Cached, cached, check_no_capture, upload
from bandpo.tensors.check import compute_dtype
from bandpo.tensors.exact import exact_contains_op, exact_log_bounds_op
from bandpo.tensors.internals import faked, outside_transforms


def bounds_of(
    region: AnyRegion,
    old_log_prob: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Returns the bounds of a region as one tensor, of one of three kinds.

    - Constants, [2]: ``log_lower`` and ``log_upper`` of every token, for a `Clip`.
    - A table, int32 [words]: the image described in ``docs/table-format.md``, for other regions.
      Its copy on a device lives as long as the region.
    - Per token, [2, ...] and the shape of ``old_log_prob``: the bounds of each token, by
      `Region.log_bounds`, which runs on the CPU in float64, or by a kernel. With ``exact``, and for
      regions that no table can hold, such as a `Band` with an array of deltas.

    A tensor enters a compiled graph as data. Under `torch.compile` the region is a constant, so
    another region compiles again. Another region of a `RegionSource` does not: it has one tensor a
    device, filled in place at each change, so graphs compiled or captured with it stay right.

    Args:
        region: Source of the bounds.
        old_log_prob: Old log-probabilities, any float, without gradient, any shape. The bounds are
            in float32, in float64 where it is.
        valid: Bool, like ``old_log_prob``; the solver skips the other tokens.
        exact: Use the solver even if there is a table.

    Raises:
        InvalidValueError: If an array of deltas does not broadcast to the shape, or the region is
            first used on a device in the capture of a CUDA graph.
    """
    dtype = compute_dtype(old_log_prob)
    source: _Source = _source(id(region), dtype, old_log_prob.device, exact)
    if source.bounds is not None:
        return source.bounds
    if valid is not None:
        # At probability 1 the solver returns its limit at once.
        old_log_prob = torch.where(valid, old_log_prob, 0.0)
    bounds: torch.Tensor = exact_log_bounds_op(old_log_prob, source.region)
    return bounds


def membership_of(
    region: AnyRegion,
    old_log_prob: torch.Tensor,
    log_ratio: Callable[[], torch.Tensor],
    valid: torch.Tensor,
    *,
    exact: bool = False,
) -> torch.Tensor:
    """Returns bounds that are right about which of the given log-ratios are inside.

    They are those of `bounds_of` if that needs no solver. Otherwise one evaluation of the
    divergence decides, and they are infinite for a ratio inside and 0 for a ratio outside.

    Args:
        region: Source of the bounds.
        old_log_prob: Old log-probabilities, float32 or float64, without gradient, any shape.
        log_ratio: Returns the log-ratios, same shape and dtype; called if the divergence decides.
        valid: Which tokens count, bool, the same shape.
        exact: Use the divergence even if there is a table.

    Raises:
        InvalidValueError: If an array of deltas does not broadcast to the shape.
    """
    source: _Source = _source(id(region), old_log_prob.dtype, old_log_prob.device, exact)
    if source.bounds is not None:
        return source.bounds
    ratios = log_ratio()
    inside: torch.Tensor = exact_contains_op(
        torch.where(valid, old_log_prob, 0.0), torch.where(valid, ratios, 0.0), source.region
    )
    # A NaN is in no region, but must stay a NaN.
    limit = torch.where(inside | ratios.isnan(), math.inf, 0.0).to(old_log_prob.dtype)
    return torch.stack([-limit, limit])


class _Source(NamedTuple):
    """Either the bounds or the ``id`` of the region to solve for them."""

    bounds: torch.Tensor | None
    region: int


# A region can neither be traced nor, in torch 2.11, be given to a function that is not traced.
# So torch.compile guards on its identity, calls this once with a number, and makes the returned
# tensor an input of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _source(key: int, dtype: torch.dtype, device: torch.device, exact: bool) -> _Source:
    region = live(key)
    now = current(region)
    if isinstance(now, Clip) or not (exact or now.per_token):
        if now is not region:  # but that of a source
            return _Source(faked(_live_bounds(region).on(dtype, device)), 0)
        return _Source(faked(_kept_bounds(region, dtype, device)), 0)
    return _Source(None, key)


def _kept_bounds(region: Region, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The constants or the table of a region."""
    if isinstance(region, Clip):
        return cached(region, dtype, device, lambda: _constants(region, dtype, device))
    return cached(region, "table", device, lambda: upload(region.table().words, device))


MAX_TABLE_WORDS = 32 * 1024 // 4
"""Size of the largest table, 32 KiB."""


class _LiveBounds:
    """The bounds of a source on every device in use, refilled when its region changes."""

    def __init__(self, source: RegionSource) -> None:
        self._region = source.region
        self._tensors: dict[tuple[torch.dtype, torch.device], Cached] = {}
        source.subscribe(self.change)

    def on(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        kept = self._tensors.get((dtype, device))
        if kept is None:
            check_no_capture(device)
            # Otherwise it could not be refilled later, or would belong to a transform.
            with torch.inference_mode(False), outside_transforms(device):
                if isinstance(self._region, Clip):
                    tensor = torch.empty(2, dtype=dtype, device=device)
                else:  # the next table may be larger
                    tensor = torch.zeros(MAX_TABLE_WORDS, dtype=torch.int32, device=device)
            if type(tensor) is not torch.Tensor:  # a fake one would outlive its mode
                return tensor
            kept = self._tensors[dtype, device] = Cached(tensor)
            self._fill(kept)
        return kept.ready()

    def change(self, region: Region) -> None:
        if isinstance(region, Clip) is not isinstance(self._region, Clip):
            raise InvalidValueError(
                f"the region of a source must stay a Clip or stay none, it was {self._region!r} "
                f"and is {region!r}"
            )
        self._region = region
        for kept in self._tensors.values():
            self._fill(kept)

    def _fill(self, kept: Cached) -> None:
        tensor = kept.tensor
        with outside_transforms(tensor.device):
            if isinstance(self._region, Clip):
                tensor.copy_(_constants(self._region, tensor.dtype, tensor.device))
            else:
                words = upload(self._region.table().words, tensor.device)
                tensor[: words.shape[0]].copy_(words)
        kept.mark_filled()


_LIVE: weakref.WeakKeyDictionary[RegionSource, _LiveBounds] = weakref.WeakKeyDictionary()


def _live_bounds(source: RegionSource) -> _LiveBounds:
    live = _LIVE.get(source)
    if live is None:
        live = _LIVE[source] = _LiveBounds(source)
    return live


def _constants(clip: Clip, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Filled on the device, because a copy from the host would wait for it.
    bounds = torch.full((2,), clip.log_upper, dtype=dtype, device=device)
    bounds[0].fill_(clip.log_lower)
    return bounds
