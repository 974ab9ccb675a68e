"""Bounds on tensors, and the backends of the loss. The one module that imports torch.

Every backend reads the bounds of a region from one tensor, made by `bounds_of`.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo import _core
from bandpo.backends.contract import (
    COUNTS,
    PROBABILITY_BINS,
    PROBABILITY_EDGES,
    SCHEMA,
    SUMS,
    LossInputs,
    gradients_of,
)
from bandpo.error import (
    BackendWarning,
    BrokenExtraError,
    InvalidTypeError,
    InvalidValueError,
    MissingExtraError,
)
from bandpo.region import Clip, Region
from bandpo.schedule import RegionSource
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.table import BandTable

try:
    import torch as torch
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise BrokenExtraError(f"torch is installed but cannot be imported: {missing}") from missing
    raise MissingExtraError("torch", "torch") from missing
except (ImportError, OSError) as broken:
    raise BrokenExtraError(f"torch is installed but cannot be imported: {broken}") from broken

__all__ = ["clip", "clip_ratio", "contains", "log_bounds"]

MOST_TABLE_WORDS = 32 * 1024 // 4
AnyRegion: TypeAlias = Region | RegionSource
"""A region, or what changes one between steps."""
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def log_bounds(
    region: AnyRegion, old_log_prob: torch.Tensor, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(log_lower, log_upper)`` of every token, like `Region.log_bounds`.

    Args:
        region: Where the bounds come from.
        old_log_prob: Natural log-probabilities under the policy that drew the tokens, any shape,
            float32, float64, bfloat16 or float16. Above 0 is read as 0.
        exact: Use the solver, in float64, even where there is a table. It runs on the CPU, but for
            CUDA tensors on the device where the kernels can and the divergence has a name.

    Returns:
        Two tensors of the shape, dtype and device of ``old_log_prob``, without gradient. They are
        computed in float32 or better; NaN gives NaN.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of radii does not broadcast to the shape.
    """
    check_region(region)
    check_float("old_log_prob", old_log_prob)
    bounds = _log_bounds(region, old_log_prob.detach().to(compute_dtype(old_log_prob)), exact)
    log_lower, log_upper = (bound.to(old_log_prob.dtype) for bound in bounds)
    return log_lower, log_upper


