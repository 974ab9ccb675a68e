"""The kernels as functions of tensors, registered with the operators for CUDA devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bandpo import _core
from bandpo.backends.contract import COUNTS, PROBABILITY_BINS, SUMS, LossInputs, Weight
from bandpo.backends.cuda.availability import kernels_run
from bandpo.backends.cuda.launch import CHUNK, THREADS, WIDTH, launch
from bandpo.backends.native import token_loss_op
from bandpo.region import Band, Clip, Combined, Region
from bandpo.surrogate import BY_NAME, NAMES
from bandpo.tensors.cached import cached, upload
from bandpo.tensors.check import compute_dtype
from bandpo.tensors.exact import (
    contains_on_host,
    exact_contains_op,
    exact_log_bounds_op,
    exact_region,
    log_bounds_on_host,
)
from bandpo.tensors.lookup import clipped_op, table_log_bounds_op

_STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "bandpo::Half",
    torch.bfloat16: "bandpo::BFloat16",
}


MAX_SMALL_CHUNKS = 1024
"""Chunks of a batch below which chunks are smaller."""


def token_loss(
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns losses and gradients, [B, T], counts and sums; takes the fields of `LossInputs`.

    Tensors may have any strides.
    """
    inputs = LossInputs(*args)
    log_prob = inputs.log_prob
    dtype = compute_dtype(log_prob)
    per_token, gradient = _like(log_prob, dtype), _like(log_prob, dtype)
    counts, sums = _run(inputs, gradient, per_token=per_token)
    return per_token, gradient, counts, sums


