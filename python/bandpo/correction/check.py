"""Checks of the tensors that a correction is called with."""

from __future__ import annotations

import torch

from bandpo.batch.check import check_alike, check_cu_seqlens, check_mask
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
        InvalidValueError: If shapes or devices do not match, advantages are missing, or a mask of
            floats on the CPU has another number than 0 and 1.
    """
    if rollout_log_prob is None:
        raise InvalidTypeError(
            "rollout_log_prob must be a torch.Tensor, got None: the log-probabilities that the "
            "rollout engine returned with the tokens (vLLM and SGLang: an option of the request)"
        )
    check_float("old_log_prob", old_log_prob)
    check_float("rollout_log_prob", rollout_log_prob)
    check_tensor("response_mask", response_mask)
    if advantages is None and rule.needs_advantages:
        argument = "negative_only" if rule.negative_only else "outward_only"
        raise InvalidValueError(
            f"advantages must be given with {argument}, one a token or one a sequence"
        )
    of_rows = []
    if advantages is not None:
        check_float("advantages", advantages)
        of_rows.append(("advantages", advantages))
    of_tokens = [("rollout_log_prob", rollout_log_prob), ("response_mask", response_mask)]
    shape = check_alike("old_log_prob", old_log_prob, of_tokens, of_rows, response_mask)
    check_mask(response_mask)
    return shape


def check_sequences(
    rule: Correction, old_log_prob: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> None:
    """Raises unless ``cu_seqlens`` are offsets, or are not needed and not given."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "old_log_prob", old_log_prob)
    elif old_log_prob.ndim == 1 and rule.level != "token":
        raise InvalidValueError(
            f"cu_seqlens must be given for level {rule.level!r} with packed tensors: "
            f"offsets of the sequences, int32 or int64 [S + 1]"
        )
