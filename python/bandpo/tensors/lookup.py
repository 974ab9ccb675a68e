"""Bounds from the words of a table, in plain torch and as operators.

An operator gives a CUDA kernel its place in a compiled graph. Other devices call the function
behind it, because a compiler can fuse that. docs/table-format.md describes the words.
"""

from __future__ import annotations

from typing import Any

import torch

from bandpo.tensors.check import compute_dtype


def table_log_bounds(
    words: torch.Tensor, old_log_prob: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(log_lower, log_upper)`` of every token, in its shape and dtype."""
    lower, log_upper = (
        read_table(words, old_log_prob, words.new_full((), side, dtype=torch.bool))
        for side in (True, False)
    )
    return lower.log(), log_upper


@torch.library.custom_op(
    "bandpo::table_log_bounds",
    mutates_args=(),
    schema="(Tensor words, Tensor old_log_prob) -> Tensor",
)
def table_log_bounds_op(words: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns `table_log_bounds` as [2, ...]; in float32 for half precision."""
    precise = old_log_prob.to(compute_dtype(old_log_prob))
    return torch.stack(table_log_bounds(words, precise))


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
    """Returns values moved to the nearest bound if they are outside, and which are inside.

    Args:
        bounds: As `bandpo.tensors.bounds.bounds_of` returns them.
        old_log_prob: Old log-probabilities, any float.
        values: Log-ratios, or ratios with ``of_ratio``; same shape, and the same dtype, or float32
            for half precision.
        of_ratio: Whether the values are ratios.
    """
    old_log_prob = old_log_prob.to(values.dtype)
    if bounds.dtype == torch.int32:
        log_lower, log_upper = table_log_bounds(bounds, old_log_prob)
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
    """Returns one bound of every token: ``lower``, a ratio, or ``log_upper``.

    The operations of ``rust/image.rs`` in the same order, for the same bits.

    Args:
        words: Image of a table, int32 [words].
        old_log_prob: Old log-probabilities, float32 or float64; rounded to float32 for the lookup.
        lower: True for the lower bound, bool, broadcasts with ``old_log_prob``.

    Returns:
        The bounds, in the dtype of ``old_log_prob``.
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
    # The rest of the mantissa becomes that of a float in [1, 2).
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
    # If everything is allowed, y in float32 could fall short of a new probability of 1.
    return torch.where(everything, (-old_log_prob).clamp(min=0.0), bound)