def weighted_sum(
    inputs: LossInputs, weight: Weight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients and the sum of the losses, both times a weight, counts and sums.

    The gradients are in the dtype of the log-probs. Those of float16 are float32, because a loss
    scale is still to bring them into its range.
    """
    log_prob = inputs.log_prob.detach()
    dtype = compute_dtype(log_prob)
    stored = torch.bfloat16 if log_prob.dtype == torch.bfloat16 else dtype
    gradient = _like(log_prob, stored)
    total = torch.empty((), dtype=dtype, device=log_prob.device)
    counts, sums = _run(inputs, gradient, total=total, weight=weight)
    return gradient, total, counts, sums


def _like(log_prob: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for one number a token; half the time of `torch.empty` with a shape."""
    return torch.empty_like(log_prob, dtype=dtype, memory_format=torch.contiguous_format)


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a contiguous gradient by a 0-dim factor in place; a factor of 1 costs nothing."""
    count = gradient.numel()
    if count > 0:
        launch(
            f"bandpo::scale_gradient<{_STORED[gradient.dtype]}>",
            gradient.device,
            -(-count // (WIDTH * THREADS)),
            "PqP",
            (gradient.data_ptr(), count, factor.data_ptr()),
        )


def count_valid(valid: torch.Tensor) -> torch.Tensor:
    """Returns how many of a bool tensor are True, float64 and 0-dim."""
    valid = valid.contiguous()
    total = torch.zeros((), dtype=torch.float64, device=valid.device)
    count = valid.numel()
    if count > 0:
        aligned = valid if valid.data_ptr() % 16 == 0 else valid.clone()
        launch(
            "bandpo::count_valid<unsigned char>",
            valid.device,
            -(-count // (16 * THREADS)),
            "PqP",
            (aligned.data_ptr(), count, total.data_ptr()),
        )
    return total


def _run(
    inputs: LossInputs,
    gradient: torch.Tensor,
    *,
    per_token: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    weight: Weight | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes gradients, and the losses or their weighted sum; returns counts and sums."""
    log_prob, bounds = inputs.log_prob, inputs.bounds
    count, device = log_prob.numel(), log_prob.device
    computed, computed_type = ("double", "d") if log_prob.dtype == torch.float64 else ("float", "f")
    chunk = chunk_length(count)
    chunks = -(-count // chunk)
    kinds = COUNTS + 3 * PROBABILITY_BINS * inputs.by_probability
    # Sums of the chunks in float64, then their counts in int32.
    size = 8 * (SUMS + 1) * chunks
    work = torch.empty(size + 4 * kinds * chunks, dtype=torch.uint8, device=device)
    of_chunks = work.data_ptr(), work.data_ptr() + size
    sums = torch.empty(SUMS, dtype=torch.float64, device=device)
    counts = torch.empty(kinds, dtype=torch.int64, device=device)
    numerator, divisor = (1.0, None) if weight is None else weight.on(device)
    weighted = numerator, _pointer(divisor)

    if count > 0:
        tokens, layout = _tokens_of(inputs)
        first, second = [*inputs.parameters, math.inf, math.inf][:2]
        kind, bounds, words = _bounds_kind(bounds)
        needs_width = BY_NAME[inputs.surrogate].needs_width
        if inputs.anchor_log_prob is not None or needs_width:
            family = "EXTENDED"
        else:
            family = "MIN_CLIP_ALONE" if inputs.surrogate == "min-clip" else "PLAIN"
        launch(
            f"bandpo::policy_loss<{_STORED[log_prob.dtype]}, bandpo::{kind}, bandpo::{family}>",
            device,
            chunks,
            6 * "Pqq" + "qqIPii" + 3 * computed_type + "iPPdPiPP",
            (
                *tokens,
                count,
                log_prob.shape[1],
                layout,
                bounds.data_ptr(),
                words,
                NAMES.index(inputs.surrogate),
                first,
                second,
                math.log(first) if inputs.surrogate == "min-clip" else 0.0,
                inputs.by_probability,
                _pointer(per_token),
                gradient.data_ptr(),
                *weighted,
                chunk,
                *of_chunks,
            ),
            4 * words,
        )
    launch(
        f"bandpo::policy_loss_totals<{computed}>",
        device,
        SUMS + 1 + kinds,
        "PPqiPPdPP",
        (
            *of_chunks,
            chunks,
            kinds,
            sums.data_ptr(),
            counts.data_ptr(),
            *weighted,
            _pointer(total),
        ),
    )
    return counts, sums


def chunk_length(count: int) -> int:
    """Returns how many tokens a block adds up; fewer of a small batch, so that many blocks run.

    Results depend on it in their last bits, so it depends on nothing of the device.
    """
    wanted = max(1, -(-count // MAX_SMALL_CHUNKS))
    return min(max(THREADS * WIDTH, 1 << (wanted - 1).bit_length()), CHUNK)


def table_log_bounds(words: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns `bandpo.tensors.lookup.table_log_bounds_op` by a kernel."""
    old_log_prob = old_log_prob.contiguous()
    bounds = torch.empty(
        (2, *old_log_prob.shape),
        dtype=compute_dtype(old_log_prob),
        device=old_log_prob.device,
    )
    count = old_log_prob.numel()
    if count > 0:
        _, words, size = _bounds_kind(words)
        launch(
            f"bandpo::band_bounds<{_STORED[old_log_prob.dtype]}>",
            old_log_prob.device,
            -(-count // THREADS),
            "PqPiPP",
            (
                old_log_prob.data_ptr(),
                count,
                words.data_ptr(),
                size,
                bounds[0].data_ptr(),
                bounds[1].data_ptr(),
            ),
            4 * size,
        )
    return bounds


def clipped(
    bounds: torch.Tensor, old_log_prob: torch.Tensor, values: torch.Tensor, of_ratio: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `bandpo.tensors.lookup.clipped_op` by a kernel."""
    old_log_prob, values = old_log_prob.contiguous(), values.contiguous()
    moved = torch.empty_like(values)
    count = moved.numel()
    if count > 0:
        kind, bounds, words = _bounds_kind(bounds)
        launch(
            f"bandpo::band_clip<{_STORED[old_log_prob.dtype]}, bandpo::{kind}>",
            moved.device,
            -(-count // THREADS),
            "PPqiPiP",
            (
                old_log_prob.data_ptr(),
                values.data_ptr(),
                count,
                of_ratio,
                bounds.data_ptr(),
                words,
                moved.data_ptr(),
            ),
            4 * words,
        )
    return moved, moved == values


def log_bounds(region: Region, old_log_prob: torch.Tensor) -> torch.Tensor | None:
    """Returns the exact log bounds of a region, float64 [2, ...], solved on the device.

    The bounds are always inside. They are within 1e-12 of the exact bound, relatively, if its
    condition number is at most 20 and the log-prob, any float, is in [-690, -1e-300].

    Returns:
        None if the region has a part that only the CPU can solve: a divergence that is an
        expression or a Python function, `Dcpo`, a user's own `Region`, or deltas that do not
        broadcast to the shape of ``old_log_prob``, for which the CPU raises the error.
    """
    if type(region) is Combined:
        parts = [log_bounds(part, old_log_prob) for part in region.parts]
        left, right = parts
        if left is None or right is None:
            return None
        if region.kind == "sides":
            return torch.stack([left[0], right[1]])
        wider = torch.stack([torch.minimum(left[0], right[0]), torch.maximum(left[1], right[1])])
        narrower = torch.stack([torch.maximum(left[0], right[0]), torch.minimum(left[1], right[1])])
        return wider if region.kind == "union" else narrower
    if isinstance(region, Clip):
        unknown = torch.where(old_log_prob.isnan(), old_log_prob.double(), 0.0)
        return torch.stack([unknown + region.log_lower, unknown + region.log_upper])
    solver = _solver_of(region, old_log_prob)
    if solver is None:
        return None
    old_log_prob = old_log_prob.contiguous()
    count = old_log_prob.numel()
    bounds = torch.empty((2, *old_log_prob.shape), dtype=torch.float64, device=old_log_prob.device)
    if count > 0:
        arguments, _ = solver  # which holds the radii
        launch(
            f"bandpo::band_solve<{_STORED[old_log_prob.dtype]}>",
            old_log_prob.device,
            -(-2 * count // THREADS),
            f"Pq{_SOLVER}P",
            (old_log_prob.data_ptr(), count, *arguments, bounds.data_ptr()),
        )
    return bounds


def contains(
    region: Region, old_log_prob: torch.Tensor, log_ratio: torch.Tensor
) -> torch.Tensor | None:
    """Returns True for each log-ratio in a region, by one evaluation of the divergence in float64.

    A log-ratio whose divergence is within about 1e-14 of delta, relatively, may be taken for
    either. ``log_ratio`` has the shape and dtype of ``old_log_prob``.

    Returns:
        None if the region has a part that only the CPU can decide; see `log_bounds`.
    """
    if type(region) is Combined:
        left, right = (contains(part, old_log_prob, log_ratio) for part in region.parts)
        if left is None or right is None:
            return None
        if region.kind == "sides":
            return torch.where(log_ratio < 0.0, left, right)
        return left | right if region.kind == "union" else left & right
    if isinstance(region, Clip):
        within = (log_ratio >= region.log_lower) & (log_ratio <= region.log_upper)
        return within & ~old_log_prob.isnan()
    solver = _solver_of(region, old_log_prob)
    if solver is None:
        return None
    old_log_prob, log_ratio = old_log_prob.contiguous(), log_ratio.contiguous()
    inside = torch.empty(old_log_prob.shape, dtype=torch.bool, device=old_log_prob.device)
    count = inside.numel()
    if count > 0:
        arguments, _ = solver  # which holds the radii
        launch(
            f"bandpo::band_contains<{_STORED[old_log_prob.dtype]}>",
            old_log_prob.device,
            -(-count // THREADS),
            f"PPq{_SOLVER}P",
            (
                old_log_prob.data_ptr(),
                log_ratio.data_ptr(),
                count,
                *arguments,
                inside.data_ptr(),
            ),
        )
    return inside


_SOLVER = "idPPq"
"""Types of generator and radii."""


def _solver_of(
    region: Region, old_log_prob: torch.Tensor
) -> tuple[tuple[float, ...], torch.Tensor] | None:
    """Generator and radii as kernels take them, and the tensor to keep for the launch."""
    if type(region) is not Band:
        return None
    divergence = region.divergence.solver.core
    if divergence is None or divergence.kernel_generator is None:
        return None
    shape = tuple(old_log_prob.shape)
    if isinstance(region.delta_low, np.ndarray):
        try:
            if np.broadcast_shapes(region.delta_low.shape, shape) != shape:
                return None
        except ValueError:
            return None
    radii = _radii_of(region, divergence, old_log_prob.device)
    if region.per_token:
        radii = radii.expand(shape).contiguous()
        low = high = radii.data_ptr()
    else:
        low, high = radii.data_ptr(), radii[1:].data_ptr()
    kind, parameter = divergence.kernel_generator
    return (kind, parameter, low, high, region.per_token), radii  # per_token is the stride


def _radii_of(region: Band, divergence: _core.Divergence, device: torch.device) -> torch.Tensor:
    """The generator's radii on a device: one for each delta, or the low and the high one."""

    def make() -> torch.Tensor:
        sides = region.delta_low, region.delta_high
        deltas = sides[0] if isinstance(sides[0], np.ndarray) else np.array(sides)
        radii = divergence.generator_radii(np.ascontiguousarray(deltas).reshape(-1))
        return upload(radii.reshape(deltas.shape), device)

    return cached(region, "radii", device, make)


def _bounds_kind(bounds: torch.Tensor) -> tuple[str, torch.Tensor, int]:
    """The kernels' type for bounds of this kind, the bounds, and the number of a table's words."""
    bounds = bounds.contiguous()
    if bounds.dtype == torch.int32:
        return "Table", bounds, bounds.numel()
    return ("Constant" if bounds.ndim == 1 else "PerToken"), bounds, 0


def _tokens_of(inputs: LossInputs) -> tuple[list[int], int]:
    """Address and strides of each tensor of tokens, and ``Layout`` of cuda/loss.cu."""
    row_length = inputs.log_prob.shape[1]
    of_rows = inputs.advantages.shape[1] != row_length
    arguments: list[int] = []
    whole = True
    for tensor in (
        inputs.old_log_prob,
        inputs.log_prob,
        inputs.log_ratio,
        inputs.advantages,
        inputs.valid,
        inputs.anchor_log_prob,
    ):
        if tensor is None:
            arguments += 0, 0, 0
            continue
        pointer = tensor.data_ptr()
        rows, columns = tensor.stride()
        if tensor is inputs.advantages and of_rows:
            columns = 0
            whole = whole and row_length % WIDTH == 0
        else:
            alignment = min(16, WIDTH * tensor.element_size())
            whole = whole and pointer % alignment == 0 and tensor.is_contiguous()
        arguments += pointer, rows, columns
    return arguments, whole + 2 * (whole and of_rows) + 4 * (inputs.log_ratio is not None)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _exact_log_bounds(old_log_prob: torch.Tensor, region: int) -> torch.Tensor:
    if kernels_run():
        solved = log_bounds(exact_region(region), old_log_prob)
        if solved is not None:
            return solved.to(compute_dtype(old_log_prob))
    return log_bounds_on_host(old_log_prob, region)


def _exact_contains(
    old_log_prob: torch.Tensor, log_ratio: torch.Tensor, region: int
) -> torch.Tensor:
    if kernels_run():
        inside = contains(exact_region(region), old_log_prob, log_ratio)
        if inside is not None:
            return inside
    return contains_on_host(old_log_prob, log_ratio, region)


for _operator, _kernel in (
    (token_loss_op, token_loss),
    (table_log_bounds_op, table_log_bounds),
    (clipped_op, clipped),
    (exact_log_bounds_op, _exact_log_bounds),
    (exact_contains_op, _exact_contains),
):
    _operator.register_kernel("cuda")(_kernel)
