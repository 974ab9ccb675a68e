"""Checks of the tensors that a user gives to a loss: types, dtypes, shapes, devices, offsets."""

from __future__ import annotations

import numpy as np
import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.tensors.check import check_float, check_tensor
from bandpo.tensors.internals import is_transformed, needs_no_dispatcher


def check_tokens(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    rollout_is_weights: torch.Tensor | None,
    anchor_log_prob: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Returns the shape of the tokens as backends take them, [B, T]; packed tokens are one row.

    Args:
        old_log_prob: As `bandpo.loss.policy_loss` takes it, like the next ones.
        log_prob: Sets the shape.
        advantages: One a token or one a row.
        response_mask: Bool, int or float.
        rollout_is_weights: Like advantages, or None.
        anchor_log_prob: Like ``old_log_prob``, or None.

    Raises:
        InvalidTypeError: If a tensor is none, or has a dtype that is not accepted.
        InvalidValueError: If shapes or devices do not match.
    """
    check_float("old_log_prob", old_log_prob)
    check_float("log_prob", log_prob)
    check_float("advantages", advantages)
    check_tensor("response_mask", response_mask)
    of_tokens = [("old_log_prob", old_log_prob), ("response_mask", response_mask)]
    if anchor_log_prob is not None:
        check_float("anchor_log_prob", anchor_log_prob)
        of_tokens.append(("anchor_log_prob", anchor_log_prob))
    of_rows = [("advantages", advantages)]
    if rollout_is_weights is not None:
        check_float("rollout_is_weights", rollout_is_weights)
        of_rows.append(("rollout_is_weights", rollout_is_weights))
    return check_alike("log_prob", log_prob, of_tokens, of_rows, response_mask)


def check_alike(
    name: str,
    like: torch.Tensor,
    of_tokens: list[tuple[str, torch.Tensor]],
    of_rows: list[tuple[str, torch.Tensor]],
    response_mask: torch.Tensor,
) -> tuple[int, int]:
    """Returns the shape of a batch, [B, T], if its tensors have the shape and device of one.

    Args:
        name: The argument that sets both.
        like: Its tensor, [B, T], [B, T, 1] or, packed, [N].
        of_tokens: Arguments with one element a token.
        of_rows: Arguments with one a token or one a row.
        response_mask: Which tokens count.

    Raises:
        InvalidTypeError: If the mask is complex.
        InvalidValueError: If shapes or devices do not match.
    """
    if response_mask.is_complex():
        raise InvalidTypeError(
            f"response_mask must be bool, int or float, got {response_mask.dtype}"
        )
    shape = without_last_1(like)
    if not 1 <= len(shape) <= 2:
        raise InvalidValueError(
            f"{name} must have shape [B, T], [B, T, 1] or, packed, [N], got {tuple(like.shape)}"
        )
    per_row = ((shape[0], 1), shape[:1]) if len(shape) == 2 else ()
    for arguments, shapes in ((of_tokens, (shape,)), (of_rows, (shape, *per_row))):
        for argument, tensor in arguments:
            if without_last_1(tensor) not in shapes:
                raise InvalidValueError(
                    f"{argument} must have shape {' or '.join(map(str, shapes))} "
                    f"like {name}'s {tuple(like.shape)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != like.device:
                raise InvalidValueError(
                    f"{argument} must be on {name}'s device {like.device}, got {tensor.device}"
                )
    rows, width = shape if len(shape) == 2 else (1, shape[0])
    return rows, width


def check_gradient(log_prob: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises InvalidValueError if other log-probs require a gradient and ``log_prob`` does not.

    A loss has a gradient to ``log_prob`` alone, so the policy would not be trained. Transforms are
    left out, because in one a tensor may hide that it requires a gradient.
    """
    if log_prob.requires_grad or not torch.is_grad_enabled() or is_transformed():
        return
    for argument, other in others.items():
        if other is not None and other.requires_grad:
            raise InvalidValueError(
                f"log_prob must require a gradient if {argument} does, because a loss has one to "
                f"log_prob alone: are the two swapped? Without training, pass "
                f"{argument}.detach()"
            )


def check_mask(response_mask: torch.Tensor) -> None:
    """Raises InvalidValueError if a mask of floats on the CPU has another number than 0 and 1."""
    if not response_mask.is_floating_point() or not needs_no_dispatcher(response_mask):
        return
    other = response_mask[(response_mask != 0.0) & (response_mask != 1.0)]
    if other.numel():
        raise InvalidValueError(
            f"response_mask must hold 0 and 1 if it is a float, got {other[0].item()}; weights of "
            f"tokens are rollout_is_weights"
        )


def check_weights(weights: torch.Tensor, valid: torch.Tensor) -> None:
    """Raises InvalidValueError if a weight on the CPU, of a token that counts, is below 0."""
    if not needs_no_dispatcher(weights):
        return
    below = (weights < 0.0) & valid
    if below.any():
        raise InvalidValueError(
            f"rollout_is_weights must be at least 0, got {weights.expand(valid.shape)[below][0]}"
        )


def without_last_1(tensor: torch.Tensor) -> tuple[int, ...]:
    """Returns a shape, without the last dimension of [B, T, 1]."""
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def check_cu_seqlens(cu_seqlens: torch.Tensor, name: str, like: torch.Tensor) -> None:
    """Raises unless ``cu_seqlens`` are offsets, [S + 1], of the sequences of packed tensors.

    Args:
        cu_seqlens: What a user gave.
        name: The argument that sets shape and device, as in `check_alike`.
        like: Its tensor.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidTypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if like.ndim != 1:
        raise InvalidValueError(
            f"cu_seqlens must be left out unless tensors are packed, [N]: "
            f"{name} has shape {tuple(like.shape)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise InvalidValueError(
            f"cu_seqlens must have shape [S + 1], got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != like.device:
        raise InvalidValueError(
            f"cu_seqlens must be on {name}'s device {like.device}, got {cu_seqlens.device}"
        )
    # On another device, reading the values would make the host wait.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            offsets, tokens = cu_seqlens.numpy(), like.shape[0]
        except RuntimeError:  # traced or batched offsets have no numbers
            return
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
            raise InvalidValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, "
                f"got {np.array2string(offsets, threshold=8)}"
            )