def contains(
    region: AnyRegion, old_log_prob: torch.Tensor, log_ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns whether each log-ratio lies between the bounds, both included, as a bool tensor.

    The arguments are those of `log_bounds` and log-ratios ``ln(new/old)`` that broadcast with
    ``old_log_prob``. NaN lies nowhere.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of radii does not broadcast to the shape, or the tensors are
            on different devices.
    """
    old_log_prob, log_ratio = _precise(region, old_log_prob, log_ratio, "log_ratio")
    log_lower, log_upper = _log_bounds(region, old_log_prob, exact)
    return (log_lower <= log_ratio) & (log_ratio <= log_upper)


def clip(
    region: AnyRegion, old_log_prob: torch.Tensor, log_ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns the log-ratios moved to the nearest bound where they lie outside.

    The arguments are those of `contains`; the result has the dtype of ``log_ratio``. Its gradient
    passes to ``log_ratio`` inside the region and at its bounds. NaN in either gives NaN.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of radii does not broadcast to the shape, or the tensors are
            on different devices.
    """
    return _clip(region, old_log_prob, log_ratio, "log_ratio", exact)


def clip_ratio(
    region: AnyRegion, old_log_prob: torch.Tensor, ratio: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Returns the ratios new/old moved to the nearest bound where they lie outside.

    It takes the place of ``torch.clamp(ratio, 1 - eps_low, 1 + eps_high)``. All else is as `clip`
    has it.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype.
        InvalidValueError: If an array of radii does not broadcast to the shape, or the tensors are
            on different devices.
    """
    return _clip(region, old_log_prob, ratio, "ratio", exact)


def _clip(
    region: AnyRegion, old_log_prob: torch.Tensor, values: torch.Tensor, argument: str, exact: bool
) -> torch.Tensor:
    """Log-ratios or ratios, as the argument is called, within the bounds."""
    of_ratio = argument == "ratio"
    old_log_prob, precise = _precise(region, old_log_prob, values, argument)
    if default_backend(precise.device.type) == "cuda" and not _is_transformed():
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
    """Old log-probs without gradient and an argument, checked, in the dtype to compute in."""
    check_region(region)
    check_float("old_log_prob", old_log_prob)
    check_float(argument, values)
    if values.device != old_log_prob.device:  # which a kernel would not notice
        raise InvalidValueError(
            f"{argument} must be on old_log_prob's device {old_log_prob.device}, "
            f"got {values.device}"
        )
    dtype = compute_dtype(old_log_prob, values)
    return old_log_prob.detach().to(dtype), values.to(dtype)


def _log_bounds(
    region: AnyRegion, old_log_prob: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = bounds_of(region, old_log_prob, exact=exact)
    log_lower, log_upper = sides_of(region, old_log_prob, bounds=bounds)
    if bounds.dtype == torch.int32 or bounds.ndim > 1:
        return log_lower, log_upper
    # A constant does not know which tokens are NaN.
    unknown = torch.where(old_log_prob.isnan(), old_log_prob, 0.0)
    return unknown + log_lower, unknown + log_upper


def sides_of(
    region: AnyRegion,
    old_log_prob: torch.Tensor,
    *,
    bounds: torch.Tensor | None = None,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both log bounds of every token, like ``old_log_prob``.

    Args:
        region: Where the bounds come from.
        old_log_prob: Old log-probabilities, float32 or float64, without gradient, any shape.
        bounds: What `bounds_of` or `membership_of` made for them, if that is known.
        exact: Use the solver even where there is a table.
    """
    if bounds is None:
        bounds = bounds_of(region, old_log_prob, exact=exact)
    if bounds.dtype == torch.int32:
        if default_backend(bounds.device.type) == "cuda":
            log_lower, log_upper = table_log_bounds_op(bounds, old_log_prob).unbind()
            return log_lower, log_upper
        if needs_no_dispatcher(old_log_prob) and old_log_prob.is_contiguous():
            lower, log_upper = (torch.empty_like(old_log_prob) for _ in range(2))
            arrays = (tensor.numpy() for tensor in (old_log_prob, lower, log_upper))
            _core.table_bounds(bounds.numpy().view(np.uint32), *arrays)
            return lower.log_(), log_upper
        return _table_log_bounds(bounds, old_log_prob)
    log_lower, log_upper = bounds.unbind()
    return log_lower.expand(old_log_prob.shape), log_upper.expand(old_log_prob.shape)


def _is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether numpy can see the tensor as it is: of the CPU, no fake and no traced one."""
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def _is_transformed() -> bool:
    """Whether torch.func or forward mode looks on, which would take an operator for a constant."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def membership_of(
    region: AnyRegion,
    old_log_prob: torch.Tensor,
    log_ratio: Callable[[], torch.Tensor],
    valid: torch.Tensor,
    *,
    exact: bool = False,
) -> torch.Tensor:
    """Returns bounds that say of these log-ratios alone whether they are beyond the region's.

    They are those of `bounds_of` where that needs no solver. Where it would, one evaluation of the
    divergence decides, and they are infinite for a ratio that is inside and 0 for one that is not.

    Args:
        region: Where the bounds come from.
        old_log_prob: Old log-probabilities, float32 or float64, without gradient, any shape.
        log_ratio: Returns the log-ratios, the same; called only if the divergence decides.
        valid: Which tokens count, bool, the same shape.
        exact: Use the divergence even where there is a table.

    Raises:
        InvalidValueError: If an array of radii does not broadcast to the shape.
    """
    source: _Source = _source(region, old_log_prob.dtype, old_log_prob.device, exact)
    if source.bounds is not None:
        return source.bounds
    ratios = log_ratio()
    inside: torch.Tensor = _contains(
        torch.where(valid, old_log_prob, 0.0), torch.where(valid, ratios, 0.0), source.region
    )
    # A NaN is in no region, but to be kept, not clipped.
    limit = torch.where(inside | ratios.isnan(), math.inf, 0.0).to(old_log_prob.dtype)
    return torch.stack([-limit, limit])


def check_region(region: AnyRegion) -> None:
    """Raises InvalidTypeError unless the region is one, or the source of one."""
    if not isinstance(region, (Region, RegionSource)):
        raise InvalidTypeError(
            f"region must be a bandpo.Band, Clip, BandTable or another Region, or a "
            f"bandpo.schedule.RegionSource, got {type(region).__name__}; a preset is given by "
            f"**preset(name).arguments(), and a schedule within a ScheduledBand"
        )


def check_float(argument: str, tensor: torch.Tensor) -> None:
    """Raises InvalidTypeError unless the argument is a dense tensor of floats."""
    check_tensor(argument, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(
            f"{argument} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )


def check_tensor(argument: str, tensor: torch.Tensor) -> None:
    """Raises InvalidTypeError unless the argument is a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise InvalidTypeError(
            f"{argument} must be a dense tensor, got a nested one: of a jagged tensor, pass the "
            f".values() as packed [N], and the .offsets() as cu_seqlens"
        )
    if tensor.layout != torch.strided:
        raise InvalidTypeError(f"{argument} must be a dense tensor, got layout {tensor.layout}")


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


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
      Devices other than the CPU keep theirs as long as the table lives.
    - Per token, [2, ...] and the shape of ``old_log_prob``: the bounds of each token, by
      `Region.log_bounds`, which runs on the CPU in float64, or by `bandpo.cuda.log_bounds`; with
      ``exact``, and for regions that no table can hold, such as a `Band` with an array of radii.

    A tensor enters a compiled graph as data. Under `torch.compile` the region itself is a constant:
    another region object compiles again. A `RegionSource` does not: it has one tensor for each
    device, filled anew in place whenever its region changes, so that graphs that were compiled or
    captured with it go on to be right.

    Args:
        region: Where the bounds come from.
        old_log_prob: Old log-probabilities, any float, without gradient, any shape. The bounds are
            in float32, in float64 where it is.
        valid: Bool, like ``old_log_prob``; the solver skips the other tokens.
        exact: Use the solver even where there is a table.

    Raises:
        InvalidValueError: If an array of radii does not broadcast to the shape, or the region is
            first used on a device in the capture of a CUDA graph.
    """
    dtype = compute_dtype(old_log_prob)
    source: _Source = _source(region, dtype, old_log_prob.device, exact)
    if source.bounds is not None:
        return source.bounds
    old_log_prob = old_log_prob.to(dtype)
    if valid is not None:
        # The solver is at its limit at once where the probability is 1.
        old_log_prob = torch.where(valid, old_log_prob, 0.0)
    bounds: torch.Tensor = _solve(old_log_prob, source.region)
    return bounds


class _Source(NamedTuple):
    """Either the bounds themselves or, by its id in `_REGIONS`, the region to ask for them."""

    bounds: torch.Tensor | None
    region: int


_REGIONS: weakref.WeakValueDictionary[int, AnyRegion] = weakref.WeakValueDictionary()


# A region cannot be traced: torch.compile calls this once, guards on the identity of the region
# and takes the tensor it returns as an input of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _source(region: AnyRegion, dtype: torch.dtype, device: torch.device, exact: bool) -> _Source:
    now = region.region if isinstance(region, RegionSource) else region
    if isinstance(now, Clip) or not (exact or now.per_token):
        if isinstance(region, RegionSource):
            return _Source(_live_bounds(region).on(dtype, device), 0)
        return _Source(_kept_bounds(region, dtype, device), 0)
    _REGIONS[id(region)] = region
    return _Source(None, id(region))


class _Kept:
    """A tensor that outlives the call which fills it, for whichever stream is current later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._filled: torch.cuda.Event | None = None
        self.note_filled()

    def note_filled(self) -> None:
        """Marks where the current stream has filled the tensor; the host does not wait for it."""
        if self.tensor.is_cuda:
            self._filled = torch.cuda.current_stream(self.tensor.device).record_event()

    def ready(self) -> torch.Tensor:
        """The tensor, filled before the current stream reads it and not freed before it has."""
        # A graph has no such event outside of it, and nothing is in flight when its capture begins.
        if self._filled is not None and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self._filled)
            self.tensor.record_stream(stream)
        return self.tensor


_KEPT: dict[tuple[int, object, torch.device], _Kept] = {}


def keep(
    region: Region, what: object, device: torch.device, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns a tensor that is made once for a region on a device and kept as long as it lives.

    Args:
        region: What the tensor says something of.
        what: What that is, hashable.
        device: Where the tensor is.
        make: Returns it; called at the first use.

    Raises:
        InvalidValueError: If the first use is in the capture of a CUDA graph.
    """
    # By identity: a look-up by value would hash the region at every call.
    key = id(region), what, device
    kept = _KEPT.get(key)
    if kept is None:
        check_no_capture(device)
        with torch.inference_mode(False):  # or autograd could not save it outside of it
            tensor = make()
        if type(tensor) is not torch.Tensor:  # a fake one would outlive its mode
            return tensor
        kept = _KEPT[key] = _Kept(tensor)
        weakref.finalize(region, _KEPT.pop, key, None)
    return kept.ready()


def check_no_capture(device: torch.device) -> None:
    """Raises InvalidValueError where the current stream is captured to a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_available():  # but fake tensors say so
        return
    if torch.cuda.is_current_stream_capturing():
        raise InvalidValueError(
            f"region must be used on {device} once before a CUDA graph is captured: what is copied "
            f"there at its first use would become a part of the graph"
        )


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns an array on a device, by a copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and type(tensor) is torch.Tensor:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _kept_bounds(region: Region, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The constants or the table of a region."""
    if isinstance(region, Clip):
        return keep(region, dtype, device, lambda: _constants(region, dtype, device))
    return keep(region, "table", device, lambda: upload(region.table().words, device))


class _LiveBounds:
    """The bounds of a source on every device that asked for them, kept as its region changes."""

    def __init__(self, source: RegionSource) -> None:
        self._region = source.region
        self._tensors: dict[tuple[torch.dtype, torch.device], _Kept] = {}
        source.subscribe(self.change)

    def on(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        kept = self._tensors.get((dtype, device))
        if kept is None:
            check_no_capture(device)
            with torch.inference_mode(False):  # or it could not be filled anew outside of it
                if isinstance(self._region, Clip):
                    tensor = torch.empty(2, dtype=dtype, device=device)
                else:  # as large as any table, since the next may be larger
                    tensor = torch.zeros(MOST_TABLE_WORDS, dtype=torch.int32, device=device)
            if type(tensor) is not torch.Tensor:  # a fake one would outlive its mode
                return tensor
            kept = self._tensors[dtype, device] = _Kept(tensor)
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

    def _fill(self, kept: _Kept) -> None:
        tensor = kept.tensor
        if isinstance(self._region, Clip):
            tensor.copy_(_constants(self._region, tensor.dtype, tensor.device))
        else:
            words = upload(self._region.table().words, tensor.device)
            tensor[: words.shape[0]].copy_(words)
        kept.note_filled()


_LIVE: weakref.WeakKeyDictionary[RegionSource, _LiveBounds] = weakref.WeakKeyDictionary()


def _live_bounds(source: RegionSource) -> _LiveBounds:
    live = _LIVE.get(source)
    if live is None:
        live = _LIVE[source] = _LiveBounds(source)
    return live


def _constants(clip: Clip, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Filled on the device: a copy from the host would have to wait for it.
    bounds = torch.full((2,), clip.log_upper, dtype=dtype, device=device)
    bounds[0].fill_(clip.log_lower)
    return bounds


@torch.library.custom_op(
    "bandpo::exact_log_bounds",
    mutates_args=(),
    schema="(Tensor old_log_prob, int region) -> Tensor",
)
def _solve(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    if old_log_prob.is_cuda and (kernels := _kernels()) is not None:
        solved: torch.Tensor | None = kernels.log_bounds(_exact_region(region), old_log_prob)
        if solved is not None:
            return solved.to(old_log_prob.dtype)
    tokens = old_log_prob.detach().to("cpu", torch.float64).numpy()
    bounds = np.stack(_exact_region(region).log_bounds(tokens))
    _check_broadcast(bounds.shape[1:], tokens.shape)
    return torch.from_numpy(bounds).to(old_log_prob)


@_solve.register_fake
def _(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    return old_log_prob.new_empty((2, *old_log_prob.shape))


@torch.library.custom_op(
    "bandpo::exact_contains",
    mutates_args=(),
    schema="(Tensor old_log_prob, Tensor log_ratio, int region) -> Tensor",
)
def _contains(old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int) -> torch.Tensor:
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


@_contains.register_fake
def _(old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int) -> torch.Tensor:
    return torch.empty_like(old_log_prob, dtype=torch.bool)


def _exact_region(key: int) -> Region:
    region = _REGIONS[key]
    if isinstance(region, RegionSource):
        region = region.region
    return region.region if isinstance(region, BandTable) else region


def _check_broadcast(together: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if together != shape:
        raise InvalidValueError(
            f"the region's delta must broadcast to the shape {shape} of old_log_prob, "
            f"together they have shape {together}"
        )


def _table_log_bounds(
    words: torch.Tensor, old_log_prob: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lower, log_upper = (
        read_table(words, old_log_prob, words.new_full((), side, dtype=torch.bool))
        for side in (True, False)
    )
    return lower.log(), log_upper


# Operators, so that a kernel has its place in a compiled graph. On other devices the functions that
# they stand for are called themselves: a compiler can fuse those.
@torch.library.custom_op(
    "bandpo::table_log_bounds",
    mutates_args=(),
    schema="(Tensor words, Tensor old_log_prob) -> Tensor",
)
def table_log_bounds_op(words: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    """Both log bounds of every token from a table, [2, ...], in the dtype that is computed in."""
    precise = old_log_prob.to(compute_dtype(old_log_prob))
    return torch.stack(_table_log_bounds(words, precise))


@table_log_bounds_op.register_fake
def _(words: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    return old_log_prob.new_empty((2, *old_log_prob.shape), dtype=compute_dtype(old_log_prob))


@torch.library.custom_op(
    "bandpo::clipped",
    mutates_args=(),
    schema="(Tensor bounds, Tensor old_log_prob, Tensor values, bool of_ratio) -> (Tensor, Tensor)",
)
def clipped_op(
    bounds: torch.Tensor, old_log_prob: torch.Tensor, values: torch.Tensor, of_ratio: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios or ratios moved to the nearest bound where they lie outside, and which do not."""
    if bounds.dtype == torch.int32:
        log_lower, log_upper = _table_log_bounds(bounds, old_log_prob)
    else:
        log_lower, log_upper = bounds.unbind()
    unknown = torch.where(old_log_prob.isnan(), old_log_prob, 0.0)
    lower, upper = unknown + log_lower, unknown + log_upper
    if of_ratio:
        lower, upper = lower.exp(), upper.exp()
    moved = values.clamp(lower, upper)
    return moved, moved == values


@clipped_op.register_fake
def _(
    bounds: torch.Tensor, old_log_prob: torch.Tensor, values: torch.Tensor, of_ratio: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    moved = torch.empty_like(values, memory_format=torch.contiguous_format)
    return moved, torch.empty_like(moved, dtype=torch.bool)


def _save_inside(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _backward_of_clipped(
    ctx: Any, grad_moved: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return None, None, torch.where(inside, grad_moved, 0.0), None


clipped_op.register_autograd(_backward_of_clipped, setup_context=_save_inside)


def read_table(
    words: torch.Tensor, old_log_prob: torch.Tensor, lower: torch.Tensor
) -> torch.Tensor:
    """Looks one side up for every token: ``lower``, a ratio, or ``log_upper``.

    Plain torch on integers and floats: the operations of ``rust/table/mod.rs`` in the same order, for
    the same results bit for bit.

    Args:
        words: The image of a table, int32 [words].
        old_log_prob: Old log-probabilities, float32 or float64.
        lower: Which side, bool, broadcasts with ``old_log_prob``.

    Returns:
        The bounds, in the dtype of ``old_log_prob``, which is rounded to float32 for the lookup.
    """
    floats = words.view(torch.float32)
    y = (-old_log_prob).to(torch.float32).clamp(min=0.0)

    def of_side(index: int, stride: int) -> torch.Tensor:
        return torch.where(lower, floats[index + stride], floats[index])

    # Rows of 16 words, a lane for each of the eight pieces of both sides; then the special values.
    lane = torch.where(lower, 8, 0) + sum((y >= of_side(k, 8)).to(torch.int64) for k in range(1, 8))
    distance = (y - floats[16 + lane]).abs() * floats[32 + lane]
    bits = distance.view(torch.int32).clamp(words[64 + lane], words[80 + lane])
    exponent = bits >> 23
    entry = words[words[48 + lane] + exponent]
    halvings = entry & 15
    node = 2 * ((entry >> 4) + ((bits & 0x7FFFFF) >> (23 - halvings)))
    # What is left of the mantissa becomes that of a float in [1, 2).
    fraction = (((bits << halvings) & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    width = ((exponent - halvings) << 23).view(torch.float32)
    value, slope = floats[node], floats[node + 1] * width
    rise, next_slope = floats[node + 2] - value, floats[node + 3] * width
    bend = 3.0 * rise - 2.0 * slope - next_slope
    twist = slope + next_slope - 2.0 * rise
    bound = value + fraction * (slope + fraction * (bend + fraction * twist))
    bound = torch.where(y == 0.0, of_side(96, 1), torch.where(y >= 128.0, of_side(98, 1), bound))
    everything = ~lower & (bound >= y)
    bound = torch.where(y.isnan(), y, bound.clamp(min=0.0)).to(old_log_prob.dtype)
    # Where everything is allowed, y in float32 could fall short of a new probability of 1.
    return torch.where(everything, (-old_log_prob).clamp(min=0.0), bound)


class TokenLoss(Protocol):
    """A backend: the loss of every token, as `bandpo.loss.policy_loss` defines it."""

    def __call__(
        self, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns losses, [B, T], their sum, and the counts and sums of `Totals`."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def default_backend(device: str) -> str:
    """Returns the backend that ``"auto"`` stands for on a type of device, such as ``"cuda"``.

    Warns once, with a `BackendWarning`, where the kernels for CUDA cannot run.
    """
    if device == "cuda":
        return "torch" if _kernels() is None else "cuda"
    return "native" if device == "cpu" else "torch"


@cache
def _kernels() -> ModuleType | None:
    from bandpo import cuda

    obstacle = cuda.obstacle()
    if obstacle is None:
        return cuda
    warnings.warn(f"CUDA tensors take the torch backend: {obstacle}", BackendWarning, stacklevel=1)
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def require_kernels() -> bool:
    """Returns True if the kernels for CUDA can run.

    Raises:
        MissingExtraError: If CuPy is not installed.
        BrokenExtraError: If it cannot be used, or there is no CUDA driver or device.
    """
    from bandpo import cuda

    obstacle = cuda.obstacle()
    if obstacle is not None:
        raise obstacle
    return True


def gpu_report() -> str:
    """Returns whether torch can use a GPU here, and why not, in one line."""
    if torch.version.cuda is None and torch.version.hip is None:
        if torch.backends.mps.is_available():
            return "usable: MPS"
        return f"not usable: torch {torch.__version__} is built without CUDA"
    try:
        name = torch.cuda.get_device_name()
        torch.zeros(1, device="cuda").cpu()
    except (RuntimeError, AssertionError) as reason:
        return f"not usable: {str(reason).splitlines()[0]}"
    return f"usable: {name}"


def token_loss_torch(
    inputs: LossInputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`TokenLoss` in plain torch, for any device; a compiler can fuse it."""
    old_log_prob, log_prob, log_ratio, advantages, valid, bounds, *_ = inputs
    surrogate, parameters = inputs.surrogate, inputs.parameters
    old_log_prob = torch.where(valid, old_log_prob, 0.0)
    log_prob = torch.where(valid, log_prob, 0.0)
    cost = torch.where(valid, -advantages, 0.0)
    if log_ratio is None:
        unclamped = log_prob - old_log_prob
    else:
        unclamped = torch.where(valid, log_ratio, 0.0) + _gradient_of(log_prob)
    # Not clamp, which gives a NaN no gradient and so hides it.
    x = torch.where(unclamped > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, unclamped)
    x = torch.where(x < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x)
    ratio = x.exp()
    clamped = unclamped.detach().abs() > LOG_RATIO_LIMIT
    x, r = x.detach(), ratio.detach()

    weighs = surrogate == "weight"
    up, down = (x > 0.0, x < 0.0) if weighs else (cost < 0.0, cost > 0.0)
    if bounds.dtype == torch.int32:
        bound = read_table(bounds, old_log_prob, down)
        clipped_low = down & (r < bound)
        edge = torch.where(down, bound, bound.exp())
    else:
        bound = torch.where(down, bounds[0], bounds[1])
        clipped_low = down & (x < bound)
        edge = bound.exp()
    clipped_high = up & (x > bound)
    beyond = clipped_low | clipped_high
    limited = torch.zeros_like(beyond)

    if surrogate == "min-clip":
        stopped, stop = beyond, edge
        if parameters:
            [dual_clip] = parameters
            limited = down & (x >= math.log(dual_clip))
            stopped, stop = stopped | limited, torch.where(limited, dual_clip, stop)
        # Not minimum and maximum, which halve the gradient where r is at the bound.
        per_token = cost * torch.where(stopped, stop, ratio)
        slope = torch.where(stopped | clamped, 0.0, cost * r)
    elif surrogate == "mask":
        weight = r
        if parameters:
            [truncation] = parameters
            limited = ~beyond & (r > truncation)
            weight = torch.where(limited, truncation, r)
        slope = torch.where(beyond, 0.0, cost * weight)
        # Beyond, an infinite cost must not meet the 0.
        per_token = slope * torch.where(beyond, 0.0, log_prob)
    elif weighs:
        slope = cost * torch.where(beyond, edge, r)
        per_token = slope * log_prob
    else:
        beta_low, beta_high = parameters
        # An infinite edge, which nothing is beyond, would make the gradient of all 0 * inf.
        kept = torch.where(beyond, torch.where(down, beta_low, beta_high) * edge, 0.0)
        per_token = cost * torch.where(beyond, kept * _gradient_of(log_prob).exp(), ratio)
        slope = torch.where(clamped & ~beyond, 0.0, per_token.detach())

    counted = [valid, ~per_token.isfinite(), clipped_low, clipped_high, limited]
    if inputs.by_probability:
        index = probability_bin(old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        counted += [flag & one for flag in (valid, clipped_low, clipped_high) for one in bins]
    counts = torch.stack([flag.sum() for flag in counted])
    if x.numel() == 0:
        return per_token, per_token.sum(), counts, x.new_zeros(SUMS)
    # A masked token has x = 0 and cost = 0 and adds nothing.
    free = cost * r
    of_tokens = (-x, _excess(x), -old_log_prob, free.abs(), (free - slope).abs())
    lowest = torch.where(valid, x, math.inf).amin()
    highest = torch.where(valid, x, -math.inf).amax()
    sums = torch.stack([*(values.sum() for values in of_tokens), lowest, highest])
    return per_token, per_token.sum(), counts, sums


def probability_bin(old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns the bin of `PROBABILITY_EDGES` that each token is in, int64."""
    edges = PROBABILITY_EDGES[1:-1]
    return torch.stack([old_log_prob >= math.log(edge) for edge in edges]).sum(0)


def _gradient_of(log_prob: torch.Tensor) -> torch.Tensor:
    """Zero, with the gradient of the log-prob, which an infinite one has not; a NaN stays."""
    return torch.where(log_prob.isinf(), 0.0, log_prob - log_prob.detach())


def _excess(x: torch.Tensor) -> torch.Tensor:
    """``e^x - 1 - x``, by its series near 0, where the difference has lost its digits."""
    near = x.abs() < 0.1
    z = torch.where(near, x, 0.0)
    series = z / 5040 + 1 / 720
    for factorial in (120, 24, 6, 2):
        series = series * z + 1 / factorial
    return torch.where(near, z * z * series, x.expm1() - x)


@torch.library.custom_op("bandpo::token_loss", mutates_args=(), device_types="cpu", schema=SCHEMA)
def token_loss_op(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, gradients, counts and sums of a batch on the CPU; `bandpo.cuda` adds its kernel."""
    per_token, gradient, _, counts, sums = _all_in_rust(LossInputs(*inputs))
    return per_token, gradient, counts, sums


def _all_in_rust(inputs: LossInputs) -> tuple[torch.Tensor, ...]:
    """Losses, gradients, their sum, counts and sums."""
    per_token = _empty_like(inputs.log_prob)
    return per_token, *_in_rust(inputs, per_token=per_token)


def _empty_like(log_prob: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(log_prob.detach(), memory_format=torch.contiguous_format)


def _in_rust(
    inputs: LossInputs, weight: float = 1.0, *, per_token: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Gradients and sum of the losses, both times the weight, counts and sums.

    The losses themselves are written to ``per_token``.
    """
    log_prob, bounds = inputs.log_prob.detach(), inputs.bounds
    gradient = _empty_like(log_prob)

    def array(tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.contiguous().numpy()

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
        weight,
        None if per_token is None else per_token.numpy(),
        gradient.numpy(),
    )
    return (
        gradient,
        torch.tensor(weight * total, dtype=log_prob.dtype),
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


def _save_gradient(ctx: Any, surrogate: str, gradient: torch.Tensor) -> None:
    ctx.save_for_backward(gradient)
    ctx.set_materialize_grads(False)
    # The gradient of the other two does not depend on log_prob: its ratio is a constant.
    ctx.carries_ratio = surrogate in ("min-clip", "gradient-preserving")


def _save_of_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _save_gradient(ctx, LossInputs(*inputs).surrogate, output[1])


def _backward(
    ctx: Any,
    grad_per_token: torch.Tensor | None,
    grad_gradient: torch.Tensor | None,
    *_: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grad_per_token, grad_gradient)


def _gradients(
    ctx: Any, grad_per_token: torch.Tensor | None, grad_gradient: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Those of the inputs, of which only ``log_prob`` has one."""
    (gradient,) = ctx.saved_tensors
    # Where a gradient carries the ratio, its own derivative is itself: good for any order.
    if not ctx.carries_ratio:
        gradient, grad_gradient = gradient.detach(), None
    grads = [grad for grad in (grad_per_token, grad_gradient) if grad is not None]
    if not grads:
        return gradients_of(None)
    whole = grads[0] if len(grads) == 1 else grads[0] + grads[1]
    return gradients_of(gradient * whole)


token_loss_op.register_autograd(_backward, setup_context=_save_of_op)


def token_loss_fused(
    inputs: LossInputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`TokenLoss` with its gradient in one pass: in Rust on the CPU, a kernel on CUDA devices."""
    if not (_is_in_memory(inputs.log_prob) or _is_transformed()):
        per_token, _, counts, sums = token_loss_op(*inputs)
        return per_token, per_token.sum(), counts, sums.detach()
    per_token, _, total, counts, sums = _TokenLossFunction.apply(*inputs)  # type: ignore[no-untyped-call]
    return per_token, total, counts, sums


def count_valid(valid: torch.Tensor) -> int:
    """Returns how many tokens count, of a bool tensor of the CPU."""
    return _core.count_valid(valid.contiguous().numpy().view(np.uint8))


def needs_no_dispatcher(tensor: torch.Tensor) -> bool:
    """Whether Rust can take a tensor, one of the CPU: nothing traces or transforms it."""
    return (
        _is_in_memory(tensor)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of torch.autograd itself
    )


def weighted_sum(
    weight: float, inputs: LossInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sum of the losses times a weight, counts and sums of a `TokenLoss`.

    Nothing but the gradient is written, already weighted: for a loss that is a mean, neither it nor
    its gradient needs another pass over the tokens. And without the dispatcher, which costs more
    than the loss of a thousand tokens.

    Args:
        weight: What the sum is multiplied by.
        inputs: Those of a `TokenLoss`, for which `needs_no_dispatcher`.
    """
    _, loss, counts, sums = _WeightedSum.apply(weight, *inputs)  # type: ignore[no-untyped-call]
    return loss, counts, sums


def _forward_mode(
    ctx: Any, tangents: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of the losses and of their gradients, for those of `LossInputs`."""
    (gradient,) = ctx.saved_tensors
    moved = gradient * LossInputs(*tangents).log_prob  # type: ignore[arg-type]
    return moved, moved if ctx.carries_ratio else torch.zeros_like(moved)


class _TokenLossFunction(torch.autograd.Function):
    """The operator in the form that `torch.func` takes, with the sum of the losses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        """Returns losses, gradients, the sum of the losses, counts and sums."""
        inputs = LossInputs(*args)
        if needs_no_dispatcher(inputs.log_prob):
            return _all_in_rust(inputs)
        per_token, gradient, counts, sums = token_loss_op(*inputs)
        return per_token, gradient, per_token.sum(), counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Saves the gradient."""
        _save_gradient(ctx, LossInputs(*inputs).surrogate, output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Returns the tangents of the outputs."""
        moved, of_gradient = _forward_mode(ctx, tangents)
        return moved, of_gradient, moved.sum(), None, None

    @staticmethod
    def backward(
        ctx: Any,
        grad_per_token: torch.Tensor | None,
        grad_gradient: torch.Tensor | None,
        grad_total: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        if grad_total is None:
            return _gradients(ctx, grad_per_token, grad_gradient)
        # To add to each of the losses is to add to their sum.
        whole = grad_total if grad_per_token is None else grad_per_token + grad_total
        return _gradients(ctx, whole, grad_gradient)


class _WeightedSum(torch.autograd.Function):
    # Not in the newer form with setup_context: for that torch inspects signatures at every call.
    @staticmethod
    def forward(ctx: Any, weight: float, *args: Any) -> tuple[torch.Tensor, ...]:
        inputs = LossInputs(*args)
        output = _in_rust(inputs, weight)
        _save_gradient(ctx, inputs.surrogate, output[0])
        ctx.is_shared = _has_hooks_on_saved_tensors()
        ctx.save_for_forward(output[0])
        ctx.mark_non_differentiable(*output[2:])
        return output

    @staticmethod
    def jvp(
        ctx: Any, weight: None, *tangents: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the tangents of the outputs."""
        moved, of_gradient = _forward_mode(ctx, tangents)
        return of_gradient, moved.sum(), None, None

    @staticmethod
    def backward(
        ctx: Any,
        grad_gradient: torch.Tensor | None,
        grad_loss: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        if (
            grad_gradient is not None
            or grad_loss is None
            or torch.is_grad_enabled()
            or not needs_no_dispatcher(grad_loss)
        ):
            return None, *_gradients(ctx, grad_loss, grad_gradient)
        (saved,) = ctx.saved_tensors
        # Where the graph is about to be freed nobody needs the gradient as it was, and memory that
        # is new to the process costs more than all the rest.
        gradient = saved.clone() if ctx.is_shared or _keeps_graph() else saved.detach()
        if grad_loss.numpy() != 1.0:
            # In Rust as well: the threads of torch would go on to spin for a while, where those of
            # the next loss are to run.
            _core.scale(gradient.numpy(), grad_loss.numpy())
        return None, *gradients_of(gradient)


def _keeps_graph() -> bool:
    """Whether the backward pass that is running leaves its graph for another one."""
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return known is None or bool(known())


def _has_hooks_on_saved_tensors() -> bool:
    """Whether others are shown what is saved now, who may keep it or give the same out twice."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
