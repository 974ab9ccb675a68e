"""Checks of the tensors that a correction is called with."""

from __future__ import annotations

import torch

from bandpo.batch.check import check_cu_seqlens, without_last_1
from bandpo.correction.rule import Correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.tensors.check import check_float, check_tensor


def check_batch(
    rule: Correction,
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor | None,
) -> tuple[int, int]:
    """Returns the shape of the tokens, [B, T]; packed tokens are one row.

    Raises:
        InvalidTypeError: If a tensor is none, or has a dtype that is not accepted.
        InvalidValueError: If shapes or devices do not match, or advantages are missing.
    """
    if rollout_log_prob is None:
        raise InvalidTypeError(
            "rollout_log_prob must be a torch.Tensor, got None: the log-probabilities that the "
            "rollout engine returned with the tokens (vLLM and SGLang: an option of the request)"
        )
    check_float("old_log_prob", old_log_prob)
    check_float("rollout_log_prob", rollout_log_prob)
    check_tensor("response_mask", response_mask)
    if response_mask.is_complex():
        raise InvalidTypeError(
            f"response_mask must be bool, int or float, got {response_mask.dtype}"
        )
    shape = without_last_1(old_log_prob)
    if not 1 <= len(shape) <= 2:
        raise InvalidValueError(
            f"old_log_prob must have shape [B, T], [B, T, 1] or, packed, [N], "
            f"got {tuple(old_log_prob.shape)}"
        )
    if advantages is None and rule.needs_advantages:
        argument = "negative_only" if rule.negative_only else "outward_only"
        raise InvalidValueError(
            f"advantages must be given with {argument}, one a token or one a sequence"
        )
    others = [
        ("rollout_log_prob", rollout_log_prob, [shape]),
        ("response_mask", response_mask, [shape]),
    ]
    if advantages is not None:
        check_float("advantages", advantages)
        per_row = [(shape[0], 1), shape[:1]] if len(shape) == 2 else []
        others.append(("advantages", advantages, [shape, *per_row]))
    for argument, tensor, shapes in others:
        if without_last_1(tensor) not in shapes:
            raise InvalidValueError(
                f"{argument} must have shape {' or '.join(map(str, shapes))} "
                f"like old_log_prob's {tuple(old_log_prob.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != old_log_prob.device:
            raise InvalidValueError(
                f"{argument} must be on old_log_prob's device {old_log_prob.device}, "
                f"got {tensor.device}"
            )
    rows, width = shape if len(shape) == 2 else (1, shape[0])
    return rows, width


def check_sequences(
    rule: Correction, old_log_prob: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> None:
    """Raises unless ``cu_seqlens`` are offsets, or are not needed and not given."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, old_log_prob)
    elif old_log_prob.ndim == 1 and rule.level != "token":
        raise InvalidValueError(
            f"cu_seqlens must be given for level {rule.level!r} with packed tensors: "
            f"offsets of the sequences, int32 or int64 [S + 1]"
        )
